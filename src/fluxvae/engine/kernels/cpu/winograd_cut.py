"""How a Winograd call is cut into tasks, and what memory that takes, in plain integers."""

from __future__ import annotations

from typing import NamedTuple

from fluxvae.engine import thread_count
from fluxvae.engine.calls import Kind, length_out
from fluxvae.engine.kernels.cpu.multiply import panel_bytes
from fluxvae.engine.kernels.cpu.products import NR, THIRD
from fluxvae.engine.kernels.cpu.vector_code import AMX, LINE
from fluxvae.engine.kernels.cpu.winograd_job import DOWN, PLAIN, POSITIONS, PRECISE, SPAN, STEPS, UP

__all__ = [
    "Cut",
    "cut_tasks",
    "form_of",
    "position_bytes",
    "rounded",
    "transformed_bytes",
]

ALONE = 128
"""The most channels with which a unit of tiles is one thread's alone. What a thread transforms and multiplies is then
in its own caches when it needs it again, which is worth more than reading the weights once for all threads, since there
are few of them: 4 MB at 128 channels, 17 MB at 256."""
FEW = 4 if AMX else 0
"""With so many threads or fewer, that also goes for twice as many channels: a unit then has enough tiles to be worth
reading the weights for. Without AMX this was not measured."""
UNIT = 240 if AMX else 32
"""How many tiles a unit has at most. 32 are 1.1 MB of transformed tiles at 128 channels, which stay in the L2 cache.
AMX multiplies so fast that reading the weights for every unit takes longer than reading tiles from the L3 cache: all
that a thread has of a block is one unit."""


class Cut(NamedTuple):
    """How a call is cut into tasks: by layer and size alone, so that statistics are always added up alike."""

    across: int
    tiles: int
    panels: int
    """How many panels of NR output channels there are."""
    spans: int
    """How many tasks the last step has, and how many statistics are combined."""
    units: int
    """How many parts of the tiles one thread each computes alone; 0: all threads compute all of them together."""
    place: int
    """The bytes of a place for one position of the transformed tiles or of the products."""
    longest: int
    """How many tiles a thread multiplies at once: those of a unit, or all."""
    workers: int
    """How many threads find work."""

    def scratch_bytes(self, form: int, workers: int) -> int:
        """The bytes of scratch with which so many threads can compute it."""
        if self.units:
            return workers * (POSITIONS[form] + 1) * self.place
        return (POSITIONS[form] + workers) * self.place


def position_bytes(cin: int, cout: int) -> int:
    """Bytes that one position's transformed weights take."""
    return _odd_lines(-(-cout // NR) * panel_bytes(cin))


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
    panels = -(-cout // NR)
    channels = max(cin, panels * NR)
    workers, spans, units, longest = thread_count.count(), -(-tiles // SPAN), 0, tiles
    if channels <= (2 * ALONE if workers <= FEW else ALONE):
        units = min(-(-tiles // (UNIT * workers)) * workers, spans)  # equally many for every thread
        longest = min(-(-spans // workers) * SPAN, UNIT, tiles)
    place = _odd_lines(rounded(longest) * channels * 4)
    return Cut(across, tiles, panels, spans, units, place, longest, min(workers, units or POSITIONS[form]))


def rounded(tiles: int) -> int:
    """Round a number of tiles up to whole groups."""
    return -(-tiles // THIRD) * THIRD


def _odd_lines(nbytes: int) -> int:
    """Round up to an odd number of cache lines, so that the 64 positions lie in 64 different cache sets."""
    return (-(-nbytes // LINE) | 1) * LINE
