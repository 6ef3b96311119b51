"""The ground of the engine: one kernel call in numbers, what it costs, and the steps that a plan is made of.

Kernels, layers and the planner all speak in these values, and none of them knows the others. This module does not
import PyTorch: a plan on a CPU is made without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

__all__ = [
    "ALIGN",
    "BLOCK_VALUES",
    "RUNTIME_BYTES",
    "STAGES",
    "Call",
    "Costs",
    "Geometry",
    "Kind",
    "LayerPlan",
    "Place",
    "Step",
    "aligned",
    "block_values",
    "enlargement",
    "length_out",
]

Place: TypeAlias = Literal["memory", "spill", "recompute"]
"""Where a feature map lives. ``recompute`` is nowhere: every sweep that reads its rows computes them again."""

Kind: TypeAlias = Literal["conv3", "up", "down", "linear", "attend"]
"""What a kernel computes: a 3x3 convolution; one of the map enlarged twofold; one of stride 2; a 1x1 convolution;
attention."""

ALIGN = 256
"""Bytes. Everything in the arena starts at a multiple of this, so that equal blocks are equally aligned in any plan."""

BLOCK_VALUES = 1 << 20
"""Values in one block of rows: 4 MB in float32, which with its halo and its result stays in a core's share of cache."""

RUNTIME_BYTES = {2: 21 << 20, 4: 5 << 20, 8: 5 << 20}
"""Bytes by which oneDNN's generated code and MKL's buffers grow during a process's first decodes of a size, by the
bytes of one value. Later decodes of that size take so much less than their plan says. In half precision the most was
measured with AMX, at odd widths: 19.3 MiB, where a processor without it took 10."""

STAGES = 3
"""Blocks of rows that a map in host memory has on the device at most: the next ones of two readers, and one that is on
its way out."""


@dataclass(frozen=True)
class Call:
    """One call of a kernel, in numbers: what it computes and on how large a block."""

    kind: Kind
    cin: int
    cout: int
    rows: int
    """The rows of the input block, without the halo row above and below it."""
    width: int
    """The width of the input map."""
    itemsize: int
    cast: bool
    """Whether the weights are stored in another dtype than the one that is computed in."""
    tokens: int = 0
    """The pixels of the whole input map, all of which attention looks at."""
    statistics: bool = True
    """Whether the statistics of the output are wanted."""
    precise: bool = False
    """Whether the result is worth more work for smaller rounding errors (`records.Conv.precise`)."""
    by_pixel: bool = False
    """Whether the input goes through a norm of each pixel on its way in (`records.PixelNorm`)."""

    def out(self, length: int) -> int:
        """How many rows, or columns, of the output so many of the input give."""
        return length_out(self.kind, length)


class Costs(Protocol):
    """What the planner asks of a kernel set; in bytes and multiply-adds."""

    @property
    def name(self) -> str:
        """The kernel set's name, as the ``kernels`` option spells it."""

    @property
    def note(self) -> str:
        """Why these kernels serve and not those that one would expect, which plans print. Usually nothing."""

    @property
    def block_values(self) -> int | None:
        """Values of a block of rows. None: what `block_values` gives, which suits a core's cache."""

    @property
    def block_factor(self) -> int:
        """How many times as many values a block has as `block_values` gives; kernels that multiply much faster than
        they read weights want larger ones."""

    @property
    def stages_spills(self) -> bool:
        """Whether blocks of rows of a spilled map are held on the device on their way (`HostMap` does that)."""

    @property
    def row_multiple(self) -> int:
        """Blocks are cut at multiples of this many rows, counted from the top of the map."""

    @property
    def precise_row_multiple(self) -> int:
        """The same for a convolution that is `Call.precise`."""

    def runtime_bytes(self, itemsize: int) -> int:
        """What the kernels' libraries keep allocated on the device from the first call on, beside `RUNTIME_BYTES`.

        ``itemsize``: bytes of a value that is computed with.
        """

    def reads_in_place(self, call: Call) -> bool:
        """Whether the rows of a map in memory are read from where they are, through their norm, and padded on the way.

        Otherwise they are copied into a window of scratch, and put through the norm there.
        """

    def blocks_at_once(self, call: Call) -> int:
        """How many blocks of rows that are read in place one call may have, each with the bits that it has alone."""

    def macs(self, call: Call) -> int:
        """Multiply-adds that the call computes."""

    def loaded(self, call: Call) -> int:
        """Bytes in the arena for weights that are held for the whole sweep, beside the model's own."""

    def overhead(self, call: Call) -> int:
        """Bytes that are allocated outside of the arena while the call runs."""

    def workspace(self, call: Call) -> int:
        """Bytes of scratch in the arena while the call runs."""

    def statistics(self, call: Call, blocks: int) -> tuple[int, int]:
        """Bytes for the statistics of a map that so many blocks make: in the arena during its sweep, and beside it."""


