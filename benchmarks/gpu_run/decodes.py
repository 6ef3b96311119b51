"""Whole decodes: every size and limit, batches, blocks, dtypes and CUDA graphs, with diffusers beside them."""

from __future__ import annotations

import torch

from fluxvae.errors import FluxVAEError
from gpu_run.bench import Bench, Decode
from gpu_run.timing import Row

__all__ = ["batches", "blocks", "diffusers_decode", "float32", "graphs", "largest", "one_size"]

WITHIN = 4 * 10**9
"""The limit for 4096 pixels, in bytes."""


def one_size(bench: Bench, size: int) -> None:
    """diffusers in both layouts, then ours without a limit, within a third of diffusers' peak, and within the least."""
    vae = bench.vae(layout=torch.contiguous_format)
    eager = bench.measure("diffusers", diffusers_decode(vae), size=size)
    bench.measure("diffusers channels_last", diffusers_decode(bench.vae()), size=size)
    engine = bench.ours()
    smallest = engine.smallest_limit(bench.side(size), bench.side(size))
    limits = {"none": None, "smallest": smallest}
    limits |= {"third": eager["peak_bytes"] // 3} if eager.get("peak_bytes") else {}
    for name, limit in limits.items():
        ours(bench, size, limit, limit_name=name)


def largest(bench: Bench) -> None:
    """4096 pixels: without a limit, and within 4 GB. diffusers would need 36 GB and attention of 262,144 tokens."""
    for name, limit in (("4 GB", WITHIN), ("none", None)):
        if bench.has_time(f"4096 within {name}", 8):
            ours(bench, 4096, limit, limit_name=name, seconds=3.0)


def ours(
    bench: Bench, size: int, limit: int | None, *, limit_name: str, batch: int = 1, dtype: str = "bfloat16",
    seconds: float = 1.5,
) -> Row:  # fmt: skip
    """Measure our decode within a limit, and check its peak."""
    engine = bench.ours(dtype=dtype, memory_limit=limit)
    try:
        plan = engine.plan(bench.side(size), bench.side(size), batch)
    except FluxVAEError as error:
        row = {"kind": "decode", "engine": "fluxvae", "model": "flux", "size": size, "batch": batch, "dtype": dtype}
        row |= {"limit": limit, "limit_name": limit_name, "failed": str(error)[:300]}
        bench.row(**row)
        return row
    row = bench.measure(
        "fluxvae", engine.decode, size=size, batch=batch, dtype=dtype, seconds=seconds, limit=limit,
        limit_name=limit_name, planned_bytes=plan.peak_bytes, work=plan.work_ratio, spill_bytes=plan.spill_bytes,
        blocks=plan.total_blocks, note=plan.kernels_note,
    )  # fmt: skip
    most = limit if limit is not None else plan.peak_bytes
    peak = row.get("peak_bytes", 0)
    bench.must(peak <= most, f"{size}, limit {limit_name}: the peak is {peak} bytes, allowed are {most}")
    return row


def batches(bench: Bench) -> None:
    """Several images at once, which are decoded one by one: their bits must be those of one alone."""
    for size, batch in ((1024, 4), (512, 8)):
        if bench.has_time(f"a batch of {batch} at {size}", 3):
            ours(bench, size, None, limit_name="none", batch=batch)
            bench.measure("diffusers channels_last", diffusers_decode(bench.vae()), size=size, batch=batch)


def blocks(bench: Bench) -> None:
    """Our time by the size of a block: small blocks cost launches, and large ones do not fit the card's cache.

    What is found best belongs into `fluxvae.engine.calls`, since it changes the last bits of every image.
    """
    for shift in range(20, 28):
        if bench.has_time(f"blocks of 2**{shift} values", 2):
            engine = bench.ours(block_values=1 << shift)
            side = bench.side(1024)
            count = engine.plan(side, side).total_blocks
            bench.measure("fluxvae", engine.decode, size=1024, block_values=1 << shift, blocks=count, seconds=0.5)


def float32(bench: Bench) -> None:
    """float32 at 1024: ours never uses TF32, PyTorch's convolutions do unless they are told not to."""
    bench.measure("diffusers channels_last", diffusers_decode(bench.vae(dtype="float32")), size=1024, dtype="float32")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        decode = diffusers_decode(bench.vae(dtype="float32"))
        bench.measure("diffusers without TF32", decode, size=1024, dtype="float32")
    ours(bench, 1024, None, limit_name="none", dtype="float32")


def graphs(bench: Bench) -> None:
    """CUDA graphs: the same decodes replayed, at two sizes that are kept beside each other; and what they hold."""
    engine = bench.ours(cuda_graphs=True)
    for size in (1024, 512, 1024):
        before = torch.cuda.memory_reserved()
        plan = engine.plan(bench.side(size), bench.side(size))
        bench.measure(
            "fluxvae graphs", engine.decode, size=size, planned_bytes=plan.peak_bytes, graph_bytes=plan.graph_bytes,
            note=plan.kernels_note, reserved_before_bytes=before, seconds=1.0,
        )  # fmt: skip
        bench.row(kind="graphs", size=size, reserved_bytes=torch.cuda.memory_reserved(), text=str(plan))


def diffusers_decode(vae: object, *, tiled: bool = False) -> Decode:
    """diffusers' own decode, in its tiles where that is asked for."""

    def decode(raw: torch.Tensor) -> torch.Tensor:
        vae.use_tiling = tiled  # type: ignore[attr-defined]
        try:
            image: torch.Tensor = vae.decode(raw, return_dict=False)[0]  # type: ignore[attr-defined]
        finally:
            vae.use_tiling = False  # type: ignore[attr-defined]
        return image

    return decode
