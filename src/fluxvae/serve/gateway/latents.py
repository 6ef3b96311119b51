"""Reads the latents of a request: first what their shape says, before the body is there, then the body as an array.

Nothing here uses PyTorch. NumPy is enough to look at latents, and the gateway stays small and starts at once.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latents.checks import check_shape, not_finite
from fluxvae.latents.layout import Layout, read_layout
from fluxvae.latents.packing import SizeFlooredWarning
from fluxvae.serve.families import formats_of, refuse_layers
from fluxvae.serve.gateway.body import as_float32
from fluxvae.serve.gateway.errors import TooLarge
from fluxvae.serve.gateway.query import Limits
from fluxvae.serve.gateway.remote_decode import Asked

__all__ = ["Latents", "read_latents", "read_shape", "wrong_length"]

_LARGEST_RAW = 65504.0  # float16's; latents of any model stay below 100


class Latents(NamedTuple):
    """Latents as the Triton model takes them."""

    array: NDArray[np.float32]
    """Packed (B, N, 64), or unpacked (B, 16, lh * lw); FLUX.2's have 128, and 32 or 128. The batch is always there."""
    height: int
    """The height in pixels: the image's for unpacked latents; for packed ones what was asked for, as the model floors
    it."""
    width: int
    parameters: dict[str, Any]
    """The parameters of the request to the model that say how the latents are to be read."""
    warning: str | None
    """Tells the client that the size will be floored; None where it will not."""


def read_shape(asked: Asked, limits: Limits) -> Layout:
    """Return how the shape of the latents is to be understood, checked as far as it goes without them.

    Raises:
        InvalidLatentsError: no latents of the model have this shape, the size does not fit it, nothing tells which of
            two layouts is meant, or there are several layers in a row.
        InvalidOptionError: one encoded picture is asked for, and the latents are a batch.
        TooLarge: there is more than ``limits`` allow.
    """
    layout = read_layout(asked.shape, formats_of(asked.vae_class), asked.reading.height, asked.reading.width)
    if len(asked.shape) == 5:
        refuse_layers(asked.shape, asked.shape[2])
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
    """Return the bytes of the latents as an array, checked as the library checks them.

    Args:
        asked: what `parse` returned.
        layout: what `read_shape` returned.
        body: the values, raw and little-endian. Those of float32 are not copied.

    Raises:
        InvalidLatentsError: the number of bytes is wrong, or there are NaN or Inf, or values so large that no float16
            holds them.
    """
    if len(body) != asked.nbytes:
        raise wrong_length(f"{len(body)} bytes", asked)
    values = as_float32(body, asked.dtype)
    reading, format = asked.reading, layout.format
    scaling = format.scaling_factor if reading.scaling_factor is None else reading.scaling_factor
    shift = format.shift_factor if reading.shift_factor is None else reading.shift_factor
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
        return Latents(array, *layout.size, {"layout": "unpacked", **reading.parameters()}, None)
    assert reading.height is not None  # `check_shape` refuses packed latents without a size
    assert reading.width is not None
    return Latents(array, reading.height, reading.width, reading.parameters(), _check(asked, layout))


def wrong_length(came: str, asked: Asked) -> InvalidLatentsError:
    """Return the error that refuses a body which does not hold what the query says."""
    return InvalidLatentsError(
        f"body: got {came}, expected {asked.nbytes}: shape {asked.shape} of {asked.dtype}, raw and little-endian"
    )


def _check(asked: Asked, layout: Layout) -> str | None:
    """Check the shape as the library does, and return the words of its warning, if it warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SizeFlooredWarning)
        settled = check_shape(layout.format, asked.shape, asked.reading)
    refuse_layers(layout.shape, settled.shape[0] // layout.batch)
    return next((str(each.message) for each in caught if issubclass(each.category, SizeFlooredWarning)), None)
