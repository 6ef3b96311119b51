"""Feature maps that are read and written by rows: in memory, or in a temporary file.

A spilled map is read into scratch and written from it, because mapped pages would count as resident memory.
`fluxvae.engine.memory.host_map` has the third kind of store: host memory, for maps spilled from a GPU.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fluxvae.errors import MemoryLimitError

__all__ = ["Given", "MemoryMap", "SpilledMap", "Store", "Target"]


class Target(Protocol):
    """A feature map (height, width, channels) that is written by rows."""

    def target(self, start: int, stop: int) -> torch.Tensor | None:
        """The rows to compute into directly, or None where they must be given to `write`."""

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Store rows that were computed elsewhere, from row ``start`` on."""


class Store(Target, Protocol):
    """A feature map (height, width, channels) that is read and written by rows."""

    def read(self, start: int, stop: int, into: torch.Tensor) -> torch.Tensor:
        """The rows: a view where the map is in memory, else ``into``, filled."""

    def close(self) -> None:
        """Give the map's space back."""


class MemoryMap:
    """A map that is a tensor in memory."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def read(self, start: int, stop: int, into: torch.Tensor) -> torch.Tensor:
        """A view of the rows."""
        return self.rows[start:stop]

    def target(self, start: int, stop: int) -> torch.Tensor | None:
        """A view of the rows."""
        return self.rows[start:stop]

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Copy the rows into the tensor."""
        self.rows[start : start + len(rows)].copy_(rows)

    def close(self) -> None:
        """Do nothing, as the arena owns the memory."""


class Given:
    """What a network starts from, as its caller gave it: channels first, in any dtype. Its rows are only read."""

    def __init__(self, values: torch.Tensor) -> None:
        """``values`` is (channels, height, width)."""
        self._rows = values.permute(1, 2, 0)

    def read(self, start: int, stop: int, into: torch.Tensor) -> torch.Tensor:
        """Copy the rows into ``into``, channels last and in its dtype, so that the whole is never held twice."""
        return into.copy_(self._rows[start:stop])

    def target(self, start: int, stop: int) -> torch.Tensor | None:
        """None, as nothing is computed into it."""
        return None

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Refuse to overwrite what belongs to the caller."""
        raise AssertionError("what was given is not written to")

    def close(self) -> None:
        """Do nothing, as the caller owns the memory."""


class SpilledMap:
    """A map in a file that vanishes when it is closed. It moves the file's position, so it is for one thread."""

    def __init__(self, file: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """``file`` is open for reading and writing without a buffer: an `io.FileIO`, or what wraps one on Windows."""
        self._file = file
        self._row_bytes = shape[1] * shape[2] * dtype.itemsize

    def read(self, start: int, stop: int, into: torch.Tensor) -> torch.Tensor:
        """Read the rows into ``into``."""
        self._move(self._file.readinto, start, into)
        return into

    def target(self, start: int, stop: int) -> torch.Tensor | None:
        """None, as a file's rows are not memory that could be computed into."""
        return None

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Write the rows to the file."""
        self._move(self._file.write, start, rows)

    def close(self) -> None:
        """Close the file, which is its end."""
        self._file.close()

    def _move(self, call: Callable[[memoryview], int], start: int, rows: torch.Tensor) -> None:
        view = rows.reshape(-1).view(torch.uint8).numpy().data
        self._file.seek(start * self._row_bytes)
        while view.nbytes:
            try:
                moved = call(view)  # as much as the system moves at once
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise MemoryLimitError(
                        "spill_dir: the disk filled up while a feature map was spilled to it; free some space, name "
                        "another folder with spill_dir, or raise memory_limit so that less is spilled"
                    ) from error
                raise
            if moved == 0:
                raise OSError(errno.EIO, "a spilled feature map ended early")
            view = view[moved:]
