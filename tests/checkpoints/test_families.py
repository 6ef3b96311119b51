"""VAEs that look alike: what is assumed is said, once, and in plans and `info`; the caller can say it instead."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from typer.testing import CliRunner

from checkpoint_files import bfl_state_dict, flux2_bfl_state_dict, sd_vae
from family_models import flux2_vae, tiny_vae
from fluxvae import CheckpointError, Decoder, InvalidOptionError
from fluxvae.checkpoints import AssumedFamilyWarning, open_checkpoint
from fluxvae.checkpoints.families import FAMILIES
from fluxvae.cli import app
from models import random_vae


@pytest.fixture
def quiet() -> Iterator[None]:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumedFamilyWarning)
        yield


def write(path: Path, weights: dict[str, torch.Tensor], extra: dict[str, torch.Tensor] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in (weights | (extra or {})).items()}, path)
    return path


@pytest.fixture(params=["flux1", "sd", "flux2", "taef1", "taesd"])
def alike(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str, dict[str, Any]]:
    """A file, the family that is assumed, another that looks the same, and that one's factors."""
    path = tmp_path / "vae.safetensors"
    if request.param == "flux1":
        return (
            write(path, bfl_state_dict(random_vae())),
            "flux1",
            "sd3",
            {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        )
    if request.param == "sd":
        return write(path, bfl_state_dict(sd_vae())), "sd", "sdxl", {"scaling_factor": 0.13025}
    if request.param == "flux2":
        return write(path, flux2_bfl_state_dict(flux2_vae())), "flux2", "ernie", {"batch_norm_eps": 1e-5}
    channels = 16 if request.param == "taef1" else 4
    tiny = write(path, dict(tiny_vae(channels).state_dict()))
    first, other = ("flux1", "sd3") if channels == 16 else ("sd", "sdxl")
    return tiny, first, other, {"scaling_factor": 1.0, "shift_factor": 0.0}


def factors(decoder: Decoder) -> tuple[object, ...]:
    format = decoder.format
    eps = format.batch_norm.eps if format.batch_norm else None
    return format.scaling_factor, format.shift_factor, eps, format.latents_mean, format.latents_std


def test_an_assumption_is_told_once_and_in_plans(alike: tuple[Path, str, str, dict[str, Any]]) -> None:
    path, first, other, _ = alike
    with pytest.warns(AssumedFamilyWarning, match=f"'{first}' .*is assumed.*{other} .*family='{first}'"):
        decoder = Decoder.from_pretrained(path, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumedFamilyWarning)
        Decoder.from_pretrained(path, device="cpu")
    assert decoder.assumed in str(decoder.plan(64, 64))
    assert "is assumed" in decoder.plan(64, 64).kernels_note


@pytest.mark.usefixtures("quiet")
def test_what_the_caller_says_is_not_told(alike: tuple[Path, str, str, dict[str, Any]]) -> None:
    path, first, other, given = alike
    named = Decoder.from_pretrained(path, device="cpu", family=other)
    assert factors(named) == factors(Decoder.from_pretrained(path, device="cpu", **given))
    itself = Decoder.from_pretrained(path, device="cpu", family=first)
    preview = named.approximate
    assert (factors(itself) != factors(named)) is not preview  # a preview's are 1 and 0 whosever it is
    assert "assumed" not in str(named.plan(64, 64))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("flux1", {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
        ("sd3", {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
        ("sd", {"scaling_factor": 0.18215}),
        ("sdxl", {"scaling_factor": 0.13025}),
        (
            "playground-v2.5",
            {
                "scaling_factor": 0.5,
                "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
                "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
            },
        ),
    ],
)
def test_the_image_is_that_of_the_folder_with_this_familys_config(
    tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    vae = random_vae() if FAMILIES[family].channels == 16 else sd_vae()
    channels = FAMILIES[family].channels
    vae.register_to_config(**({"shift_factor": None, "latents_mean": None, "latents_std": None} | config))
    vae.save_pretrained(tmp_path / "folder")
    file = write(tmp_path / "vae.safetensors", bfl_state_dict(vae))
    latents = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [
        Decoder.from_pretrained(source, device="cpu", engine="diffusers", **options).decode(latents, output_type="pt")
        for source, options in ((tmp_path / "folder", {}), (file, {"family": family}))
    ]
    assert torch.equal(*images)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("neighbour", "shape", "family"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", (2, 2), "sd3"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", (2, 2), "flux1"),
        ("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", (2, 2048), "sdxl"),
        ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (2, 768), "sd"),
        ("edm_mean", (4,), "playground-v2.5"),
        ("double_stream_modulation_img.lin.weight", (2, 2), "flux2"),
    ],
)
def test_the_model_in_the_same_file_tells(tmp_path: Path, neighbour: str, shape: tuple[int, ...], family: str) -> None:
    make = {16: lambda: bfl_state_dict(random_vae()), 4: lambda: bfl_state_dict(sd_vae())}.get(
        FAMILIES[family].channels, lambda: flux2_bfl_state_dict(flux2_vae())
    )
    weights = {f"first_stage_model.{key}": tensor for key, tensor in make().items()}
    path = write(tmp_path / "all.safetensors", weights, {neighbour: torch.zeros(shape)})
    found = open_checkpoint(path)
    assert (found.family, found.assumed) == (family, "")
    wrong = next(name for name, one in FAMILIES.items() if one.channels == FAMILIES[family].channels and name != family)
    with pytest.raises(InvalidOptionError, match=f"family: got '{wrong}'.*by what else is in the file: {family}"):
        open_checkpoint(path, family=wrong)


def test_families_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "ae.safetensors", bfl_state_dict(random_vae()))
    with pytest.raises(InvalidOptionError, match=r"family: got 'flux9', expected one of flux1, sd3, sd, sdxl, .*ernie"):
        open_checkpoint(path, family="flux9")
    for family in ("sd", "flux2", "sd-x4-upscaler"):
        with pytest.raises(InvalidOptionError, match=rf"family: got '{family}'.*16 latent channels.*fit: flux1, sd3"):
            open_checkpoint(path, family=family)
    random_vae().save_pretrained(tmp_path / "folder")
    with pytest.raises(InvalidOptionError, match="family: got 'sdxl'.*fit: flux1, sd3"):
        open_checkpoint(tmp_path / "folder", family="sdxl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling_factor": 0.0}, "scaling_factor: got 0.0, expected a number other than 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor: got nan, expected a finite number"),
        ({"shift_factor": "0.1"}, "shift_factor: got '0.1'"),
        ({"batch_norm_eps": 1e-5}, "batch_norm_eps: got 1e-05 .* which is AutoencoderKL"),
        ({"batch_norm_eps": -1.0}, "batch_norm_eps: got -1.0, expected a number that is not negative"),
    ],
)
def test_factors_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "ae.safetensors", bfl_state_dict(random_vae()))
    with pytest.raises(InvalidOptionError, match=message):
        open_checkpoint(path, **options)


