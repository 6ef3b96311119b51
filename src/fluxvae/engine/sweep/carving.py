"""What one sweep needs: the maps it passes over, its blocks of scratch, its kernel calls. PyTorch is not imported.

A layer describes each of its sweeps by one `Sweep`. The planner counts that description (`Sweep.step`), and
`fluxvae.engine.sweep.sweep` carves its scratch and runs by the very same one, so that what is counted and what is done
cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fluxvae.engine.calls import STAGES, Call, Costs, Geometry, Kind, Place, Step, aligned
from fluxvae.engine.records import AnyNorm, Conv

__all__ = [
    "MOST_LINKS",
    "PLACES",
    "STORED",
    "Held",
    "Link",
    "Shape",
    "Stage",
    "State",
    "Sweep",
    "held_in",
    "moved",
    "ring_rows",
    "staging",
]

MOST_LINKS = 5
"""How many layers of a chain are computed on the way at most, without their maps being stored: a level of the usual
networks. Every link holds its weights and a few blocks, and the planner looks at every chain there can be."""
STORED: tuple[Place, ...] = ("memory", "spill")
PLACES: tuple[Place, ...] = ("memory", "spill", "recompute")

Shape: TypeAlias = tuple[int, int, int]
"""The rows, the width and the channels of a map or of a block of its rows."""


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
class Link:
    """What computes one map from another: one convolution, or a residual block's two and what is added to them."""

    stages: tuple[Stage, ...]
    """The convolutions in order. Only the last one's result may be stored."""
    residual: bool = False
    """Whether the map that it starts from is added to the result."""
    shortcut: Stage | None = None
    """A 1x1 convolution that the residual goes through."""
    scale: float = 1.0
    """What the sum is divided by."""

    def feeding(self) -> Link:
        """The same where another link reads the result: nobody wants its statistics."""
        return replace(self, stages=tuple(stage.feeding() for stage in self.stages))

    @property
    def source(self) -> Shape:
        """The rows of one block of the result, the width and the channels of the map that it starts from."""
        first, last = self.stages[0].call, self.stages[-1].call
        channels = first.cin if self.shortcut is None else self.shortcut.call.cin
        return last.rows, first.width, channels

    @property
    def ring(self) -> Shape:
        """The rows of that map that are kept for the residual, which follows behind its first convolution."""
        rows, width, channels = self.source
        return ring_rows(rows, self.stages[0].call.rows), width, channels


@dataclass(frozen=True)
class State:
    """Where the current map is between two layers.

    The planner compares the states that there can be in front of one layer, and tells them apart by three fields.
    """

    place: Place
    base_place: Place = "memory"
    """Where the stored map is that the current one is computed from, if the current one's place is ``recompute``."""
    links: int = 0
    """How many layers are computed on the way from that map to the current one."""
    base: Held | None = field(default=None, compare=False)
    """That map itself. None: the chain begins with what the network is given, which takes nothing of the arena."""
    chain: tuple[Link, ...] = field(default=(), compare=False)
    """What computes the current map from that one, in order."""

    def start(self, stored: Held) -> tuple[Held, ...]:
        """The map that a sweep over the current map starts from: ``stored``, where the current one is stored itself."""
        if not self.chain:
            return (stored,)
        return () if self.base is None else (self.base,)

    def behind(self, link: Link, stored: Held | None) -> State:
        """The state behind a layer that is computed on the way; ``stored`` is the map it starts from, as in `start`."""
        base = self.base if self.chain else stored
        place: Place = "memory" if base is None else base.place
        return State("recompute", place, self.links + 1, base, (*self.chain, link.feeding()))


