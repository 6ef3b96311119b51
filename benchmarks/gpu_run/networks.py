"""Small decoders with seeded weights, for the rehearsal and for compute-sanitizer."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2

__all__ = ["small_vae"]


def small_vae(widths: tuple[int, ...], dtype: torch.dtype, *, groups: int, model: str = "flux") -> Any:
    """A decoder of these widths, one resnet a block shallower than FLUX's, for latents of four channels."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": groups,
        "sample_size": 16,
    }
    if model == "flux2":
        vae: Any = AutoencoderKLFlux2(**shape)
    else:
        scale = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
        vae = AutoencoderKL(**shape, **scale, use_quant_conv=False, use_post_quant_conv=False)
    vae.encoder = vae.quant_conv = None
    return torch.nn.Module.to(vae, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
