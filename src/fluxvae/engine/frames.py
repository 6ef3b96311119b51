"""The axis of time that some VAEs' tensors have: a picture is one frame of it, and the engines know nothing of it.

The structure decides, not the class: such VAEs have convolutions with weights of five dimensions. Every engine takes
and gives (B, C, H, W). `ReferenceEngine` adds the axis for diffusers, and `fluxvae.install` removes it for an engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:
    import torch

    from fluxvae.engine.way import Way

__all__ = ["has_frames", "without_frame"]


def has_frames(vae: Any) -> bool:
    """Return whether the tensors that diffusers' VAE takes and gives are (B, C, F, H, W), with F frames."""
    return any(weight.ndim == 5 for weight in vae.parameters())


def without_frame(given: torch.Tensor, way: Way) -> torch.Tensor:
    """Return (B, C, 1, H, W) as (B, C, H, W).

    Raises:
        InvalidOptionError: there are not five dimensions, or not one frame. An engine computes pictures, and frames of
            a video depend on those before them.
    """
    if given.ndim != 5:
        raise InvalidOptionError(
            f"vae: got {way.given} of shape {tuple(given.shape)} to {way.name}; expected (batch, channels, frames, "
            "height, width), as this VAE takes them"
        )
    if given.shape[2] != 1:
        raise InvalidOptionError(
            f"vae: got {way.given} of shape {tuple(given.shape)} to {way.name}, a video of {given.shape[2]} frames; "
            "expected one frame, because fluxvae computes pictures: call remove() on the handle of fluxvae.install to "
            "let diffusers compute a video"
        )
    return given.squeeze(2)
