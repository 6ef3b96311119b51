"""Triton servers that many tests share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fluxvae.serve.triton.server import TritonServer


@contextlib.contextmanager
def killed_in_the_end(server: TritonServer) -> Iterator[TritonServer]:
    """Start a server, and kill it in the end, for Triton takes seconds to unload models; `test_launcher` stops some.

    Its processes, shared memory and files are gone afterwards all the same.
    """
    with server:
        try:
            yield server
        finally:
            server.stop(hurry=lambda: True)
