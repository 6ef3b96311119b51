"""The README keeps its promises: its Python and its commands run, and its links lead somewhere. It stays short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

import fluxvae
from documents import ROOT, blocks, commands, parse, run
from fluxvae.demo import DEFAULT_LATENTS, read_latents
from models import flux_pipeline, random_vae

PATH = ROOT / "README.md"
README = PATH.read_text(encoding="utf-8")


LIBRARY, PIPELINE, CLIENT = blocks(PATH, "python")
"""The three ways to use it, in the order in which they are shown."""


def test_as_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(LIBRARY, tmp_path, monkeypatch)
    latents, height, width = read_latents(DEFAULT_LATENTS)
    expected = fluxvae.Decoder.from_pretrained("demo").decode(latents, height=height, width=width, output_type="uint8")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "astronaut.png")), expected[0])
    assert "512x512" in capsys.readouterr().out, "the plan"


def test_installed_into_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around a small VAE, from the prompt's embeddings and of fewer pixels: no weights of FLUX's are here."""
    pipe = flux_pipeline(random_vae())
    ask = pipe.__class__.__call__

    def asked(self: FluxPipeline, prompt: str, **options: Any) -> Any:
        assert options == {"height": 2048, "width": 2048}
        embeddings = {"prompt_embeds": torch.zeros(1, 4, 32), "pooled_prompt_embeds": torch.zeros(1, 32)}
        return ask(self, height=64, width=64, num_inference_steps=1, **embeddings)

    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda name: pipe)
    monkeypatch.setattr(FluxPipeline, "__call__", asked)
    names = run(PIPELINE, tmp_path, monkeypatch)
    assert names["image"].size == (64, 64)
    assert pipe.vae.__dict__["_decode"].__module__ == "fluxvae.install"


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
