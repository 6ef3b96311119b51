"""Exact attention of one wide head on a CPU, in float32.

The softmax is computed online, so that only the scores of a few keys are stored at a time. Keys and values are the same
rows here, those of the normalised map (`TorchKernels.attend` says why), and both products read them where they lie.
Everything is transposed: a vector holds the same channel of several queries, NR of which make a panel. A softmax over
the keys then goes from row to row, and no vector ever has to be summed up or shuffled. The result of a query is one
chain of operations in a fixed order, whichever thread computes it and whatever other queries there are.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention" (2022).
Compiled by Numba, without the GIL. Addresses and strides are in bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]

from fluxvae.engine.kernels.cpu import threads
from fluxvae.engine.kernels.cpu.counters import fetch_add
from fluxvae.engine.kernels.cpu.products import NR, THIRD, TILES
from fluxvae.engine.kernels.cpu.vector_code import F32, LANES, VECTOR_BYTES, Code, compiled, vector_function

if TYPE_CHECKING:
    import torch

__all__ = ["AttentionJob", "attention", "attention_bytes", "attention_tasks", "padded_queries"]

VECTOR_CODE = "431ccf56c86f47fd"
"""The digest of the files that this one calls, for the reason that `winograd_tasks.VECTOR_CODE` gives."""
PANELS = 4
"""How many panels of queries a task has: the more, the less often the map is read. That counts where memory is slow: on
a Xeon whose L3 cache gives 20 GB/s, 4 panels with 256 keys reach 0.86 of the products' peak, and 2 with 384 keys 0.75.
On an EPYC (Zen 5) they are equally fast."""
KEYS = 256
"""How many keys are gone through before the sums are corrected for a new maximum; with all panels' queries and sums
they have to stay in the L2 cache. The products of so many keys are added in one chain, and the rounding error of a
chain grows with the square root of its length, but so does that of adding the chains with their number: 96 keys doubled
the errors at 131,072 tokens."""
CHAIN = 64
"""How many products of a score are added one after the other, for the reason that `products.CHAIN` gives."""
ROW = NR * 4
"""The bytes of one row of a panel, which has NR queries."""


def _products(tiles: int, onto: bool) -> Any:
    """``f(left, tile, step, right, steps, out, factors)``: (tiles x K) times (K x NR), K = steps, to ``out``.

    ``left``: value (t, k) at left + t * tile + k * step. ``right``: (K, NR) contiguous. ``out``: (tiles, NR)
    contiguous. ``onto``: out * factors is added, ``factors`` being NR values (unused otherwise).
    """
    chain_length = KEYS if onto else CHAIN

    def emit(
        x: Code, left: ir.Value, tile: ir.Value, step: ir.Value, right: ir.Value, steps: ir.Value, out: ir.Value,
        factors: ir.Value,
    ) -> None:  # fmt: skip
        sums = x.locals(tiles * 2)
        starts = [x.b.mul(tile, x.i(t)) for t in range(tiles)]

        def chain(index: ir.Value) -> None:
            first = x.b.mul(index, x.i(chain_length))
            top, panel = x.at(left, x.b.mul(first, step)), x.at(right, x.b.mul(first, x.i(ROW)))
            for slot in sums:
                x.b.store(x.const(0.0), slot)

            def one(k: ir.Value) -> None:
                row, column = x.at(panel, x.b.mul(k, x.i(ROW))), x.at(top, x.b.mul(k, step))
                vectors = [x.load(x.at(row, w * VECTOR_BYTES)) for w in range(2)]
                for t, start in enumerate(starts):
                    scalar = x.splat(x.load(x.at(column, start), F32))
                    for w in range(2):
                        slot = sums[2 * t + w]
                        x.b.store(x.fma(scalar, vectors[w], x.b.load(slot)), slot)

            rest, whole = x.b.sub(steps, first), x.i(chain_length)
            x.loop(x.b.select(x.b.icmp_signed("<", rest, whole), rest, whole), one)
            with x.b.if_else(x.b.icmp_signed("==", index, x.i(0))) as (start, later):
                with start:
                    scales = [x.load(x.at(factors, w * VECTOR_BYTES)) for w in range(2)] if onto else []
                    for k, slot in enumerate(sums):
                        where, value = x.at(out, k * VECTOR_BYTES), x.b.load(slot)
                        x.store(x.fma(x.load(where), scales[k % 2], value) if onto else value, where)
                with later:
                    for k, slot in enumerate(sums):
                        where = x.at(out, k * VECTOR_BYTES)
                        x.store(x.b.fadd(x.load(where), x.b.load(slot)), where)

        x.loop(x.b.sdiv(x.b.add(steps, x.i(chain_length - 1)), x.i(chain_length)), chain)

    return vector_function(f"fluxvae_attention_{'mix' if onto else 'scores'}_{tiles}", 7, emit)


_scores_many, _scores_few, _scores_one = (_products(tiles, onto=False) for tiles in (TILES, THIRD, 1))
_mix_many, _mix_few = (_products(tiles, onto=True) for tiles in (TILES, THIRD))


def _softmax() -> Any:
    """``softmax(scores, keys, state)``: (keys, NR) scores become exp(score - maximum), in place.

    ``state``, NR values each: the maximum so far, the sum of exponentials so far, and, written, what a sum over
    earlier keys must be multiplied by now.
    """

    def emit(x: Code, scores: ir.Value, keys: ir.Value, state: ir.Value) -> None:
        most, total = x.locals(2)

        def vector(w: ir.Value) -> None:
            offset = x.b.mul(w, x.i(VECTOR_BYTES))
            column, own = x.at(scores, offset), x.at(state, offset)
            before = x.load(own)
            x.b.store(before, most)
            x.b.store(x.const(0.0), total)

            def larger(k: ir.Value) -> None:
                value, best = x.load(x.at(column, x.b.mul(k, x.i(ROW)))), x.b.load(most)
                x.b.store(x.b.select(x.b.fcmp_ordered(">", value, best), value, best), most)

            x.loop(keys, larger)
            now = x.b.load(most)

            def weight(k: ir.Value) -> None:
                where = x.at(column, x.b.mul(k, x.i(ROW)))
                value = x.exp(x.b.fsub(x.load(where), now))
                x.store(value, where)
                x.b.store(x.b.fadd(x.b.load(total), value), total)

            x.loop(keys, weight)
            factor = x.exp(x.b.fsub(before, now))
            x.store(now, own)
            x.store(x.fma(x.load(x.at(own, ROW)), factor, x.b.load(total)), x.at(own, ROW))
            x.store(factor, x.at(own, 2 * ROW))

        x.loop(x.i(2), vector)

    return vector_function("fluxvae_attention_softmax", 3, emit)


def _start() -> Any:
    """``start(src, row, channels, scale, dst, sums, state)``: a panel's queries, its sums and its softmax.

    ``src``: NR rows of ``channels`` values, ``row`` bytes apart. ``dst``: (channels, NR), times the float32 at
    ``scale``; ``sums``, as large: zeros; ``state`` as `_softmax` has it.
    """

    def emit(
        x: Code, src: ir.Value, row: ir.Value, channels: ir.Value, scale: ir.Value, dst: ir.Value, sums: ir.Value,
        state: ir.Value,
    ) -> None:  # fmt: skip
        scales = x.splat(x.load(scale, F32))

        def channel(c: ir.Value) -> None:
            source, target = x.at(src, x.b.mul(c, x.i(4))), x.b.mul(c, x.i(ROW))
            for w in range(2):
                queries = x.gather(x.at(source, x.b.mul(row, x.i(w * LANES))), row)
                x.store(x.b.fmul(queries, scales), x.at(dst, target, w * VECTOR_BYTES))
                x.store(x.const(0.0), x.at(sums, target, w * VECTOR_BYTES))

        x.loop(channels, channel)
        for w in range(2):
            x.store(x.const(float("-inf")), x.at(state, w * VECTOR_BYTES))
            x.store(x.const(0.0), x.at(state, ROW + w * VECTOR_BYTES))

    return vector_function("fluxvae_attention_start", 7, emit)


def _finish() -> Any:
    """``finish(sums, state, blocks, dst, row)``: sums (blocks * LANES, NR) over the exponentials', back to NR rows."""

    def emit(x: Code, sums: ir.Value, state: ir.Value, blocks: ir.Value, dst: ir.Value, row: ir.Value) -> None:
        def query(q: ir.Value) -> None:
            column, target = x.at(sums, x.b.mul(q, x.i(4))), x.at(dst, x.b.mul(q, row))
            total = x.splat(x.load(x.at(state, ROW, x.b.mul(q, x.i(4))), F32))

            def channels(k: ir.Value) -> None:
                value = x.gather(x.at(column, x.b.mul(k, x.i(LANES * ROW))), x.i(ROW))
                x.store(x.b.fdiv(value, total), x.at(target, x.b.mul(k, x.i(VECTOR_BYTES))))

            x.loop(blocks, channels)

        x.loop(x.i(NR), query)

    return vector_function("fluxvae_attention_finish", 5, emit)


