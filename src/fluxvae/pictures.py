"""Turns the VAE's output into what a caller asked for: PIL, NumPy, torch, uint8, or the bytes of an image file.

Pictures have as many channels as the VAE gives: three are RGB, and four are RGBA, whose alpha is not premultiplied.

``pil``, ``np`` and ``pt`` are made by diffusers' own ``VaeImageProcessor.postprocess``, so that they have its bits;
``uint8`` holds the same bytes as ``pil``.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from fluxvae.errors import InvalidOptionError

__all__ = [
    "FORMATS",
    "OUTPUT_TYPES",
    "OutputType",
    "check_format",
    "check_output_type",
    "encode",
    "postprocess",
    "postprocess_bytes",
]

OutputType = Literal["pil", "np", "pt", "uint8"]
OUTPUT_TYPES: tuple[str, ...] = ("pil", "np", "pt", "uint8")

FORMATS = ("png", "jpeg", "webp")
_WITH_ALPHA = ("png", "webp")
"""The formats that have a place for alpha."""
_PNG_LEVEL = 4
"""The level of zlib's compression. At 512x512 it takes 28 ms and makes 383 KB, where zlib's default of 6 takes 62 ms
and saves 1.3 %."""
_DEFAULT_QUALITY = {"jpeg": 95, "webp": 95}

_BAND_VALUES = 1 << 20
"""How many values are post-processed at a time, so that the temporaries take a few MB whatever the image's size."""


@functools.cache
def _processor() -> Any:
    # Importing diffusers takes seconds, and whoever only makes a plan does not need it.
    from diffusers.image_processor import VaeImageProcessor

    # FluxPipeline passes twice its vae_scale_factor here. Only preprocess uses it, postprocess does not.
    return VaeImageProcessor(vae_scale_factor=16)


def check_output_type(output_type: object) -> None:
    """Raise `InvalidOptionError` unless ``output_type`` is one of `OUTPUT_TYPES`."""
    if output_type not in OUTPUT_TYPES:
        raise InvalidOptionError(f"output_type: got {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")


def postprocess(image: torch.Tensor, output_type: OutputType = "pil") -> Any:
    """Turn a decoded batch into ``output_type``.

    Args:
        image: (B, C, H, W), any float dtype, nominally in [-1, 1], not clamped. C is 3 for RGB and 4 for RGBA.
        output_type: see below.

    Returns:
        - ``"pil"``: a list of B ``PIL.Image.Image`` of mode RGB or RGBA;
        - ``"np"``: (B, H, W, C) float32 in [0, 1];
        - ``"pt"``: (B, C, H, W) in [0, 1], in the dtype and on the device of ``image``;
        - ``"uint8"``: (B, H, W, C) uint8 ``numpy.ndarray``, the bytes of ``"pil"``.

    Raises:
        InvalidOptionError: the output type is unknown.

    Memory: see `postprocess_bytes`. Bands of rows are processed one after another to bound it; every step is
    elementwise, so the bits are the same as for the image as a whole.
    """
    check_output_type(output_type)
    batch, channels, height, width = image.shape
    if output_type == "pt":
        tensor = torch.empty_like(image)
        for one, rows in _bands(image):
            tensor[one, :, rows] = _processor().postprocess(image[one : one + 1, :, rows], output_type="pt")[0]
        return tensor
    if output_type == "pil":
        return [Image.fromarray(postprocess(one[None], "uint8")[0]) for one in image]
    dtype = np.float32 if output_type == "np" else np.uint8
    array = np.empty((batch, height, width, channels), dtype)
    if dtype is np.uint8 and image.device.type != "cpu":
        for one, rows in _bands(image):
            array[one, rows] = _as_bytes(image[one, :, rows]).permute(1, 2, 0).cpu().numpy()
        return array
    for one, rows in _bands(image):
        band = _processor().postprocess(
            image[one : one + 1, :, rows], output_type="np" if dtype is np.float32 else "pil"
        )
        array[one, rows] = band[0]
    return array


