"""Tells from the shape of a file's tensor how many images it holds, and the shape of each.

`read_shape` counts the images. What they are is for `fluxvae.latents.layout` to say, as at every other door.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fluxvae.batch.tensors import Lazy
from fluxvae.claims import MAX_PIXELS
from fluxvae.errors import InvalidLatentsError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.layout import possible_layouts, read_layout
from fluxvae.latents.reading import UNSAID, Reading

__all__ = ["Expected", "Images", "read_shape"]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a job takes its inputs for."""

    format: LatentFormat
    """The format of the checkpoint."""
    reading: Reading = UNSAID
    """What the job itself says about all its inputs, which counts instead of what the files say."""
    max_pixels: int = MAX_PIXELS
    """The most pixels that one image may have."""


class Images(NamedTuple):
    """The images that a tensor of latents holds."""

    rows: int
    """How many there are."""
    shape: tuple[int, ...]
    """The shape of each with a batch axis of 1: (1, N, 4C), (1, C, lh, lw), or for FLUX.2 also (1, 4C, gh, gw)."""

    def row(self, tensor: Lazy, row: int) -> torch.Tensor:
        """Return one image of ``tensor``, in `shape`. The others are not read."""
        return (tensor.whole() if self.rows == 1 else tensor.rows(row)).reshape(self.shape)


def read_shape(
    format: LatentFormat,
    shape: tuple[int, ...],
    height: object = None,
    width: object = None,
    *,
    ids: bool = False,
    one: bool = False,
) -> Images:
    """Return the images in a tensor of this shape, understood as `read_layout` does.

    Whether each row has the size that was said is checked later, row by row, so that one row's mistake does not cost
    the others.

    Args:
        shape: as for `read_layout`.
        height, width: the size in pixels, as far as it is known. What is no whole number counts as unknown.
        ids: whether position ids come with the tensor, which means that it is packed.
        one: whether it is one image without a batch axis, (C, h, w) or (C, 1, h, w), whatever its shape could also be.

    Raises:
        InvalidLatentsError: this checkpoint's latents do not have such a shape, there are no values, it is a video, or
            layers, or the shape has two layouts and nothing decides.
    """
    if not shape or 0 in shape:
        raise InvalidLatentsError(f"latents: got shape {shape}, which holds no values; expected at least one of each")
    if one and len(shape) in (3, 4):
        shape = (1, *shape)
    ambiguous = len(possible_layouts(shape, (format,))) > 1
    size = [value if ambiguous and _whole(value) else None for value in (height, width)]
    layout = read_layout(shape, (format,), *size, with_ids=ids)
    if len(shape) == 5 and shape[2] != 1:
        raise InvalidLatentsError(
            f"latents: got shape {shape}, {shape[2]} layers of each image; a job makes one picture of each row: keep "
            f"each layer as latents of its own, (batch, {shape[1]}, 1, {shape[3]}, {shape[4]})"
        )
    return Images(layout.batch, (1, *layout.shape[1:]))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
