"""What the C library does with freed memory: glibc keeps it for later, and resident."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["trim_heap"]


def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except TypeError:  # Windows has no one library in which all functions of the process are found
        return None


_TRIM = _malloc_trim()


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    Otherwise the results and reordered weights of one layer would stay resident beside those of the next, which no plan
    counts. `HEAP_BYTES` in `kernels/direct/onednn.py` says when it is called within a layer.
    """
    if _TRIM is not None:
        _TRIM(0)
