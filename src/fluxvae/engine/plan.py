"""How a decode or an encode will run: which maps are kept, spilled or computed again, and what memory that takes.

This module does not import PyTorch.

The model of memory. At any moment it holds, above the loaded weights:

- ``fixed``: the output tensor, the pixels that are encoded, a small allowance for the runtime;
- the arena: one allocation with at most two feature maps, one at each end, and the sweep's scratch between them;
- ``overhead``: what the kernels allocate themselves during a call (PyTorch's results, reordered weights).

A sweep reads rows of one map and writes rows of another. What it needs is counted from the very description that its
scratch is carved by (`fluxvae.engine.sweep.carving`), so that the prediction cannot drift from the code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fluxvae.engine.calls import Geometry, LayerPlan, Step
from fluxvae.errors import InvalidLatentsError, InvalidOptionError

__all__ = ["Plan", "check_size", "parse_memory_limit", "peak_of", "size_in_words"]


def peak_of(layers: tuple[LayerPlan, ...], *, at_once: bool = False) -> int:
    """The most bytes that one image's sweeps hold at once when they run in this order.

    The arena is one allocation, whose pages count from when they are first touched. Those are, from the left, as many
    as the left maps and the scratch beside them have reached so far, and from the right as many as the right maps have;
    together never more than the whole.

    Args:
        at_once: all of the arena counts from the start, as memory of a GPU and what is kept does.
    """
    whole = max(step.arena for layer in layers for step in layer.steps)
    if at_once:
        return whole + max(step.overhead for layer in layers for step in layer.steps)
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
    """How one decode, or encode, will run; `peak_bytes` is above the loaded weights, the output tensor included."""

    height: int
    """The height of the image in pixels; ``width`` likewise."""
    width: int
    batch: int
    kernels: str
    kernels_note: str
    """Why these kernels serve and not those that one would expect; usually nothing."""
    limit: int | None
    """The bytes that it may add above the loaded weights; None: as many as it takes."""
    limit_source: str
    """What set the limit, such as ``"memory_limit"`` or ``"free memory"``."""
    fixed_bytes: int
    layers: tuple[LayerPlan, ...]
    work_ratio: float
    """The multiply-adds, divided by those of the plan that computes nothing twice."""
    seconds: float
    """What the planner weighed: an estimate in the planner's own nominal rates, good for comparing plans only."""
    geometry: Geometry = field(repr=False)
    spill_dir: str | None = None
    at_once: bool = False
    """Whether all of the arena counts from the start, as memory of a GPU and what is kept does: see `peak_of`."""
    graph_bytes: int | None = None
    """What a CUDA graph of one image holds between two calls, which is part of `peak_bytes`; 0: there is no graph,
    because maps are spilled. None: none was asked for."""
    keeps: bool = False
    """Whether the arena is kept from one call to the next."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """All sweeps of one image in the order in which they run."""
        return tuple(step for layer in self.layers for step in layer.steps)

    @property
    def arena_bytes(self) -> int:
        """The size of the one allocation for maps and scratch."""
        return max(step.arena for step in self.steps)

    @property
    def kept_bytes(self) -> int:
        """What stays allocated between two calls, beside CUDA graphs; it is part of `peak_bytes`."""
        return self.arena_bytes if self.keeps else 0

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of memory above the loaded weights, in bytes."""
        return self.fixed_bytes + peak_of(self.layers, at_once=self.at_once)

    @property
    def spill_bytes(self) -> int:
        """The most bytes that are in spilled maps at once."""
        return max(step.spilled for step in self.steps)

    @property
    def macs(self) -> int:
        """The multiply-adds of one image."""
        return sum(step.macs for step in self.steps)

    @property
    def total_blocks(self) -> int:
        """How many steps ``progress`` is told of for the whole batch."""
        return self.batch * sum(step.blocks for step in self.steps)

    @property
    def rungs(self) -> tuple[str, ...]:
        """What becomes of each layer's maps: ``"middle/out"``, or ``"out"`` where it has no map in the middle."""
        return tuple(layer.out if layer.middle is None else f"{layer.middle}/{layer.out}" for layer in self.layers)

    def __str__(self) -> str:
        limit = "none" if self.limit is None else f"{size_in_words(self.limit)} ({self.limit_source})"
        spill = f", {size_in_words(self.spill_bytes)} spilled to {self.spill_dir}" if self.spill_bytes else ""
        note = [f"note: {self.kernels_note}"] if self.kernels_note else []
        if self.graph_bytes == 0:
            note += ["CUDA graph: none, because maps are spilled; a larger memory_limit would allow one"]
        elif self.graph_bytes is not None:
            note += [f"CUDA graph: holds {size_in_words(self.graph_bytes)} between calls"]
        if self.keeps:
            note += [f"memory: keeps {size_in_words(self.kept_bytes)} between calls"]
        lines = [
            f"{self.batch} x {self.width}x{self.height}, kernels {self.kernels!r}, limit {limit}",
            f"peak {size_in_words(self.peak_bytes)} above the weights{spill}; work x{self.work_ratio:.2f}",
            *note,
            f"{'layer':<36}{'map':>16}{'middle':>11}{'out':>11}{'peak':>11}",
        ]
        for layer in self.layers:
            shape = f"{layer.width}x{layer.height}x{layer.channels}"
            peak = self.fixed_bytes + max((step.held for step in layer.steps), default=0)
            name = layer.name.removeprefix("decoder.").removeprefix("encoder.")
            lines.append(f"{name:<36}{shape:>16}{layer.middle or '':>11}{layer.out:>11}{size_in_words(peak):>11}")
        return "\n".join(lines)


def check_size(height: object, width: object, batch: object, scale: int) -> None:
    """Refuse a size of pictures that no latents stand for.

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
    """A size for people to read, such as ``"1.61 GB"``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"
