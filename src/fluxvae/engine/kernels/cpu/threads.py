"""Threads for compiled functions that release the GIL: as many as ``torch.get_num_threads()``, the caller among them.

Neither Numba's thread pool nor OpenMP's serves here: Numba's is not safe when several Python threads call it at once,
and OpenMP's threads spin after each use and would compete with ours. Instead, every thread runs a function that takes
tasks from a counter until none is left. Threads that come late, because the pool was busy, find nothing left to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from fluxvae.engine import torch_library
from fluxvae.system import after_fork

__all__ = ["alone", "count", "pytorchs", "run", "share"]

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0
_mine = threading.local()


def count() -> int:
    """How many threads a call may use now, that of its caller included."""
    return getattr(_mine, "count", 0) or max(torch_library.threads(), 1)


@contextmanager
def alone() -> Iterator[None]:
    """Leave all threads to our kernels: PyTorch's operations in this Python thread use one thread meanwhile.

    OpenMP's threads spin for milliseconds after each operation, in the way of ours. That was measured to be half of the
    CPU time of a decode whose sweeps copy a row with PyTorch now and then.
    """
    if getattr(_mine, "count", 0):
        yield
        return
    import torch  # here, because a plan counts threads without it

    _mine.count = count()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_mine.count)
        _mine.count = 0


@contextmanager
def pytorchs() -> Iterator[None]:
    """Inside of `alone`, let PyTorch's operations use all threads again, for operations that take long."""
    import torch

    ours = getattr(_mine, "count", 0)
    if ours:
        torch.set_num_threads(ours)
    try:
        yield
    finally:
        if ours:
            torch.set_num_threads(1)


def run(function: Callable[[int], None], workers: int) -> None:
    """Call ``function(worker)`` for workers 0 to workers - 1, worker 0 in this thread, and return when all are done.

    Every worker takes tasks from a shared counter, so helpers that have not started when this thread has finished are
    not needed any more and are called off.
    """
    if workers <= 1:
        function(0)
        return
    futures = _start(function, workers - 1)
    try:
        function(0)
    finally:
        waiting = [future for future in futures if not future.cancel()]
        for future in waiting:
            future.result()


def share(function: Any, job: Any, tasks: int) -> None:
    """Run a compiled ``function(job, counter)``, which takes its tasks from a counter."""
    counter = np.zeros(1, np.int64)
    run(lambda _: function(job, counter), min(count(), tasks))


def _start(function: Callable[[int], None], helpers: int) -> list[Future[None]]:
    global _pool, _size
    with _lock:
        if _pool is None or _size < helpers:
            if _pool is not None:
                _pool.shutdown(wait=False)  # it still finishes what it was given
            _pool, _size = ThreadPoolExecutor(helpers, thread_name_prefix="fluxvae-kernel"), helpers
        return [_pool.submit(function, worker) for worker in range(1, helpers + 1)]


def _after_fork() -> None:
    """Threads do not survive a fork; the child starts its own."""
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, threading.Lock()


after_fork(_after_fork)
