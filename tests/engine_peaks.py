"""Measures the peak memory of exact decodes and encodes, or previews, in a process of its own.

``engine_peaks.py`` reads a job from each line of its input: {"preview": true or false, "causal": true or false,
"encode": true or false, "vae": keywords of AutoencoderTiny, AutoencoderKLQwenImage or AutoencoderKL, "kernels": ...,
"dtype": ..., "threads": n, "block_values": n or null, "keep_memory": true or false, "cases":
[{"size": [lh, lw], "batch": n, "fraction": f or null}]}. A size is that of latents, or of pixels that are encoded. A
fraction of 0 sets the memory limit to the smallest that works, 1 to the peak of the unlimited plan, and values between
them to limits between these. One line of JSON is printed for each case, and an empty one after a job: {"predicted":
bytes, "measured": bytes, "limit": ..., "runtime": bytes, "work_ratio": ..., "spill": bytes, "seconds": s}.

What is measured is the high-water mark of resident memory during the call, above what was resident before it; of
two calls, where the first one's memory is kept for the second.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderTiny

from fluxvae.engine.calls import RUNTIME_BYTES
from fluxvae.engine.exact import ExactDecoder, ExactEncoder
from fluxvae.engine.preview import PreviewDecoder, PreviewEncoder


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(field)


def trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


Measure = Callable[[dict[str, Any]], list[dict[str, float]]]


@contextlib.contextmanager
def measuring() -> Iterator[Measure]:
    """Start this file in a process of its own. Yields what measures a job there: a dictionary for each case.

    Several small jobs may share a process, whose start takes as long as they do. Every case measures above what is
    resident as it begins.
    """
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def measure(job: dict[str, Any]) -> list[dict[str, float]]:
            print(json.dumps(job), file=stdin, flush=True)
            rows = []
            while (line := stdout.readline()) != "\n":
                assert line, f"it ended with status {child.wait()}; what it said is on standard error"
                rows.append(json.loads(line))
            assert len(rows) == len(job["cases"])
            return rows

        try:
            yield measure
        finally:
            stdin.close()


def measure(job: dict[str, Any]) -> list[dict[str, float]]:
    """Measure one job in a process of its own: a dictionary for each case."""
    with measuring() as measure_there:
        return measure_there(job)


def runtime(engine: ExactDecoder | ExactEncoder, itemsize: int) -> int:
    """What the plan allows for code and buffers of libraries, which later calls need less of."""
    return RUNTIME_BYTES[itemsize] + engine._kernels(torch.device("cpu")).runtime_bytes(itemsize)


def main() -> None:
    usual = torch.get_num_threads()
    for line in sys.stdin:
        job = json.loads(line)
        torch.set_num_threads(job.get("threads", usual))
        run(job)
        print(flush=True)


def run(job: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dtype = getattr(torch, job.get("dtype", "float32"))
    preview = job.get("preview", False)
    kind = AutoencoderKLQwenImage if job.get("causal") else AutoencoderTiny if preview else AutoencoderKL
    vae = kind(**job["vae"]).eval().requires_grad_(False)
    encode = job.get("encode", False)
    setattr(vae, "decoder" if encode else "encoder", None)
    vae.to(dtype)
    channels = 3 if encode else vae.config.z_dim if job.get("causal") else vae.config.latent_channels
    keeps = job.get("keep_memory", False)
    options = {"kernels": job.get("kernels"), "block_values": job.get("block_values"), "keep_memory": keeps}
    options = {} if preview else options
    make = (PreviewEncoder if encode else PreviewDecoder) if preview else (ExactEncoder if encode else ExactDecoder)
    first = make(vae, **options)
    first.prepare()
    if preview:
        side = 32 if encode else 4
        (first.encode if encode else first.decode)(torch.randn(1, channels, side, side).to(dtype))
    for case in job["cases"]:
        engine = make(vae, **options)
        (lh, lw), batch, limit = case["size"], case.get("batch", 1), case.get("limit")
        if case.get("fraction") is not None:
            low, high = engine.smallest_limit(lh, lw, batch), engine.plan(lh, lw, batch).peak_bytes
            limit = int(low + case["fraction"] * (high - low))
        engine.memory_limit = limit
        plan = engine.plan(lh, lw, batch)
        given = torch.randn(batch, channels, lh, lw).to(dtype)
        held = given.nbytes if encode else 0  # a plan counts the pixels of an encode, which are here before it starts
        trim()
        Path("/proc/self/clear_refs").write_text("5")
        before, start = resident("VmRSS"), time.perf_counter()
        for _ in range(2 if keeps else 1):
            made = None  # the last call's, which would count as this one's
            made = (engine.encode if encode else engine.decode)(given)
        seconds, after = time.perf_counter() - start, resident("VmHWM")
        del made, given
        print(
            json.dumps(
                {
                    "predicted": plan.peak_bytes,
                    "measured": after - before + held,
                    "limit": limit,
                    "runtime": 0 if preview else runtime(engine, plan.geometry.itemsize),
                    "work_ratio": plan.work_ratio,
                    "spill": plan.spill_bytes,
                    "seconds": round(seconds, 3),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
