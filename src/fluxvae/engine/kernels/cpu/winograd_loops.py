"""The inner loops of the Winograd kernels: products and transforms, for Numba code to call.

Every output value is one chain of operations in a fixed order, whatever block it is computed in: the same bits for any
cut into tiles, tasks and threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from fluxvae.engine.kernels.cpu.vector_code import (
    F32,
    LANES,
    REGISTERS,
    VECTOR,
    VECTOR_BYTES,
    WIDE,
    Code,
    vector_function,
)
from fluxvae.engine.kernels.cpu.winograd_matrices import PRECISE_POINTS, halving, toom_cook

Matrix = Sequence[Sequence[Fraction]]

NR = 2 * LANES
"""How many output channels one register block of products has."""
PIXELS = (0, 1, 2, 3, 4, 5, 6, 7)
PIXELS_UP = (0, 1, 1, 2, 2, 3, 3, 4)
"""Which pixels of the small map the inputs of a tile of the enlarged map are, so that the large map need not exist. A
tile begins one pixel before an even position, so its first input is the second one of a pair of equal pixels."""
CHAIN = 32
"""How many products are added one after the other before their sum joins the total. Rounding errors grow with the
square root of a chain's length, so short chains make K = 512 as accurate as K = 64."""
TILES = 12 if REGISTERS == 32 else 6
"""How many tiles one register block of products has. It takes 24 (or 12) registers for the sums and leaves the rest to
the operands. The end of a run takes one third or two thirds of a block."""
THIRD = TILES // 3
"""How many tiles the smallest block of products has. The lengths of all runs but the last are multiples of this."""


# -- the products --------------------------------------------------------------------------------------------------


