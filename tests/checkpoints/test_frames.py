"""Qwen-Image's and Wan 2.1's VAE from every kind of source, and the other video VAEs, which are refused by name."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file

from checkpoint_files import to_fp8, wan_state_dict
from checkpoints.test_folders import cached
from family_models import qwen_image_vae, tiny_vae, wan_vae
from fluxvae import CheckpointError, InvalidOptionError
from fluxvae.checkpoints import AssumedFamilyWarning, load_vae, open_checkpoint
from fluxvae.checkpoints.defaults import DEFAULTS, complete
from fluxvae.checkpoints.entries import Entry
from fluxvae.checkpoints.files import Weights
from fluxvae.checkpoints.layouts import find_vae
from fluxvae.engine.way import DECODE, ENCODE

CLASSES = {"AutoencoderKLQwenImage": qwen_image_vae, "AutoencoderKLWan": wan_vae}
NAMES: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "diffusers'": lambda vae: dict(vae.state_dict()),
    "Wan's": wan_state_dict,
}
pytestmark = pytest.mark.filterwarnings("error::fluxvae.checkpoints.load.AssumedFamilyWarning")


def same(source: Path | str, vae: Any, **options: Any) -> None:
    """Each half of the source is that half of ``vae``, bit for bit, and has nothing of the other."""
    for way, other in ((DECODE, ENCODE), (ENCODE, DECODE)):
        half = load_vae(source, way=way, **options)
        expected = {
            name: tensor
            for name, tensor in vae.state_dict().items()
            if not name.startswith(tuple(f"{part}." for part in other.parts))
        }
        found = half.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
        assert all(getattr(half, part) is None for part in other.parts)


def write(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


# -- what opens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("channels", [3, 4])
def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, channels: int) -> None:
    """Alone, inside a pipeline's folder, and by a hub id that the cache holds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    vae = CLASSES[kind](channels=channels)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    cached(tmp_path / "hub", tmp_path / "pipeline" / "vae")
    for source in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae", "someone/flux"):
        found = open_checkpoint(source)
        assert (found.model, found.family, found.told_by) == (kind, None, "config.json")
        same(source, vae)


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_single_files(tmp_path: Path, layout: str, prefix: str) -> None:
    """RGB and RGBA, behind any prefix and beside a transformer; whose VAE it is needs no assumption."""
    others = {"model.diffusion_model.img_in.weight": torch.zeros(3, 3), "text_model.conv1.weight": torch.zeros(2, 2)}
    for channels in (3, 4):
        vae = qwen_image_vae(channels=channels, num_res_blocks=channels - 2)
        weights = {f"{prefix}{name}": tensor for name, tensor in NAMES[layout](vae).items()} | (
            others if prefix else {}
        )
        path = write(tmp_path / "qwen_image_vae.safetensors", weights)
        found = open_checkpoint(path)
        assert (found.model, found.layout, found.prefix) == ("AutoencoderKLQwenImage", layout, prefix)
        assert (found.family, found.told_by, found.assumed) == ("qwen-image", "the shapes of its tensors", "")
        assert found.sizes == ([16, 32, 64, 64], channels - 2)
        same(path, vae)
        built = load_vae(path).config
        for name, value in vae.config.items():
            if not name.startswith("_"):
                assert list(built[name]) == list(value) if isinstance(value, list) else built[name] == value, name


def test_the_names_of_wan_are_what_diffusers_takes_them_for() -> None:
    """In the published numbers of blocks, the only ones that diffusers' own translation knows."""
    vae = qwen_image_vae(num_res_blocks=2)
    expected = convert_wan_vae_to_diffusers({name: name for name in wan_state_dict(vae)})
    entries = {name: Entry(tuple(tensor.shape), "float32", Path()) for name, tensor in wan_state_dict(vae).items()}
    found = find_vae(entries, "it")
    assert {**found.names, **found.encoder} == expected
    assert expected.keys() == vae.state_dict().keys()


