"""The command line. Each command has a module of its own here; this one puts them together.

What needs PyTorch is imported by the commands that need it, so that ``fluxvae --help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fluxvae import __version__
from fluxvae.cli.bench import bench
from fluxvae.cli.decode import DecodeCommand, decode
from fluxvae.cli.info import info
from fluxvae.cli.options import errors
from fluxvae.cli.plan import plan
from fluxvae.cli.serve import serve
from fluxvae.errors import FluxVAEError, status_of

__all__ = ["app", "main"]

_EXAMPLES = """

Examples:

\b
  fluxvae decode latents/ --out images/       a folder of latents to PNG
  fluxvae serve                               the demo checkpoint, here
  fluxvae serve --checkpoint ae.safetensors   FLUX.1's own weights
  fluxvae plan 2048 2048 --memory-limit 2GiB  what memory goes to
  fluxvae info ae.safetensors                 what a checkpoint holds
  fluxvae bench                               how fast it is on this machine

Tab completes in your shell after: fluxvae --install-completion

Environment: FLUXVAE_CHECKPOINT, FLUXVAE_DEVICE, FLUXVAE_MEMORY_LIMIT, FLUXVAE_TOKEN. Options win over it.
"""

app = typer.Typer(
    name="fluxvae",
    help="Packed FLUX latents in, exactly the image that diffusers' FluxPipeline would have made out." + _EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fluxvae {__version__}")
        raise typer.Exit


@app.callback()
def _fluxvae(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="And exit.")] = False,
) -> None:
    pass


app.command(cls=DecodeCommand)(decode)
for _command in (plan, info, bench, serve):
    app.command()(_command)


def main() -> None:
    """The ``fluxvae`` command. Errors are one message and an exit status of the error table."""
    try:
        app()
    except FluxVAEError as error:
        errors().print(f"[bold red]{type(error).__name__}[/bold red]: ", end="", highlight=False)
        errors().print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(status_of(error).exit_code)
