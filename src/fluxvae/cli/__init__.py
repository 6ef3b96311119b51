"""The command line. Each command has a module of its own here; this one puts them together.

What takes long to import (PyTorch, rich) is imported by the commands that need it, where they need it, so that
``fluxvae --help`` answers at once.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Annotated

import typer

from fluxvae import __version__
from fluxvae.cli.bench import bench
from fluxvae.cli.decode import decode
from fluxvae.cli.encode import encode
from fluxvae.cli.info import info
from fluxvae.cli.jobs import JobCommand
from fluxvae.cli.options import errors
from fluxvae.cli.plan import plan
from fluxvae.cli.serve import serve
from fluxvae.errors import FluxVAEError, status_of

__all__ = ["app", "main"]

_EXAMPLES = """

Examples:

\b
  fluxvae info ae.safetensors                 what a checkpoint holds
  fluxvae decode latents/ --out images/ --checkpoint ae.safetensors
                                              a folder of latents to PNG
  fluxvae encode photos/ --out latents/ --checkpoint ae.safetensors --crop
                                              a folder of pictures to latents
  fluxvae plan 2048x2048 --memory-limit 2GiB  what memory goes to
  fluxvae bench                               how fast it is on this machine
  fluxvae serve --checkpoint ae.safetensors   decode for other machines

ae.safetensors stands for your model's weights. Without --checkpoint every command takes "demo", a small one that
ships, so that you can try things out. Every command explains its options: fluxvae decode --help.

Tab completes in your shell after: fluxvae --install-completion

These variables of the environment stand for options, and options win over them: FLUXVAE_CHECKPOINT, FLUXVAE_FAMILY,
FLUXVAE_DEVICE, FLUXVAE_MEMORY_LIMIT. FLUXVAE_TOKEN is the token of fluxvae serve.
"""

_OUTPUT_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(
    name="fluxvae",
    help="Decode FLUX latents to images, and encode images to latents, exactly as diffusers' pipelines would have, in "
    "the memory you name." + _EXAMPLES,
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
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command(cls=JobCommand, short_help="Decode files of latents to images; can be resumed.")(decode)
app.command(cls=JobCommand, short_help="Encode pictures to files of latents; can be resumed.")(encode)
app.command(short_help="Say what decoding one size would need.")(plan)
app.command(short_help="Say what a checkpoint holds.")(info)
app.command(short_help="Measure how fast this machine decodes.")(bench)
app.command(short_help="Serve other machines, with Triton and over HTTP.")(serve)


def main() -> None:
    """Run the ``fluxvae`` command. An error is shown as one message, with the exit status of the error table."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their warnings are not what a user of this command asked for
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        # Windows writes to files and pipes in an encoding of its own, which lacks most of the characters in file names.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except FluxVAEError as error:
        errors().print(f"[bold red]{type(error).__name__}[/bold red]: ", end="", highlight=False)
        errors().print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(status_of(error).exit_code)
    except OSError as error:
        # Where the error names a file, the command explains it. Standard output has no name, so it is told here.
        if error.filename is not None or error.errno not in _OUTPUT_FULL:
            raise
        told = f"the output cannot be written: {error.strerror}; free some space, or send it elsewhere"
        errors().print(told, highlight=False, soft_wrap=True)
        _forget_output()
        sys.exit(1)


def _forget_output() -> None:
    """Keep Python from flushing what is left of standard output at its end, which would fail again."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
