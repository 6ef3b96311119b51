"""Finds in Triton's log what people should hear of at once, which is that shared memory is full.

A full shared memory fails many requests in a row, so people are told by one line a minute at most.
"""

from __future__ import annotations

from pathlib import Path

from fluxvae.serve.model.handover import LOG_MARK

__all__ = ["Notices"]

_LOOK_EVERY_S = 1.0
_TELL_EVERY_S = 60.0
_MOST = 2**20  # bytes of the log that are looked at in one go; where more was appended, only the last of it


class Notices:
    """Reads what is appended to a log, and says what people should hear of.

    It reads no clock: the caller passes the time.

    Args:
        log: the log, which need not exist yet. What it holds when this object is made is never looked at.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._at = log.stat().st_size if log.exists() else 0
        self._looked = self._told = float("-inf")
        self._untold = 0

    def take(self, now: float) -> str | None:
        """Return a line to tell people, if there is one.

        Args:
            now: the time, in seconds.

        Returns:
            None where the log says nothing new, or where people were told less than `_TELL_EVERY_S` seconds ago.
        """
        if now - self._looked < _LOOK_EVERY_S:
            return None
        self._looked = now
        found = self._new_lines()
        self._untold += len(found)
        if not found or now - self._told < _TELL_EVERY_S:
            return None
        self._told, more, self._untold = now, self._untold - 1, 0
        text = found[-1].partition(LOG_MARK)[2].strip(': "\n').replace("shared memory: ", "")
        told = f"shared memory is full: {text}" + (f" (and {more} more like it)" if more else "")
        return f"{told}. Give it more (docker run --shm-size=2g; in Kubernetes an emptyDir of medium Memory)"

    def _new_lines(self) -> list[str]:
        try:
            size = self._log.stat().st_size
            if size == self._at:
                return []
            with self._log.open("rb") as file:
                self._at = max(self._at if self._at < size else 0, size - _MOST)
                file.seek(self._at)
                data = file.read(_MOST)
        except OSError:  # without its log nobody can be told, but the server itself goes on
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return [line for line in whole.decode(errors="replace").splitlines() if LOG_MARK in line]
