"""The reference engine gives the same bits as the real pipelines of FLUX.2 and of FLUX.1's borrowers.

The transformers are tiny and random, and the prompt embeddings are given; everything else is the pipelines' own code.
The models' own weights are not covered, because they cannot ship.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, Flux2KleinPipeline, Flux2Pipeline
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.flux3.decoders import Flux3DecodeStep, Flux3UnpackLatentsStep
from diffusers.modular_pipelines.ideogram4.decoders import Ideogram4DecodeStep
from diffusers.modular_pipelines.ideogram4.denoise import Ideogram4AfterDenoiseStep
from hypothesis import example, given, settings
from hypothesis import strategies as st

import modular_pipelines
from family_models import (
    chroma_pipeline,
    flux2_pipeline,
    flux2_vae,
    ideogram_pipeline,
    ids_of,
    klein_pipeline,
    run,
    tiny_vae,
    z_image_pipeline,
)
from fluxvae import Decoder, InvalidOptionError
from fluxvae.devices import computes_directly
from fluxvae.engine.preview import ApproximateWarning
from fluxvae.pictures import postprocess
from models import flux_pipeline, random_vae, run_pipeline

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))


def assert_same(pipe: Any, latents: torch.Tensor, size: tuple[int, int, int], **options: Any) -> None:
    """The pipeline's picture and ours, of its own latents."""
    decoder, (gh, gw, batch) = Decoder(pipe.vae, engine="diffusers"), size
    height, width = 16 * gh, 16 * gw
    expected = run(pipe, height, width, batch, "pt")
    assert torch.equal(decoder.decode(latents, output_type="pt", **options), expected)
    if batch == 1:
        pictures = run(pipe, height, width, batch, "pil")
        ours = decoder.decode(latents, output_type="uint8", **options)
        assert np.array_equal(ours, np.stack([np.asarray(picture) for picture in pictures]))


@DTYPES
@settings(max_examples=6)
@given(size=SIZES)
@example(size=(3, 5, 2))
def test_flux2_pipeline(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    pipe, (gh, gw, batch) = flux2_pipeline(flux2_vae(dtype=dtype)), size
    height, width = 16 * gh, 16 * gw
    latents = run(pipe, height, width, batch, "latent")
    assert latents.shape == (batch, gh * gw, 128)
    assert_same(pipe, latents, size, height=height, width=width)
    assert_same(pipe, latents, size, latent_ids=ids_of(gh, gw, batch))


@DTYPES
@settings(max_examples=6)
@given(size=SIZES, seed=st.integers(0, 99), sized=st.booleans())
def test_flux2_tokens_in_any_order(dtype: torch.dtype, size: tuple[int, int, int], seed: int, sized: bool) -> None:
    """Every image's tokens shuffled in a way of its own; the oracle scatters them by the pipeline's own method."""
    gh, gw, batch = size
    vae = flux2_vae(dtype=dtype)
    pipe = flux2_pipeline(vae)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, gh * gw, 128, generator=generator).to(dtype)
    ids = torch.stack([ids_of(gh, gw, 1)[0][torch.randperm(gh * gw, generator=generator)] for _ in range(batch)])
    patches = Flux2Pipeline._unpack_latents_with_ids(latents, ids)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(dtype)
    raw = Flux2Pipeline._unpatchify_latents(patches * std + vae.bn.running_mean.view(1, -1, 1, 1).to(dtype))
    with torch.no_grad():
        expected = pipe.image_processor.postprocess(vae.decode(raw, return_dict=False)[0], output_type="pt")
    options = {"height": 16 * gh, "width": 16 * gw} if sized else {}
    decoder = Decoder(vae, engine="diffusers")
    assert torch.equal(decoder.decode(latents, latent_ids=ids, output_type="pt", **options), expected)
    assert torch.equal(decoder.decode(patches, output_type="pt"), expected), "in patches"
    normalised = Flux2Pipeline._unpatchify_latents(patches)
    assert torch.equal(decoder.decode(normalised, raw=False, output_type="pt"), expected), "unpatchified"
    assert torch.equal(decoder.decode(raw, raw=True, output_type="pt"), expected), "raw"
    if gh * gw > 1 and not torch.equal(ids, ids_of(gh, gw, batch)):
        in_rows = decoder.decode(latents, height=16 * gh, width=16 * gw, output_type="pt")
        assert not torch.equal(in_rows, expected), "the order matters"


