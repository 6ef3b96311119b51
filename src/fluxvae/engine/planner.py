"""Finds the cheapest way through the network that fits the limit. This module does not import PyTorch.

Each layer says for itself what it may do with its maps (`Layer.choices`); the planner knows no kind of layer by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple, TypeAlias

from fluxvae.engine.calls import RUNTIME_BYTES, Costs, Geometry, LayerPlan
from fluxvae.engine.calls import block_values as default_block_values
from fluxvae.engine.network import Network
from fluxvae.engine.plan import Plan, peak_of, size_in_words
from fluxvae.engine.sweep.carving import State
from fluxvae.engine.way import DECODE
from fluxvae.errors import MemoryLimitError
from fluxvae.system import FreeMemory

__all__ = ["Planner", "limit_of", "make_planner"]


class Planner:
    """Makes plans for one network, size, dtype and kernel set."""

    def __init__(
        self,
        network: Network,
        geometry: Geometry,
        costs: Costs,
        *,
        batch: int = 1,
        stored_itemsize: int | None = None,
        graphs: bool = False,
        keeps: bool = False,
        at_once: bool = False,
        macs_per_second: float = 1e11,
        spill_bytes_per_second: float = 1e9,
    ) -> None:
        self.network, self.geometry, self.costs, self.batch = network, geometry, costs, batch
        self._rates, self._graphs = (macs_per_second, spill_bytes_per_second), graphs
        self._at_once, self._keeps = at_once, keeps
        self._known: dict[tuple[int, State], list[tuple[LayerPlan, State]]] = {}
        self._sizes = network.sizes((geometry.height, geometry.width))
        self.fixed_bytes = self._fixed_bytes(stored_itemsize or geometry.itemsize)

    def _fixed_bytes(self, stored: int) -> int:
        """What is held from beginning to end; ``stored`` is how many bytes a value has in what is given and made."""
        network, itemsize = self.network, self.geometry.itemsize
        given = network.in_channels * math.prod(self._sizes[0])
        made = network.out_channels * math.prod(self._sizes[-1])
        # A decode's latents are its caller's. The pixels of an encode were made of the caller's pictures for it.
        self._own_bytes = self.batch * (made if network.way == DECODE else made + given) * stored
        held = self._own_bytes + self._graphs * (given + made) * stored  # a graph has one of each of its own
        # A 1x1 convolution of the latents holds its result in both memory formats, and its input where that is cast.
        for side, conv in ((given, network.first.pointwise), (made, network.last.pointwise)):
            held += 0 if conv is None else (2 + self.geometry.cast) * side * itemsize
        return held + RUNTIME_BYTES[itemsize] + self.costs.runtime_bytes(itemsize)

    # -- what each layer may do --------------------------------------------------------------------------------

    def _choices(self, index: int, state: State) -> list[tuple[LayerPlan, State]]:
        """What the layer of this index may do when the map it starts from is in ``state``; worked out once."""
        key = (index, state)
        if key not in self._known:
            layer, size = self.network.layers[index], self._sizes[index]
            wanted = self.network.wanted(index)
            self._known[key] = list(layer.choices(self.geometry, self.costs, size, state, wanted=wanted))
        return self._known[key]

    @cached_property
    def _states(self) -> list[list[State]]:
        """For every layer, where the map that it starts from can be."""
        states = [[_GIVEN]]
        for index in range(len(self.network.layers) - 1):
            after = (following for state in states[index] for _, following in self._choices(index, state))
            states.append(list(dict.fromkeys(after)))
        return states

    # -- choosing ----------------------------------------------------------------------------------------------

    def plan(
        self,
        limit: int | None,
        *,
        source: str = "memory_limit",
        spill_free: int | None = None,
        spill_dir: str | None = None,
    ) -> Plan:
        """The fastest plan within ``limit``.

        Args:
            spill_free: bytes free for spilled maps; None: no spilling.

        Raises:
            MemoryLimitError: nothing fits; the message names the smallest limit that works.
        """
        free = 0 if spill_free is None else spill_free
        make = partial(self._make, fastest=self._unlimited, limit=limit, source=source, spill_dir=spill_dir)
        unlimited = make(self._unlimited)
        if limit is None or unlimited.peak_bytes <= limit:
            return unlimited
        found = self._fastest(limit - self.fixed_bytes, free)
        if found is not None:
            return make(found)
        plan = make(self._smallest(free))
        if plan.peak_bytes <= limit:
            return plan
        # A full or missing disk may be the cause rather than a small limit, and the message says so then.
        spilling, hint = make(self._smallest(1 << 62)), ""
        if spilling.peak_bytes < plan.peak_bytes:
            hint = (
                f"; with {size_in_words(spilling.spill_bytes)} free in spill_dir, {spilling.peak_bytes} bytes would do"
            )
        raise MemoryLimitError(
            f"{source}: got {limit} bytes ({size_in_words(limit)}); {self.network.way.doing} {self.batch} x "
            f"{plan.width}x{plan.height} needs at least {plan.peak_bytes} bytes ({size_in_words(plan.peak_bytes)}) "
            f"above the weights{hint}. Raise the limit, or {self.network.way.name} a smaller size or batch"
        )

    def smallest_limit(self, spill_free: int | None = None) -> int:
        """The smallest limit that `plan` takes, in bytes."""
        layers = self._smallest(0 if spill_free is None else spill_free)
        return self._make(layers, fastest=layers, limit=None, source="", spill_dir=None).peak_bytes

    @cached_property
    def _unlimited(self) -> _Layers:
        """The fastest plan without a limit. Spilling takes time, so nothing is spilled, whatever room there is."""
        layers = self._search(self._by_time, None, None, None, 0)
        assert layers is not None  # keeping every map is always a way
        return layers

    def _fastest(self, allowed: int, spill_free: int) -> _Layers | None:
        """The fastest plan whose arena and overhead fit into ``allowed`` together."""
        # Arena and overhead peak in different sweeps, so every overhead is tried as the one that limits the arena.
        arenas = [allowed - most for most in self._overheads(0)]
        tries = (self._search(self._by_time, arena, None, allowed, spill_free) for arena in arenas if arena > 0)
        return min((layers for layers in tries if layers is not None), key=self._total_seconds, default=None)

    def _smallest(self, spill_free: int) -> _Layers:
        tries = (self._search(self._by_arena, None, most, None, spill_free) for most in self._overheads(None))
        found = (layers for layers in tries if layers is not None)  # keeping every map is always a way
        return min(found, key=partial(peak_of, at_once=self._at_once))

    def _overheads(self, floor: int | None) -> list[int]:
        """Every overhead that a layer can have, from ``floor`` up (by default what all layers can do with at least)."""
        least, seen = 0, set()
        for index, states in enumerate(self._states):
            peaks = [
                max((step.overhead for step in layer.steps), default=0)
                for state in states
                for layer, _ in self._choices(index, state)
            ]
            least = max(least, min(peaks))
            seen.update(peaks)
        return sorted(value for value in seen if value >= (least if floor is None else floor))

    def _make(
        self,
        layers: _Layers,
        *,
        fastest: _Layers,
        limit: int | None,
        source: str,
        spill_dir: str | None,
    ) -> Plan:
        base = sum(step.macs for layer in fastest for step in layer.steps)
        macs = sum(step.macs for layer in layers for step in layer.steps)
        height, width = self.network.picture(self._sizes[0])
        plan = Plan(
            height=height,
            width=width,
            batch=self.batch,
            kernels=self.costs.name,
            kernels_note=self.costs.note,
            limit=limit,
            limit_source=source,
            fixed_bytes=self.fixed_bytes,
            layers=layers,
            work_ratio=macs / base,
            seconds=self.batch * self._total_seconds(layers),
            geometry=self.geometry,
            spill_dir=spill_dir,
            at_once=self._at_once,
            keeps=self._keeps,
        )
        if not self._graphs:
            return plan
        # Only what the call gives and takes is not the graph's.
        return replace(plan, graph_bytes=0 if plan.spill_bytes else plan.peak_bytes - self._own_bytes)

    def _search(
        self, weigh: _Weigh, arena: int | None, overhead: int | None, allowed: int | None, spill_free: int
    ) -> _Layers | None:
        """Dynamic programming over the layers; the state is where the current map lives.

        There are bounds on the arena, on every sweep's overhead, on both together (as `peak_of` counts them), and on
        spilled bytes.
        """
        front: dict[State, tuple[_Cost, _Layers]] = {_GIVEN: (_Cost(0, 0, 0), ())}
        for index in range(len(self.network.layers)):
            after: dict[State, tuple[_Cost, _Layers]] = {}
            for state, (cost, done) in front.items():
                for layer, following in self._choices(index, state):
                    largest, fits = cost.arena, True
                    for step in layer.steps:
                        largest = max(largest, step.arena)
                        touched = 2 * largest if arena is None else arena if self._at_once else min(arena, 2 * largest)
                        fits = fits and (
                            step.spilled <= spill_free
                            and (arena is None or step.arena <= arena)
                            and (overhead is None or step.overhead <= overhead)
                            and (allowed is None or touched + step.overhead <= allowed)
                        )
                    if not fits:
                        continue
                    macs, moved = _work_of((layer,))
                    total = _Cost(cost.macs + macs, cost.moved + moved, largest)
                    if following not in after or weigh(total) < weigh(after[following][0]):
                        after[following] = (total, (*done, layer))
            front = after
        return min(front.values(), key=lambda entry: weigh(entry[0]))[1] if front else None

    def _seconds(self, macs: int, moved: int) -> float:
        macs_rate, spill_rate = self._rates
        return macs / macs_rate + moved / spill_rate

    def _total_seconds(self, layers: _Layers) -> float:
        return self._seconds(*_work_of(layers))

    def _by_time(self, cost: _Cost) -> tuple[float, float]:
        return self._seconds(cost.macs, cost.moved), cost.arena

    def _by_arena(self, cost: _Cost) -> tuple[float, float]:
        return cost.arena, self._seconds(cost.macs, cost.moved)


_Layers: TypeAlias = tuple[LayerPlan, ...]

_GIVEN = State("memory")
"""The state of what the first layer starts from."""


class _Cost(NamedTuple):
    """What a way through the first layers costs, in whole numbers: two ways of the same work are equal exactly."""

    macs: int
    moved: int
    arena: int


_Weigh: TypeAlias = Callable[[_Cost], tuple[float, float]]


def _work_of(layers: _Layers) -> tuple[int, int]:
    """The multiply-adds of all steps of these layers, and the bytes that they move to and from spilled maps."""
    steps = [step for layer in layers for step in layer.steps]
    return sum(step.macs for step in steps), sum(step.moved for step in steps)


_RATES = {"cpu": (5e10, 1e9), "half": (2e14, 2e10), "single": (2e13, 2e10)}
"""Multiply-adds per second (for each thread of a CPU, or by precision on a GPU) and spilled bytes per second. Only
their ratio matters, which weighs computing a map again against spilling it. Those of a GPU are of the order of an
H100's and were not measured."""


