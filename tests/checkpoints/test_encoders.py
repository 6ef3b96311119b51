"""The encoder's half of every kind of source: the same latents as the whole model's, and nothing of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from checkpoint_files import bfl_state_dict, flux2_bfl_state_dict, old_names, sd_vae, to_fp8
from family_models import flux2_vae, tiny_vae
from fluxvae import CheckpointError, Decoder, Encoder
from fluxvae.checkpoints import load_vae
from fluxvae.checkpoints.previews import add_pools
from fluxvae.engine.way import ENCODE
from models import random_vae

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
pytestmark = [
    pytest.mark.filterwarnings("ignore::fluxvae.checkpoints.load.AssumedFamilyWarning"),
    pytest.mark.filterwarnings("ignore::fluxvae.engine.preview.ApproximateWarning"),
]


def same_as(vae: Any, path: Path, **options: Any) -> None:
    """The encoder of ``path`` encodes as ``vae`` does, and holds nothing that only a decoder needs."""
    encoder = Encoder.from_pretrained(path, device="cpu", **options)
    expected = Encoder(vae).encode(PICTURE)
    assert torch.equal(encoder.encode(PICTURE), expected)
    names = set(encoder.vae.state_dict())
    assert not [name for name in names if name.startswith(("decoder.", "post_quant_conv."))]
    assert not any(tensor.is_meta for tensor in encoder.vae.state_dict().values())


FILES: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, torch.Tensor]]]] = {
    "FLUX.1, BFL's names": (random_vae, bfl_state_dict),
    "FLUX.1, diffusers' names": (random_vae, lambda vae: dict(vae.state_dict())),
    "SD, old names": (sd_vae, old_names),
    "SD, BFL's names": (sd_vae, bfl_state_dict),
    "FLUX.2, BFL's names": (flux2_vae, flux2_bfl_state_dict),
    "FLUX.2, small decoder": (
        lambda: flux2_vae(decoder_widths=(32, 64, 64, 64)), lambda vae: flux2_bfl_state_dict(vae)
    ),
    "TAEF1": (tiny_vae, lambda vae: dict(vae.state_dict())),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_single_files(tmp_path: Path, kind: str) -> None:
    make, names = FILES[kind]
    vae = make()
    weights = {f"first_stage_model.{name}": tensor.contiguous().clone() for name, tensor in names(vae).items()}
    weights["model.diffusion_model.other"] = torch.zeros(3)
    save_file(weights, tmp_path / "vae.safetensors")
    same_as(vae, tmp_path / "vae.safetensors")


@pytest.mark.parametrize("make", [random_vae, sd_vae, flux2_vae, tiny_vae])
def test_folders(tmp_path: Path, make: Callable[[], Any]) -> None:
    vae = make()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    same_as(vae, tmp_path / "pipeline")
    same_as(vae, tmp_path / "pipeline", subfolder="vae")


@pytest.mark.parametrize("make", [random_vae, sd_vae])
def test_quant_conv_is_told_by_its_own_tensors(tmp_path: Path, make: Callable[[], Any]) -> None:
    """Not by the decoder's `post_quant_conv`: a file may have one without the other."""
    vae = make()
    weights = {name: tensor for name, tensor in bfl_state_dict(vae).items() if not name.startswith("post_quant_conv")}
    if make is random_vae:
        vae.quant_conv = torch.nn.Conv2d(32, 32, 1).requires_grad_(False)
        weights |= {f"quant_conv.{name}": tensor for name, tensor in vae.quant_conv.state_dict().items()}
    else:
        vae.post_quant_conv = None
    save_file(weights, tmp_path / "vae.safetensors")
    factors = {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.shift_factor}
    same_as(vae, tmp_path / "vae.safetensors", **factors)


def test_scaled_8_bit_floats(tmp_path: Path) -> None:
    vae = random_vae()
    stored, meant = to_fp8(bfl_state_dict(vae), "weight_scale", by_channel=True)
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(meant, tmp_path / "meant.safetensors")
    encoder = Encoder.from_pretrained(tmp_path / "fp8.safetensors", device="cpu")
    expected = Encoder.from_pretrained(tmp_path / "meant.safetensors", device="cpu")
    assert torch.equal(encoder.encode(PICTURE), expected.encode(PICTURE))


