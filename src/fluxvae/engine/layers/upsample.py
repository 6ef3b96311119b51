"""Nearest 2x enlargement and a 3x3 convolution, computed as one operation: the enlarged map itself never exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fluxvae.engine.calls import Costs, Geometry, LayerPlan, Place
from fluxvae.engine.layers import Wanted, reading
from fluxvae.engine.records import Conv
from fluxvae.engine.sweep.carving import MOST_LINKS, PLACES, STORED, Held, Link, Stage, State, Sweep

if TYPE_CHECKING:
    from fluxvae.engine.sweep.sweep import Current, Run

__all__ = ["Upsample"]


@dataclass(frozen=True)
class Upsample:
    """Nearest 2x enlargement, then a 3x3 convolution."""

    name: str
    conv: Conv

    wants_statistics = False
    takes_recomputed = True

    @classmethod
    def read(cls, name: str, module: Any) -> Upsample:
        """Read diffusers' ``Upsample2D``, from ``upsampling.py``."""
        module = reading.expect(name, module, "Upsample2D")
        if not module.use_conv or module.use_conv_transpose or not module.interpolate or module.norm is not None:
            reading.refuse(name, module, "nearest enlargement and a 3x3 convolution")
        conv = reading.conv(f"{name}.conv", module.conv if module.name == "conv" else module.Conv2d_0, 3)
        if conv.cin != conv.cout:
            reading.refuse(name, module, "as many channels out as in")
        return cls(name, conv)

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        """Twice the size."""
        return 2 * size[0], 2 * size[1]

    def choices(
        self, geometry: Geometry, costs: Costs, size: tuple[int, int], state: State, *, wanted: Wanted
    ) -> Iterator[tuple[LayerPlan, State]]:
        """Its result may be kept, spilled, or left to be computed again by the sweeps of the next layer.

        Where it is not kept it is computed once all the same if the next layer's norm needs its statistics.
        """
        for place in STORED if wanted.stored or state.links >= MOST_LINKS else PLACES:
            kept = place != "recompute"
            steps = (self._sweep(geometry, size, state, place).step(costs),) if kept or wanted.statistics else ()
            planned = LayerPlan(self.name, *self.size_after(size), self.conv.cout, None, place, kept, steps)
            yield planned, self._after(geometry, size, state, place)

    def _after(self, geometry: Geometry, size: tuple[int, int], state: State, place: Place) -> State:
        if place != "recompute":
            return State(place)
        return state.behind(Link((Stage.of(geometry, "up", self.conv, size),)), self._small(geometry, size, state))

    def _small(self, geometry: Geometry, size: tuple[int, int], state: State) -> Held:
        return Held((*size, self.conv.cin), geometry.itemsize, state.place)

    def _sweep(self, geometry: Geometry, size: tuple[int, int], state: State, place: Place) -> Sweep:
        stage = Stage.of(geometry, "up", self.conv, size)
        start = state.start(self._small(geometry, size, state))
        large = Held((*self.size_after(size), self.conv.cout), geometry.itemsize, place)
        buffer = None if place == "memory" else stage.output
        return Sweep("up", start, (large,), ((large, 1),), Link((stage,)), state.chain, buffer=buffer)

    def run(self, run: Run, current: Current, planned: LayerPlan, *, statistics: bool) -> Current:
        """The result is written to the other end of the arena, if it is kept in memory."""
        place, side = planned.out, current.side
        size = self.size_after(current.size)
        out = None if place == "recompute" else run.maps.new(place, 1 - side, (*size, self.conv.cout))
        moments = None
        if out is not None or statistics:
            sweep = self._sweep(run.geometry, current.size, current.state, place)
            moments = run.sweep(sweep, current.store, out, statistics=statistics)
        state = self._after(run.geometry, current.size, current.state, place)
        after = replace(current, size=size, state=state, moments=moments)
        if out is None:
            return after
        run.maps.drop(current.store, side)
        return replace(after, store=out, side=1 - side)
