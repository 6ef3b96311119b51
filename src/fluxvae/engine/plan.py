"""Which maps are kept, spilled or computed again: the cheapest way that fits the limit. No torch in here.

The model of memory. At any moment a decode holds, above the loaded weights:

- ``fixed``: the output tensor, the latents laid out channels last, a small allowance for the runtime;
- the arena: one allocation with at most two feature maps, one at each end, and the sweep's scratch between them;
- ``overhead``: what the kernels allocate themselves during a call (PyTorch's results, reordered weights).

A sweep reads rows of one map and writes rows of another. Whatever a sweep needs is counted by `Step`, built by the
same functions that the sweeps carve their scratch with, so the prediction cannot drift from the code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from fluxvae.errors import InvalidLatentsError, InvalidOptionError

if TYPE_CHECKING:
    from fluxvae.engine.records import Network

__all__ = [
    "Call",
    "Costs",
    "Geometry",
    "LayerPlan",
    "Place",
    "Plan",
    "Step",
    "block_values",
    "check_size",
    "parse_memory_limit",
]

Place: TypeAlias = Literal["memory", "spill", "recompute"]
"""Where a map lives; ``recompute``: nowhere, its rows are computed again by each sweep that reads them."""

ALIGN = 256
BLOCK_VALUES = 1 << 20
"""Values in one block of rows: 4 MB in float32, which with its halo and its result stays in a core's share of cache."""
RUNTIME_BYTES = {2: 11 << 20, 4: 5 << 20, 8: 5 << 20}
"""By item size: what oneDNN's generated code and MKL's buffers grow by in a process's first decodes of a size. Later
ones take so much less than their plan says."""

STAGES = 3
"""Blocks of rows that a map in host memory has on the device at most: two readers' next ones, one on its way out."""


@dataclass(frozen=True)
class Call:
    """One kernel call, in numbers."""

    kind: Literal["conv3", "up", "linear", "attend"]
    cin: int
    cout: int
    rows: int
    """Rows of the input block, without its halo."""
    width: int
    """Of the input map."""
    itemsize: int
    cast: bool
    """The weights are stored in another dtype than the one computed in."""
    tokens: int = 0
    """Of the whole map, for ``attend``."""
    statistics: bool = True
    """The statistics of the output are wanted."""


class Costs(Protocol):
    """What the planner asks of a kernel set; bytes and multiply-adds."""

    @property
    def name(self) -> str:
        """As the ``kernels`` option spells it."""

    @property
    def note(self) -> str:
        """Why these kernels and not those one would expect; plans print it. Usually nothing."""

    @property
    def block_values(self) -> int | None:
        """Values of a block of rows; None: as `block_values` has it, for a core's cache."""

    @property
    def runtime_bytes(self) -> int:
        """What the kernels' libraries keep allocated on the device from the first call on, beside `RUNTIME_BYTES`."""

    @property
    def stages_spills(self) -> bool:
        """Spilled maps have blocks of rows on their way on the device (`HostMap`): overhead of every such sweep."""

    @property
    def row_multiple(self) -> int:
        """Blocks are cut at multiples of this many rows, counted from the top of the map."""

    def macs(self, call: Call) -> int:
        """Multiply-adds of the call."""

    def loaded(self, call: Call) -> int:
        """Scratch inside the arena for weights held for the whole sweep, beside the model's own."""

    def overhead(self, call: Call) -> int:
        """Allocated outside the arena while the call runs."""

    def workspace(self, call: Call) -> int:
        """Scratch inside the arena while the call runs."""


