"""Beside a pipeline: the peak of the whole card with and without `fluxvae.install`, and what stays reserved."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import fluxvae
from gpu_run.bench import Bench, digest
from gpu_run.timing import WholeCard, taken

__all__ = ["fragmentation", "installed"]

IMAGES = 10


def installed(bench: Bench) -> None:
    """A real `FluxPipeline` makes an image with our decoder and with diffusers'; the most of the card each takes.

    Its VAE has FLUX's full widths; its transformer is tiny and its weights are random, because only the decode's peak
    is of interest here. It is the first part of its process, so that nothing else has reserved memory.
    """
    pipe = _pipeline(bench)
    base = taken()
    bench.row(kind="whole card", what="loaded", taken_bytes=base)
    _image(pipe, bench, "latent")  # loads what the transformer needs
    for size in (1024, 2048):
        limit: int | None = None
        above_by: dict[str, int] = {}
        for what in ("diffusers", "installed", "installed within a third"):
            with ExitStack() as undo:
                if what != "diffusers":
                    undo.callback(fluxvae.install(pipe.vae, kernels="cuda", memory_limit=limit).remove)
                torch.cuda.empty_cache()
                with WholeCard() as card:
                    image = _image(pipe, bench, "pt", size)
            above = card.peak - base
            bench.row(
                kind="whole card", what=what, size=size, limit=limit, peak_bytes=card.peak, above_loaded_bytes=above,
                image=digest(image),
            )  # fmt: skip
            above_by[what] = above
            limit = max(above_by["diffusers"] // 3, 1) if what == "installed" else None


def fragmentation(bench: Bench) -> None:
    """Ten images, between which a transformer's activations come and go: does what is reserved grow?"""
    engine = bench.ours()
    for number in range(IMAGES):
        size = (1024, 768, 1024, 1280, 1024)[number % 5]
        _activations(bench, number)
        image = engine.decode(bench.raw("flux", size, 1, "bfloat16"))
        torch.cuda.synchronize()
        bench.row(
            kind="fragmentation", image=number, size=size, allocated_bytes=torch.cuda.memory_allocated(),
            reserved_bytes=torch.cuda.memory_reserved(), taken_bytes=taken(),
            peak_allocated_bytes=torch.cuda.max_memory_allocated(),
        )  # fmt: skip
        del image


def _activations(bench: Bench, seed: int) -> None:
    """Allocate and free as a transformer's forward does: many tensors of a few sizes, some of which outlive others."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[torch.Tensor] = []
    unit = 1 << (8 if bench.small else 20)
    for _ in range(60):
        megabytes = int(torch.randint(6, 120, (1,), generator=generator))
        kept.append(torch.empty(megabytes * unit, dtype=torch.uint8, device=bench.device))
        if len(kept) > 12:
            kept.pop(int(torch.randint(0, 12, (1,), generator=generator)))


def _pipeline(bench: Bench) -> FluxPipeline:
    torch.manual_seed(1)
    vae = bench.vae()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * vae.config["latent_channels"], num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=torch.nn.Module.to(transformer, bench.device, torch.bfloat16),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _image(pipe: FluxPipeline, bench: Bench, output_type: str, size: int = 1024) -> torch.Tensor:
    side, device = pipe.vae_scale_factor * 2 * -(-bench.side(size) // 2), bench.device
    made: Any = pipe(
        prompt_embeds=torch.zeros(1, 4, 32, dtype=torch.bfloat16, device=device),
        pooled_prompt_embeds=torch.zeros(1, 32, dtype=torch.bfloat16, device=device),
        height=side, width=side, num_inference_steps=1, output_type=output_type,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    image: torch.Tensor = made.images
    return image
