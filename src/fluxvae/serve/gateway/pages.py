"""The gateway's web pages: the one that decodes and encodes, the one that asks for the token, and that of the API.

Each page is a single HTML document with its style and scripts inside, so that it loads nothing from elsewhere, and a
browser without the token gets nothing but the question for it. The pages' content security policy allows only these
scripts and this style, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path
from typing import Any

from starlette.responses import HTMLResponse, Response

__all__ = ["Pages"]

_FOLDER = Path(__file__).parent / "page"
_MAIN = ("common.js", "safetensors.js", "picture.js", "server.js", "stage.js", "app.js")
"""The scripts of the main page, in the order in which each needs those before it."""
_PARTS = ("theme.css", *_MAIN, "token.js")


class Pages:
    """Makes the pages, from files that are read once.

    Args:
        version: the version of fluxvae, which is shown at the foot of the main page.
    """

    def __init__(self, version: str) -> None:
        parts = {name: (_FOLDER / name).read_text(encoding="utf-8") for name in _PARTS}
        hashes = {name: f"'sha256-{_sha256(text)}'" for name, text in parts.items()}
        scripts = " ".join(hashes[name] for name in _PARTS if name.endswith(".js"))
        self._headers = {
            # All pages have one policy, because the page that asks for the token turns into the main page in place.
            "Content-Security-Policy": f"default-src 'none'; script-src {scripts}; style-src {hashes['theme.css']}; "
            "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
        }
        self._style = f"<style>{parts['theme.css']}</style>"
        self._html: dict[str, str] = {}
        for page, scripts_of_page in {"index.html": _MAIN, "token.html": ("token.js",)}.items():
            text = (_FOLDER / page).read_text(encoding="utf-8")
            tags = "".join(f"<script>{parts[name]}</script>" for name in scripts_of_page)
            self._html[page] = (
                text.replace("<!--style-->", self._style)
                .replace("<!--scripts-->", tags)
                .replace("<!--version-->", html.escape(version))
            )

    def main(self) -> Response:
        """Return the page that decodes and encodes."""
        return HTMLResponse(self._html["index.html"], headers=self._headers)

    def ask_for_token(self) -> Response:
        """Return the page, with status 401, that asks for the token and tells nothing about what is served."""
        headers = self._headers | {"WWW-Authenticate": 'Bearer realm="fluxvae"'}
        return HTMLResponse(self._html["token.html"], 401, headers)

    def docs(self, openapi: dict[str, Any]) -> Response:
        """Return an OpenAPI document as a page to read."""
        body = "".join(
            _operation(method, path, operation)
            for path, operations in openapi["paths"].items()
            for method, operation in operations.items()
        )
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>fluxvae: API</title>'
            f'<link rel="icon" href="data:,">{self._style}</head><body><main class="docs">'
            f"<h1>{html.escape(openapi['info']['title'])}</h1><p>{html.escape(openapi['info']['description'])} "
            f"Version {html.escape(openapi['info']['version'])}. "
            f'For programs: <a href="/openapi.json">openapi.json</a>.</p>{body}</main></body></html>'
        )
        return HTMLResponse(page, headers=self._headers)


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(parameter['name'])}</code>{'' if not parameter.get('required') else ' (needed)'}"
        f"</td><td>{_values(parameter['schema'])}</td><td>{html.escape(parameter.get('description', ''))}</td></tr>"
        for parameter in operation.get("parameters", [])
    )
    answers = "".join(
        f"<tr><td><code>{code}</code></td><td>{html.escape(answer['description'])}</td></tr>"
        for code, answer in operation["responses"].items()
    )
    parts = [f"<section class='card'><h2><code>{method.upper()} {html.escape(path)}</code></h2>"]
    parts.append(f"<p>{html.escape(operation['summary'])} {html.escape(operation.get('description', ''))}</p>")
    if rows:
        parts.append(f"<div class='scroll'><table><thead><tr><th>parameter<th>values<th></thead>{rows}</table></div>")
    parts.append(f"<div class='scroll'><table><thead><tr><th>answer<th></thead>{answers}</table></div></section>")
    return "".join(parts)


def _values(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " ".join(f"<code>{html.escape(str(value))}</code>" for value in schema["enum"])
    if schema["type"] == "array":
        return "whole numbers, repeated"
    return {"integer": "whole number", "number": "number", "string": "text"}[schema["type"]]


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
