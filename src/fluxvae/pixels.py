"""Turns PIL images, arrays and tensors into the pixels that a VAE encodes: (B, C, H, W) in [-1, 1].

C is 3 for most VAEs, and 4 for one whose pictures are RGBA. The latter takes four channels as they are, without
premultiplying colours by alpha, and three as opaque, like diffusers' pipelines (``image.convert("RGBA")``).

`check_images` says what is wrong with images before any work; `to_pixels` converts them. Both take what diffusers'
``VaeImageProcessor.preprocess`` takes, and the values have its bits, with one exception: by its default settings it
believes that a tensor of four channels is latents, and leaves it in [0, 1]. What it would take and quietly change is
refused: transparency that the VAE has no channel for, 16-bit and CMYK pictures, and sizes that do not fit (unless
``resize`` is asked for). `check_pixels` is for tensors that are in [-1, 1] already.

PyTorch is imported only where there are tensors, because a client of pictures and arrays checks them here too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fluxvae.arrays import is_tensor, nearest_sizes
from fluxvae.errors import InvalidImagesError, InvalidOptionError

if TYPE_CHECKING:
    import torch

__all__ = ["Images", "check_images", "check_pixels", "to_pixels"]

_SAME = ("RGB", "L", "1", "P")
"""The modes of PIL that become RGB without any loss or choice."""
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_BAND_VALUES = 1 << 20
"""How many values are converted at a time, so that the temporaries take a few MB whatever the size."""


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one size that can be encoded. `check_images` and `check_pixels` make one."""

    values: Any
    """The images one after the other: PIL images, arrays (H, W, n) of uint8 or floats, or tensors (n, H, W) of floats.
    Floats are in [0, 1] unless they are `normalized`. n is 3, or 4 with alpha, and images of mode RGBA have alpha."""
    height: int
    """The height in pixels that they are encoded at; ``width`` likewise."""
    width: int
    resized: bool = False
    """Whether they have another size now, and are to be resized to that one."""
    channels_last: bool = True
    """Whether their pixels are to lie channels last, as those of pictures and arrays do in the pipelines."""
    normalized: bool = False
    """Whether they are in [-1, 1] already."""
    channels: int = 3
    """The channels of the pixels that they become: 3 or 4. Images of fewer get an opaque alpha."""

    @classmethod
    def together(cls, several: Sequence[Images]) -> Images:
        """Join images that have the same `key` into one value, in which they come one after the other."""
        return replace(several[0], values=[value for images in several for value in images.values])

    @property
    def key(self) -> tuple[object, ...]:
        """What images must have in common to be encoded together."""
        return (self.height, self.width, self.resized, self.channels_last, self.normalized)

    @property
    def batch(self) -> int:
        """The number of images."""
        return len(self.values)

    @property
    def pixels(self) -> int:
        """The pixels of all images together, at the size that they are encoded at."""
        return self.batch * self.height * self.width


