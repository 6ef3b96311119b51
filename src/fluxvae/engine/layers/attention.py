"""Self-attention of one head over all pixels: the map is normalised once, then queries go block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fluxvae.engine.calls import Call, Costs, Geometry, LayerPlan, Step, aligned
from fluxvae.engine.kernels import AttentionBlock
from fluxvae.engine.layers import Wanted, reading
from fluxvae.engine.records import AnyNorm, Projections
from fluxvae.engine.sweep.carving import Held, Shape, State, held_in, moved, staging

if TYPE_CHECKING:
    from fluxvae.engine.sweep.sweep import Current, Run

__all__ = ["Attention"]


@dataclass(frozen=True)
class Attention:
    """The layer ``x -> (out(attend(norm(x))) + x) / scale``."""

    name: str
    norm: AnyNorm
    projections: Projections

    takes_recomputed = False

    @classmethod
    def read(cls, name: str, module: Any) -> Attention:
        """Read diffusers' ``Attention``, from ``attention_processor.py``."""
        module = reading.expect(name, module, "Attention")
        for part in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
            if getattr(module, part, None) is not None:
                reading.refuse(f"{name}.{part}", getattr(module, part), "none")
        if module.heads != 1 or module.is_cross_attention or getattr(module, "is_causal", False):
            reading.refuse(name, module, "self-attention of one head")
        if module.group_norm is None:
            reading.refuse(f"{name}.group_norm", None, "a GroupNorm")
        reading.no_dropout(f"{name}.to_out.1", module.to_out[1])
        projections = Projections(
            reading.linear(f"{name}.to_q", module.to_q),
            reading.linear(f"{name}.to_k", module.to_k),
            reading.linear(f"{name}.to_v", module.to_v),
            reading.linear(f"{name}.to_out.0", module.to_out[0]),
            float(module.scale),
            bool(module.residual_connection),
            float(module.rescale_output_factor),
        )
        return cls(name, reading.norm(f"{name}.group_norm", module.group_norm), projections)

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
        """There is one way: the result is written over the input, wherever that is; the normalised map is in memory."""
        carved = self._carve(geometry, size, state)
        steps = carved.steps(costs)
        yield LayerPlan(self.name, *size, self.projections.q.cin, None, state.place, False, steps), state

    def _carve(self, geometry: Geometry, size: tuple[int, int], state: State) -> _Carved:
        channels = self.projections.q.cin
        call = geometry.call("attend", channels, channels, size, by_pixel=not self.norm.of_map)
        block = (call.rows, size[1], channels)
        source = Held((*size, channels), geometry.itemsize, state.place)
        return _Carved(call, source, size[0], None if state.place == "memory" else block)

    def run(self, run: Run, current: Current, planned: LayerPlan, *, statistics: bool) -> Current:
        """Two sweeps: one normalises the map, the other adds what each block of queries attends to."""
        store, maps, kernels = current.store, run.maps, run.kernels
        carved = self._carve(run.geometry, current.size, current.state)
        norm = run.norm(self.norm, current.moments)
        normed = maps.in_memory(1 - current.side, carved.source.shape)
        maps.new_sweep()
        work = maps.workspace(kernels.workspace(carved.call))
        for start, stop in carved.spans():
            rows = normed.rows[start:stop]
            kernels.prologue(store.read(start, stop, rows), norm, False, rows, work)
            run.tick()
        room = maps.workspace(kernels.loaded(carved.call))
        weights = kernels.load_attention(self.projections, run.dtype, room)
        buffer = normed.rows[:0] if carved.block is None else maps.scratch(carved.block)
        tokens = normed.rows.view(-1, carved.call.cin)

        moments = run.moments(carved.call, carved.blocks) if statistics else None
        for start, stop in carved.spans():
            out, queries = store.read(start, stop, buffer[: stop - start]), normed.rows[start:stop]
            kernels.attend(AttentionBlock(self.projections, weights, queries, tokens, out, work, moments))
            if carved.block is not None:
                store.write(start, out)
            run.tick()
        maps.drop(normed, 1 - current.side)
        return replace(current, moments=moments)


@dataclass(frozen=True)
class _Carved:
    """What both sweeps need, for whoever counts and for whoever runs."""

    call: Call
    source: Held
    height: int
    block: Shape | None
    """A block of the input's rows, where they cannot be added to where they are."""

    @property
    def blocks(self) -> int:
        """Into how many blocks the map's rows are cut."""
        return -(-self.height // self.call.rows)

    def spans(self) -> Iterator[tuple[int, int]]:
        """The rows of every block: its first, and the one behind its last."""
        for start in range(0, self.height, self.call.rows):
            yield start, min(start + self.call.rows, self.height)

    def steps(self, costs: Costs) -> tuple[Step, Step]:
        """Count both sweeps."""
        call, source = self.call, self.source
        normed = replace(source, place="memory")
        maps, blocks = (source, normed), self.blocks
        kept, beside = costs.statistics(call, blocks)
        rows = aligned(call.rows * math.prod(source.shape[1:]) * source.itemsize)
        near, far, spilled = held_in("memory", source), held_in("memory", normed), held_in("spill", source)
        scratch, staged = aligned(costs.workspace(call)), staging(costs, maps, rows)
        norm = Step("norm", near, far, spilled, scratch, staged, 0, moved((source, 1)), blocks)
        attend = Step(
            "attend", near, far, spilled,
            scratch + aligned(costs.loaded(call)) + (0 if self.block is None else rows) + aligned(kept),
            costs.overhead(call) + beside + staged, costs.macs(replace(call, rows=self.height)),
            moved((source, 2)), blocks,
        )  # fmt: skip
        return norm, attend
