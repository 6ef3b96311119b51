"""Writes files of weights as other programs do (BFL's names, old names, 8-bit floats), and files without weights."""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan

__all__ = ["bfl_state_dict", "flux2_bfl_state_dict", "old_names", "sd_vae", "to_fp8", "wan_state_dict"]


def bfl_state_dict(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """``vae``'s weights under BFL's key names, written from BFL's module layout (``modules/autoencoder.py``)."""
    levels = len(vae.config.block_out_channels)
    rules = [
        (r"\.resnets\.(\d+)\.conv_shortcut\.", r".block.\1.nin_shortcut."),
        (r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
        (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
        (r"mid_block\.attentions\.0\.to_(q|k|v)\.", r"mid.attn_1.\1."),
        (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
        (r"\.resnets\.(\d+)\.", r".block.\1."),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample."),
        (r"down_blocks\.(\d+)\.", r"down.\1."),
        (r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}."),
        (r"conv_norm_out\.", "norm_out."),
    ]
    result = {}
    for key, tensor in vae.state_dict().items():
        linear = "attentions.0.to_" in key and key.endswith("weight")
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[key] = (tensor[:, :, None, None] if linear else tensor).contiguous().clone()
    return result


def flux2_bfl_state_dict(vae: AutoencoderKLFlux2) -> dict[str, torch.Tensor]:
    """As `bfl_state_dict`; BFL's FLUX.2 has its quantisation convolutions inside encoder and decoder."""
    inside = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}
    result = {}
    for key, tensor in bfl_state_dict(vae).items():
        start = next((start for start in inside if key.startswith(start)), "")
        result[inside.get(start, "") + key.removeprefix(start)] = tensor
    return result


def wan_state_dict(vae: AutoencoderKLQwenImage | AutoencoderKLWan) -> dict[str, torch.Tensor]:
    """``vae``'s weights under Wan's key names, written from Wan's module layout (``wan/modules/vae.py``).

    Its stacks are lists of layers: a residual block is RMS norm, SiLU, convolution, RMS norm, SiLU, dropout,
    convolution, and a decoder's level is its residual blocks and then the resampling.
    """
    layers = vae.config.num_res_blocks + 2
    rules = [
        (r"^quant_conv\.", "conv1."),
        (r"^post_quant_conv\.", "conv2."),
        (r"\.conv_in\.", ".conv1."),
        (r"\.norm_out\.", ".head.0."),
        (r"\.conv_out\.", ".head.2."),
        (r"\.norm1\.", ".residual.0."),
        (r"(_blocks\.\d+|resnets\.\d+)\.conv1\.", r"\1.residual.2."),
        (r"\.norm2\.", ".residual.3."),
        (r"\.conv2\.", ".residual.6."),
        (r"\.conv_shortcut\.", ".shortcut."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.(\d)\.", lambda m: f".middle.{2 * int(m[1])}."),
        (r"\.down_blocks\.", ".downsamples."),
        (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f".upsamples.{int(m[1]) * layers + int(m[2])}."),
        (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f".upsamples.{int(m[1]) * layers + layers - 1}."),
    ]
    result = {}
    for key, tensor in vae.state_dict().items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[key] = tensor.clone()
    return result


def old_names(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """``vae``'s weights as diffusers named them before its attention was rewritten."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    result = {}
    for key, tensor in vae.state_dict().items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        result[key] = tensor.clone()
    return result


def sd_vae(
    seed: int = 0, *, widths: tuple[int, ...] = (32, 32, 32, 32), scaling_factor: float = 0.18215
) -> AutoencoderKL:
    """SD's and SDXL's VAE, narrow: 4 latent channels and quantisation convolutions."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        latent_channels=4,
        scaling_factor=scaling_factor,
    )
    return vae.eval().requires_grad_(False)


def to_fp8(
    weights: dict[str, torch.Tensor],
    scale_name: str | None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    by_channel: bool = False,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of two or more dimensions in 8 bits, and what they stand for in float32; others as they are.

    Args:
        scale_name: ``"scale_weight"``, ``"weight_scale"``; None: unscaled.
        by_channel: a scale for each output channel.
    """
    stored, meant = {}, {}
    for key, tensor in weights.items():
        if tensor.ndim < 2:
            stored[key] = meant[key] = tensor
            continue
        if scale_name is None:
            stored[key] = tensor.to(dtype)
            meant[key] = stored[key].float()
            continue
        largest = tensor.flatten(1).abs().amax(1) if by_channel else tensor.abs().amax()
        scale = (largest / 448).clamp_min(1e-8).float()
        wide = scale.view(-1, *[1] * (tensor.ndim - 1))
        stored[key] = (tensor / wide).to(dtype)
        meant[key] = stored[key].float() * wide
        stored[f"{key.removesuffix('weight')}{scale_name}"] = scale
    return stored, meant
