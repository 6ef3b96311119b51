"""Jobs with Qwen-Image's checkpoint: there and back, and trainers' caches of latents that have the shape of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from batch.jobs import CPU, decode, files
from family_models import qwen_image_vae
from fluxvae import Decoder, Encoder, InvalidOptionError, cli
from fluxvae.batch import EncodeJob, Job, decode_files, encode_files
from models import random_vae

SIZE = {"height": 32, "width": 48}
"""A grid of 2 x 3 patches, of 4 x 6 latents."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    qwen_image_vae(base_dim=8).save_pretrained(folder)
    return folder


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def picture(folder: Path) -> Image.Image:
    made = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE.values(), 3), np.uint8))
    folder.mkdir()
    made.save(folder / "a.png")
    return made


def test_there_and_back(tmp_path: Path, checkpoint: Path) -> None:
    """Latents that the job writes, and frames of five dimensions in a file and in Parquet."""
    image = picture(tmp_path / "in")
    arguments = ["encode", str(tmp_path / "in"), "-o", str(tmp_path / "latents"), "--checkpoint", str(checkpoint)]
    result = CliRunner().invoke(cli.app, [*arguments, *CPU])
    assert result.exit_code == 0, result.output
    tokens = load_file(tmp_path / "latents" / "a.safetensors")["latents"]
    assert torch.equal(tokens, Encoder.from_pretrained(checkpoint, device="cpu").encode(image))
    frames = noise(2, 16, 1, 4, 6)
    save_file({"latents": frames}, tmp_path / "latents" / "b.safetensors")
    table = {"latents": [frame.tolist() for frame in frames], **{name: [side] * 2 for name, side in SIZE.items()}}
    pq.write_table(pa.table(table), tmp_path / "latents" / "c.parquet")
    result = decode(tmp_path / "latents", "--checkpoint", checkpoint, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    decoder = Decoder.from_pretrained(checkpoint, device="cpu")
    expected = {"a": decoder.decode(tokens, **SIZE, output_type="uint8")[0]}
    for index, pixels in enumerate(decoder.decode(frames, output_type="uint8")):
        expected |= {f"{name}_{index:04d}": pixels for name in ("b", "c")}
    assert files(tmp_path / "out") - {"job.json"} == {f"{name}.png" for name in expected}
    for name, pixels in expected.items():
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}.png")), pixels, err_msg=name)


def sd3(folder: Path) -> Path:
    vae = random_vae()
    vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    vae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["Qwen-Image", "SD3"])
@pytest.mark.parametrize("format", ["kohya", "musubi-z-image"])
def test_no_trainer_of_flux1_gets_other_latents(tmp_path: Path, checkpoint: Path, family: str, format: str) -> None:
    """Their shape is the same, so that the trainer would take them for its own."""
    picture(tmp_path / "in")
    checkpoint = checkpoint if family == "Qwen-Image" else sd3(tmp_path / "sd3")
    job = EncodeJob(
        inputs=(str(tmp_path / "in"),),
        out=str(tmp_path / "out"),
        device="cpu",
        checkpoint=str(checkpoint),
        format=format,
    )
    with pytest.raises(InvalidOptionError, match=f"format: got {format} with a checkpoint that is not FLUX.1's"):
        encode_files(job)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["Qwen-Image", "SD3"])
def test_caches_of_flux1_are_not_decoded_unasked(tmp_path: Path, checkpoint: Path, family: str) -> None:
    """Whoever wants it says whether they are raw."""
    checkpoint = checkpoint if family == "Qwen-Image" else sd3(tmp_path / "sd3")
    (tmp_path / "in").mkdir()
    for name in ("flux_kontext", "z_image"):
        said = {"architecture": name, "format_version": "1.0.1", "width": "48", "height": "32"}
        tensor = "latents_1x4x6_float32" if name == "z_image" else "latents_4x6_float32"
        shape = (16, 1, 4, 6) if name == "z_image" else (16, 4, 6)
        save_file({tensor: noise(*shape)}, tmp_path / "in" / f"{name}.safetensors", said)
    job = Job(inputs=(str(tmp_path / "in"),), out=str(tmp_path / "out"), device="cpu", checkpoint=str(checkpoint))
    report = decode_files(job)
    assert report.decoded == 0
    assert len(report.failures) == 2
    for failure in report.failures:
        assert "for FLUX.1" in failure.message
        assert failure.message.endswith("pass --raw or --no-raw")
