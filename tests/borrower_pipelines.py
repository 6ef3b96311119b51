"""The real pipelines of models that borrow FLUX's autoencoders, with tiny random transformers and given embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    BriaPipeline,
    BriaTransformer2DModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)

BLOCKS: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
"""Of every transformer that has FLUX's blocks."""


class _LongCat(LongCatImagePipeline):
    """Its own pipeline takes no embeddings (`encode_prompt` counts prompts), so its text encoder's place is taken."""

    def _encode_prompt(self, prompt: list[str]) -> torch.Tensor:
        return _noise(self.transformer, len(prompt), 4, 32)


def _noise(like: Any, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(like.dtype)


def _flux(in_channels: int) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(in_channels=in_channels, out_channels=64, pooled_projection_dim=32, **BLOCKS)


def _lumina2() -> Lumina2Transformer2DModel:
    return Lumina2Transformer2DModel(
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(64, 64, 64),
        cap_feat_dim=32,
    )


def _hidream() -> HiDreamImageTransformer2DModel:
    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 32],
        text_emb_dim=32,
        axes_dims_rope=(4, 4, 8),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
    )


def _ernie() -> ErnieImageTransformer2DModel:
    return ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        text_in_dim=32,
        rope_axes_dim=(4, 4, 8),
    )


class Borrower(NamedTuple):
    """How to make and run one pipeline."""

    pipeline: type[Any]
    transformer: Callable[[], Any]
    without: tuple[str, ...]
    """Components left out."""
    arguments: Callable[[Any, int, int], dict[str, Any]]
    """Of a call, beside what all take; from the transformer, height and width."""


def _pooled(transformer: Any, height: int, width: int) -> dict[str, Any]:
    return {"prompt_embeds": _noise(transformer, 1, 4, 32), "pooled_prompt_embeds": _noise(transformer, 1, 32)}


def _picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(5))


def _kontext(transformer: Any, height: int, width: int) -> dict[str, Any]:
    # Its area is 1024 x 1024 unless told, whatever size is asked for.
    edited = {"image": _picture(32, 32), "_auto_resize": False, "max_area": height * width}
    return _pooled(transformer, height, width) | edited


def _fill(transformer: Any, height: int, width: int) -> dict[str, Any]:
    mask = torch.zeros(1, 1, height, width)
    mask[..., : height // 2, :] = 1
    return _pooled(transformer, height, width) | {"image": _picture(height, width), "mask_image": mask}


def _one(transformer: Any, height: int, width: int) -> dict[str, Any]:
    return {"prompt_embeds": _noise(transformer, 1, 4, 32), "guidance_scale": 1.0}


TWO_ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
BORROWERS = {
    "Kontext": Borrower(FluxKontextPipeline, lambda: _flux(64), TWO_ENCODERS, _kontext),
    # Beside the latents: those of the masked picture, and 8x8 pixels of mask for each.
    "Fill": Borrower(FluxFillPipeline, lambda: _flux(64 + 64 + 256), TWO_ENCODERS, _fill),
    "LongCat": Borrower(
        _LongCat,
        lambda: LongCatImageTransformer2DModel(pooled_projection_dim=32, **BLOCKS),
        ("text_encoder", "tokenizer", "text_processor"),
        lambda *_: {"prompt": "a cat", "enable_prompt_rewrite": False, "guidance_scale": 1.0},
    ),
    "Bria": Borrower(BriaPipeline, lambda: BriaTransformer2DModel(**BLOCKS), ("text_encoder", "tokenizer"), _one),
    "Ovis": Borrower(
        OvisImagePipeline, lambda: OvisImageTransformer2DModel(**BLOCKS), ("text_encoder", "tokenizer"), _one
    ),
    "Lumina2": Borrower(
        Lumina2Pipeline,
        _lumina2,
        ("text_encoder", "tokenizer"),
        lambda *given: _one(*given) | {"prompt_attention_mask": torch.ones(1, 4, dtype=torch.int64)},
    ),
    "HiDream": Borrower(
        HiDreamImagePipeline,
        _hidream,
        tuple(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")),
        lambda transformer, *_: {
            "prompt_embeds_t5": _noise(transformer, 1, 4, 32),
            "prompt_embeds_llama3": _noise(transformer, 2, 1, 4, 32),
            "pooled_prompt_embeds": _noise(transformer, 1, 32),
            "guidance_scale": 1.0,
        },
    ),
    "ERNIE": Borrower(
        ErnieImagePipeline,
        _ernie,
        ("text_encoder", "tokenizer"),
        lambda transformer, *_: {"prompt_embeds": [_noise(transformer, 4, 32)], "guidance_scale": 1.0},
    ),
}


def build(name: str, vae: Any, dtype: torch.dtype | None = None) -> Any:
    """The pipeline around ``vae``; ``dtype`` of its transformer, if not the VAE's."""
    borrower = BORROWERS[name]
    torch.manual_seed(1)
    transformer = borrower.transformer()
    with torch.no_grad():
        for parameter in transformer.parameters():  # some are created empty, some zero
            parameter.normal_(0.0, 0.05)
    pipe = borrower.pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=torch.nn.Module.to(transformer, dtype or vae.dtype).eval(),
        **dict.fromkeys(borrower.without),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name: str, pipe: Any, height: int, width: int, batch: int, output_type: str) -> Any:
    """One two-step run; the same arguments give the same latents every time."""
    if name == "HiDream":  # it makes every picture of this many pixels
        pipe.default_sample_size = (height * width) ** 0.5 / 8
    return pipe(
        height=height,
        width=width,
        num_inference_steps=2,
        num_images_per_prompt=batch,
        generator=torch.Generator().manual_seed(0),
        output_type=output_type,
        **BORROWERS[name].arguments(pipe.transformer, height, width),
    ).images
