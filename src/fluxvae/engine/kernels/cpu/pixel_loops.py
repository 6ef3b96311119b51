"""The inner loops that go pixel by pixel: norms and SiLU, copies, and what goes around products, for Numba to call."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from fluxvae.engine.kernels.cpu.products import GROUP_BYTES, THIRD
from fluxvae.engine.kernels.cpu.vector_code import F32, VECTOR_BYTES, Code, vector_function

AHEAD = 2048
"""How many bytes ahead the pixels of `affine` are fetched. The map comes from memory, and without this the pass would
take half as long again."""


def _affine(silu: bool) -> Any:
    """``f(src, dst, scale, shift, pixels, vectors)``: y = x * scale + shift, then y / (1 + exp(-y)) if ``silu``."""

    def emit(
        x: Code, src: ir.Value, dst: ir.Value, scale: ir.Value, shift: ir.Value, pixels: ir.Value, vectors: ir.Value
    ) -> None:
        size = x.b.mul(vectors, x.i(VECTOR_BYTES))

        def pixel(index: ir.Value) -> None:
            start = x.b.mul(index, size)

            def channels(vector: ir.Value) -> None:
                offset = x.b.mul(vector, x.i(VECTOR_BYTES))
                where = x.b.add(start, offset)
                x.prefetch(x.at(src, where, AHEAD))
                x.prefetch(x.at(dst, where, AHEAD), write=True)
                y = x.fma(x.load(x.at(src, where)), x.load(x.at(scale, offset)), x.load(x.at(shift, offset)))
                x.store(x.silu(y) if silu else y, x.at(dst, where))

            x.loop(vectors, channels)

        x.loop(pixels, pixel)

    return vector_function(f"fluxvae_affine_{silu:d}", 6, emit)


affine, affine_silu = _affine(False), _affine(True)


def _by_pixel(silu: bool) -> Any:
    """``f(src, dst, scale, shift, pixels, vectors, least)``: y = x / length * scale + shift, then SiLU if ``silu``.

    ``length``: of the pixel's channels, or the float32 at ``least``, whichever is larger.
    """

    def emit(
        x: Code, src: ir.Value, dst: ir.Value, scale: ir.Value, shift: ir.Value, pixels: ir.Value, vectors: ir.Value,
        least: ir.Value,
    ) -> None:  # fmt: skip
        size, shortest = x.b.mul(vectors, x.i(VECTOR_BYTES)), x.splat(x.load(least, F32))
        squares = x.locals(1)[0]

        def pixel(index: ir.Value) -> None:
            start = x.b.mul(index, size)
            x.b.store(x.const(0.0), squares)

            def square(vector: ir.Value) -> None:
                where = x.b.add(start, x.b.mul(vector, x.i(VECTOR_BYTES)))
                x.prefetch(x.at(src, where, AHEAD))
                value = x.load(x.at(src, where))
                x.b.store(x.fma(value, value, x.b.load(squares)), squares)

            x.loop(vectors, square)
            length = x.intrinsic("llvm.sqrt", x.splat(x.added(x.b.load(squares))))
            length = x.b.select(x.b.fcmp_ordered(">", length, shortest), length, shortest)
            factor = x.b.fdiv(x.const(1.0), length)

            def channels(vector: ir.Value) -> None:
                offset = x.b.mul(vector, x.i(VECTOR_BYTES))
                where = x.b.add(start, offset)
                x.prefetch(x.at(dst, where, AHEAD), write=True)
                value = x.b.fmul(x.load(x.at(src, where)), factor)
                y = x.fma(value, x.load(x.at(scale, offset)), x.load(x.at(shift, offset)))
                x.store(x.silu(y) if silu else y, x.at(dst, where))

            x.loop(vectors, channels)

        x.loop(pixels, pixel)

    return vector_function(f"fluxvae_by_pixel_{silu:d}", 7, emit)


by_pixel, by_pixel_silu = _by_pixel(False), _by_pixel(True)


def _copy() -> Any:
    """``copy(src, dst, vectors)``: copy so many vectors, or write zeros where ``src`` is 0."""

    def emit(x: Code, src: ir.Value, dst: ir.Value, vectors: ir.Value) -> None:
        def one(index: ir.Value) -> None:
            offset = x.b.mul(index, x.i(VECTOR_BYTES))
            value = x.locals(1)[0]
            x.b.store(x.const(0.0), value)
            with x.b.if_then(x.b.icmp_signed("!=", src, x.i(0)), likely=True):
                x.b.store(x.load(x.at(src, offset)), value)
            x.store(x.b.load(value), x.at(dst, offset))

        x.loop(vectors, one)

    return vector_function("fluxvae_copy", 3, emit)


copy = _copy()


def _let_in(affine: bool) -> Any:
    """``f(src, stride, dst, scale, shift, pixels, vectors)``: pixels ``stride`` bytes apart into contiguous ones.

    y = silu(x * scale + shift), by the very operations of `affine_silu`; or y = x, where ``scale`` is not looked at.
    """

    def emit(
        x: Code, src: ir.Value, stride: ir.Value, dst: ir.Value, scale: ir.Value, shift: ir.Value, pixels: ir.Value,
        vectors: ir.Value,
    ) -> None:  # fmt: skip
        size, ahead = x.b.mul(vectors, x.i(VECTOR_BYTES)), x.b.mul(stride, x.i(PIXELS_AHEAD))

        def pixel(index: ir.Value) -> None:
            source, target = x.at(src, x.b.mul(index, stride)), x.at(dst, x.b.mul(index, size))

            def channels(vector: ir.Value) -> None:
                offset = x.b.mul(vector, x.i(VECTOR_BYTES))
                where = x.at(source, offset)
                x.prefetch(x.at(where, ahead))
                value = x.load(where)
                if affine:
                    value = x.silu(x.fma(value, x.load(x.at(scale, offset)), x.load(x.at(shift, offset))))
                x.store(value, x.at(target, offset))

            x.loop(vectors, channels)

        x.loop(pixels, pixel)

    return vector_function(f"fluxvae_let_in_{affine:d}", 7, emit)


PIXELS_AHEAD = 8
"""How many pixels ahead those of `let_in` are fetched."""
let_in, let_in_as_it_is = _let_in(True), _let_in(False)


def _gather_tiles() -> Any:
    """``gather_tiles(src, row, dst, group, rows, blocks)``: rows of blocks * LANES values as `products` wants them.

    ``row`` bytes apart in ``src``; in ``dst`` groups of THIRD rows, ``group`` bytes apart.
    """

    def emit(
        x: Code, src: ir.Value, row: ir.Value, dst: ir.Value, group: ir.Value, rows: ir.Value, blocks: ir.Value
    ) -> None:
        def one(index: ir.Value) -> None:
            source = x.at(src, x.b.mul(index, row))
            which, place = x.b.sdiv(index, x.i(THIRD)), x.b.srem(index, x.i(THIRD))
            target = x.at(dst, x.b.mul(which, group), x.b.mul(place, x.i(VECTOR_BYTES)))

            def channels(k: ir.Value) -> None:
                value = x.load(x.at(source, x.b.mul(k, x.i(VECTOR_BYTES))))
                x.store(value, x.at(target, x.b.mul(k, x.i(GROUP_BYTES))))

            x.loop(blocks, channels)

        x.loop(rows, one)

    return vector_function("fluxvae_gather_tiles", 6, emit)


def _add_bias() -> Any:
    """``add_bias(src, panel, dst, bias, vectors)``: a row of `products`, panels ``panel`` bytes apart, plus a bias."""

    def emit(x: Code, src: ir.Value, panel: ir.Value, dst: ir.Value, bias: ir.Value, vectors: ir.Value) -> None:
        def channels(index: ir.Value) -> None:
            pair, odd = x.b.lshr(index, x.i(1)), x.b.and_(index, x.i(1))
            offset = x.b.mul(index, x.i(VECTOR_BYTES))
            value = x.load(x.at(src, x.b.mul(pair, panel), x.b.mul(odd, x.i(VECTOR_BYTES))))
            x.store(x.b.fadd(value, x.load(x.at(bias, offset))), x.at(dst, offset))

        x.loop(vectors, channels)

    return vector_function("fluxvae_add_bias", 5, emit)


gather_tiles, add_bias = _gather_tiles(), _add_bias()
