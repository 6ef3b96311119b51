"""Folders as people have them: variants, shards, ``.bin``, a file's path in place of the folder's, the hub's cache."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file

from checkpoint_files import bfl_state_dict, old_names
from family_models import flux2_vae, tiny_vae
from fluxvae import CheckpointError, Decoder, InvalidOptionError
from fluxvae.checkpoints import load_vae, open_checkpoint, weights_files
from models import random_vae

NAME = "diffusion_pytorch_model"


def same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """The same decoder half: names, dtypes, bits."""
    ours = found.state_dict()
    theirs = {
        name: tensor
        for name, tensor in expected.state_dict().items()
        if not name.startswith(("encoder.", "quant_conv."))
    }
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, AutoencoderKL, AutoencoderKL]:
    """A folder with other weights in its variant, so that a test sees which were taken."""
    plain, other = random_vae(seed=1), random_vae(seed=2)
    plain.save_pretrained(tmp_path)
    other.half().save_pretrained(tmp_path, variant="fp16")
    return tmp_path, plain, other


def test_weights_without_a_variant_are_taken_first(two: tuple[Path, AutoencoderKL, AutoencoderKL]) -> None:
    folder, plain, other = two
    same(load_vae(folder), plain)
    same(load_vae(folder, variant="fp16"), other)
    assert open_checkpoint(folder, variant="fp16").variant == "fp16"
    assert weights_files(folder, variant="fp16") == (folder / f"{NAME}.fp16.safetensors",)
    with pytest.raises(CheckpointError, match=r"no weights of the variant 'bf16'; it has the variants: fp16"):
        load_vae(folder, variant="bf16")


def test_the_only_variant_is_taken_and_of_several_none(two: tuple[Path, AutoencoderKL, AutoencoderKL]) -> None:
    folder, _, other = two
    (folder / f"{NAME}.safetensors").unlink()
    same(load_vae(folder), other)
    shutil.copy(folder / f"{NAME}.fp16.safetensors", folder / f"{NAME}.bf16.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds the variants bf16, fp16 and no weights without one.*variant='bf16'"
    ):
        load_vae(folder)


def test_variant_where_it_means_nothing(tmp_path: Path) -> None:
    save_file(bfl_state_dict(random_vae()), tmp_path / "ae.safetensors")
    with pytest.raises(InvalidOptionError, match="variant: got 'fp16' for the single file"):
        load_vae(tmp_path / "ae.safetensors", variant="fp16")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards(tmp_path: Path, variant: str | None, safe: bool) -> None:
    vae = random_vae()
    vae.save_pretrained(tmp_path, variant=variant, safe_serialization=safe, max_shard_size="300KB")
    found = open_checkpoint(tmp_path)
    assert len(found.files) > 2
    assert found.index is not None
    same(found.load(), AutoencoderKL.from_pretrained(tmp_path, variant=variant, use_safetensors=safe))
    index = next(path for path in tmp_path.iterdir() if ".index" in path.name)
    same(load_vae(index), vae)
    same(load_vae(found.files[1]), vae)
    found.files[-1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the \d shards of its weights, .*-of-0000"):
        load_vae(tmp_path)


def test_shards_without_their_index(tmp_path: Path) -> None:
    vae = random_vae()
    vae.save_pretrained(tmp_path, max_shard_size="300KB")
    (tmp_path / f"{NAME}.safetensors.index.json").unlink()
    same(load_vae(tmp_path), vae)
    sorted(tmp_path.glob("*00002-of*"))[0].unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of the .* shards .*00002-of"):
        load_vae(tmp_path)


def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    random_vae().save_pretrained(tmp_path, max_shard_size="300KB")
    index = tmp_path / f"{NAME}.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["decoder.conv_in.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lists '../elsewhere.safetensors'; expected names of files beside it"):
        load_vae(tmp_path)


@pytest.mark.parametrize("kind", [random_vae, flux2_vae, tiny_vae])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bin_weights_and_dtypes_are_those_that_diffusers_loads(
    tmp_path: Path, kind: object, dtype: torch.dtype
) -> None:
    vae = kind()  # type: ignore[operator]
    vae.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / f"{NAME}.bin").is_file()
    expected = type(vae).from_pretrained(tmp_path, use_safetensors=False, torch_dtype=dtype)
    same(load_vae(tmp_path, dtype=dtype), expected)


@pytest.mark.parametrize("name", ["config.json", f"{NAME}.safetensors", f"{NAME}.fp16.safetensors"])
def test_a_files_path_in_place_of_the_folders(two: tuple[Path, AutoencoderKL, AutoencoderKL], name: str) -> None:
    folder, plain, other = two
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.25, "shift_factor": 0.5}))
    same(load_vae(folder / name), other if "fp16" in name else plain)
    decoder = Decoder.from_pretrained(folder / name, device="cpu")
    assert (decoder.format.scaling_factor, decoder.format.shift_factor) == (0.25, 0.5)
    assert decoder.assumed == ""


def test_a_pipelines_index_and_a_root_with_another_config(tmp_path: Path) -> None:
    vae = random_vae()
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    same(load_vae(tmp_path / "model_index.json"), vae)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    same(load_vae(tmp_path), vae)


def test_a_single_file_beside_a_config_that_describes_it(tmp_path: Path) -> None:
    """As ``sdxl_vae.safetensors`` lies in its repository; a config that does not fit is another model's."""
    vae = random_vae()
    save_file(bfl_state_dict(vae), tmp_path / "my_vae.safetensors")
    vae.save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"scaling_factor": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (tmp_path, tmp_path / "my_vae.safetensors"):
        found = open_checkpoint(source)
        assert (found.config["scaling_factor"], found.assumed) == (0.25, "")
        same(found.load(), vae)
    (tmp_path / "config.json").write_text(json.dumps(config | {"block_out_channels": [32, 32, 64, 64]}))
    found = open_checkpoint(tmp_path / "my_vae.safetensors")
    assert (found.config["scaling_factor"], found.family) == (0.3611, "flux1")


