"""What the C library does with freed memory: glibc keeps it for later, and resident."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["trim_heap"]

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    Results and reordered weights of one layer's size would stay resident beside those of the next, outside every plan.
    Within a layer it depends on who allocates: `HEAP_BYTES` of `kernels/direct/onednn.py`.
    """
    if _TRIM is not None:
        _TRIM(0)
