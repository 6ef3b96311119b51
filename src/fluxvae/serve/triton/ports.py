"""Ports: free ones, and a clear word about taken ones before anything is started."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Sequence

from fluxvae.serve.triton.installation import TritonServerError

__all__ = ["PortTakenError", "free_ports", "url_host"]


class PortTakenError(TritonServerError):
    """Another program has the port; it may be free again later."""


def free_ports(host: str, wanted: Sequence[int]) -> list[int]:
    """``wanted`` with each 0 replaced by a free port of ``host``.

    Raises:
        PortTakenError: a fixed one is taken.
        TritonServerError: one is not for us, or is wanted twice.
    """
    fixed = [port for port in wanted if port]
    if twice := [port for port in fixed if fixed.count(port) > 1]:
        raise TritonServerError(f"port {twice[0]} on {host}: wanted twice; choose another, or 0")
    with contextlib.ExitStack() as stack:  # all bound at once, so no two are the same
        return [stack.enter_context(_bind(host, port)).getsockname()[1] for port in wanted]


def url_host(host: str) -> str:
    """How this machine reaches what is bound to ``host``, in the form a URL takes."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _bind(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        kind = PortTakenError if getattr(error, "errno", None) == errno.EADDRINUSE else TritonServerError
        raise kind(f"port {port} on {host}: {reason}; choose another, or 0") from error
    return bound
