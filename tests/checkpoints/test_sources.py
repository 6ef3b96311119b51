"""Every kind of checkpoint source, and every way one can be wrong; no network is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from checkpoint_files import bfl_state_dict, flux2_bfl_state_dict
from family_models import flux2_vae, tiny_vae
from fluxvae import CheckpointError, Decoder, InvalidOptionError
from fluxvae.checkpoints import ASSETS, load_vae
from fluxvae.checkpoints.previews import add_pools
from models import flux_pipeline, random_vae

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
LATENTS = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "vae"
    vae.save_pretrained(path)
    return path


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def assert_same_decode(decoder: Decoder, vae: AutoencoderKL) -> None:
    expected = Decoder(vae, engine="diffusers").decode(LATENTS, height=32, width=32, output_type="pt")
    assert torch.equal(decoder.decode(LATENTS, height=32, width=32, output_type="pt"), expected)


def test_vae_folder(folder: Path, vae: AutoencoderKL) -> None:
    assert_same_decode(Decoder.from_pretrained(folder, engine="diffusers", device="cpu"), vae)


def test_pipeline_folder(vae: AutoencoderKL, tmp_path: Path) -> None:
    flux_pipeline(vae).save_pretrained(tmp_path)
    for options in ({}, {"subfolder": "vae"}):
        assert_same_decode(Decoder.from_pretrained(tmp_path, engine="diffusers", device="cpu", **options), vae)


def test_the_encoder_is_not_kept(folder: Path) -> None:
    assert not [name for name, _ in load_vae(folder).named_parameters() if name.startswith("encoder")]


def test_dtype_is_the_one_asked_for(folder: Path) -> None:
    decoder = Decoder.from_pretrained(folder, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in decoder.vae.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_single_file_in_bfl_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", no_network)
    vae = random_vae(seed=5, widths=(32, 32, 64, 64), layers_per_block=2)
    weights = bfl_state_dict(vae)
    # Names from BFL's own module, spelled out so that the table above cannot agree with itself alone.
    for name in (
        "encoder.down.0.block.0.norm1.weight",
        "encoder.mid.attn_1.q.weight",
        "decoder.mid.block_2.conv2.bias",
        "decoder.up.3.upsample.conv.weight",
        "decoder.up.1.block.0.nin_shortcut.weight",
        "decoder.norm_out.weight",
    ):
        assert name in weights
    file = tmp_path / "ae.safetensors"
    save_file({prefix + key: tensor for key, tensor in weights.items()}, file)
    decoder = Decoder.from_pretrained(file, engine="diffusers", device="cpu", family="flux1")
    assert (decoder.format.scaling_factor, decoder.format.shift_factor) == (0.3611, 0.1159)
    assert_same_decode(decoder, vae)


def test_hub_id_from_the_cache(
    folder: Path, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id resolves through the hub library's own cache, revision included."""
    commit = "a" * 40
    snapshot = tmp_path / "models--someone--flux" / "snapshots" / commit / "vae"
    shutil.copytree(folder, snapshot)
    refs = tmp_path / "models--someone--flux" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    (refs / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for options in ({}, {"revision": "v1"}, {"subfolder": "vae"}):
        assert_same_decode(Decoder.from_pretrained("someone/flux", engine="diffusers", device="cpu", **options), vae)
    with pytest.raises(CheckpointError, match=r"someone/flux@v2 is not in the hub's cache.*local folder or file"):
        load_vae("someone/flux", revision="v2")
    with pytest.raises(CheckpointError, match="nobody/nothing is not in the hub's cache"):
        load_vae("nobody/nothing")


def test_missing() -> None:
    with pytest.raises(CheckpointError, match=r"nothing at no/such/folder; expected 'demo'"):
        load_vae("no/such/folder")
    with pytest.raises(CheckpointError, match=r"nothing at weights/ae.safetensors"):
        load_vae("weights/ae.safetensors")


def test_folder_without_a_vae(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no VAE in .*looked for .*config.json or .*vae"):
        load_vae(tmp_path)


def test_missing_weights(broken: Path) -> None:
    (broken / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME} is missing"):
        load_vae(broken)


@pytest.mark.parametrize("keep", [0, 7, 4000, -100])
def test_truncated_weights(broken: Path, keep: int) -> None:
    weights = broken / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError,
        match=f"{WEIGHTS_NAME} is (not a whole safetensors file: it is truncated|empty).*download it again",
    ):
        load_vae(broken)


def test_truncated_single_file(tmp_path: Path, vae: AutoencoderKL) -> None:
    file = tmp_path / "ae.safetensors"
    save_file(bfl_state_dict(vae), file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ae.safetensors is not a whole safetensors file"):
        load_vae(file)


def test_broken_config(broken: Path) -> None:
    (broken / "config.json").write_text('{"_class_name": ')
    with pytest.raises(CheckpointError, match="config.json is not readable as JSON"):
        load_vae(broken)


def test_another_components_folder(broken: Path) -> None:
    (broken / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(CheckpointError, match="describes FluxTransformer2DModel, expected AutoencoderKL"):
        load_vae(broken)


def test_weights_that_lack_a_tensor(broken: Path) -> None:
    """diffusers would fill it with random numbers and only log it."""
    weights = load_file(broken / WEIGHTS_NAME)
    del weights["decoder.conv_in.weight"]
    save_file(weights, broken / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=r"no decoder.conv_in.weight"):
        load_vae(broken)


def test_weights_of_another_width(broken: Path) -> None:
    random_vae(widths=(32, 32, 32, 64)).save_pretrained(broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"block_out_channels": [32, 32, 32, 32]}))
    with pytest.raises(CheckpointError, match=r"in other shapes than config.json has.*do not belong together"):
        load_vae(broken)


def test_single_file_that_lacks_a_tensor(tmp_path: Path, vae: AutoencoderKL) -> None:
    weights = bfl_state_dict(vae)
    del weights["decoder.mid.attn_1.q.weight"]
    save_file(weights, tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 .*to_q.weight"):
        load_vae(tmp_path / "ae.safetensors")


def test_foreign_single_files(tmp_path: Path) -> None:
    save_file({"transformer.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds 1 tensors \(transformer.weight, ...\), but no decoder.conv_in.weight"
    ):
        load_vae(tmp_path / "other.safetensors")
    shallow = {
        "decoder.conv_in.weight": torch.zeros(8, 32, 3, 3),
        "decoder.up.0.block.0.conv1.weight": torch.zeros(8, 8, 3, 3),
    }
    save_file(shallow, tmp_path / "flux2.safetensors")
    with pytest.raises(CheckpointError, match="32 latent channels, as FLUX.2's has, but without its statistics"):
        load_vae(tmp_path / "flux2.safetensors")


def test_options_that_mean_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(InvalidOptionError, match="revision: got 'main'"):
        load_vae(folder, revision="main")
    with pytest.raises(InvalidOptionError, match="subfolder: got 'vae'"):
        load_vae(folder / WEIGHTS_NAME, subfolder="vae")


def test_flux_config_is_the_full_decoder() -> None:
    config = AutoencoderKL.load_config(ASSETS / "flux1")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    assert sum(p.numel() for p in vae.decoder.parameters()) == 49_545_475


# -- the rest of the family ----------------------------------------------------------------------------------------

TOKENS = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(0))


def decode_flux2(decoder: Decoder) -> torch.Tensor:
    return decoder.decode(TOKENS, height=32, width=32, output_type="pt")


@pytest.mark.parametrize("decoder_widths", [None, (32, 32, 64, 64)], ids=["FLUX.2", "small decoder"])
def test_flux2_folder(tmp_path: Path, decoder_widths: tuple[int, ...] | None) -> None:
    vae = flux2_vae(decoder_widths=decoder_widths)
    vae.save_pretrained(tmp_path)
    decoder = Decoder.from_pretrained(tmp_path, engine="diffusers", device="cpu")
    assert torch.equal(decode_flux2(decoder), decode_flux2(Decoder(vae, engine="diffusers")))


def test_flux2_weights_without_their_statistics_are_refused(tmp_path: Path) -> None:
    """diffusers would decode with a mean of 0 and a variance of 1."""
    flux2_vae().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS_NAME)
    del weights["bn.running_var"]
    save_file(weights, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=r"lacks 1 .*bn.running_var"):
        load_vae(tmp_path)


@pytest.mark.parametrize("decoder_widths", [None, (32, 32, 64, 64)], ids=["FLUX.2", "small decoder"])
def test_flux2_single_file_in_bfl_layout(tmp_path: Path, decoder_widths: tuple[int, ...] | None) -> None:
    vae = flux2_vae(seed=5, widths=(32, 32, 32, 64), decoder_widths=decoder_widths, layers_per_block=2)
    weights = flux2_bfl_state_dict(vae)
    for name in (
        "decoder.post_quant_conv.weight",
        "encoder.quant_conv.bias",
        "bn.running_mean",
        "decoder.mid.attn_1.q.weight",
    ):
        assert name in weights
    save_file(weights, tmp_path / "ae.safetensors")
    decoder = Decoder.from_pretrained(tmp_path / "ae.safetensors", engine="diffusers", device="cpu", family="flux2")
    assert decoder.format.batch_norm is not None
    assert decoder.format.batch_norm.eps == 1e-4
    assert torch.equal(decode_flux2(decoder), decode_flux2(Decoder(vae, engine="diffusers")))
    half = load_vae(tmp_path / "ae.safetensors", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.decoder.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("lost", ["decoder.mid.attn_1.q.weight", "decoder.post_quant_conv.weight", "bn.running_mean"])
def test_flux2_single_file_that_lacks_a_tensor(tmp_path: Path, lost: str) -> None:
    weights = flux2_bfl_state_dict(flux2_vae())
    del weights[lost]
    save_file(weights, tmp_path / "ae.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lacks 1|without its statistics bn.running_mean|without post_quant_conv"
    ):
        load_vae(tmp_path / "ae.safetensors")


def test_preview_folder(tmp_path: Path) -> None:
    tiny = tiny_vae(32)
    tiny.save_pretrained(tmp_path)
    decoder = Decoder.from_pretrained(tmp_path, device="cpu")
    assert decoder.approximate
    with pytest.warns(UserWarning, match="approximate"):
        assert torch.equal(decode_flux2(decoder), decode_flux2(Decoder(tiny)))


def taef2(seed: int = 0) -> AutoencoderTiny:
    """TAEF2's own network, narrow and random."""
    tiny = tiny_vae(32, seed)
    add_pools(tiny)
    for module in tiny.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    return tiny.requires_grad_(False)


def taef2_decode(weights: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """TAEF2 written out from its tensors, as its author's code computes it, in [-1, 1] as diffusers has images."""

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = weights[f"decoder.layers.{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"decoder.layers.{name}.bias"), padding=weight.shape[-1] // 2)

    def block(index: int, x: torch.Tensor) -> torch.Tensor:
        if f"decoder.layers.{index}.pool.0.weight" in weights:
            norm = [weights[f"decoder.layers.{index}.pool.1.{part}"] for part in ("weight", "bias")]
            x = x + conv(f"{index}.pool.3", F.group_norm(conv(f"{index}.pool.0", x), 4, *norm).relu())
        inner = conv(f"{index}.conv.4", conv(f"{index}.conv.2", conv(f"{index}.conv.0", x).relu()).relu())
        return (inner + x).relu()

    x = conv("0", torch.tanh(z / 3) * 3).relu()
    for start in (2, 7, 12):
        for index in range(start, start + 3):
            x = block(index, x)
        x = conv(str(start + 4), F.interpolate(x, scale_factor=2, mode="nearest"))
    return conv("18", block(17, x)) * 2 - 1


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_taef2(tmp_path: Path, kind: str) -> None:
    """Its branch is no part of diffusers' AutoencoderTiny, which would leave it out without an error."""
    vae = taef2()
    vae.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_NAME
    weights = load_file(path)
    if kind == "file":
        path = (tmp_path / WEIGHTS_NAME).rename(tmp_path / "taef2.safetensors")
    loaded = load_vae(path if kind == "file" else tmp_path)
    assert type(loaded) is AutoencoderTiny
    assert (loaded.config["latent_channels"], loaded.encoder) == (32, None)
    z = torch.randn(2, 32, 4, 6)
    assert torch.equal(loaded.decode(z).sample, vae.decode(z).sample)
    assert torch.allclose(loaded.decode(z).sample, taef2_decode(weights, z), atol=1e-5)
    without = {key: tensor for key, tensor in weights.items() if ".pool." not in key}
    assert not torch.allclose(loaded.decode(z).sample, taef2_decode(without, z), atol=1e-2), "the branch matters"
    assert load_vae(path if kind == "file" else tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["lost", "added", "shape"])
def test_preview_whose_tensors_do_not_fit(tmp_path: Path, change: str) -> None:
    tiny_vae(16).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS_NAME)
    if change == "lost":
        del weights["decoder.layers.18.bias"]
    elif change == "added":
        weights["decoder.layers.19.weight"] = torch.zeros(1)
    else:
        weights["decoder.layers.18.bias"] = torch.zeros(4)
    save_file(weights, tmp_path / WEIGHTS_NAME)
    for source in (tmp_path, tmp_path / WEIGHTS_NAME):
        with pytest.raises(CheckpointError, match=r"1 of the decoder's tensors.* decoder.layers.1[89].* among them"):
            load_vae(source)


def test_tensors_of_the_decoder_without_a_place_are_refused(tmp_path: Path) -> None:
    random_vae().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS_NAME)
    save_file(weights | {"decoder.extra.weight": torch.zeros(1)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(
        CheckpointError, match=r"holds 1 of the decoder's tensors, decoder.extra.weight among them.*has no place"
    ):
        load_vae(tmp_path)
    save_file(weights | {"loss.weight": torch.zeros(1)}, tmp_path / WEIGHTS_NAME)
    load_vae(tmp_path)