def test_half_of_the_factors_is_still_an_assumption(tmp_path: Path) -> None:
    path = write(tmp_path / "ae.safetensors", bfl_state_dict(random_vae()))
    found = open_checkpoint(path, scaling_factor=2.0)
    assert (found.config["scaling_factor"], found.config["shift_factor"], found.family) == (2.0, 0.1159, "flux1")
    assert found.assumed


def test_a_vae_of_no_family_needs_its_factors(tmp_path: Path) -> None:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=8,
    )
    path = write(tmp_path / "vae.safetensors", bfl_state_dict(vae))
    with pytest.raises(
        CheckpointError, match=r"8 latent channels.* fits no model that is known here.*give scaling_factor="
    ):
        open_checkpoint(path)
    decoder = Decoder.from_pretrained(path, device="cpu", scaling_factor=0.5)
    assert (decoder.format.channels, decoder.format.scaling_factor, decoder.format.shift_factor) == (8, 0.5, None)
    assert decoder.format.vae_scale_factor == 2


def test_a_decoder_without_attention_is_not_flux1s(tmp_path: Path) -> None:
    """CogView's and GLM-Image's: other factors, and everything else as FLUX.1 has it."""
    tensors = {name: value for name, value in bfl_state_dict(random_vae()).items() if ".attn_1." not in name}
    path = write(tmp_path / "vae.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"16 latent channels.*no attention.* fits no model that is known here"):
        open_checkpoint(path)
    assert open_checkpoint(path, scaling_factor=1.0).config.get("shift_factor") is None


def test_the_x4_upscaler_is_told_by_its_levels(tmp_path: Path) -> None:
    found = open_checkpoint(write(tmp_path / "vae.safetensors", bfl_state_dict(sd_vae(widths=(32, 32, 32)))))
    assert (found.family, found.config["scaling_factor"], found.assumed) == ("sd-x4-upscaler", 0.08333, "")


def test_family_and_factors_of_a_folder(tmp_path: Path) -> None:
    """What the caller says wins over config.json: ERNIE's pipeline computes with another eps than its config says."""
    flux2_vae().save_pretrained(tmp_path)
    for options in ({"family": "ernie"}, {"batch_norm_eps": 1e-5}):
        decoder = Decoder.from_pretrained(tmp_path, device="cpu", **options)
        assert decoder.format.batch_norm is not None
        assert decoder.format.batch_norm.eps == 1e-5
        assert "family=" in (told := open_checkpoint(tmp_path, **options).told_by) or "given" in told


def test_info_says_what_a_file_is(tmp_path: Path) -> None:
    path = write(tmp_path / "ae.safetensors", {f"vae.{k}": v.half() for k, v in bfl_state_dict(random_vae()).items()})
    run = CliRunner().invoke(app, ["info", str(path), "--json"])
    assert run.exit_code == 0, run.output
    facts = json.loads(run.stdout)
    assert facts["family"] == "flux1"
    assert "sd3" in facts["assumed"]
    assert (facts["dtype"], facts["prefix"], facts["layout"]) == ("float16", "vae.", "BFL's")
    assert facts["files"] == [str(path)]
    facts = json.loads(CliRunner().invoke(app, ["info", str(path), "--family", "sd3", "--json"]).stdout)
    assert (facts["family"], facts["assumed"], facts["scaling_factor"]) == ("sd3", None, 1.5305)
    text = CliRunner().invoke(app, ["info", str(path)], env={"COLUMNS": "400"}).stdout
    for words in ("BFL's, behind 'vae.'", "flux1, by an assumption", "is assumed", "float16"):
        assert words in text


def test_plan_says_what_was_assumed(tmp_path: Path) -> None:
    path = write(tmp_path / "ae.safetensors", bfl_state_dict(random_vae()))
    facts = json.loads(CliRunner().invoke(app, ["plan", "64", "64", "--checkpoint", str(path), "--json"]).stdout)
    assert "sd3" in facts["assumed"]
    run = CliRunner().invoke(
        app, ["plan", "64", "64", "--checkpoint", str(path), "--json"], env={"FLUXVAE_FAMILY": "sd3"}
    )
    assert json.loads(run.stdout)["assumed"] is None