def _products(tiles: int) -> Any:
    """``products(a, a_block, b, blocks, c, ahead, pace)``: (tiles x K) times (K x NR), K = blocks * LANES, into ``c``.

    ``a``: one float32 matrix per LANES of K, (tiles, LANES) each, ``a_block`` bytes apart. ``b``: (K, NR) contiguous.
    ``c``: (tiles, NR) contiguous. Each value is a sum of chains of CHAIN fused multiply-adds,
    over K in ascending order. Meanwhile ``pace`` bytes per k are fetched from ``ahead`` into L2.
    """

    def emit(
        x: Code, a: ir.Value, a_block: ir.Value, b: ir.Value, blocks: ir.Value, c: ir.Value, ahead: ir.Value,
        pace: ir.Value,
    ) -> None:  # fmt: skip
        sums = x.locals(tiles * 2)

        def chain(index: ir.Value) -> None:
            first = x.b.mul(index, x.i(CHAIN // LANES))
            left, right = x.at(a, x.b.mul(first, a_block)), x.at(b, x.b.mul(first, x.i(LANES * NR * 4)))
            for slot in sums:
                x.b.store(x.const(0.0), slot)

            def block(index: ir.Value) -> None:
                distant = x.at(ahead, x.b.mul(x.b.mul(x.b.add(first, index), x.i(LANES)), pace))
                corner, panel = x.at(left, x.b.mul(index, a_block)), x.at(right, x.b.mul(index, x.i(LANES * NR * 4)))

                def step(k: ir.Value) -> None:
                    row, column = x.at(panel, x.b.mul(k, x.i(NR * 4))), x.at(corner, x.b.mul(k, x.i(4)))
                    vectors = [x.load(x.at(row, w * VECTOR_BYTES)) for w in range(2)]
                    x.prefetch(x.at(distant, x.b.mul(k, pace)))
                    for t in range(tiles):
                        scalar = x.splat(x.load(x.at(column, t * VECTOR_BYTES), F32))
                        for w in range(2):
                            slot = sums[2 * t + w]
                            x.b.store(x.fma(scalar, vectors[w], x.b.load(slot)), slot)

                x.loop(x.i(LANES), step)

            rest = x.b.sub(blocks, first)
            whole = x.i(CHAIN // LANES)
            x.loop(x.b.select(x.b.icmp_signed("<", rest, whole), rest, whole), block)
            with x.b.if_else(x.b.icmp_signed("==", index, x.i(0))) as (start, later):
                with start:
                    for k, slot in enumerate(sums):
                        x.store(x.b.load(slot), x.at(c, k * VECTOR_BYTES))
                with later:
                    for k, slot in enumerate(sums):
                        where = x.at(c, k * VECTOR_BYTES)
                        x.store(x.b.fadd(x.load(where), x.b.load(slot)), where)

        x.loop(x.b.sdiv(x.b.add(blocks, x.i(CHAIN // LANES - 1)), x.i(CHAIN // LANES)), chain)

    return vector_function(f"fluxvae_products_{tiles}", 7, emit)


products_3, products_2, products_1 = _products(TILES), _products(2 * THIRD), _products(THIRD)


# -- the transforms ------------------------------------------------------------------------------------------------


def _input_transform(bt: Matrix, pixels: Sequence[int]) -> Any:
    """``input_transform(src, row, column, dst, position, block, blocks)``: one tile, all its channels.

    Reads pixels, ``row`` and ``column`` bytes apart, of blocks * LANES channels, in both directions the ones that
    ``pixels`` lists (one entry per input of the tile); writes BT d B, position (i, j) at dst + (n i + j) * position, a
    block of LANES channels every ``block`` bytes.
    """
    n, read = len(bt), max(pixels) + 1

    def emit(
        x: Code, src: ir.Value, row: ir.Value, column: ir.Value, dst: ir.Value, position: ir.Value, block: ir.Value,
        blocks: ir.Value,
    ) -> None:  # fmt: skip
        half = x.array(n * read)
        rows = [x.b.mul(row, x.i(i)) for i in range(read)]
        positions = [x.b.mul(position, x.i(j)) for j in range(n)]

        def transform(values: list[ir.Value]) -> list[ir.Value]:
            return x.rows_in_pairs(bt, [values[k] for k in pixels])

        def channels(index: ir.Value) -> None:
            source = x.at(src, x.b.mul(index, x.i(VECTOR_BYTES)))
            target = x.at(dst, x.b.mul(index, block))

            def columns(j: ir.Value) -> None:
                top = x.at(source, x.b.mul(j, column))
                for i, value in enumerate(transform([x.load(x.at(top, rows[i])) for i in range(read)])):
                    x.b.store(value, x.b.gep(half, [x.b.add(j, x.i(read * i))]))

            def across(i: ir.Value) -> None:
                first = x.b.mul(i, x.i(read))
                left = x.at(target, x.b.mul(x.b.mul(i, x.i(n)), position))
                values = [x.b.load(x.b.gep(half, [x.b.add(first, x.i(j))])) for j in range(read)]
                for j, value in enumerate(transform(values)):
                    x.store(value, x.at(left, positions[j]))

            x.loop(x.i(read), columns)
            x.loop(x.i(n), across)

        x.loop(blocks, channels)

    return vector_function(f"fluxvae_input_transform_{read}", 7, emit)


def _output_transform(at: Matrix, residual: bool) -> Any:
    """``output_transform(src, position, panel, dst, row, column, rows, columns, extra, terms, terms_step, vectors)``.

    One tile, ``vectors`` * LANES channels: y = (AT m A + residual) * factor + bias, and its statistics.

    ``src``: position (i, j) at src + (n i + j) * position, two vectors side by side, then ``panel`` bytes on.
    ``dst``: pixels ``row`` and ``column`` bytes apart, of which the first ``rows`` x ``columns`` are written.
    ``extra``: the residual, laid out as ``dst`` (its address minus dst's; unused without one).
    ``terms``: five float32 rows ``terms_step`` bytes apart: factor, bias, and, updated, shift, sum of (y - shift) and
    sum of (y - shift)**2.
    """
    m, n = len(at), len(at[0])

    def emit(
        x: Code, src: ir.Value, position: ir.Value, panel: ir.Value, dst: ir.Value, row: ir.Value, column: ir.Value,
        rows: ir.Value, columns: ir.Value, extra: ir.Value, terms: ir.Value, terms_step: ir.Value, vectors: ir.Value,
    ) -> None:  # fmt: skip
        half = x.array(m * n)
        positions = [x.b.mul(position, x.i(n * i)) for i in range(n)]
        total, squares = x.locals(2)
        terms_at = [x.b.mul(terms_step, x.i(k)) for k in range(5)]

        def channels(index: ir.Value) -> None:
            pair, odd = x.b.lshr(index, x.i(1)), x.b.and_(index, x.i(1))
            source = x.at(src, x.b.mul(pair, panel), x.b.mul(odd, x.i(VECTOR_BYTES)))
            offset = x.b.mul(index, x.i(VECTOR_BYTES))
            target, own = x.at(dst, offset), x.at(terms, offset)
            factor, bias, shift = (x.load(x.at(own, terms_at[k])) for k in range(3))
            x.b.store(x.load(x.at(own, terms_at[3])), total)
            x.b.store(x.load(x.at(own, terms_at[4])), squares)

            def down(j: ir.Value) -> None:
                top = x.at(source, x.b.mul(j, position))
                values = [x.load(x.at(top, positions[i])) for i in range(n)]
                for i, value in enumerate(x.columns_in_pairs(at, values)):
                    x.b.store(value, x.b.gep(half, [x.b.add(j, x.i(n * i))]))

            def across(i: ir.Value) -> None:
                first = x.b.mul(i, x.i(n))
                values = [x.b.load(x.b.gep(half, [x.b.add(first, x.i(j))])) for j in range(n)]
                pixel = x.at(target, x.b.mul(i, row))
                for j, value in enumerate(x.columns_in_pairs(at, values)):
                    with x.b.if_then(x.b.icmp_signed("<", x.i(j), columns), likely=True):
                        if residual:
                            value = x.b.fadd(value, x.load(x.at(pixel, extra)))
                        value = x.fma(value, factor, bias)
                        x.store(value, pixel)
                        apart = x.b.fsub(value, shift)
                        x.b.store(x.b.fadd(x.b.load(total), apart), total)
                        x.b.store(x.fma(apart, apart, x.b.load(squares)), squares)
                    pixel = x.at(pixel, column)

            x.loop(x.i(n), down)
            x.loop(rows, across)
            x.store(x.b.load(total), x.at(own, terms_at[3]))
            x.store(x.b.load(squares), x.at(own, terms_at[4]))

        x.loop(vectors, channels)

    return vector_function(f"fluxvae_output_transform_{m}_{residual:d}", 12, emit)


def _kernel_transform(g: Matrix) -> Any:
    """``kernel_transform(src, kernel, row, column, dst, position)``: LANES kernels, G g GT, in float64, rounded once.

    ``src``: tap (i, j) of kernel k at src + k * kernel + i * row + j * column; ``dst``: position p at
    dst + p * position, the kernels side by side.
    """
    n = len(g)

    def emit(
        x: Code, src: ir.Value, kernel: ir.Value, row: ir.Value, column: ir.Value, dst: ir.Value, position: ir.Value
    ) -> None:
        half = x.array(n * 3, WIDE)

        def down(j: ir.Value) -> None:
            top = x.at(src, x.b.mul(j, column))
            taps = [x.at(top, x.b.mul(row, x.i(i))) for i in range(3)]
            values = [x.b.fpext(x.gather(tap, kernel), WIDE) for tap in taps]
            for i, coefficients in enumerate(g):
                x.b.store(x.combine(coefficients, values), x.b.gep(half, [x.b.add(j, x.i(3 * i))]))

        def across(i: ir.Value) -> None:
            first = x.b.mul(i, x.i(3))
            values = [x.b.load(x.b.gep(half, [x.b.add(first, x.i(j))])) for j in range(3)]
            target = x.at(dst, x.b.mul(x.b.mul(i, x.i(n)), position))
            for coefficients in g:
                x.store(x.b.fptrunc(x.combine(coefficients, values), VECTOR), target)
                target = x.at(target, position)

        x.loop(x.i(3), down)
        x.loop(x.i(n), across)

    return vector_function(f"fluxvae_kernel_transform_{n}", 6, emit)


_F63 = toom_cook(6, 3)
input_transform = _input_transform(_F63.bt, PIXELS)
input_transform_up = _input_transform(_F63.bt, PIXELS_UP)
output_transform = _output_transform(_F63.at, residual=False)
output_transform_residual = _output_transform(_F63.at, residual=True)
kernel_transform = _kernel_transform(_F63.g)
_F43 = toom_cook(4, 3, PRECISE_POINTS)
input_transform_precise = _input_transform(_F43.bt, range(6))
output_transform_precise = _output_transform(_F43.at, residual=False)
output_transform_precise_residual = _output_transform(_F43.at, residual=True)
kernel_transform_precise = _kernel_transform(_F43.g)
_HALVING = halving(3)
input_transform_down = _input_transform(_HALVING.bt, range(7))
output_transform_down = _output_transform(_HALVING.at, residual=False)
kernel_transform_down = _kernel_transform(_HALVING.g)
