"""Nearest 2x enlargement and a 3x3 convolution, computed as one operation: the enlarged map itself never exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fluxvae.engine.calls import Costs, Geometry, LayerPlan, Place
from fluxvae.engine.layers import reading
from fluxvae.engine.records import Conv
from fluxvae.engine.sweep.carving import PLACES, Held, Stage, State, Sweep, moved

if TYPE_CHECKING:
    from fluxvae.engine.sweep.sweep import Current, Run

__all__ = ["Upsample"]


@dataclass(frozen=True)
class Upsample:
    """Nearest 2x enlargement, then a 3x3 convolution."""

    name: str
    conv: Conv

    wants_statistics = False
    takes_recomputed = False

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
        self, geometry: Geometry, costs: Costs, size: tuple[int, int], state: State, *, statistics: bool
    ) -> Iterator[tuple[LayerPlan, State]]:
        """Its result may be kept, spilled, or left to be computed again by the sweeps of the next layer.

        Where it is not kept it is computed once all the same if the next layer's norm needs its statistics.
        """
        for place in PLACES:
            kept = place != "recompute"
            steps = (self._sweep(geometry, size, state, place).step(costs),) if kept or statistics else ()
            planned = LayerPlan(self.name, *self.size_after(size), self.conv.cout, None, place, kept, steps)
            yield planned, self._after(state, place)

    def _after(self, state: State, place: Place) -> State:
        return State(place, state.place, self.conv if place == "recompute" else None)

    def _sweep(self, geometry: Geometry, size: tuple[int, int], state: State, place: Place) -> Sweep:
        stage = Stage.of(geometry, "up", self.conv, size)
        small = Held((*size, self.conv.cin), geometry.itemsize, state.place)
        large = Held((*self.size_after(size), self.conv.cout), geometry.itemsize, place)
        buffer = None if place == "memory" else stage.output
        return Sweep("up", (small, large), moved((small, 1), (large, 1)), stage, buffer=buffer)

    def run(self, run: Run, current: Current, planned: LayerPlan, *, statistics: bool) -> Current:
        """The result is written to the other end of the arena, if it is kept in memory."""
        place, side = planned.out, current.side
        size = self.size_after(current.size)
        out = None if place == "recompute" else run.maps.new(place, 1 - side, (*size, self.conv.cout))
        moments = None
        if out is not None or statistics:
            sweep = self._sweep(run.geometry, current.size, current.state, place)
            moments = run.sweep(sweep, current.store, out, {}, statistics=statistics)
        after = replace(current, size=size, state=self._after(current.state, place), moments=moments)
        if out is None:
            return after
        run.maps.drop(current.store, side)
        return replace(after, store=out, side=1 - side)
