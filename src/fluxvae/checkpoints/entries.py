"""What is known about a tensor before it is read: its shape, its dtype and the file that holds it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["DTYPES", "Entry", "itemsize"]

DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "BOOL": ("bool", 1),
}  # fmt: skip
"""For each dtype by its name in safetensors files: PyTorch's name for it, and the bytes that one value takes."""


class Entry(NamedTuple):
    """A tensor in a file, described without its values."""

    shape: tuple[int, ...]
    dtype: str
    """PyTorch's name for the dtype, such as ``"bfloat16"``; where PyTorch has no such dtype, the file's own name."""
    path: Path
    """The file that holds the tensor."""


def itemsize(dtype: str) -> int:
    """Return the bytes that one value of a dtype takes, by PyTorch's name; 0 where the dtype is not known."""
    return next((size for name, size in DTYPES.values() if name == dtype), 0)
