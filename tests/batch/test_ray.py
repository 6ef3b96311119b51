"""The same job as a Ray Data pipeline on two workers of this machine: the same bytes."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fluxvae import Decoder
from fluxvae.batch import EncodeJob, Job, decode_files, encode_files

from .jobs import assert_whole, failures, files, folder_of, latents, save, start, wait_a_moment, wait_for_images

TWO = ("--ray", "--workers", "2", "--threads", "1", "--json")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_workers_make_the_same_files(tmp_path: Path, demo: Decoder) -> None:
    folder_of(tmp_path / "in", 24)
    save(tmp_path / "in/bad.safetensors", latents(1) * float("nan"))
    alone = decode_files(Job(inputs=(str(tmp_path / "in"),), out=str(tmp_path / "alone")), decoder=demo)
    assert (alone.decoded, len(alone.failures)) == (24, 1)
    out = tmp_path / "ray"
    job = start(tmp_path / "in", "-o", out, *TWO)
    said, errors = job.communicate(timeout=240)
    assert job.returncode == 6, errors
    told = json.loads(said)
    assert (told["decoded"], told["failed"], told["left"]) == (24, 1, 0)
    assert files(out) == files(tmp_path / "alone")
    for name in files(out) - {"failures.jsonl"}:
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert failures(out) == failures(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_worker_killed_in_the_middle(tmp_path: Path, demo: Decoder) -> None:
    """After ``kill -9`` of one worker another does its items but those that it had finished, and nothing is lost."""
    made = folder_of(tmp_path / "in", 160)  # enough for calls of ten, so that the worker that dies has one under way
    out = tmp_path / "out"
    job = start(tmp_path / "in", "-o", out, *TWO)
    victim = _workers(job, 2)[0]
    wait_for_images(job, out, 30)
    before = {path.name: path.stat().st_ino for path in out.glob("*.png")}
    assert len(before) < 120, "the job was nearly done before anything died"
    victim.kill()
    victim.wait(60)
    said, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors
    told = json.loads(said)
    assert (told["decoded"], told["failed"], told["left"]) == (160, 0, 0)
    assert before.items() <= {path.name: path.stat().st_ino for path in out.glob("*.png")}.items()
    assert_whole(out, made, demo)


def _workers(job: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    """Wait until the processes of all decoders of a job run, and return them."""
    deadline = time.monotonic() + 180
    while job.poll() is None:
        assert time.monotonic() < deadline, f"waited 180 s for {count} workers"
        found = [one for one in psutil.Process(job.pid).children(recursive=True) if "MapWorker" in _title(one)]
        if len(found) == count:
            return found
        wait_a_moment(job)
    raise AssertionError(job.communicate())


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_workers_encode_to_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index in range(24):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{index:02d}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    alone = encode_files(EncodeJob(inputs=(str(tmp_path / "in"),), out=str(tmp_path / "alone"), device="cpu", seed=4))
    assert (alone.encoded, len(alone.failures)) == (24, 1)
    out = tmp_path / "ray"
    job = start(tmp_path / "in", "-o", out, "--sample", "4", *TWO, command="encode")
    said, errors = job.communicate(timeout=240)
    assert job.returncode == 6, errors
    told = json.loads(said)
    assert (told["encoded"], told["failed"], told["left"]) == (24, 1, 0)
    assert files(out) == files(tmp_path / "alone")
    for name in files(out) - {"failures.jsonl", "job.json"}:
        with safe_open(out / name, "pt") as mine, safe_open(tmp_path / "alone" / name, "pt") as its:
            assert mine.metadata() == its.metadata(), name  # as safetensors writes it, in any order
            assert torch.equal(mine.get_tensor("latents"), its.get_tensor("latents")), name
    assert failures(out) == failures(tmp_path / "alone")
