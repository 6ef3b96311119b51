"""The first convolution, from latents or pixels, and the 1x1 convolution that some decoders have before it."""

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

__all__ = ["ConvIn"]


@dataclass(frozen=True)
class ConvIn:
    """The layer ``x -> conv(pointwise(x))``, with zeros around the map."""

    name: str
    pointwise: Conv | None
    conv: Conv

    wants_statistics = False
    takes_recomputed = False

    @classmethod
    def read(cls, name: str, module: Any, pointwise: Any = None) -> ConvIn:
        """Read ``conv_in``, and a decoder's ``post_quant_conv``, which FLUX.1's does not have."""
        before = None if pointwise is None else reading.conv("post_quant_conv", pointwise, 1)
        return cls(name, before, reading.conv(name, module, 3))

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        """The same size."""
        return size

    def choices(
        self, geometry: Geometry, costs: Costs, size: tuple[int, int], state: State, *, wanted: Wanted
    ) -> Iterator[tuple[LayerPlan, State]]:
        """Its result may be kept in memory or spilled, or be left to be computed by the sweep of the next layer."""
        if not (wanted.stored or wanted.statistics or self.pointwise is not None):
            link = Link((self._stage(geometry, size),))
            yield LayerPlan(self.name, *size, self.conv.cout, None, "recompute", False, ()), state.behind(link, None)
        for place in STORED:
            step = self._sweep(geometry, size, place).step(costs)
            yield LayerPlan(self.name, *size, self.conv.cout, None, place, False, (step,)), State(place)

    def _sweep(self, geometry: Geometry, size: tuple[int, int], place: Place) -> Sweep:
        stage = self._stage(geometry, size)
        out = Held((*size, self.conv.cout), geometry.itemsize, place)
        buffer = None if place == "memory" else stage.output
        return Sweep("conv_in", (), (out,), ((out, 1),), Link((stage,)), buffer=buffer)

    def _stage(self, geometry: Geometry, size: tuple[int, int]) -> Stage:
        return Stage.of(geometry, "conv3", self.conv, size)

    def run(self, run: Run, current: Current, planned: LayerPlan, *, statistics: bool) -> Current:
        """The 1x1 convolution is of the whole latents at once, which take little beside any map."""
        if planned.out == "recompute":
            link = Link((self._stage(run.geometry, current.size),))
            return replace(current, state=current.state.behind(link, None), moments=None)
        rows = current.store if self.pointwise is None else run.projected(self.pointwise)
        run.maps.new_sweep()
        out = run.maps.new(planned.out, current.side, (*current.size, self.conv.cout))
        sweep = self._sweep(run.geometry, current.size, planned.out)
        moments = run.sweep(sweep, rows, out, statistics=statistics)
        return replace(current, store=out, state=State(planned.out), moments=moments)
