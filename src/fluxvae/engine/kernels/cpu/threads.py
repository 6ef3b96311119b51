"""Threads for compiled functions that release the GIL: as many as `thread_count` says, the caller among them.

Neither Numba's thread pool nor OpenMP's serves here: Numba's is not safe when several Python threads call it at once,
and OpenMP's threads spin after each use and would compete with ours. Instead, every thread runs a function that takes
tasks from a counter until none is left. Threads that come late, because they were busy, find nothing left to do.

Waking a thread that sleeps takes a tenth of a millisecond on a virtual machine, and a decode has thousands of calls. So
our threads look for the next one for a while before they sleep.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from fluxvae import system
from fluxvae.engine.kernels.cpu.counters import advance, changed, wait
from fluxvae.engine.thread_count import count
from fluxvae.system import after_fork

__all__ = ["run", "share"]

_CLOSED = 1 << 40
"""More helpers than there are anywhere."""
LOOKS = 4000
"""How many times a helper looks for work before it sleeps: about a quarter of a millisecond, which is longer than a
sweep takes between two calls, and too short to be in the way of anything else."""


def run(function: Callable[[int], None], workers: int) -> None:
    """Call ``function(worker)`` for workers 0 to workers - 1, worker 0 in this thread, and return when all are done.

    Every worker takes tasks from a shared counter, so helpers that have not come when this thread has finished are not
    needed any more.
    """
    if workers <= 1:
        function(0)
        return
    work = _Work(function, workers - 1)
    _team.offer(work, workers - 1)
    try:
        function(0)
    finally:
        work.close()
        _team.forget(work)


def share(function: Any, job: Any, tasks: int) -> None:
    """Run a compiled ``function(job, counter)``, which takes its tasks from a counter."""
    counter = np.zeros(1, np.int64)
    run(lambda _: function(job, counter), min(count(), tasks))


class _Work:
    """A function that helpers may take part in until the work is closed."""

    def __init__(self, function: Callable[[int], None], helpers: int) -> None:
        self._function, self._helpers = function, helpers
        # How many helpers have come, and how many of them are done, in a cache line each.
        self._counters = np.zeros((2, 8), np.int64)
        self._error: BaseException | None = None

    def take_part(self) -> None:
        """Do the part of one helper, if there is one left."""
        worker = advance(self._counters, 0, 1) + 1
        if worker > self._helpers:
            return
        try:
            self._function(worker)
        except BaseException as error:  # the caller's to raise, whatever it is
            self._error = error
        advance(self._counters, 1, 1)

    def close(self) -> None:
        """Let nobody else take part, and wait for those who do."""
        came = min(advance(self._counters, 0, _CLOSED), self._helpers)
        wait(self._counters, 1, came, system.give_way())
        if self._error is not None:
            raise self._error


class _Team:
    """Helpers that wait for work. Of two works that are offered at once, the later one gets those that are free."""

    def __init__(self) -> None:
        self._size = 0
        self._lock = threading.Lock()
        self._work: _Work | None = None
        self._offers = np.zeros((1, 8), np.int64)
        self._asleep = 0
        self._awake = threading.Condition()

    def offer(self, work: _Work, helpers: int) -> None:
        """Let so many helpers take part in it, as far as they are free."""
        if self._size < helpers:
            self._grow(helpers)
        self._work = work
        advance(self._offers, 0, 1)
        if self._asleep:
            with self._awake:
                self._awake.notify_all()

    def forget(self, work: _Work) -> None:
        """Keep nothing of a work that is done."""
        if self._work is work:
            self._work = None

    def _grow(self, helpers: int) -> None:
        with self._lock:
            while self._size < helpers:
                self._size += 1
                threading.Thread(target=self._help, name=f"fluxvae-kernel-{self._size}", daemon=True).start()

    def _help(self) -> None:
        seen = 0
        while True:
            now = changed(self._offers, seen, LOOKS)
            if now == seen:
                self._sleep(seen)
                continue
            seen, work = now, self._work
            if work is not None:
                work.take_part()
            del work  # or what it holds would live until the next one

    def _sleep(self, seen: int) -> None:
        with self._awake:
            self._asleep += 1  # before the last look at the offers: who makes one looks at this afterwards
            self._awake.wait_for(lambda: self._offers[0, 0] != seen)
            self._asleep -= 1


_team = _Team()


def _after_fork() -> None:
    """Threads do not survive a fork; the child starts its own."""
    global _team
    _team = _Team()


after_fork(_after_fork)
