"""Folders and files that cannot be read or written, and folders that are not on a disk of this machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import save as to_safetensors

from fluxvae import Decoder, InvalidOptionError
from fluxvae.batch import Job, Report, decode_files

from .jobs import failures, files, folder_of, image, latents, pixels, save

NOBODY = 65534


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter. Only their owner may enter pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Let all threads of this process be user ``nobody``'s for a while, because root may read and write everything."""
    if os.geteuid() != 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def as_nobody(public: Path, out: Path, decoder: Decoder) -> Report:
    """Run the job of ``in`` as user ``nobody``, after a decode as root has loaded all code that a decode needs."""
    save(public / "warm/cat.safetensors", latents(0))
    decode_files(Job(inputs=(f"{public}/warm",), out=f"{public}/warmed"), decoder=decoder)
    with nobody():
        return decode_files(Job(inputs=(f"{public}/in",), out=str(out)), decoder=decoder)


def test_files_without_permission(public: Path, demo: Decoder) -> None:
    made = folder_of(public / "in", 2)
    save(public / "in/closed/one.safetensors", latents(5))
    pq.write_table(pa.table({"latents": latents(6).tolist()}), public / "in/0002.parquet")
    for path in (public / "in").rglob("*.*"):
        path.chmod(0 if path.stem in ("0001", "0002") else 0o644)
    out = public / "out"
    (out / "closed").mkdir(parents=True)
    out.chmod(0o777)
    (out / "closed").chmod(0o555)
    report = as_nobody(public, out, demo)
    assert (report.decoded, len(report.failures), report.left) == (1, 3, 0), failures(out)
    why = {Path(line["source"]).name: line["message"] for line in failures(out)}
    for name in ("0001.safetensors", "0002.parquet"):
        assert why[name].startswith(f"{name}: cannot be read: ")
        assert "Permission denied; see that it is there and may be read" in why[name]
    assert "out: closed/one.png" in why["one.safetensors"]
    assert "Permission denied; see to the output folder" in why["one.safetensors"]
    assert files(out) == {"0000.png", "failures.jsonl", "job.json"}
    assert np.array_equal(image(out / "0000.png"), pixels(demo, made["0000"]))


def test_a_folder_that_cannot_be_written(public: Path, demo: Decoder) -> None:
    folder_of(public / "in", 1)
    out = public / "out"
    out.mkdir(mode=0o555)
    with pytest.raises(InvalidOptionError, match=f"out: {out} cannot be written: .*Permission denied"):
        as_nobody(public, out, demo)
    assert files(out) == set()


def test_a_folder_where_a_picture_belongs(tmp_path: Path, demo: Decoder) -> None:
    folder_of(tmp_path / "in", 2)
    out = tmp_path / "out"
    (out / "0000.png").mkdir(parents=True)
    report = decode_files(Job(inputs=(str(tmp_path / "in"),), out=str(out)), decoder=demo)
    assert (report.decoded, len(report.failures)) == (1, 1)
    assert "out: 0000.png" in report.failures[0].message
    assert "Is a directory" in report.failures[0].message
    assert files(out) == {"0001.png", "failures.jsonl", "job.json"}


# -- fsspec's filesystems: one in memory stands for those that have a network behind them -----------------------------


@pytest.fixture
def remote() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def remote_latents(filesystem: Any, count: int) -> None:
    for index in range(count):
        data = to_safetensors({"latents": latents(index)}, {"height": "64", "width": "64"})
        filesystem.pipe_file(f"/in/{index:04d}.safetensors", data)


def test_from_and_to_another_filesystem(remote: Any, demo: Decoder) -> None:
    remote_latents(remote, 4)
    job = Job(inputs=("memory://in",), out="memory://out")
    assert decode_files(job, decoder=demo).decoded == 4
    assert sorted(remote.find("/out")) == [f"/out/{index:04d}.png" for index in range(4)] + ["/out/job.json"]
    for index in range(4):
        with remote.open(f"/out/{index:04d}.png") as file:
            assert np.array_equal(np.asarray(Image.open(file)), pixels(demo, latents(index)))
    remote.rm_file("/out/0002.png")
    again = decode_files(Job(inputs=job.inputs, out=job.out, existing="resume"), decoder=demo)
    assert (again.present, again.decoded) == (3, 1)


def test_another_filesystem_that_fails(remote: Any, demo: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that breaks off leaves nothing. The other images are whole, and a later run adds the missing one."""
    remote_latents(remote, 3)
    pipe, broken = type(remote).pipe_file, []

    def breaks_once(self: Any, path: str, value: bytes, **options: Any) -> Any:
        if len(value) > 2000 and not broken:
            broken.append(path)
            pipe(self, path, value[:1000], **options)
            raise OSError("connection reset")
        return pipe(self, path, value, **options)

    monkeypatch.setattr(type(remote), "pipe_file", breaks_once)
    report = decode_files(Job(inputs=("memory://in",), out="memory://out"), decoder=demo)
    assert (report.decoded, len(report.failures)) == (2, 1)
    assert "connection reset" in report.failures[0].message
    left = {path.rpartition("/")[2] for path in remote.find("/out")}
    assert left == {f"{index:04d}.png" for index in range(3)} - {f"{report.failures[0].name}.png"} | {
        "job.json",
        "failures.jsonl",
    }
    assert os.path.basename(broken[0]).startswith(".")
    again = decode_files(Job(inputs=("memory://in",), out="memory://out", existing="resume"), decoder=demo)
    assert (again.decoded, len(again.failures)) == (1, 0)
    assert not remote.exists("/out/failures.jsonl")
