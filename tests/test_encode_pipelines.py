"""The reference engine's latents have the bits of what the real pipelines hand to their transformers.

The transformers are tiny and random, and the prompt embeddings are given; everything else is the pipelines' own code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import modular_pipelines
from family_models import flux2_pipeline, flux2_vae, klein_pipeline, run
from fluxvae import Encoder, pack_latents
from fluxvae.install import install
from models import flux_pipeline, random_vae

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SIZES = st.tuples(st.integers(4, 8), st.integers(4, 8))
"""In patches of 16 pixels: FLUX.2's pipelines take pictures from 64 pixels on."""


def picture(gh: int, gw: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(gh * 100 + gw).integers(0, 256, (16 * gh, 16 * gw, 3), np.uint8))


def embeds(pipe: Any) -> dict[str, torch.Tensor]:
    dtype, generator = pipe.vae.dtype, torch.Generator().manual_seed(2)
    return {
        "prompt_embeds": torch.randn(1, 4, 32, generator=generator).to(dtype),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator).to(dtype),
    }


def encoded_by_img2img(pipe: FluxImg2ImgPipeline, image: Any, seed: int) -> torch.Tensor:
    """The latents that the pipeline adds noise to, as it gives them to its scheduler."""
    found: list[torch.Tensor] = []
    scale = pipe.scheduler.scale_noise

    def watched(sample: torch.Tensor, *rest: Any) -> Any:
        found.append(sample.clone())
        return scale(sample, *rest)

    pipe.scheduler.scale_noise = watched
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": 2, "strength": 0.6, "output_type": "latent", "generator": generator}
    pipe(image=image, height=image.height, width=image.width, **embeds(pipe), **options)
    return found[0]


def handed_over(pipe: Any, call: Any) -> torch.Tensor:
    """The tokens that the pipeline hands to its transformer beside those that it denoises."""
    found: list[torch.Tensor] = []

    def before(module: Any, arguments: Any, named: Any) -> None:
        found.append(named["hidden_states"])

    handle = pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return found[0]


@DTYPES
@settings(max_examples=4)
@given(size=SIZES, seed=st.integers(0, 99))
@example(size=(4, 7), seed=1)
def test_flux_img2img_draws_a_sample(dtype: torch.dtype, size: tuple[int, int], seed: int) -> None:
    pipe = FluxImg2ImgPipeline(**flux_pipeline(random_vae(dtype=dtype)).components)
    pipe.set_progress_bar_config(disable=True)
    image = picture(*size)
    expected = encoded_by_img2img(pipe, image, seed)
    sample = torch.Generator().manual_seed(seed)
    assert torch.equal(Encoder(pipe.vae, engine="diffusers").encode(image, packed=False, sample=sample), expected)


@DTYPES
@settings(max_examples=4)
@given(size=SIZES)
@example(size=(5, 8))
def test_flux_kontext_takes_the_mode(dtype: torch.dtype, size: tuple[int, int]) -> None:
    pipe = FluxKontextPipeline(**flux_pipeline(random_vae(dtype=dtype)).components)
    pipe.set_progress_bar_config(disable=True)
    (gh, gw), image = size, picture(*size)

    def call() -> None:
        pipe(
            image=image, height=16 * gh, width=16 * gw, max_area=256 * gh * gw, num_inference_steps=1,
            output_type="latent", _auto_resize=False, **embeds(pipe),
        )  # fmt: skip

    tokens = handed_over(pipe, call)
    reference = tokens[:, -gh * gw :]
    encoder = Encoder(pipe.vae, engine="diffusers")
    assert torch.equal(encoder.encode(image), reference)
    assert torch.equal(pack_latents(encoder.encode(image, packed=False)), reference)