def _as_bytes(image: torch.Tensor) -> torch.Tensor:
    """Round a (C, H, W) image to uint8 on its own device, exactly as VaeImageProcessor does on the CPU.

    So one byte of each value leaves a GPU instead of four. VaeImageProcessor halves and clamps in the image's dtype,
    multiplies by 255 in float32 and rounds half to even (``numpy.round``); the same is done here, step by step.
    """
    return ((image * 0.5 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)


def postprocess_bytes(
    output_type: OutputType, batch: int, height: int, width: int, itemsize: int, channels: int
) -> int:
    """Return how many bytes `postprocess` adds to memory at its peak, its result included.

    With a GPU this is host memory, except for ``"pt"`` and for the temporaries of uint8 and PIL images.

    Args:
        itemsize: the bytes of one value of the VAE's dtype.
        channels: those of the pictures, 3 or 4.
    """
    pixels = height * width
    band = min(_BAND_VALUES, channels * pixels) * 20  # the float32 temporaries of one band
    values = {"pt": channels * itemsize, "np": 4 * channels, "uint8": channels, "pil": 4}  # PIL keeps RGB in 4 bytes
    one_more = channels * pixels if output_type == "pil" else 0
    return batch * values[output_type] * pixels + one_more + band


def _bands(image: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield every image of the batch, cut into bands of rows, as the image's index and a slice of rows."""
    batch, channels, height, width = image.shape
    step = max(1, _BAND_VALUES // (channels * width))
    for one in range(batch):
        for start in range(0, height, step):
            yield one, slice(start, min(start + step, height))


def check_format(format: object, quality: object = None, *, channels: int = 3) -> None:
    """Raise `InvalidOptionError` unless `encode` takes this format and this quality for pictures of these channels."""
    if format not in FORMATS:
        raise InvalidOptionError(f"format: got {format!r}, expected one of {', '.join(FORMATS)}")
    if channels == 4 and format not in _WITH_ALPHA:
        fitting = " or ".join(map(repr, _WITH_ALPHA))
        raise InvalidOptionError(f"format: got {format!r} for pictures with alpha; expected {fitting}")
    if quality is None:
        return
    if format == "png":
        raise InvalidOptionError(f"quality: got {quality!r} with format png, which is lossless; leave quality out")
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise InvalidOptionError(f"quality: got {quality!r}, expected a whole number from 1 to 100")


def encode(
    pixels: NDArray[np.uint8],
    format: str = "png",
    quality: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Encode one picture as an image file.

    Args:
        pixels: the picture, (H, W, 3) uint8 in RGB or (H, W, 4) in RGBA.
        format: ``"png"`` (lossless), ``"jpeg"`` (refused for RGBA) or ``"webp"`` (whose alpha is lossless).
        quality: from 1 to 100, for jpeg and webp only; 95 where it is left out.
        metadata: texts to keep in the file by their names. In a PNG each becomes a text chunk; in JPEG and WebP they
            become one JSON object, which is EXIF's ImageDescription.

    Returns:
        The bytes of the file.

    Raises:
        InvalidOptionError: the format is unknown, or has no place for alpha; the quality is out of range, or given for
            png.
    """
    check_format(format, quality, channels=pixels.shape[2])
    options: dict[str, Any] = {}
    if format == "png":
        options["compress_level"] = _PNG_LEVEL
    else:
        options["quality"] = _DEFAULT_QUALITY[format] if quality is None else quality
    if format == "webp":
        options["exact"] = True  # otherwise the colours of fully transparent pixels are replaced
    if metadata:
        options |= _metadata_options(format, metadata)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return buffer.getvalue()


def _metadata_options(format: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if format == "png":
        chunks = PngInfo()
        for name, value in metadata.items():
            chunks.add_itxt(name, value)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(dict(metadata))
    return {"exif": exif}
