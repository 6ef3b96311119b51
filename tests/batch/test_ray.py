"""The same job as a Ray Data pipeline on two workers of this machine: the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxvae import Decoder
from fluxvae.batch import Job, decode_files

from .jobs import failures, files, folder_of, latents, save, start


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_workers_make_the_same_files(tmp_path: Path, demo: Decoder) -> None:
    folder_of(tmp_path / "in", 24)
    save(tmp_path / "in/bad.safetensors", latents(1) * float("nan"))
    alone = decode_files(Job(inputs=(str(tmp_path / "in"),), out=str(tmp_path / "alone")), decoder=demo)
    assert (alone.decoded, len(alone.failures)) == (24, 1)
    out = tmp_path / "ray"
    job = start(tmp_path / "in", "-o", out, "--ray", "--workers", "2", "--threads", "1", "--json")
    said, errors = job.communicate(timeout=240)
    assert job.returncode == 6, errors
    told = json.loads(said)
    assert (told["decoded"], told["failed"], told["left"]) == (24, 1, 0)
    assert files(out) == files(tmp_path / "alone")
    for name in files(out) - {"failures.jsonl"}:
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert failures(out) == failures(tmp_path / "alone")