@DTYPES
@pytest.mark.parametrize("make", [flux2_pipeline, klein_pipeline], ids=["Flux2", "Flux2Klein"])
@settings(max_examples=3)
@given(size=SIZES)
@example(size=(4, 6))
def test_flux2_takes_the_mode_in_patches(dtype: torch.dtype, make: Any, size: tuple[int, int]) -> None:
    pipe, (gh, gw), image = make(flux2_vae(dtype=dtype)), size, picture(*size)
    tokens = handed_over(pipe, lambda: run(pipe, 16 * gh, 16 * gw, 1, "latent", image=[image]))
    reference = tokens[:, -gh * gw :]
    encoder = Encoder(pipe.vae, engine="diffusers")
    assert torch.equal(encoder.encode(image), reference)
    patches = encoder.encode(image, packed=False)
    assert torch.equal(pipe._pack_latents(patches), reference)
    raw = encoder.encode(image, packed=False, raw=True)
    pixels = pipe.image_processor.preprocess(image).to(dtype)
    assert torch.equal(raw, pipe.vae.encode(pixels).latent_dist.mode())


@DTYPES
@settings(max_examples=3)
@given(size=st.tuples(st.integers(4, 6), st.integers(4, 7)))
@example(size=(4, 6))
def test_flux3_takes_the_mode_in_patches(dtype: torch.dtype, size: tuple[int, int]) -> None:
    """Its real steps: a reference of 64 pixels or more that fits the grid of 16 is encoded as it is."""
    image = picture(*size)
    blocks = modular_pipelines.blocks_of("Flux3").sub_blocks["vae_encoder"]
    pipe = blocks.init_pipeline()
    pipe.update_components(vae=flux2_vae(dtype=dtype))
    [expected] = pipe(image=image, output="image_cond_latents")
    encoder = Encoder(pipe.vae, engine="diffusers")
    assert torch.equal(encoder.encode(image, packed=False), expected)
    assert torch.equal(encoder.encode(image), expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sdxl with statistics", "sd3"])
def test_other_families_img2img(kind: str) -> None:
    """Their `prepare_latents`, called on a pipeline that has nothing but the VAE and a scheduler that adds nothing."""
    channels = 16 if kind == "sd3" else 4
    settings: dict[str, Any] = {"scaling_factor": 0.13025}
    if kind == "sdxl with statistics":
        settings |= {"latents_mean": [-1.6, 1.8, -1.3, 2.5], "latents_std": [8.4, 5.9, 6.5, 5.2], "scaling_factor": 0.5}
    elif kind == "sd3":
        settings |= {"shift_factor": 0.0609, "scaling_factor": 1.5305}
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        use_quant_conv=kind != "sd3",
        use_post_quant_conv=kind != "sd3",
        force_upcast=False,
        **settings,
    )
    vae.eval().requires_grad_(False)
    pipeline = {
        "sd": StableDiffusionImg2ImgPipeline,
        "sd3": StableDiffusion3Img2ImgPipeline,
    }.get(kind, StableDiffusionXLImg2ImgPipeline)
    pipe = object.__new__(pipeline)
    object.__setattr__(pipe, "vae", vae)

    class Quiet:
        def add_noise(self, latents: torch.Tensor, *_: Any) -> torch.Tensor:
            return latents

        scale_noise = add_noise

    object.__setattr__(pipe, "scheduler", Quiet())
    image = picture(3, 5)
    from diffusers.image_processor import VaeImageProcessor

    pixels = VaeImageProcessor(vae_scale_factor=8).preprocess(image)
    generator = torch.Generator().manual_seed(4)
    expected = pipe.prepare_latents(
        pixels, None, 1, 1, torch.float32, torch.device("cpu"), generator
    )  # fmt: skip
    sample = torch.Generator().manual_seed(4)
    latents = Encoder(vae, engine="diffusers").encode(image, packed=False, sample=sample)
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("make", [flux2_pipeline, klein_pipeline], ids=["Flux2", "Flux2Klein"])
def test_references_are_encoded_exactly_where_it_is_installed(make: Any) -> None:
    pipe, image = make(flux2_vae()), picture(5, 4)
    call = lambda: run(pipe, 80, 64, 1, "latent", image=[image])  # noqa: E731
    before = handed_over(pipe, call)
    with install(pipe.vae, memory_limit="1GiB"):
        inside = handed_over(pipe, call)
    assert torch.equal(inside[:, -20:], Encoder(pipe.vae).encode(image))
    assert torch.allclose(inside, before, atol=2e-3)
    assert torch.equal(handed_over(pipe, call), before)
