"""Latents as files, jobs over them, and what they must have made."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
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


def latents(seed: int, height: int = 64, width: int = 64) -> torch.Tensor:
    """Packed, (1, N, 64)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, (height // 16) * (width // 16), 64, generator=generator)


def save(path: Path, tensor: torch.Tensor, height: int = 64, width: int = 64) -> None:
    """As safetensors, with its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": tensor}, path, {"height": str(height), "width": str(width)})


def folder_of(path: Path, count: int, height: int = 64, width: int = 64) -> dict[str, torch.Tensor]:
    """So many files ``0000.safetensors``, ...; their latents by name."""
    made = {f"{index:04d}": latents(index, height, width) for index in range(count)}
    for name, tensor in made.items():
        save(path / f"{name}.safetensors", tensor, height, width)
    return made


def pixels(decoder: Decoder, tensor: torch.Tensor, height: int = 64, width: int = 64) -> np.ndarray:
    """(H, W, 3), by the library."""
    return decoder.decode(tensor, height=height, width=width, output_type="uint8")[0]


def image(path: Path) -> np.ndarray:
    """(H, W, 3), read whole."""
    return np.asarray(Image.open(path).convert("RGB"))


def files(folder: Path) -> set[str]:
    """Everything below a folder, hidden files included."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def failures(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``failures.jsonl``."""
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


def decode(*arguments: str | Path) -> Result:
    """``fluxvae decode`` in this process."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, ["decode", *map(str, arguments), *CPU])


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """``fluxvae decode`` in a process of its own, on one core."""
    command = [sys.executable, "-m", "fluxvae.cli", "decode", *map(str, arguments), *CPU]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def wait_a_moment(job: subprocess.Popen[str], seconds: float = 0.02) -> None:
    """So long, or until the job ends."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.wait(seconds)


def wait_for_images(job: subprocess.Popen[str], out: Path, count: int) -> None:
    """Return when so many images are there, or the job has ended."""
    deadline = time.monotonic() + 180
    while len(list(out.glob("*.png"))) < count and job.poll() is None:
        assert time.monotonic() < deadline, f"waited 180 s for {count} images"
        wait_a_moment(job)


def assert_whole(out: Path, made: dict[str, torch.Tensor], decoder: Decoder) -> None:
    """Every image is there once and is the library's; nothing else is there but the record."""
    assert files(out) == {f"{name}.png" for name in made} | {RECORD}
    for name, tensor in made.items():
        assert np.array_equal(image(out / f"{name}.png"), pixels(decoder, tensor)), name
