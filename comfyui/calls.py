"""What both VAEs of this pack do around a decode or an encode: shapes, the progress bar, and interruption."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch

from fluxvae.errors import DecodeCancelled, InvalidImagesError, InvalidLatentsError, InvalidOptionError

__all__ = ["cropped", "interruptible", "one_frame", "progress_bar", "refuse_options", "refuse_video"]

log = logging.getLogger(__name__)


def refuse_options(vae_options: dict[str, Any] | None) -> None:
    """Refuse options for a decode, which are for VAEs of other kinds, rather than ignore them.

    Raises:
        InvalidOptionError: there are any.
    """
    if vae_options:
        raise InvalidOptionError(
            f"vae_options: got {sorted(vae_options)}, which are for VAEs of other kinds; connect the VAE without the "
            "fluxvae node"
        )


def one_frame(samples: torch.Tensor) -> torch.Tensor:
    """Return samples (B, C, lh, lw); those of one frame, (B, C, 1, lh, lw), lose that dimension.

    Raises:
        InvalidLatentsError: they have another shape, such as that of a video, or of Qwen-Image-Layered's layers, which
            ComfyUI's own VAE decodes as a video too.
    """
    if samples.ndim == 5 and samples.shape[2] == 1:
        samples = samples[:, :, 0]
    if samples.ndim == 5 and 0 not in samples.shape:
        raise InvalidLatentsError(
            f"samples: got {tuple(samples.shape)}, {samples.shape[2]} frames; expected one frame. For a video, connect "
            "the VAE without the fluxvae node. For the layers of a picture, put the node LatentCutToBatch before, with "
            "dim t and slice_size 1"
        )
    if samples.ndim != 4 or 0 in samples.shape:
        raise InvalidLatentsError(
            f"samples: got {tuple(samples.shape)}, expected (batch, channels, height, width) of one frame"
        )
    return samples


def refuse_video(pixels: torch.Tensor) -> None:
    """Refuse several pictures for a VAE with an axis of time: to ComfyUI's own they are the frames of one video.

    That one, given 2 to 4 pictures, encodes the first alone.

    Args:
        pixels: (B, H, W, C).

    Raises:
        InvalidImagesError: there are several.
    """
    if len(pixels) > 1:
        raise InvalidImagesError(
            f"pixels: got {len(pixels)} pictures, which are the frames of a video to this VAE; expected one: encode "
            "them one by one, or connect the VAE without the fluxvae node"
        )


def cropped(pixels: torch.Tensor, multiple: int, channels: int) -> torch.Tensor:
    """Return the middle of pixels (B, H, W, C), with sides that are multiples of ``multiple``, as ComfyUI does.

    A warning is logged where anything is left out. The result has ``channels`` channels, 3 or 4. Where the fourth is
    missing, it is 1, opaque, as in ComfyUI (``pad_channel_value`` of its `VAE`).

    Raises:
        InvalidImagesError: they have another shape, or nothing would be left.
    """
    if pixels.ndim != 4 or pixels.shape[-1] < 3:
        raise InvalidImagesError(f"pixels: got {tuple(pixels.shape)}, expected (batch, height, width, {channels})")
    height, width = pixels.shape[1] // multiple * multiple, pixels.shape[2] // multiple * multiple
    if 0 in (height, width, len(pixels)):
        raise InvalidImagesError(
            f"pixels: got {tuple(pixels.shape)}; expected at least one picture of {multiple} pixels each way"
        )
    if (height, width) != tuple(pixels.shape[1:3]):
        log.warning(
            "fluxvae: pixels: got %dx%d (width x height), not multiples of %d; the middle, %dx%d, is encoded, "
            "as by ComfyUI's own VAE", pixels.shape[2], pixels.shape[1], multiple, width, height,
        )  # fmt: skip
    if pixels.shape[-1] > channels:
        log.warning("fluxvae: pixels: got %d channels; those after %d are left out", pixels.shape[-1], channels)
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    middle = pixels[:, top : top + height, left : left + width, :channels]
    return torch.nn.functional.pad(middle, (0, channels - middle.shape[-1]), value=1.0)


def progress_bar(count: int = 1) -> Callable[[int, int, int], None]:
    """Return what moves the running node's progress bar.

    Args:
        count: how many calls of equal length it is for.

    Returns:
        A function of the call's number, its steps done, and its steps.
    """
    bars: list[Any] = []

    def move(index: int, done: int, total: int) -> None:
        if not bars:
            bars.append(comfy.utils.ProgressBar(count * total))
        bars[0].update_absolute(index * total + done, count * total)

    return move


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield what says whether the user has interrupted. Work that stops for it ends in ComfyUI's own exception."""
    try:
        yield management.processing_interrupted
    except DecodeCancelled:
        management.throw_exception_if_processing_interrupted()
        raise
