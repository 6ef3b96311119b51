"""A 3x3 convolution of stride 2 with one column of zeros at the right and one row below: half the size, each way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fluxvae.engine.calls import Costs, Geometry, LayerPlan, Place
from fluxvae.engine.layers import Wanted, reading
from fluxvae.engine.records import Conv
from fluxvae.engine.sweep.carving import STORED, Held, Link, Stage, State, Sweep

if TYPE_CHECKING:
    from fluxvae.engine.sweep.sweep import Current, Run

__all__ = ["Downsample"]


@dataclass(frozen=True)
class Downsample:
    """A 3x3 convolution that is centred on every second pixel of every second row, beginning with the second of each.

    The last row or column of an odd size is seen by the outputs beside it, and no output is centred on it.
    """

    name: str
    conv: Conv

    wants_statistics = False
    takes_recomputed = True

    @classmethod
    def read(cls, name: str, module: Any) -> Downsample:
        """Read diffusers' ``Downsample2D``, from ``downsampling.py``, as encoders have it."""
        module = reading.expect(name, module, "Downsample2D")
        if not module.use_conv or module.padding != 0 or module.norm is not None:
            reading.refuse(name, module, "a 3x3 convolution of stride 2, padded at the right and below")
        conv = reading.conv(f"{name}.conv", module.conv, 3, stride=2)
        if conv.cin != conv.cout:
            reading.refuse(name, module, "as many channels out as in")
        return cls(name, conv)

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        """Half the size, rounded down."""
        return size[0] // 2, size[1] // 2

    def choices(
        self, geometry: Geometry, costs: Costs, size: tuple[int, int], state: State, *, wanted: Wanted
    ) -> Iterator[tuple[LayerPlan, State]]:
        """Its result may be kept or spilled. From a map in memory to one in memory, it takes that map's place."""
        for place in STORED:
            step = self._sweep(geometry, size, state, place).step(costs)
            flips = not self._in_place(state, place)
            planned = LayerPlan(self.name, *self.size_after(size), self.conv.cout, None, place, flips, (step,))
            yield planned, State(place)

    def _in_place(self, state: State, place: Place) -> bool:
        """The result is written over the input: it is a quarter of its size, so no row is read again behind it."""
        return state.place == place == "memory"

    def _sweep(self, geometry: Geometry, size: tuple[int, int], state: State, place: Place) -> Sweep:
        stage = Stage.of(geometry, "down", self.conv, size)
        start = state.start(Held((*size, self.conv.cin), geometry.itemsize, state.place))
        small = Held((*self.size_after(size), self.conv.cout), geometry.itemsize, place)
        others = () if self._in_place(state, place) else (small,)
        buffer = None if place == "memory" else stage.output
        over = self._in_place(state, place)
        return Sweep("down", start, others, ((small, 1),), Link((stage,)), state.chain, over=over, buffer=buffer)

    def run(self, run: Run, current: Current, planned: LayerPlan, *, statistics: bool) -> Current:
        """Where the result takes the input's place, it moves to its end of the arena when all of it is there."""
        place, side, maps, store = planned.out, current.side, run.maps, current.store
        sweep = self._sweep(run.geometry, current.size, current.state, place)
        after = replace(current, size=self.size_after(current.size), state=State(place))
        shape = (*after.size, self.conv.cout)
        if self._in_place(current.state, place):
            shrunk = maps.shrunk(side, shape)
            moments = run.sweep(sweep, store, shrunk, statistics=statistics)
            return replace(after, store=maps.settle(side, shrunk), moments=moments)
        out = maps.new(place, 1 - side, shape)
        moments = run.sweep(sweep, store, out, statistics=statistics)
        maps.drop(store, side)
        return replace(after, store=out, side=1 - side, moments=moments)
