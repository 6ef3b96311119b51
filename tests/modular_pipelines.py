"""diffusers' real modular pipelines with tiny random transformers and given embeddings: all but their text encoders."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2AutoBlocks,
    Flux3AutoBlocks,
    Flux3Transformer2DModel,
    FluxAutoBlocks,
    ZImageAutoBlocks,
)
from PIL import Image

from family_models import flux2_pipeline, flux2_vae, z_image_pipeline
from models import flux_pipeline, random_vae

FAMILIES = ("Flux", "Flux2", "Flux3", "ZImage")
_BLOCKS = {"Flux": FluxAutoBlocks, "Flux2": Flux2AutoBlocks, "Flux3": Flux3AutoBlocks, "ZImage": ZImageAutoBlocks}


def vae_of(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    return (flux2_vae if family in ("Flux2", "Flux3") else random_vae)(seed, dtype=dtype)


def blocks_of(family: str) -> Any:
    """The family's blocks from the embeddings on."""
    blocks = _BLOCKS[family]()
    for name in ("prompt_upsampler", "text_encoder"):
        blocks.sub_blocks.pop(name, None)
    return blocks


def _flux3_transformer() -> Flux3Transformer2DModel:
    torch.manual_seed(1)
    return Flux3Transformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _transformer(family: str, vae: Any) -> Any:
    if family == "Flux3":
        return _flux3_transformer()
    classic = {"Flux": flux_pipeline, "Flux2": flux2_pipeline, "ZImage": z_image_pipeline}[family]
    return classic(vae).transformer


def pipeline(family: str, blocks: Any, vae: Any, *, with_vae: bool = True, dtype: torch.dtype | None = None) -> Any:
    """The pipeline of these blocks.

    Args:
        with_vae: whether it has the VAE; otherwise that is only the one whose transformer it has.
        dtype: the transformer's; None: the VAE's.
    """
    pipe = blocks.init_pipeline()
    transformer = _transformer(family, vae).to(dtype or vae.dtype)
    pipe.update_components(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **({"vae": vae} if with_vae else {})
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(width: int = 70, height: int = 90, seed: int = 5) -> Image.Image:
    """A picture of noise, of a size that no model takes as it is."""
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def run(pipe: Any, family: str, output: str | list[str] = "images", **options: Any) -> Any:
    """One two-step run; the same arguments give the same latents every time."""
    dtype = pipe.transformer.dtype
    embeds = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    arguments: dict[str, Any] = {"prompt_embeds": [embeds[0]] if family == "ZImage" else embeds}
    if family == "Flux":
        arguments["pooled_prompt_embeds"] = embeds[:, 0]
    if family == "Flux3":
        arguments["negative_prompt_embeds"] = -embeds
    if "guider" in pipe.components and family != "Flux3":
        pipe.guider.disable()
    return pipe(
        num_inference_steps=2, generator=torch.Generator().manual_seed(0), output=output, **arguments, **options
    )