def test_wan_by_its_shapes(tmp_path: Path) -> None:
    """Where the halves differ only its own class has a place for both."""
    for vae in (wan_vae(decoder_base_dim=24), wan_vae(out_channels=4), wan_vae(dim_mult=(1, 1, 2, 2))):
        path = write(tmp_path / "wan_2.1_vae.safetensors", wan_state_dict(vae))
        differ = (vae.config.decoder_base_dim, vae.config.out_channels) != (None, 3)
        found = open_checkpoint(path)
        assert found.model == ("AutoencoderKLWan" if differ else "AutoencoderKLQwenImage")
        assert found.sizes[0] == [(vae.config.decoder_base_dim or 16) * factor for factor in vae.config.dim_mult]
        assert found.family == "qwen-image"
        same(path, vae)


def test_a_config_beside_a_file_says_the_class(tmp_path: Path) -> None:
    vae = wan_vae()
    path = write(tmp_path / "wan_2.1_vae.safetensors", wan_state_dict(vae))
    config = dict(vae.config) | {"_class_name": "AutoencoderKLWan", "latents_mean": [0.5] * 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(path)
    assert (found.model, found.config["latents_mean"]) == ("AutoencoderKLWan", [0.5] * 16)
    same(path, vae)
    for other in (
        {"base_dim": 32},
        {"z_dim": 4},
        {"dim_mult": 3},
        {"out_channels": 4},
        {"_class_name": "AutoencoderKL"},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | other))
        assert open_checkpoint(path).model == "AutoencoderKLQwenImage", other


