"""Every link between the documents leads to a file that exists, and to a heading that exists."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    {
        *ROOT.glob("*.md"),
        *(
            path
            for folder in ("docs", "deploy", "examples", "src", "comfyui")
            for path in (ROOT / folder).rglob("*.md")
        ),
    }
)


def parsed(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """GitHub's: lower case, without punctuation, hyphens for spaces, and numbered where a heading comes again."""
    found: set[str] = set()
    tokens = parsed(path)
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(part.content for part in inline.children or () if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            again = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", one) is not None for one in found)
            found.add(f"{slug}-{again}" if again else slug)
    return found


def links(path: Path) -> list[str]:
    """Relative ones, of text and of pictures."""
    parts = [part for token in parsed(path) for part in token.children or ()]
    targets = [str(part.attrs.get("href") or part.attrs.get("src") or "") for part in parts]
    return [target for target in targets if target and not re.match(r"[a-z][a-z0-9+.-]*:", target)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


def test_there_are_links_to_check() -> None:
    found = [target for path in DOCUMENTS for target in links(path)]
    assert len(found) > 20
    assert any("#" in target for target in found)
