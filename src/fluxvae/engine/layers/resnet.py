"""A residual block: two convolutions, each behind a norm and SiLU, in two sweeps, or in one.

A GroupNorm between the two needs the statistics of the whole map, so the second sweep waits for the first. A norm of
each pixel needs nothing of the kind: there, one sweep computes both, and the map between them need not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fluxvae.engine.calls import Costs, Geometry, LayerPlan, Place
from fluxvae.engine.layers import Wanted, reading
from fluxvae.engine.records import AnyNorm, Conv
from fluxvae.engine.sweep.carving import MOST_LINKS, PLACES, STORED, Held, Link, Stage, State, Sweep

if TYPE_CHECKING:
    from fluxvae.engine.sweep.sweep import Current, Run

__all__ = ["Resnet"]


@dataclass(frozen=True)
class Resnet:
    """The layer ``x -> (shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))) / scale``."""

    name: str
    norm1: AnyNorm
    conv1: Conv
    norm2: AnyNorm
    conv2: Conv
    shortcut: Conv | None
    scale: float

    takes_recomputed = True

    @classmethod
    def read(cls, name: str, module: Any) -> Resnet:
        """Read diffusers' ``ResnetBlock2D``, from ``resnet.py``."""
        module = reading.expect(name, module, "ResnetBlock2D")
        if module.upsample is not None or module.downsample is not None or module.time_emb_proj is not None:
            reading.refuse(name, module, "a resnet without resampling and time embedding")
        if module.time_embedding_norm not in ("default", "group"):  # "group" is what the decoder's up blocks say
            reading.refuse(name, module, "time_embedding_norm='default' or 'group'")
        reading.silu(f"{name}.nonlinearity", module.nonlinearity)
        reading.no_dropout(f"{name}.dropout", module.dropout)
        conv1, conv2 = reading.conv(f"{name}.conv1", module.conv1, 3), reading.conv(f"{name}.conv2", module.conv2, 3)
        shortcut = module.conv_shortcut
        if conv1.cout != conv2.cout or (shortcut is None and conv1.cin != conv2.cout):
            reading.refuse(name, module, "conv1 and conv2 of the same width")
        return cls(
            name,
            reading.norm(f"{name}.norm1", module.norm1),
            conv1,
            reading.norm(f"{name}.norm2", module.norm2),
            conv2,
            None if shortcut is None else reading.conv(f"{name}.conv_shortcut", shortcut, 1),
            float(module.output_scale_factor),
        )

    @property
    def wants_statistics(self) -> bool:
        """Unless its norms are of each pixel."""
        return self.norm1.of_map

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        """The same size."""
        return size

    def choices(
        self, geometry: Geometry, costs: Costs, size: tuple[int, int], state: State, *, wanted: Wanted
    ) -> Iterator[tuple[LayerPlan, State]]:
        """The first convolution's output may be kept, spilled or computed again; the result may be kept or spilled.

        Where its norms and the next layer's are of each pixel, the result may be left to the next layer's sweep too.
        """
        if not (self.wants_statistics or wanted.statistics or wanted.stored) and state.links < MOST_LINKS:
            planned = LayerPlan(self.name, *size, self.conv2.cout, "recompute", "recompute", False, ())
            yield planned, self._behind(geometry, size, state)
        for middle in PLACES:
            for place in STORED:
                steps = tuple(sweep.step(costs) for sweep in self._sweeps(geometry, size, state, middle, place))
                flips = not self._in_place(state, place)
                planned = LayerPlan(self.name, *size, self.conv2.cout, middle, place, flips, steps)
                yield planned, State(place)

    def _behind(self, geometry: Geometry, size: tuple[int, int], state: State) -> State:
        return state.behind(self._link(geometry, size), self._base(geometry, size, state))

    def _base(self, geometry: Geometry, size: tuple[int, int], state: State) -> Held:
        return Held((*size, self.conv1.cin), geometry.itemsize, state.place)

    def _in_place(self, state: State, place: Place) -> bool:
        """The result is written over the input, row by row: safe, as no row is read again behind the sweep."""
        return place == state.place and self.shortcut is None

    def _link(self, geometry: Geometry, size: tuple[int, int]) -> Link:
        first = Stage.of(geometry, "conv3", self.conv1, size, self.norm1)
        second = Stage.of(geometry, "conv3", self.conv2, size, self.norm2)
        shortcut = None
        if self.shortcut is not None:
            call = replace(second.call, kind="linear", cin=self.shortcut.cin, cout=self.shortcut.cout, statistics=False)
            shortcut = Stage(self.shortcut, call, size[0], size[0])
        return Link((first.feeding(), second), True, shortcut, self.scale)

    def _sweeps(
        self, geometry: Geometry, size: tuple[int, int], state: State, middle: Place, place: Place
    ) -> tuple[Sweep, ...]:
        link, start = self._link(geometry, size), state.start(self._base(geometry, size, state))
        inner = Held((*size, self.conv1.cout), geometry.itemsize, middle)
        out = Held((*size, self.conv2.cout), geometry.itemsize, place)
        in_place = self._in_place(state, place)
        new = (out,) if place != middle and not in_place else ()
        buffer = None if place == "memory" else link.stages[-1].output
        if middle == "recompute":
            last = Sweep("conv2", start, new, ((out, 1),), link, state.chain, over=in_place, buffer=buffer)
            if not self.norm2.of_map:
                return (last,)
        else:
            second = replace(link, stages=link.stages[1:])
            passes = ((inner, 1), (out, 1))
            over = place == middle and not in_place
            last = Sweep(
                "conv2", start, (inner, *new), passes, second, state.chain, inner=True, over=over, buffer=buffer
            )
        first = Stage.of(geometry, "conv3", self.conv1, size, self.norm1)
        buffer = None if middle == "memory" else first.output
        before = Sweep("conv1", start, (inner,), ((inner, 1),), Link((first,)), state.chain, buffer=buffer)
        return before, last

    def run(self, run: Run, current: Current, planned: LayerPlan, *, statistics: bool) -> Current:
        """The first sweep computes the first convolution, if only for its statistics; the last all the rest."""
        middle, place = planned.middle, planned.out
        assert middle is not None
        if place == "recompute":
            return replace(current, state=self._behind(run.geometry, current.size, current.state), moments=None)
        store, side, other, maps = current.store, current.side, 1 - current.side, run.maps
        *before, last = self._sweeps(run.geometry, current.size, current.state, middle, place)
        norms = {self.norm1: run.norm(self.norm1, current.moments)}
        inner = None if middle == "recompute" else maps.new(middle, other, (*current.size, self.conv1.cout))
        between = None
        for sweep in before:
            between = run.sweep(sweep, store, inner, norms=norms, statistics=self.norm2.of_map)
        norms[self.norm2] = run.norm(self.norm2, between)

        if self._in_place(current.state, place):
            out = store
        elif inner is not None and middle == place:
            out = inner
        else:
            out = maps.new(place, other, (*current.size, self.conv2.cout))
        moments = run.sweep(last, store, out, norms=norms, inner=inner, statistics=statistics)

        if out is not store:
            maps.drop(store, side)
        if inner is not None and out is not inner:
            maps.drop(inner, other)
        return replace(current, store=out, side=side if out is store else other, state=State(place), moments=moments)