def test_bit_identity_with_diffusers_single_files(tmp_path: Path) -> None:
    """diffusers' own loading is the oracle, of a file as the model's authors publish it too (``Wan2.1_VAE.pth``)."""
    vae = wan_vae(num_res_blocks=2)
    weights = wan_state_dict(vae)
    path = write(tmp_path / "wan_2.1_vae.safetensors", weights)
    torch.save(weights, tmp_path / "Wan2.1_VAE.pth")
    vae.save_config(tmp_path / "config")
    for dtype in (torch.float32, torch.bfloat16):
        expected = AutoencoderKLWan.from_single_file(
            str(path), config=str(tmp_path / "config"), torch_dtype=dtype, local_files_only=True
        )
        same(path, expected, dtype=dtype)
        same(tmp_path / "Wan2.1_VAE.pth", expected, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    vae = qwen_image_vae(dtype=dtype)
    path = write(tmp_path / "vae.safetensors", wan_state_dict(vae))
    assert open_checkpoint(path).stored_dtypes == (str(dtype).removeprefix("torch."),)
    same(path, vae)
    same(path, torch.nn.Module.to(vae, torch.float32), dtype=torch.float32)


@pytest.mark.parametrize("scale", [None, "scale_weight", "weight_scale"])
def test_8_bit_floats(tmp_path: Path, scale: str | None) -> None:
    vae = qwen_image_vae()
    weights = wan_state_dict(vae)
    kernels = {name: tensor for name, tensor in weights.items() if name.endswith(".weight")}
    stored, meant = to_fp8(kernels, scale, by_channel=True)
    path = write(tmp_path / "vae.safetensors", weights | stored)
    assert open_checkpoint(path).scaled == (scale is not None)
    vae.load_state_dict(dict(zip(vae.state_dict(), (weights | meant).values(), strict=True)))
    same(path, vae)


@pytest.mark.parametrize("layout", NAMES)
def test_the_other_half_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    path = write(tmp_path / "vae.safetensors", NAMES[layout](qwen_image_vae()))
    read: set[str] = set()
    real = Weights.read

    def noted(self: Weights, names: Iterable[str]) -> Any:
        names = list(names)
        read.update(names)
        return real(self, names)

    monkeypatch.setattr(Weights, "read", noted)
    for way, other, last in ((DECODE, "encoder.", "conv1."), (ENCODE, "decoder.", "conv2.")):
        read.clear()
        load_vae(path, way=way)
        assert len(read) > 60
        foreign = (other, last if layout == "Wan's" else f"{'post_' * (way == ENCODE)}quant_conv.")
        assert not [name for name in read if name.startswith(foreign)]


# -- what is said of its latents -----------------------------------------------------------------------------------


def test_a_mean_and_a_deviation_are_all_it_has(tmp_path: Path) -> None:
    qwen_image_vae().save_pretrained(tmp_path / "folder")
    path = write(tmp_path / "vae.safetensors", wan_state_dict(qwen_image_vae()))
    for source in (tmp_path / "folder", path):
        for name in ("scaling_factor", "shift_factor", "batch_norm_eps"):
            with pytest.raises(InvalidOptionError, match=f"{name}: got 0.5 .* which is AutoencoderKLQwenImage and has "
                               "latents_mean and latents_std; leave it out"):  # fmt: skip
                open_checkpoint(source, **{name: 0.5})
        with pytest.raises(
            InvalidOptionError, match="family: got 'flux1' .* axis of time, 4 levels; .* fit: qwen-image"
        ):
            open_checkpoint(source, family="flux1")
        named = open_checkpoint(source, family="qwen-image")
        assert list(named.config["latents_std"]) == DEFAULTS["AutoencoderKLWan"]["latents_std"]


def test_one_of_no_family_needs_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", wan_state_dict(qwen_image_vae(dim_mult=(1, 2, 4))))
    with pytest.raises(CheckpointError, match="fits no model .* mean and deviation of its latents: load its diffusers"):
        open_checkpoint(path)
    qwen_image_vae(dim_mult=(1, 2, 4)).save_pretrained(tmp_path / "folder")
    same(tmp_path / "folder", qwen_image_vae(dim_mult=(1, 2, 4)))


# -- what is damaged -----------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a temporal weight": (
        lambda w: w.pop("decoder.upsamples.2.time_conv.weight"), r"lacks 1 .*up_blocks.0.upsamplers.0.time_conv"),
    "a temporal layer": (
        lambda w: [w.pop(f"decoder.upsamples.2.time_conv.{n}") for n in ("weight", "bias")], r"lacks 2 .*0.time_conv"),
    "a bias": (lambda w: w.pop("decoder.middle.2.residual.6.bias"), r"lacks 1 .*resnets.1.conv2.bias"),
    "post_quant_conv": (lambda w: (w.pop("conv2.weight"), w.pop("conv2.bias")), r"lacks 2 .*post_quant_conv"),
    "the last layer": (lambda w: w.pop("decoder.head.2.weight"), r"lacks 1 .*decoder.conv_out.weight"),
    "a shape": (
        lambda w: w.update({"decoder.head.0.gamma": torch.ones(16)}), r"other shapes .*norm_out.gamma .*got \[16\]"),
    "a scalar": (lambda w: w.update({"decoder.head.2.weight": torch.ones(())}), r"other shapes .*conv_out.weight"),
    "another block": (
        lambda w: w.update({"decoder.upsamples.10.residual.7.bias": torch.ones(16)}), r"no place"),
    "a level far away": (
        lambda w: w.update({"decoder.upsamples.99999.residual.2.weight": torch.ones(2)}), r"not the levels of a VAE"),
    "two dimensions": (
        lambda w: w.update({"decoder.upsamples.0.residual.2.weight": torch.ones(64, 64, 3, 3)}), r"another shape than"),
    "one tensor twice": (
        lambda w: w.update({"decoder.conv_out.weight": torch.ones(3)}), r"holds both .*which are one tensor"),
    "12 channels of pixels": (
        lambda w: w.update({"decoder.head.2.weight": torch.ones(12, 16, 3, 3, 3)}), r"12 channels of pixels .*RGBA"),
    "both names": (
        lambda w: w.update({"decoder.conv_in.weight": torch.ones(64, 16, 3, 3, 3)}), r"holds 2 VAE decoders"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_files(tmp_path: Path, change: str) -> None:
    weights = wan_state_dict(qwen_image_vae())
    do, message = CHANGES[change]
    do(weights)
    with pytest.raises(CheckpointError, match=message):
        load_vae(write(tmp_path / "vae.safetensors", weights))


@pytest.mark.parametrize("layout", NAMES)
def test_a_damaged_encoder_does_not_matter_to_a_decoder(tmp_path: Path, layout: str) -> None:
    weights = NAMES[layout](qwen_image_vae())
    lost = next(name for name in weights if name.startswith("encoder.") and name.endswith("time_conv.bias"))
    del weights[lost]
    path = write(tmp_path / "vae.safetensors", weights)
    load_vae(path)
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of the encoder's tensors, encoder\.down_blocks\..*time_conv.bias"
    ):
        load_vae(path, way=ENCODE)
    half = {
        name: tensor for name, tensor in weights.items() if not name.startswith(("encoder.", "quant_conv.", "conv1."))
    }
    load_vae(write(path, half))
    with pytest.raises(CheckpointError, match="holds a decoder only"):
        load_vae(path, way=ENCODE)
    half = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.")}
    with pytest.raises(CheckpointError, match="It holds an encoder only"):
        load_vae(write(path, half), way=ENCODE)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"num_res_blocks": 10**9}, "num_res_blocks 1000000000, expected at most 64"),
        ({"num_res_blocks": 0}, "num_res_blocks 0, expected a number of blocks from 1"),
        ({"dim_mult": [1] * 9}, "at most 8 levels"),
        ({"dim_mult": [1, 2, 4, 10**9]}, "dim_mult .* expected a list of factors from 1 to 64"),
        ({"dim_mult": 4}, "dim_mult 4, expected a list of factors"),
        ({"base_dim": 10**9}, "base_dim 1000000000, expected a number of channels"),
        ({"base_dim": 16.0}, "base_dim 16.0, expected a number of channels"),
        ({"z_dim": 0}, "z_dim 0, expected a number of channels"),
        ({"temperal_downsample": [True]}, r"temperal_downsample \[True\], expected 3 of them"),
        ({"input_channels": 1}, r"input_channels 1, expected 3 \(RGB\) or 4 \(RGBA\)"),
        ({"latents_mean": [0.0] * 15}, "latents_mean .* expected 16 numbers, as many as z_dim"),
        ({"latents_mean": None}, "latents_mean None, expected 16 numbers"),
        ({"latents_std": [float("nan")] * 16}, "latents_std .* expected a list of finite numbers"),
        ({"latents_std": [1.0] * 15 + [0]}, "latents_std .* expected numbers other than 0"),
        ({"base_dim": 32}, "config and weights do not belong together"),
        ({"attn_scales": [1.0]}, "config and weights do not belong together"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_numbers_that_no_model_has(tmp_path: Path, setting: dict[str, Any], words: str) -> None:
    vae = qwen_image_vae()
    vae.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKLQwenImage", "base_dim": 16, "num_res_blocks": 1} | setting)
    )
    way = ENCODE if "attn_scales" in setting else DECODE  # diffusers' decoder passes them over
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path, way=way)


