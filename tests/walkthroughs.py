"""Follows a walkthrough of the documents: runs its blocks as they are printed, and compares what they print."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from documents import ROOT, run
from fluxvae import cli

PAGES = ROOT / "docs" / "walkthroughs"
IMAGES = ROOT / "docs" / "images"
MACHINES = r"\d+ bytes|[\d.]+ [kMG]?B\b|x\d\.\d+|[\d.]+%|\b[0-9a-f]{16,32}\b"
"""What differs by machine or by run: sizes in bytes, shares, the ids of requests."""


class Walkthrough:
    """A page of ``docs/walkthroughs``, followed in a folder.

    Lines of shell that set a variable, call ``fluxvae`` or run one of the examples are run in this process. A comment
    that says "fails" is right where the command does.

    Args:
        name: the page's, without its suffix.
        folder: takes the place of the clone in which the reader is.
        elsewhere: how lines of shell begin that are not run here: those that start servers, for example.
        instead: texts of its Python, each of which must be there, and what stands in their place here: addresses.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        patch: pytest.MonkeyPatch,
        elsewhere: tuple[str, ...] = (),
        instead: Mapping[str, str] | None = None,
    ) -> None:
        self.path = PAGES / f"{name}.md"
        self.text = self.path.read_text(encoding="utf-8")
        self.folder, self.elsewhere, self.instead = folder, elsewhere, instead or {}
        self.names: dict[str, Any] = {}
        """What its Python has left."""
        self._patch = patch
        (folder / "src").symlink_to(ROOT / "src")
        patch.chdir(folder)

    def follow(self) -> dict[str, Any]:
        """Run it all, and return `names`. Fail where what the page has after a block was not printed by it.

        A block of text belongs to the last block of code of its section. The section of errors has no code.
        """
        for text in self.instead:
            assert text in self.text
        printed: list[str] | None = None
        told = 0
        for heading, language, block in re.findall(
            r"^(## )|^```(\w+)\n(.*?)^```$", self.text, re.DOTALL | re.MULTILINE
        ):
            if heading:
                printed = None
            elif language == "python":
                printed = _lines(self._python(block))
            elif language == "bash":
                shown = [self._shell(line) for line in block.splitlines()]
                printed = None if None in shown else _lines("".join(map(str, shown)))
            elif language == "text" and printed is not None:
                told += 1
                missing = [line for line in _lines(block) if line not in printed]
                assert not missing, f"{self.path.name} tells of {missing}; printed was {printed}"
        assert told
        return self.names

    def tells(self, error: BaseException | str) -> None:
        """Fail unless the page has this error's message."""
        assert "\n".join(_lines(str(error).replace(f"{self.folder}/", ""))) in "\n".join(_lines(self.text))

    def _python(self, block: str) -> str:
        for text, ours in self.instead.items():
            block = block.replace(text, ours)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run(block, self.folder, self._patch, self.names)
        return out.getvalue()

    def _shell(self, line: str) -> str | None:
        """Run a line, and return what it prints, or None where it is run elsewhere."""
        command, _, comment = line.partition("   #")
        if command.startswith(self.elsewhere):
            return None
        words = shlex.split(command.removeprefix("uv run "))
        if words[0] == "export":
            self._patch.setenv(*words[1].split("=", 1))
            return ""
        if words[0] == "fluxvae":
            result = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, words[1:])
            assert ("fails" in comment) == (result.exit_code != 0), f"{line}: {result.output}{result.exception}"
            return result.output
        self._patch.setattr(sys, "argv", words)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        return out.getvalue()


def _lines(text: str) -> list[str]:
    """A text's lines that are to be the same everywhere, without those that are empty or stand for others."""
    lines = [re.sub(" +", " ", line).strip() for line in re.sub(MACHINES, "N", text).splitlines()]
    return [line for line in lines if line not in ("", "...")]


def same_picture(made: Path, name: str) -> None:
    """Fail unless a picture is the one in ``docs/images``, which has fewer colours and perhaps fewer pixels."""
    with Image.open(made) as picture, Image.open(IMAGES / name) as shown:
        pixels = np.asarray(picture.convert("RGB").resize(shown.size, Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(pixels - np.asarray(shown.convert("RGB"))).mean() < 5
