"""fluxvae works without what only POSIX or only Linux has, and asks for that in a few places only."""

from __future__ import annotations

import ast
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fluxvae
from batch.jobs import folder_of
from fluxvae import InvalidLatentsError, system
from fluxvae.batch import Job, decode_files, store
from fluxvae.batch.names import windows_problem
from fluxvae.batch.store import LocalStore

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fluxvae"

# -- without them ----------------------------------------------------------------------------------------------------


def test_all_but_the_server_works_without_posix(tmp_path: Path) -> None:
    """See `systems_child` for what is taken away; the bits are those of this process, from which nothing was."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 8, 12, generator=generator)
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    decoder = fluxvae.Decoder.from_pretrained("demo", device="cpu")
    raw = latents / decoder.vae.config.scaling_factor + decoder.vae.config.shift_factor
    with fluxvae.install(decoder.vae), torch.no_grad():
        decoded = decoder.vae.decode(raw).sample
    wanted = {
        "latents": latents,
        "image": decoder.decode(latents, output_type="pt"),
        "decoded": decoded,
        "encoded": fluxvae.Encoder.from_pretrained("demo", device="cpu").encode(picture, packed=False),
    }
    save_file(wanted, tmp_path / "wanted.safetensors")
    Image.fromarray(picture).save(tmp_path / "picture.png")
    folder_of(tmp_path / "in", 2)
    words = [sys.executable, "-W", "ignore", Path(__file__).with_name("systems_child.py"), tmp_path]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "done"), ran.stderr[-6000:]
