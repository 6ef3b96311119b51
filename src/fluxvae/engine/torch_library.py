"""What a plan needs to know of PyTorch, asked of its C++ library, because importing PyTorch takes longer than planning.

`fluxvae plan` on a CPU comes here without PyTorch imported. Its C++ library is then loaded by itself, a tenth of the
time, and asked by the functions that ``torch.get_num_threads`` and ``torch._C._has_mkldnn`` ask. Where PyTorch is
imported, or its library is not as expected, PyTorch itself is asked.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from pathlib import Path

__all__ = ["has_onednn", "threads"]

_THREADS = "_ZN2at15get_num_threadsEv"
"""``int at::get_num_threads()``."""
_ONEDNN = "_ZN2at7Context9hasMKLDNNEv"
"""``static bool at::Context::hasMKLDNN()``."""


def threads() -> int:
    """Threads of one PyTorch operation now: ``torch.get_num_threads()``, as OpenMP and MKL have them."""
    if (library := _library()) is not None:
        return int(getattr(library, _THREADS)())
    import torch

    return torch.get_num_threads()


def has_onednn() -> bool:
    """Whether this PyTorch was built with oneDNN."""
    if (library := _library()) is not None:
        ask = getattr(library, _ONEDNN)
        ask.restype = ctypes.c_bool
        return bool(ask())
    import torch

    return bool(torch._C._has_mkldnn)


def _library() -> ctypes.CDLL | None:
    """PyTorch's C++ library, if PyTorch is not imported; None if PyTorch itself is to be asked."""
    return None if "torch" in sys.modules else _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None or sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None
    return library if all(hasattr(library, name) for name in (_THREADS, _ONEDNN)) else None
