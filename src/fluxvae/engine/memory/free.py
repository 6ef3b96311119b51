"""How much room there is: memory, and disk for spilled maps. Importing this module does not import PyTorch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:
    import torch

__all__ = ["available_memory", "free_disk", "free_memory", "is_out_of_memory", "spill_folder"]

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


def available_memory(device: torch.device) -> int:
    """Bytes free now of a GPU, or of the machine and the control group that this process is in."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return free_memory()


def free_memory() -> int:
    """Bytes free now of the machine and of the control group that this process is in, whichever are fewer."""
    available = _meminfo()
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            allowed, used = Path(limit).read_text().strip(), int(Path(usage).read_text())
        except (OSError, ValueError):
            continue
        if allowed != "max":
            available = min(available, max(int(allowed) - used, 0))
    return available


def _meminfo() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30


def spill_folder(asked: str | os.PathLike[str] | None) -> Path | None:
    """Where maps are spilled: the folder that was asked for, else the first usable one, or None if there is none.

    Raises:
        InvalidOptionError: the folder that was asked for cannot be written to, or its files are themselves memory.
    """
    if asked is not None:
        return _given_folder(Path(asked))
    candidates = (tempfile.gettempdir(), "/var/tmp", os.getcwd())
    usable = [p for p in map(Path, candidates) if p.is_dir() and os.access(p, os.W_OK | os.X_OK)]
    return next((p for p in usable if _file_system(p) not in _IN_MEMORY), None)


def free_disk(folder: Path | None) -> int | None:
    """Bytes that may be spilled to ``folder`` now; None if there is no folder."""
    if folder is None:
        return None
    status = os.statvfs(folder)
    return int(0.95 * status.f_bavail * status.f_frsize)


def _given_folder(folder: Path) -> Path:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidOptionError(f"spill_dir: got {str(folder)!r}, expected an existing folder that can be written to")
    kind = _file_system(folder)
    if kind in _IN_MEMORY:
        raise InvalidOptionError(
            f"spill_dir: got {str(folder)!r}, which is a {kind}: files there are themselves memory, so spilling to it "
            "would not save any; name a folder on a disk, /var/tmp for example"
        )
    return folder


def _file_system(folder: Path) -> str:
    """The type of the file system that ``folder`` is on; "" if /proc/mounts does not say."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    where = str(folder.resolve())
    best, kind = -1, ""
    for line in mounts:
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].encode().decode("unicode_escape")  # a space is written \040
        inside = point == "/" or where == point or where.startswith(point + "/")
        if inside and len(point) >= best:  # a later mount hides an earlier one
            best, kind = len(point), fields[2]
    return kind
