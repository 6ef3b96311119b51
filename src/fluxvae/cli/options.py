"""What the commands share: options that mean the same everywhere, and how facts are shown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from rich.console import Console

DEMO_NOTE = "demo is a small checkpoint of our own; FLUX's latents need FLUX's: --checkpoint"

__all__ = [
    "DEMO_NOTE",
    "AsJson",
    "Checkpoint",
    "Device",
    "Dtype",
    "Family",
    "MemoryLimit",
    "Variant",
    "busy",
    "errors",
    "print_facts",
    "print_json",
]

# Optional[...]: typer reads the annotations at run time, also under Python 3.10.
Checkpoint = Annotated[
    str,
    typer.Option(
        envvar="FLUXVAE_CHECKPOINT",
        help="'demo', a VAE or pipeline folder, ae.safetensors, or a hub id.",
        metavar="SOURCE",
    ),
]
Family = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        envvar="FLUXVAE_FAMILY",
        help="Whose VAE a single file holds, such as flux1, sd3, sd, sdxl or flux2: some cannot be told apart.",
        metavar="NAME",
    ),
]
Variant = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Of a folder's or repository's weights, such as fp16.", metavar="NAME"),
]
Device = Annotated[str, typer.Option(envvar="FLUXVAE_DEVICE", help="auto, cpu, cuda or cuda:N.", metavar="NAME")]
MemoryLimit = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        envvar="FLUXVAE_MEMORY_LIMIT",
        help="What a decode may add above the weights, such as 2GiB; what is free if left out.",
        metavar="SIZE",
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", metavar="NAME")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")]


def errors() -> Console:
    """Standard error, as it is now: tests exchange it."""
    from rich.console import Console

    return Console(stderr=True)


def busy(what: str) -> Any:
    """A sign of life on a terminal; nothing in a pipe."""
    return errors().status(f"{what} ...")


def print_facts(console: Console, facts: dict[str, str]) -> None:
    """Names in one column, what they are in the other."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    console.print(table)


def print_json(facts: dict[str, Any]) -> None:
    """One line, for programs."""
    typer.echo(json.dumps(facts))
