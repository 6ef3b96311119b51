"""The wire protocol of diffusers' ``remote_decode`` (``diffusers.utils.remote_utils``), as pure functions.

A request is a query string, a few headers and a body with the latents. `parse` reads what was asked for.
`fluxvae.serve.gateway.body` reads the body, and `fluxvae.serve.gateway.latents` the latents in it. Nothing here knows
HTTP or Triton.

What the query cannot say, the client says by ``Accept``. With ``output_type=pil``, ``tensor/binary`` and
``tensor/base64`` ask for the tensor that the client's own ``processor`` step starts from; ``image/png``,
``image/jpeg`` and anything else ask for an encoded picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latents.reading import Reading
from fluxvae.serve.families import has_factors, read_raw
from fluxvae.serve.gateway.body import Form
from fluxvae.serve.gateway.errors import TooLarge

__all__ = ["PARAMETERS", "Asked", "Limits", "Parameter", "merge", "parse"]

_TENSORS = {"tensor/binary": "binary", "tensor/base64": "base64"}
"""The values of ``Accept`` that ask for a tensor, and in which form it is to come."""
_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_DIMENSIONS = range(2, 6)
_LARGEST_SCALING = 1e6  # beyond it, or below its inverse, nothing is left of the latents in float32
_DIGITS = 12

_WHOLE = {"type": "integer", "minimum": 1, "maximum": 10**_DIGITS - 1}


class Parameter(NamedTuple):
    """One parameter of the query string, as the parser's messages and OpenAPI need it."""

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
    "dtype": Parameter({"enum": list(_ITEMSIZES)}, "Of the latents.", required=True),
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
        {"enum": ["jpg", "png"], "default": "jpg"},
        "Of an encoded picture; jpg is lossy (quality 95). Left out: png where Accept is image/png.",
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
    "input_tensor_type": Parameter(
        {"enum": ["binary", "base64"], "default": "binary"}, "Older clients send it; it is what Content-Type says."
    ),
    "output_tensor_type": Parameter(
        {"enum": ["binary", "base64"], "default": "binary"},
        "Older clients send it. base64, like Accept: tensor/base64: a tensor comes as JSON, "
        '{"inputs": base64, "parameters": {"shape": [...], "dtype": ...}}.',
    ),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_request_bytes: int
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a query and its headers ask for. It is valid by itself, while the body is still unread."""

    shape: tuple[int, ...]
    dtype: str
    reading: Reading
    """What the query says about the latents. A factor of None stands for the checkpoint's own."""
    output: str
    """The Triton model's output that is asked for: ``images``, ``images_pt``, ``images_raw`` or ``images_encoded``."""
    image_format: str
    """``jpeg`` or ``png``, as the model calls them."""
    base64: bool
    """Whether a tensor is answered as base64 in JSON."""
    vae_class: str
    """The class of the VAE that the model serves."""

    @property
    def nbytes(self) -> int:
        """How many bytes the latents take."""
        return math.prod(self.shape) * _ITEMSIZES[self.dtype]


def parse(
    query: Iterable[tuple[str, str]],
    accept: str,
    limits: Limits,
    vae_class: str = "AutoencoderKL",
    form: Form = Form.BINARY,
) -> Asked:
    """Read the query string and ``Accept``.

    Args:
        query: the names and values of the query string, decoded, in their order and with repetitions.
        accept: the value of the header; ``""`` where there is none.
        limits: what a request may ask for.
        vae_class: the class of the VAE that the model serves.
        form: the form of the body.

    Raises:
        InvalidOptionError: a parameter is unknown, missing or repeated or has a wrong value, or two contradict.
        InvalidLatentsError: no latents have this shape.
        TooLarge: it asks for more than ``limits`` allow.
    """
    given, shape = _collect(query)
    output_type = _choice(given, "output_type", also={"mp4"})
    if output_type == "mp4":
        raise InvalidOptionError(
            "output_type: got 'mp4', which is for video models; FLUX makes images: use 'pil' or 'pt'"
        )
    if "input_tensor_type" in given and _choice(given, "input_tensor_type") != form.value:
        raise InvalidOptionError(
            f"input_tensor_type: got {given['input_tensor_type']!r}, but Content-Type says that the body is "
            f"{form.value}; send one or the other"
        )
    accepted = accept.split(";")[0].strip().lower()
    rescaling = _rescaling(given, vae_class)
    asked = Asked(
        shape=_shape(shape),
        dtype=_choice(given, "dtype"),
        reading=replace(rescaling, height=_pixels(given, "height"), width=_pixels(given, "width")),
        output=_output(output_type, _flag(given, "partial_postprocess"), accepted),
        image_format=_image_format(given, accepted),
        base64=_base64(given, accepted),
        vae_class=vae_class,
    )
    if asked.nbytes > limits.max_request_bytes:
        raise TooLarge(
            f"shape: got {asked.shape} of {asked.dtype}, which are {asked.nbytes} bytes, more than the "
            f"{limits.max_request_bytes} this gateway takes; send fewer images in a request, or 16-bit latents"
        )
    return asked


