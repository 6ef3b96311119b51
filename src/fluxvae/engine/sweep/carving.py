"""What one sweep needs: the maps it passes over, its blocks of scratch, its kernel calls. PyTorch is not imported.

A layer describes each of its sweeps by one `Sweep`. The planner counts that description (`Sweep.step`), and
`fluxvae.engine.sweep.sweep` carves its scratch and runs by the very same one, so that what is counted and what is done
cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from fluxvae.engine.calls import STAGES, Call, Costs, Geometry, Kind, Place, Step, aligned
from fluxvae.engine.records import AnyNorm, Conv

__all__ = ["PLACES", "STORED", "Held", "Shape", "Stage", "State", "Sweep", "held_in", "moved", "ring_rows", "staging"]

STORED: tuple[Place, ...] = ("memory", "spill")
PLACES: tuple[Place, ...] = ("memory", "spill", "recompute")

Shape: TypeAlias = tuple[int, int, int]
"""The rows, the width and the channels of a map or of a block of its rows."""


@dataclass(frozen=True)
class State:
    """Where the current map is between two layers."""

    place: Place
    base: Place = "memory"
    """Where the smaller map is that the current one is computed from, if the current one's place is ``recompute``."""
    pending: Conv | None = None
    """What computes the current map from that smaller one: the convolution of an enlargement that was not stored."""


@dataclass(frozen=True)
class Held:
    """A whole feature map that exists while a sweep runs."""

    shape: Shape
    itemsize: int
    place: Place

    @property
    def bytes(self) -> int:
        """The bytes of the whole map, rounded up to the arena's alignment."""
        return aligned(math.prod(self.shape) * self.itemsize)


@dataclass(frozen=True)
class Stage:
    """One convolution inside a sweep. It reads padded blocks of one map's rows and gives blocks of another's."""

    conv: Conv
    call: Call
    height: int
    """How many rows of the map that it reads are cut into blocks."""
    stored: int
    """The height of the map that it reads. It differs where that is odd and halved: the last row is a halo only."""
    norm: AnyNorm | None = None
    """The norm that its input goes through, with SiLU, on its way in."""

    @classmethod
    def of(
        cls, geometry: Geometry, kind: Kind, conv: Conv, size: tuple[int, int], norm: AnyNorm | None = None
    ) -> Stage:
        """The stage that convolves a map of this height and width."""
        stored, width = size
        height = stored - stored % 2 if kind == "down" else stored
        by_pixel = norm is not None and not norm.of_map
        call = geometry.call(kind, conv.cin, conv.cout, (height, width), precise=conv.precise, by_pixel=by_pixel)
        return cls(conv, call, height, stored, norm)

    def feeding(self) -> Stage:
        """The same as a stage whose output another one reads: the statistics of that map are known already."""
        return replace(self, call=replace(self.call, statistics=False))

    @property
    def input(self) -> Shape:
        """The shape of a block of the rows that it reads, with one halo row on either side."""
        return self.call.rows + 2, self.call.width, self.call.cin

    @property
    def output(self) -> Shape:
        """The shape of the block of rows that it makes of those."""
        return self.call.out(self.call.rows), self.call.out(self.call.width), self.call.cout

    @property
    def whole(self) -> Call:
        """The call as if the whole map were one block, for counting the multiply-adds."""
        return replace(self.call, rows=self.height)

    @property
    def blocks(self) -> int:
        """The number of blocks into which the map that it reads is cut."""
        return -(-self.height // self.call.rows)


@dataclass(frozen=True)
class Sweep:
    """One pass over all rows of a map: a convolution, what computes its input on the way, and what is added to it."""

    kind: str
    """The sweep's name for people, such as ``"conv1"``."""
    maps: tuple[Held, ...]
    """All that exist while it runs; the first is the stored one that it starts from."""
    moved: int
    """The bytes of spilled maps that are read or written."""
    stage: Stage
    """The convolution for whose result the sweep is run."""
    feeds: tuple[Stage, ...] = ()
    """The convolutions that compute that one's input from the stored map, in order; none if it is stored itself."""
    residual_feeds: tuple[Stage, ...] = ()
    """The convolutions that compute the residual from a stored map, in order."""
    shortcut: Stage | None = None
    """A 1x1 convolution that the residual goes through."""
    buffer: Shape | None = None
    """A block of results, where they cannot be computed into place."""
    residual: Shape | None = None
    """A block of the residual's rows, where they cannot be added from where they are."""
    ring: Shape | None = None
    """Rows of the first feed's output that are kept for the residual, which follows behind."""

    def step(self, costs: Costs) -> Step:
        """Count the sweep: the memory, work and traffic that it takes with these kernels."""
        stages = (*self.feeds, *self.residual_feeds, self.stage)
        calls = [stage.call for stage in self.all_stages()]
        largest = max(self._bytes(shape) for stage in stages for shape in (stage.input, stage.output))
        kept, beside = costs.statistics(self.stage.call, self.stage.blocks) if self.stage.call.statistics else (0, 0)
        return Step(
            self.kind,
            near=held_in("memory", *self.maps[:1]),
            far=held_in("memory", *self.maps[1:]),
            spilled=held_in("spill", *self.maps),
            scratch=sum(map(self._bytes, self._shapes()))
            + sum(aligned(costs.loaded(call)) for call in calls)
            + max(aligned(costs.workspace(call)) for call in calls)
            + aligned(kept),
            overhead=max(costs.overhead(call) for call in calls) + beside + staging(costs, self.maps, largest),
            macs=sum(costs.macs(stage.whole) for stage in self.all_stages()),
            moved=self.moved,
            blocks=self.stage.blocks,
        )

    def all_stages(self) -> Iterator[Stage]:
        """Every convolution of the sweep, in no particular order."""
        yield from (*self.feeds, *self.residual_feeds, self.stage)
        if self.shortcut is not None:
            yield self.shortcut

    def _shapes(self) -> Iterator[Shape]:
        """Every block of scratch that is laid out in the compute dtype."""
        yield self.stage.input
        for stage in (*self.feeds, *self.residual_feeds):
            yield stage.input
            yield stage.output
        if self.shortcut is not None:
            yield self.shortcut.output
        yield from (shape for shape in (self.buffer, self.residual, self.ring) if shape is not None)

    def _bytes(self, shape: Shape) -> int:
        return aligned(math.prod(shape) * self.stage.call.itemsize)


def ring_rows(follower: int, leader: int) -> int:
    """Rows of a map that a second reader needs again: how far the first runs ahead of it, in blocks of these sizes."""
    return follower + leader + 1


def held_in(place: Place, *maps: Held) -> int:
    """The bytes of those of the maps that are in this place."""
    return sum(held.bytes for held in maps if held.place == place)


def moved(*passes: tuple[Held, int]) -> int:
    """Bytes that are read from or written to spilled maps, each of which a sweep passes over so many times."""
    return sum(held.bytes * times for held, times in passes if held.place == "spill")


def staging(costs: Costs, maps: tuple[Held, ...], largest: int) -> int:
    """Bytes on the device for rows on their way to and from spilled maps, of which ``largest`` bytes move at once."""
    return STAGES * largest * sum(held.place == "spill" for held in maps) if costs.stages_spills else 0
