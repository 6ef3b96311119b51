"""What becomes of a picture's size before it is encoded: it fits, is resized, is cropped, or goes into a bucket.

Pure functions. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fluxvae.arrays import nearest_sizes
from fluxvae.errors import InvalidImagesError

__all__ = ["Buckets", "Fit", "bucket_sizes", "fit", "fitted"]

_SMALLEST, _LARGEST = 256, 2048
"""The shortest and the longest side of a bucket: sd-scripts' ``min_bucket_reso``, and the ``max_bucket_reso`` that its
documentation gives for SDXL and FLUX."""


@dataclass(frozen=True)
class Buckets:
    """Sizes that trainers sort pictures into by their aspect ratio."""

    step: int
    """Every side is a multiple of this many pixels."""
    area: int
    """The most pixels of a bucket."""


class Fit(NamedTuple):
    """How a picture is made to fit: it is resized to one size, and the middle of that is kept."""

    resized: tuple[int, int]
    size: tuple[int, int]
    """The size that is encoded: no side is longer than that of ``resized``."""


def fitted(picture: Image.Image, wanted: Fit) -> NDArray[np.uint8]:
    """Make a picture in RGB or RGBA fit: (height, width, 3 or 4) uint8. It is resized by Lanczos' filter, as by
    diffusers. Pillow weights colours by their alpha meanwhile, so that those of transparent pixels do not bleed.
    """
    height, width = wanted.resized
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - wanted.size[0]) // 2, (width - wanted.size[1]) // 2
    return np.asarray(picture.crop((left, top, left + wanted.size[1], top + wanted.size[0])))


def fit(size: tuple[int, int], multiple: int, how: str, buckets: Buckets | None) -> Fit:
    """Decide what a picture of this size is made to.

    Args:
        multiple: height and width must be multiples of this many pixels.
        how: ``"refuse"``, ``"resize"`` (to the multiples below, without keeping the aspect ratio, as diffusers'
            ``VaeImageProcessor`` does), ``"crop"`` (the middle is kept) or ``"buckets"``.
        buckets: for ``"buckets"``.

    Raises:
        InvalidImagesError: it does not fit, and cannot be made to in this way.
    """
    height, width = size
    below = (height // multiple * multiple, width // multiple * multiple)
    if how == "buckets":
        assert buckets is not None
        return _bucket(size, buckets)
    if below == size:
        return Fit(size, size)
    if how == "refuse" or min(below) < multiple:
        near = " or ".join(f"{h}x{w}" for h, w in nearest_sizes(height, width, multiple))
        advice = "--crop, --resize or --buckets make pictures fit" if min(below) >= multiple else "it is too small"
        raise InvalidImagesError(
            f"size: got {height}x{width} (height x width), expected multiples of {multiple}: the nearest are {near}; "
            f"{advice}"
        )
    return Fit(below if how == "resize" else size, below)


def bucket_sizes(buckets: Buckets) -> list[tuple[int, int]]:
    """Every bucket, as (height, width), in the order of sd-scripts: ``library/model_util.py``, make_bucket_resolutions.

    For each multiple of the step as one side, the other is the longest that the area has room for.
    """
    step, area = buckets.step, buckets.area
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)} if square else set()
    smallest = -(-min(_SMALLEST, max(square, step)) // step) * step
    for side in range(smallest, _LARGEST + 1, step):
        other = min(_LARGEST, int((area // side) // step) * step)
        if other >= smallest:
            sizes |= {(side, other), (other, side)}
    return [(height, width) for width, height in sorted((width, height) for height, width in sizes)]


def _bucket(size: tuple[int, int], buckets: Buckets) -> Fit:
    """The bucket whose aspect ratio is nearest, and the size that covers it: sd-scripts' ``select_bucket``."""
    height, width = size
    sizes, ratio = bucket_sizes(buckets), width / height
    if size in sizes:
        return Fit(size, size)
    chosen = min(sizes, key=lambda one: abs(one[1] / one[0] - ratio))  # the first of equals, as numpy's argmin
    scale = chosen[0] / height if ratio > chosen[1] / chosen[0] else chosen[1] / width
    return Fit((int(height * scale + 0.5), int(width * scale + 0.5)), chosen)
