"""What the documentation site needs beyond mkdocs.yml, whose ``hooks`` names this file.

The documents are written to be read in the repository, and the site follows them instead of asking for a second way of
writing. A few things have to be translated for that:

- The navigation is docs/index.md: its headings are the sections, and what they link to are their pages. A page that it
  does not link to is in no navigation, which a strict build refuses.
- Docstrings name documents by their paths, such as docs/cli.md. On the site these are links too.
- A few documents outside docs/ are pages too (`PAGES`).
- Where the text of a link is the name of a document's file, it is the document's title here.
- Any other link out of docs/ leads to the file in the repository. One whose file is not there is left as it is, and
  MkDocs, which finds no page for it, refuses it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Documents in the repository's root, and the pages that they become."""


class Links:
    """Where the links of the page that is being rendered lead."""

    def __init__(self) -> None:
        self.repository = ""
        self.pages: dict[Path, str] = {}
        """Every file of the site: where it lies, and its path in the site."""
        self.page = (Path(), "")

    def translate(self, element: Element) -> None:
        """Make a link, or a picture, what it must be on the site."""
        name = "src" if element.tag == "img" else "href"
        link = element.get(name, "")
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
            return
        source, path = self.page
        target = (source.parent / unquote(parts.path)).resolve()
        if target in self.pages:
            element.set(name, parts._replace(path=get_relative_url(self.pages[target], path)).geturl())
            if element.text and element.text in (parts.path, target.name):  # a file's name says little here
                element.text = title_of(target)
        elif target.exists() and target.is_relative_to(ROOT):
            kind = "tree" if target.is_dir() else "blob"
            address = f"{self.repository}/{kind}/HEAD/{target.relative_to(ROOT).as_posix()}"
            element.set(name, address + (f"#{parts.fragment}" if parts.fragment else ""))


_links = Links()


class _Translate(Treeprocessor):
    def run(self, root: Element) -> None:
        for element in root.iter():
            if element.tag in ("a", "img"):
                _links.translate(element)


class _LinksExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # Links are made at priority 20, and MkDocs reads them at 0.
        md.treeprocessors.register(_Translate(md), "fluxvae_links", 5)


def title_of(document: Path) -> str:
    """Return the heading that a document begins with."""
    return document.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").replace("`", "")


def navigation(docs: Path) -> list[Any]:
    """Return the navigation that docs/index.md is: each second-level heading is a section.

    There a page has its title without the kind of the page, which the section says.
    """
    nav: list[Any] = ["index.md"]
    section, seen = nav, set()
    for line in (docs / "index.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## (.+)", line):
            section = []
            nav.append({heading[1].removesuffix(" ..."): section})
        for path in re.findall(r"\]\(([\w./-]+\.md)\)", line):
            document = (docs / path).resolve()
            page = PAGES.get(path.removeprefix("../"), path)
            if page not in seen and (page != path or document.is_relative_to(docs)):
                seen.add(page)
                title = title_of(document) if document.exists() else page
                if kind := re.match(r"(How to|Walkthrough:) ", title):
                    title = title[kind.end()].upper() + title[kind.end() + 1 :]
                section.append({title: page})
    return nav


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take from the project what it says already: its description, its address, and the index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    _links.repository = project.get("urls", {}).get("Repository", "").removesuffix("/")
    if not _links.repository:
        raise PluginError("pyproject.toml: got no Repository under [project.urls]; the site's links to files need it")
    config.site_description = project["description"]
    config.nav = navigation(Path(config.docs_dir).resolve())
    config.extra["social"] = [{"icon": config.theme["icon"]["repo"], "link": _links.repository, "name": "Repository"}]
    config.markdown_extensions.append(_LinksExtension())
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    _links.pages = {Path(file.abs_src_path).resolve(): file.src_uri for file in files if file.abs_src_path}
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Remember which page is rendered next."""
    _links.page = (Path(str(page.file.abs_src_path)).resolve(), page.file.src_uri)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links of the documents that docstrings name; tests/test_docs.py sees to it that they exist."""
    if not page.file.src_uri.startswith("api/"):
        return html
    return re.sub(r"\bdocs/([\w/-]+)\.md\b", lambda name: _document(name, page, files), html)


def _document(name: re.Match[str], page: Page, files: Files) -> str:
    file = files.get_file_from_path(f"{name[1]}.md")
    if file is None or file.page is None:
        raise PluginError(f"{page.file.src_uri}: a docstring names {name[0]}, which does not exist")
    return f'<a href="{file.url_relative_to(page.file)}">{title_of(Path(str(file.abs_src_path)))}</a>'
