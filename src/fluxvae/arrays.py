"""What is to be known of arrays, tensors and the sizes of pictures where neither PIL nor PyTorch is to be imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = ["is_tensor", "nearest_pixels", "nearest_sizes"]


def is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Return whether it is a tensor. PyTorch is not imported for that, because whoever has a tensor has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def nearest_sizes(height: int, width: int, multiple: int) -> list[tuple[int, int]]:
    """The sizes that fit, next below and next above, as (height, width); none below one multiple."""
    below = (height // multiple * multiple, width // multiple * multiple)
    above = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    return [size for size in (below, above) if min(size) >= multiple]


def nearest_pixels(given: int, wanted: int) -> NDArray[np.intp]:
    """Which of ``given`` rows or columns PyTorch's ``interpolate`` keeps where it makes ``wanted`` of them.

    Source: ATen's ``nearest_idx``, which computes them in float32.
    """
    scale = np.float32(given) / np.float32(wanted)
    kept: NDArray[np.intp] = np.minimum(np.arange(wanted, dtype=np.float32) * scale, given - 1).astype(np.intp)
    return kept
