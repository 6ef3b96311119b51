"""Errors that Triton calls INTERNAL although they pass: the same request may work later.

For the gateway and the client. The texts are Triton's own, of its Python backend and its core (2.51; the source of
mid-2026 has the same).
"""

from __future__ import annotations

__all__ = ["passing_trouble"]

_TROUBLES = {
    "not healthy": "the model's process has died, and will be back once it is restarted",
    "shared memory pool": "the server's shared memory is full: who runs it can give it more",
}


def passing_trouble(message: str) -> str | None:
    """What the message of an INTERNAL error means, in words for clients; None where it may not pass."""
    return next((told for words, told in _TROUBLES.items() if words in message), None)