def taef2(tmp_path: Path) -> tuple[AutoencoderTiny, Path]:
    """TAEF2, whose encoder has the branches too, behind its last downsampling."""
    torch.manual_seed(3)
    tiny = tiny_vae(32)
    add_pools(tiny)
    add_pools(tiny, ENCODE)
    for module in tiny.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    path = tmp_path / "taef2.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tiny.state_dict().items()}, path)
    return tiny.requires_grad_(False), path


def test_taef2(tmp_path: Path) -> None:
    vae, path = taef2(tmp_path)
    same_as(vae, path)
    weights = load_file(path)

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight, bias = weights[f"encoder.layers.{name}.weight"], weights.get(f"encoder.layers.{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2)

    def block(index: int, x: torch.Tensor) -> torch.Tensor:
        if f"encoder.layers.{index}.pool.0.weight" in weights:
            norm = [weights[f"encoder.layers.{index}.pool.1.{part}"] for part in ("weight", "bias")]
            x = x + conv(f"{index}.pool.3", F.group_norm(conv(f"{index}.pool.0", x), 4, *norm).relu())
        inner = conv(f"{index}.conv.4", conv(f"{index}.conv.2", conv(f"{index}.conv.0", x).relu()).relu())
        return (inner + x).relu()

    pixels = torch.rand(1, 3, 32, 48) * 2 - 1
    x = block(1, conv("0", (pixels + 1) / 2))
    for start in (2, 6, 10):
        x = conv(str(start), x, 2)
        for index in range(start + 1, start + 4):
            x = block(index, x)
    assert torch.allclose(load_vae(path, way=ENCODE).encode(pixels).latents, conv("14", x), atol=1e-5)


def test_taesds_own_names(tmp_path: Path) -> None:
    """As they stand in a file that holds both halves; a file with one half has the decoder's or nothing."""
    vae = tiny_vae(16)
    weights = {}
    for name, tensor in vae.state_dict().items():
        half, _, rest = name.partition(".layers.")
        index, _, part = rest.partition(".")
        weights[f"taesd_{half}.{int(index) + (half == 'decoder')}.{part}"] = tensor.contiguous()
    save_file(weights, tmp_path / "taef1.safetensors")
    same_as(vae, tmp_path / "taef1.safetensors", family="flux1")
    assert Decoder.from_pretrained(tmp_path / "taef1.safetensors", family="flux1").approximate


@pytest.mark.parametrize("make", [random_vae, tiny_vae])
def test_a_decoder_alone_encodes_nothing(tmp_path: Path, make: Callable[[], Any]) -> None:
    weights = {name: tensor for name, tensor in make().state_dict().items() if name.startswith("decoder.")}
    save_file(weights, tmp_path / "decoder.safetensors")
    with pytest.raises(CheckpointError, match="holds a decoder only, and pictures are encoded by an encoder"):
        Encoder.from_pretrained(tmp_path / "decoder.safetensors")


@pytest.mark.parametrize("change", ["lost", "added", "shape"])
def test_an_encoder_whose_tensors_do_not_fit(tmp_path: Path, change: str) -> None:
    vae = random_vae()
    weights = bfl_state_dict(vae)
    name = "encoder.down.1.block.0.conv1.weight"
    if change == "lost":
        del weights[name]
    elif change == "added":
        weights["encoder.down.1.block.7.conv1.weight"] = weights[name].clone()
    else:
        weights[name] = weights[name][:, :, :1].contiguous()
    save_file(weights, tmp_path / "ae.safetensors")
    said = {"lost": "lacks 1 of", "added": "holds 1 of", "shape": "holds 1 of"}[change]
    with pytest.raises(CheckpointError, match=f"{said} the encoder's tensors"):
        Encoder.from_pretrained(tmp_path / "ae.safetensors")
    Decoder.from_pretrained(tmp_path / "ae.safetensors", family="flux1")
