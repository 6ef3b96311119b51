"""How much room there is: memory, and disk for spilled maps. Importing this module does not import PyTorch."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvae.errors import InvalidOptionError
from fluxvae.system import FreeMemory, file_system, free_memory

if TYPE_CHECKING:
    import torch

__all__ = ["available_memory", "free_disk", "is_out_of_memory", "spill_folder"]

_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
"""File systems whose files are themselves resident memory."""

_NO_MEMORY = ("out of memory", "DefaultCPUAllocator", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
"""What the messages of errors hold that have no class of their own: those of PyTorch's CPU allocator, cuDNN, cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the GPU had no memory left."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def available_memory(device: torch.device | str) -> FreeMemory:
    """What is free now of a GPU, or of the machine and the control group that this process is in.

    Raises:
        InvalidOptionError: this system does not tell, so a limit has to be given.
    """
    if str(device).startswith("cuda"):
        return FreeMemory(_free_on_card(device), "free memory")
    found = free_memory()
    if found is None:
        raise InvalidOptionError(
            "memory_limit: got none, and this system does not tell how much memory is free; give one, such as "
            "memory_limit='4GiB'"
        )
    return found


def _free_on_card(device: torch.device | str) -> int:
    """Bytes of a GPU that can be had in one piece: free on the card, or free once PyTorch's cache is emptied.

    PyTorch gives back only those segments of its cache of which nothing is in use. ``inactive_split`` counts what is
    free in the others. (It also counts as free what is unused in the pools of CUDA graphs, which is not given back. To
    tell that apart would take PyTorch milliseconds.) `torch.cuda.set_per_process_memory_fraction` may allow less.
    """
    import torch

    index: Any = torch.device(device).index
    if index is None:  # it may be, whatever its type says, and not every function that follows takes it so
        index = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    backend = torch.cuda.get_allocator_backend()
    if backend == "pluggable":  # it has no statistics
        return int(free)
    stats = torch.cuda.memory_stats(index)
    reserved, active, pieces = (
        int(stats.get(f"{name}_bytes.all.current", 0)) for name in ("reserved", "active", "inactive_split")
    )
    whole = max(0, reserved - active - pieces)
    if backend == "native":
        allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total)
        free = min(free, allowed - reserved)  # less than nothing where the cap came after what is reserved
    return max(0, int(free + whole))


def spill_folder(asked: str | os.PathLike[str] | None) -> Path | None:
    """Where maps are spilled: the folder that was asked for, else the first usable one, or None if there is none.

    Raises:
        InvalidOptionError: the folder that was asked for cannot be written to, or its files are themselves memory.
    """
    if asked is not None:
        return _given_folder(Path(asked))
    candidates = (tempfile.gettempdir(), "/var/tmp", os.getcwd())
    usable = [p for p in map(Path, candidates) if p.is_dir() and os.access(p, os.W_OK | os.X_OK)]
    return next((p for p in usable if file_system(p) not in _IN_MEMORY), None)


def free_disk(folder: Path | None) -> int | None:
    """Bytes that may be spilled to ``folder`` now; None if there is no folder."""
    if folder is None:
        return None
    return int(0.95 * shutil.disk_usage(folder).free)


def _given_folder(folder: Path) -> Path:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidOptionError(f"spill_dir: got {str(folder)!r}, expected an existing folder that can be written to")
    kind = file_system(folder)
    if kind in _IN_MEMORY:
        raise InvalidOptionError(
            f"spill_dir: got {str(folder)!r}, which is a {kind}: files there are themselves memory, so spilling to it "
            "would not save any; name a folder on a disk, /var/tmp for example"
        )
    return folder
