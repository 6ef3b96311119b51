"""The wire protocol of diffusers' ``remote_decode`` (``diffusers.utils.remote_utils``), as pure functions.

A request is a query string, a few headers and the latents' raw little-endian bytes; `parse` and `read_shape` read the
former and `read_latents` the latter. Nothing here knows HTTP or Triton. What a model expects
of the latents follows from the class of its checkpoint (`fluxvae.serve.models`).

What the query cannot say is read from ``Accept``, as the client means it: with ``output_type=pil``, ``image/png`` and
``image/jpeg`` (and anything else) want an encoded picture, ``tensor/binary`` wants the tensor that the client's own
``processor`` step starts from.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latent_layout import Layout, read_layout
from fluxvae.packing import SizeFlooredWarning
from fluxvae.serve.families import formats_of, has_factors, read_raw
from fluxvae.serve.gateway.errors import TooLarge

__all__ = ["DTYPES", "PARAMETERS", "Asked", "Latents", "Limits", "Parameter", "parse", "read_latents", "read_shape"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DIMENSIONS = range(2, 6)
_LARGEST_RAW = 65504.0  # float16's; latents of any model stay below 100
_LARGEST_SCALING = 1e6  # beyond it, and below its inverse, float32 loses the latents
_DIGITS = 12

_WHOLE = {"type": "integer", "minimum": 1, "maximum": 10**_DIGITS - 1}


class Parameter(NamedTuple):
    """One parameter of the query string, for the parser's messages and for OpenAPI."""

    schema: dict[str, Any]
    description: str
    required: bool = False


