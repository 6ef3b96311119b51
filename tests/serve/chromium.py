"""Starts Chromium for the tests that need a real browser."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

FLAGS = [
    "--no-sandbox",  # Chromium has no sandbox where tests run as root, in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOCAL = ("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:")
"""How the addresses begin that a page may ask for."""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium. Without one the test is skipped, unless FLUXVAE_REQUIRE_BROWSER is set, as CI does."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        missing = "no chromium on the PATH: apt-get install chromium"
        if os.environ.get("FLUXVAE_REQUIRE_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, headless=True, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
