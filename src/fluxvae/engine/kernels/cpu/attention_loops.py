"""The inner loops of attention on a CPU, for Numba code to call: products, softmax, and a panel's begin and end.

Everything is transposed: a vector holds the same channel of several queries, NR of which make a panel. A softmax over
the keys then goes from row to row, and no vector ever has to be summed up or shuffled.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from fluxvae.engine.kernels.cpu.products import NR, THIRD, TILES
from fluxvae.engine.kernels.cpu.vector_code import F32, LANES, VECTOR_BYTES, Code, vector_function

__all__ = [
    "KEYS",
    "ROW",
    "finish_panel",
    "mix_few",
    "mix_many",
    "scores_few",
    "scores_many",
    "scores_one",
    "softmax_panel",
    "start_panel",
]

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


scores_many, scores_few, scores_one = (_products(tiles, onto=False) for tiles in (TILES, THIRD, 1))
mix_many, mix_few = (_products(tiles, onto=True) for tiles in (TILES, THIRD))


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


softmax_panel, start_panel, finish_panel = _softmax(), _start(), _finish()
