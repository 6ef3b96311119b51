"""Runs a plan: one image after the other through the layers, exactly as planned."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fluxvae.engine.kernels import Kernels
from fluxvae.engine.memory.arena import Room
from fluxvae.engine.memory.maps import Maps
from fluxvae.engine.memory.spill import Spill
from fluxvae.engine.network import Network
from fluxvae.engine.plan import Plan
from fluxvae.engine.statistics import FiniteChecks
from fluxvae.engine.sweep.sweep import Run
from fluxvae.engine.way import ENCODE

__all__ = ["Runner"]


class Runner:
    """Holds the maps of a run until `close`; it knows no kind of layer by name."""

    def __init__(
        self,
        network: Network,
        plan: Plan,
        kernels: Kernels,
        room: Room,
        spill: Spill,
        device: torch.device,
        dtype: torch.dtype,
        tick: Callable[[], None],
        *,
        recorded: bool = False,
    ) -> None:
        """Prepare to run ``plan``.

        Args:
            room: where the arenas come from.
            tick: called after every block of rows; it may raise to stop.
            recorded: what is asked of the device is only recorded, so that nothing can be known of it meanwhile.
        """
        self._network, self._plan, self._kernels = network, plan, kernels
        self._dtype, self._tick = dtype, tick
        # A small decode has little to give back to the system, and giving it back would be much of its time. A small
        # encode has: what its first convolution takes would stay beside all that follows.
        trims = device.type == "cpu" and (plan.peak_bytes > 32 << 20 or network.way == ENCODE)
        self._maps = Maps(plan.arena_bytes, room, spill, dtype, trims=trims)
        self.checks = FiniteChecks(device, at_once=False if recorded else None)

    def close(self) -> None:
        """Give everything back, whatever state the run is in."""
        self._maps.close()

    def run(self, given: torch.Tensor, made: torch.Tensor) -> None:
        """Decode or encode one image.

        Args:
            given: raw latents (C, lh, lw), or pixels (3 or 4, H, W).
            made: pixels (3 or 4, H, W), or moments (2 * C, lh, lw), which are written to.

        Raises:
            NonFiniteMap: a map or the result holds NaN or Inf.
        """
        self.launch(given, made)
        self.checks.settle()

    def launch(self, given: torch.Tensor, made: torch.Tensor) -> None:
        """Ask for all that `run` computes, without waiting for a GPU. `checks` has what is still to be asked."""
        run = Run(self._kernels, self._maps, self.checks, self._plan.geometry, self._dtype, given, made, self._tick)
        self._maps.begin()
        current = run.start()
        for index, (layer, planned) in enumerate(zip(self._network.layers, self._plan.layers, strict=True)):
            statistics = self._network.wanted(index).statistics
            current = layer.run(run, current, planned, statistics=statistics)
        self._maps.drop(current.store, current.side)
