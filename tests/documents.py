"""What the documents show: their blocks of Python, and the ``fluxvae`` commands in their blocks of shell."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from fluxvae import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(path: Path) -> list[str]:
    """The lines of the document's shell blocks, without comments; a line that ends in a backslash goes on."""
    lines = [line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def run(
    block: str, folder: Path, monkeypatch: pytest.MonkeyPatch, names: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run a block of Python in ``folder``, and return the names that it leaves."""
    monkeypatch.chdir(folder)
    names = {} if names is None else names
    exec(compile(block, "a document", "exec"), names)
    return names


def parse(line: str) -> None:
    """Fail where a line that calls ``fluxvae`` has an option, an argument or a command that there is not."""
    words = shlex.split(line)
    while words[0] != "fluxvae":
        del words[0]  # `uv run`, or variables of the environment
    group: Any = typer.main.get_command(cli.app)
    try:
        if len(words) > 1 and not words[1].startswith("-"):
            group.commands[words[1]].make_context(words[1], words[2:])
    except Exception as error:  # the classes are click's, which typer carries under different names by version
        raise AssertionError(f"{line}: {error}") from error