@dataclass(frozen=True)
class Sweep:
    """One pass over all rows of a map: what computes it on the way, and what is computed of it."""

    kind: str
    """The sweep's name for people, such as ``"conv1"``."""
    start: tuple[Held, ...]
    """The stored map that it starts from; none if that is what the network is given."""
    others: tuple[Held, ...]
    """All other maps that exist while it runs."""
    passes: tuple[tuple[Held, int], ...]
    """The maps besides the first that are read or written, and how often each is passed over."""
    link: Link
    """What the sweep is run for."""
    chain: tuple[Link, ...] = ()
    """What computes that one's map from the stored one, in order; none if it is stored itself."""
    inner: bool = False
    """The link's convolution reads another stored map. Only what is added to it comes from the start."""
    over: bool = False
    """The result is written over the map that the link's first convolution reads."""
    buffer: Shape | None = None
    """A block of results, where they cannot be computed into place."""

    @property
    def stage(self) -> Stage:
        """The convolution that computes the sweep's result."""
        return self.link.stages[-1]

    def staged(self, position: int) -> Shape | None:
        """A block of the residual's rows, where they cannot be added from where they are.

        Args:
            position: that of a link in the chain; the number of links in the chain is that of the sweep's own.
        """
        link = (*self.chain, self.link)[position]
        if not link.residual:
            return None
        in_memory = position == 0 and bool(self.start) and self.start[0].place == "memory"
        return None if in_memory and link.shortcut is None else link.source

    def ringed(self, position: int) -> Shape | None:
        """The ring of a link, as `staged`: where its map is computed, and its first convolution runs ahead."""
        link = (*self.chain, self.link)[position]
        ahead = link.residual and position > 0 and not (self.inner and position == len(self.chain))
        return link.ring if ahead else None

    def reads_in_place(self, costs: Costs) -> bool:
        """Whether the link's first convolution reads its map from where it is: no other has one that stays as it is."""
        held = self.others[:1] if self.inner else () if self.chain else self.start
        in_memory = not self.over and any(one.place == "memory" for one in held)
        return in_memory and costs.reads_in_place(self.link.stages[0].call)

    def blocks_at_once(self, costs: Costs) -> int:
        """How many blocks one call computes: several where they are read in place and made in place, in one step."""
        alone = len(self.link.stages) == 1 and self.buffer is None and self.staged(len(self.chain)) is None
        return costs.blocks_at_once(self.stage.call) if alone and self.reads_in_place(costs) else 1

    def step(self, costs: Costs) -> Step:
        """Count the sweep: the memory, work and traffic that it takes with these kernels."""
        links = (*self.chain, self.link)
        calls = [stage.call for stage in self.all_stages()]
        stages = [stage for link in links for stage in link.stages]
        largest = max(self._bytes(shape) for stage in stages for shape in (stage.input, stage.output))
        kept, beside = costs.statistics(self.stage.call, self.stage.blocks) if self.stage.call.statistics else (0, 0)
        return Step(
            self.kind,
            near=held_in("memory", *self.start),
            far=held_in("memory", *self.others),
            spilled=held_in("spill", *self.start, *self.others),
            scratch=sum(map(self._bytes, self._shapes(costs)))
            + sum(aligned(costs.loaded(call)) for call in calls)
            + max(aligned(costs.workspace(call)) for call in calls)
            + aligned(kept),
            overhead=max(costs.overhead(call) for call in calls)
            + beside
            + staging(costs, (*self.start, *self.others), largest),
            macs=sum(costs.macs(stage.whole) for stage in self.all_stages()),
            moved=moved(*((held, self._reads) for held in self.start), *self.passes),
            blocks=self.stage.blocks,
        )

    @property
    def _reads(self) -> int:
        """How often the map that it starts from is passed over: again for what is added, if it is stored itself."""
        first = (*self.chain, self.link)[0]
        return 2 if first.residual and not (self.inner and not self.chain) else 1

    def all_stages(self) -> Iterator[Stage]:
        """Every convolution of the sweep, in no particular order."""
        for link in (*self.chain, self.link):
            yield from link.stages
            if link.shortcut is not None:
                yield link.shortcut

    def _shapes(self, costs: Costs) -> Iterator[Shape]:
        """Every block of scratch that is laid out in the compute dtype."""
        for position, link in enumerate((*self.chain, self.link)):
            for index, stage in enumerate(link.stages):
                if index or position < len(self.chain) or not self.reads_in_place(costs):
                    yield stage.input
                if position < len(self.chain) or stage is not link.stages[-1]:
                    yield stage.output
            if link.shortcut is not None:
                yield link.shortcut.output
            yield from (shape for shape in (self.staged(position), self.ringed(position)) if shape is not None)
        if self.buffer is not None:
            yield self.buffer

    def _bytes(self, shape: Shape) -> int:
        return aligned(math.prod(shape) * self.stage.call.itemsize)


def ring_rows(follower: int, leader: int) -> int:
    """Rows of a map that a second reader needs again: how far the first runs ahead of it, in blocks of these sizes.

    Whole blocks of the second, so that each of those lies in one piece.
    """
    return -(-(follower + leader + 1) // follower) * follower


def held_in(place: Place, *maps: Held) -> int:
    """The bytes of those of the maps that are in this place."""
    return sum(held.bytes for held in maps if held.place == place)


def moved(*passes: tuple[Held, int]) -> int:
    """Bytes that are read from or written to spilled maps, each of which a sweep passes over so many times."""
    return sum(held.bytes * times for held, times in passes if held.place == "spill")


def staging(costs: Costs, maps: tuple[Held, ...], largest: int) -> int:
    """Bytes on the device for rows on their way to and from spilled maps, of which ``largest`` bytes move at once."""
    return STAGES * largest * sum(held.place == "spill" for held in maps) if costs.stages_spills else 0
