"""``fluxvae bench`` measures how fast this machine decodes."""

from __future__ import annotations

from dataclasses import asdict
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
from fluxvae.errors import InvalidOptionError


def bench(
    sizes: Annotated[
        str,
        typer.Option(
            help="The sizes of the images in pixels each way: multiples of 8, with commas between them. The default is "
            "what takes half a minute with the demo checkpoint.",
            metavar="N,N",
        ),
    ] = "512,1024",
    checkpoint: Checkpoint = "demo",
    family: Family = None,
    variant: Variant = None,
    rounds: Annotated[
        int,
        typer.Option(
            help="How many decodes of each size are timed. The median is shown, so that one slow decode does not "
            "count.",
            min=1,
            metavar="N",
        ),
    ] = 3,
    diffusers: Annotated[
        bool,
        typer.Option(
            "--diffusers",
            help="Decode with diffusers too, and show how many times faster this is. It is off by "
            "default because it takes longer and much more memory.",
        ),
    ] = False,
    memory_limit: MemoryLimit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure how fast this machine decodes, and with how much memory.

    It takes about half a minute with the demo checkpoint. The demo's network is small: for the speed of your model give
    its checkpoint.

    Examples:

    \b
      fluxvae bench
      fluxvae bench --sizes 1024,2048 --checkpoint ae.safetensors --diffusers
    """
    wanted = [word.strip() for word in sizes.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in wanted):
        raise InvalidOptionError(f"--sizes: got {sizes!r}, expected pixels between commas, such as 512,1024")
    with busy(f"reading {checkpoint}"):
        from fluxvae import Decoder
        from fluxvae.bench import run
        from fluxvae.engine.plan import size_in_words

        decoder = Decoder.from_pretrained(
            checkpoint, family=family, variant=variant, device=device, dtype=dtype, memory_limit=memory_limit
        )
        kernels = decoder.plan(int(wanted[0]), int(wanted[0])).kernels
    with busy("decoding"):
        rows = list(run(decoder, [int(word) for word in wanted], rounds=rounds, diffusers=diffusers))
    facts: dict[str, Any] = {
        "checkpoint": checkpoint,
        "device": str(decoder.device),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "kernels": kernels,
        "threads": _threads(),
        "rounds": rounds,
    }
    if as_json:
        print_json(facts | {"rows": [asdict(row) for row in rows]})
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    where = f"{decoder.device}, {facts['threads']} threads" if decoder.device.type == "cpu" else str(decoder.device)
    print_facts(console, {"checkpoint": checkpoint, "decoder": f"{facts['dtype']} on {where}, kernels {kernels}"})
    names = ["size", "median", "MP/s", "peak", "planned"]
    names += ["diffusers", "its peak", "speed-up"] if diffusers else ["slowest"]
    table = Table(*names, box=None, header_style="bold", pad_edge=False)
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        cells = [
            f"{row.size} x {row.size}",
            f"{row.seconds:.2f} s",
            f"{row.megapixels_per_second:.2f}",
            "" if row.peak_bytes is None else size_in_words(row.peak_bytes),
            size_in_words(row.planned_bytes),
        ]
        if row.diffusers_seconds is not None:
            its_peak = "" if row.diffusers_peak_bytes is None else size_in_words(row.diffusers_peak_bytes)
            cells += [f"{row.diffusers_seconds:.2f} s", its_peak, f"{row.diffusers_seconds / row.seconds:.1f}"]
        else:
            cells.append(f"{row.slowest:.2f} s")
        table.add_row(*cells)
    console.print()
    console.print(table)
    measured = any(row.peak_bytes is not None for row in rows)
    told = "measured at its peak, and as planned before" if measured else "as planned, for this system tells no peak"
    console.print(f"Memory is above the loaded weights: {told}.", style="dim")


def _threads() -> int:
    import torch

    return torch.get_num_threads()
