"""Jobs with a checkpoint whose pictures are RGBA: every format of files that keeps alpha, and the refusal of JPEG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from batch.jobs import CPU, decode, files, folder_of
from fluxvae import Decoder, Encoder, InvalidOptionError, cli
from models import random_vae

SIZE = (32, 48)
COLOURS = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rgba")
    random_vae(channels=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(checkpoint: Path) -> Decoder:
    return Decoder.from_pretrained(checkpoint, device="cpu")


def encode(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, ["encode", *map(str, arguments), *CPU])


def test_files_keep_alpha(tmp_path: Path, checkpoint: Path, decoder: Decoder) -> None:
    [latents] = folder_of(tmp_path / "in", 1, *SIZE).values()
    expected = decoder.decode(latents, height=SIZE[0], width=SIZE[1], output_type="uint8")[0]
    assert len(np.unique(expected[..., 3])) > 8, "an alpha that is worth keeping"
    for format in ("png", "webp", "npy", "safetensors"):
        result = decode(tmp_path / "in", "--checkpoint", checkpoint, "-o", tmp_path / format, "--format", format)
        assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "png" / "0000.png") as png, Image.open(tmp_path / "webp" / "0000.webp") as webp:
        assert (png.mode, webp.mode) == ("RGBA", "RGBA")
        np.testing.assert_array_equal(np.asarray(png), expected)
        np.testing.assert_array_equal(np.asarray(webp)[..., 3], expected[..., 3])
        assert png.info["height"] == str(SIZE[0])
    floats = np.load(tmp_path / "npy" / "0000.npy")
    np.testing.assert_array_equal((floats * 255).round().astype(np.uint8), expected)
    assert load_file(tmp_path / "safetensors" / "0000.safetensors")["image"].shape == (4, *SIZE)


def test_jpeg_is_refused_before_anything_is_decoded(tmp_path: Path, checkpoint: Path) -> None:
    folder_of(tmp_path / "in", 1, *SIZE)
    result = decode(tmp_path / "in", "--checkpoint", checkpoint, "-o", tmp_path / "out", "--format", "jpeg")
    assert isinstance(result.exception, InvalidOptionError)
    assert str(result.exception) == "format: got 'jpeg' for pictures with alpha; expected 'png' or 'webp'"
    assert not files(tmp_path / "out")


@pytest.mark.parametrize("options", [[], ["--crop"], ["--resize"]], ids=str)
def test_pictures_are_encoded_with_their_alpha(tmp_path: Path, checkpoint: Path, options: list[str]) -> None:
    clear = Image.fromarray(COLOURS)
    if options:
        clear = clear.resize((50, 35))
    (tmp_path / "in").mkdir()
    clear.save(tmp_path / "in" / "clear.png")
    clear.convert("RGB").save(tmp_path / "in" / "opaque.png")
    result = encode(tmp_path / "in", "--checkpoint", checkpoint, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    if "--crop" in options:
        clear = clear.crop((1, 1, 49, 33))
    encoder = Encoder.from_pretrained(checkpoint, device="cpu")
    for name, picture in (("clear", clear), ("opaque", clear.convert("RGB").convert("RGBA"))):
        found = load_file(tmp_path / "out" / f"{name}.safetensors")["latents"]
        assert torch.equal(found, encoder.encode(picture, resize=True)), name


def test_a_background_is_put_behind_where_one_is_given(tmp_path: Path, checkpoint: Path) -> None:
    clear = Image.fromarray(COLOURS)
    clear.save(tmp_path / "clear.png")
    arguments = ("--checkpoint", checkpoint, "-o", tmp_path / "out", "--background", "white")
    assert encode(tmp_path / "clear.png", *arguments).exit_code == 0
    white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    expected = Encoder.from_pretrained(checkpoint, device="cpu").encode(white)
    assert torch.equal(load_file(tmp_path / "out" / "clear.safetensors")["latents"], expected)
