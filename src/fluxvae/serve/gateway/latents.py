"""The latents of a request: what their shape says, before the body is there, and the body as an array.

No PyTorch in here: to look at latents NumPy is enough, and the gateway stays small and starts at once.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latents.checks import check_shape, not_finite
from fluxvae.latents.layout import Layout, read_layout
from fluxvae.latents.packing import SizeFlooredWarning
from fluxvae.latents.reading import Reading
from fluxvae.serve.families import formats_of
from fluxvae.serve.gateway.errors import TooLarge
from fluxvae.serve.gateway.remote_decode import Asked, Limits

__all__ = ["Latents", "read_latents", "read_shape", "wrong_length"]

_LARGEST_RAW = 65504.0  # float16's; latents of any model stay below 100


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


def read_shape(asked: Asked, limits: Limits) -> Layout:
    """How the latents are to be read, checked as far as their shape goes.

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
    _check(asked, layout)
    return layout


def read_latents(asked: Asked, layout: Layout, body: bytearray | bytes) -> Latents:
    """The bytes of the latents as an array, checked like the library checks them.

    Args:
        asked: from `parse`.
        layout: from `read_shape`.
        body: raw and little-endian; float32 stay where they are.

    Raises:
        InvalidLatentsError: the wrong number of bytes, NaN or Inf, or values so large that no float16 holds them.
    """
    if len(body) != asked.nbytes:
        raise wrong_length(f"{len(body)} bytes", asked)
    values = _as_float32(body, asked.dtype)
    scaling = layout.format.scaling_factor if asked.scaling_factor is None else asked.scaling_factor
    shift = layout.format.shift_factor if asked.shift_factor is None else asked.shift_factor
    largest = max(float(values.max()), -float(values.min()))  # of NaN and Inf too
    if not math.isfinite(largest):
        bad = ~np.isfinite(values)
        first = int(bad.argmax())
        index = tuple(int(i) for i in np.unravel_index(first, asked.shape))
        raise not_finite(float(values[first]), index, int(bad.sum()), values.size)
    largest = largest / abs(scaling) + abs(shift or 0.0)
    if largest > _LARGEST_RAW:
        raise InvalidLatentsError(
            f"latents: got values as large as {largest:.3g} once divided by scaling_factor {scaling:g} and shifted; "
            f"expected at most {_LARGEST_RAW:g}, and latents of a model stay below 100: is dtype={asked.dtype} theirs?"
        )
    array = values.reshape(*layout.shape[:2], -1)
    if layout.size is not None:
        return Latents(array, *layout.size, "unpacked", None)
    assert asked.height is not None  # the check saw to it
    assert asked.width is not None
    return Latents(array, asked.height, asked.width, "packed", _check(asked, layout))


def wrong_length(came: str, asked: Asked) -> InvalidLatentsError:
    """The refusal of a body that does not hold what the query says."""
    return InvalidLatentsError(
        f"body: got {came}, expected {asked.nbytes}: shape {asked.shape} of {asked.dtype}, raw and little-endian"
    )


def _as_float32(body: bytearray | bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "bfloat16":  # NumPy has none: it is float32's upper half
        halves = np.frombuffer(body, "<u2").astype(np.uint32)
        halves <<= 16
        return halves.view(np.float32)
    return np.frombuffer(body, "<f4" if dtype == "float32" else "<f2").astype(np.float32, copy=False)


def _check(asked: Asked, layout: Layout) -> str | None:
    """The library's own check of such a shape; what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SizeFlooredWarning)
        check_shape(layout.format, asked.shape, Reading(height=asked.height, width=asked.width, raw=asked.raw))
    return next((str(each.message) for each in caught if issubclass(each.category, SizeFlooredWarning)), None)
