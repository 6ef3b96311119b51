"""The inner loop of all products, for Numba code to call: a few tiles by a few output channels, in registers.

Every output value is one chain of operations in a fixed order, whatever block it is computed in: the same bits for any
cut into tiles, tasks and threads.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from fluxvae.engine.kernels.cpu.vector_code import F32, LANES, REGISTERS, VECTOR_BYTES, Code, vector_function

__all__ = ["GROUP_BYTES", "NR", "THIRD", "TILES", "products_1", "products_2", "products_3"]

NR = 2 * LANES
"""How many output channels one register block of products has."""
CHAIN = 32
"""How many products are added one after the other before their sum joins the total. Rounding errors grow with the
square root of a chain's length, so short chains make K = 512 as accurate as K = 64."""
TILES = 12 if REGISTERS == 32 else 6
"""How many tiles one register block of products has. It takes 24 (or 12) registers for the sums and leaves the rest to
the operands. The end of a run takes one third or two thirds of a block."""
THIRD = TILES // 3
"""How many tiles the smallest block of products has, and a group of transformed tiles."""
GROUP_BYTES = THIRD * VECTOR_BYTES
"""The bytes of one group's tiles for LANES channels; those of the next channels follow."""


def _products(tiles: int) -> Any:
    """``products(a, group, b, blocks, c, ahead, pace)``: (tiles x K) times (K x NR), K = blocks * LANES, into ``c``.

    ``a``: groups of THIRD tiles, ``group`` bytes apart, each of them one float32 matrix (THIRD, LANES) after the other
    for every LANES of K. ``b``: (K, NR) contiguous. ``c``: (tiles, NR) contiguous. Each value is a sum of chains of
    CHAIN fused multiply-adds, over K in ascending order. Meanwhile ``pace`` bytes per k are fetched from ``ahead`` into
    L2.
    """

    def emit(
        x: Code, a: ir.Value, group: ir.Value, b: ir.Value, blocks: ir.Value, c: ir.Value, ahead: ir.Value,
        pace: ir.Value,
    ) -> None:  # fmt: skip
        sums = x.locals(tiles * 2)
        groups = [x.b.mul(group, x.i(g)) for g in range(tiles // THIRD)]

        def chain(index: ir.Value) -> None:
            first = x.b.mul(index, x.i(CHAIN // LANES))
            left, right = x.at(a, x.b.mul(first, x.i(GROUP_BYTES))), x.at(b, x.b.mul(first, x.i(LANES * NR * 4)))
            for slot in sums:
                x.b.store(x.const(0.0), slot)

            def block(index: ir.Value) -> None:
                distant = x.at(ahead, x.b.mul(x.b.mul(x.b.add(first, index), x.i(LANES)), pace))
                corner = x.at(left, x.b.mul(index, x.i(GROUP_BYTES)))
                panel = x.at(right, x.b.mul(index, x.i(LANES * NR * 4)))

                def step(k: ir.Value) -> None:
                    row, column = x.at(panel, x.b.mul(k, x.i(NR * 4))), x.at(corner, x.b.mul(k, x.i(4)))
                    vectors = [x.load(x.at(row, w * VECTOR_BYTES)) for w in range(2)]
                    x.prefetch(x.at(distant, x.b.mul(k, pace)))
                    for t in range(tiles):
                        where = x.at(column, groups[t // THIRD], t % THIRD * VECTOR_BYTES)
                        scalar = x.splat(x.load(where, F32))
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
