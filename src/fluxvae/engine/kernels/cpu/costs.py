"""What the Winograd kernels cost, and which of them computes a call. This module does not import PyTorch."""

from __future__ import annotations

from fluxvae.engine.calls import Call
from fluxvae.engine.kernels.cpu.attention import attention_bytes, padded_queries
from fluxvae.engine.kernels.cpu.few_outputs import OUTPUTS
from fluxvae.engine.kernels.cpu.multiply import split_bytes
from fluxvae.engine.kernels.cpu.products import NR, THIRD
from fluxvae.engine.kernels.cpu.row_tasks import linear_bytes
from fluxvae.engine.kernels.cpu.vector_code import AMX, LANES
from fluxvae.engine.kernels.cpu.winograd_cut import (
    Cut,
    cut_tasks,
    form_of,
    transformed_bytes,
)
from fluxvae.engine.kernels.cpu.winograd_job import PLAIN, POSITIONS, PRECISE, SIZES, STEPS, STRIP
from fluxvae.engine.kernels.direct.costs import DirectCosts

__all__ = ["WinogradCosts", "attention_results", "few", "whole_vectors"]

AT_ONCE_BYTES = 1 << 20
"""The bytes of statistics that the blocks of one call have together at most. That is four blocks of the usual size,
which a sweep is done with in some hundredths of a second, so progress and the end of a cancelled call do not wait."""
LEAST_PIXELS = 1024
"""Maps of fewer pixels are not made by Winograd: transforming the weights would take longer than it saves."""


class WinogradCosts(DirectCosts):
    """Winograd where it applies, the direct kernels elsewhere: see `fluxvae.engine.calls.Costs`."""

    name = "winograd"
    row_multiple = STEPS[PLAIN]
    precise_row_multiple = STEPS[PRECISE]
    block_factor = 2 if AMX else 1

    def runtime_bytes(self, itemsize: int) -> int:
        """None: oneDNN computes few of the convolutions."""
        return 0

    def macs(self, call: Call) -> int:
        """The multiply-adds of one call, without those of the transforms."""
        if not _applies(call):
            return super().macs(call)
        form = form_of(call.kind, call.precise)
        cut = cut_tasks(form, call.cin, call.cout, call.rows, call.width)
        return POSITIONS[form] * cut.tiles * call.cin * call.cout

    def loaded(self, call: Call) -> int:
        """Bytes of the arena that hold the transformed weights."""
        if _attends(call):
            return 4 * linear_bytes(call.cin, call.cout)
        if call.kind == "linear" and whole_vectors(call.cin, call.cout, call.itemsize):
            return linear_bytes(call.cin, call.cout)
        if few(call.kind, call.cin, call.cout, call.itemsize):
            return 9 * call.cin * OUTPUTS * 4
        if not _applies(call):
            return super().loaded(call)
        return transformed_bytes(form_of(call.kind, call.precise), call.cin, call.cout)

    def overhead(self, call: Call) -> int:
        """Bytes outside the arena: weights that are cast to float32, or statistics and the threads' small buffers."""
        if few(call.kind, call.cin, call.cout, call.itemsize) or _attends(call):
            return 0
        if not _applies(call):
            return super().overhead(call)
        form = form_of(call.kind, call.precise)
        cut = cut_tasks(form, call.cin, call.cout, call.rows, call.width)
        strip = THIRD * SIZES[form] ** 2 * STRIP * 4
        own = cut.workers * (strip + split_bytes(cut.longest, call.cin))
        return max(9 * call.cin * call.cout * 4 * call.cast, self.blocks_at_once(call) * _statistics_bytes(cut) + own)

    def reads_in_place(self, call: Call) -> bool:
        """Winograd's convolutions do, unless the norm is of each pixel, all channels of which are not read at once."""
        return _applies(call) and call.kind != "down" and not call.by_pixel

    def blocks_at_once(self, call: Call) -> int:
        """As many as their statistics leave room for, if whole tiles make a block."""
        form = form_of(call.kind, call.precise)
        if not self.reads_in_place(call) or call.out(call.rows) % STEPS[form]:
            return 1
        cut = cut_tasks(form, call.cin, call.cout, call.rows, call.width)
        return max(1, AT_ONCE_BYTES // _statistics_bytes(cut))

    def workspace(self, call: Call) -> int:
        """Bytes of the arena: each thread's transformed tiles and products, or attention's results, sums and scores."""
        if few(call.kind, call.cin, call.cout, call.itemsize):
            return 0
        if _attends(call):
            count = call.rows * call.width
            return max(super().workspace(call), attention_results(count, call.cin) + attention_bytes(count, call.cin))
        if not _applies(call):
            return super().workspace(call)
        form = form_of(call.kind, call.precise)
        cut = cut_tasks(form, call.cin, call.cout, call.rows, call.width)
        return cut.scratch_bytes(form, cut.workers)


def _applies(call: Call) -> bool:
    """Whether a call goes by Winograd. That depends on the layer and its map alone, never on blocks or on memory."""
    pixels = call.tokens // 4 if call.kind == "down" else call.tokens
    worthwhile = call.tokens == 0 or pixels >= LEAST_PIXELS
    return call.kind in ("conv3", "up", "down") and worthwhile and whole_vectors(call.cin, call.cout, call.itemsize)


def _statistics_bytes(cut: Cut) -> int:
    """What the statistics of one block's spans take until they are merged."""
    return cut.spans * cut.panels * NR * 16


def _attends(call: Call) -> bool:
    """Whether this is attention that `cpu.attention` computes."""
    return call.kind == "attend" and whole_vectors(call.cin, call.cout, call.itemsize)


def attention_results(count: int, channels: int) -> int:
    """Bytes of the two buffers that a block of attention's queries go through, back and forth."""
    return 2 * padded_queries(count) * channels * 4


def few(kind: str, cin: int, cout: int, itemsize: int) -> bool:
    """Whether this is a last layer that `few_outputs` computes."""
    return kind == "conv3" and cout == OUTPUTS and cin % LANES == 0 and itemsize == 4


def whole_vectors(cin: int, cout: int, itemsize: int) -> bool:
    """Whether these kernels can compute it: in float32, with whole vectors of channels."""
    return itemsize == 4 and cin % LANES == 0 and cout % LANES == 0
