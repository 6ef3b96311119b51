"""Reads the pictures of a request: a file as it is, or a tensor as the values that the model takes.

Nothing here uses PyTorch. The arithmetic has the bits of diffusers' ``VaeImageProcessor.normalize``, computed by
PyTorch in the tensor's own dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluxvae.arrays import nearest_pixels
from fluxvae.errors import InvalidImagesError
from fluxvae.serve.gateway.body import as_float32
from fluxvae.serve.gateway.remote_encode import Asked, Tensor

__all__ = ["Pictures", "read_pictures", "wrong_length"]

_BLOCK = 2**20
"""How many values are brought to [-1, 1] at a time, so that the temporaries stay small."""


class Pictures(NamedTuple):
    """Pictures as the Triton model takes them."""

    inputs: dict[str, NDArray[Any]]
    """The one input that holds them, by its name."""
    parameters: dict[str, Any]
    """The parameters of the request to the model."""
    warning: str | None
    """Tells the client how its values were read, where it did not say it."""


def read_pictures(asked: Asked, body: bytearray | bytes) -> Pictures:
    """Return the pictures in the body of a request.

    Args:
        asked: what `parse` returned.
        body: a picture file; or the values of a tensor, raw and little-endian. Those of float32 are changed in place.

    Raises:
        InvalidImagesError: the number of bytes is wrong, or values are not finite or beyond their range.
    """
    tensor = asked.tensor
    if tensor is None:
        if not body:
            raise InvalidImagesError("body: got no bytes, expected a picture file: PNG, JPEG, WebP or another")
        return Pictures({"images_encoded": np.array([[bytes(body)]], dtype=np.object_)}, asked.parameters, None)
    if len(body) != tensor.nbytes:
        raise wrong_length(f"{len(body)} bytes", tensor)
    if tensor.dtype == "uint8":
        pixels = np.frombuffer(body, np.uint8).reshape(tensor.batch, *tensor.shape[-3:])
        last = pixels if tensor.channels_last else np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        return Pictures({"images": last}, asked.parameters, None)
    values = as_float32(body, tensor.dtype)
    warning = _to_minus_one(values, tensor)
    images = values.reshape(tensor.batch, *tensor.shape[-3:])
    if tensor.fitted != tensor.shape[-2:]:  # the model takes such values as the VAE does, and resizes none
        rows, columns = (nearest_pixels(*sides) for sides in zip(tensor.shape[-2:], tensor.fitted, strict=True))
        images = images[:, :, rows[:, None], columns]
    kept = {name: value for name, value in asked.parameters.items() if name != "resize"}
    return Pictures({"images_raw": images}, kept, warning)


def wrong_length(came: str, tensor: Tensor) -> InvalidImagesError:
    """Return the error that refuses a body which does not hold what the query says."""
    return InvalidImagesError(
        f"body: got {came}, expected {tensor.nbytes}: shape {tensor.shape} of {tensor.dtype}, raw and little-endian"
    )


def _to_minus_one(values: NDArray[np.float32], tensor: Tensor) -> str | None:
    """Check values and bring them to [-1, 1], in place. Return the warning for a client that did not say their range.

    Raises:
        InvalidImagesError: a value is not finite, or beyond its range.
    """
    low, high = float(values.min()), float(values.max())  # NaN where one is among them
    normalize = tensor.do_normalize if tensor.do_normalize is not None else not low < 0
    if not (low >= (0 if normalize else -1) and high <= 1):
        raise _beyond(values, tensor, normalize)
    if not normalize:
        return None
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK]
        np.multiply(block, 2, out=block)
        np.subtract(block, 1, out=block)
        if tensor.dtype != "float32":
            block[...] = _rounded(block, tensor.dtype)
    if tensor.do_normalize:
        return None
    return (
        "do_normalize was left out, and no value is negative: they were read as in [0, 1] and brought to [-1, 1]; "
        "do_normalize=True or do_normalize=False says it for certain"
    )


def _beyond(values: NDArray[np.float32], tensor: Tensor, normalize: bool) -> InvalidImagesError:
    """Return the error for values that are not finite, or beyond their range: it names the first."""
    finite = np.isfinite(values)
    bad = ~finite if not finite.all() else (values < (0 if normalize else -1)) | (values > 1)
    first = int(bad.argmax())
    where = [int(index) for index in np.unravel_index(first, tensor.shape)]
    got = f"images: got {values[first]:g} at index {where} ({int(bad.sum())} of {values.size} values are "
    if not finite.all():
        return InvalidImagesError(f"{got}NaN or Inf); expected finite values")
    how = f"do_normalize={tensor.do_normalize}"
    if tensor.do_normalize is None:
        how = "do_normalize left out and " + ("no value negative" if normalize else "a value negative")
    return InvalidImagesError(
        f"{got}beyond the range); expected floats in [{0 if normalize else -1}, 1], with {how}; those in [0, 255] are "
        "brought to [0, 1] by images / 255, or sent as uint8"
    )


def _rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Round finite values to what a 16-bit dtype can hold, ties to even, as PyTorch does after it has computed."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)
