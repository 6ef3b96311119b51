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

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latents.checks import check_order
from fluxvae.latents.reading import FEATURE_ORDERS, Reading
from fluxvae.serve.families import formats_of
from fluxvae.serve.gateway.body import Form, media_type
from fluxvae.serve.gateway.errors import TooLarge
from fluxvae.serve.gateway.query import FLAG, NUMBER, WHOLE, Limits, Parameter, Query, whole

__all__ = ["PARAMETERS", "Asked", "merge", "parse"]

_TENSORS = {"tensor/binary": "binary", "tensor/base64": "base64"}
"""The values of ``Accept`` that ask for a tensor, and in which form it is to come."""
_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_DIMENSIONS = range(2, 6)

PARAMETERS: dict[str, Parameter] = {
    "shape": Parameter(
        {"type": "array", "items": WHOLE, "minItems": _DIMENSIONS[0], "maxItems": _DIMENSIONS[-1]},
        "Of the latents, repeated once for each dimension: packed (batch, patches, 64) or unpacked "
        "(batch, 16, height/8, width/8); FLUX.2's are (batch, patches, 128), (batch, 128, height/16, width/16) or "
        "(batch, 32, height/8, width/8). One image may leave its batch out, and unpacked latents may have a dimension "
        "of one frame after the channels.",
        required=True,
    ),
    "dtype": Parameter({"enum": list(_ITEMSIZES)}, "Of the latents.", required=True),
    "height": Parameter(
        WHOLE,
        "Pixels. Needed for packed latents; for unpacked ones 8 times theirs, or left out. With width it tells one "
        "image (16, n, 64) without its batch from 16 packed ones.",
    ),
    "width": Parameter(WHOLE, "As height."),
    "output_type": Parameter(
        {"enum": ["pil", "pt"], "default": "pil"},
        "pil: an encoded picture, or, where Accept is tensor/binary, (batch, 3, height, width) float32 in [0, 1]. "
        "pt: (batch, 3, height, width) float32, about -1 to 1, as the VAE leaves them. Where the model's "
        "pictures are RGBA, all have four channels. mp4 is for video models, and refused.",
    ),
    "partial_postprocess": Parameter(
        FLAG,
        "With output_type=pt: True gives (batch, height, width, 3) uint8, a quarter of the bytes.",
    ),
    "image_format": Parameter(
        {"enum": ["jpg", "png"], "default": "jpg"},
        "Of an encoded picture; jpg is lossy (quality 95), and refused where the model's pictures are RGBA. Left out: "
        "png where Accept is image/png.",
    ),
    "scaling_factor": Parameter(
        NUMBER,
        "FLUX.1's: latents are divided by it. Left out: they are raw, unless do_scaling=True. Models "
        "whose checkpoints have statistics instead refuse it.",
    ),
    "shift_factor": Parameter(
        NUMBER, "FLUX.1's: added after that. Left out: nothing is added, unless do_scaling=True."
    ),
    "do_scaling": Parameter(
        FLAG,
        "True: what is left out is the checkpoint's own, be it factors or statistics. Previews need it. "
        "diffusers calls it deprecated, and sends it where no factors are given.",
    ),
    "feature_order": Parameter(
        {"enum": list(FEATURE_ORDERS), "default": FEATURE_ORDERS[0]},
        "Of the 128 features of FLUX.2's patches: row_column_channel for Ideogram 4's latents. Models of FLUX.1 and "
        "previews refuse it.",
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
    given = Query.read(query, PARAMETERS)
    output_type = given.choice("output_type", also={"mp4"})
    if output_type == "mp4":
        raise InvalidOptionError(
            "output_type: got 'mp4', which is for video models; FLUX makes images: use 'pil' or 'pt'"
        )
    if "input_tensor_type" in given and given.choice("input_tensor_type") != form.value:
        raise InvalidOptionError(
            f"input_tensor_type: got {given['input_tensor_type']!r}, but Content-Type says that the body is "
            f"{form.value}; send one or the other"
        )
    accepted = media_type(accept)
    rescaling = given.rescaling(vae_class, "divided")
    order = given.choice("feature_order") if "feature_order" in given else None
    check_order(formats_of(vae_class)[0], order)
    asked = Asked(
        shape=_shape(given.shape),
        dtype=given.choice("dtype"),
        reading=replace(rescaling, height=_pixels(given, "height"), width=_pixels(given, "width"), feature_order=order),
        output=_output(output_type, given.flag("partial_postprocess"), accepted),
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


def _shape(values: list[str]) -> tuple[int, ...]:
    if len(values) not in _DIMENSIONS:
        raise InvalidLatentsError(
            f"shape: got {len(values)} dimensions, expected packed latents (batch, patches, 64) or unpacked ones "
            "(batch, 16, height/8, width/8), each dimension as a parameter of its own: shape=1&shape=1024&shape=64"
        )
    return tuple(whole("shape", value, InvalidLatentsError) for value in values)


def _pixels(query: Query, name: str) -> int | None:
    return whole(name, query[name], InvalidLatentsError) if name in query else None


def _output(output_type: str, partial_postprocess: bool, accepted: str) -> str:
    if output_type == "pt":
        return "images" if partial_postprocess else "images_raw"
    return "images_pt" if accepted in _TENSORS else "images_encoded"


def _image_format(given: Query, accepted: str) -> str:
    """Return the format of the picture; the first clients had no ``image_format``, but only said what they accept."""
    if "image_format" not in given and accepted == "image/png":
        return "png"
    return {"jpg": "jpeg", "png": "png"}[given.choice("image_format")]


def _base64(given: Query, accepted: str) -> bool:
    asked = given.choice("output_tensor_type") if "output_tensor_type" in given else None
    if asked is not None and _TENSORS.get(accepted, asked) != asked:
        raise InvalidOptionError(
            f"output_tensor_type: got {asked!r} with Accept: {accepted}, which contradict; send one or the other"
        )
    return (asked or _TENSORS.get(accepted)) == "base64"
