"""Where the running image's maps and scratch are: the arena, the spilled maps, the weights a sweep has loaded."""

from __future__ import annotations

from typing import Any

import torch

from fluxvae.engine.heap import trim_heap
from fluxvae.engine.kernels import Kernels
from fluxvae.engine.plan import Call, Place, Plan
from fluxvae.engine.records import Attention, Conv
from fluxvae.engine.storage import Arena, MemoryMap, Spill, Store

__all__ = ["Maps"]


class Maps:
    """Hands out what the plan has room for; holds the arena and the spilled maps until `close`."""

    def __init__(self, plan: Plan, kernels: Kernels, spill: Spill, device: torch.device, dtype: torch.dtype) -> None:
        self._plan, self._kernels, self._spill = plan, kernels, spill
        self._device, self._dtype = device, dtype
        self._arena = Arena(0, device)
        self._open: list[Store] = []
        # Small decodes have nothing worth returning, and less time to do it in.
        self._trims = device.type == "cpu" and plan.peak_bytes > 32 << 20

    def begin(self) -> None:
        """A fresh arena for an image: what its last sweeps touched is not there during the first of the next."""
        self._arena = Arena(0, self._device)
        self._arena = Arena(self._plan.arena_bytes, self._device)

    def close(self) -> None:
        """Give everything back, whatever state the run is in."""
        while self._open:
            self._open.pop().close()
        self._arena = Arena(0, self._device)
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

    def drop(self, store: Store | None, side: int) -> None:
        """The map is not needed any more; ``side`` is its end of the arena, if it is there."""
        if isinstance(store, MemoryMap):
            self._arena.release(side)
        elif store is not None:
            self._open.remove(store)
            store.close()

    def new_sweep(self) -> None:
        """All scratch is free again."""
        self._arena.new_sweep()
        self._trim()

    def _trim(self) -> None:
        if self._trims:
            trim_heap()

    def scratch(self, shape: tuple[int, ...]) -> torch.Tensor:
        """In the compute dtype, valid until `new_sweep`."""
        return self._arena.scratch(shape, self._dtype)

    def workspace(self, *calls: Call) -> torch.Tensor:
        """The kernels' own scratch; stages take turns with it."""
        return self._arena.scratch((max(self._kernels.workspace(call) for call in calls),), torch.uint8)

    def load(self, conv: Conv, call: Call) -> Any:
        """A layer's weights as the kernels want them, valid until `new_sweep`."""
        return self._kernels.load(conv, call.kind, self._dtype, self._weights(call))

    def load_attention(self, layer: Attention, call: Call) -> Any:
        """As `load`, of all four projections."""
        return self._kernels.load_attention(layer, self._dtype, self._weights(call))

    def _weights(self, call: Call) -> torch.Tensor:
        return self._arena.scratch((self._kernels.loaded(call),), torch.uint8)
