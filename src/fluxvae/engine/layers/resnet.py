"""A residual block: two convolutions, each behind a norm and SiLU, in two sweeps, or in one.

A GroupNorm between the two needs the statistics of the whole map, so the second sweep waits for the first. A norm of
each pixel needs nothing of the kind: there, one sweep computes both, and the map between them need not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fluxvae.engine.calls import Costs, Geometry, LayerPlan, Place
from fluxvae.engine.layers import reading
from fluxvae.engine.records import AnyNorm, Conv
from fluxvae.engine.sweep.carving import PLACES, STORED, Held, Stage, State, Sweep, moved, ring_rows

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
        self, geometry: Geometry, costs: Costs, size: tuple[int, int], state: State, *, statistics: bool
    ) -> Iterator[tuple[LayerPlan, State]]:
        """The first convolution's output may be kept, spilled or computed again; the result may be kept or spilled."""
        for middle in PLACES:
            for place in STORED:
                steps = tuple(sweep.step(costs) for sweep in self._sweeps(geometry, size, state, middle, place))
                flips = not self._in_place(state, middle, place)
                planned = LayerPlan(self.name, *size, self.conv2.cout, middle, place, flips, steps)
                yield planned, State(place)

    def _in_place(self, state: State, middle: Place, place: Place) -> bool:
        """The result is written over the input, row by row: safe, as no row is read again behind the sweep."""
        return place != middle and place == state.place and self.shortcut is None

    def _sweeps(
        self, geometry: Geometry, size: tuple[int, int], state: State, middle: Place, place: Place
    ) -> tuple[Sweep, ...]:
        itemsize = geometry.itemsize
        first = Stage.of(geometry, "conv3", self.conv1, size, self.norm1)
        second = Stage.of(geometry, "conv3", self.conv2, size, self.norm2)
        base = Held((*size, self.conv1.cin), itemsize, state.place)
        feeds: tuple[Stage, ...] = ()  # what stands between the stored map and the first convolution
        if state.pending is not None:
            small = (size[0] // 2, size[1] // 2)
            feeds = (Stage.of(geometry, "up", state.pending, small).feeding(),)
            base = Held((*small, state.pending.cin), itemsize, state.base)
        inner = Held((*size, self.conv1.cout), itemsize, middle)
        sweep1 = Sweep(
            "conv1", (base, inner), moved((base, 1), (inner, 1)), first, feeds=feeds,
            buffer=None if middle == "memory" else first.output,
        )  # fmt: skip

        out = Held((*size, self.conv2.cout), itemsize, place)
        new = (out,) if place != middle and not self._in_place(state, middle, place) else ()
        recomputes = middle == "recompute"
        rows, ring = second.call.rows, None
        if recomputes and feeds:  # the input is computed once, and its rows are kept for the residual
            ring = (ring_rows(rows, first.call.rows), size[1], self.conv1.cin)
        shortcut = None
        if self.shortcut is not None:
            call = replace(second.call, kind="linear", cin=self.shortcut.cin, cout=self.shortcut.cout, statistics=False)
            shortcut = Stage(self.shortcut, call, size[0], size[0])
        reads = 2 if recomputes and not feeds else 1
        sweep2 = Sweep(
            "conv2", (base, inner, *new), moved((base, reads), (inner, 1), (out, 1)), second,
            feeds=(*feeds, first.feeding()) if recomputes else (),
            residual_feeds=() if recomputes else feeds,
            shortcut=shortcut,
            buffer=None if place == "memory" else second.output,
            residual=None if shortcut is None and state.place == "memory" else (rows, size[1], self.conv1.cin),
            ring=ring,
        )  # fmt: skip
        return (sweep2,) if recomputes and not self.norm2.of_map else (sweep1, sweep2)

    def run(self, run: Run, current: Current, planned: LayerPlan, *, statistics: bool) -> Current:
        """The first sweep computes the first convolution, if only for its statistics; the last all the rest."""
        middle, place = planned.middle, planned.out
        assert middle is not None
        store, side, other, maps = current.store, current.side, 1 - current.side, run.maps
        *before, last = self._sweeps(run.geometry, current.size, current.state, middle, place)
        norms = {self.norm1: run.norm(self.norm1, current.moments)}
        inner = None if middle == "recompute" else maps.new(middle, other, (*current.size, self.conv1.cout))
        between = None
        for sweep in before:
            between = run.sweep(sweep, store, inner, norms, statistics=self.norm2.of_map)
        norms[self.norm2] = run.norm(self.norm2, between)

        if inner is not None and middle == place:
            out = inner
        elif self._in_place(current.state, middle, place):
            out = store
        else:
            out = maps.new(place, other, (*current.size, self.conv2.cout))
        source = store if inner is None else inner
        moments = run.sweep(last, source, out, norms, residual=store, scale=self.scale, statistics=statistics)

        if out is not store:
            maps.drop(store, side)
        if inner is not None and out is not inner:
            maps.drop(inner, other)
        return replace(current, store=out, side=side if out is store else other, state=State(place), moments=moments)