def make_planner(
    network: Network,
    costs: Costs,
    size: tuple[int, int],
    *,
    batch: int,
    computed: int,
    stored: int,
    cast: bool,
    on_cpu: bool,
    threads: int,
    block_values: int | None = None,
    graphs: bool = False,
    keeps: bool = False,
) -> Planner:
    """The planner of one size.

    Args:
        size: height and width of what is given: latents, or pixels.
        computed, stored: bytes of a value, as it is computed and as the weights, the latents and the image have it.
        cast: whether the two are different dtypes.
        threads: how many threads an operation on a CPU has.
        block_values: values of a block of rows; None takes what the kernels or the size ask for.
        graphs: whether each image is computed by a CUDA graph.
        keeps: whether the arena is kept from one call to the next.
    """
    pixels = math.prod(network.picture(size))
    usual = default_block_values(network.full_channels, pixels) * costs.block_factor
    values = block_values or costs.block_values or usual
    geometry = Geometry(*size, computed, cast, costs.row_multiple, values, costs.precise_row_multiple)
    macs, moved = _RATES["cpu"] if on_cpu else _RATES["half" if computed == 2 else "single"]
    return Planner(
        network, geometry, costs, batch=batch, stored_itemsize=stored, graphs=graphs, keeps=keeps,
        at_once=keeps or not on_cpu, macs_per_second=macs * (threads if on_cpu else 1),
        spill_bytes_per_second=moved,
    )  # fmt: skip


def limit_of(asked: int | None, available: Callable[[], FreeMemory]) -> tuple[int, str]:
    """The bytes that a call may add, and what set them: nine tenths of what is free now, if no limit was given."""
    if asked is not None:
        return asked, "memory_limit"
    free = available()
    return free.nbytes * 9 // 10, free.told_by
