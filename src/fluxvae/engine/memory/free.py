"""How much room there is: memory, and disk for spilled maps. Importing this module does not import PyTorch."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fluxvae.errors import InvalidOptionError
from fluxvae.system import FreeMemory, file_system, free_memory

if TYPE_CHECKING:
    import torch

__all__ = ["ENOUGH_BYTES", "available_memory", "free_disk", "is_out_of_memory", "spill_folder"]

_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
"""File systems whose files are themselves resident memory."""

_NO_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "miopenStatusAllocFailed",
)
"""What the messages of errors hold that have no class of their own: those of PyTorch's CPU allocator, of the drivers
(also by way of pinned host memory and the Triton language: ``CUDA error: out of memory``, ``Triton Error [CUDA]: out of
memory``), and of cuDNN, cuBLAS and MIOpen."""
_PERHAPS_NO_MEMORY = (
    "unable to find an engine to execute this computation",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)
"""What the messages hold of errors that have two causes. Where cuDNN's workspace cannot be allocated, PyTorch takes the
next algorithm, and says in the end that there is none; a library that gets no memory for its own state says that it is
not initialised. But a card or a library that does not fit says the same."""
ENOUGH_BYTES = 1 << 30
"""If a GPU has this much left, an error that may have two causes is not for want of memory: no workspace of a block of
rows takes more than 0.2 GB, and the libraries' own state on a card a few hundred MB."""


def is_out_of_memory(error: BaseException, device: torch.device | None = None) -> bool:
    """Whether the machine or the GPU had no memory left.

    For errors that have other causes too, the GPU is asked what is left of it, so it has to be asked while what had
    been allocated still is: in the handler of the error.

    Args:
        device: where it was computed. None: the process's current GPU, where it has used one.
    """
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    if any(text in message for text in _NO_MEMORY):
        return True
    return any(text in message for text in _PERHAPS_NO_MEMORY) and _is_short(device)


def _is_short(device: torch.device | None) -> bool:
    """Whether a GPU has little memory left, of what it has and of what PyTorch may take in this process."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return bool(min(free, _allowed(device, total) - torch.cuda.memory_reserved(device)) < ENOUGH_BYTES)


def _allowed(device: torch.device | int, total: int) -> int:
    """Bytes of a GPU that PyTorch may take: see `torch.cuda.set_per_process_memory_fraction`."""
    import torch

    told = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # PyTorch 2.6 does not tell
    return total if told is None else int(total * told(device))


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

    asked: int | None = torch.device(device).index
    index = torch.cuda.current_device() if asked is None else asked  # not every function that follows takes None
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
        free = min(free, _allowed(index, total) - reserved)  # below 0 where the cap came after what is reserved
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
