"""The last convolution, behind its norm and SiLU, to pixels or moments, and the 1x1 convolution some end with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fluxvae.engine.calls import Costs, Geometry, LayerPlan
from fluxvae.engine.layers import Wanted, reading
from fluxvae.engine.records import AnyNorm, Conv
from fluxvae.engine.sweep.carving import Held, Link, Stage, State, Sweep

if TYPE_CHECKING:
    from fluxvae.engine.sweep.sweep import Current, Run

__all__ = ["ConvOut"]


@dataclass(frozen=True)
class ConvOut:
    """The layer ``x -> pointwise(conv(silu(norm(x))))``, with zeros around the map."""

    name: str
    norm: AnyNorm
    conv: Conv
    pointwise: Conv | None = None

    takes_recomputed = True

    @classmethod
    def read(cls, name: str, module: Any, pointwise: Any = None) -> ConvOut:
        """Read the end of diffusers' ``Encoder`` or ``Decoder``, and an encoder's ``quant_conv``, if it has one.

        Args:
            name: ``"encoder"`` or ``"decoder"``.
        """
        reading.silu(f"{name}.conv_act", module.conv_act)
        conv = reading.conv(f"{name}.conv_out", module.conv_out, 3)
        norm = reading.norm(f"{name}.conv_norm_out", module.conv_norm_out)
        return cls(conv.name, norm, conv, None if pointwise is None else reading.conv("quant_conv", pointwise, 1))

    @property
    def wants_statistics(self) -> bool:
        """Unless its norm is one of each pixel."""
        return self.norm.of_map

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        """The same size."""
        return size

    def choices(
        self, geometry: Geometry, costs: Costs, size: tuple[int, int], state: State, *, wanted: Wanted
    ) -> Iterator[tuple[LayerPlan, State]]:
        """There is one way: block by block into what is made."""
        step = self._sweep(geometry, size, state).step(costs)
        yield LayerPlan(self.name, *size, self.conv.cout, None, "memory", False, (step,)), state

    def _sweep(self, geometry: Geometry, size: tuple[int, int], state: State) -> Sweep:
        stage = Stage.of(geometry, "conv3", self.conv, size, self.norm)
        start = state.start(Held((*size, self.conv.cin), geometry.itemsize, state.place))
        return Sweep("conv_out", start, (), (), Link((stage,)), state.chain, buffer=stage.output)

    def run(self, run: Run, current: Current, planned: LayerPlan, *, statistics: bool) -> Current:
        """What is made is looked at for NaN and Inf before the 1x1 convolution, and after it."""
        norms = {self.norm: run.norm(self.norm, current.moments)}
        sweep = self._sweep(run.geometry, current.size, current.state)
        result = run.result(self.name)
        moments = run.sweep(sweep, current.store, result, norms=norms, statistics=statistics)
        result.close()
        if self.pointwise is not None:
            run.project_result(self.pointwise)
        return replace(current, moments=moments)