def test_a_folder_with_one_vae_among_its_files(tmp_path: Path) -> None:
    vae = random_vae()
    save_file(bfl_state_dict(vae), tmp_path / "ae.safetensors")
    same(load_vae(tmp_path), vae)
    (tmp_path / "ae.safetensors").rename(tmp_path / "AE.SAFETENSORS")
    same(load_vae(tmp_path), vae)
    (tmp_path / "AE.SAFETENSORS").rename(tmp_path / "ae.safetensors")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}, tmp_path / "flux1-dev.safetensors")
    assert weights_files(tmp_path) == (tmp_path / "ae.safetensors",)
    save_file(bfl_state_dict(vae), tmp_path / "ae2.sft")
    with pytest.raises(CheckpointError, match=r"2 files that may be a VAE: ae.safetensors, ae2.sft; pass the path"):
        load_vae(tmp_path)


def test_old_names_of_attention(tmp_path: Path) -> None:
    vae = random_vae()
    vae.save_pretrained(tmp_path)
    save_file(old_names(vae), tmp_path / f"{NAME}.safetensors")
    same(load_vae(tmp_path), AutoencoderKL.from_pretrained(tmp_path))
    conv = {
        key: tensor[:, :, None, None].contiguous() if "attentions" in key and tensor.ndim == 2 else tensor
        for key, tensor in old_names(vae).items()
    }
    save_file(conv, tmp_path / f"{NAME}.safetensors")
    same(load_vae(tmp_path), vae)


def cached(root: Path, folder: Path, commit: str = "a" * 40, *, subfolder: str = "vae") -> Path:
    """Put a folder into a hub's cache as the hub's library does: blobs, and links to them."""
    repository = root / "models--someone--flux"
    snapshot = repository / "snapshots" / commit / subfolder
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        blob = repository / "blobs" / f"{commit[:4]}{path.name}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return repository


def test_paths_into_the_hubs_cache(tmp_path: Path) -> None:
    vae = random_vae()
    vae.save_pretrained(tmp_path / "folder")
    repository = cached(tmp_path, tmp_path / "folder")
    snapshot = repository / "snapshots" / ("a" * 40)
    for source in (repository, snapshot, snapshot / "vae", snapshot / "vae" / "config.json"):
        same(load_vae(source), vae)
    other = random_vae(seed=9)
    other.save_pretrained(tmp_path / "other")
    cached(tmp_path, tmp_path / "other", "b" * 40)
    same(load_vae(repository), other)
    same(load_vae(repository, revision="a" * 40), vae)
    (repository / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match=r"holds the snapshots a+, b+ and no refs/main"):
        load_vae(repository)


def test_a_preview_as_its_author_saves_it(tmp_path: Path) -> None:
    """``taef1_decoder.pth``: numbered layers, of which the first is a clamp."""
    tiny = tiny_vae(16)
    layers = {
        f"{int(key.split('.')[2]) + 1}.{key.split('.', 3)[3]}": tensor
        for key, tensor in tiny.state_dict().items()
        if key.startswith("decoder.layers.")
    }
    torch.save(layers, tmp_path / "taef1_decoder.pth")
    save_file({f"taesd_decoder.{key}": tensor.clone() for key, tensor in layers.items()}, tmp_path / "vae.safetensors")
    for name in ("taef1_decoder.pth", "vae.safetensors"):
        loaded = load_vae(tmp_path / name, family="flux1")
        assert isinstance(loaded, AutoencoderTiny)
        same(loaded, tiny)


def test_what_is_loaded_does_not_change_with_its_file(tmp_path: Path) -> None:
    """A map of the file would: what a trainer writes there later would be decoded with."""
    vae = random_vae()
    vae.save_pretrained(tmp_path)
    loaded = load_vae(tmp_path)
    path = tmp_path / f"{NAME}.safetensors"
    with path.open("r+b") as file:
        file.seek(-(path.stat().st_size // 2), 2)
        file.write(bytes(path.stat().st_size // 2))
    same(loaded, vae)
