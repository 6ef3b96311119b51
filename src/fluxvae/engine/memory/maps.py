"""Where the running image's maps and scratch are: the arena, and the maps that are spilled."""

from __future__ import annotations

import torch

from fluxvae.engine.calls import ALIGN, Place
from fluxvae.engine.memory.arena import Arena, Room
from fluxvae.engine.memory.heap import trim_heap
from fluxvae.engine.memory.spill import Spill
from fluxvae.engine.memory.stores import Given, MemoryMap, Store

__all__ = ["Maps"]


class Maps:
    """Hands out what the plan has room for; holds the arena and the spilled maps until `close`."""

    def __init__(self, arena_bytes: int, room: Room, spill: Spill, dtype: torch.dtype, *, trims: bool) -> None:
        """Prepare to hand out memory; nothing is allocated before `begin`.

        Args:
            arena_bytes: the bytes that maps and scratch need together, as the plan says.
            room: where they come from.
            dtype: the dtype that is computed in.
            trims: whether the C library's heap gives back what it holds free between two sweeps.
        """
        self._bytes, self._spill, self._trims = arena_bytes, spill, trims
        self._dtype, self._room = dtype, room
        self._arena = _nothing()
        self._open: list[Store] = []

    def begin(self) -> None:
        """Make an arena for an image. Unless it is kept, it is a fresh one: what the last image touched is gone."""
        self._arena = _nothing()
        self._arena = Arena(self._bytes, self._room.take(self._bytes + ALIGN))

    def close(self) -> None:
        """Give everything back, whatever state the run is in."""
        while self._open:
            self._open.pop().close()
        self._arena = _nothing()  # before its room, which gives back only what nobody refers to
        self._room.close()
        self._trim()

    def in_memory(self, side: int, shape: tuple[int, int, int]) -> MemoryMap:
        """A new map at one end of the arena."""
        return self._arena.map(side, shape, self._dtype)

    def new(self, place: Place, side: int, shape: tuple[int, int, int]) -> Store:
        """A new map, in memory or spilled."""
        if place == "memory":
            return self.in_memory(side, shape)
        store = self._spill.create(shape, self._dtype)
        self._open.append(store)
        return store

    def shrunk(self, side: int, shape: tuple[int, int, int]) -> MemoryMap:
        """A smaller map in the place of the one at this end of the arena, as `Arena.shrunk` says."""
        return self._arena.shrunk(side, shape, self._dtype)

    def settle(self, side: int, shrunk: MemoryMap) -> MemoryMap:
        """Make the smaller map the one of this end, now that it is written."""
        return self._arena.settle(side, shrunk)

    def drop(self, store: Store, side: int) -> None:
        """The map is not needed any more; ``side`` is its end of the arena, if it is there."""
        if isinstance(store, MemoryMap):
            self._arena.release(side)
        elif not isinstance(store, Given):  # which is the caller's
            self._open.remove(store)
            store.close()

    def new_sweep(self) -> None:
        """Free all scratch, which the last sweep needs no more."""
        self._arena.new_sweep()
        self._trim()

    def _trim(self) -> None:
        if self._trims:
            trim_heap()

    def scratch(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Scratch in the compute dtype, valid until `new_sweep`."""
        return self._arena.scratch(shape, self._dtype)

    def workspace(self, nbytes: int) -> torch.Tensor:
        """Flat uint8 scratch for the kernels, valid until `new_sweep`."""
        return self._arena.scratch((nbytes,), torch.uint8)


def _nothing() -> Arena:
    """An arena without memory, for the time between two images."""
    return Arena(0, torch.empty(0, dtype=torch.uint8, device="cpu"))
