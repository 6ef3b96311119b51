"""The real pipelines whose VAE has an axis of time, with tiny random transformers and given embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)


def _transformer(**options: Any) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        **options,
    )


def _krea2() -> Krea2Transformer2DModel:
    return Krea2Transformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )


def _nucleus() -> NucleusMoEImageTransformer2DModel:
    return NucleusMoEImageTransformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        mlp_ratio=1.0,
        out_channels=16,
        moe_enabled=False,
    )


def _wan() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


PIPELINES: dict[str, tuple[type[Any], Callable[[], Any]]] = {
    "QwenImage": (QwenImagePipeline, _transformer),
    "QwenImageEditPlus": (QwenImageEditPlusPipeline, _transformer),
    "QwenImageImg2Img": (QwenImageImg2ImgPipeline, _transformer),
    "QwenImageLayered": (
        QwenImageLayeredPipeline,
        lambda: _transformer(use_additional_t_cond=True, use_layer3d_rope=True),
    ),
    "Krea2": (Krea2Pipeline, _krea2),
    "NucleusMoEImage": (NucleusMoEImagePipeline, _nucleus),
    "Wan": (WanPipeline, _wan),
}


class _TextEncoder(torch.nn.Module):
    """In the place of a text encoder where the pipeline asks it for its dtype."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype


def pipeline(name: str, vae: Any) -> Any:
    """The pipeline of this name around a VAE, without text encoders."""
    kind, make = PIPELINES[name]
    torch.manual_seed(1)
    transformer = make()
    for parameter in transformer.parameters():  # some are created empty or zero, so that nothing would depend on them
        torch.nn.init.normal_(parameter, 0.0, 0.05)
    missing = {name: None for name in ("tokenizer", "processor") if name in kind.__init__.__annotations__}
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=name != "Wan"),
        vae=vae,
        text_encoder=_TextEncoder(vae.dtype) if name == "QwenImageLayered" else None,
        transformer=transformer.to(vae.dtype),
        **missing,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, output_type: str, batch: int = 1, **options: Any) -> Any:
    """One two-step run; the same arguments give the same latents every time."""
    shape = (1, 4, 2, 32) if isinstance(pipe, Krea2Pipeline) else (1, 4, 32)
    embeds = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(pipe.vae.dtype)
    arguments: dict[str, Any] = {"prompt_embeds": embeds}
    if not isinstance(pipe, WanPipeline):
        arguments["prompt_embeds_mask"] = torch.ones(1, 4, dtype=torch.bool)
        arguments["num_images_per_prompt"] = batch
    if isinstance(pipe, (Krea2Pipeline, WanPipeline, NucleusMoEImagePipeline)):
        arguments["guidance_scale"] = 0.0
    if isinstance(pipe, QwenImageLayeredPipeline):
        arguments["prompt"] = "a lighthouse"  # without one it writes a caption
    return pipe(
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type=output_type,
        return_dict=False,
        **arguments,
        **options,
    )[0]


def last_latents(pipe: Any, **options: Any) -> torch.Tensor:
    """The latents after the last step, which QwenImageLayeredPipeline cannot return: its output_type has no latents."""
    seen: list[torch.Tensor] = []

    def keep(_: Any, step: int, timestep: Any, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(kept["latents"])
        return kept

    run(pipe, "pt", callback_on_step_end=keep, **options)
    return seen[-1]


def seen_tokens(pipe: Any, **options: Any) -> torch.Tensor:
    """The tokens that the transformer is given in the first step of a run."""
    seen: list[torch.Tensor] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    run(pipe, "latent", **options)
    hook.remove()
    return seen[0]
