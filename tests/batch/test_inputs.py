"""Every kind of input and output; what is bad among them is told, and does not stop the rest."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fluxvae import Decoder
from fluxvae.batch import Job, decode_files

from .jobs import decode, failures, files, folder_of, image, latents, pixels, save

Write = Callable[[Path, torch.Tensor], Any]


def _npz(path: Path, tensor: torch.Tensor) -> None:
    np.savez(path, latents=tensor.numpy(), height=64, width=64)


def _pt(path: Path, tensor: torch.Tensor) -> None:
    torch.save({"latents": tensor, "height": 64, "width": 64}, path)


def _parquet(path: Path, tensor: torch.Tensor) -> None:
    table = {"latents": tensor.tolist(), "height": [64] * len(tensor), "width": [64] * len(tensor)}
    pq.write_table(pa.table(table), path, row_group_size=2)


def _parquet_bytes(path: Path, tensor: torch.Tensor) -> None:
    columns = {
        "latents": [row.numpy().tobytes() for row in tensor],
        "shape": [list(row.shape) for row in tensor],
        "height": [64] * len(tensor),
        "width": [64] * len(tensor),
    }
    pq.write_table(pa.table(columns), path)


KINDS: dict[str, tuple[str, Write]] = {
    "safetensors": ("safetensors", save),
    "npz": ("npz", _npz),
    "pt": ("pt", _pt),
    "parquet lists": ("parquet", _parquet),
    "parquet bytes": ("parquet", _parquet_bytes),
}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs(kind: str, tmp_path: Path, demo: Decoder) -> None:
    """A file with three rows gives three images, named by the rows' numbers."""
    suffix, write = KINDS[kind]
    rows = torch.cat([latents(seed) for seed in range(3)])
    write(tmp_path / f"cats.{suffix}", rows)
    done = decode(tmp_path / f"cats.{suffix}", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "out") == {"cats_0000.png", "cats_0001.png", "cats_0002.png", "job.json"}
    for row in range(3):
        assert np.array_equal(image(tmp_path / f"out/cats_000{row}.png"), pixels(demo, rows[row : row + 1]))


def test_npy_takes_its_size_from_the_options(tmp_path: Path, demo: Decoder) -> None:
    np.save(tmp_path / "cat.npy", latents(1)[0].numpy())
    refused = decode(tmp_path / "cat.npy", "-o", tmp_path / "out")
    assert refused.exit_code == 6
    assert "pass --height and --width" in failures(tmp_path / "out")[0]["message"]
    assert decode(tmp_path / "cat.npy", "-o", tmp_path / "out", "--height", "64", "--width", "64").exit_code == 0
    assert files(tmp_path / "out") == {"cat.png", "job.json"}, "the failures of the first run are gone"
    assert np.array_equal(image(tmp_path / "out/cat.png"), pixels(demo, latents(1)))


def test_parquet_names(tmp_path: Path) -> None:
    table = {"latents": latents(1).tolist() * 2, "height": [64] * 2, "width": [64] * 2, "name": ["a/cat.png", "../dog"]}
    pq.write_table(pa.table(table), tmp_path / "set.parquet")
    assert decode(tmp_path / "set.parquet", "-o", tmp_path / "out").exit_code == 6
    assert files(tmp_path / "out") == {"a/cat.png", "failures.jsonl", "job.json"}
    assert "leading out of the output folder" in failures(tmp_path / "out")[0]["message"]


def test_folders_keep_their_tree_and_globs_choose(tmp_path: Path) -> None:
    save(tmp_path / "in/a/one.safetensors", latents(1))
    save(tmp_path / "in/b/one.safetensors", latents(2))
    assert decode(tmp_path / "in", "-o", tmp_path / "tree").exit_code == 0
    assert files(tmp_path / "tree") == {"a/one.png", "b/one.png", "job.json"}
    assert decode(tmp_path / "in/b/*.safetensors", "-o", tmp_path / "glob").exit_code == 0
    assert files(tmp_path / "glob") == {"one.png", "job.json"}


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "npy", "safetensors"])
def test_outputs(format: str, tmp_path: Path, demo: Decoder) -> None:
    save(tmp_path / "cat.safetensors", latents(1))
    assert decode(tmp_path / "cat.safetensors", "-o", tmp_path / "out", "--format", format).exit_code == 0
    path = tmp_path / "out" / f"cat.{'jpg' if format == 'jpeg' else format}"
    expected = pixels(demo, latents(1))
    if format == "npy":
        array = demo.decode(latents(1), height=64, width=64, output_type="np")[0]
        assert np.array_equal(np.load(path), array)
        return
    if format == "safetensors":
        with safe_open(path, "pt") as file:
            tensor, said = file.get_tensor("image"), file.metadata()
        assert torch.equal(tensor, demo.decode(latents(1), height=64, width=64, output_type="pt")[0])
    else:
        picture = Image.open(path)
        said = picture.info if format == "png" else json.loads(picture.getexif()[270])
        difference = np.abs(image(path).astype(int) - expected)
        assert difference.max() == 0 if format == "png" else difference.mean() < 40
    record = json.loads((tmp_path / "out/job.json").read_text())
    assert said["source"] == str(tmp_path / "cat.safetensors")
    for key in ("checkpoint_sha256", "engine", "dtype", "fluxvae"):
        assert said[key] == record[key]


