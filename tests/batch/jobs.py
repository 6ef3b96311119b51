"""Latents as files, jobs over them, and what they must have made."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from fluxvae import Decoder, cli
from fluxvae.batch.folder import RECORD

CPU = ("--device", "cpu")
_IMPORTED_LATE = ("diffusers.models.autoencoders.autoencoder_kl", "fluxvae.engine.kernels.cpu.kernels")
"""What a job imports only when it opens a checkpoint: five seconds, which the processes of `Forked` do not spend."""


def latents(seed: int, height: int = 64, width: int = 64) -> torch.Tensor:
    """Random packed latents (1, N, 64) of one image of this size in pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, (height // 16) * (width // 16), 64, generator=generator)


def save(path: Path, tensor: torch.Tensor, height: int = 64, width: int = 64) -> None:
    """Save latents as safetensors, with the size of their image in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": tensor}, path, {"height": str(height), "width": str(width)})


def folder_of(path: Path, count: int, height: int = 64, width: int = 64) -> dict[str, torch.Tensor]:
    """Write ``count`` files ``0000.safetensors``, ``0001.safetensors``, ..., and return their latents by name."""
    made = {f"{index:04d}": latents(index, height, width) for index in range(count)}
    for name, tensor in made.items():
        save(path / f"{name}.safetensors", tensor, height, width)
    return made


def pixels(decoder: Decoder, tensor: torch.Tensor, height: int = 64, width: int = 64) -> np.ndarray:
    """The pixels (H, W, 3) that the library decodes latents to."""
    return decoder.decode(tensor, height=height, width=width, output_type="uint8")[0]


def image(path: Path) -> np.ndarray:
    """The pixels (H, W, 3) of an image file, which is read to its end."""
    return np.asarray(Image.open(path).convert("RGB"))


def files(folder: Path) -> set[str]:
    """The paths of all files below a folder, hidden ones too, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def failures(folder: Path) -> list[dict[str, Any]]:
    """The failures in a folder's ``failures.jsonl``."""
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


def decode(*arguments: str | Path) -> Result:
    """Run ``fluxvae decode`` in this process."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, ["decode", *map(str, arguments), *CPU])


def start(*arguments: str | Path, command: str = "decode", **options: Any) -> subprocess.Popen[str]:
    """Start ``fluxvae decode``, or another command, in a process of its own, on one core."""
    words = [sys.executable, "-m", "fluxvae.cli", command, *map(str, arguments), *CPU]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


class Forked:
    """The same as `start`'s process, but forked from one that has imported everything, which saves seconds."""

    def __init__(self, *arguments: str | Path, command: str = "decode") -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fluxvae.batch", "fluxvae.cli", *_IMPORTED_LATE])
        self._said = tempfile.NamedTemporaryFile("r"), tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        words = ["fluxvae", command, *map(str, arguments), *CPU]
        self._process = context.Process(target=_command, args=(words, *(file.name for file in self._said)))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        assert self._process.exitcode is not None, f"waited {timeout} s for the job to end"
        out, errors = (file.read() for file in self._said)
        return out, errors


def _command(words: list[str], out: str, errors: str) -> None:
    """Run the command line in this process, on one core."""
    for number, name in ((1, out), (2, errors)):
        os.dup2(os.open(name, os.O_WRONLY), number)
    torch.set_num_threads(1)
    sys.argv = words
    cli.main()


Process = subprocess.Popen[str] | Forked


def wait_a_moment(job: Process, seconds: float = 0.02) -> None:
    """Wait so many seconds, or until the job ends."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.wait(seconds)


def wait_for_images(job: Process, out: Path, count: int, suffix: str = ".png") -> None:
    """Return when so many images, or files of another suffix, are there, or the job has ended."""
    deadline = time.monotonic() + 180
    while len(list(out.glob(f"*{suffix}"))) < count and job.poll() is None:
        assert time.monotonic() < deadline, f"waited 180 s for {count} files"
        wait_a_moment(job)


def assert_whole(out: Path, made: dict[str, torch.Tensor], decoder: Decoder) -> None:
    """Assert that every image is there and is the library's, and that nothing else is there but the record."""
    assert files(out) == {f"{name}.png" for name in made} | {RECORD}
    for name, tensor in made.items():
        assert np.array_equal(image(out / f"{name}.png"), pixels(decoder, tensor)), name
