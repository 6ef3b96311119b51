"""The demo passes when it is run as the README's first command, and its checks fail when the decoder is broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fluxvae.verify.oracle
from fluxvae import InvalidLatentsError
from fluxvae.demo import DEFAULT_LATENTS, main, read_latents

SCRIPT = Path(__file__).parent.parent / "triton_models" / "vae_decoder" / "1" / "model.py"


def test_the_first_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("pass") >= 4
    assert "FAIL" not in done.stdout
    assert "fluxvae-demo.png" in done.stdout
    assert "decoding" in done.stderr, "progress goes to stderr"
    assert Image.open(tmp_path / "fluxvae-demo.png").size == (512, 512)


def save_latents(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata)
    return path


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments for a quick run: a corner of the photograph's latents."""
    latents, _, _ = read_latents(DEFAULT_LATENTS)
    file = save_latents(tmp_path / "small.safetensors", {"latents": latents[:, :16].clone()}, height="64", width="64")
    return ["--latents", str(file), "--output", str(tmp_path / "out" / "small.png")]


def test_a_small_run_passes(small: list[str], tmp_path: Path) -> None:
    assert main(small) == 0
    assert Image.open(tmp_path / "out" / "small.png").size == (64, 64)


def test_a_wrong_decode_fails_the_demo(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fluxvae.verify.oracle.flux_pipeline_tail
    monkeypatch.setattr(fluxvae.verify.oracle, "flux_pipeline_tail", lambda *args: real(*args) * 0.999999)
    assert main(small) == 1
    assert "FAIL" in capsys.readouterr().out


def test_bad_input_exits_with_its_own_status(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--height", "48"]) == 2
    assert "InvalidLatentsError" in capsys.readouterr().err
    assert main([*small, "--checkpoint", str(tmp_path / "nowhere")]) == 4
    assert "CheckpointError" in capsys.readouterr().err


def test_latents_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidLatentsError, match="cannot be read"):
        read_latents(tmp_path / "missing.safetensors")
    other = save_latents(tmp_path / "other.safetensors", {"weights": torch.zeros(1)})
    with pytest.raises(InvalidLatentsError, match="expected a tensor 'latents'"):
        read_latents(other)
    unsized = save_latents(tmp_path / "unsized.safetensors", {"latents": torch.zeros(1, 4, 64)})
    with pytest.raises(InvalidLatentsError, match="pass --height and --width"):
        read_latents(unsized)
    assert read_latents(unsized, 32, 32)[1:] == (32, 32)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "--checkpoint path/to/ae.safetensors" in " ".join(capsys.readouterr().out.split())