def merge(query: list[tuple[str, str]], more: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the parameters of the query string together with those of a JSON body.

    Raises:
        InvalidOptionError: a parameter is in both.
    """
    twice = {name for name, _ in query} & {name for name, _ in more}
    if twice:
        raise InvalidOptionError(f"{min(twice)[:80]}: got it in the query string and in the body; send it once")
    return query + more


def _collect(query: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Return the parameters by name, and the values of ``shape``, which alone may be repeated."""
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
    """Read a number that comes as text, which is not all that Python's float() takes."""
    if name not in given:
        return None
    try:
        value = float(given[name]) if given[name].isascii() and "_" not in given[name] else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidOptionError(f"{name}: got {given[name][:80]!r}, expected a finite number")
    return value


def _rescaling(given: dict[str, str], vae_class: str) -> Reading:
    """Return what the query says about rescaling, in the model's terms.

    The client leaves out what was already applied, and says ``do_scaling=True`` where the server's own is wanted.
    """
    if not has_factors(vae_class):
        _flag(given, "do_scaling")  # only to refuse a wrong value
        return Reading(raw=read_raw(given, vae_class))
    scaling, shift = _number(given, "scaling_factor"), _number(given, "shift_factor")
    if scaling is not None and not 1 / _LARGEST_SCALING <= abs(scaling) <= _LARGEST_SCALING:
        raise InvalidOptionError(
            f"scaling_factor: got {scaling:g}, expected a magnitude from {1 / _LARGEST_SCALING:g} to "
            f"{_LARGEST_SCALING:g}: latents are divided by it (FLUX.1: 0.3611)"
        )
    if _flag(given, "do_scaling"):
        return Reading(scaling_factor=scaling, shift_factor=shift)
    if "do_scaling" in given and (scaling is not None or shift is not None):
        raise InvalidOptionError(
            "do_scaling: got False together with scaling_factor or shift_factor, which contradict it; send one or the "
            "other"
        )
    return Reading(scaling_factor=1.0 if scaling is None else scaling, shift_factor=0.0 if shift is None else shift)


def _output(output_type: str, partial_postprocess: bool, accepted: str) -> str:
    if output_type == "pt":
        return "images" if partial_postprocess else "images_raw"
    return "images_pt" if accepted in _TENSORS else "images_encoded"


def _image_format(given: dict[str, str], accepted: str) -> str:
    """Return the format of the picture; the first clients had no ``image_format``, but only said what they accept."""
    if "image_format" not in given and accepted == "image/png":
        return "png"
    return {"jpg": "jpeg", "png": "png"}[_choice(given, "image_format")]


def _base64(given: dict[str, str], accepted: str) -> bool:
    asked = _choice(given, "output_tensor_type") if "output_tensor_type" in given else None
    if asked is not None and _TENSORS.get(accepted, asked) != asked:
        raise InvalidOptionError(
            f"output_tensor_type: got {asked!r} with Accept: {accepted}, which contradict; send one or the other"
        )
    return (asked or _TENSORS.get(accepted)) == "base64"