class Code:
    """An object whose pickle runs something when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_bad_inputs_are_told_and_the_rest_is_done(tmp_path: Path, demo: Decoder) -> None:
    there = tmp_path / "in"
    made = folder_of(there, 3)
    whole = (there / "0000.safetensors").read_bytes()
    (there / "corrupt.safetensors").write_bytes(b"\xff" * 64)
    (there / "truncated.safetensors").write_bytes(whole[:-8])
    (there / "code.pt").write_bytes(pickle.dumps({"latents": Code(tmp_path / "ran")}, protocol=2))
    (there / "noise.npz").write_bytes(b"PK no zip")
    (there / "noise.parquet").write_bytes(b"PAR1")
    (there / "empty.npy").write_bytes(b"")
    (there / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    save(there / "nan.safetensors", torch.where(torch.arange(64) == 7, torch.nan, latents(9)))
    save(there / "size.safetensors", latents(9), height=64, width=128)
    save(there / "words.safetensors", latents(9), height="tall")  # type: ignore[arg-type]
    save(there / "flux2.safetensors", torch.randn(1, 16, 128))
    _npz(there / "0001.npz", latents(9))
    done = decode(there, "-o", tmp_path / "out")
    assert done.exit_code == 6, done.output
    assert not (tmp_path / "ran").exists(), "the pickle's code ran"
    told = {Path(line["source"]).name: line["message"] for line in failures(tmp_path / "out")}
    expected = {
        "corrupt.safetensors": "cannot be read as safetensors",
        "truncated.safetensors": "cannot be read as safetensors",
        "code.pt": "refused, for it holds a pickle",
        "noise.npz": "cannot be read as npz",
        "noise.parquet": "cannot be read as parquet",
        "empty.npy": "cannot be read as npy",
        "gone.safetensors": "cannot be read",
        "nan.safetensors": "values are NaN or Inf",
        "size.safetensors": "got 64x128 (height x width), a grid of 4 x 8 = 32 patches",
        "words.safetensors": "height: got 'tall'",
        "flux2.safetensors": "got 128 features per token, which looks like FLUX.2",
        "0001.safetensors": "0001.png is also the output of",
    }
    assert told.keys() == expected.keys()
    for name, words in expected.items():
        assert words in told[name], told[name]
    assert files(tmp_path / "out") == {"0000.png", "0001.png", "0002.png", "failures.jsonl", "job.json"}
    assert np.array_equal(image(tmp_path / "out/0002.png"), pixels(demo, made["0002"]))
    assert "Also" in done.output or "more, and these, are in" in done.output


def test_a_disk_with_no_room(tmp_path: Path, demo: Decoder) -> None:
    save(tmp_path / "in/small.safetensors", latents(1, 32, 32), 32, 32)
    save(tmp_path / "in/large.safetensors", latents(2, 128, 128), 128, 128)
    demo.prepare()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        report = decode_files(Job(inputs=(str(tmp_path / "in"),), out=str(tmp_path / "out")), decoder=demo)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (report.decoded, report.left) == (1, 0)
    assert "large.png" in failures(tmp_path / "out")[0]["message"]
    assert files(tmp_path / "out") == {"small.png", "job.json", "failures.jsonl"}, "no part of the other"
    again = Job(inputs=(str(tmp_path / "in"),), out=str(tmp_path / "out"), existing="resume")
    assert decode_files(again, decoder=demo).decoded == 1
    assert files(tmp_path / "out") == {"small.png", "large.png", "job.json"}


def test_full_says_what_to_do(tmp_path: Path, demo: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails at its very end, as it does by a quota. Afterwards there is room again."""
    folder_of(tmp_path / "in", 2)
    job = Job(inputs=(str(tmp_path / "in"),), out=str(tmp_path / "out"))
    decode_files(Job(inputs=(str(tmp_path / "in/0000.safetensors"),), out=str(tmp_path / "out")), decoder=demo)
    before = files(tmp_path / "out")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    again = Job(inputs=job.inputs, out=job.out, existing="resume")
    with monkeypatch.context() as patch:
        patch.setattr("fluxvae.batch.run.write_record", lambda *_: None)
        patch.setattr(os, "fsync", full)
        report = decode_files(again, decoder=demo)
    assert "No space left on device; make room there, then run again with --resume" in report.failures[0].message
    assert report.log_problem is not None, "failures.jsonl had no room either, and that is told"
    assert files(tmp_path / "out") == before
    assert decode_files(again, decoder=demo).decoded == 1
