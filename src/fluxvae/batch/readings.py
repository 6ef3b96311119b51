"""Shapes of files to images: how many there are in a tensor, and what each of them is.

`read_shape` counts the images; what they are is for `layout` to say, as at every other door.
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

__all__ = ["Expected", "Reading", "read_shape"]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a job takes its inputs for."""

    format: LatentFormat
    """Of the checkpoint."""
    height: int | None = None
    """Pixels, instead of the files' own."""
    width: int | None = None
    raw: bool | None = None
    """Instead of the files' own."""
    max_pixels: int = MAX_PIXELS
    """Of one image."""


class Reading(NamedTuple):
    """What a tensor of latents is."""

    rows: int
    """Images in it."""
    shape: tuple[int, ...]
    """Of each, with a batch axis of 1: (1, N, 4C), (1, C, lh, lw), or of FLUX.2 (1, 4C, gh, gw)."""

    def row(self, tensor: Lazy, row: int) -> torch.Tensor:
        """One image of ``tensor``, of ``shape``; the others are not read."""
        return (tensor.whole() if self.rows == 1 else tensor.rows(row)).reshape(self.shape)


def read_shape(
    format: LatentFormat,
    shape: tuple[int, ...],
    height: object = None,
    width: object = None,
    *,
    ids: bool = False,
    one: bool = False,
) -> Reading:
    """How a tensor of this shape is read: as `read_layout` has it, for all its rows.

    Whether each row has the size that was said is for the decoder to check, so that one row's mistake is not all rows'.

    Args:
        shape: as for `read_layout`.
        height, width: pixels, as far as they are known; whatever is no whole number is taken for unknown.
        ids: position ids come with it, so it is packed.
        one: it is one image without a batch axis, (C, h, w) or (C, 1, h, w), whatever its shape could also be.

    Raises:
        InvalidLatentsError: no shape of this checkpoint's latents, no values, a video, or a shape with two readings
            that nothing decides.
    """
    if not shape or 0 in shape:
        raise InvalidLatentsError(f"latents: got shape {shape}, which holds no values; expected at least one of each")
    if one and len(shape) in (3, 4):
        shape = (1, *shape)
    ambiguous = len(possible_layouts(shape, (format,))) > 1
    size = [value if ambiguous and _whole(value) else None for value in (height, width)]
    layout = read_layout(shape, (format,), *size, with_ids=ids)
    return Reading(layout.batch, (1, *layout.shape[1:]))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
