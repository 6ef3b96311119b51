"""Measures the full FLUX decoder on an NVIDIA GPU: this engine, diffusers in every form, and what the card could do.

    python benchmarks/gpu.py                     # everything, 9 minutes; rows that there is no time for are named
    python benchmarks/gpu.py --minutes 3         # the most important rows
    python benchmarks/gpu.py --dry-run           # shows that the script still runs: tiny, on the CPU, in seconds

The machine needs PyTorch with CUDA, diffusers and what that needs, and this repository, either with `PYTHONPATH=src` or
as a wheel (`uv build --wheel`). For a machine without a network, get the wheels elsewhere with `pip download --no-deps
diffusers ...`, and install them there with `pip install --no-index --no-deps *.whl`. Numba is not needed on a GPU.

Every row is written to `$OUT/gpu.json` (`--out` names another file) as soon as it is measured, the most important ones
first, so that a run that is cut off loses little. Times are medians by CUDA events, with the least and the most. Peaks
are of allocated memory above what was allocated before, after a decode to warm up. Errors are rms errors against a
float64 decode by diffusers of the same weights and latents, on this card. PyTorch's convolutions in float32 use TF32
unless told otherwise, so diffusers is measured both ways. The last line is JSON. Exits 1 where an image depended on the
limit or the batch, a peak was above its limit, or an error was larger than diffusers' at the same dtype.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:  # the interpreter must be asked for before anything imports the Triton language
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from diffusers import AutoencoderKL

from fluxvae.engine.exact import ExactDecoder
from fluxvae.engine.memory.spill import Spill
from fluxvae.engine.runner import Runner
from gpu_parts import Row, attention, card, passes, timed, traffic
from measure import flux_vae, machine

Decode = Callable[[torch.Tensor], torch.Tensor]
COMPILE_SECONDS = 150
"""The seconds that must be left to begin the row with torch.compile, whose `max-autotune` takes minutes here."""


class Run:
    """One run of the benchmark: its rows, how much time it has, and what went wrong so far."""

    def __init__(self, seconds: float, out: Path, dry: bool) -> None:
        self.end, self.out, self.dry = time.monotonic() + seconds, out, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.wrong: list[str] = []
        self.truth: dict[tuple[int, str], torch.Tensor] = {}
        self.vaes: dict[str, AutoencoderKL] = {}

    def add(self, section: str, row: Row) -> None:
        """Print a row, keep it, and write all rows so far to the file."""
        row = {"section": section} | row
        self.rows.append(row)
        shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print("  ".join(shown), flush=True)
        self.out.write_text(self.json())

    def json(self) -> str:
        """Return everything so far as JSON."""
        report = {"benchmark": "gpu", "machine": machine(), "dry_run": self.dry, "rows": self.rows}
        return json.dumps(report | {"skipped": self.skipped, "wrong": self.wrong})

    def has_time(self, what: str, seconds: float) -> bool:
        """Return whether so many seconds are left. If not, note ``what`` as skipped."""
        if time.monotonic() + (0 if self.dry else seconds) < self.end:
            return True
        self.skipped.append(what)
        return False

    def vae(self, dtype: str, layout: torch.memory_format = torch.channels_last) -> AutoencoderKL:
        """Return the decoder in this dtype and layout, with the same weights in all. The last dtype's is kept."""
        if dtype not in self.vaes:
            self.vaes.clear()
            self.vaes[dtype] = tiny_vae(dtype) if self.dry else flux_vae(getattr(torch, dtype), "cuda")
        return self.vaes[dtype].to(memory_format=layout)

    def raw(self, size: int, batch: int, dtype: str) -> torch.Tensor:
        """Return raw latents (batch, channels, size / 8, size / 8), which hold the same image throughout the batch."""
        generator, channels = torch.Generator().manual_seed(0), self.vae(dtype).config["latent_channels"]
        one = torch.randn(1, channels, size // 8, size // 8, generator=generator)
        return one.expand(batch, -1, -1, -1).to(self.device, getattr(torch, dtype)).contiguous()

    def true(self, size: int, dtype: str) -> torch.Tensor | None:
        """Return diffusers' float64 decode, made on this card; None for sizes at which it takes too much memory."""
        if size > 1024:
            return None
        if (size, dtype) not in self.truth:
            vae = copy.deepcopy(self.vae(dtype)).to(torch.float64)
            self.truth[size, dtype] = vae.decode(self.raw(size, 1, dtype).double(), return_dict=False)[0].cpu()
        return self.truth[size, dtype]


def tiny_vae(dtype: str) -> AutoencoderKL:
    """Make a tiny network for the dry run."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=64, use_quant_conv=False, use_post_quant_conv=False, **blocks,
    )  # fmt: skip
    vae.encoder = None
    return vae.to(getattr(torch, dtype), memory_format=torch.channels_last).eval().requires_grad_(False)


def peak_of(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, int]:
    """Return what ``call`` returns, and the bytes that it had allocated at its peak (0 on a CPU)."""
    if device.type != "cuda":
        return call(), 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def diffusers_decode(vae: AutoencoderKL, tiled: bool = False, compiled: bool = False) -> Decode:
    """Return a function that decodes a batch with diffusers, in tiles or compiled where that is asked for."""
    decode = torch.compile(vae.decoder, mode="max-autotune") if compiled else None

    def run(raw: torch.Tensor) -> torch.Tensor:
        vae.use_tiling = tiled
        try:
            image: torch.Tensor = vae.decode(raw, return_dict=False)[0] if decode is None else decode(raw)
        finally:
            vae.use_tiling = False
        return image.clone() if compiled else image  # the next replay of a CUDA graph overwrites its output

    return run


def measure(run: Run, name: str, decode: Decode, size: int, batch: int, dtype: str, **more: Any) -> Row | None:
    """Measure one decode and add its row, also where it fails. Return the row with its image; None where it failed."""
    row: Row = {"engine": name, "size": size, "batch": batch, "dtype": dtype} | more
    raw = run.raw(size, batch, dtype)
    try:
        decode(raw)
        image, row["peak_bytes"] = peak_of(lambda: decode(raw), run.device)
        row |= timed(lambda: decode(raw), run.device, seconds=0.1 if run.dry else 4, most=10)
    except Exception as error:
        run.add("decode", row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"})
        torch.cuda.empty_cache()
        return None
    true = run.true(size, dtype) if batch == 1 else None
    if true is not None:
        row["rms_error"] = float((image.double().cpu() - true).square().mean().sqrt())
    run.add("decode", row)
    return row | {"image": image}


def decodes(run: Run, size: int, batch: int, dtype: str, limits: list[int | None]) -> None:
    """Measure every engine at one size, and check our images and peaks.

    Args:
        limits: our memory limits in bytes. None stands for no limit, 0 for the smallest that works, and -1 for a third
            of diffusers' peak.
    """
    estimate = 3 + batch * size * size / 1e6 * (0.7 if dtype == "bfloat16" else 2)
    what = f"{size}x{size}, batch {batch}, {dtype}"
    if not run.has_time(f"all of {what}", estimate):
        return
    tiled, theirs = batch == 1 and size >= 1024, None
    if size <= 2048:
        if size <= 1024:
            vae = run.vae(dtype, torch.contiguous_format)
            measure(run, "diffusers", diffusers_decode(vae), size, batch, dtype)
        vae = run.vae(dtype)
        theirs = measure(run, "diffusers channels_last", diffusers_decode(vae), size, batch, dtype)
        if dtype == "float32" and not run.dry:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                theirs = measure(run, "diffusers without TF32", diffusers_decode(vae), size, batch, dtype)
    if (tiled or run.dry) and run.has_time(f"tiled {what}", estimate):
        measure(run, "diffusers tiled", diffusers_decode(run.vae(dtype), tiled=True), size, batch, dtype)

    engine = ExactDecoder(run.vae(dtype), kernels="torch" if run.dry else "cuda")
    reference: torch.Tensor | None = None
    for limit in limits:
        if not run.has_time(f"ours within {limit} of {what}", estimate):
            continue
        engine.memory_limit = None
        if limit == 0:
            limit = engine.smallest_limit(size // 8, size // 8, batch)
        elif limit == -1:
            if not theirs or not theirs["peak_bytes"]:
                continue
            limit = theirs["peak_bytes"] // 3
        engine.memory_limit = limit or None
        try:
            plan = engine.plan(size // 8, size // 8, batch)
        except Exception as error:
            run.add("decode", {"engine": "fluxvae", "size": size, "limit": limit, "failed": str(error)[:300]})
            continue
        more = {"limit": limit, "planned_bytes": plan.peak_bytes, "work": plan.work_ratio, "spill": plan.spill_bytes}
        row = measure(run, "fluxvae", engine.decode, size, batch, dtype, **more, note=plan.kernels_note)
        if row is None:
            run.wrong.append(f"{what} within {limit} failed")
            continue
        if row["peak_bytes"] > (limit or plan.limit or 0) and not run.dry:
            run.wrong.append(f"{what}: peak {row['peak_bytes']} above the limit {limit or plan.limit}")
        if theirs and not run.dry and row.get("rms_error", 0) > theirs.get("rms_error", 1):
            run.wrong.append(f"{what}: error {row['rms_error']:.3g}, diffusers' {theirs['rms_error']:.3g}")
        reference = row["image"] if reference is None else reference
        if not torch.equal(row["image"], reference):
            run.wrong.append(f"{what}: the image within {limit} is not the one without a limit")
        if not torch.equal(row["image"], row["image"][:1].expand_as(row["image"])):
            run.wrong.append(f"{what}: equal latents of a batch made different images")
    if batch > 1 and reference is not None:
        engine.memory_limit = None
        if not torch.equal(engine.decode(run.raw(size, 1, dtype))[0], reference[0]):
            run.wrong.append(f"{what}: alone it is another image")


def floor(run: Run, rates: Row, size: int, dtype: str) -> None:
    """Add how long the card needs at least for a decode's products and its memory traffic, at the measured rates."""
    engine = ExactDecoder(run.vae(dtype), kernels="torch" if run.dry else "cuda")
    macs = engine.plan(size // 8, size // 8).macs
    moved = traffic(engine.network, size // 8, size // 8, getattr(torch, dtype).itemsize)
    compute, memory = 2 * macs / rates[f"tflops_{dtype}"] / 1e9, moved / rates["copy_gb_per_second"] / 1e6
    row = {"size": size, "dtype": dtype, "tera_operations": 2 * macs / 1e12, "gigabytes": moved / 1e9}
    run.add("floor", row | {"compute_ms": compute, "memory_ms": memory, "ms": max(compute, memory)})


def blocks(run: Run, size: int, dtype: str) -> None:
    """Measure our time by the size of a block.

    With small blocks launching a kernel costs more than running it, and large blocks no longer fit the cache.
    """
    for shift in (8,) if run.dry else (22, 23, 24, 25, 26, 27):
        if run.has_time(f"blocks of 2**{shift}", 5):
            engine = ExactDecoder(run.vae(dtype), kernels="torch" if run.dry else "cuda", block_values=1 << shift)
            measure(run, "fluxvae", engine.decode, size, 1, dtype, block_values=1 << shift)


def graph(run: Run, size: int, dtype: str) -> None:
    """Measure what a CUDA graph of a whole decode would gain. The engine has none, so it is captured here by hand."""
    if run.device.type != "cuda" or not run.has_time("a CUDA graph", 10):
        return
    engine, raw = ExactDecoder(run.vae(dtype), kernels="cuda"), run.raw(size, 1, dtype)
    expected = engine.decode(raw)
    plan, kernels = engine.plan(size // 8, size // 8), engine._kernels(run.device)
    runner = Runner(engine.network, plan, kernels, Spill(run.device, None), run.device, raw.dtype, lambda: None)
    image = torch.empty_like(expected)
    row: Row = {"size": size, "dtype": dtype}
    try:
        runner._checks.settle = lambda: None  # type: ignore[method-assign]  # it reads from the device: not in a graph
        captured = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(captured):
            runner.run(raw[0], image[0])
        captured.replay()
        row |= timed(captured.replay, run.device) | {"equal": torch.equal(image, expected)}
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    run.add("graph", row)


def table(rows: list[Row]) -> str:
    """Return the rows of decodes as a table of text."""
    head = ("engine", "size", "batch", "dtype", "limit MB", "ms", "least", "most", "peak MB", "work", "rms error")
    lines = [head]
    for row in rows:
        if row["section"] != "decode":
            continue
        named = row["engine"] + (f" ({row['block_values']})" if "block_values" in row else "")
        first = [named, str(row["size"]), str(row.get("batch", "")), row.get("dtype", "")]
        limit = f"{row['limit'] / 1e6:.0f}" if row.get("limit") else ""
        if "failed" in row:
            lines.append((*first, limit, row["failed"][:60], *[""] * 5))
            continue
        times = [f"{row[key]:.2f}" for key in ("ms", "ms_least", "ms_most")]
        last = [f"{row['peak_bytes'] / 1e6:.0f}", f"{row['work']:.2f}" if "work" in row else ""]
        lines.append((*first, limit, *times, *last, f"{row['rms_error']:.2e}" if "rms_error" in row else ""))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="how long the run may take; no row is begun that would outlast it (default: %(default)s)",
    )
    default = Path(os.environ.get("OUT", ".")) / "gpu.json"
    parser.add_argument(
        "--out",
        type=Path,
        default=default,
        help="the file that rows are written to as they come (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show that the script still runs: tiny, on the CPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("this PyTorch sees no NVIDIA GPU; --dry-run only tries the script")
    if options.dry_run:
        torch.set_num_threads(1)
    run = Run(60 * options.minutes, options.out, options.dry_run)
    with torch.no_grad():
        measure_all(run)
    print(table(run.rows))
    print("skipped:", "; ".join(run.skipped) or "nothing")
    print("wrong:", "; ".join(run.wrong) or "nothing")
    run.out.write_text(run.json())
    print(run.json())
    return int(bool(run.wrong))


def measure_all(run: Run) -> None:
    """Measure everything, the most important rows first."""
    main_size, sizes = (16, [16, 24]) if run.dry else (1024, [512, 1024, 2048, 4096])
    rates = card(run.device, run.dry)
    run.add("card", rates)
    for dtype in ("bfloat16", "float32"):
        for size in sizes:
            floor(run, rates, size, dtype)
    engine = ExactDecoder(run.vae("bfloat16"), kernels="torch" if run.dry else "cuda")
    run.add("prepare", {"seconds": engine.prepare(), "note": engine._kernels(run.device).note})
    decodes(run, main_size, 1, "bfloat16", limits=[None, -1, 0])
    for part in (passes, attention):
        if run.has_time(part.__name__, 15):
            for row in part(run.device, run.dry):
                run.add("parts", row)
    graph(run, main_size, "bfloat16")
    blocks(run, main_size, "bfloat16")
    decodes(run, sizes[-1], 1, "bfloat16", limits=[None, 10**8 if run.dry else 4 * 10**9])
    decodes(run, sizes[0], 1, "bfloat16", limits=[None, 0])
    decodes(run, main_size, 2 if run.dry else 8, "bfloat16", limits=[None])
    if not run.dry and run.has_time("torch.compile at 1024", COMPILE_SECONDS):
        vae = run.vae("bfloat16")
        measure(run, "diffusers compiled", diffusers_decode(vae, compiled=True), 1024, 1, "bfloat16")
    decodes(run, main_size, 1, "float32", limits=[None, -1, 0])
    if not run.dry:
        decodes(run, 2048, 1, "bfloat16", limits=[None, 0])
        decodes(run, 512, 8, "bfloat16", limits=[None])
        decodes(run, 512, 1, "float32", limits=[None])
        decodes(run, 2048, 1, "float32", limits=[None])
        decodes(run, 4096, 1, "float32", limits=[None])


if __name__ == "__main__":
    sys.exit(main())
