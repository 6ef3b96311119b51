"""Small seeded random models of the other VAEs (FLUX.1's is in `models`), and diffusers' real pipelines around them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

SMALL_DECODER = (96, 192, 384, 384)
"""``decoder_block_out_channels`` of FLUX.2-small-decoder."""


def flux2_vae(
    seed: int = 0,
    *,
    widths: tuple[int, ...] = (32, 32, 32, 32),
    decoder_widths: tuple[int, ...] | None = None,
    layers_per_block: int = 1,
    groups: int = 32,
    dtype: torch.dtype = torch.float32,
    encoder: bool = True,
) -> AutoencoderKLFlux2:
    """FLUX.2's VAE, narrow: 32 latent channels, 8x, `post_quant_conv`, and statistics that are no identity."""
    torch.manual_seed(seed)
    vae = AutoencoderKLFlux2(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        decoder_block_out_channels=decoder_widths,
        layers_per_block=layers_per_block,
        norm_num_groups=groups,
        sample_size=64,
    )
    with torch.no_grad():
        vae.bn.running_mean.normal_(0, 0.5)
        # Some are so small that the eps decides: with another one the picture is another.
        vae.bn.running_var.uniform_(1e-5, 2.0)
        vae.bn.running_var[::7] = 1e-5
    if not encoder:
        vae.encoder = None
    torch.nn.Module.to(vae, dtype)
    return vae.eval().requires_grad_(False)


def qwen_image_vae(
    seed: int = 0,
    *,
    channels: int = 3,
    base_dim: int = 16,
    dim_mult: tuple[int, ...] = (1, 2, 4, 4),
    num_res_blocks: int = 1,
    dtype: torch.dtype = torch.float32,
    encoder: bool = True,
) -> AutoencoderKLQwenImage:
    """Qwen-Image's VAE, narrow: 16 latent channels with a mean and a deviation, 8x; of 4 ``channels``, Layered's."""
    torch.manual_seed(seed)
    sizes = {"base_dim": base_dim, "dim_mult": list(dim_mult), "num_res_blocks": num_res_blocks}
    return _frame_vae(AutoencoderKLQwenImage(**sizes, input_channels=channels), dtype, encoder)


def wan_vae(
    seed: int = 0,
    *,
    channels: int = 3,
    base_dim: int = 16,
    decoder_base_dim: int | None = None,
    dim_mult: tuple[int, ...] = (1, 2, 4, 4),
    num_res_blocks: int = 1,
    dtype: torch.dtype = torch.float32,
    encoder: bool = True,
) -> AutoencoderKLWan:
    """Wan 2.1's VAE, narrow: the same network as Qwen-Image's, in its own class."""
    torch.manual_seed(seed)
    sizes = {"base_dim": base_dim, "dim_mult": list(dim_mult), "num_res_blocks": num_res_blocks}
    vae = AutoencoderKLWan(**sizes, decoder_base_dim=decoder_base_dim, in_channels=channels, out_channels=channels)
    return _frame_vae(vae, dtype, encoder)


def _frame_vae(vae: Any, dtype: torch.dtype, encoder: bool) -> Any:
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith(".gamma"):  # all ones at first, so that a gamma of another norm would do as well
                parameter.uniform_(0.5, 1.5)
    if not encoder:
        vae.encoder = None
    torch.nn.Module.to(vae, dtype)
    return vae.eval().requires_grad_(False)


def tiny_vae(channels: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> AutoencoderTiny:
    """A TAEF1 (16 channels) or TAEF2 (32), narrow."""
    torch.manual_seed(seed)
    tiny = AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(16, 16, 16, 16),
    )
    return tiny.to(dtype).eval().requires_grad_(False)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _flux2_transformer(dtype: torch.dtype) -> Flux2Transformer2DModel:
    torch.manual_seed(1)
    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    ).to(dtype)


def flux2_pipeline(vae: AutoencoderKLFlux2) -> Flux2Pipeline:
    return _quiet(
        Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            transformer=_flux2_transformer(vae.dtype),
        )
    )


def klein_pipeline(vae: AutoencoderKLFlux2) -> Flux2KleinPipeline:
    return _quiet(
        Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            transformer=_flux2_transformer(vae.dtype),
            is_distilled=True,
        )
    )


def chroma_pipeline(vae: AutoencoderKL) -> ChromaPipeline:
    torch.manual_seed(1)
    transformer = ChromaTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    ).to(vae.dtype)
    return _quiet(
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
            transformer=transformer,
        )
    )  # fmt: skip


def z_image_pipeline(vae: AutoencoderKL) -> ZImagePipeline:
    torch.manual_seed(1)
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 4, 8],
        axes_lens=[64, 64, 64],
    )
    for parameter in transformer.parameters():  # some are created empty
        torch.nn.init.normal_(parameter, 0.0, 0.05)
    return _quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
            transformer=transformer.to(vae.dtype),
        )
    )  # fmt: skip


class _Ideogram4(Ideogram4Pipeline):
    """Its own pipeline takes no embeddings, so its text encoder's place is taken."""

    def encode_prompt(self, prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
        features = torch.randn(1, max_sequence_length, 32, generator=torch.Generator().manual_seed(2))
        embeds = torch.cat([features, torch.zeros(1, grid_h * grid_w, 32)], dim=1)
        return embeds, *self._prepare_ids([max_sequence_length], grid_h, grid_w, max_sequence_length, device)


def ideogram_pipeline(vae: AutoencoderKLFlux2, dtype: torch.dtype | None = None) -> Ideogram4Pipeline:
    """Ideogram 4's, with FLUX.2's VAE, whose statistics it takes in another order; ``dtype`` is the transformers'."""
    transformers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        transformers.append(
            Ideogram4Transformer2DModel(
                num_layers=1, attention_head_dim=16, num_attention_heads=2, intermediate_size=32, adaln_dim=16,
                llm_features_dim=32, mrope_section=(4, 2, 2),
            ).to(dtype or vae.dtype)
        )  # fmt: skip
    return _quiet(
        _Ideogram4(
            scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
            transformer=transformers[0], unconditional_transformer=transformers[1],
        )
    )  # fmt: skip


def run(pipe: Any, height: int, width: int, batch: int, output_type: str, **options: Any) -> Any:
    """One two-step run; the same arguments give the same latents every time."""
    embeds = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(2)).to(pipe.vae.dtype)
    arguments: dict[str, Any] = {"prompt_embeds": embeds}
    if isinstance(pipe, ZImagePipeline):
        arguments = {"prompt_embeds": [embeds[0]], "guidance_scale": 0.0}
    elif isinstance(pipe, ChromaPipeline):
        arguments |= {"prompt_attention_mask": torch.ones(batch, 4), "guidance_scale": 1.0}
    elif isinstance(pipe, Ideogram4Pipeline):
        arguments = {
            "prompt": "a lighthouse",
            "max_sequence_length": 4,
            "guidance_scale": 2.0,
            "guidance_schedule": None,
        }
    elif isinstance(pipe, Flux2KleinPipeline):
        arguments |= {"guidance_scale": 1.0}
    return pipe(
        height=height,
        width=width,
        num_inference_steps=2,
        num_images_per_prompt=batch,
        generator=torch.Generator().manual_seed(0),
        output_type=output_type,
        **arguments,
        **options,
    ).images


def ids_of(gh: int, gw: int, batch: int) -> torch.Tensor:
    """Position ids in row order, as the pipeline makes them."""
    return Flux2Pipeline._prepare_latent_ids(torch.empty(batch, 128, gh, gw))
