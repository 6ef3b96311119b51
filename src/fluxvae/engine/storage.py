"""Where feature maps live: in the arena, in a temporary file, or (from a GPU) in pinned host memory.

The arena is one allocation for a whole decode: a map at each end, the running sweep's scratch between them. It is
never fragmented, its pages are touched once, and nothing of it outlives the decode.

A spilled map is read and written with pread and pwrite into scratch: mapped pages would count as resident memory. Its
file has no name (O_TMPFILE, or unlinked before the first byte), so it vanishes with the process however that ends.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from fluxvae.engine.host_map import HostMap, SideStream, pinned_cache
from fluxvae.engine.plan import ALIGN, aligned
from fluxvae.engine.room import free_disk, free_memory, spill_folder
from fluxvae.errors import InvalidOptionError, MemoryLimitError

__all__ = ["Arena", "MemoryMap", "Spill", "SpilledMap", "Store", "available_memory", "is_out_of_memory"]


class Store(Protocol):
    """A feature map (height, width, channels) that is read and written by rows."""

    def read(self, start: int, stop: int, into: torch.Tensor) -> torch.Tensor:
        """The rows: a view where the map is in memory, else ``into``, filled."""

    def target(self, start: int, stop: int) -> torch.Tensor | None:
        """The rows to compute into directly, or None where they must be given to `write`."""

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Store rows that were computed elsewhere."""

    def close(self) -> None:
        """Give the space back."""


class MemoryMap:
    """Rows of a tensor."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def read(self, start: int, stop: int, into: torch.Tensor) -> torch.Tensor:
        """A view."""
        return self.rows[start:stop]

    def target(self, start: int, stop: int) -> torch.Tensor | None:
        """A view."""
        return self.rows[start:stop]

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Copy."""
        self.rows[start : start + len(rows)].copy_(rows)

    def close(self) -> None:
        """The arena owns the memory."""


class SpilledMap:
    """A map in an unnamed file."""

    def __init__(self, descriptor: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._descriptor = descriptor
        self._row_bytes = shape[1] * shape[2] * dtype.itemsize

    def read(self, start: int, stop: int, into: torch.Tensor) -> torch.Tensor:
        """pread into ``into``."""
        self._move(os.preadv, start, into)
        return into

    def target(self, start: int, stop: int) -> torch.Tensor | None:
        """A file's rows are not memory."""
        return None

    def write(self, start: int, rows: torch.Tensor) -> None:
        """pwrite."""
        self._move(os.pwritev, start, rows)

    def close(self) -> None:
        """Close; the file has no name, so that is its end."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _move(self, call: Callable[[int, list[memoryview], int], int], start: int, rows: torch.Tensor) -> None:
        view = rows.reshape(-1).view(torch.uint8).numpy().data
        offset = start * self._row_bytes
        while view.nbytes:
            try:
                moved = call(self._descriptor, [view[: 1 << 30]], offset)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise MemoryLimitError(
                        "spill_dir: the disk filled up while a feature map was spilled to it; free some space, name "
                        "another folder with spill_dir, or raise memory_limit so that less is spilled"
                    ) from error
                raise
            if moved == 0:
                raise OSError(errno.EIO, "a spilled feature map ended early")
            view, offset = view[moved:], offset + moved


class Spill:
    """Makes spilled maps for one device: files in a folder that is not memory, or pinned host memory."""

    def __init__(self, device: torch.device, spill_dir: str | os.PathLike[str] | None) -> None:
        self._device = device
        self._copies: SideStream | None = None
        self.folder: Path | None = None
        if device.type != "cpu":
            if spill_dir is not None:
                raise InvalidOptionError(
                    f"spill_dir: got {str(spill_dir)!r} on {device}, where maps are spilled to host memory; omit it"
                )
            return
        self.folder = spill_folder(spill_dir)

    def free(self) -> int | None:
        """Bytes that may be spilled now; None: nowhere to spill to."""
        if self._device.type != "cpu":
            return int(0.8 * free_memory()) + pinned_cache()
        return free_disk(self.folder)

    def describe(self) -> str:
        """For the plan."""
        return str(self.folder) if self._device.type == "cpu" else "host memory"

    def create(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Store:
        """A new map with arbitrary contents."""
        if self._device.type != "cpu":
            self._copies = self._copies or SideStream(self._device)
            return HostMap(shape, dtype, self._device, self._copies)
        assert self.folder is not None
        return SpilledMap(_unnamed_file(self.folder), shape, dtype)


class Arena:
    """One block of memory: map at the left end, scratch, map at the right end."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        # PyTorch aligns to 64 bytes; ours is stricter, so that equal blocks are equally aligned in every plan.
        flat = torch.empty(nbytes + ALIGN, dtype=torch.uint8, device=device)
        self._flat = flat[-flat.data_ptr() % ALIGN :][:nbytes]
        self._maps = [0, 0]
        self._cursor = 0

    def map(self, side: int, shape: tuple[int, int, int], dtype: torch.dtype) -> MemoryMap:
        """The map of one end; the one that was there is no more."""
        nbytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        size = aligned(nbytes)
        self._maps[side] = size
        start = 0 if side == 0 else len(self._flat) // ALIGN * ALIGN - size
        if start < 0 or sum(self._maps) > len(self._flat):
            raise AssertionError(f"maps of {self._maps} bytes in an arena of {len(self._flat)}: the plan was wrong")
        return MemoryMap(self._flat[start : start + nbytes].view(dtype).view(shape))

    def release(self, side: int) -> None:
        """The map of this end is not needed any more."""
        self._maps[side] = 0

    def new_sweep(self) -> None:
        """All scratch is free again."""
        self._cursor = self._maps[0]

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, aligned, valid until `new_sweep`."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        start, self._cursor = self._cursor, self._cursor + aligned(nbytes)
        if self._cursor > len(self._flat) // ALIGN * ALIGN - self._maps[1]:
            raise AssertionError(f"scratch of {self._cursor - self._maps[0]} bytes does not fit: the plan was wrong")
        return self._flat[start : start + nbytes].view(dtype).view(shape)


_NO_MEMORY = ("out of memory", "DefaultCPUAllocator", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the GPU had no memory left; PyTorch's CPU allocator and cuDNN have no class for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def available_memory(device: torch.device) -> int:
    """Bytes free now: of the GPU, or of the machine and of the control group this process is in."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return free_memory()


def _unnamed_file(folder: Path) -> int:
    """A file descriptor, close-on-exec, of a file that no folder lists."""
    flag = getattr(os, "O_TMPFILE", 0)
    if flag:
        try:
            return os.open(folder, flag | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:  # file systems without it (NFS, some overlays)
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
    descriptor, name = tempfile.mkstemp(prefix="fluxvae-", suffix=".spill", dir=folder)
    os.unlink(name)
    return descriptor
