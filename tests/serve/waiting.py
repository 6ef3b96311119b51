"""Waits for a condition with a deadline, instead of sleeping for a time that may be too short."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def wait_for(condition: Callable[[], _T], what: str, timeout_s: float = 60.0) -> _T:
    """Ask until the answer is true, and return it; fail with the words for what was waited for at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.01)
    return found
