"""How a Winograd call is cut into tasks, and what memory that takes, in plain integers."""

from __future__ import annotations

from typing import NamedTuple

from fluxvae.engine.calls import Kind, length_out
from fluxvae.engine.kernels.cpu import threads
from fluxvae.engine.kernels.cpu.winograd_loops import NR, THIRD
from fluxvae.engine.kernels.cpu.winograd_tasks import DOWN, PLAIN, POSITIONS, PRECISE, STEPS, UP

__all__ = [
    "MOST_RUN",
    "Cut",
    "cut_tasks",
    "form_of",
    "longest_run",
    "position_bytes",
    "rounded",
    "scratch_bytes",
    "transformed_bytes",
]

LINE = 64
"""The bytes of a cache line."""
LEAST_RUN, MOST_RUN = 24, 48
"""How many tiles a task has. Every task reads all of its weights, which argues against few; and the transformed tiles
of many would not stay in the L2 cache."""
LEAST_SLICE = 128
"""How many output channels a task has at least. More slices of fewer channels would transform their tiles too often."""
SLICE_COST = 0.06
"""By which part of its time a task takes longer, about, for each further slice."""


class Cut(NamedTuple):
    """How a call is cut into tasks: by layer and size alone, so that statistics are always added up alike."""

    across: int
    tiles: int
    run: int
    """How many tiles the longest run has."""
    units: int
    """How many runs of tiles there are. They are as equally long as whole blocks of products allow, so that no thread
    idles while another one finishes."""
    slices: int
    """How many tasks each unit is split into. No sum depends on this, so it may depend on the number of threads."""
    panels: int
    """How many panels of NR output channels a slice has."""
    position_in: int
    position_out: int
    workers: int
    """How many threads find work."""


def position_bytes(cin: int, cout: int) -> int:
    """Bytes that one position's transformed weights take."""
    return _odd_lines(cin * -(-cout // NR) * NR * 4)


def form_of(kind: Kind, precise: bool) -> int:
    """The form of a convolution's tiles; where the map is enlarged or halved there is one for each."""
    if kind == "conv3":
        return PRECISE if precise else PLAIN
    return DOWN if kind == "down" else UP


def transformed_bytes(form: int, cin: int, cout: int) -> int:
    """Bytes that all of a layer's transformed weights take."""
    return POSITIONS[form] * position_bytes(cin, cout)


def cut_tasks(form: int, cin: int, cout: int, rows: int, width: int) -> Cut:
    """Cut a convolution into tasks; ``rows`` and ``width`` are those of its input."""
    kind: Kind = "up" if form == UP else "down" if form == DOWN else "conv3"
    across = -(-length_out(kind, width) // STEPS[form])
    tiles = across * -(-length_out(kind, rows) // STEPS[form])
    thirds = -(-tiles // THIRD)
    units = -(-thirds * THIRD // longest_run(cin))
    run = -(-thirds // units) * THIRD
    workers, total = threads.count(), -(-cout // NR)

    def cost(slices: int) -> float:
        return -(-units * slices // workers) / slices * (1 + SLICE_COST * slices)

    slices = min(
        (k for k in range(1, total + 1) if total % k == 0 and total // k * NR >= min(LEAST_SLICE, cout)), key=cost
    )
    panels = total // slices
    return Cut(
        across, tiles, run, units, slices, panels,
        _odd_lines(run * cin * 4), _odd_lines(run * panels * NR * 4), min(workers, units * slices),
    )  # fmt: skip


def longest_run(cin: int) -> int:
    """How many tiles a task has at most."""
    return min(max(cin // 8, LEAST_RUN), MOST_RUN)


def rounded(tiles: int) -> int:
    """Round a number of tiles up to whole blocks of products."""
    return -(-tiles // THIRD) * THIRD


def scratch_bytes(form: int, run: int, cin: int, panels: int) -> int:
    """Bytes of scratch that a thread needs, for its transformed tiles and their products."""
    return POSITIONS[form] * (_odd_lines(run * cin * 4) + _odd_lines(run * panels * NR * 4))


def _odd_lines(nbytes: int) -> int:
    """Round up to an odd number of cache lines, so that the 64 positions lie in 64 different cache sets."""
    return (-(-nbytes // LINE) | 1) * LINE
