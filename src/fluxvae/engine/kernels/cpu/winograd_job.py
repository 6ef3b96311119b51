"""Winograd's convolution in numbers: the forms of its tiles, and the job of one call that `winograd_tasks` does.

Addresses and strides are in bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = [
    "DOWN", "PLAIN", "POSITIONS", "PRECISE", "REACHES", "SIZES", "SPAN", "STEPS", "STRIP", "UP", "ConvJob", "Shared",
]  # fmt: skip

PLAIN, UP, DOWN, PRECISE = 0, 1, 2, 3
"""The forms of a tile. PLAIN is F(6, 3); UP is the same of a map that is enlarged twofold; DOWN are three outputs of
stride 2; PRECISE is F(4, 3), which takes more products and rounds to a third of the error."""
STEPS = (6, 6, 3, 4)
"""How many outputs a tile has in each direction, by form."""
SIZES = (8, 5, 7, 6)
"""How many inputs a tile has in each direction; for UP, on the small map."""
REACHES = (6, 3, 6, 4)
"""How many inputs there are from the beginning of a tile to that of the next."""
POSITIONS = (64, 64, 49, 36)
"""How many products a tile has for each pair of an input and an output channel."""
STRIP = 64
"""How many channels a strip has at most. It has 66 kB then, which stay in the L2 cache."""
SPAN = 4
"""How many tiles one task of the last step has. Their statistics are gathered together."""


class ConvJob(NamedTuple):
    """The job of one call: a 3x3 convolution of one or more blocks of rows, all of which are equally high.

    It is one of the map as it is or enlarged, or of stride 2. Every block has tiles of its own, so that a result does
    not depend on how many blocks a call has.
    """

    src: int
    """The address of row 0, which is the one above the first block, whether it is there or not."""
    src_row: int
    src_column: int
    src_first: int
    """The first row that is there. Outside of these rows and of the columns, zeros are read."""
    src_rows: int
    """One more than the last row that is there, halo included."""
    src_columns: int
    cin: int
    scale: int
    """The address of a norm's scale that rows go through, with SiLU, one float32 for each channel; 0: they do not."""
    shift: int
    """That of its shift."""
    dst: int
    dst_row: int
    dst_column: int
    rows: int
    """The rows of the output of one block; ``columns`` and ``cout`` are the output's too."""
    columns: int
    cout: int
    form: int
    """The form of the tiles, such as PLAIN."""
    residual: int
    """The address of the residual minus that of the output; -1 if there is none."""
    weights: int
    """The address of the transformed weights: for every position, the panels as `multiply` reads them."""
    position_weights: int
    """The bytes of one position's weights, padding included."""
    panels: int
    """How many panels of NR output channels there are."""
    panel_weights: int
    """The bytes of one panel's weights."""
    split: int
    """The bytes of scratch that a thread needs for `multiply`."""
    blocks: int
    block_rows: int
    """How many rows of the input one block has, without a halo."""
    tiles_across: int
    tiles: int
    """The tiles of one block."""
    units: int
    """How many units the tiles of a block are split into, each of which one thread computes alone; 0: all compute all
    of them."""
    piece: int
    """How many groups of THIRD tiles one task of the first step has."""
    place: int
    """The bytes of a place, which holds one position of the transformed tiles, or of the products."""
    give_way: int
    """`system.give_way`."""
    scratch: int
    """The address of the places: as many as there are positions and threads together, or where there are units, for
    each thread one more than there are positions."""


class Shared(NamedTuple):
    """The arrays that all threads of one call work in."""

    factor_bias: Any
    """(2, panels * NR) float32. Outputs are multiplied by the first row, then the second is added."""
    stats: Any
    """(blocks, spans, panels, 2, NR) float64 of zeros: the mean and the squared deviations of each SPAN tiles go there.
    """
    counts: Any
    """(blocks, spans) int64, filled with the pixels of each."""
    places: Any
    """(threads, positions) int64, filled with the addresses of a unit's products; without units, the first row is."""
    counters: Any
    """(blocks * (units or 1), 7, 8) int64 of zeros: the numbers of the next tasks and of those done for each step, and
    of units, each in a cache line of its own."""
