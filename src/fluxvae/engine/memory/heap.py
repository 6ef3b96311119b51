"""What the C library does with freed memory: glibc keeps it for later, and resident."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["trim_heap"]

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    Otherwise the results and reordered weights of one layer would stay resident beside those of the next, which no plan
    counts. `HEAP_BYTES` in `kernels/direct/onednn.py` says when it is called within a layer.
    """
    if _TRIM is not None:
        _TRIM(0)
