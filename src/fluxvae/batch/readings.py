"""Shapes of files to images: how many there are in a tensor, and what each of them is.

`read_shape` decides by a checkpoint's channels, and by height and width where a shape alone has two readings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fluxvae.batch.tensors import Lazy
from fluxvae.claims import MAX_PIXELS
from fluxvae.errors import InvalidLatentsError
from fluxvae.latents import LatentFormat

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
    alone: bool
    """It is one image without a batch axis."""

    def row(self, tensor: Lazy, row: int) -> torch.Tensor:
        """One image of ``tensor``, of ``shape``; the others are not read."""
        return (tensor.whole() if self.alone else tensor.rows(row)).reshape(self.shape)


def read_shape(
    format: LatentFormat,
    shape: tuple[int, ...],
    height: object = None,
    width: object = None,
    *,
    ids: bool = False,
    one: bool = False,
) -> Reading:
    """How a tensor of this shape is read.

    Args:
        shape: (B, N, 4C), (B, C, lh, lw) or (B, C, 1, lh, lw); without its batch axis (N, 4C) or (C, lh, lw), where
            that cannot be mistaken. For C also 4C, of FLUX.2's patches.
        height, width: pixels, as far as they are known; whatever is no whole number is taken for unknown.
        ids: position ids come with it, so it is packed.
        one: it is one image without a batch axis, (C, lh, lw) or (C, 1, lh, lw).

    Raises:
        InvalidLatentsError: no shape of latents, no values, a video, or one with two readings that nothing decides.
    """
    if not shape or 0 in shape:
        raise InvalidLatentsError(f"latents: got shape {shape}, which holds no values; expected at least one of each")
    if one and len(shape) in (3, 4):
        return Reading(1, (1, *_frame(shape, 1, 4)), True)
    if len(shape) == 2:
        return Reading(1, (1, *shape), True)
    if len(shape) in (4, 5):
        return Reading(shape[0], (1, *_frame(shape, 2, 5)[1:]), False)
    if len(shape) != 3:
        raise InvalidLatentsError(
            f"latents: got shape {shape}, expected (batch, patches, features), (batch, channels, height/8, width/8), "
            "or (channels, height/8, width/8)"
        )
    packed, alone = Reading(shape[0], (1, *shape[1:]), False), Reading(1, (1, *shape), True)
    if ids or not _is_alone(format, shape):
        return packed
    if shape[2] != format.packed_features:
        return alone
    return _by_size(format, shape, height, width, packed, alone)


def _frame(shape: tuple[int, ...], at: int, rank: int) -> tuple[int, ...]:
    """``shape`` without its axis of frames, which it has at ``at`` if it has ``rank`` axes."""
    if len(shape) != rank:
        return shape
    if shape[at] != 1:
        raise InvalidLatentsError(
            f"latents: got shape {shape}, with {shape[at]} frames: a video; expected one image, so one frame: save "
            "each frame by itself, latents[:, :, i]"
        )
    return (*shape[:at], *shape[at + 1 :])


def _is_alone(format: LatentFormat, shape: tuple[int, ...]) -> bool:
    return shape[0] == format.channels or (format.flux2 and shape[0] == 4 * format.channels)


def _by_size(
    format: LatentFormat,
    shape: tuple[int, ...],
    height: object,
    width: object,
    packed: Reading,
    alone: Reading,
) -> Reading:
    """Which of two readings has this size."""
    scale = format.vae_scale_factor if shape[0] == format.channels else format.packed_multiple
    size = (shape[1] * scale, shape[2] * scale)
    if isinstance(height, int) and isinstance(width, int):
        fits_alone = (height, width) == size
        fits_packed = (height // format.packed_multiple) * (width // format.packed_multiple) == shape[1]
        if fits_alone != fits_packed:
            return alone if fits_alone else packed
        if not fits_alone:
            raise InvalidLatentsError(
                f"latents: got shape {shape} with height={height} and width={width}; expected {size[0]}x{size[1]}, if "
                f"it is one image (channels, rows, columns), or a size of {shape[1]} patches of "
                f"{format.packed_multiple} pixels each way, if it is {shape[0]} images in packed form"
            )
    raise InvalidLatentsError(
        f"latents: got shape {shape}, which may be one image of {size[0]}x{size[1]} pixels (channels, rows, columns) "
        f"or {shape[0]} packed images (batch, patches, features): pass --height and --width, or save it with its batch "
        "axis, latents.unsqueeze(0)"
    )