PARAMETERS: dict[str, Parameter] = {
    "shape": Parameter(
        {"type": "array", "items": _WHOLE, "minItems": _DIMENSIONS[0], "maxItems": _DIMENSIONS[-1]},
        "Of the latents, repeated once for each dimension: packed (batch, patches, 64) or unpacked "
        "(batch, 16, height/8, width/8); FLUX.2's are (batch, patches, 128), (batch, 128, height/16, width/16) or "
        "(batch, 32, height/8, width/8). One image may leave its batch out, and unpacked latents may have a dimension "
        "of one frame after the channels.",
        required=True,
    ),
    "dtype": Parameter({"enum": list(DTYPES)}, "Of the latents.", required=True),
    "height": Parameter(
        _WHOLE,
        "Pixels. Needed for packed latents; for unpacked ones 8 times theirs, or left out. With width it tells one "
        "image (16, n, 64) without its batch from 16 packed ones.",
    ),
    "width": Parameter(_WHOLE, "As height."),
    "output_type": Parameter(
        {"enum": ["pil", "pt"], "default": "pil"},
        "pil: an encoded picture, or, where Accept is tensor/binary, (batch, 3, height, width) float32 in [0, 1]. "
        "pt: (batch, 3, height, width) float32, about -1 to 1, not clamped. mp4 is for video models, and refused.",
    ),
    "partial_postprocess": Parameter(
        {"enum": ["True", "False"], "default": "False"},
        "With output_type=pt: True gives (batch, height, width, 3) uint8, a quarter of the bytes.",
    ),
    "image_format": Parameter(
        {"enum": ["jpg", "png"], "default": "jpg"}, "Of an encoded picture; jpg is lossy (quality 95)."
    ),
    "scaling_factor": Parameter(
        {"type": "number"},
        "FLUX.1's: latents are divided by it. Left out: they are raw, unless do_scaling=True.",
    ),
    "shift_factor": Parameter(
        {"type": "number"}, "FLUX.1's: added after that. Left out: nothing is added, unless do_scaling=True."
    ),
    "do_scaling": Parameter(
        {"enum": ["True", "False"], "default": "False"},
        "True: what is left out is the checkpoint's own, be it factors or FLUX.2's statistics. Previews need it. "
        "diffusers calls it deprecated, and sends it where no factors are given.",
    ),
    "input_tensor_type": Parameter({"enum": ["binary"], "default": "binary"}, "Older clients send it."),
    "output_tensor_type": Parameter({"enum": ["binary"], "default": "binary"}, "Older clients send it."),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_request_bytes: int
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a query and its headers ask for: valid by itself, its body still unread."""

    shape: tuple[int, ...]
    dtype: str
    height: int | None
    width: int | None
    output: str
    """The Triton model's output: ``images``, ``images_pt``, ``images_raw`` or ``images_encoded``."""
    image_format: str
    """``jpeg`` or ``png``: the model's words."""
    vae_class: str
    """Of the model that is asked."""
    scaling_factor: float | None
    """None: the checkpoint's own, where it has any."""
    shift_factor: float | None
    raw: bool | None
    """Of FLUX.2: nothing is rescaled."""

    @property
    def nbytes(self) -> int:
        """Bytes the body must have."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Latents(NamedTuple):
    """Latents as the Triton model takes them, and what they will decode to."""

    array: NDArray[np.float32]
    """Packed (B, N, 64), or unpacked (B, 16, lh * lw); of FLUX.2 with 128, and 32 or 128. Always with its batch."""
    height: int
    """Pixels: of the image for unpacked latents, as asked for packed ones (the model floors them)."""
    width: int
    layout: str
    """``packed`` or ``unpacked``."""
    warning: str | None
    """That the size will be floored, for the client to read."""


def parse(query: Iterable[tuple[str, str]], accept: str, limits: Limits, vae_class: str = "AutoencoderKL") -> Asked:
    """Read the query string and ``Accept``.

    Args:
        query: decoded names and values, repeated ones each.
        accept: the header; ``""`` where there is none.
        limits: nothing larger gets as far as a body.
        vae_class: of the model that is asked.

    Raises:
        InvalidOptionError: a parameter is unknown, missing, repeated or has a wrong value, or two contradict.
        InvalidLatentsError: a shape that no latents have.
        TooLarge: more than ``limits``.
    """
    given, shape = _collect(query)
    output_type = _choice(given, "output_type", also={"mp4"})
    if output_type == "mp4":
        raise InvalidOptionError(
            "output_type: got 'mp4', which is for video models; FLUX makes images: use 'pil' or 'pt'"
        )
    for name in ("input_tensor_type", "output_tensor_type"):
        _choice(given, name)
    scaling_factor, shift_factor, raw = _rescaling(given, vae_class)
    asked = Asked(
        shape=_shape(shape),
        dtype=_choice(given, "dtype"),
        height=_pixels(given, "height"),
        width=_pixels(given, "width"),
        output=_output(output_type, _flag(given, "partial_postprocess"), accept),
        image_format={"jpg": "jpeg", "png": "png"}[_choice(given, "image_format")],
        vae_class=vae_class,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        raw=raw,
    )
    if asked.nbytes > limits.max_request_bytes:
        raise TooLarge(
            f"shape: got {asked.shape} of {asked.dtype}, which are {asked.nbytes} bytes, more than the "
            f"{limits.max_request_bytes} this gateway takes; send fewer images in a request, or 16-bit latents"
        )
    return asked


def read_shape(asked: Asked, limits: Limits) -> Layout:
    """How the latents are to be read, checked as far as their shape goes: before the body is.

    Raises:
        InvalidLatentsError: no latents of the model have this shape, the size does not fit it, or nothing tells which
            of two readings is meant.
        InvalidOptionError: a batch where one encoded picture is asked for.
        TooLarge: more than ``limits``.
    """
    layout = read_layout(asked.shape, formats_of(asked.vae_class), asked.height, asked.width)
    if layout.size is None:
        pixels = layout.batch * layout.shape[1] * layout.format.packed_multiple**2
    else:
        pixels = layout.batch * layout.size[0] * layout.size[1]
    if pixels > limits.max_pixels:
        raise TooLarge(
            f"shape: got {asked.shape}, which decode to {pixels} pixels, more than the {limits.max_pixels} this "
            "gateway takes in one request; send fewer images in a request"
        )
    if asked.output == "images_encoded" and layout.batch != 1:
        raise InvalidOptionError(
            f"output_type: got 'pil' for a batch of {layout.batch}, but an encoded answer holds one picture; send "
            "the images one by one, or use output_type='pt' with partial_postprocess=True, which carries a batch"
        )
    _check(asked, layout, torch.empty(asked.shape, dtype=torch.float32, device="meta"))
    return layout


def read_latents(asked: Asked, layout: Layout, body: bytearray) -> Latents:
    """The body as latents, checked like the library checks them.

    Args:
        asked: from `parse`.
        layout: from `read_shape`.
        body: its raw bytes.

    Raises:
        InvalidLatentsError: the wrong number of bytes, NaN or Inf, or values so large that no float16 holds them.
    """
    if len(body) != asked.nbytes:
        raise wrong_length(f"{len(body)} bytes", asked)
    latents = torch.frombuffer(body, dtype=DTYPES[asked.dtype]).reshape(asked.shape)
    warning = _check(asked, layout, latents)
    latents = latents.float()
    scaling = layout.format.scaling_factor if asked.scaling_factor is None else asked.scaling_factor
    shift = layout.format.shift_factor if asked.shift_factor is None else asked.shift_factor
    largest = float(latents.abs().max()) / abs(scaling) + abs(shift or 0.0)
    if largest > _LARGEST_RAW:
        raise InvalidLatentsError(
            f"latents: got values as large as {largest:.3g} once divided by scaling_factor {scaling:g} and shifted; "
            f"expected at most {_LARGEST_RAW:g}, and latents of a model stay below 100: is dtype={asked.dtype} theirs?"
        )
    array: NDArray[np.float32] = latents.numpy().reshape(*layout.shape[:2], -1)
    if layout.size is not None:
        return Latents(array, *layout.size, "unpacked", None)
    assert asked.height is not None  # the check saw to it
    assert asked.width is not None
    return Latents(array, asked.height, asked.width, "packed", warning)


def _check(asked: Asked, layout: Layout, latents: torch.Tensor) -> str | None:
    """The library's own check of these latents, or of their shape alone; what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SizeFlooredWarning)
        layout.format.check(latents, asked.height, asked.width, raw=asked.raw)
    return next((str(each.message) for each in caught if issubclass(each.category, SizeFlooredWarning)), None)


def wrong_length(came: str, asked: Asked) -> InvalidLatentsError:
    """The refusal of a body that does not hold what the query says."""
    return InvalidLatentsError(
        f"body: got {came}, expected {asked.nbytes}: shape {asked.shape} of {asked.dtype}, raw and little-endian"
    )


def _collect(query: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Single parameters, and the values of the repeated ``shape``; nothing unknown, nothing twice."""
    given: dict[str, str] = {}
    shape: list[str] = []
    for name, value in query:
        if name not in PARAMETERS:
            raise InvalidOptionError(
                f"parameter {name[:80]!r}: unknown, expected one of {', '.join(PARAMETERS)}, in the query string"
            )
        if name == "shape":
            shape.append(value)
        elif name in given:
            raise InvalidOptionError(f"{name}: got it twice; only shape is repeated")
        else:
            given[name] = value
    return given, shape


def _shape(values: list[str]) -> tuple[int, ...]:
    if len(values) not in _DIMENSIONS:
        raise InvalidLatentsError(
            f"shape: got {len(values)} dimensions, expected packed latents (batch, patches, 64) or unpacked ones "
            "(batch, 16, height/8, width/8), each dimension as a parameter of its own: shape=1&shape=1024&shape=64"
        )
    return tuple(_whole("shape", value) for value in values)


def _pixels(given: dict[str, str], name: str) -> int | None:
    return _whole(name, given[name]) if name in given else None


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > _DIGITS or int(text) == 0:
        raise InvalidLatentsError(f"{name}: got {text[:80]!r}, expected a whole number from 1, in digits")
    return int(text)


def _choice(given: dict[str, str], name: str, also: Iterable[str] = ()) -> str:
    parameter = PARAMETERS[name]
    choices: list[str] = parameter.schema["enum"]
    if name not in given:
        if parameter.required:
            raise InvalidOptionError(f"{name}: missing, expected one of {', '.join(choices)}")
        return str(parameter.schema["default"])
    if given[name] not in choices and given[name] not in also:
        raise InvalidOptionError(f"{name}: got {given[name][:80]!r}, expected one of {', '.join(choices)}")
    return given[name]


def _flag(given: dict[str, str], name: str) -> bool:
    return _choice(given, name) == "True"


def _number(given: dict[str, str], name: str) -> float | None:
    if name not in given:
        return None
    try:
        value = float(given[name]) if given[name].isascii() and "_" not in given[name] else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidOptionError(f"{name}: got {given[name][:80]!r}, expected a finite number")
    return value


def _rescaling(given: dict[str, str], vae_class: str) -> tuple[float | None, float | None, bool | None]:
    """(scaling_factor, shift_factor, raw) for the model, where None is the checkpoint's own, or none.

    The client leaves out what was already applied, and says ``do_scaling=True`` where the server's are wanted.
    """
    if not has_factors(vae_class):
        _flag(given, "do_scaling")  # its value is checked
        return None, None, read_raw(given, vae_class)
    scaling, shift = _number(given, "scaling_factor"), _number(given, "shift_factor")
    if scaling is not None and not 1 / _LARGEST_SCALING <= abs(scaling) <= _LARGEST_SCALING:
        raise InvalidOptionError(
            f"scaling_factor: got {scaling:g}, expected a magnitude from {1 / _LARGEST_SCALING:g} to "
            f"{_LARGEST_SCALING:g}: latents are divided by it (FLUX.1: 0.3611)"
        )
    if _flag(given, "do_scaling"):
        return scaling, shift, None
    if "do_scaling" in given and (scaling is not None or shift is not None):
        raise InvalidOptionError(
            "do_scaling: got False together with scaling_factor or shift_factor, which contradict it; send one or the "
            "other"
        )
    return 1.0 if scaling is None else scaling, 0.0 if shift is None else shift, None


def _output(output_type: str, partial_postprocess: bool, accept: str) -> str:
    if output_type == "pt":
        return "images" if partial_postprocess else "images_raw"
    wants_tensor = accept.split(";")[0].strip().lower() == "tensor/binary"
    return "images_pt" if wants_tensor else "images_encoded"