@pytest.mark.parametrize(
    "change",
    [{"attn_scales": [1.0]}, {"is_residual": True}, {"patch_size": 2}, {"scale_factor_spatial": 16}, {"new": 1},
     {"temperal_downsample": [1, 0, 1]}, {"latents_mean": None}, {"z_dim": 8}, {"dim_mult": None}],
)  # fmt: skip
def test_what_is_not_known_is_left_to_diffusers(change: dict[str, Any]) -> None:
    config = {"_class_name": "AutoencoderKLWan", "base_dim": 32}
    assert complete(config) == DEFAULTS["AutoencoderKLWan"] | {"base_dim": 32}
    assert complete(config | change) is None


# -- what is another VAE -------------------------------------------------------------------------------------------

WAN22 = {
    "base_dim": 16, "decoder_base_dim": 32, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48, "scale_factor_spatial": 16,
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AutoencoderKLWan": (r"Wan 2\.2's VAE", WAN22),
    "AutoencoderKLQwenImage21": (r"Qwen-Image 2\.1's VAE", {}),
    "AutoencoderKLHunyuanVideo": ("HunyuanVideo's VAE", {}),
    "AutoencoderKLHunyuanVideo15": (r"HunyuanVideo 1\.5's VAE", {}),
    "AutoencoderKLHunyuanImageRefiner": ("HunyuanImage's refiner", {}),
    "AutoencoderKLLTXVideo": ("LTX-Video's", {}),
    "AutoencoderKLLTX2Video": ("LTX-2's VAE", {}),
    "AutoencoderKLCogVideoX": ("CogVideoX's VAE", {}),
    "AutoencoderKLMochi": ("Mochi's VAE", {}),
    "AutoencoderKLCosmos": ("Cosmos's VAE", {}),
    "AutoencoderKLAllegro": ("Allegro's VAE", {}),
    "AutoencoderKLMagvit": ("EasyAnimate's VAE", {}),
    "AutoencoderKLTemporalDecoder": ("Stable Video Diffusion's VAE", {}),
    "AutoencoderKLKVAE": ("Kandinsky's VAE", {}),
    "AutoencoderKLKVAEVideo": ("Kandinsky's video VAE", {}),
    "AutoencoderVidTok": ("VidTok's VAE", {}),
}
TAKEN = r"it is not decoded here: taken are .*Qwen-Image and Wan 2\.1, as a diffusers folder .* or as a single file"


