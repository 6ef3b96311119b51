"""How a Winograd call is cut into tasks, and what memory that takes. Integers only."""

from __future__ import annotations

from typing import NamedTuple

from fluxvae.engine.calls import Kind, enlargement
from fluxvae.engine.kernels.cpu import threads
from fluxvae.engine.kernels.cpu.winograd_loops import NR, THIRD
from fluxvae.engine.kernels.cpu.winograd_tasks import POSITIONS, STEP

__all__ = [
    "MOST_RUN",
    "Cut",
    "cut_tasks",
    "longest_run",
    "position_bytes",
    "rounded",
    "scratch_bytes",
    "transformed_bytes",
]

LINE = 64
"""The bytes of a cache line."""
LEAST_RUN, MOST_RUN = 24, 48
"""Tiles of a task. Few: every task reads all of its weights. Many: its transformed tiles leave L2."""
LEAST_SLICE = 128
"""Output channels of a task, at least: every slice transforms its tiles again."""
SLICE_COST = 0.06
"""About which part of its time a task takes longer for each further slice."""


class Cut(NamedTuple):
    """How a call is cut into tasks: by its layer and size alone, so that its statistics always add up alike."""

    across: int
    tiles: int
    run: int
    """How many tiles the longest run has."""
    units: int
    """Runs of tiles, as equal as whole blocks of products allow: else the last would be short, and threads idle."""
    slices: int
    """Every unit is so many tasks. (No sum depends on this one, so it may depend on the number of threads.)"""
    panels: int
    """How many panels of NR output channels a slice has."""
    position_in: int
    position_out: int
    workers: int
    """How many threads find work."""


def position_bytes(cin: int, cout: int) -> int:
    """Bytes that one position's transformed weights take."""
    return _odd_lines(cin * -(-cout // NR) * NR * 4)


def transformed_bytes(cin: int, cout: int) -> int:
    """Bytes that all of a layer's transformed weights take."""
    return POSITIONS * position_bytes(cin, cout)


def cut_tasks(kind: Kind, cin: int, cout: int, rows: int, width: int) -> Cut:
    """Cut a convolution into tasks; ``rows`` and ``width`` are those of its input."""
    across = -(-width * enlargement(kind) // STEP)
    tiles = across * -(-rows * enlargement(kind) // STEP)
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


def scratch_bytes(run: int, cin: int, panels: int) -> int:
    """Bytes of scratch that a thread needs, for its transformed tiles and their products."""
    return POSITIONS * (_odd_lines(run * cin * 4) + _odd_lines(run * panels * NR * 4))


def _odd_lines(nbytes: int) -> int:
    """At least so many bytes, in an odd number of cache lines: 64 positions then lie in 64 different cache sets."""
    return (-(-nbytes // LINE) | 1) * LINE
