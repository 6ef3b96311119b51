"""The reference engine gives the same bits as the real FluxPipeline from the same latents.

FLUX.1's own weights are not covered, because they cannot ship; the path through the code does not depend on them.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fluxvae import Decoder, SizeFlooredWarning
from fluxvae.devices import computes_directly
from models import flux_pipeline, random_vae, run_pipeline

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "bfloat16"])
def pipe(request: pytest.FixtureRequest) -> FluxPipeline:
    return flux_pipeline(random_vae(dtype=request.param))


def assert_same_images(
    pipe: FluxPipeline, height: int, width: int, batch: int, *, tiling: bool = False, slicing: bool = False
) -> None:
    vae = pipe.vae
    decoder = Decoder(vae, engine="diffusers", tiling=tiling, slicing=slicing)
    vae.use_tiling, vae.use_slicing = tiling, slicing
    try:
        latents = run_pipeline(pipe, height, width, batch, "latent")
        expected = {kind: run_pipeline(pipe, height, width, batch, kind) for kind in ("pil", "np", "pt")}
    finally:
        vae.use_tiling = vae.use_slicing = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SizeFlooredWarning)
        ours = {
            kind: decoder.decode(latents, height=height, width=width, output_type=kind)
            for kind in ("pil", "np", "pt", "uint8")
        }
    assert ours["pt"].dtype == vae.dtype
    assert torch.equal(ours["pt"], expected["pt"])
    assert ours["np"].dtype == np.float32
    assert np.array_equal(ours["np"], expected["np"])
    assert [(p.mode, p.size, p.tobytes()) for p in ours["pil"]] == [
        (p.mode, p.size, p.tobytes()) for p in expected["pil"]
    ]
    assert np.array_equal(ours["uint8"], np.stack([np.asarray(picture) for picture in expected["pil"]]))
    assert (vae.use_tiling, vae.use_slicing) == (False, False), "the caller's module is left as it was"


@given(
    height=st.integers(16, 112),
    width=st.integers(16, 112),
    batch=st.integers(1, 3),
    tiling=st.booleans(),
    slicing=st.booleans(),
)
@example(height=64, width=64, batch=1, tiling=False, slicing=False)
@example(height=48, width=160, batch=2, tiling=False, slicing=False)
@example(height=128, width=128, batch=3, tiling=True, slicing=False)
@example(height=96, width=80, batch=4, tiling=True, slicing=True)
@example(height=100, width=70, batch=2, tiling=False, slicing=True)
def test_bit_identical_to_flux_pipeline(
    pipe: FluxPipeline, height: int, width: int, batch: int, tiling: bool, slicing: bool
) -> None:
    if not computes_directly(pipe.vae.dtype, torch.device("cpu")):
        # A processor without half-precision arithmetic takes a hundred times as long for diffusers' convolutions.
        assume(batch * height * width <= 8192)
    assert_same_images(pipe, height, width, batch, tiling=tiling, slicing=slicing)


def test_tiling_changes_the_image(pipe: FluxPipeline) -> None:
    """Guards the test above: at 128 pixels these models do tile, and it shows."""
    latents = run_pipeline(pipe, 128, 128, 1, "latent")
    plain, tiled = (
        Decoder(pipe.vae, engine="diffusers", tiling=tiling).decode(latents, height=128, width=128, output_type="pt")
        for tiling in (False, True)
    )
    assert not torch.equal(plain, tiled)


def test_unpacked_latents_give_the_packed_ones_image(pipe: FluxPipeline) -> None:
    decoder = Decoder(pipe.vae, engine="diffusers")
    packed = run_pipeline(pipe, 64, 96, 2, "latent")
    unpacked = FluxPipeline._unpack_latents(packed, 64, 96, 8)
    images = [decoder.decode(packed, height=64, width=96, output_type="pt"), decoder.decode(unpacked, output_type="pt")]
    assert torch.equal(*images)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 2)])
def test_odd_unpacked_latents_decode(pipe: FluxPipeline, shape: tuple[int, int]) -> None:
    latents = torch.randn(2, 16, *shape, generator=torch.Generator().manual_seed(0)).to(pipe.vae.dtype)
    ours = Decoder(pipe.vae, engine="diffusers").decode(latents, output_type="pt")
    raw = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    expected = pipe.image_processor.postprocess(pipe.vae.decode(raw, return_dict=False)[0], output_type="pt")
    assert torch.equal(ours, expected)


def test_float32_latents_that_hold_bfloat16_values_give_the_bfloat16_image() -> None:
    """Triton carries latents as FP32; a bfloat16 pipeline's image must come out all the same."""
    pipe = flux_pipeline(random_vae(dtype=torch.bfloat16))
    latents = run_pipeline(pipe, 64, 64, 1, "latent")
    ours = Decoder(pipe.vae, engine="diffusers").decode(latents.float(), height=64, width=64, output_type="pt")
    assert torch.equal(ours, run_pipeline(pipe, 64, 64, 1, "pt"))
