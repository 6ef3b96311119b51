"""Progress and cancellation of a decode or an encode, block by block.

On a GPU a block counts as done once the device has been asked to compute it, so the device itself is some blocks behind
what is reported.
"""

from __future__ import annotations

from collections.abc import Callable

from fluxvae.engine.way import Way
from fluxvae.errors import DecodeCancelled

__all__ = ["Cancel", "Clock", "Progress"]

Progress = Callable[[int, int], None]
Cancel = Callable[[], bool]


class Clock:
    """Progress and cancellation, block by block."""

    def __init__(self, way: Way, progress: Progress | None, cancel: Cancel | None) -> None:
        self._way = way
        self._progress, self._cancel = progress, cancel
        self._done = self._total = 0

    def begin(self) -> None:
        """Report the start and ask whether to stop, before the first block."""
        self._ask()
        if self._progress is not None:
            self._progress(self._done, self._total)

    def attempt(self, total: int) -> None:
        """Begin an attempt of ``total`` blocks. What an earlier attempt has done stays counted, and the total grows."""
        self._total = self._done + total

    def tick(self, blocks: int = 1) -> None:
        """Count a block that is done, or several, report it, and ask whether to stop."""
        self._done += blocks
        if self._progress is not None:
            self._progress(self._done, self._total)
        if self._done < self._total:
            self._ask()

    def _ask(self) -> None:
        if self._cancel is not None and self._cancel():
            raise DecodeCancelled(
                f"{self._way.name}: cancelled after {self._done} of {self._total} blocks, as its caller asked"
            )
