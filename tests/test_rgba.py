"""A VAE whose pictures have four channels: RGBA out of latents and into them, by diffusers' bits, and never less.

`batch/test_rgba.py` has files and the command line, `serve/test_rgba.py` the servers and their clients.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import save_file

from fluxvae import Decoder, Encoder, InvalidImagesError, InvalidOptionError, MemoryLimitError
from fluxvae.pictures import encode, postprocess, postprocess_bytes
from fluxvae.pixels import check_images, check_pixels, to_pixels
from models import random_vae

PROCESSOR = VaeImageProcessor(vae_scale_factor=16, vae_latent_channels=16)  # 4, the default, would be those of latents
CPU = torch.device("cpu")
LATENTS = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 4), np.uint8)
PICTURES[:, :8, :, 3] = 0


def pil(array: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray(array)


@pytest.fixture(scope="module", params=["exact", "diffusers"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return Decoder(random_vae(channels=4), engine=request.param)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(random_vae(channels=4), engine="diffusers")


# -- out ---------------------------------------------------------------------------------------------------------------


def test_pictures_have_the_four_channels_of_diffusers(decoder: Decoder) -> None:
    raw = decoder.decode_raw(LATENTS)
    assert (decoder.picture_channels, raw.shape) == (4, (2, 4, 32, 48))
    expected = decoder.vae.decode(LATENTS / 0.3611 + 0.1159).sample
    if decoder.engine.name == "diffusers":
        assert torch.equal(raw, expected)
    torch.testing.assert_close(raw, expected, atol=1e-4, rtol=0)
    found: Any = decoder.decode(LATENTS)
    theirs = PROCESSOR.postprocess(raw, output_type="pil")
    assert [image.mode for image in found] == ["RGBA", "RGBA"]
    assert [image.tobytes() for image in found] == [image.tobytes() for image in theirs]
    np.testing.assert_array_equal(decoder.decode(LATENTS, output_type="uint8"), np.stack([*map(np.asarray, theirs)]))
    np.testing.assert_array_equal(
        decoder.decode(LATENTS, output_type="np"), PROCESSOR.postprocess(raw, output_type="np")
    )
    assert torch.equal(decoder.decode(LATENTS, output_type="pt"), PROCESSOR.postprocess(raw, output_type="pt"))


def test_every_channel_counts_for_the_limit() -> None:
    """What is held beside the plan is the image and what is made of it: of RGBA a third more than of RGB."""
    rgb, rgba = (postprocess_bytes("uint8", 1, 64, 64, 4, channels) for channels in (3, 4))
    assert 3 * rgba == 4 * rgb
    image = 4 * 256 * 256
    limit = 4 * image + postprocess_bytes("np", 1, 256, 256, 4, 4) - 1
    decoder = Decoder(random_vae(channels=4), memory_limit=limit)
    with pytest.raises(MemoryLimitError, match=f"take {limit + 1} bytes by themselves"):
        decoder.decode(torch.zeros(1, 16, 32, 32), output_type="np")


def test_files_keep_alpha() -> None:
    picture = PICTURES[0]
    assert (picture[picture[..., 3] == 0, :3] > 0).any(), "the colours of transparent pixels are values like others"
    png, webp = (
        Image.open(io.BytesIO(encode(picture, format, quality))) for format, quality in (("png", None), ("webp", 90))
    )
    np.testing.assert_array_equal(np.asarray(png), picture)
    assert (png.mode, webp.mode) == ("RGBA", "RGBA")
    np.testing.assert_array_equal(np.asarray(webp)[..., 3], picture[..., 3])
    drawn = np.full((32, 48, 4), (200, 60, 30, 255), np.uint8)
    drawn[:16] = (20, 90, 220, 0)
    drawn[:16, :, :3] += np.arange(24, dtype=np.uint8).repeat(2)[:, None]
    seen = np.asarray(Image.open(io.BytesIO(encode(drawn, "webp")))).astype(int)
    near = np.r_[0:14, 18:32]  # WebP stores colours at half the resolution, so those of the edge mix
    assert np.abs(seen - drawn)[near].max() <= 4, "colours under transparent pixels are lossy, and not lost"


def test_jpeg_is_refused() -> None:
    with pytest.raises(
        InvalidOptionError, match="format: got 'jpeg' for pictures with alpha; expected 'png' or 'webp'"
    ):
        encode(PICTURES[0], "jpeg")
    assert encode(PICTURES[0][..., :3].copy(), "jpeg")


def test_a_vae_of_other_channels_is_refused_by_their_number() -> None:
    for kind in (Decoder, Encoder):
        with pytest.raises(
            InvalidOptionError, match="vae: got a AutoencoderKL for pictures of 1 channels; expected 3,"
        ):
            kind(random_vae(channels=1))


# -- in ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("form", ["pil", "array", "tensor", "half"])
def test_pixels_are_those_of_diffusers(form: str, resize: bool) -> None:
    """As QwenImageLayeredPipeline makes them of ``image.convert("RGBA")``: resized in RGBA, and not premultiplied."""
    array = PICTURES[:, :31, :40] if resize else PICTURES
    floats = array.astype(np.float32) / 255
    given: Any = {
        "pil": [pil(one) for one in array],
        "array": floats,
        "tensor": torch.from_numpy(floats).permute(0, 3, 1, 2).contiguous(),
        "half": torch.from_numpy(floats).permute(0, 3, 1, 2).bfloat16(),
    }[form]
    expected = PROCESSOR.preprocess(given)
    assert expected.shape[1] == 4
    found = to_pixels(check_images(given, 16, 4, resize=resize), torch.float32, CPU)
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "PA", "RGBa", "La", "transparent RGB"])
def test_other_pictures_become_rgba_as_by_convert(mode: str) -> None:
    picture = pil(PICTURES[0])
    if mode == "transparent RGB":
        picture = pil(PICTURES[0, ..., :3].copy())
        picture.info["transparency"] = tuple(map(int, PICTURES[0, 0, 0, :3]))
    else:
        for step in {"P": ["RGB", "P"], "PA": ["P", "PA"], "La": ["LA", "La"]}.get(mode, [mode]):
            picture = picture.convert(step)
    as_pillow = (picture.convert("LA") if mode == "La" else picture).convert("RGBA")
    found = to_pixels(check_images(picture, 16, 4), torch.float32, CPU)
    assert torch.equal(found, PROCESSOR.preprocess(as_pillow))
    opaque = mode in ("RGB", "L", "1", "P")
    assert bool((found[:, 3] == 1).all()) == opaque


def test_three_channels_are_opaque_in_every_form(encoder: Encoder) -> None:
    colours = np.ascontiguousarray(PICTURES[..., :3])
    expected = encoder.encode([pil(one).convert("RGBA") for one in colours])
    floats = torch.from_numpy(colours).permute(0, 3, 1, 2) / 255
    for images in ([pil(one) for one in colours], colours, colours.astype(np.float32) / 255, floats):
        found = encoder.encode(images)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # a layout's last bits, as in diffusers
    pixels = to_pixels(check_pixels(floats * 2 - 1, 8, 4), torch.float32, CPU)
    assert torch.equal(pixels, torch.cat([floats * 2 - 1, torch.ones(2, 1, 32, 48)], 1))


def test_latents_are_diffusers_and_the_exact_engines(encoder: Encoder) -> None:
    pictures = [pil(one) for one in PICTURES]
    mean, logvar = encoder.moments(pictures)
    theirs = encoder.vae.encode(PROCESSOR.preprocess(pictures)).latent_dist
    assert torch.equal(mean, theirs.mean)
    assert torch.equal(logvar, theirs.logvar)
    exact = Encoder(encoder.vae, engine="exact")
    torch.testing.assert_close(exact.moments(pictures)[0], mean, atol=1e-4, rtol=0)
    clear = PICTURES.copy()
    clear[..., 3] = 255 - clear[..., 3]
    assert not torch.allclose(exact.moments(clear)[0], mean, atol=1e-2), "the fourth channel is looked at"


def test_a_vae_of_three_channels_takes_no_fourth() -> None:
    encoder = Encoder(random_vae(), engine="diffusers")
    with pytest.raises(InvalidImagesError, match="mode RGBA for picture 0, with transparent pixels; latents hold none"):
        encoder.encode(pil(PICTURES[0]))
    for images in (PICTURES, torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 255):
        with pytest.raises(
            InvalidImagesError, match=r"expected \(batch, .*; if the fourth is alpha, latents hold none"
        ):
            encoder.encode(images)


def test_where_the_vae_is_not_known_alpha_is_kept_if_there_is_any() -> None:
    opaque, clear = pil(PICTURES[0]).convert("RGB").convert("RGBA"), pil(PICTURES[0])
    assert check_images([opaque, opaque], 16, None).channels == 3
    together = check_images([opaque, clear], 16, None)
    assert (together.channels, [image.mode for image in together.values]) == (4, ["RGB", "RGBA"])
    assert check_images(PICTURES, 16, None).channels == 4
    assert check_images(PICTURES[..., :3], 16, None).channels == 3


def test_there_and_back() -> None:
    vae = random_vae(channels=4)
    latents = Encoder(vae).encode(pil(PICTURES[0]))
    [image] = Decoder(vae).decode(latents, height=32, width=48)
    assert (image.mode, image.size) == ("RGBA", (48, 32))
    assert postprocess(torch.zeros(1, 4, 2, 2), "uint8").shape == (1, 2, 2, 4)


def test_an_encoder_for_rgba_is_told_by_its_tensors(tmp_path: Path) -> None:
    """A single file has no config.json that says how many channels its pictures have."""
    vae = random_vae(channels=4)
    save_file({name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, tmp_path / "vae.safetensors")
    factors = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    encoder = Encoder.from_pretrained(tmp_path / "vae.safetensors", device="cpu", **factors)
    pixels = torch.rand(1, 4, 32, 48, generator=torch.Generator().manual_seed(0))
    assert encoder.picture_channels == 4
    assert torch.equal(encoder.encode(pixels), Encoder(vae).encode(pixels))
