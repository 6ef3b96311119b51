"""The pages that a CPU's memory is made of: large ones, and many at once, where the system can be asked for that."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import mmap
import sys
import threading
from collections.abc import Callable

__all__ = ["in_large_pages", "make_pages"]

_LARGE_PAGE = 2 << 20
"""The bytes of a large page of x86-64, and of Arm with small pages of 4 kB."""


def in_large_pages(nbytes: int) -> memoryview | None:
    """Allocate memory, all zeros, for which Linux is asked for large pages; whether it has any is its own affair.

    Returns:
        None where no system can be asked.

    Raises:
        MemoryError: there is not so much memory.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return None
    try:
        block = mmap.mmap(-1, nbytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate {nbytes} bytes: {error}") from error
    start = -ctypes.addressof(ctypes.c_char.from_buffer(block)) % _LARGE_PAGE
    # What the last page has beyond what was asked for would be resident, so only whole pages are asked for.
    whole = nbytes // _LARGE_PAGE * _LARGE_PAGE
    if whole:
        with contextlib.suppress(OSError):  # a system that was built without them
            block.madvise(advice, start, whole)
    return memoryview(block)[start : start + nbytes]


_POPULATE_WRITE = 23
"""The number of Linux's MADV_POPULATE_WRITE, which is there from 5.14 on."""
_EACH = 4 << 20
"""How many bytes a thread makes pages for at least, or starting it would take longer than what it does."""


def make_pages(address: int, nbytes: int, threads: int) -> None:
    """Have the system make the pages of memory that will be written to, many at once, by so many threads.

    Where it cannot be asked for that, or has too little, nothing happens: a page is then made when it is touched. The
    contents stay as they are, and what only shares its first or last page with other memory is left to that.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (address + nbytes - start) // mmap.PAGESIZE
    advise = _madvise()
    if advise is None or pages <= 0:
        return
    workers = max(1, min(threads, pages * mmap.PAGESIZE // _EACH))
    cuts = [start + pages * k // workers * mmap.PAGESIZE for k in range(workers + 1)]
    others = [
        threading.Thread(target=advise, args=(first, last - first, _POPULATE_WRITE))
        for first, last in itertools.pairwise(cuts[1:])
    ]
    for other in others:
        other.start()
    advise(start, cuts[1] - start, _POPULATE_WRITE)
    for other in others:
        other.join()


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Linux's ``madvise``; elsewhere its numbers mean something else."""
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (TypeError, AttributeError):  # there is no one library in which all functions of the process are found
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    made: Callable[[int, int, int], int] = function
    return made
