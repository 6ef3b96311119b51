"""The arena: one allocation for a whole image, with a map at each end and the running sweep's scratch between them.

It is never fragmented. Nothing of it outlives the call, unless that is asked for. On a CPU its pages are made just
before the map or the scratch that they are handed out for, by all threads and many at once: one by one, as each of them
is touched for the first time, takes half as long again, and pushes out of the caches what is being computed.
"""

from __future__ import annotations

from typing import Protocol

import torch

from fluxvae.engine import thread_count
from fluxvae.engine.calls import ALIGN, aligned
from fluxvae.engine.memory.pages import make_pages
from fluxvae.engine.memory.stores import MemoryMap

__all__ = ["Arena", "Room"]


class Room(Protocol):
    """Where the blocks of a call's arenas come from, one at a time."""

    def take(self, nbytes: int) -> torch.Tensor:
        """A block of at least ``nbytes``, flat uint8, with arbitrary contents, in place of the last one."""

    def close(self) -> None:
        """The call is over, and nothing refers to the block any more."""


class Arena:
    """One block of memory: a map at the left end, scratch in the middle, a map at the right end."""

    def __init__(self, nbytes: int, block: torch.Tensor) -> None:
        """Lay the arena's ``nbytes`` in ``block``, which is flat uint8 and at least `ALIGN` bytes longer."""
        # PyTorch aligns to 64 bytes. Ours is coarser, so that equal blocks are equally aligned in every plan.
        self._flat = block[-block.data_ptr() % ALIGN :][:nbytes]
        self._maps = [0, 0]
        self._cursor = 0
        self._reached = [0, nbytes]  # what lies before the one or behind the other was handed out before

    def map(self, side: int, shape: tuple[int, int, int], dtype: torch.dtype) -> MemoryMap:
        """Make the map of one end of the arena, in place of the one that was there."""
        nbytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        size = aligned(nbytes)
        self._maps[side] = size
        start = 0 if side == 0 else len(self._flat) // ALIGN * ALIGN - size
        if start < 0 or sum(self._maps) > len(self._flat):
            raise AssertionError(f"maps of {self._maps} bytes in an arena of {len(self._flat)}: the plan was wrong")
        self._reach(side, start, start + nbytes)
        return MemoryMap(self._flat[start : start + nbytes].view(dtype).view(shape))

    def shrunk(self, side: int, shape: tuple[int, int, int], dtype: torch.dtype) -> MemoryMap:
        """A map over the start of the one at this end, which it may be computed from.

        Its rows may be written as soon as the old map's rows that lie there were read. It has half as many bytes as the
        old one or fewer. `settle` makes it the map of this end.
        """
        nbytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        start = 0 if side == 0 else len(self._flat) // ALIGN * ALIGN - self._maps[side]
        return MemoryMap(self._flat[start : start + nbytes].view(dtype).view(shape))

    def settle(self, side: int, shrunk: MemoryMap) -> MemoryMap:
        """Make a map from `shrunk`, all of which is written now, the map of this end, and free the rest of the old."""
        rows = shrunk.rows
        made = self.map(side, (rows.shape[0], rows.shape[1], rows.shape[2]), rows.dtype)
        if made.rows.data_ptr() != rows.data_ptr():
            made.rows.copy_(rows)
        return made

    def release(self, side: int) -> None:
        """Free the room of this end's map, which is not needed any more."""
        self._maps[side] = 0

    def new_sweep(self) -> None:
        """Free all scratch."""
        self._cursor = self._maps[0]

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Scratch with arbitrary contents, aligned to `ALIGN`, valid until `new_sweep`."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        start, self._cursor = self._cursor, self._cursor + aligned(nbytes)
        if self._cursor > len(self._flat) // ALIGN * ALIGN - self._maps[1]:
            raise AssertionError(f"scratch of {self._cursor - self._maps[0]} bytes does not fit: the plan was wrong")
        self._reach(0, start, start + nbytes)
        return self._flat[start : start + nbytes].view(dtype).view(shape)

    def _reach(self, side: int, start: int, stop: int) -> None:
        """Make the pages of what is handed out for the first time, and nothing beyond: a plan counts these."""
        left, right = self._reached
        start, stop = max(start, left), min(stop, right)
        if start >= stop:
            return
        self._reached[side] = (stop, start)[side]
        if self._flat.device.type == "cpu":
            make_pages(self._flat.data_ptr() + start, stop - start, thread_count.count())
