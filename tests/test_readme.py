"""The README is run: its Python, its HTTP and gRPC clients (against a real server), its commands, its error table."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxvae
from fluxvae.demo import DEFAULT_LATENTS, read_latents
from fluxvae.errors import status_of
from fluxvae.serve.triton.server import TritonServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def server():
    with TritonServer(ROOT / "triton_models", models=["vae_decoder"]) as server:
        yield server


@pytest.fixture
def expected() -> np.ndarray:
    latents, height, width = read_latents(DEFAULT_LATENTS)
    return fluxvae.Decoder.from_pretrained("demo").decode(latents, height=height, width=width, output_type="uint8")


def run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray) -> None:
    run(BLOCKS[0], tmp_path, monkeypatch)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "astronaut.png")), expected[0])


def test_http(server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray) -> None:
    assert "localhost:8000" in BLOCKS[1]
    names = run(BLOCKS[1].replace("localhost:8000", server.http_url), tmp_path, monkeypatch)
    assert np.array_equal(names["pixels"], expected)


def test_grpc(server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray) -> None:
    assert "localhost:8001" in BLOCKS[2]
    run(BLOCKS[2].replace("localhost:8001", server.grpc_url), tmp_path, monkeypatch)
    picture = Image.open(io.BytesIO((tmp_path / "astronaut.webp").read_bytes()))
    assert picture.format == "WEBP"
    difference = np.abs(np.asarray(picture.convert("RGB")).astype(int) - expected[0])
    assert difference.mean() < 8, "lossy, but the same picture"


def test_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(BLOCKS[3], tmp_path, monkeypatch)
    assert names["decoder"].plan(2048, 2048).peak_bytes <= 600_000_000
    assert "2048x2048" in capsys.readouterr().out


def test_every_block_is_run() -> None:
    assert len(BLOCKS) == 4


def test_the_error_table_is_the_codes_own() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| (\w+) \| (\d+) \|$", README, flags=re.MULTILINE)
    documented = {name: (int(http), triton, int(code)) for name, http, triton, code in rows}
    errors = {
        name: tuple(status_of(kind("")))
        for name, kind in vars(fluxvae).items()
        if isinstance(kind, type) and issubclass(kind, fluxvae.FluxVAEError) and kind is not fluxvae.FluxVAEError
    }
    assert documented == errors


def test_ci_runs_the_readmes_test_command() -> None:
    command = re.search(r"^pip install uv && (uv run pytest)$", README, flags=re.MULTILINE)
    assert command is not None
    assert command[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
