"""The last convolution, behind its GroupNorm and SiLU: from the last map to the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fluxvae.engine.calls import Costs, Geometry, LayerPlan
from fluxvae.engine.layers import reading
from fluxvae.engine.records import Conv, Norm
from fluxvae.engine.sweep.carving import Held, Stage, State, Sweep, moved

if TYPE_CHECKING:
    from fluxvae.engine.sweep.sweep import Current, Run

__all__ = ["ConvOut"]


@dataclass(frozen=True)
class ConvOut:
    """The layer ``x -> conv(silu(norm(x)))``, with zeros around the map."""

    name: str
    norm: Norm
    conv: Conv

    enlarges = 1
    wants_statistics = True
    takes_recomputed = False

    @classmethod
    def read(cls, decoder: Any) -> ConvOut:
        """Read diffusers' ``conv_norm_out``, ``conv_act`` and ``conv_out``."""
        reading.silu("decoder.conv_act", decoder.conv_act)
        conv = reading.conv("decoder.conv_out", decoder.conv_out, 3)
        return cls(conv.name, reading.norm("decoder.conv_norm_out", decoder.conv_norm_out), conv)

    def choices(
        self, geometry: Geometry, costs: Costs, size: tuple[int, int], state: State
    ) -> Iterator[tuple[LayerPlan, State]]:
        """There is one way: block by block into the image."""
        step = self._sweep(geometry, size, state).step(costs)
        yield LayerPlan(self.name, *size, self.conv.cout, None, "memory", False, (step,)), state

    def _sweep(self, geometry: Geometry, size: tuple[int, int], state: State) -> Sweep:
        stage = Stage.of(geometry, "conv3", self.conv, size, self.norm)
        source = Held((*size, self.conv.cin), geometry.itemsize, state.place)
        return Sweep("conv_out", (source,), moved((source, 1)), stage, buffer=stage.output)

    def run(self, run: Run, current: Current, planned: LayerPlan, *, statistics: bool) -> Current:
        """Every block is looked at for NaN and Inf on its way into the image."""
        affines = {self.norm: run.affine(self.norm, current.moments)}
        sweep = self._sweep(run.geometry, current.size, current.state)
        moments = run.sweep(sweep, current.store, run.pixels(self.name), affines, statistics=statistics)
        return replace(current, moments=moments)
