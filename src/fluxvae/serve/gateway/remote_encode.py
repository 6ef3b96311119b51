"""The wire protocol of diffusers' ``remote_encode`` (``diffusers.utils.remote_utils``), as pure functions.

A request is a query string, perhaps a ``Content-Type``, and a body with a picture file or a tensor. `parse` reads what
was asked for, and `fluxvae.serve.gateway.pictures` the body. Nothing here knows HTTP or Triton.

diffusers' client sends a PNG without a word about it, or a tensor with its ``shape`` and ``dtype``, and neither with a
``Content-Type``. It saves a PIL image as it lies, so the pixels of a file that comes without a type are taken as they
lie, as the pipelines take a PIL image. Whoever says ``image/jpeg`` sends a photograph, which is turned upright and
whose colour profile is applied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fluxvae.arrays import nearest_sizes
from fluxvae.errors import InvalidImagesError, InvalidOptionError
from fluxvae.latents.reading import Reading
from fluxvae.serve.families import formats_of
from fluxvae.serve.gateway.body import media_type
from fluxvae.serve.gateway.errors import TooLarge, UnsupportedMedia
from fluxvae.serve.gateway.query import FLAG, NUMBER, WHOLE, Limits, Parameter, Query, whole
from fluxvae.serve.models import LARGEST_SEED

__all__ = ["PARAMETERS", "Asked", "Tensor", "parse"]

_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
_DIMENSIONS = range(3, 5)
_CHANNELS = (3, 4)
"""RGB and RGBA. The model refuses what its VAE does not take."""
_BYTES = ("application/octet-stream", "tensor/binary")
"""The content types that hold a tensor where the query has a shape, and otherwise a picture file."""
_COLOUR = re.compile(r"[ -~]{1,40}")
_LARGEST_SHIFT = 65504.0  # float16's largest number: with a larger shift, nothing would be left of the latents
_ANY_FLAG = {"enum": ["true", "false", "True", "False"], "default": "false"}

PARAMETERS: dict[str, Parameter] = {
    "shape": Parameter(
        {"type": "array", "items": WHOLE, "minItems": _DIMENSIONS[0], "maxItems": _DIMENSIONS[-1]},
        "Of a tensor, repeated once for each dimension: (batch, 3, height, width) or (3, height, width); uint8 ones "
        "may be (batch, height, width, 3) or (height, width, 3) too. Where the model's pictures are RGBA, 4 may stand "
        "for the 3. Left out: the body is a picture file.",
    ),
    "dtype": Parameter({"enum": list(_ITEMSIZES)}, "Of a tensor."),
    "do_normalize": Parameter(
        {"enum": ["True", "False"]},
        "Of a tensor of floats. True: its values are in [0, 1]. False: they are in [-1, 1]. Left out: they are in "
        "[-1, 1] where one is negative, else in [0, 1], as diffusers' VaeImageProcessor takes them.",
    ),
    "scaling_factor": Parameter(
        NUMBER, "FLUX.1's: latents are multiplied by it. Left out: they are not scaled, unless do_scaling=True."
    ),
    "shift_factor": Parameter(
        NUMBER, "FLUX.1's: subtracted before that. Left out: nothing is subtracted, unless do_scaling=True."
    ),
    "do_scaling": Parameter(
        FLAG,
        "True: what is left out is the checkpoint's own, be it factors or FLUX.2's statistics, so that the latents are "
        "those that a pipeline hands to its transformer. False, without factors: raw latents.",
    ),
    "sample": Parameter(
        _ANY_FLAG, "true: draw from the distribution, with seed. false: take its mode. One request draws once."
    ),
    "seed": Parameter(
        {"type": "integer", "minimum": 0, "maximum": LARGEST_SEED},
        "Of the draw: that of torch.Generator('cpu').manual_seed(seed).",
    ),
    "resize": Parameter(
        _ANY_FLAG,
        "true: make a size that does not fit smaller, to the multiples below, as VaeImageProcessor.preprocess does: "
        "files by Lanczos' filter, tensors by the nearest pixel. false: refuse it.",
    ),
    "background": Parameter(
        {"type": "string"},
        "The colour behind the transparent pixels of a picture file, such as white or #ffffff. Left out: they are "
        "refused, since latents hold no transparency; a model whose pictures are RGBA keeps them.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """The tensor that the body holds."""

    shape: tuple[int, ...]
    """As the client gave it."""
    dtype: str
    channels_last: bool
    """Whether the channels are the last dimension, which is for uint8 only."""
    do_normalize: bool | None
    """Whether floats are in [0, 1] (true) or in [-1, 1] (false); with None their values tell."""
    fitted: tuple[int, int]
    """The height and width at which it is encoded: its own, or with ``resize`` the multiples below."""

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor takes."""
        return math.prod(self.shape) * _ITEMSIZES[self.dtype]

    @property
    def batch(self) -> int:
        """How many pictures there are."""
        return self.shape[0] if len(self.shape) == _DIMENSIONS[-1] else 1


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a query and its headers ask for. It is valid by itself, while the body is still unread."""

    tensor: Tensor | None
    """The tensor that the body holds. None: it holds a picture file."""
    parameters: dict[str, Any]
    """The parameters of the request to the model."""


def parse(
    query: Iterable[tuple[str, str]], content_type: str, limits: Limits, vae_class: str = "AutoencoderKL"
) -> Asked:
    """Read the query string and ``Content-Type``.

    Args:
        query: the names and values of the query string, decoded, in their order and with repetitions.
        content_type: the value of the header; ``""`` where there is none.
        limits: what a request may ask for.
        vae_class: the class of the VAE that the model serves.

    Raises:
        UnsupportedMedia: the body is neither a picture nor bytes.
        InvalidOptionError: a parameter is unknown, missing or repeated or has a wrong value, or two contradict.
        InvalidImagesError: no picture has this shape, or its size does not fit.
        TooLarge: it is more than ``limits`` allow.
    """
    media = media_type(content_type)
    is_image = media.startswith("image/")
    if media and not is_image and media not in _BYTES:
        raise UnsupportedMedia(
            f"Content-Type: got {content_type[:80]!r}, expected 'image/png' or that of another picture file; "
            "'tensor/binary' for a tensor's raw bytes; or none, as diffusers' remote_encode sends either"
        )
    given = Query.read(query, PARAMETERS)
    reading = given.rescaling(vae_class, "multiplied")
    if not given.flag("do_scaling") and "scaling_factor" not in given and "shift_factor" not in given:
        reading = Reading(raw=True)  # some checkpoints for SDXL normalise each channel, which no factor undoes
    if abs(reading.shift_factor or 0.0) > _LARGEST_SHIFT:
        raise InvalidOptionError(
            f"shift_factor: got {reading.shift_factor:g}, expected a magnitude of at most {_LARGEST_SHIFT:g}: it is "
            "subtracted from latents, which stay below 100 (FLUX.1: 0.1159)"
        )
    parameters: dict[str, Any] = {**reading.parameters(), **_draw(given)}
    if given.flag("resize"):
        parameters["resize"] = True
    if given.shape or "dtype" in given:
        if is_image:
            raise InvalidOptionError(
                f"{'shape' if given.shape else 'dtype'}: got it with Content-Type {media[:80]!r}, which says that the "
                "body is a picture file; leave it out, or send a tensor's bytes as 'tensor/binary'"
            )
        format = formats_of(vae_class)[0]
        tensor = _tensor(given, limits, format.multiple(packed=False, raw=bool(reading.raw)))
        return Asked(tensor=tensor, parameters=parameters)
    if "do_normalize" in given:
        raise InvalidOptionError(
            "do_normalize: got it for a picture file, whose values are never in doubt; it is for tensors of floats: "
            "leave it out"
        )
    parameters["metadata"] = "apply" if media else "ignore"
    if "background" in given:
        if not _COLOUR.fullmatch(given["background"]):
            raise InvalidOptionError(
                f"background: got {given['background'][:80]!r}, expected a colour such as white or #ffffff"
            )
        parameters["background"] = given["background"]
    return Asked(tensor=None, parameters=parameters)


def _draw(given: Query) -> dict[str, Any]:
    """Return the parameters of the model that say with which seed it draws, if it does."""
    sample = given.flag("sample")
    if not sample and "seed" not in given:
        return {}
    if not sample:
        raise InvalidOptionError("seed: got it without sample=true, so nothing would be drawn with it; send both")
    if "seed" not in given:
        raise InvalidOptionError(
            "seed: missing, expected a whole number with sample=true, so that the draw can be repeated"
        )
    text = given["seed"]
    if not (text.isascii() and text.isdecimal()) or len(text) > 19 or int(text) > LARGEST_SEED:
        raise InvalidOptionError(f"seed: got {text[:80]!r}, expected a whole number from 0 to {LARGEST_SEED}")
    return {"sample": True, "seed": int(text)}


def _tensor(given: Query, limits: Limits, multiple: int) -> Tensor:
    if not given.shape:
        raise InvalidOptionError("shape: missing, expected each dimension of the tensor, since dtype was given")
    dtype = given.choice("dtype")
    expected = "(batch, 3, height, width) or (3, height, width), or 4 channels with alpha"
    if dtype == "uint8":
        expected += ", or with the channels last"
    if len(given.shape) not in _DIMENSIONS:
        raise InvalidImagesError(
            f"shape: got {len(given.shape)} dimensions, expected {expected}, each dimension as a parameter of its own: "
            "shape=1&shape=3&shape=512&shape=512"
        )
    shape = tuple(whole("shape", value, InvalidImagesError) for value in given.shape)
    channels_last = shape[-3] not in _CHANNELS and dtype == "uint8"  # no side that fits is that short
    if shape[-1 if channels_last else -3] not in _CHANNELS:
        raise InvalidImagesError(f"shape: got {shape} of {dtype}, expected {expected}")
    for name, why in (("do_normalize", "uint8 is always in [0, 255]"), ("background", "a tensor has no transparency")):
        if name in given and (name == "background" or dtype == "uint8"):
            raise InvalidOptionError(f"{name}: got {given[name][:80]!r}, but {why}; leave it out")
    do_normalize = given.flag("do_normalize") if "do_normalize" in given else None
    height, width = shape[-3:-1] if channels_last else shape[-2:]
    tensor = Tensor(
        shape=shape,
        dtype=dtype,
        channels_last=channels_last,
        do_normalize=do_normalize,
        fitted=(height // multiple * multiple, width // multiple * multiple),
    )
    if tensor.nbytes > limits.max_picture_bytes:
        raise TooLarge(
            f"shape: got {shape} of {dtype}, which are {tensor.nbytes} bytes, more than the "
            f"{limits.max_picture_bytes} of pictures that this gateway takes; send fewer in a request, or uint8"
        )
    if tensor.batch * height * width > limits.max_pixels:
        raise TooLarge(
            f"shape: got {shape}, which are {tensor.batch * height * width} pixels, more than the {limits.max_pixels} "
            "this gateway takes in one request; send fewer or smaller pictures"
        )
    resizable = min(tensor.fitted) > 0
    if tensor.fitted != (height, width) and not (given.flag("resize") and resizable):
        near = " or ".join(f"{each[0]}x{each[1]}" for each in nearest_sizes(height, width, multiple))
        raise InvalidImagesError(
            f"shape: got {height}x{width} (height x width), expected multiples of {multiple}: the nearest are {near}; "
            f"crop or resize the picture{', or send resize=true' if resizable else ''}"
        )
    return tensor
