"""The documents are run: their Python, their clients against a real server, their commands, and their tables."""

from __future__ import annotations

import importlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import typer.main
from PIL import Image

import fluxvae
from documents import DOCUMENTS, ROOT, blocks, commands, parse, run
from fluxvae import cli
from fluxvae.demo import DEFAULT_LATENTS, read_latents
from fluxvae.errors import status_of
from fluxvae.serve.triton.server import TritonServer

DOCS = ROOT / "docs"
API_PAGES = {
    "fluxvae": "fluxvae",
    "client": "fluxvae.client",
    "batch": "fluxvae.batch",
    "diffusers-blocks": "fluxvae.diffusers_blocks",
}


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    latents, height, width = read_latents(DEFAULT_LATENTS)
    return fluxvae.Decoder.from_pretrained("demo").decode(latents, height=height, width=width, output_type="uint8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_compiles(path: Path) -> None:
    for block in blocks(path, "python"):
        compile(block, path.name, "exec")


def test_getting_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray) -> None:
    first, bounded, _ = blocks(DOCS / "getting-started.md", "python")
    names = run(first, tmp_path, monkeypatch)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "astronaut.png")), expected[0])
    run(bounded, tmp_path, monkeypatch, names)


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bounded, keeping = blocks(DOCS / "memory.md", "python")
    names = run(bounded, tmp_path, monkeypatch)
    assert names["decoder"].plan(2048, 2048).peak_bytes <= 600_000_000
    assert "2048x2048" in capsys.readouterr().out
    names = run(keeping, tmp_path, monkeypatch, names)
    assert names["decoder"].plan(1024, 1024).kept_bytes > 0


def test_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray) -> None:
    [block] = blocks(DOCS / "library.md", "python")
    names = run(block, tmp_path, monkeypatch)
    assert np.array_equal(names["pixels"], expected)
    assert np.array_equal(np.asarray(names["pictures"][0]), expected[0])


def test_client(
    demo_server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray
) -> None:
    block = blocks(DOCS / "clients.md", "python")[0]
    assert "localhost:8001" in block
    run(block.replace("localhost:8001", demo_server.grpc_url), tmp_path, monkeypatch)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "astronaut.png")), expected[0])


def test_the_readmes_client(
    demo_server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray
) -> None:
    block = blocks(ROOT / "README.md", "python")[2]
    assert "localhost:8001" in block
    names = run(block.replace("localhost:8001", demo_server.grpc_url), tmp_path, monkeypatch)
    assert np.array_equal(np.asarray(names["image"]), expected[0])


def test_http(demo_server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray) -> None:
    block = blocks(DOCS / "clients.md", "python")[1]
    assert "localhost:8000" in block
    names = run(block.replace("localhost:8000", demo_server.http_url), tmp_path, monkeypatch)
    assert np.array_equal(names["pixels"], expected)


def test_grpc(demo_server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray) -> None:
    block = blocks(DOCS / "clients.md", "python")[2]
    assert "localhost:8001" in block
    run(block.replace("localhost:8001", demo_server.grpc_url), tmp_path, monkeypatch)
    picture = Image.open(io.BytesIO((tmp_path / "astronaut.webp").read_bytes()))
    assert picture.format == "WEBP"
    difference = np.abs(np.asarray(picture.convert("RGB")).astype(int) - expected[0])
    assert difference.mean() < 8, "lossy, but the same picture"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_fluxvaes(path: Path) -> None:
    for line in commands(path):
        if re.match(r"(uv run |\w+=\S* )*fluxvae ", line):
            parse(line)


def test_a_command_that_there_is_not_would_be_seen() -> None:
    for line in ("fluxvae decode --out images", "uv run fluxvae plan 64 --no-such-option", "fluxvae draw"):
        with pytest.raises(AssertionError):
            parse(line)


def test_the_error_table_is_the_codes_own() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| (\w+) \| (\d+) \|$", text, flags=re.MULTILINE)
    documented = {name: (int(http), triton, int(code)) for name, http, triton, code in rows}
    errors = {
        name: tuple(status_of(kind("")))
        for name, kind in vars(fluxvae).items()
        if isinstance(kind, type) and issubclass(kind, fluxvae.FluxVAEError) and kind is not fluxvae.FluxVAEError
    }
    assert documented == errors


def test_the_command_line_and_its_variables_are_told() -> None:
    told = (DOCS / "cli.md").read_text(encoding="utf-8")
    variables = (DOCS / "environment.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(cli.app).commands.items():
        assert f"`fluxvae {name}" in told
        for parameter in command.params:
            assert not parameter.envvar or f"`{parameter.envvar}`" in variables


def test_the_index_leads_to_every_document() -> None:
    led_to = set(re.findall(r"\]\(([\w/-]+\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8")))
    assert led_to == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"index.md"}


def test_the_api_pages_show_what_is_exported() -> None:
    for page, name in API_PAGES.items():
        text = (DOCS / "api" / f"{page}.md").read_text(encoding="utf-8")
        shown = set(re.findall(r"^(?:::: |    +heading: )([\w.]+)$", text, flags=re.MULTILINE))
        exported = set(importlib.import_module(name).__all__) - {"__version__"}
        assert {f"{name}.{one}" for one in exported} <= shown


def test_documents_that_files_name_exist() -> None:
    """Messages, docstrings and settings send their readers to ``docs/...``."""
    folders = ("src", "tests", "triton_models", "deploy", "examples", "benchmarks", "tools")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    named = 0
    for path in [*files, ROOT / "pyproject.toml"]:
        if path.suffix in (".py", ".pbtxt", ".toml", ".yaml", ".md", ".html", "") and "__pycache__" not in path.parts:
            for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8", errors="replace")):
                named += 1
                assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"
    assert named > 10


def test_the_results_fit_on_a_page_that_answers() -> None:
    lines = (DOCS / "performance.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert lines[2].startswith("**How fast is it?**")
