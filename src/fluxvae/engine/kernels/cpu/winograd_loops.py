"""The inner loops that transform the tiles and weights of Winograd's convolution, for Numba code to call.

Every output value is one chain of operations in a fixed order: the same bits for any cut into tiles, tasks and threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from fluxvae.engine.kernels.cpu.amx import REGISTER
from fluxvae.engine.kernels.cpu.products import GROUP_BYTES, NR, THIRD
from fluxvae.engine.kernels.cpu.vector_code import (
    AMX,
    F64,
    I64,
    VECTOR,
    VECTOR_BYTES,
    WIDE,
    Code,
    vector_function,
)
from fluxvae.engine.kernels.cpu.winograd_matrices import PRECISE_POINTS, halving, toom_cook

Matrix = Sequence[Sequence[Fraction]]

PIXELS = (0, 1, 2, 3, 4, 5, 6, 7)
PIXELS_UP = (0, 1, 1, 2, 2, 3, 3, 4)
"""Which pixels of the small map the inputs of a tile of the enlarged map are, so that the large map need not exist. A
tile begins one pixel before an even position, so its first input is the second one of a pair of equal pixels."""


def _input_transform(bt: Matrix, pixels: Sequence[int], reach: int) -> Any:
    """``input_transform(table, tiles, dst, position, blocks, past)``: at most THIRD tiles, all their channels.

    ``table``: three int64 for each tile: the address of its first pixel, and how many bytes its pixels lie apart, down
    and across. Reads pixels of blocks * LANES channels, in both directions the ones that ``pixels`` lists (one entry
    per input of the tile); writes BT d B, position (i, j) at dst + (n i + j) * position, laid out as a group of
    `products`.

    ``past``: whether they are written past the caches (`Code.stream`), 0 or not.

    The tiles of a group go through each step together, so that what lies side by side is written together. The pixels
    of the next group, which begins THIRD * ``reach`` pixels further right, are fetched meanwhile.
    """
    n, read = len(bt), max(pixels) + 1

    def emit(
        x: Code, table: ir.Value, tiles: ir.Value, dst: ir.Value, position: ir.Value, blocks: ir.Value, past: ir.Value
    ) -> None:
        half = x.array(THIRD * n * read)
        positions = [x.b.mul(position, x.i(j)) for j in range(n)]

        def transform(values: list[ir.Value]) -> list[ir.Value]:
            return x.rows_in_pairs(bt, [values[k] for k in pixels])

        def channels(index: ir.Value) -> None:
            target = x.at(dst, x.b.mul(index, x.i(GROUP_BYTES)))

            def down(t: ir.Value) -> None:
                src, row, column = (x.load(x.at(table, x.b.mul(t, x.i(24)), 8 * k), I64) for k in range(3))
                source = x.at(src, x.b.mul(index, x.i(VECTOR_BYTES)))
                rows = [x.b.mul(row, x.i(i)) for i in range(read)]
                own = x.b.mul(t, x.i(n * read))
                next_group = x.b.mul(column, x.i(THIRD * reach))

                def columns(j: ir.Value) -> None:
                    top = x.at(source, x.b.mul(j, column))
                    values = []
                    for i in range(read):
                        values.append(x.load(x.at(top, rows[i])))
                        x.prefetch(x.at(top, rows[i], next_group))
                    for i, value in enumerate(transform(values)):
                        x.b.store(value, x.b.gep(half, [x.b.add(own, x.b.add(j, x.i(read * i)))]))

                x.loop(x.i(read), columns)

            def across(stored: Callable[[ir.Value, ir.Value], None]) -> Callable[[ir.Value], None]:
                def row(i: ir.Value) -> None:
                    left = x.at(target, x.b.mul(x.b.mul(i, x.i(n)), position))

                    def tile(t: ir.Value) -> None:
                        first = x.b.add(x.b.mul(t, x.i(n * read)), x.b.mul(i, x.i(read)))
                        values = [x.b.load(x.b.gep(half, [x.b.add(first, x.i(j))])) for j in range(read)]
                        own = x.at(left, x.b.mul(t, x.i(VECTOR_BYTES)))
                        for j, value in enumerate(transform(values)):
                            stored(value, x.at(own, positions[j]))

                    x.loop(tiles, tile)

                return row

            def cached(value: ir.Value, where: ir.Value) -> None:
                x.store(value, where)
                x.prefetch(x.at(where, GROUP_BYTES), write=True)

            x.loop(tiles, down)
            with x.b.if_else(x.b.icmp_signed("!=", past, x.i(0))) as (streamed, kept):
                with streamed:
                    x.loop(x.i(n), across(x.stream))
                with kept:
                    x.loop(x.i(n), across(cached))

        x.loop(blocks, channels)

    return vector_function(f"fluxvae_input_transform_{n}_{read}", 6, emit)


def _output_transform(at: Matrix, residual: bool) -> Any:
    """``f(places, offset, dst, row, column, rows, columns, extra, terms, terms_step, stats, shares, first, vectors)``.

    One tile, ``vectors`` * LANES channels, at most NR: y = (AT m A + residual) * factor + bias, and its statistics.

    ``places``: the addresses of the positions, int64, (i, j) at n i + j; ``offset`` is that of the tile in each.
    ``dst``: pixels ``row`` and ``column`` bytes apart, of which the first ``rows`` x ``columns`` are written.
    ``extra``: the residual, laid out as ``dst`` (its address minus dst's; unused without one).
    ``terms``: three float32 rows ``terms_step`` bytes apart: factor, bias, and a shift near the mean so far, which is
    updated; where ``first`` is not 0 the tile's first pixel is taken instead.
    ``stats``: two float64 rows of NR: the mean so far and the squared deviations so far, updated. ``shares``: three
    float64: 1 / pixels of this tile, their share of all so far, and that share times the pixels before.

    float32 sums around a nearby shift, joined in float64 (Chan, Golub and LeVeque 1979), lose nothing to cancellation:
    what a far shift costs a tile is small against what the distance itself adds to the squared deviations.
    """
    m, n = len(at), len(at[0])

    def emit(
        x: Code, places: ir.Value, offset: ir.Value, dst: ir.Value, row: ir.Value, column: ir.Value, rows: ir.Value,
        columns: ir.Value, extra: ir.Value, terms: ir.Value, terms_step: ir.Value, stats: ir.Value, shares: ir.Value,
        first: ir.Value, vectors: ir.Value,
    ) -> None:  # fmt: skip
        half = x.array(m * n)
        total, squares, shift = x.locals(3)
        terms_at = [x.b.mul(terms_step, x.i(k)) for k in range(3)]
        inverse, share, weight = (x.splat(x.load(x.at(shares, 8 * k), F64)) for k in range(3))
        fresh = x.b.icmp_signed("!=", first, x.i(0))

        def channels(index: ir.Value) -> None:
            side = x.b.mul(index, x.i(VECTOR_BYTES))
            inside = x.at(offset, side)
            target, own = x.at(dst, side), x.at(terms, side)
            factor, bias, before = (x.load(x.at(own, terms_at[k])) for k in range(3))
            x.b.store(before, shift)
            x.b.store(x.const(0.0), total)
            x.b.store(x.const(0.0), squares)

            def down(j: ir.Value) -> None:
                left = x.at(places, x.b.mul(j, x.i(8)))
                values = []
                for i in range(n):
                    where = x.at(x.load(x.at(left, 8 * n * i), I64), inside)
                    values.append(x.load(where))
                    x.prefetch(x.at(where, NR * 4))
                for i, value in enumerate(x.columns_in_pairs(at, values)):
                    x.b.store(value, x.b.gep(half, [x.b.add(j, x.i(n * i))]))

            def across(i: ir.Value) -> None:
                begin = x.b.mul(i, x.i(n))
                values = [x.b.load(x.b.gep(half, [x.b.add(begin, x.i(j))])) for j in range(n)]
                pixel = x.at(target, x.b.mul(i, row))
                for j, value in enumerate(x.columns_in_pairs(at, values)):
                    with x.b.if_then(x.b.icmp_signed("<", x.i(j), columns), likely=True):
                        if residual:
                            value = x.b.fadd(value, x.load(x.at(pixel, extra)))
                        value = x.fma(value, factor, bias)
                        x.stream(value, pixel)
                        if j == 0:
                            taken = x.b.and_(fresh, x.b.icmp_signed("==", i, x.i(0)))
                            x.b.store(x.b.select(taken, value, x.b.load(shift)), shift)
                        apart = x.b.fsub(value, x.b.load(shift))
                        x.b.store(x.b.fadd(x.b.load(total), apart), total)
                        x.b.store(x.fma(apart, apart, x.b.load(squares)), squares)
                    pixel = x.at(pixel, column)

            x.loop(x.i(n), down)
            x.loop(rows, across)
            means = x.at(stats, x.b.mul(index, x.i(2 * VECTOR_BYTES)))
            m2s = x.at(means, NR * 8)
            mean, m2 = x.load(means, WIDE), x.load(m2s, WIDE)
            sums, of_squares = x.b.fpext(x.b.load(total), WIDE), x.b.fpext(x.b.load(squares), WIDE)
            mine = x.b.fmul(sums, inverse)
            apart = x.b.fsub(x.b.fadd(x.b.fpext(x.b.load(shift), WIDE), mine), mean)
            own_m2 = x.b.fsub(of_squares, x.b.fmul(sums, mine))
            own_m2 = x.b.select(x.b.fcmp_unordered("<", own_m2, x.const(0.0, WIDE)), x.const(0.0, WIDE), own_m2)
            mean = x.fma(apart, share, mean)
            m2 = x.b.fadd(m2, x.fma(x.b.fmul(apart, apart), weight, own_m2))
            x.store(mean, means)
            x.store(m2, m2s)
            x.store(x.b.fptrunc(mean, VECTOR), x.at(own, terms_at[2]))

        x.loop(vectors, channels)

    return vector_function(f"fluxvae_output_transform_{m}_{residual:d}", 14, emit)


def _kernel_transform(g: Matrix) -> Any:
    """``kernel_transform(src, second, kernel, row, column, dst, position)``: LANES kernels, G g GT, in float64.

    ``src``: tap (i, j) of kernel k at src + k * kernel + i * row + j * column; ``dst``: position p at
    dst + p * position, the kernels side by side, rounded to float32 once.

    For AMX also those of another input channel, ``second`` bytes further (zeros where that is 0): pairs of the two, in
    parts, as `amx.split_weights` writes them.
    """
    n, both = len(g), 2 if AMX else 1

    def emit(
        x: Code, src: ir.Value, second: ir.Value, kernel: ir.Value, row: ir.Value, column: ir.Value, dst: ir.Value,
        position: ir.Value,
    ) -> None:  # fmt: skip
        half = x.array(both * n * 3, WIDE)

        def down(j: ir.Value) -> None:
            for k in range(both):
                top = x.at(src, x.b.mul(j, column), *[second] * k)
                taps = [x.at(top, x.b.mul(row, x.i(i))) for i in range(3)]
                values = [x.b.fpext(x.gather(tap, kernel), WIDE) for tap in taps]
                for i, coefficients in enumerate(g):
                    x.b.store(x.combine(coefficients, values), x.b.gep(half, [x.b.add(j, x.i(3 * (k * n + i)))]))

        def across(i: ir.Value) -> None:
            target = x.at(dst, x.b.mul(x.b.mul(i, x.i(n)), position))
            values = [
                [x.b.load(x.b.gep(half, [x.b.add(x.b.mul(i, x.i(3)), x.i(3 * k * n + j))])) for j in range(3)]
                for k in range(both)
            ]
            for coefficients in g:
                made = [x.b.fptrunc(x.combine(coefficients, own), VECTOR) for own in values]
                if AMX:
                    made[1] = x.b.select(x.b.icmp_signed("!=", second, x.i(0)), made[1], x.const(0.0))
                    made = x.parts(*made)
                for k, value in enumerate(made):
                    x.stream(value, x.at(target, k * REGISTER))
                target = x.at(target, position)

        x.loop(x.i(3), down)
        x.loop(x.i(n), across)

    return vector_function(f"fluxvae_kernel_transform_{n}", 7, emit)


_F63 = toom_cook(6, 3)
input_transform = _input_transform(_F63.bt, PIXELS, 6)
input_transform_up = _input_transform(_F63.bt, PIXELS_UP, 3)
output_transform = _output_transform(_F63.at, residual=False)
output_transform_residual = _output_transform(_F63.at, residual=True)
kernel_transform = _kernel_transform(_F63.g)
_F43 = toom_cook(4, 3, PRECISE_POINTS)
input_transform_precise = _input_transform(_F43.bt, range(6), 4)
output_transform_precise = _output_transform(_F43.at, residual=False)
output_transform_precise_residual = _output_transform(_F43.at, residual=True)
kernel_transform_precise = _kernel_transform(_F43.g)
_HALVING = halving(3)
input_transform_down = _input_transform(_HALVING.bt, range(7), 6)
output_transform_down = _output_transform(_HALVING.at, residual=False)
kernel_transform_down = _kernel_transform(_HALVING.g)