@pytest.mark.parametrize("kind", OTHERS)
def test_other_vaes_are_called_what_they_are(tmp_path: Path, kind: str) -> None:
    """By diffusers' names of their tensors, and by their config.json before a byte of weights is looked at."""
    words, settings = OTHERS[kind]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**settings)
    for prefix in ("", "vae."):
        entries = {f"{prefix}{n}": Entry(tuple(t.shape), "float32", Path()) for n, t in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"it.safetensors holds .*{words}.*{TAKEN}"):
            find_vae(entries, "it.safetensors")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": kind, **settings}))
    with pytest.raises(CheckpointError, match=rf"config\.json describes {kind}, .*{words}.*{TAKEN}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"decoder.conv1.weight": (64, 48, 3, 3, 3), "decoder.upsamples.0.upsamples.0.residual.2.weight": (1,),
          "decoder.head.2.weight": (12, 16, 3, 3, 3)}, r"Wan 2\.2's VAE"),
        ({"decoder.conv1.weight": (64, 64, 1, 3, 3), "decoder.upsamples.0.upsamples.0.residual.2.weight": (1,),
          "decoder.head.2.weight": (4, 16, 1, 3, 3)}, r"Qwen-Image 2\.1's VAE"),
        ({"vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": (8, 8, 3, 3, 3)}, "LTX-Video's"),
        ({"decoder.1.weight": (64, 16, 3, 3), "decoder.3.conv.0.weight": (64, 128, 3, 3),
          "decoder.7.conv.weight": (64, 64, 1, 1)}, "TAEHV's preview"),
        ({"decoder.something.weight": (8, 8, 3, 3, 3)}, "it is a video VAE of a kind that is not known here"),
    ],
    ids=["Wan 2.2", "Qwen-Image 2.1", "LTX", "TAEHV", "any other"],
)  # fmt: skip
def test_other_vaes_by_their_own_names(names: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as raised:
        find_vae({name: Entry(shape, "float32", Path()) for name, shape in names.items()}, "it.safetensors")
    assert re.search("taken are the VAEs of", str(raised.value))


def test_no_assumption_is_made(tmp_path: Path) -> None:
    """Qwen-Image's and Wan 2.1's weights look the same and mean the same latents."""
    models = [qwen_image_vae(), wan_vae()]
    assert models[0].config.latents_mean == models[1].config.latents_mean
    assert models[0].config.latents_std == models[1].config.latents_std
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumedFamilyWarning)
        for vae in models:
            load_vae(write(tmp_path / "vae.safetensors", wan_state_dict(vae)))


def test_its_latents_have_no_preview_of_this_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "taef1.safetensors", dict(tiny_vae(16).state_dict()))
    assert "qwen" not in open_checkpoint(path).assumed
    with pytest.raises(InvalidOptionError, match="family: got 'qwen-image' .* a preview's.*fit: flux1, sd3$"):
        open_checkpoint(path, family="qwen-image")