@dataclass(frozen=True)
class Geometry:
    """Sizes that depend on the network, the image and the dtype, but never on the memory limit."""

    height: int
    """The height of what the network starts from, latents or pixels; ``width`` is theirs too."""
    width: int
    itemsize: int
    cast: bool = False
    row_multiple: int = 1
    block_values: int = BLOCK_VALUES
    precise_row_multiple: int = 1

    def block(self, kind: Kind, cin: int, cout: int, height: int, width: int, *, precise: bool = False) -> int:
        """Rows per block of a layer whose *input* map has this size."""
        values = width * max(cin, cout) * enlargement(kind) ** 2
        if kind == "attend":
            values *= 2
        # Wide layers get more, since each call pays once for its weights: oneDNN reorders them, 9.4 MB at 512 channels.
        budget = self.block_values * max(256, cin, cout) // 256
        rows = max(1, budget // values)
        multiple = self.precise_row_multiple if precise and kind == "conv3" else self.row_multiple
        if kind == "down":
            multiple = math.lcm(multiple, 2)
        rows = max(rows // multiple, 1) * multiple
        return min(rows, height)

    def call(
        self, kind: Kind, cin: int, cout: int, size: tuple[int, int], *, precise: bool = False, by_pixel: bool = False
    ) -> Call:
        """The call that computes one whole block of a map of this height and width."""
        height, width = size
        rows = self.block(kind, cin, cout, height, width, precise=precise)
        tokens = height * width
        return Call(
            kind, cin, cout, rows, width, self.itemsize, self.cast, tokens, precise=precise, by_pixel=by_pixel
        )  # fmt: skip


def block_values(channels: int, pixels: int) -> int:
    """Values per block of rows: a sixteenth of the map at full resolution, within bounds.

    Where blocks are cut decides the last bits of an image, so this is a function of the network and the image alone.

    Args:
        channels: of the map at full resolution, a decoder's last one and an encoder's first.
        pixels: of the image.
    """
    return min(max(channels * pixels // 16, BLOCK_VALUES // 4), BLOCK_VALUES)


def enlargement(kind: Kind) -> int:
    """How many times larger the map that is convolved is than the one that is read, each way."""
    return 2 if kind == "up" else 1


def length_out(kind: Kind, length: int) -> int:
    """How many rows, or columns, of the output so many of the input give."""
    return length // 2 if kind == "down" else length * enlargement(kind)


def aligned(nbytes: int) -> int:
    """Round bytes up to the arena's alignment."""
    return -(-nbytes // ALIGN) * ALIGN


@dataclass(frozen=True)
class Step:
    """One sweep in numbers: what it holds, what it computes, what it moves."""

    kind: str
    """A name for people: ``conv_in``, ``up``, ``down``, ``conv1``, ``conv2``, ``norm``, ``attend``,
    ``conv_out``."""
    near: int
    """The bytes in memory of the map that the sweep starts from; 0 if it is not in memory."""
    far: int
    """The bytes in memory of the map at the arena's other end."""
    spilled: int
    """The bytes of all feature maps that are spilled while the sweep runs."""
    scratch: int
    overhead: int
    macs: int
    moved: int
    """The bytes that the sweep reads from spilled maps and writes to them."""
    blocks: int

    @property
    def maps(self) -> int:
        """The bytes of the feature maps that are in memory while the sweep runs."""
        return self.near + self.far

    @property
    def arena(self) -> int:
        """The bytes of the arena that the sweep needs, for maps and scratch together."""
        return self.maps + self.scratch

    @property
    def held(self) -> int:
        """All bytes that the sweep holds beside those that a plan holds from beginning to end."""
        return self.arena + self.overhead


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a plan: what becomes of its maps, and the sweeps that it takes."""

    name: str
    height: int
    """The height of the layer's result; ``width`` and ``channels`` are its too."""
    width: int
    channels: int
    middle: Place | None
    """Where the map between a resnet's two convolutions lives. None: the layer has none."""
    out: Place
    flips: bool
    """Its result is at the other end of the arena than its input."""
    steps: tuple[Step, ...]
