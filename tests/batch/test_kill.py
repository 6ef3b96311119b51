"""A job that is killed or interrupted at any moment, and run again with --resume, is a job that was never disturbed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fluxvae import Decoder, Encoder
from fluxvae.batch.folder import RECORD
from fluxvae.batch.store import open_store

from .jobs import (
    Forked,
    Process,
    assert_whole,
    decode,
    files,
    folder_of,
    image,
    pixels,
    start,
    wait_a_moment,
    wait_for_images,
)

Run = Callable[..., Process]


@pytest.mark.parametrize(
    ("count", "kills", "run"),
    [
        pytest.param(24, 2, Forked, id="24-2"),
        pytest.param(200, 10, start, id="200-10", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_killed_and_resumed(tmp_path: Path, demo: Decoder, count: int, kills: int, run: Run) -> None:
    made = folder_of(tmp_path / "in", count)
    wanted = {f"{name}.png": pixels(demo, tensor) for name, tensor in made.items()}
    out = tmp_path / "out"
    chance = random.Random(0)
    for turn in range(kills):
        before = {path.name: path.stat().st_ino for path in out.glob("*.png")}
        job = run(tmp_path / "in", "-o", out, "--batch", "2", "--resume")
        wait_for_images(job, out, len(before) + chance.randint(1, count // (4 * kills)))
        wait_a_moment(job, chance.uniform(0, 0.05))  # so that the kill does not always come just after an image
        assert job.poll() is None, f"the job ended before kill {turn}: {job.communicate()}"
        job.kill()
        job.communicate()
        assert job.returncode == -signal.SIGKILL
        now = {path.name: path.stat().st_ino for path in out.glob("*.png")}
        assert before.items() <= now.items(), "what was done was done again"
        for name in now:  # every image is whole, even before a run repairs anything
            assert np.array_equal(image(out / name), wanted[name])
    present = len(list(out.glob("*.png")))
    told = json.loads(decode(tmp_path / "in", "-o", out, "--batch", "2", "--resume", "--json").stdout)
    assert (told["present"], told["decoded"], told["failed"], told["left"]) == (present, count - present, 0, 0)
    assert_whole(out, made, demo)


@pytest.mark.parametrize(
    ("count", "kills", "run"),
    [
        pytest.param(24, 2, Forked, id="24-2"),
        pytest.param(200, 10, start, id="200-10", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_encoding_killed_and_resumed(tmp_path: Path, count: int, kills: int, run: Run) -> None:
    (tmp_path / "in").mkdir()
    encoder, wanted = Encoder.from_pretrained("demo", device="cpu"), {}
    for index in range(count):
        picture = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "in" / f"{index:04d}.png")
        wanted[f"{index:04d}.safetensors"] = encoder.encode(picture)
    out, suffix = tmp_path / "out", ".safetensors"
    chance = random.Random(0)
    for turn in range(kills):
        before = {path.name: path.stat().st_ino for path in out.glob(f"*{suffix}")}
        job = run(tmp_path / "in", "-o", out, "--resume", command="encode")
        wait_for_images(job, out, len(before) + chance.randint(1, count // (4 * kills)), suffix)
        wait_a_moment(job, chance.uniform(0, 0.05))
        assert job.poll() is None, f"the job ended before kill {turn}: {job.communicate()}"
        job.kill()
        job.communicate()
        now = {path.name: path.stat().st_ino for path in out.glob(f"*{suffix}")}
        assert before.items() <= now.items(), "what was done was done again"
        for name in now:
            assert torch.equal(load_file(out / name)["latents"], wanted[name]), "every file is whole"
    job = run(tmp_path / "in", "-o", out, "--resume", command="encode")
    job.communicate()
    assert job.returncode == 0
    assert files(out) == wanted.keys() | {RECORD}, "and no temporary file"
    for name, latents in wanted.items():
        assert torch.equal(load_file(out / name)["latents"], latents)


def test_interrupted(tmp_path: Path, demo: Decoder) -> None:
    """After Ctrl-C what is being written is finished, the exit status is 130, and nothing half done stays."""
    made = folder_of(tmp_path / "in", 30)
    out = tmp_path / "out"
    job = Forked(tmp_path / "in", "-o", out, "--batch", "1", "--json")
    wait_for_images(job, out, 3)
    job.send_signal(signal.SIGINT)
    said, errors = job.communicate(timeout=60)
    assert job.returncode == 130, errors
    assert "Traceback" not in errors
    told = json.loads(said)
    assert told["left"] > 0
    assert told["decoded"] + told["left"] == len(made)
    assert len(files(out)) == told["decoded"] + 1, "images and the record, no temporary file"
    assert decode(tmp_path / "in", "-o", out, "--resume").exit_code == 0
    assert_whole(out, made, demo)


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = open_store(str(tmp_path), "aa")
    living = _part(tmp_path, "bb")
    left = living.with_name(_replace_pid(living.name, dead.pid))
    left.write_bytes(b"half")
    assert host.existing() == set()
    assert host.clean() == 1
    assert files(tmp_path) == {living.name}, "another job of a process that runs"
    assert open_store(str(tmp_path), "bb").clean() == 1


def _part(folder: Path, job: str) -> Path:
    from fluxvae.batch.store import _part_name

    path = folder / _part_name("cat.png", job)
    path.write_bytes(b"half")
    return path


def _replace_pid(name: str, pid: int) -> str:
    parts = name.split(".")
    return ".".join([*parts[:4], str(pid), *parts[5:]])
