"""Makes spilled maps: files without a name in a folder that is not itself memory, or pinned host memory for a GPU.

A spilled map's file has no name (O_TMPFILE, or unlinked before the first byte), so it vanishes with the process however
that ends.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import torch

from fluxvae.engine.memory.free import free_disk, free_memory, spill_folder
from fluxvae.engine.memory.host_map import HostMap, SideStream, pinned_cache
from fluxvae.engine.memory.stores import SpilledMap, Store
from fluxvae.errors import InvalidOptionError

__all__ = ["Spill"]


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
        """Bytes that may be spilled now; None where there is nowhere to spill to."""
        if self._device.type != "cpu":
            return int(0.8 * free_memory()) + pinned_cache()
        return free_disk(self.folder)

    def describe(self) -> str:
        """Where maps are spilled to, in the words of a plan."""
        return str(self.folder) if self._device.type == "cpu" else "host memory"

    def create(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Store:
        """Make a spilled map with arbitrary contents."""
        if self._device.type != "cpu":
            self._copies = self._copies or SideStream(self._device)
            return HostMap(shape, dtype, self._device, self._copies)
        assert self.folder is not None
        return SpilledMap(_unnamed_file(self.folder), shape, dtype)


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
