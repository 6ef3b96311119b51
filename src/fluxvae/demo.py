"""The demo: decodes real packed latents to a picture, and checks that the decoder keeps its promises.

``uv run triton_models/vae_decoder/1/model.py`` runs it; no server is needed. The result is checked for its shape and
its range, against diffusers itself with the same weights, and for being the same alone and in a batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from fluxvae.checkpoints import ASSETS
from fluxvae.claims import MAX_PIXELS, check_pixels
from fluxvae.decoder import Decoder
from fluxvae.errors import FluxVAEError, InvalidLatentsError, status_of
from fluxvae.pictures import check_format, postprocess
from fluxvae.verify.tolerances import EXACT_VS_REFERENCE_CHANGED, EXACT_VS_REFERENCE_LEVELS

__all__ = ["main"]

DEFAULT_LATENTS = ASSETS / "latents" / "astronaut_512x512.safetensors"


class Check(NamedTuple):
    """One line of the table that the demo prints at its end."""

    name: str
    passed: bool
    found: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status: 0, or 1 where a check failed, or that of an error (see `errors`)."""
    args = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        latents, height, width = read_latents(args.latents, args.height, args.width)
        checks, caption = run(latents, height, width, args, console)
    except FluxVAEError as error:
        console.print(f"[red]{type(error).__name__}[/red]: {error}", highlight=False)
        return status_of(error).exit_code
    table = Table("check", "result", "found", caption=caption)
    for check in checks:
        table.add_row(check.name, "[green]pass[/green]" if check.passed else "[red]FAIL[/red]", check.found)
    Console().print(table)
    failed = [check.name for check in checks if not check.passed]
    if failed:
        console.print(f"[red]{len(failed)} of {len(checks)} checks failed:[/red] {', '.join(failed)}")
    else:
        Console().print(f"The picture: {args.output}", highlight=False, soft_wrap=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="model.py",
        description="Decode packed FLUX latents to a PNG, and check the decoder against diffusers' FluxPipeline.",
        epilog="Without options it decodes a photograph's latents with the small checkpoint that ships with fluxvae. "
        "With FLUX.1's own weights: --checkpoint path/to/ae.safetensors --latents mine.safetensors --height 1024 "
        "--width 1024",
    )
    parser.add_argument(
        "--latents",
        type=Path,
        default=DEFAULT_LATENTS,
        help="the latents to decode: a safetensors file with a tensor 'latents' of shape (batch, patches, 64), and "
        "height and width in its metadata or given here; the default is a photograph's (%(default)s)",
    )
    parser.add_argument("--height", type=int, help="the image's height in pixels, instead of what the file says")
    parser.add_argument("--width", type=int, help="the image's width in pixels, instead of what the file says")
    parser.add_argument(
        "--checkpoint",
        default="demo",
        help="what to decode with: a VAE folder, ae.safetensors, or a hub id; the "
        "default is the small checkpoint that ships, so that nothing is downloaded (%(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fluxvae-demo.png"),
        help="the picture that is written (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="where to compute: auto, cpu, cuda or cuda:N; the default is the GPU where there is one (%(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="the precision: auto, float32, bfloat16 or float16; the "
        "default is bfloat16 on NVIDIA GPUs from compute capability 8.0 on, else float32 (%(default)s)",
    )
    return parser


def read_latents(path: Path, height: int | None = None, width: int | None = None) -> tuple[torch.Tensor, int, int]:
    """Read packed latents and the size of their images.

    Args:
        path: a safetensors file with a tensor ``latents`` of shape (B, gh*gw, 64). Its metadata may hold ``height`` and
            ``width``.
        height, width: the size in pixels; where given, they are used instead of the metadata's.

    Returns:
        The latents, the height and the width.

    Raises:
        InvalidLatentsError: the file cannot be read, has no tensor ``latents``, or no size is given; or its header
            claims an image larger than `claims.MAX_PIXELS`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if "latents" not in file.keys():  # noqa: SIM118
                raise InvalidLatentsError(f"latents: {path} holds {list(file.keys())}, expected a tensor 'latents'")
            metadata = file.metadata() or {}
            shape = tuple(file.get_slice("latents").get_shape())
            check_pixels(str(path), (1, *shape[1:]), 16, 8, MAX_PIXELS, "the demo takes no larger one")
            latents: torch.Tensor = file.get_tensor("latents")
    except (OSError, SafetensorError) as error:
        raise InvalidLatentsError(f"latents: {path} cannot be read as safetensors: {error}") from error
    try:
        size = [int(given if given is not None else metadata[name]) for name, given in _named(height, width)]
    except (KeyError, ValueError) as error:
        raise InvalidLatentsError(
            f"height and width: {path} does not state them in its metadata ({error}); pass --height and --width"
        ) from error
    return latents, size[0], size[1]


def _named(height: int | None, width: int | None) -> list[tuple[str, int | None]]:
    return [("height", height), ("width", width)]


def run(
    latents: torch.Tensor, height: int, width: int, args: argparse.Namespace, console: Console
) -> tuple[list[Check], str]:
    """Decode the latents, write the picture to ``args.output``, and compare the result with diffusers'.

    Memory: as much as diffusers takes for a batch of two at this size. The decoder's own path takes less.

    Returns:
        The checks, and a line about the decode for the caption of the table.
    """
    # The oracle is imported here rather than at the top, because importing FluxPipeline takes seconds. While it is
    # imported, transformers complains of what is not needed here, and is therefore silenced first.
    transformers_logging.set_verbosity_error()
    from fluxvae.verify import oracle

    with Progress(TextColumn("{task.description:<42}"), BarColumn(), TimeElapsedColumn(), console=console) as bar:
        step = bar.add_task("loading the checkpoint", total=6)

        def done(next_step: str) -> None:
            bar.update(step, advance=1, description=next_step)
            if not console.is_terminal:  # in a log there is no bar, so each step gets a line
                console.print(next_step)

        decoder = Decoder.from_pretrained(args.checkpoint, device=args.device, dtype=args.dtype)
        if args.output.suffix.lower() in (".jpg", ".jpeg"):
            check_format("jpeg", channels=decoder.picture_channels)
        reference = Decoder(decoder.vae, engine="diffusers")
        height, width = decoder.check(latents, height=height, width=width)

        def pixels(which: Decoder, what: torch.Tensor) -> torch.Tensor:
            image: torch.Tensor = which.decode(what, height=height, width=width, output_type="pt")
            return image

        done("compiling the kernels (once per machine)")
        decoder.prepare()
        done("decoding")
        inner = bar.add_task("  strips", total=None)
        start = time.perf_counter()
        raw = decoder.decode_raw(
            latents,
            height=height,
            width=width,
            progress=lambda strips, total: bar.update(inner, completed=strips, total=total),
        )
        image = postprocess(raw, "pt")
        seconds = time.perf_counter() - start
        args.output.parent.mkdir(parents=True, exist_ok=True)
        postprocess(raw[:1], "pil")[0].save(args.output)
        done("FluxPipeline's own decode, for comparison")
        expected = oracle.flux_pipeline_tail(decoder.vae, latents.to(decoder.device, decoder.dtype), height, width)
        again = pixels(reference, latents)
        done("a batch of two, for comparison")
        together, alone = pixels(decoder, torch.cat([latents[:1].flip(1), latents[:1]]))[1:], image[:1]
        done("checking")
        channels = decoder.picture_channels
        shape = (latents.shape[0], channels, height, width)
        low, high = float(image.min()), float(image.max())
        found = oracle.level_difference(_bytes(image), _bytes(expected))
        dtype = str(decoder.dtype).removeprefix("torch.")
        close = found.largest <= EXACT_VS_REFERENCE_LEVELS[dtype].bound and (
            dtype != "float32" or found.changed <= EXACT_VS_REFERENCE_CHANGED.bound
        )
        checks = [
            Check(f"shape (batch, {channels}, height, width)", tuple(image.shape) == shape, str(tuple(image.shape))),
            Check("values from 0.0 to 1.0", 0.0 <= low <= high <= 1.0, f"{low:.3f} to {high:.3f}"),
            Check("diffusers engine: FluxPipeline's bits", torch.equal(again, expected), _difference(again, expected)),
            Check("exact engine: FluxPipeline's picture", close, str(found)),
            Check("batch: the bits of its images alone", torch.equal(together, alone), _difference(together, alone)),
        ]
        done("done")
    rate = latents.shape[0] * height * width / 1e6 / seconds
    caption = (
        f"{args.checkpoint}, {height}x{width} pixels, {dtype} on {decoder.device}: {seconds:.2f} s, "
        f"{rate:.2f} megapixels/s"
    )
    return checks, caption


def _bytes(image: torch.Tensor) -> NDArray[np.uint8]:
    """Round values in [0, 1] to the bytes of a picture."""
    return (image.float().cpu().numpy() * 255).round().astype(np.uint8)


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return (
        "the same bits" if torch.equal(a, b) else f"differs by up to {float((a.float() - b.float()).abs().max()):.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
