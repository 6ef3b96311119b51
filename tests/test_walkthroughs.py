"""The walkthroughs that need no server are run as they are printed. The others: serve/test_walkthrough_servers.py."""

from __future__ import annotations

from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fluxvae
from fluxvae import FluxVAEError
from fluxvae.batch import EncodeJob, Job, decode_files, encode_files
from walkthroughs import Walkthrough, same_picture


def test_a_pipeline_on_a_small_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Walkthrough("small-card", tmp_path, monkeypatch)
    names = page.follow()
    assert names["difference"].max() <= 1
    assert (names["difference"] > 0).mean() < 0.001
    same_picture(tmp_path / "small-card.png", "walk-small-card.png")

    vae, pixels = names["pipe"].vae, torch.zeros(1, 3, 512, 512)
    with fluxvae.install(vae, memory_limit="10MB"), pytest.raises(FluxVAEError) as small, torch.no_grad():
        vae.encode(pixels)
    page.tells(small.value)
    with fluxvae.install(vae, memory_limit="100MB"), torch.no_grad():
        vae.enable_tiling()
        with pytest.raises(FluxVAEError) as tiles:
            vae.encode(pixels)
        vae.disable_tiling()
        accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
        with pytest.raises(FluxVAEError) as offload:
            vae.decode(torch.zeros(1, 16, 64, 64))
    page.tells(tiles.value)
    page.tells(offload.value)


def test_a_trainers_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Walkthrough(
        "trainer-cache", tmp_path, monkeypatch, elsewhere=("uv run fluxvae encode photos/ --out flux2/",)
    )
    page.follow()
    assert (tmp_path / "cache" / "astronaut_512x512_0512x0512_flux.npz").exists(), "the name that the page tells"
    same_picture(tmp_path / "sheet.png", "walk-sheet.png")
    [musubi] = (tmp_path / "look-musubi").glob("*.png")
    with Image.open(musubi) as one, Image.open(next((tmp_path / "look").glob("coffee*.png"))) as other:
        difference = np.abs(np.asarray(one).astype(int) - np.asarray(other))
        assert difference.max() <= 1, "the picture of step 3, but for rounding"
        assert (difference > 0).mean() < 0.001
    assert Image.open(tmp_path / "look-packed" / "astronaut.png").size == (512, 512)

    with pytest.raises(FluxVAEError) as format:
        encode_files(EncodeJob(inputs=("photos/",), out="flux2/", format="musubi-flux2-dev"))
    page.tells(format.value)
    with pytest.raises(FluxVAEError) as again:
        decode_files(Job(inputs=("cache/",), out="look/"))
    page.tells(again.value)
    save_file({"latents": torch.zeros(1, 1024, 128)}, "flux2.safetensors")
    decode_files(Job(inputs=("flux2.safetensors",), out="look-flux2/", height=512, width=512))
    failure = Path("look-flux2/failures.jsonl").read_text()
    beginning, end = page.text.split("latents: got 128 features")[1].split("\n```")[0].split(" [...] ")
    assert f"latents: got 128 features{beginning}" in failure
    assert end in failure
