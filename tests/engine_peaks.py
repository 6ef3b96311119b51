"""Measures the peak memory of exact decodes, or of previews, in a process of its own: ``engine_peaks.py '<json>'``.

The JSON on the command line is {"preview": true or false, "vae": keywords of AutoencoderTiny or AutoencoderKL,
"kernels": ..., "dtype": ..., "threads": n, "block_values": n or null, "cases": [{"size": [lh, lw], "batch": n,
"fraction": f or null}]}. A fraction of 0 sets the memory limit to the smallest that works, 1 to the peak of the
unlimited plan, and values between them to limits between these. One line of JSON is printed for each case:
{"predicted": bytes, "measured": bytes, "limit": ..., "work_ratio": ..., "spill": bytes, "seconds": s}.

What is measured is the high-water mark of resident memory during the decode, above what was resident before it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from fluxvae.engine.exact import ExactEngine
from fluxvae.engine.preview import PreviewEngine


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(field)


def trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(job: dict[str, object]) -> list[dict[str, float]]:
    """Run this file in a process of its own: a dictionary for each case."""
    child = subprocess.run([sys.executable, __file__, json.dumps(job)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()]


def main() -> None:
    job = json.loads(sys.argv[1])
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    dtype = getattr(torch, job.get("dtype", "float32"))
    preview = job.get("preview", False)
    vae = (AutoencoderTiny if preview else AutoencoderKL)(**job["vae"]).eval().requires_grad_(False)
    vae.encoder = None
    vae.to(dtype)
    channels = vae.config.latent_channels
    options = {} if preview else {"kernels": job["kernels"], "block_values": job.get("block_values")}
    make = PreviewEngine if preview else ExactEngine
    first = make(vae, **options)
    first.prepare()
    if preview:
        first.decode(torch.randn(1, channels, 4, 4).to(dtype))
    for case in job["cases"]:
        engine = make(vae, **options)
        (lh, lw), batch, limit = case["size"], case.get("batch", 1), case.get("limit")
        if case.get("fraction") is not None:
            low, high = engine.smallest_limit(lh, lw, batch), engine.plan(lh, lw, batch).peak_bytes
            limit = int(low + case["fraction"] * (high - low))
        engine.memory_limit = limit
        plan = engine.plan(lh, lw, batch)
        raw = torch.randn(batch, channels, lh, lw).to(dtype)
        trim()
        Path("/proc/self/clear_refs").write_text("5")
        before, start = resident("VmRSS"), time.perf_counter()
        image = engine.decode(raw)
        seconds, after = time.perf_counter() - start, resident("VmHWM")
        del image, raw
        print(
            json.dumps(
                {
                    "predicted": plan.peak_bytes,
                    "measured": after - before,
                    "limit": limit,
                    "work_ratio": plan.work_ratio,
                    "spill": plan.spill_bytes,
                    "seconds": round(seconds, 3),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