@dataclass(frozen=True)
class Geometry:
    """Sizes that depend on the network, the image and the dtype, never on the limit."""

    height: int
    """Of the latents."""
    width: int
    itemsize: int
    cast: bool = False
    row_multiple: int = 1
    block_values: int = BLOCK_VALUES

    def block(self, kind: str, cin: int, cout: int, height: int, width: int) -> int:
        """Rows per block of a layer whose *input* map has this size (an upsample's block has twice as many out)."""
        values = width * max(cin, cout) * (4 if kind == "up" else 1)
        if kind == "attend":
            values *= 2
        # Wide layers get more: each call pays once for its weights (oneDNN reorders them, 9.4 MB at 512 channels).
        budget = self.block_values * max(256, cin, cout) // 256
        rows = max(1, budget // values)
        rows = max(rows // self.row_multiple, 1) * self.row_multiple
        return min(rows, height)


def block_values(network: Network, height: int, width: int) -> int:
    """Values per block for latents of this size: a sixteenth of the last map, within bounds.

    A function of the network and the image alone: where blocks are cut decides the last bits.
    """
    last = network.conv_out.cin * height * width * network.scale**2
    return min(max(last // 16, BLOCK_VALUES // 4), BLOCK_VALUES)


def aligned(nbytes: int) -> int:
    """Rounded up to the arena's alignment."""
    return -(-nbytes // ALIGN) * ALIGN


@dataclass(frozen=True)
class Step:
    """One sweep: what it holds, what it computes, what it moves."""

    kind: Literal["conv_in", "up", "conv1", "conv2", "norm", "attend", "conv_out"]
    layer: int
    near: int
    """Bytes in memory of the map it starts from."""
    far: int
    """Bytes in memory of the map at the arena's other end."""
    spilled: int
    """Bytes of feature maps in the spill file(s) while it runs."""
    scratch: int
    overhead: int
    macs: int
    moved: int
    """Bytes read from and written to spilled maps."""
    blocks: int

    @property
    def maps(self) -> int:
        """Bytes of feature maps in memory while it runs."""
        return self.near + self.far

    @property
    def arena(self) -> int:
        """Bytes of the arena it needs."""
        return self.maps + self.scratch

    @property
    def held(self) -> int:
        """All bytes beside the fixed ones."""
        return self.arena + self.overhead


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer's maps."""

    name: str
    height: int
    width: int
    channels: int
    middle: Place | None
    """Of a resnet: the first convolution's output. None: the layer has none."""
    out: Place
    flips: bool
    """Its result is at the other end of the arena than its input."""
    steps: tuple[Step, ...]


def peak_of(layers: tuple[LayerPlan, ...]) -> int:
    """Most bytes that one image's sweeps hold at once, in this order.

    The arena is one allocation whose pages count once they are touched: from the left as far as the left maps and the
    scratch beside them have reached, from the right as far as the right maps have, and never more than all of it.
    """
    whole = max(step.arena for layer in layers for step in layer.steps)
    reach, peak, side = [0, 0], 0, 0
    for layer in layers:
        for step in layer.steps:
            sizes = (step.near, step.far) if side == 0 else (step.far, step.near)
            reach = [max(reach[0], sizes[0] + step.scratch), max(reach[1], sizes[1])]
            peak = max(peak, min(whole, sum(reach)) + step.overhead)
        side ^= layer.flips
    return peak


@dataclass(frozen=True)
class Plan:
    """How one decode will run; `peak_bytes` is above the loaded weights, the output tensor included."""

    height: int
    """Of the image, in pixels."""
    width: int
    batch: int
    kernels: str
    kernels_note: str
    """Why not those one would expect; usually nothing."""
    limit: int | None
    """Bytes allowed; None: unlimited."""
    limit_source: str
    """``"memory_limit"``, or where the limit came from."""
    fixed_bytes: int
    layers: tuple[LayerPlan, ...]
    work_ratio: float
    """Multiply-adds, divided by those of the plan that computes nothing twice."""
    seconds: float
    """What the planner weighed: an estimate in the planner's own nominal rates, good for comparing plans only."""
    geometry: Geometry = field(repr=False)
    spill_dir: str | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """All sweeps of one image, in order."""
        return tuple(step for layer in self.layers for step in layer.steps)

    @property
    def arena_bytes(self) -> int:
        """Size of the one allocation for maps and scratch."""
        return max(step.arena for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak above the loaded weights."""
        return self.fixed_bytes + peak_of(self.layers)

    @property
    def spill_bytes(self) -> int:
        """Most bytes in spilled maps at once."""
        return max(step.spilled for step in self.steps)

    @property
    def macs(self) -> int:
        """Multiply-adds per image."""
        return sum(step.macs for step in self.steps)

    @property
    def total_blocks(self) -> int:
        """Steps of ``progress`` for the whole batch."""
        return self.batch * sum(step.blocks for step in self.steps)

    @property
    def rungs(self) -> tuple[str, ...]:
        """Per layer: what becomes of its maps."""
        return tuple(layer.out if layer.middle is None else f"{layer.middle}/{layer.out}" for layer in self.layers)

    def __str__(self) -> str:
        limit = "none" if self.limit is None else f"{size_in_words(self.limit)} ({self.limit_source})"
        spill = f", {size_in_words(self.spill_bytes)} spilled to {self.spill_dir}" if self.spill_bytes else ""
        note = [f"note: {self.kernels_note}"] if self.kernels_note else []
        lines = [
            f"{self.batch} x {self.width}x{self.height}, kernels {self.kernels!r}, limit {limit}",
            f"peak {size_in_words(self.peak_bytes)} above the weights{spill}; work x{self.work_ratio:.2f}",
            *note,
            f"{'layer':<36}{'map':>16}{'middle':>11}{'out':>11}{'peak':>11}",
        ]
        for layer in self.layers:
            shape = f"{layer.width}x{layer.height}x{layer.channels}"
            peak = self.fixed_bytes + max((step.held for step in layer.steps), default=0)
            lines.append(
                f"{layer.name.removeprefix('decoder.'):<36}{shape:>16}{layer.middle or '':>11}{layer.out:>11}"
                f"{size_in_words(peak):>11}"
            )
        return "\n".join(lines)


def check_size(height: object, width: object, batch: object, scale: int) -> None:
    """Refuse a size that no latents decode to.

    Args:
        height, width: pixels.
        scale: pixels per latent, each way.

    Raises:
        InvalidLatentsError: naming what is no positive multiple.
    """
    for name, value in (("height", height), ("width", width), ("batch", batch)):
        multiple = 1 if name == "batch" else scale
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value % multiple:
            raise InvalidLatentsError(f"{name}: got {value!r}, expected a positive multiple of {multiple}")


# -- sizes in words ------------------------------------------------------------------------------------------------

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def parse_memory_limit(value: int | str) -> int:
    """Bytes of ``"2GiB"``, ``"0.7GB"``, ``"800 MB"`` or a plain number (GB = 10**9, GiB = 2**30).

    Raises:
        InvalidOptionError: not a size, or not positive.
    """
    amount: float | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        amount = value
    elif isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", value)
        if match and match[2].lower() in _UNITS:
            amount = float(match[1]) * _UNITS[match[2].lower()]
    if amount is None or amount < 1:
        raise InvalidOptionError(
            f"memory_limit: got {value!r}, expected a positive number of bytes or a size such as '2GiB' or '0.7GB'"
        )
    return int(amount)


def size_in_words(nbytes: int) -> str:
    """For people: ``"1.61 GB"``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"