_softmax_panel, _start_panel, _finish_panel = _softmax(), _start(), _finish()


class AttentionJob(NamedTuple):
    """The job of one call: whole panels of queries against all tokens."""

    queries: int
    """The address of the queries, (panels * NR, channels) float32."""
    tokens: int
    """The address of the tokens, which are keys and values at once, (keys, channels) float32."""
    dst: int
    """The address of the result, which is as large as the queries."""
    scale: int
    """The address of the softmax's scale, one float32."""
    panels: int
    keys: int
    channels: int
    scratch: int
    scratch_bytes: int
    """The bytes of scratch that each thread has."""


@compiled
def attention_tasks(job: AttentionJob, counter: Any, worker: int) -> None:
    """Take panels of queries until none is left."""
    channels, row, size = job.channels, job.channels * 4, job.channels * ROW
    queries = job.scratch + worker * job.scratch_bytes
    sums = queries + PANELS * size
    scores, state = sums + PANELS * size, sums + PANELS * (size + KEYS * ROW)
    while True:
        first = fetch_add(counter.ctypes.data, 1) * PANELS
        if first >= job.panels:
            return
        panels = min(PANELS, job.panels - first)
        src, dst = job.queries + first * NR * row, job.dst + first * NR * row
        for p in range(panels):
            own = state + p * 3 * ROW
            _start_panel(src + p * NR * row, row, channels, job.scale, queries + p * size, sums + p * size, own)
        done = 0
        while done < job.keys:
            tokens, keys = job.tokens + done * row, min(KEYS, job.keys - done)
            for p in range(panels):
                right, out = queries + p * size, scores + p * KEYS * ROW
                key = 0
                while key < keys:
                    if keys - key >= TILES:
                        _scores_many(tokens + key * row, row, 4, right, channels, out + key * ROW, 0)
                        key += TILES
                    elif keys - key >= THIRD:
                        _scores_few(tokens + key * row, row, 4, right, channels, out + key * ROW, 0)
                        key += THIRD
                    else:
                        _scores_one(tokens + key * row, row, 4, right, channels, out + key * ROW, 0)
                        key += 1
                _softmax_panel(out, keys, state + p * 3 * ROW)
            for p in range(panels):
                right, out, factors = scores + p * KEYS * ROW, sums + p * size, state + (p * 3 + 2) * ROW
                c = 0
                while c < channels:
                    if channels - c >= TILES:
                        _mix_many(tokens + c * 4, 4, row, right, keys, out + c * ROW, factors)
                        c += TILES
                    else:
                        _mix_few(tokens + c * 4, 4, row, right, keys, out + c * ROW, factors)
                        c += THIRD
            done += keys
        for p in range(panels):
            _finish_panel(sums + p * size, state + p * 3 * ROW, channels // LANES, dst + p * NR * row, row)


def padded_queries(count: int) -> int:
    """Round a number of queries up to whole panels."""
    return -(-count // NR) * NR


def attention_bytes(count: int, channels: int) -> int:
    """Bytes of `attention`'s workspace for so many queries; at 512 channels 0.66 MB for each thread that finds work."""
    return _workers(padded_queries(count) // NR) * _scratch_bytes(channels)


def _workers(panels: int) -> int:
    return min(threads.count(), -(-panels // PANELS))


def _scratch_bytes(channels: int) -> int:
    """The bytes of a thread's scratch: the queries, sums, scores and state of the softmax of its panels."""
    return PANELS * (2 * channels + KEYS + 3) * ROW


def attention(queries: torch.Tensor, tokens: torch.Tensor, scale: float, out: torch.Tensor, work: torch.Tensor) -> None:
    """Compute ``out = softmax(scale * queries tokens^T) tokens`` in float32.

    A result is NaN where one of its scores is NaN or infinite.

    Args:
        queries, out: (n, channels), contiguous, with whole vectors of channels; n is what `padded_queries` gives, and
            the rows that were added may hold anything.
        tokens: (keys, channels), contiguous.
        work: flat uint8 scratch of `attention_bytes`.
    """
    count, channels = queries.shape
    factor = np.full(1, scale, np.float32)
    # Threads added since the work was planned have no scratch.
    workers = min(_workers(count // NR), work.numel() // _scratch_bytes(channels))
    if workers < 1:
        raise RuntimeError(f"attention: got a workspace of {work.numel()} bytes, too small: the plan was wrong")
    job = AttentionJob(
        queries=queries.data_ptr(), tokens=tokens.data_ptr(), dst=out.data_ptr(), scale=factor.ctypes.data,
        panels=count // NR, keys=tokens.shape[0], channels=channels, scratch=work.data_ptr(),
        scratch_bytes=_scratch_bytes(channels),
    )  # fmt: skip
    counter = np.zeros(1, np.int64)
    threads.run(lambda worker: attention_tasks(job, counter, worker), workers)
