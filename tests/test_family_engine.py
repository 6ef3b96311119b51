"""The other VAEs pass every bar of the exact engine and the CPU kernels, and `install` works with them.

They are FLUX.2's VAE and its small decoder, previews, and Stable Diffusion's VAE. The full widths are covered by
``-m slow`` only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from engine_models import error_ratio, needs_vector_code, one_thread, rms, true_decode
from engine_peaks import measure
from family_models import SMALL_DECODER, flux2_pipeline, flux2_vae, ids_of, run, tiny_vae
from fluxvae import Decoder, InvalidLatentsError, InvalidOptionError, MemoryLimitError, install, unpack_latents
from fluxvae.engine.exact import ExactDecoder
from fluxvae.engine.preview import ApproximateWarning
from fluxvae.verify.oracle import level_difference
from fluxvae.verify.tolerances import PREVIEW_PEAK, WINOGRAD_CHANGED, WINOGRAD_LEVELS

pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["one_thread"]  # a fixture, found by its name

MODELS = {
    "narrow": {"widths": (16, 32, 32, 32), "groups": 4},
    # A quarter of the small decoder's widths beside an encoder of others, and its 96 channels themselves at one level.
    "small decoder": {"widths": (32, 32, 32, 32), "decoder_widths": (24, 48, 96, 96), "groups": 8},
    "96 channels": {"widths": (32, 32), "decoder_widths": (96, 192), "groups": 32},
}
KERNELS = [
    "torch",
    pytest.param("winograd", marks=needs_vector_code),
]
every_model = pytest.mark.parametrize("model", MODELS)


def build(model: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> AutoencoderKLFlux2:
    vae = flux2_vae(seed, dtype=dtype, encoder=False, **MODELS[model])
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, torch.nn.GroupNorm):  # not the identity that a fresh one is
                module.weight.normal_(1.0, 0.3)
                module.bias.normal_(0.0, 0.3)
    return vae


def latents(lh: int, lw: int, batch: int = 1, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 32, lh, lw, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pixels(image: torch.Tensor) -> Any:
    return ((image.double() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_is_no_larger_than_that_of_diffusers(dtype: str) -> None:
    ours_squared = theirs_squared = 0.0
    for model in MODELS:
        for seed in range(2):
            vae = build(model, getattr(torch, dtype), seed)
            raw = latents(8, 10, dtype=getattr(torch, dtype), seed=seed)
            truth = true_decode(vae, raw)
            with torch.no_grad():
                theirs_squared += (rms(vae.decode(raw).sample.double() - truth) / rms(truth)) ** 2
            ours = ExactDecoder(vae, kernels="torch", block_values=20_000).decode(raw)
            ours_squared += (rms(ours.double() - truth) / rms(truth)) ** 2
    ratio = (ours_squared / theirs_squared) ** 0.5
    assert ratio <= error_ratio(dtype), ratio


@every_model
@needs_vector_code
def test_winograd_changes_hardly_a_byte(model: str) -> None:
    """32 pixels each way is where Winograd begins."""
    vae, raw = build(model), latents(40, 36)
    engine = ExactDecoder(vae, kernels="winograd")
    assert engine.plan(40, 36).kernels == "winograd"
    found = level_difference(pixels(engine.decode(raw)), pixels(true_decode(vae, raw)))
    assert found.largest <= WINOGRAD_LEVELS.bound
    assert found.changed <= WINOGRAD_CHANGED.bound, found


@every_model
@pytest.mark.parametrize("kernels", KERNELS)
def test_same_bits_for_any_limit_batch_and_number_of_threads(model: str, kernels: str) -> None:
    size = (34, 33) if kernels == "winograd" else (12, 10)
    vae, raw = build(model), latents(*size, batch=2)
    free = ExactDecoder(vae, kernels=kernels, block_values=20_000)
    whole = free.decode(raw)
    low, high = free.smallest_limit(*size, 2), free.plan(*size, 2).peak_bytes
    seen = {free.plan(*size, 2).rungs}
    for step in range(3):
        limit = low + (high - low) * step // 3
        tight = ExactDecoder(vae, kernels=kernels, memory_limit=limit, block_values=20_000)
        plan = tight.plan(*size, 2)
        assert plan.peak_bytes <= limit
        seen.add(plan.rungs)
        assert torch.equal(tight.decode(raw), whole), limit
    assert len(seen) > 1
    with pytest.raises(MemoryLimitError, match=f"at least {low} bytes"):
        ExactDecoder(vae, kernels=kernels, memory_limit=low - 1, block_values=20_000).decode(raw)
    assert torch.equal(free.decode(raw[1:])[0], whole[1])
    if kernels == "winograd":  # MKL picks another product of few rows for direct ones (docs/engine.md)
        torch.set_num_threads(2)  # `one_thread` gives back what was there
        assert torch.equal(free.decode(raw), whole)


def test_the_decoder_is_the_pipelines_picture_exactly_computed() -> None:
    """The whole path: packed tokens with ids in any order, exact engine, against the real pipeline."""
    pipe = flux2_pipeline(flux2_vae())
    tokens, expected = (run(pipe, 48, 80, 1, kind) for kind in ("latent", "pil"))
    order = torch.randperm(15, generator=torch.Generator().manual_seed(3))
    ours = Decoder(pipe.vae).decode(tokens[:, order], latent_ids=ids_of(3, 5, 1)[:, order], output_type="uint8")
    found = level_difference(ours, np.stack([np.asarray(picture) for picture in expected]))
    assert found.largest <= WINOGRAD_LEVELS.bound
    assert found.changed <= WINOGRAD_CHANGED.bound, found


def test_installed_into_flux2_pipeline() -> None:
    pipe = flux2_pipeline(flux2_vae())
    before = run(pipe, 64, 48, 1, "pt")
    with install(pipe.vae, memory_limit="1GiB") as handle:
        inside = run(pipe, 64, 48, 1, "pt")
        assert handle.decoder is not None
        assert handle.encoder is not None
        assert float((inside - before).abs().max()) < 1e-4
        assert not torch.equal(inside, before), "another engine's last bits"
    assert torch.equal(run(pipe, 64, 48, 1, "pt"), before)


# -- SD, SDXL, SD3 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "scaling", "shift", "post_quant"),
    [(4, 0.18215, None, True), (4, 0.13025, None, True), (16, 1.5305, 0.0609, False)],
    ids=["SD", "SDXL", "SD3"],
)
def test_stable_diffusions(channels: int, scaling: float, shift: float | None, post_quant: bool) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=scaling,
        shift_factor=shift,
        use_post_quant_conv=post_quant,
        use_quant_conv=post_quant,
    ).eval()
    z = torch.randn(2, channels, 5, 7)
    raw = z / scaling if shift is None else (z / scaling) + shift
    with torch.no_grad():
        expected = vae.decode(raw, return_dict=False)[0]
    assert torch.equal(Decoder(vae, engine="diffusers").decode_raw(z), expected)
    exact = Decoder(vae).decode_raw(z)
    assert float((exact - expected).abs().max()) < 1e-4
    with install(vae), torch.no_grad():
        assert torch.equal(vae.decode(raw).sample, exact)


@pytest.mark.parametrize("wanted", ["float32", torch.float32])
def test_rescaling_in_float32_is_brias(wanted: str | torch.dtype) -> None:
    """BriaPipeline: `latents.to(float32) / scaling_factor + shift_factor`, then the VAE's dtype."""
    from models import random_vae

    vae = random_vae(dtype=torch.bfloat16)
    z = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    raw = ((z.to(torch.float32) / vae.config.scaling_factor) + vae.config.shift_factor).bfloat16()
    with torch.no_grad():
        expected = vae.decode(raw, return_dict=False)[0]
    assert torch.equal(Decoder(vae, engine="diffusers", rescale_dtype=wanted).decode_raw(z), expected)
    assert not torch.equal(Decoder(vae, engine="diffusers").decode_raw(z), expected), "the order of casting shows"
    with pytest.raises(InvalidOptionError, match="rescale_dtype: got 'int8'"):
        Decoder(vae, rescale_dtype="int8")


