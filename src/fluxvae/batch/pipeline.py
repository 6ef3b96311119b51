"""Reading, computing and writing at the same time, on one decoder or encoder.

    reader threads --(a few batches ahead)--> this thread computes --(bounded)--> writer threads

Everything else happens in the calling thread: it hands out work and takes results, so nothing here needs a lock. What
waits in either direction is bounded, and `Timing` says how long the computing waited for either side.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from fluxvae.batch.items import Failure, Item, Result

__all__ = ["Steps", "Timing", "batches", "run_pipeline"]

READERS = 4
BATCHES_AHEAD = 3
WINDOW = 256
"""Items within which those of one size are gathered: far fewer than a job, so that sources are read in order."""


@dataclass
class Timing:
    """The seconds that a decoder or an encoder spent computing and waiting."""

    computing: float = 0.0
    waiting: float = 0.0
    """The seconds it waited for items to be read or results to be written, once the first item had come."""
    first: float = 0.0
    """The seconds it waited until the first item had been read."""

    @property
    def idle_share(self) -> float:
        """The part of its time in which it waited."""
        return self.waiting / (self.waiting + self.computing) if self.computing else 0.0


def batches(items: Iterable[Item], size: Callable[[int, int], int]) -> Iterator[list[Item]]:
    """Group items of one size, ``size(height, width)`` of them at most, near the order in which they came."""
    stream = iter(items)
    while window := list(islice(stream, WINDOW)):
        if any(size(*item.size) > 1 for item in window):  # one by one they come as they lie, which is read fastest
            window.sort(key=lambda item: item.size)  # it is a stable sort, so sources stay in order
        start = 0
        while start < len(window):
            same = window[start].size
            end = start + 1
            while end < len(window) and window[end].size == same:
                end += 1
            step = size(*same)
            yield from (window[i : min(i + step, end)] for i in range(start, end, step))
            start = end


class Steps(Protocol):
    """What one way of a job does with its items; the pipeline says when, and in which thread."""

    def batch(self, height: int, width: int) -> int:
        """The most items of this size that are computed together."""

    def read(self, item: Item) -> Any:
        """Read what an item is made of, in a thread. What it raises becomes the item's failure."""

    def compute(self, group: list[tuple[Item, Any]], stop: threading.Event) -> list[tuple[Item, Any]] | None:
        """Compute one batch: the result of each item, or its `Failure`. None where the job was stopped meanwhile."""

    def write(self, item: Item, made: Any) -> None:
        """Write one result, in a thread. What it raises becomes the item's failure."""


def run_pipeline(
    items: Sequence[Item], steps: Steps, *, stop: threading.Event, timing: Timing, writers: int | None = None
) -> Iterator[Result]:
    """Do what ``steps`` say with every item, and yield what became of each, until all are done or ``stop`` is set.

    Args:
        timing: counted up as it goes on.
        writers: threads; None: one for each core, eight at most.
    """
    sizes: dict[tuple[int, int], int] = {}

    def size(height: int, width: int) -> int:
        if (height, width) not in sizes:
            sizes[height, width] = steps.batch(height, width)
        return sizes[height, width]

    def read(group: list[Item]) -> list[tuple[Item, Any]]:
        return [(item, _read(steps, item)) for item in group]

    writers = writers or min(8, os.cpu_count() or 1)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(READERS, "read") as reading, ThreadPoolExecutor(writers, "write") as writing:
        came = _ahead(reading, read, batches(items, size))
        start = time.perf_counter()
        try:
            for index, group in enumerate(came):
                waited = time.perf_counter() - start
                if index:
                    timing.waiting += waited
                else:
                    timing.first += waited
                if stop.is_set():
                    break
                start = time.perf_counter()
                failed = [(item, found) for item, found in group if isinstance(found, Failure)]
                whole = [(item, found) for item, found in group if not isinstance(found, Failure)]
                made = steps.compute(whole, stop) if whole else []
                if made is None:
                    break
                timing.computing += time.perf_counter() - start
                start = time.perf_counter()
                for item, result in (*failed, *made):
                    if isinstance(result, Failure):
                        yield Result(item, result)
                        continue
                    while len(waiting) >= 2 * writers:
                        yield waiting.popleft().result()
                    waiting.append(writing.submit(_write, steps, item, result))
                while waiting and waiting[0].done():
                    yield waiting.popleft().result()
        finally:
            came.close()
            reading.shutdown(wait=False, cancel_futures=True)
        while waiting:
            yield waiting.popleft().result()


def _ahead(
    threads: ThreadPoolExecutor,
    call: Callable[[list[Item]], list[tuple[Item, Any]]],
    groups: Iterable[list[Item]],
) -> Generator[list[tuple[Item, Any]], None, None]:
    """Yield ``call`` of each group in order. Some groups ahead of the one that is asked for are called already."""
    stream = iter(groups)
    pending = deque(threads.submit(call, group) for group in islice(stream, BATCHES_AHEAD))
    while pending:
        done = pending.popleft().result()
        for group in islice(stream, 1):
            pending.append(threads.submit(call, group))
        yield done


def _read(steps: Steps, item: Item) -> Any:
    try:
        return steps.read(item)
    except Exception as error:  # whatever a file makes a library raise, the others go on
        return Failure.of(error, item.source, item.row, item.name)


def _write(steps: Steps, item: Item, made: Any) -> Result:
    try:
        steps.write(item, made)
    except Exception as error:  # a full disk fails this item; the next may be smaller, or find room again
        return Result(item, Failure.of(error, item.source, item.row, item.name))
    return Result(item)
