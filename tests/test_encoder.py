"""`Encoder`: what it takes and refuses, what it gives, there and back, and that nothing ambient changes it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from family_models import flux2_vae, tiny_vae
from fluxvae import Decoder, Encoder, InvalidImagesError, InvalidOptionError, MemoryLimitError, pack_latents
from fluxvae.checkpoints import ASSETS
from fluxvae.engine.preview import ApproximateWarning
from fluxvae.errors import DecodeCancelled, NonFiniteOutputError
from fluxvae.pixels import check_images, to_pixels
from fluxvae.verify.tolerances import THERE_AND_BACK
from models import random_vae

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (2, 48, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(random_vae())


def pil(array: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray(array)


# -- pixels --------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    more=st.tuples(st.integers(0, 15), st.integers(0, 15)),
    form=st.sampled_from(["pil", "grey", "array", "tensor", "half"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_pixels_are_those_of_diffusers(
    size: tuple[int, int], more: tuple[int, int], form: str, dtype: torch.dtype
) -> None:
    """Resized to the multiples below where they do not fit, by diffusers' own way for each class."""
    height, width = (16 * side + extra for side, extra in zip(size, more, strict=True))
    array = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = VaeImageProcessor(vae_scale_factor=16, do_convert_rgb=True)
    given: dict[str, Any] = {
        "pil": pil(array),
        "grey": pil(array[..., 0]),
        "array": array[None] / np.float32(255),
        "tensor": torch.from_numpy(array).permute(2, 0, 1)[None] / 255,
        "half": (torch.from_numpy(array).permute(2, 0, 1)[None] / 255).bfloat16(),
    }
    expected = processor.preprocess(given[form]).to(dtype)
    assert torch.equal(to_pixels(check_images(given[form], 16, 3, resize=True), dtype, CPU), expected)


def test_large_pictures_are_converted_in_bands() -> None:
    array = RNG.integers(0, 256, (720, 1600, 3), dtype=np.uint8)
    expected = VaeImageProcessor(vae_scale_factor=16).preprocess(pil(array))
    for form in (pil(array), array, torch.from_numpy(array).permute(2, 0, 1) / 255):
        assert torch.equal(to_pixels(check_images(form, 16, 3), torch.float32, CPU), expected)


def test_pixels_lie_as_those_of_diffusers() -> None:
    """Channels last, if they come from a picture or an array: the bits of a convolution depend on it."""
    processor = VaeImageProcessor(vae_scale_factor=16)
    tensors = torch.rand(2, 3, 48, 80)
    for form in (pil(PICTURES[0]), PICTURES / np.float32(255), tensors, tensors.to(memory_format=torch.channels_last)):
        pixels = to_pixels(check_images(form, 16, 3), torch.float32, CPU)
        assert pixels.stride() == processor.preprocess(form).stride()


def test_every_form_of_a_picture_gives_the_same_latents(encoder: Encoder) -> None:
    expected = encoder.encode([pil(one) for one in PICTURES])
    assert torch.equal(encoder.encode(PICTURES), expected)
    assert torch.equal(encoder.encode(torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 255), expected)
    assert torch.equal(encoder.encode(PICTURES[1]), expected[1:])
    assert torch.equal(encoder.encode(pil(PICTURES[1])), expected[1:])


def with_mode(mode: str) -> Image.Image:
    image = pil(PICTURES[0])
    if mode == "RGBA":
        image.putalpha(pil(PICTURES[0][..., 0]))
        return image
    if mode == "transparent P":
        image = image.convert("P")
        image.info["transparency"] = 0
        return image
    return image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "transparent P", "CMYK", "I;16", "F", "LAB"])
def test_modes_that_would_be_changed_are_refused(encoder: Encoder, mode: str) -> None:
    said = "transparent pixels; latents" if mode in ("RGBA", "transparent P") else "expected RGB or 8-bit grey"
    with pytest.raises(InvalidImagesError, match=f"images: got mode .* for picture 1, .*{said}"):
        encoder.encode([pil(PICTURES[0]), with_mode(mode)])


