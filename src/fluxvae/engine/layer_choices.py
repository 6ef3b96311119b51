"""What each layer may do with its maps, and what each way costs in memory, work and traffic. No torch in here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fluxvae.engine.plan import STAGES, Call, Costs, Geometry, LayerPlan, Place, Step, aligned
from fluxvae.engine.records import Attention, Conv, Network, Resnet, Upsample

if TYPE_CHECKING:
    from fluxvae.engine.records import Layer

__all__ = ["LayerChoices", "State", "ring_rows"]


@dataclass(frozen=True)
class State:
    """Where the current map is; ``base``: where the map under a recomputed upsample is."""

    place: Place
    base: Place = "memory"


@dataclass(frozen=True)
class _Map:
    """A map's size."""

    height: int
    width: int
    channels: int
    itemsize: int

    @property
    def bytes(self) -> int:
        return aligned(self.height * self.width * self.channels * self.itemsize)

    def rows(self, n: int) -> int:
        """Bytes of n rows in scratch."""
        return aligned(n * self.width * self.channels * self.itemsize)


def ring_rows(follower: int, leader: int) -> int:
    """Rows of a source that a shortcut needs again: how far conv1 runs ahead of conv2, in blocks of these."""
    return follower + leader + 1


class LayerChoices:
    """The ways through each layer of one network, for one size, dtype and kernel set."""

    def __init__(self, network: Network, geometry: Geometry, costs: Costs) -> None:
        self.network, self.geometry, self.costs = network, geometry, costs
        self._known: dict[tuple[int, State | None], list[tuple[LayerPlan, State]]] = {}

    def states(self, index: int) -> list[State | None]:
        """Where the map that layer ``index`` starts from may be; -1 is conv_in, which starts from the latents."""
        if index < 0:
            return [None]
        if index > 0 and isinstance(self.network.layers[index - 1], Upsample):
            return [State(place, base) for place in _PLACES for base in _STORED]
        return [State(place) for place in _STORED]

    def of(self, index: int, state: State | None) -> list[tuple[LayerPlan, State]]:
        """What layer ``index`` may do when the current map is in ``state``, and the state after it; worked out once."""
        key = (index, state)
        if key not in self._known:
            self._known[key] = list(self._enumerate(index, state))
        return self._known[key]

    # -- what each layer may do --------------------------------------------------------------------------------

    def _map(self, index: int, channels: int) -> _Map:
        """A map at the resolution of layer ``index``'s output."""
        g = self.geometry
        up = 2 ** sum(isinstance(layer, Upsample) for layer in self.network.layers[: index + 1])
        return _Map(g.height * up, g.width * up, channels, g.itemsize)

    def _enumerate(self, index: int, state: State | None) -> Iterator[tuple[LayerPlan, State]]:
        network = self.network
        if index < 0:
            out = self._map(-1, network.conv_in.cout)
            for place in _STORED:
                yield self._conv_in(out, place), State(place)
            return
        assert state is not None
        if index == len(network.layers):
            yield self._conv_out(index, state), state
            return
        layer: Layer = network.layers[index]
        if isinstance(layer, Upsample):
            for place in _PLACES:
                yield self._upsample(index, layer, state, place), State(place, state.place)
        elif isinstance(layer, Attention):
            yield self._attention(index, layer, state), state
        else:
            for middle in _PLACES:
                for place in _STORED:
                    yield self._resnet(index, layer, state, middle, place), State(place)

    def _conv_in(self, out: _Map, place: Place) -> LayerPlan:
        conv = self.network.conv_in
        stage = self._stage("conv3", conv, replace(out, channels=conv.cin))
        sink = 0 if place == "memory" else stage.output
        step = self._step(
            "conv_in", -1, [stage], out.height, memory=[(out, place)], extra=sink, moved=_moved((out, place, 1))
        )
        return LayerPlan(conv.name, out.height, out.width, conv.cout, None, place, False, (step,))

    def _conv_out(self, index: int, state: State) -> LayerPlan:
        conv = self.network.conv_out
        source = self._map(index, conv.cin)
        stage = self._stage("conv3", conv, source)
        step = self._step(
            "conv_out",
            index,
            [stage],
            source.height,
            memory=[(source, state.place)],
            extra=stage.output,
            moved=_moved((source, state.place, 1)),
        )
        return LayerPlan(conv.name, source.height, source.width, conv.cout, None, "memory", False, (step,))

    def _upsample(self, index: int, layer: Upsample, state: State, place: Place) -> LayerPlan:
        small, large = self._map(index - 1, layer.conv.cin), self._map(index, layer.conv.cout)
        stage = self._stage("up", layer.conv, small)
        step = self._step(
            "up",
            index,
            [stage],
            small.height,
            memory=[(small, state.place), (large, place)],
            extra=0 if place == "memory" else stage.output,
            moved=_moved((small, state.place, 1), (large, place, 1)),
        )
        return LayerPlan(
            layer.name, large.height, large.width, large.channels, None, place, place != "recompute", (step,)
        )

    def _attention(self, index: int, layer: Attention, state: State) -> LayerPlan:
        source = self._map(index, layer.q.cin)
        rows = self.geometry.block("attend", layer.q.cin, layer.q.cin, source.height, source.width)
        call = self._call("attend", layer.q.cin, layer.q.cin, rows, source)
        block = source.rows(rows)
        held: list[tuple[_Map, Place]] = [(source, state.place), (source, "memory")]
        blocks = -(-source.height // rows)
        staging = 0 if state.place == "memory" else block
        norm = Step(
            "norm", index, _in(held[:1], "memory"), _in(held[1:], "memory"), _in(held, "spill"),
            aligned(self.costs.workspace(call)), self._staging(held, block), 0,
            _moved((source, state.place, 1)), blocks,
        )  # fmt: skip
        whole = self._call("attend", layer.q.cin, layer.q.cin, source.height, source)
        attend = Step(
            "attend", index, _in(held[:1], "memory"), _in(held[1:], "memory"), _in(held, "spill"),
            aligned(self.costs.workspace(call)) + aligned(self.costs.loaded(call)) + staging,
            self.costs.overhead(call) + self._staging(held, block),
            self.costs.macs(whole), _moved((source, state.place, 2)), blocks,
        )  # fmt: skip
        steps = (norm, attend)
        return LayerPlan(layer.name, source.height, source.width, source.channels, None, state.place, False, steps)

    def _resnet(self, index: int, layer: Resnet, state: State, middle: Place, place: Place) -> LayerPlan:
        g = self.geometry
        source, inner = self._map(index, layer.conv1.cin), self._map(index, layer.conv1.cout)
        first, second = self._stage("conv3", layer.conv1, source), self._stage("conv3", layer.conv2, inner)
        feed: list[_Stage] = []  # what stands between the stored map and conv1
        held: list[tuple[_Map, Place]] = [(source, state.place)]
        if state.place == "recompute":
            below = self._below(index)
            small = _Map(source.height // 2, source.width // 2, below.conv.cin, g.itemsize)
            stage = self._stage("up", below.conv, small)
            feed = [_feeding(stage)]
            held = [(small, state.base)]
        base = held[0]
        conv1 = self._step(
            "conv1",
            index,
            [*feed, first],
            source.height,
            memory=[*held, (inner, middle)],
            extra=0 if middle == "memory" else first.output,
            moved=_moved((*base, 1), (inner, middle, 1)),
            driver=first,
        )
        over_input = place != middle and place == state.place and layer.shortcut is None
        new = place != middle and not over_input
        stages, extra = [second], 0
        if middle == "recompute":
            stages = [*feed, _feeding(first), second]
            if feed:  # the ring that keeps rows for the shortcut
                extra += source.rows(ring_rows(second.call.rows, first.call.rows))
        else:
            stages = [*feed, second]
        residual = source.rows(second.call.rows)
        if layer.shortcut is not None:
            extra += residual + second.output
            call = self._call("linear", source.channels, inner.channels, second.call.rows, source)
            whole = self._call("linear", source.channels, inner.channels, source.height, source)
            stages = [*stages, _Stage(call, whole, 0, 0, 0)]
        elif state.place != "memory":
            extra += residual
        if place != "memory":
            extra += second.output
        reads = (1 if state.place == "recompute" else 2) if middle == "recompute" else 1
        conv2 = self._step(
            "conv2",
            index,
            stages,
            source.height,
            memory=[*held, (inner, middle), *([(inner, place)] if new else [])],
            extra=extra,
            moved=_moved((*base, reads), (inner, middle, 1), (inner, place, 1)),
            driver=second,
        )
        flips = not over_input
        return LayerPlan(layer.name, inner.height, inner.width, inner.channels, middle, place, flips, (conv1, conv2))

    # -- arithmetic shared with the sweeps ---------------------------------------------------------------------

    def _below(self, index: int) -> Upsample:
        layer = self.network.layers[index - 1]
        assert isinstance(layer, Upsample)
        return layer

    def _call(self, kind: Literal["conv3", "up", "linear", "attend"], cin: int, cout: int, rows: int, m: _Map) -> Call:
        g = self.geometry
        return Call(kind, cin, cout, rows, m.width, g.itemsize, g.cast, m.height * m.width)

    def _staging(self, maps: list[tuple[_Map, Place]], largest: int) -> int:
        """Device memory for rows on their way to and from spilled maps; ``largest`` bytes are moved at once."""
        return STAGES * largest * sum(place == "spill" for _, place in maps) if self.costs.stages_spills else 0

    def _stage(self, kind: Literal["conv3", "up"], conv: Conv, source: _Map) -> _Stage:
        rows = self.geometry.block(kind, conv.cin, conv.cout, source.height, source.width)
        grown = 4 if kind == "up" else 1
        return _Stage(
            self._call(kind, conv.cin, conv.cout, rows, source),
            self._call(kind, conv.cin, conv.cout, source.height, source),
            source.rows(rows + 2),
            aligned(grown * rows * source.width * conv.cout * self.geometry.itemsize),
            0,
        )

    def _step(
        self,
        kind: Literal["conv_in", "up", "conv1", "conv2", "conv_out"],
        index: int,
        stages: list[_Stage],
        height: int,
        *,
        memory: list[tuple[_Map, Place]],
        extra: int,
        moved: int,
        driver: _Stage | None = None,
    ) -> Step:
        driver = driver or stages[0]
        return Step(
            kind,
            index,
            near=_in(memory[:1], "memory"),
            far=_in(memory[1:], "memory"),
            spilled=_in(memory, "spill"),
            scratch=extra
            + sum(stage.input + stage.kept + aligned(self.costs.loaded(stage.call)) for stage in stages)
            + max(aligned(self.costs.workspace(stage.call)) for stage in stages),
            overhead=max(self.costs.overhead(stage.call) for stage in stages)
            + self._staging(memory, max(max(stage.input, stage.output) for stage in stages)),
            macs=sum(self.costs.macs(stage.whole) for stage in stages),
            moved=moved,
            blocks=-(-height // driver.call.rows),
        )


@dataclass(frozen=True)
class _Stage:
    """One operation inside a sweep."""

    call: Call
    whole: Call
    """The same over the whole map: for the multiply-adds."""
    input: int
    """Bytes of its padded input block."""
    output: int
    """Bytes of its output block."""
    kept: int
    """Bytes of output scratch counted with the stage (those of a stage that feeds another)."""


def _feeding(stage: _Stage) -> _Stage:
    """A stage whose output another one reads: kept in scratch, its statistics known already."""
    return replace(stage, call=replace(stage.call, statistics=False), kept=stage.output)


_STORED: tuple[Place, ...] = ("memory", "spill")
_PLACES: tuple[Place, ...] = ("memory", "spill", "recompute")


def _in(maps: list[tuple[_Map, Place]], place: Place) -> int:
    return sum(m.bytes for m, where in maps if where == place)


def _moved(*maps: tuple[_Map, Place, int]) -> int:
    """Spill traffic of maps that a sweep passes over so many times."""
    return sum(m.bytes * times for m, where, times in maps if where == "spill")
