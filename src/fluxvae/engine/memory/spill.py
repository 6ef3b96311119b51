"""Makes spilled maps: files without a name in a folder that is not itself memory, or pinned host memory for a GPU.

A spilled map's file has no name, or is removed by Windows as it is closed. So it vanishes with the process however that
ends.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from fluxvae.engine.memory.free import free_disk, spill_folder
from fluxvae.engine.memory.host_map import HostMap, SideStream, pinned_cache
from fluxvae.engine.memory.stores import SpilledMap, Store
from fluxvae.errors import InvalidOptionError
from fluxvae.system import free_memory

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
            free = free_memory()
            return None if free is None else int(0.8 * free.nbytes) + pinned_cache()
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
        # Python's own function knows each system's way to such a file. A buffer would only copy the rows once more.
        # The map closes it.
        file = tempfile.TemporaryFile(buffering=0, prefix="fluxvae-", suffix=".spill", dir=self.folder)  # noqa: SIM115
        return SpilledMap(file, shape, dtype)
