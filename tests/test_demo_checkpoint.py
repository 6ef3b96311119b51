"""The checkpoint and the latents in the package give the right picture, and a wrong decode of them does not.

With random weights every image is noise, in which nobody sees a swapped channel. In these pictures it shows: the right
decode is better than the bar of 26 dB, and every mix-up that is tried below is worse.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open

from fluxvae import Decoder, pack_latents, unpack_latents
from fluxvae.checkpoints import ASSETS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from demo_pictures import held_out, open_picture, psnr, to_tensor
from make_demo_latents import centre

BAR = 26.0  # dB
WEIGHTS = ASSETS / "demo" / "diffusion_pytorch_model.safetensors"
LATENTS = sorted((ASSETS / "latents").glob("*.safetensors"))


def read(name: str) -> tuple[torch.Tensor, int, int]:
    (path,) = (ASSETS / "latents").glob(f"{name}_*.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        return file.get_tensor("latents").float(), int(metadata["height"]), int(metadata["width"])


def picture(decoder: Decoder, packed: torch.Tensor, height: int, width: int) -> np.ndarray:
    return np.asarray(decoder.decode(packed, height=height, width=width, output_type="uint8"))[0]


@pytest.fixture(scope="module")
def demo() -> Decoder:
    return Decoder.from_pretrained("demo", dtype="float32")


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(ASSETS / "demo", torch_dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["astronaut", "chelsea"])
def test_held_out_pictures_through_the_whole_path(demo: Decoder, name: str) -> None:
    packed, height, width = read(name)
    assert psnr(held_out(name), picture(demo, packed, height, width)) >= BAR


def test_packaged_weights_reach_the_bar_with_diffusers_alone(vae: AutoencoderKL) -> None:
    """Encoder and decoder, no packing, no code of ours: the weights themselves are good."""
    pixels = to_tensor(held_out("chelsea"))
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    error = ((decoded.clamp(-1, 1) - pixels) / 2).square().mean()
    assert -10 * error.log10() >= BAR


def permuted_channels(latents: torch.Tensor) -> torch.Tensor:
    return latents.roll(1, dims=1)


def transposed_patches(latents: torch.Tensor) -> torch.Tensor:
    """The four latents of a token in the order (0,0), (1,0), (0,1), (1,1): what a wrong unpack makes."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.transpose(3, 5).reshape(latents.shape)


def without_factors(latents: torch.Tensor) -> torch.Tensor:
    """What reaches the VAE when raw = latents: the inverse of the arithmetic that the decoder will apply."""
    return (latents - 0.1159) * 0.3611


def swapped_factors(latents: torch.Tensor) -> torch.Tensor:
    """raw = latents / shift + scale."""
    return (latents / 0.1159 + 0.3611 - 0.1159) * 0.3611


def multiplied(latents: torch.Tensor) -> torch.Tensor:
    """raw = latents * scale + shift."""
    return latents * 0.3611 * 0.3611


MISTAKES = [permuted_channels, transposed_patches, without_factors, swapped_factors, multiplied]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_bar_catches(demo: Decoder, mistake: Callable[[torch.Tensor], torch.Tensor]) -> None:
    packed, height, width = read("chelsea")  # the smoother picture, the harder one to catch a mistake in
    wrong = pack_latents(mistake(unpack_latents(packed, height, width)))
    assert psnr(held_out("chelsea"), picture(demo, wrong, height, width)) < BAR


def test_the_bar_catches_swapped_height_and_width(demo: Decoder) -> None:
    packed, height, width = read("coffee")
    assert height != width
    original = centre(open_picture("coffee.png"), height, width)
    right = psnr(original, picture(demo, packed, height, width))
    wrong = picture(demo, packed, width, height)
    assert wrong.shape == (width, height, 3)
    assert psnr(original.transpose(1, 0, 2), wrong) < BAR  # nor is it the picture on its side
    assert psnr(original, wrong.reshape(original.shape)) < BAR
    assert right > psnr(original, wrong.reshape(original.shape)) + 6  # while the right one is the picture


def test_latents_are_standard() -> None:
    """As FLUX's are: what is written for FLUX's latents (noise, previews, float16) fits these."""
    values = torch.cat([read(path.stem.split("_")[0])[0].flatten() for path in LATENTS])
    assert abs(values.mean()) < 0.2
    assert 0.7 < values.std() < 1.3


def test_weights_are_small_half_precision_and_finite() -> None:
    assert WEIGHTS.stat().st_size <= 8_000_000
    with safe_open(WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            assert tensor.dtype in (torch.float16, torch.bfloat16), key
            assert tensor.isfinite().all(), key


def test_activations_stay_far_below_the_limit_of_float16(vae: AutoencoderKL) -> None:
    """As they do not in some checkpoints, whose float16 pictures are black. (Real float16 is very slow on a CPU.)"""
    packed, height, width = read("astronaut")
    raw = unpack_latents(packed, height, width)[:, :, 16:32, 24:40] / 0.3611 + 0.1159
    largest: list[float] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: largest.append(output.abs().max().item()))
        for module in vae.decoder.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm | torch.nn.Linear)
    ]
    with torch.no_grad():
        vae.decode(raw)
    for hook in hooks:
        hook.remove()
    assert len(largest) > 20
    assert max(largest) < 1000


@pytest.mark.parametrize("path", LATENTS, ids=lambda path: path.stem)
def test_latents_files_say_what_they_are(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata, latents = file.metadata(), file.get_tensor("latents")
    height, width = int(metadata["height"]), int(metadata["width"])
    assert path.stem == f"{metadata['picture']}_{height}x{width}"
    assert latents.shape == (1, (height // 16) * (width // 16), 64)
    assert metadata["checkpoint"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def test_the_four_latents_are_there() -> None:
    assert len(LATENTS) >= 4
    assert sum(path.stat().st_size for path in LATENTS) < 3_000_000