def test_opaque_alpha_and_grey_are_taken(encoder: Encoder) -> None:
    opaque = pil(PICTURES[0])
    expected = encoder.encode(opaque)
    opaque.putalpha(255)
    assert torch.equal(encoder.encode(opaque), expected)
    grey = pil(PICTURES[0]).convert("L")
    assert torch.equal(encoder.encode(grey), encoder.encode(grey.convert("RGB")))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ("picture.png", "got str, expected a PIL image"),
        ([], "empty list"),
        ([PICTURES[0]], "got ndarray for picture 0"),
        ([pil(PICTURES[0]), pil(PICTURES[0, :32])], "48x80 .* for picture 0 and 32x80 .* for picture 1"),
        (PICTURES.transpose(0, 3, 1, 2), r"array of shape \(2, 3, 48, 80\), expected \(batch, height, width, 3\)"),
        (torch.zeros(2, 48, 80, 3), r"tensor of shape .*, expected \(batch, 3, height, width\)"),
        (torch.zeros(48, 80), "tensor of shape"),
        (PICTURES[:0], "array of shape"),
        (PICTURES.astype(np.int32), "array of int32, expected uint8, or floats"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "tensor of torch.uint8, expected floats"),
        (PICTURES.astype(np.float32), "values from 0 to 255, expected floats in"),
        (torch.full((1, 3, 16, 16), -0.5), "values from -0.5 to -0.5"),
        (torch.full((1, 3, 16, 16), torch.nan), "values from nan"),
        (pil(PICTURES[0, :40, :72]), "got 40x72 .* multiples of 16: the nearest are 32x64 .* or 48x80 .* resize=True"),
        (pil(PICTURES[0, :8]), "got 8x80 .* the nearest are 16x80"),
    ],
)
def test_what_cannot_be_encoded_is_refused_by_name(encoder: Encoder, images: Any, said: str) -> None:
    with pytest.raises(InvalidImagesError, match=f"images: .*{said}"):
        encoder.encode(images)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"packed": 1}, "packed: got 1"),
        ({"raw": None}, "raw: got None"),
        ({"resize": "yes"}, "resize: got 'yes'"),
        ({"sample": True}, "sample: got bool, expected a torch.Generator"),
        ({"sample": [torch.Generator()]}, "sample: got 1 generators for 2 pictures"),
        ({"scaling_factor": "a"}, "scaling_factor: got 'a'"),
        ({"batch_norm_eps": 1e-3}, "batch_norm_eps"),
        ({"raw": True, "scaling_factor": 2.0}, "scaling_factor"),
    ],
)
def test_options_that_mean_nothing_are_refused(encoder: Encoder, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        encoder.encode(PICTURES, **options)


# -- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_vae, flux2_vae])
def test_layouts(make: Any) -> None:
    vae = make()
    encoder, channels = Encoder(vae), vae.config.latent_channels
    raw = encoder.encode(PICTURES, packed=False, raw=True)
    assert raw.shape == (2, channels, 6, 10)
    mean, logvar = encoder.moments(PICTURES)
    assert torch.equal(mean, raw)
    assert logvar.shape == mean.shape
    assert torch.equal(encoder.encode(PICTURES, raw=True), pack_latents(raw))
    packed, latents = encoder.encode(PICTURES), encoder.encode(PICTURES, packed=False)
    assert packed.shape == (2, 15, 4 * channels)
    if channels == 16:
        assert torch.equal(latents, (raw - 0.1159) * 0.3611)
        assert torch.equal(packed, pack_latents(latents))
        other = encoder.encode(PICTURES, packed=False, scaling_factor=2.0, shift_factor=-1.0)
        assert torch.equal(other, (raw + 1.0) * 2.0)
    else:
        assert latents.shape == (2, 4 * channels, 3, 5)
        assert torch.equal(packed, latents.flatten(2).transpose(1, 2))
        assert not torch.equal(encoder.encode(PICTURES, batch_norm_eps=0.1), packed)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("make", [random_vae, flux2_vae])
def test_there_and_back_for_every_layout(make: Any, raw: bool, packed: bool) -> None:
    """The decoder reads whatever the encoder gives: the picture is that of the mean."""
    vae = make()
    encoder, decoder = Encoder(vae), Decoder(vae)
    latents = encoder.encode(PICTURES, raw=raw, packed=packed)
    expected = decoder.engine.decode(encoder.moments(PICTURES)[0])  # type: ignore[union-attr]
    picture = decoder.decode_raw(latents, height=48, width=80, raw=True if raw else None)
    assert torch.allclose(picture, expected, atol=2e-5)


def test_sizes_of_eight_where_nothing_is_packed(encoder: Encoder) -> None:
    assert encoder.encode(PICTURES[:, :40, :72], packed=False).shape == (2, 16, 5, 9)
    with pytest.raises(InvalidImagesError, match="multiples of 8"):
        encoder.encode(PICTURES[:, :41], packed=False)
    with pytest.raises(InvalidImagesError, match="multiples of 16"):
        Encoder(flux2_vae()).encode(PICTURES[:, :40], packed=False)
    assert Encoder(flux2_vae()).encode(PICTURES[:, :40], packed=False, raw=True).shape == (2, 32, 5, 10)


def test_a_sample_is_drawn_as_diffusers_draws(encoder: Encoder) -> None:
    mean, logvar = encoder.moments(PICTURES)
    latents = encoder.encode(PICTURES, raw=True, packed=False, sample=torch.Generator().manual_seed(5))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(latents, mean + torch.exp(0.5 * logvar) * noise)
    each = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    seen: list[tuple[int, int]] = []
    latents = encoder.encode(PICTURES, raw=True, packed=False, sample=each, progress=lambda *at: seen.append(at))
    for index, seed in enumerate((1, 2)):
        noise = torch.randn(mean[:1].shape, generator=torch.Generator().manual_seed(seed))[0]
        assert torch.equal(latents[index], mean[index] + torch.exp(0.5 * logvar[index]) * noise)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_factors_that_overflow_are_no_latents(encoder: Encoder) -> None:
    with pytest.raises(NonFiniteOutputError, match=r"by scaling them with {'scaling_factor': 1e\+38"):
        encoder.encode(PICTURES, scaling_factor=1e38, shift_factor=-1e3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_are_those_of_diffusers_distribution(dtype: str) -> None:
    vae = random_vae(dtype=getattr(torch, dtype))
    with torch.no_grad():  # so that the clamp of the log variance shows
        vae.encoder.conv_out.bias[16:].add_(torch.linspace(-60, 60, 16).to(vae.dtype))
    mean, logvar = Encoder(vae, engine="diffusers").moments(PICTURES)
    found = vae.encode(to_pixels(check_images(PICTURES, 8, 3), vae.dtype, CPU)).latent_dist
    assert (mean.dtype, logvar.dtype) == (torch.float32, torch.float32)
    assert torch.equal(mean, found.mean.float())
    assert torch.equal(logvar, found.logvar.float())
    assert float(logvar.min()) == -30
    ours = Encoder(vae).moments(PICTURES)
    assert torch.allclose(ours[0], mean, atol=1e-4 if dtype == "float32" else 0.05)


def test_there_and_back_on_the_demo_checkpoint() -> None:
    """Pictures of several kinds and sizes, by PSNR, both ways by us and both ways by diffusers."""
    vae = AutoencoderKL.from_pretrained(ASSETS / "demo").eval().requires_grad_(False)
    encoder, decoder = Encoder.from_pretrained("demo"), Decoder.from_pretrained("demo")
    for picture in (data.astronaut()[:400, :304], data.coffee()[:160, :320], data.chelsea()[:288, :448]):
        size = {"height": picture.shape[0], "width": picture.shape[1]}
        latents = encoder.encode(picture)
        ours = decoder.decode(latents, **size, output_type="uint8")[0]
        pixels = to_pixels(check_images(picture, 16, 3), torch.float32, CPU)
        with torch.no_grad():
            back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0]
        theirs = ((back.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
        psnr = [10 * np.log10(255**2 / np.square(one.astype(np.float64) - picture).mean()) for one in (ours, theirs)]
        assert abs(psnr[0] - psnr[1]) <= THERE_AND_BACK.bound
        assert psnr[0] > 24


# -- which model, which half ---------------------------------------------------------------------------------------


def test_only_the_needed_half_is_loaded() -> None:
    encoder, decoder = Encoder.from_pretrained("demo"), Decoder.from_pretrained("demo")
    assert encoder.vae.decoder is None
    assert decoder.vae.encoder is None
    with pytest.raises(InvalidOptionError, match="without its decoder, as fluxvae.Encoder.from_pretrained loads it"):
        Decoder(encoder.vae)
    with pytest.raises(InvalidOptionError, match="without its encoder, as fluxvae.Decoder.from_pretrained loads it"):
        Encoder(decoder.vae)


def test_a_preview_says_that_it_is_one() -> None:
    for channels in (16, 32):
        vae = tiny_vae(channels)
        encoder = Encoder(vae)
        with pytest.warns(ApproximateWarning, match="encode: approximate latents by AutoencoderTiny"):
            latents = encoder.encode(PICTURES)
        pixels = to_pixels(check_images(PICTURES, 16, 3), torch.float32, CPU)
        with torch.no_grad():
            expected = torch.cat([vae.encode(one).latents for one in pixels.split(1)])
        assert torch.equal(latents, pack_latents(expected))
        assert "approximate" in str(encoder.plan(48, 80))
        assert encoder.approximate
        with pytest.raises(InvalidOptionError, match="moments: an AutoencoderTiny"):
            encoder.moments(PICTURES)
        with pytest.raises(InvalidOptionError, match="raw: got True for an AutoencoderTiny"):
            encoder.encode(PICTURES, raw=True)
        with pytest.raises(InvalidOptionError, match="sample: got a generator for an AutoencoderTiny"):
            encoder.encode(PICTURES, sample=torch.Generator())


def test_a_limit_is_kept_or_refused_before_any_work() -> None:
    vae = random_vae()
    free = Encoder(vae)
    expected, smallest = free.encode(PICTURES), free.engine.smallest_limit(48, 80, 2)  # type: ignore[union-attr]
    assert torch.equal(Encoder(vae, memory_limit=smallest).encode(PICTURES), expected)
    started: list[object] = []
    with pytest.raises(MemoryLimitError, match=f"memory_limit: got {smallest - 1} bytes"):
        Encoder(vae, memory_limit=smallest - 1).encode(PICTURES, progress=lambda *at: started.append(at))
    assert not started
    assert free.plan(48, 80, 2).peak_bytes >= smallest
    with pytest.raises(InvalidOptionError, match="no memory plan"):
        Encoder(vae, engine="diffusers").plan(48, 80)


def test_progress_and_cancelling(encoder: Encoder) -> None:
    seen: list[tuple[int, int]] = []
    encoder.encode(PICTURES, progress=lambda *at: seen.append(at))
    total = encoder.plan(48, 80, 2).total_blocks
    assert seen == [(done, total) for done in range(total + 1)]
    with pytest.raises(DecodeCancelled, match="encode: cancelled after 0"):
        encoder.encode(PICTURES, cancel=lambda: True)
    with pytest.raises(DecodeCancelled, match="encode: cancelled"):
        Encoder(encoder.vae, engine="diffusers").encode(PICTURES, cancel=lambda: True)


def test_a_copy_gives_the_same_latents(encoder: Encoder) -> None:
    expected = encoder.encode(PICTURES)
    for one in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(one.encode(PICTURES), expected)
        assert one.plan(48, 80).peak_bytes == encoder.plan(48, 80).peak_bytes


def test_nothing_ambient_changes_the_latents(encoder: Encoder) -> None:
    expected = encoder.encode(PICTURES)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
            latents = encoder.encode(PICTURES)
    finally:
        torch.set_default_dtype(before)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, expected)


def test_nothing_is_warned_about_in_an_ordinary_encode(encoder: Encoder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(PICTURES)