# -- previews ------------------------------------------------------------------------------------------------------


def test_a_preview_says_that_it_is_one_wherever_it_shows() -> None:
    decoder = Decoder(tiny_vae(16))
    assert (decoder.approximate, decoder.engine.name) == (True, "preview")
    assert not Decoder(flux2_vae()).approximate
    with pytest.warns(ApproximateWarning, match="approximate preview by AutoencoderTiny"):
        picture = decoder.decode(torch.randn(1, 6, 64), height=32, width=48)[0]
    assert "approximate preview" in picture.info["Comment"]
    plan = decoder.plan(32, 48)
    assert "approximate preview" in plan.kernels_note
    assert "approximate preview" in str(plan)


def test_taef2_takes_flux2s_latents_as_they_are() -> None:
    tiny = tiny_vae(32)
    tokens = torch.randn(1, 6, 128)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    decoder = Decoder(tiny)
    with torch.no_grad():
        expected = tiny.decode(unpack_latents(tokens, 32, 48)).sample
    with pytest.warns(ApproximateWarning):
        ours = decoder.decode_raw(tokens[:, order], latent_ids=ids_of(2, 3, 1)[:, order])
    assert torch.equal(ours, expected)
    with pytest.raises(InvalidLatentsError, match="looks like FLUX.1"), pytest.warns(ApproximateWarning):
        decoder.decode(torch.randn(1, 6, 64), height=32, width=48)


