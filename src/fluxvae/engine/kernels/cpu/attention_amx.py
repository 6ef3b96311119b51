"""The inner loops of attention that only `amx` needs, for Numba code to call."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from fluxvae.engine.kernels.cpu.amx import CHUNK, CHUNK_BYTES, REGISTER, ROWS
from fluxvae.engine.kernels.cpu.attention_loops import ROW
from fluxvae.engine.kernels.cpu.products import NR
from fluxvae.engine.kernels.cpu.vector_code import F32, LANES, LINE, VECTOR_BYTES, Code, vector_function

__all__ = ["add_to_sums", "finish_rows", "split_exponentials"]


def _split_exponentials() -> Any:
    """``split_exponentials(src, keys, half, dst)``: (keys, NR) float32, transposed, into the parts of NR tiles.

    ``dst``: for every chunk of 32 keys, the three parts of the first 16 queries, each of 16 cache lines; those of the
    other 16 are ``half`` bytes further. What the last chunk lacks of keys is zero.
    """

    def emit(x: Code, src: ir.Value, keys: ir.Value, half: ir.Value, dst: ir.Value) -> None:
        chunks = x.b.sdiv(x.b.add(keys, x.i(CHUNK - 1)), x.i(CHUNK))

        def chunk(k: ir.Value) -> None:
            for w in range(2):
                columns = []
                for side in range(2):
                    values = []
                    for lane in range(LANES):
                        index = x.b.add(x.b.mul(k, x.i(CHUNK)), x.i(side * ROWS + lane))
                        there = x.b.icmp_signed("<", index, keys)
                        where = x.at(src, x.b.select(there, x.b.mul(index, x.i(ROW)), x.i(0)), w * VECTOR_BYTES)
                        values.append(x.b.select(there, x.load(where), x.const(0.0)))
                    columns.append(x.transpose(values))
                target = x.at(dst, x.b.mul(half, x.i(w)), x.b.mul(k, x.i(CHUNK_BYTES)))
                for query, pair in enumerate(zip(*columns, strict=True)):
                    for part, value in enumerate(x.parts(*pair)):
                        x.store(value, x.at(target, part * REGISTER + query * LINE))

        x.loop(chunks, chunk)

    return vector_function("fluxvae_attention_split_exponentials", 4, emit)


def _add_to_sums() -> Any:
    """``add_to_sums(fresh, factors, sums, row)``: NR rows of NR sums, times a factor for each row, plus ``fresh``.

    ``fresh``: (NR, NR) contiguous; ``factors``: NR values; ``sums``: rows ``row`` bytes apart.
    """

    def emit(x: Code, fresh: ir.Value, factors: ir.Value, sums: ir.Value, row: ir.Value) -> None:
        def query(q: ir.Value) -> None:
            factor = x.splat(x.load(x.at(factors, x.b.mul(q, x.i(4))), F32))
            for w in range(2):
                own = x.at(fresh, x.b.mul(q, x.i(ROW)), w * VECTOR_BYTES)
                where = x.at(sums, x.b.mul(q, row), w * VECTOR_BYTES)
                x.store(x.fma(x.load(where), factor, x.load(own)), where)

        x.loop(x.i(NR), query)

    return vector_function("fluxvae_attention_add_to_sums", 4, emit)


def _finish_rows() -> Any:
    """``finish_rows(sums, state, vectors, dst)``: NR rows of vectors * LANES sums over the exponentials' sums."""

    def emit(x: Code, sums: ir.Value, state: ir.Value, vectors: ir.Value, dst: ir.Value) -> None:
        row = x.b.mul(vectors, x.i(VECTOR_BYTES))

        def query(q: ir.Value) -> None:
            total = x.splat(x.load(x.at(state, ROW, x.b.mul(q, x.i(4))), F32))
            source, target = x.at(sums, x.b.mul(q, row)), x.at(dst, x.b.mul(q, row))

            def channels(k: ir.Value) -> None:
                offset = x.b.mul(k, x.i(VECTOR_BYTES))
                x.store(x.b.fdiv(x.load(x.at(source, offset)), total), x.at(target, offset))

            x.loop(vectors, channels)

        x.loop(x.i(NR), query)

    return vector_function("fluxvae_attention_finish_rows", 4, emit)


split_exponentials, add_to_sums, finish_rows = _split_exponentials(), _add_to_sums(), _finish_rows()
