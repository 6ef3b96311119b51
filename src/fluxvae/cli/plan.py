"""``fluxvae plan`` says what a decode would need before it happens."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from fluxvae.cli.options import (
    AsJson,
    Checkpoint,
    Device,
    Dtype,
    Family,
    MemoryLimit,
    Variant,
    busy,
    print_facts,
    print_json,
)
from fluxvae.errors import InvalidLatentsError

_LEGEND = (
    "The map is what a layer makes: rows x columns x channels. Middle and result say where the map within a layer and "
    "the one that it makes are kept: in memory, in a file (spill), or nowhere (recompute: computed again whenever it "
    "is read). The peak is what the layer takes by itself."
)


def plan(
    size: Annotated[
        list[str],
        typer.Argument(
            help="The size of the image in pixels, multiples of 8. Write HEIGHTxWIDTH, or HEIGHT WIDTH, or N for N x "
            "N.",
            metavar="SIZE",
        ),
    ],
    checkpoint: Checkpoint = "demo",
    family: Family = None,
    variant: Variant = None,
    batch: Annotated[
        int, typer.Option(help="How many images one decode has. The default is one.", min=1, metavar="N")
    ] = 1,
    memory_limit: MemoryLimit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kernels: Annotated[
        str,
        typer.Option(
            help="What computes: winograd (fast, on a CPU), cuda (on a GPU) or torch (PyTorch's operations, "
            "anywhere). The default is the fastest for the device.",
            metavar="NAME",
        ),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Say how an image of this size would be decoded, before it happens.

    It shows the peak of memory, what would be computed twice or spilled to a disk, and the smallest limit that works.
    On a CPU only the checkpoint's headers are read, so it answers at once.

    Examples:

    \b
      fluxvae plan 1024x1024
      fluxvae plan 768x1360 --batch 4               height x width
      fluxvae plan 4096 --memory-limit 2GiB --checkpoint ae.safetensors
    """
    height, width = _size(size)
    with busy(f"reading {checkpoint}"):
        from fluxvae.engine.plan import size_in_words
        from fluxvae.plans import plan_decode

        planned = plan_decode(
            checkpoint,
            height,
            width,
            batch,
            family=family,
            variant=variant,
            device=device,
            dtype=dtype,
            kernels=kernels,
            memory_limit=memory_limit,
        )
    found, smallest = planned.plan, planned.smallest_limit
    facts: dict[str, Any] = {
        "height": found.height,
        "width": found.width,
        "batch": found.batch,
        "checkpoint": checkpoint,
        "device": planned.device,
        "dtype": planned.dtype,
        "kernels": found.kernels,
        "approximate": planned.approximate,
        "assumed": planned.assumed or None,
        "limit_bytes": found.limit,
        "peak_bytes": found.peak_bytes,
        "smallest_limit_bytes": smallest,
        "spill_bytes": found.spill_bytes,
        "work_ratio": found.work_ratio,
        "multiply_adds": found.macs * found.batch,
    }
    if as_json:
        print_json(facts)
        return
    limit = "none" if found.limit is None else f"{size_in_words(found.limit)} ({found.limit_source})"
    spill = f", {size_in_words(found.spill_bytes)} spilled to {found.spill_dir}" if found.spill_bytes else ""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    print_facts(
        console,
        {
            "image": f"{found.height} x {found.width} (height x width){f', {batch} of them' if batch > 1 else ''}",
            "checkpoint": f"{checkpoint}, {planned.dtype} on {planned.device}, kernels {found.kernels}",
            "peak memory": f"{size_in_words(found.peak_bytes)} above the weights{spill}",
            "limit": f"{limit}; the smallest that works: {size_in_words(smallest)}",
            "work": f"{found.macs * batch / 1e12:.2f} trillion multiply-adds, {found.work_ratio:.2f} times the least",
            **({"note": found.kernels_note} if found.kernels_note else {}),
        },
    )
    table = Table("layer", "map", "middle", "result", "peak", box=None, header_style="bold", pad_edge=False)
    table.columns[1].justify = table.columns[4].justify = "right"
    for layer in found.layers:
        peak = found.fixed_bytes + max((step.held for step in layer.steps), default=0)
        shape = f"{layer.height}x{layer.width}x{layer.channels}"
        name = layer.name.removeprefix("decoder.")
        table.add_row(name, shape, _coloured(layer.middle or ""), _coloured(layer.out), size_in_words(peak))
    console.print()
    console.print(table)
    console.print()
    console.print(_LEGEND, style="dim")


def _size(words: list[str]) -> tuple[int, int]:
    """Read height and width from ``1024x768``, ``1024 768`` or, where they are the same, ``1024``."""
    parts = re.split(r"[xX\u00d7*]", words[0]) if len(words) == 1 else words
    parts = [part.strip() for part in parts]
    if len(parts) not in (1, 2) or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InvalidLatentsError(
            f"size: got {' '.join(words)!r}, expected HEIGHTxWIDTH in pixels, such as 1024x768, or one number for both"
        )
    return int(parts[0]), int(parts[-1])


def _coloured(where: str) -> str:
    """Colour where a map is kept, so that what costs time stands out."""
    colour = {"recompute": "yellow", "spill": "bold magenta"}.get(where)
    return f"[{colour}]{where}[/{colour}]" if colour else where