def check_images(images: Any, multiple: int, channels: int | None, *, resize: bool = False) -> Images:
    """Check images, whatever they come as.

    Args:
        images: a PIL image or a list of them; an array (B, H, W, 3) or (H, W, 3), uint8 or floats in [0, 1]; a tensor
            (B, 3, H, W) or (3, H, W) of floats in [0, 1]. All have one size. Where ``channels`` is not 3, arrays and
            tensors may have 4 channels, and pictures may be transparent.
        multiple: height and width must be multiples of this many pixels.
        channels: those that the VAE takes, 3 or 4. None: that is not known here, so transparency is kept where there is
            any.
        resize: make other sizes fit by resizing them to the multiples below, as ``VaeImageProcessor.preprocess`` does:
            PIL images by Lanczos' filter, arrays and tensors by the nearest pixel.

    Raises:
        InvalidImagesError: the class, the shape, the mode, a value or the size is wrong.
        InvalidOptionError: ``resize`` is no bool.
    """
    if not isinstance(resize, bool):
        raise InvalidOptionError(f"resize: got {resize!r}, expected True or False")
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)):
        values: Any = [_plain(index, image, channels) for index, image in enumerate(images)]
        if not values:
            raise InvalidImagesError("images: got an empty list, expected at least one picture")
        sizes = [(image.height, image.width) for image in values]
        odd = next((index for index, size in enumerate(sizes) if size != sizes[0]), None)
        if odd is not None:
            raise InvalidImagesError(
                f"images: got {_by(sizes[0])} for picture 0 and {_by(sizes[odd])} for picture {odd}; those that are "
                "encoded together have one size: encode them one by one, or resize them first"
            )
        height, width = sizes[0]
        given = 4 if any(image.mode == "RGBA" for image in values) else 3
    elif is_tensor(images):
        values, (height, width), given = _checked(images, "tensor", 1, channels)
    elif isinstance(images, np.ndarray):
        values, (height, width), given = _checked(images, "array", 3, channels)
    else:
        raise InvalidImagesError(
            f"images: got {type(images).__name__}, expected a PIL image, a list of them, an array (batch, height, "
            "width, 3) or a tensor (batch, 3, height, width)"
        )
    last = not is_tensor(values) or _channels_last(values)
    fitting = (height // multiple * multiple, width // multiple * multiple)
    kept: dict[str, Any] = {"channels_last": last, "channels": channels or given}
    if fitting == (height, width):
        return Images(values, height, width, **kept)
    if min(fitting) < multiple or not resize:
        raise _does_not_fit(height, width, multiple, resizable=True)
    return Images(values, *fitting, resized=True, **kept)


def check_pixels(pixels: torch.Tensor, multiple: int, channels: int | None) -> Images:
    """Check a tensor (B, 3, H, W) of floats in [-1, 1], what a VAE encodes, as `check_images` checks images.

    Args:
        multiple, channels: as for `check_images`.

    Raises:
        InvalidImagesError: the shape, the dtype, a value or the size is wrong.
    """
    shape = tuple(pixels.shape)
    if pixels.ndim != 4 or shape[1] not in _taken(channels) or 0 in shape or not pixels.is_floating_point():
        raise InvalidImagesError(
            f"images: got a tensor of {pixels.dtype} {shape}, expected floats {_shape(1, channels)}"
        )
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -1 and high <= 1):  # also where one is NaN
        raise InvalidImagesError(f"images: got values from {low:g} to {high:g}, expected floats in [-1, 1]")
    height, width = shape[2:]
    if height % multiple or width % multiple:
        raise _does_not_fit(height, width, multiple, resizable=False)
    last = _channels_last(pixels)
    return Images(pixels, height, width, channels_last=last, normalized=True, channels=channels or shape[1])


def _does_not_fit(height: int, width: int, multiple: int, *, resizable: bool) -> InvalidImagesError:
    near = " or ".join(_by(size) for size in nearest_sizes(height, width, multiple))
    or_so = ", or pass resize=True" if resizable and min(height, width) >= multiple else ""
    return InvalidImagesError(
        f"images: got {_by((height, width))}, expected multiples of {multiple}: the nearest are {near}; crop or resize "
        f"the picture{or_so}"
    )