def test_a_previews_bits_do_not_depend_on_its_batch_and_its_limit_is_kept() -> None:
    decoder = Decoder(tiny_vae(16), memory_limit="64MB")
    z = torch.randn(3, 16, 8, 6)
    with pytest.warns(ApproximateWarning):
        together, alone = decoder.decode_raw(z), decoder.decode_raw(z[1:2])
    assert torch.equal(alone[0], together[1])
    needed = decoder.plan(64, 48, 3).peak_bytes
    assert decoder.engine.smallest_limit(8, 6, 3) == needed
    small = Decoder(tiny_vae(16), memory_limit=needed - 1)
    with pytest.raises(MemoryLimitError, match=f"needs {needed} bytes"), pytest.warns(ApproximateWarning):
        small.decode_raw(z)


def test_a_preview_takes_no_more_than_its_plan_says() -> None:
    """TAEF1's own widths; the plan is what a limit is held against. Small maps are where glibc keeps what was freed."""
    cases = [{"size": [64, 64]}, {"size": [96, 80]}, {"size": [32, 32]}, {"size": [16, 64]}, {"size": [32, 32]}]
    job = {"preview": True, "vae": {"latent_channels": 16}, "threads": 2, "cases": cases}
    for case, row in zip(cases, measure(job), strict=True):
        assert row["measured"] <= row["predicted"], (case, row)
        if min(case["size"]) >= 64:
            assert row["measured"] >= (1 - PREVIEW_PEAK.bound) * row["predicted"], (case, row)


def test_a_preview_trims_the_heap_before_every_block_and_leaves_the_module_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What glibc keeps differs from run to run, so whether the peak would be kept without is chance."""
    tiny, trimmed = tiny_vae(16), []
    monkeypatch.setattr("fluxvae.engine.preview.trim_heap", lambda: trimmed.append(1))
    with pytest.warns(ApproximateWarning):
        Decoder(tiny).decode_raw(torch.randn(1, 16, 8, 6))
    assert len(trimmed) == len(tiny.decoder.layers) > 5
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_a_preview_is_refused_in_a_dtype_the_processor_has_no_arithmetic_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxvae.engine.preview.computes_directly", lambda dtype, device: dtype != torch.bfloat16)
    tiny = tiny_vae(16)
    torch.nn.Module.to(tiny, torch.bfloat16)
    with pytest.raises(InvalidOptionError, match="dtype: got bfloat16 for a preview .* load it with dtype='float32'"):
        Decoder(tiny)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "exact"}, "engine: got 'exact' for AutoencoderTiny; a preview is approximate"),
        ({"kernels": "torch"}, "kernels: got 'torch' with engine='preview'"),
        ({"tiling": True}, "tiling: got True with engine='preview'"),
        ({"engine": "magic"}, "engine: got 'magic'"),
    ],
)
def test_what_previews_cannot_honour_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        Decoder(tiny_vae(), **options)


def test_previews_are_for_tiny_autoencoders_and_exact_is_not() -> None:
    with pytest.raises(InvalidOptionError, match="engine: got 'preview' for AutoencoderKLFlux2"):
        Decoder(flux2_vae(), engine="preview")
    with pytest.raises(InvalidOptionError, match="AutoencoderTiny"):
        install(tiny_vae())


# -- full widths ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("decoder_widths", [None, SMALL_DECODER], ids=["full", "small decoder"])
def test_full_widths(decoder_widths: tuple[int, ...] | None) -> None:
    """Error, bytes and bits at 160 pixels, where float64 is still affordable."""
    vae = flux2_vae(
        widths=(128, 256, 512, 512), decoder_widths=decoder_widths, layers_per_block=2, encoder=False
    )  # fmt: skip
    raw = latents(20, 20)
    truth = true_decode(vae, raw)
    with torch.no_grad():
        theirs = rms(vae.decode(raw).sample.double() - truth)
    assert rms(ExactDecoder(vae, kernels="torch").decode(raw).double() - truth) <= theirs
    winograd = ExactDecoder(vae, kernels="winograd")
    image = winograd.decode(raw)
    found = level_difference(pixels(image), pixels(truth))
    assert found.largest <= WINOGRAD_LEVELS.bound
    assert found.changed <= WINOGRAD_CHANGED.bound, found
    tight = ExactDecoder(vae, kernels="winograd", memory_limit=winograd.smallest_limit(20, 20))
    assert torch.equal(tight.decode(raw), image)
