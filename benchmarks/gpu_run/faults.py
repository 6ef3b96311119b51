"""What goes wrong in a rehearsal and needs no PyTorch for it, so that a process of these parts begins at once."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

__all__ = ["dies", "hangs", "raises"]


def raises(bench: Any) -> None:
    """A part with a mistake."""
    raise ValueError("rehearsed")


def hangs(bench: Any) -> None:
    """A kernel that never ends."""
    threading.Event().wait()


def dies(bench: Any) -> None:
    """A process that the system kills, as it does where host memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
