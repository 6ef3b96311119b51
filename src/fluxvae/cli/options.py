"""What the commands share: the options that mean the same everywhere, and how facts are shown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from rich.console import Console

DEMO_NOTE = "demo is a small checkpoint that ships with fluxvae; FLUX's latents need FLUX's own: --checkpoint"

__all__ = [
    "DEMO_NOTE",
    "AsJson",
    "Checkpoint",
    "Device",
    "Dtype",
    "Family",
    "MemoryLimit",
    "Ray",
    "Revision",
    "Threads",
    "Variant",
    "Workers",
    "busy",
    "errors",
    "print_facts",
    "print_json",
]

# These use Optional[...] because typer reads annotations at run time, under Python 3.10 too.
Checkpoint = Annotated[
    str,
    typer.Option(
        envvar="FLUXVAE_CHECKPOINT",
        help="The VAE: a VAE or pipeline folder of diffusers, a single file such as ae.safetensors, or a "
        "hub id such as black-forest-labs/FLUX.1-schnell. The default is the small checkpoint that ships, so that "
        "everything can be tried without a download; FLUX's latents need FLUX's weights.",
        metavar="SOURCE",
    ),
]
Family = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        envvar="FLUXVAE_FAMILY",
        help="The model whose VAE a single file holds, such as flux1, sd3, sd, sdxl or flux2. Some models' files have "
        "the same tensors and cannot be told apart; left out, the likelier model is assumed, with a warning.",
        metavar="NAME",
    ),
]
Variant = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="The variant of a folder's or repository's weights, such as fp16. Left out, it is the weights without a "
        "variant, or the only ones there.",
        metavar="NAME",
    ),
]
Revision = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="The branch, tag or commit of a hub id. Left out, it is the repository's main branch.", metavar="NAME"
    ),
]
Device = Annotated[
    str,
    typer.Option(
        envvar="FLUXVAE_DEVICE",
        help="Where to compute: auto, cpu, cuda or cuda:N. The default is the GPU where there is one, else the CPU.",
        metavar="NAME",
    ),
]
MemoryLimit = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        envvar="FLUXVAE_MEMORY_LIMIT",
        help="How much memory may be added above the loaded weights, such as 2GiB or 700MB. The result is the same for "
        "any limit; a tight one takes longer. Left out, it is nine tenths of what is free.",
        metavar="SIZE",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="The precision of the weights: auto, float32, bfloat16 or float16. The default is bfloat16 on "
        "NVIDIA GPUs from compute capability 8.0 on, as pipelines use it, and elsewhere float32, which is more "
        "accurate, and as fast on a CPU.",
        metavar="NAME",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, for programs, instead of text for people.")
]

Ray = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Spread the job over a Ray cluster: local (processes on this machine; what --ray alone stands for), auto, "
        "or host:port.",
        metavar="[ADDRESS]",
    ),
]
Workers = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        help="With --ray, how many processes compute. Left out, as many as fit the cluster.", min=1, metavar="N"
    ),
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        help="With --ray, how many cores each of them gets. Left out, 4, or all that the smallest machine has.",
        min=1,
        metavar="N",
    ),
]


def errors() -> Console:
    """Return a console for standard error as it is now, because tests replace it."""
    from rich.console import Console

    return Console(stderr=True)


def busy(what: str) -> Any:
    """Return a context that shows a sign of life on a terminal, and nothing in a pipe."""
    return errors().status(f"{what} ...")


def print_facts(console: Console, facts: dict[str, str]) -> None:
    """Print facts in two columns, their names in the first."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    console.print(table)


def print_json(facts: dict[str, Any]) -> None:
    """Print facts as one line of JSON, for programs."""
    typer.echo(json.dumps(facts))