def _channels_last(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def to_pixels(images: Images, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Convert images to (B, C, H, W) in [-1, 1], in this dtype and on this device. C is ``images.channels``.

    They are brought to [-1, 1] in float32, or in their own dtype if they are tensors or arrays of floats, and then
    cast, as the pipelines do it. Memory: the result, and a few MB; where images are resized, each once more.

    What comes from pictures and arrays lies channels last, and what comes from tensors as they lie. So it does in the
    pipelines, and a convolution by PyTorch has other last bits for each.
    """
    import torch

    pixels = torch.empty(
        (images.batch, images.channels, images.height, images.width),
        dtype=dtype,
        device=device,
        memory_format=torch.channels_last if images.channels_last else torch.contiguous_format,
    )
    for index, value in enumerate(images.values):
        if images.resized:
            value = _resized(value, images)
        for rows, band in [(slice(None), value)] if images.normalized else _bands(value):
            pixels[index, : len(band), rows] = band if images.normalized else _processor().normalize(band)
            pixels[index, len(band) :, rows] = 1.0  # the alpha of images that have none: opaque
    return pixels


@functools.cache
def _processor() -> Any:
    # Importing diffusers takes seconds, and whoever only makes a plan does not need it.
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=1)


def _resized(value: Any, images: Images) -> Any:
    """One image in the size that fits, by ``VaeImageProcessor.resize``."""
    size = (images.height, images.width)
    if isinstance(value, Image.Image):
        return _processor().resize(value, *size)
    if is_tensor(value):
        return _processor().resize(value[None], *size)[0]
    if value.dtype == np.uint8:
        value = value.astype(np.float32) / 255.0
    return _processor().resize(value[None], *size)[0]


def _bands(image: Any) -> Iterator[tuple[slice, torch.Tensor]]:
    """Cut one image into bands of rows: each as a slice of rows, and its values (3 or 4, n, W) in [0, 1]."""
    if is_tensor(image):
        height, width = image.shape[1:]
    elif isinstance(image, np.ndarray):
        height, width = image.shape[:2]
    else:
        width, height = image.size
    step = max(1, _BAND_VALUES // (4 * width))
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        if is_tensor(image):
            yield rows, image[:, rows]
            continue
        band = image[rows] if isinstance(image, np.ndarray) else image.crop((0, rows.start, width, rows.stop))
        if isinstance(band, Image.Image):
            band = np.asarray(band.convert("RGBA" if band.mode == "RGBA" else "RGB"))
        if band.dtype == np.uint8:
            band = band.astype(np.float32) / 255.0
        yield rows, _processor().numpy_to_pt(band[None])[0]


def _plain(index: int, image: object, channels: int | None) -> Image.Image:
    """A PIL image that becomes RGB without a choice, or of mode RGBA where its alpha is kept; others are refused."""
    if not isinstance(image, Image.Image):
        raise InvalidImagesError(
            f"images: got {type(image).__name__} for picture {index}, expected PIL images; stack arrays, or tensors, "
            "into one"
        )
    if min(image.size) < 1:
        raise InvalidImagesError(f"images: got {_by(image.size[::-1])} for picture {index}, which has no pixels")
    if channels == 4 and image.mode in (*_SAME, *_ALPHA):
        return _with_alpha(image)
    if image.mode in _ALPHA or "transparency" in image.info:
        clear = _with_alpha(image)
        if clear.getchannel("A").getextrema() == (255, 255):
            return clear.convert("RGB")
        if channels is None:
            return clear
        raise InvalidImagesError(
            f"images: got mode {image.mode} for picture {index}, with transparent pixels; latents hold none: put the "
            "picture on a background first (fluxvae encode has --background)"
        )
    if image.mode not in _SAME:
        raise InvalidImagesError(
            f"images: got mode {image.mode} for picture {index}, expected RGB or 8-bit grey; whichever way its values "
            "are to become 8-bit RGB, convert it first: image.convert('RGB') would clip 16 bits, and knows no colour "
            "profile"
        )
    return image


def _with_alpha(image: Image.Image) -> Image.Image:
    """The image in mode RGBA, as ``convert("RGBA")`` makes it."""
    if image.mode == "La":  # which Pillow converts to LA only
        image = image.convert("LA")
    return image.convert("RGBA")


def _taken(channels: int | None) -> tuple[int, ...]:
    """How many channels images may have for a VAE of so many."""
    return (3,) if channels == 3 else (3, 4)


def _shape(axis: int, channels: int | None) -> str:
    """The shape that is expected, in words. ``axis``: the dimension of the channels."""
    those = " or ".join(map(str, _taken(channels)))
    return f"(batch, {those}, height, width)" if axis == 1 else f"(batch, height, width, {those})"


def _checked(images: Any, name: str, axis: int, channels: int | None) -> tuple[Any, tuple[int, int], int]:
    """An array or a tensor with its batch, its height and width, and its channels, which are the dimension ``axis``."""
    shape = tuple(images.shape)
    values = images[None] if len(shape) == 3 else images
    if values.ndim != 4 or values.shape[axis] not in _taken(channels) or 0 in shape:
        alpha = values.ndim == 4 and values.shape[axis] == 4
        raise InvalidImagesError(
            f"images: got a {name} of shape {shape}, expected {_shape(axis, channels)}"
            + ("; if the fourth is alpha, latents hold none: put the picture on a background first" if alpha else "")
        )
    size = (values.shape[2], values.shape[3]) if axis == 1 else (values.shape[1], values.shape[2])
    floats = values.is_floating_point() if axis == 1 else np.issubdtype(values.dtype, np.floating)
    if not floats and (axis == 1 or values.dtype != np.uint8):
        other = "floats in [0, 1]" if axis == 1 else "uint8, or floats in [0, 1]"
        raise InvalidImagesError(f"images: got a {name} of {values.dtype}, expected {other}")
    if floats:
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also where one is NaN
            raise InvalidImagesError(
                f"images: got values from {low:g} to {high:g}, expected floats in [0, 1]; those in [-1, 1] are brought "
                "there by images / 2 + 0.5, those in [0, 255] by images / 255"
            )
    return values, size, values.shape[axis]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"
