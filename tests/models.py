"""Small random models for tests, made from a seed: a VAE with FLUX.1's topology, and a FluxPipeline around it."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel


def random_vae(
    seed: int = 0,
    *,
    widths: tuple[int, ...] = (32, 32, 32, 32),
    layers_per_block: int = 1,
    sample_size: int = 64,
    dtype: torch.dtype = torch.float32,
    channels: int = 3,
) -> AutoencoderKL:
    """FLUX.1's VAE, narrow: 16 latent channels, 8x, no quantisation convolutions, FLUX's scale and shift.

    ``sample_size`` 64 makes diffusers' tiling start at 64 pixels instead of 1024. With 4 ``channels`` its pictures are
    RGBA.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=sample_size,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return vae.to(dtype).eval().requires_grad_(False)


def flux_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """The real FluxPipeline around ``vae``: a tiny random transformer, no text encoders."""
    torch.manual_seed(1)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).to(vae.dtype)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(pipe: FluxPipeline, height: int, width: int, batch: int, output_type: str, seed: int = 0):
    """One two-step run of the pipeline; the same arguments give the same latents every time."""
    dtype = pipe.vae.dtype
    embeds = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    pooled = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    return pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        height=height,
        width=width,
        num_inference_steps=2,
        num_images_per_prompt=batch,
        generator=torch.Generator().manual_seed(seed),
        output_type=output_type,
    ).images