@DTYPES
@settings(max_examples=6)
@given(size=SIZES)
def test_flux2_klein_pipeline(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """Its output_type="latent" is raw; the tokens before that come from a callback."""
    pipe, (gh, gw, batch) = klein_pipeline(flux2_vae(dtype=dtype)), size
    height, width = 16 * gh, 16 * gw
    raw = run(pipe, height, width, batch, "latent")
    assert raw.shape == (batch, 32, 2 * gh, 2 * gw)
    assert_same(pipe, raw, size, raw=True)
    seen: list[torch.Tensor] = []

    def keep(_: Flux2KleinPipeline, step: int, timestep: Any, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(kept["latents"])
        return kept

    run(pipe, height, width, batch, "latent", callback_on_step_end=keep)
    assert_same(pipe, seen[-1], size, height=height, width=width)


@DTYPES
@settings(max_examples=5)
@given(size=SIZES)
def test_chroma_pipeline(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    pipe, (gh, gw, batch) = chroma_pipeline(random_vae(dtype=dtype)), size
    latents = run(pipe, 16 * gh, 16 * gw, batch, "latent")
    assert_same(pipe, latents, size, height=16 * gh, width=16 * gw)


@DTYPES
@settings(max_examples=5)
@given(size=SIZES)
def test_z_image_pipeline(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """Unpacked, and float32 whatever the VAE is: the pipeline casts, then rescales."""
    pipe, (gh, gw, batch) = z_image_pipeline(random_vae(dtype=dtype)), size
    latents = run(pipe, 16 * gh, 16 * gw, batch, "latent")
    assert latents.dtype == torch.float32
    assert_same(pipe, latents, size)


@pytest.mark.parametrize("latents_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@DTYPES
@settings(max_examples=4)
@given(size=SIZES)
@example(size=(3, 5, 2))
def test_flux3_steps(latents_dtype: torch.dtype, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """The tokens, and the patches that its pipeline calls latents: rescaled in their own dtype, then cast."""
    (gh, gw, batch), vae = size, flux2_vae(dtype=dtype)
    blocks = SequentialPipelineBlocks.from_blocks_dict(
        {"unpack": Flux3UnpackLatentsStep(), "decode": Flux3DecodeStep()}
    )
    pipe = blocks.init_pipeline()
    pipe.update_components(vae=vae)
    tokens = torch.randn(batch, gh * gw, 128, generator=torch.Generator().manual_seed(gh)).to(latents_dtype)
    sizes = {"height": 16 * gh, "width": 16 * gw}
    crop = (3, 1, 16 * gw - 2, 16 * gh - 5)
    found = pipe(latents=tokens, **sizes, reference_crop=[crop], output_type="pt", output=["images", "latents"])
    decoder = Decoder(vae, engine="diffusers", rescale_dtype=latents_dtype)
    left, top, right, bottom = crop
    for latents, options in ((tokens, sizes), (found["latents"], {})):
        mine = decoder.decode(latents, **options, output_type="pt")
        assert torch.equal(mine[..., top:bottom, left:right], found["images"])
    if latents_dtype != dtype:
        otherwise = Decoder(vae, engine="diffusers").decode(tokens, **sizes, output_type="pt")
        assert not torch.equal(otherwise, mine), "rescale_dtype matters"


@pytest.mark.parametrize("latents_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_flux3_pipeline(latents_dtype: torch.dtype) -> None:
    """The whole modular pipeline from the embeddings on, with a VAE in bfloat16."""
    vae = flux2_vae(dtype=torch.bfloat16)
    pipe = modular_pipelines.pipeline("Flux3", modular_pipelines.blocks_of("Flux3"), vae, dtype=latents_dtype)
    found = modular_pipelines.run(pipe, "Flux3", ["images", "latents"], height=48, width=80, output_type="np")
    assert found["latents"].dtype == latents_dtype
    decoder = Decoder(vae, engine="diffusers", rescale_dtype=latents_dtype)
    assert np.array_equal(decoder.decode(found["latents"], output_type="np"), found["images"])


@DTYPES
@settings(max_examples=4)
@given(size=SIZES)
@example(size=(3, 5, 2))
@example(size=(1, 1, 2))
def test_ideogram_4(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """Its tokens, what its modular after-denoise step makes of them, and patches; all of them float32.

    Both of its pipelines cast the VAE's output to float32 before they make pictures of it.
    """
    (gh, gw, batch), vae = size, flux2_vae(dtype=dtype)
    pipe = ideogram_pipeline(vae)
    tokens = run(pipe, 16 * gh, 16 * gw, batch, "latent")
    assert tokens.shape == (batch, gh * gw, 128)
    assert tokens.dtype == torch.float32
    expected = run(pipe, 16 * gh, 16 * gw, batch, "pt")
    decoder = Decoder(vae, engine="diffusers", rescale_dtype="float32")
    sizes = {"height": 16 * gh, "width": 16 * gw}
    steps = {"after_denoise": Ideogram4AfterDenoiseStep(), "decode": Ideogram4DecodeStep()}
    modular = SequentialPipelineBlocks.from_blocks_dict(steps).init_pipeline()
    modular.update_components(vae=vae)
    found = modular(latents=tokens, **sizes, output_type="pt", output=["images", "latents"])
    assert torch.equal(found["images"], expected), "both pipelines agree"
    assert found["latents"].shape == (batch, 32, 2 * gh, 2 * gw)
    patches = tokens.mT.unflatten(2, (gh, gw))
    for latents, options in ((tokens, sizes), (found["latents"], {"raw": False}), (patches, {})):
        options = {**options, "feature_order": "row_column_channel"}
        pixels = decoder.decode_raw(latents, **options)
        assert torch.equal(postprocess(pixels.float(), "pt"), expected)
        if dtype == torch.float32:
            assert torch.equal(decoder.decode(latents, **options, output_type="pt"), expected)
        assert decoder.check(latents, **options) == (16 * gh, 16 * gw)
    for order in (None, "channel_row_column"):
        as_flux2 = decoder.decode_raw(tokens, **sizes, feature_order=order)
        assert not torch.equal(as_flux2, pixels), "FLUX.2's order gives another picture, and no error"


@settings(max_examples=12)
@given(size=SIZES, seed=st.integers(0, 99), raw=st.booleans(), shuffled=st.booleans())
@example(size=(1, 1, 2), seed=0, raw=False, shuffled=False)
def test_a_feature_order_is_a_permutation(size: tuple[int, int, int], seed: int, raw: bool, shuffled: bool) -> None:
    """Features put into FLUX.2's order by hand, and the statistics with them, decode as FLUX.2's."""
    (gh, gw, batch), mine, theirs = size, flux2_vae(), flux2_vae()
    tokens = torch.randn(batch, gh * gw, 128, generator=torch.Generator().manual_seed(seed))
    to_flux2 = [32 * place + channel for channel in range(32) for place in range(4)]  # where each of its features is
    theirs.bn.running_mean.copy_(mine.bn.running_mean[to_flux2])
    theirs.bn.running_var.copy_(mine.bn.running_var[to_flux2])
    options: dict[str, Any] = {"height": 16 * gh, "width": 16 * gw, "raw": raw, "output_type": "np"}
    if shuffled:
        order = torch.randperm(gh * gw, generator=torch.Generator().manual_seed(seed))
        options["latent_ids"] = ids_of(gh, gw, batch)[:, order]
    expected = Decoder(theirs, engine="diffusers").decode(tokens[..., to_flux2], **options)
    decoder = Decoder(mine, engine="diffusers")
    assert np.array_equal(decoder.decode(tokens, **options, feature_order="row_column_channel"), expected)
    assert not np.array_equal(decoder.decode(tokens, **options), expected)


@pytest.mark.parametrize(
    ("make", "shape", "options", "message"),
    [
        (flux2_vae, (1, 15, 128), {"feature_order": "bogus"}, "feature_order: got 'bogus', expected 'channel_row_col"),
        (flux2_vae, (1, 15, 128), {"feature_order": True}, "feature_order: got True, expected"),
        (flux2_vae, (1, 32, 6, 10), {"raw": True}, "feature_order: got 'row_column_channel' with raw=True"),
        (random_vae, (1, 15, 64), {}, "for a checkpoint that is not AutoencoderKLFlux2"),
        (random_vae, (1, 15, 64), {"feature_order": "channel_row_column"}, "that is not AutoencoderKLFlux2"),
        (lambda: tiny_vae(32), (1, 15, 128), {}, "feature_order: got 'row_column_channel' for a preview"),
    ],
)
def test_where_a_feature_order_is_refused(make: Any, shape: tuple[int, ...], options: Any, message: str) -> None:
    decoder, size = Decoder(make(), engine="diffusers"), {"height": 48, "width": 80}
    options = {"feature_order": "row_column_channel", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximateWarning)
        for call in (decoder.decode, decoder.decode_raw, decoder.check):
            with pytest.raises(InvalidOptionError, match=message):
                call(torch.zeros(shape), **size, **options)


def engines(tiny: AutoencoderTiny) -> list[str]:
    """Both; but the preview engine refuses bfloat16 on a processor that has no arithmetic for it."""
    if computes_directly(tiny.dtype, tiny.device):
        return ["preview", "diffusers"]
    with pytest.raises(InvalidOptionError, match="dtype: got bfloat16 for a preview"):
        Decoder(tiny)
    return ["diffusers"]


@DTYPES
def test_a_preview_in_flux_pipeline(dtype: torch.dtype) -> None:
    """What TAEF1 expects is what FluxPipeline gives it: its config's factor 1 and shift 0, so them as they are."""
    pipe = flux_pipeline(random_vae(dtype=dtype))
    pipe.vae = tiny_vae(dtype=dtype)
    assert pipe.vae_scale_factor == 8
    latents, expected = (run_pipeline(pipe, 48, 80, 1, kind) for kind in ("latent", "pt"))
    for engine in engines(pipe.vae):
        with pytest.warns(ApproximateWarning, match="approximate preview"):
            ours = Decoder(pipe.vae, engine=engine).decode(latents, height=48, width=80, output_type="pt")
        assert torch.equal(ours, expected)


@DTYPES
@pytest.mark.parametrize("make", [flux2_pipeline, klein_pipeline])
def test_a_preview_in_flux2s_pipelines(dtype: torch.dtype, make: Any) -> None:
    """With statistics that change nothing, which is how TAEF2's author puts it into diffusers' pipelines."""
    pipe = make(flux2_vae(dtype=dtype))
    tiny = tiny_vae(32, dtype=dtype)
    seen: list[torch.Tensor] = []

    def keep(_: Any, step: int, timestep: Any, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(kept["latents"])
        return kept

    pipe.vae = tiny
    tiny.bn = torch.nn.BatchNorm2d(128, eps=0.0, affine=False).to(dtype).eval()
    tiny.register_to_config(batch_norm_eps=0.0)
    expected = run(pipe, 48, 80, 1, "pt", callback_on_step_end=keep)
    for engine in engines(tiny):
        with pytest.warns(ApproximateWarning, match="approximate preview"):
            ours = Decoder(tiny, engine=engine).decode(seen[-1], height=48, width=80, output_type="pt")
        assert torch.equal(ours, expected)
