"""How many threads a call may use: as many as ``torch.get_num_threads()`` said when it began.

Our own kernels use them all, and PyTorch has but one meanwhile, so that its threads are not in the way of ours.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fluxvae.engine import torch_library

__all__ = ["alone", "count", "pytorchs"]

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
