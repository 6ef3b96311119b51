"""Finds free ports, and reports taken ones clearly before anything is started."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Sequence

from fluxvae.serve.triton.installation import TritonServerError

__all__ = ["PortTakenError", "free_ports", "url_host"]


class PortTakenError(TritonServerError):
    """Another program has taken the port. It may become free again, so that trying later makes sense."""


def free_ports(host: str, wanted: Sequence[int]) -> list[int]:
    """Return ``wanted`` with each 0 replaced by a free port of ``host``. Any other port must be free.

    The ports are not kept: another program may take one before the caller binds it.

    Raises:
        PortTakenError: a port other than 0 is taken.
        TritonServerError: a port cannot be bound for another reason, such as missing rights, or is wanted twice.
    """
    fixed = [port for port in wanted if port]
    if twice := [port for port in fixed if fixed.count(port) > 1]:
        raise TritonServerError(f"port {twice[0]} on {host}: wanted twice; choose another, or 0 for a free one")
    with contextlib.ExitStack() as stack:  # all are bound at the same time, so that no two can be the same
        return [stack.enter_context(_bind(host, port)).getsockname()[1] for port in wanted]


def url_host(host: str) -> str:
    """Return the name by which this machine reaches what is bound to ``host``, in the form that URLs take."""
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
        raise kind(f"port {port} on {host}: {reason}; choose another, or 0 for a free one") from error
    return bound
