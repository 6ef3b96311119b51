"""What one request to a model that encodes asks for, read and checked before any work.

A request carries its pictures in one of three ways: ``images``, pixels of 8 bits; ``images_raw``, floats in [-1, 1] as
the VAE takes them; or ``images_encoded``, picture files. The first dimension is always the batch, and all pictures of a
request have one size. A VAE whose pictures are RGBA takes four channels, and three as opaque.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from fluxvae.encoder import Encoder
from fluxvae.errors import InvalidImagesError, InvalidOptionError
from fluxvae.latents.checks import check_options
from fluxvae.latents.reading import FACTORS, UNSAID, Reading
from fluxvae.photographs import check_background, picture_of, size_of
from fluxvae.pixels import Images, check_images, check_pixels
from fluxvae.serve.model.jobs import Job, read_factors, read_own, within_pixels
from fluxvae.serve.models import LARGEST_SEED

__all__ = ["INPUTS", "PictureParameters", "read_parameters", "read_pictures"]

INPUTS = ("images", "images_raw", "images_encoded")
"""The tensors of which a request brings one."""
_NAMES = ("sample", "seed", *FACTORS, "raw", "resize", "background", "metadata", "probe")
"""The parameters that a request to the model may have."""
_OF_LATENTS = ("sample", "seed", *FACTORS, "raw")
"""Those that say how latents are made of the moments."""
_OF_FILES = ("background", "metadata")
"""Those that say how files are read."""
_METADATA = ("apply", "ignore")


@dataclass(frozen=True, kw_only=True)
class PictureParameters:
    """The parameters of a request, with the model's defaults for those that it leaves out."""

    seed: int | None = None
    """What the draw from the distribution begins with; None takes the mode."""
    reading: Reading = UNSAID
    """The factors that are used instead of the checkpoint's own, and ``raw``."""
    resize: bool = False
    """Whether a size that does not fit is made smaller."""
    background: str | None = None
    """The colour that shows through a file's transparent pixels. None refuses them, or keeps them where the VAE has a
    channel for alpha."""
    metadata: bool = True
    """Whether a file's orientation and colour profile are applied. Otherwise its pixels are taken as they lie."""
    probe: bool = False
    """Whether a health check asks."""


def read_parameters(text: str, given: str, outputs: Set[str]) -> PictureParameters:
    """Parse ``request.parameters()``: a JSON object.

    Args:
        given: the tensor that the request brings, one of `INPUTS`.
        outputs: the outputs that it asks for.

    Raises:
        InvalidOptionError: a parameter is unknown, has a wrong value, or would have no effect.
    """
    own = read_own(text, _NAMES, ("sample", "raw", "resize", "probe"))
    idle = [name for name in _OF_LATENTS if name in own] if outputs == {"moments"} else []
    if idle:
        raise InvalidOptionError(
            f"{idle[0]}: got {own[idle[0]]!r} for the output moments alone, which it does not change; leave it out, or "
            "ask for latents"
        )
    idle = [name for name in _OF_FILES if name in own] if given != "images_encoded" else []
    if given == "images_raw" and own.get("resize"):
        idle.append("resize")
    if idle:
        raise InvalidOptionError(f"{idle[0]}: got {own[idle[0]]!r} with {given}, for which it is not; leave it out")
    seed, metadata = own.get("seed"), own.get("metadata", "apply")
    if own.get("sample", False) != (seed is not None):
        raise InvalidOptionError(
            f"sample: got {own.get('sample', False)!r} with seed {seed!r}, expected both, sample=true and a seed, to "
            "draw from the distribution, or neither, for its mode"
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED):
        raise InvalidOptionError(f"seed: got {seed!r}, expected a whole number from 0, below 2**63")
    if metadata not in _METADATA:
        raise InvalidOptionError(f"metadata: got {metadata!r}, expected one of {', '.join(_METADATA)}")
    check_background(own.get("background"))
    return PictureParameters(
        seed=seed,
        reading=Reading(**read_factors(own, "latents are multiplied by it")),
        resize=own.get("resize", False),
        background=own.get("background"),
        metadata=metadata == "apply",
        probe=own.get("probe", False),
    )


def read_pictures(
    index: int,
    given: Mapping[str, NDArray[Any]],
    parameters: str,
    outputs: Set[str],
    *,
    encoder: Encoder,
    max_pixels: int,
) -> Job[Images, PictureParameters]:
    """Read and check one request.

    Args:
        index: its place in the ``execute``.
        given: the tensors that it brought: (B, H, W, C) uint8, (B, C, H, W) float32 or (B, 1) files.
        parameters: ``request.parameters()``.
        outputs: ``request.requested_output_names()``.
        encoder: says which sizes fit, and how many channels C there are.
        max_pixels: the most pixels that a request may have, its whole batch counted.

    Raises:
        InvalidImagesError, InvalidOptionError: say what is wrong with the request, for the client to read.
    """
    if len(given) != 1:
        raise InvalidImagesError(
            f"images: got {' and '.join(sorted(given)) or 'none'}, expected one of the inputs {', '.join(INPUTS)}"
        )
    [(name, values)] = given.items()
    asked = read_parameters(parameters, name, outputs)
    check_options(encoder.format, asked.reading)
    multiple, channels = _multiple(encoder, asked, outputs), encoder.picture_channels
    if name == "images_encoded":
        pictures = _pictures(values, asked, max_pixels, channels)
        images = check_images(pictures, multiple, channels, resize=asked.resize)
    else:
        channels_first = name == "images_raw"
        height, width = values.shape[2:] if channels_first else values.shape[1:3]
        if problem := within_pixels(len(values), height, width, max_pixels):
            raise InvalidImagesError(f"images: {problem}")
        if channels_first:
            images = check_pixels(torch.from_numpy(values), multiple, channels)
        else:
            images = check_images(values, multiple, channels, resize=asked.resize)
    return Job(index=index, request=images, parameters=asked, outputs=outputs)


def _multiple(encoder: Encoder, asked: PictureParameters, outputs: Set[str]) -> int:
    """Of how many pixels height and width must be multiples, so that every output can be made."""
    raw = asked.reading.raw or "latents_unpacked" not in outputs
    return encoder.format.multiple(packed="latents" in outputs, raw=raw)


def _pictures(files: NDArray[Any], asked: PictureParameters, max_pixels: int, channels: int) -> list[Any]:
    """Open the files of a request, once the headers of all have told that they are not too large."""
    streams = [io.BytesIO(bytes(file)) for file in files.reshape(-1)]
    pixels = 0
    for stream in streams:
        height, width = size_of("images", stream, max_pixels)
        pixels += height * width
        if pixels > max_pixels:
            raise InvalidImagesError(
                f"images: got {len(streams)} pictures with {pixels} pixels or more, more than the {max_pixels} this "
                "server allows in one request; send fewer pictures in a request, or raise max_pixels in the model's "
                "config.pbtxt"
            )
        stream.seek(0)
    how: dict[str, Any] = {"channels": channels, "background": asked.background, "metadata": asked.metadata}
    return [picture_of("images", stream, max_pixels, **how) for stream in streams]
