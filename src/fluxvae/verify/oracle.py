"""The oracle: what every result is checked against. It is the end of diffusers' ``FluxPipeline.__call__``.

diffusers' own functions run it. The demo, the tests and the benchmarks compare with it; decoding itself never uses it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray

__all__ = ["LevelDifference", "flux_pipeline_tail", "flux_pipeline_tail_raw", "level_difference"]


class LevelDifference(NamedTuple):
    """How two uint8 pictures differ."""

    largest: int
    """The largest difference of two values, in the 256 levels of a byte."""
    changed: float
    """The share of values that differ at all, from 0 to 1."""

    def __str__(self) -> str:
        return f"{self.changed:.4%} of bytes differ, by {self.largest}"


def flux_pipeline_tail(
    vae: AutoencoderKL, packed: torch.Tensor, height: int, width: int, output_type: str = "pt"
) -> Any:
    """Decode packed latents as FluxPipeline does when its transformer is done.

    Args:
        vae: FLUX.1's VAE in any dtype, on the device of ``packed``.
        packed: packed latents (B, gh*gw, 64) in the VAE's dtype.
        height, width: the size of the image in pixels.
        output_type: ``"pil"``, ``"np"`` or ``"pt"``.

    Source: diffusers 0.42.1, ``pipeline_flux.py``, the branch after the denoising loop.
    """
    image = flux_pipeline_tail_raw(vae, packed, height, width)
    return VaeImageProcessor(vae_scale_factor=16).postprocess(image, output_type=output_type)


@torch.no_grad()
def flux_pipeline_tail_raw(vae: AutoencoderKL, packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Do what `flux_pipeline_tail` does, up to post-processing: return (B, 3, H, W), nominally in [-1, 1]."""
    latents = FluxPipeline._unpack_latents(packed, height, width, 8)
    latents = (latents / vae.config.scaling_factor) + vae.config.shift_factor
    image: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return image


def level_difference(ours: NDArray[np.uint8], expected: NDArray[np.uint8]) -> LevelDifference:
    """Compare two uint8 arrays of the same shape."""
    difference = np.abs(ours.astype(np.int16) - expected)
    return LevelDifference(int(difference.max()), float((difference > 0).mean()))
