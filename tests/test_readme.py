"""The README keeps its promises: its Python and its commands run, and its links lead somewhere. It stays short."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxvae
from documents import ROOT, blocks, commands, parse, run
from fluxvae.demo import DEFAULT_LATENTS, read_latents

PATH = ROOT / "README.md"
README = PATH.read_text(encoding="utf-8")


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    [block] = blocks(PATH, "python")
    run(block, tmp_path, monkeypatch)
    latents, height, width = read_latents(DEFAULT_LATENTS)
    expected = fluxvae.Decoder.from_pretrained("demo").decode(latents, height=height, width=width, output_type="uint8")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "astronaut.png")), expected[0])
    assert "512x512" in capsys.readouterr().out, "the plan"


def test_every_command_is_checked() -> None:
    """Each is one that another test runs, or one whose words fluxvae knows."""
    run_elsewhere = {
        "pip install uv && uv run triton_models/vae_decoder/1/model.py": "tests/test_demo.py",
        "pip install uv && uv run pytest": ".ci/run",
    }
    shown = commands(PATH)
    assert [line for line in shown if line in run_elsewhere] == list(run_elsewhere)
    for line in shown:
        if line in run_elsewhere:
            assert (ROOT / run_elsewhere[line]).exists()
        else:
            parse(line)


def test_the_demo_is_where_the_first_command_says() -> None:
    command = re.search(r"^pip install uv && uv run (\S+\.py)$", README, flags=re.MULTILINE)
    assert command is not None
    assert (ROOT / command[1]).exists()


def test_ci_runs_the_test_command() -> None:
    command = re.search(r"^pip install uv && (uv run pytest)$", README, flags=re.MULTILINE)
    assert command is not None
    assert command[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert (ROOT / target).exists(), target


def test_it_leads_on_instead_of_holding_everything() -> None:
    assert len(README.splitlines()) <= 120
