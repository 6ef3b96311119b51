"""Recognises errors that Triton calls INTERNAL although they pass, so that the same request may work later.

The gateway and the client tell their users to try again after these. The words by which they are recognised are those
of Triton's core and Python backend 2.51; the source of mid-2026 has the same.
"""

from __future__ import annotations

__all__ = ["passing_trouble"]

_TROUBLES = {
    "not healthy": "the model's process has died, and will be back once it is restarted",
    "shared memory pool": "the server's shared memory is full: who runs it can give it more",
}


def passing_trouble(message: str) -> str | None:
    """Return in words for clients what has caused an INTERNAL error that passes; None for one that may not pass.

    Args:
        message: the error's message.
    """
    return next((told for words, told in _TROUBLES.items() if words in message), None)
