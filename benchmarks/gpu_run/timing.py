"""Times by CUDA events, peaks of memory in the process and on the whole card."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["Row", "WholeCard", "peak_of", "timed"]

Row = dict[str, Any]
T = TypeVar("T")
LEAST, MOST = 3, 20
"""How often a call is timed. The rehearsal sets both to one."""


def timed(call: Callable[[], Any], *, seconds: float = 1.0) -> Row:
    """Time a call that was made before, and return the median, the least and the most, in milliseconds.

    It is timed `LEAST` times, and then up to `MOST` times within ``seconds``.
    """
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < LEAST or (len(times) < MOST and time.perf_counter() - begun < seconds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return {"ms": statistics.median(times), "ms_least": min(times), "ms_most": max(times), "runs": len(times)}


def peak_of(call: Callable[[], T]) -> tuple[T, int]:
    """What ``call`` returns, and the bytes that it had allocated at its peak above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


class WholeCard:
    """The most bytes of the card that were taken within a ``with`` block, by all processes, seen every few
    milliseconds.

    PyTorch keeps what it has reserved, so that the end of the block shows a peak that fell between two looks.
    """

    INTERVAL = 0.002

    def __enter__(self) -> WholeCard:
        torch.cuda.synchronize()
        self.before = self.peak = taken()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(self.INTERVAL):
            self.peak = max(self.peak, taken())

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, taken())


def taken() -> int:
    """Bytes of the card that are taken, by this process and all others, the CUDA contexts included."""
    free, total = torch.cuda.mem_get_info()
    return total - free
