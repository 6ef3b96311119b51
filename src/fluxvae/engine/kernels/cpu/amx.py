"""The inner loops of products on processors with AMX, whose tiles of registers multiply bfloat16, for Numba to call.

A float32 has 24 significant bits and a bfloat16 has 8, so every float32 is exactly the sum of three bfloat16: a high, a
middle and a low part (`Code.parts`). Of the nine products of two numbers' parts the six largest are computed; those
that are left out are less than 2**-25 of the whole, half of what float32 itself rounds. AMX adds up in float32. It
multiplies bfloat16 sixteen times as fast as AVX-512 multiplies float32, so the six take three eighths of the time.

The five smaller products of all channels are added up first, while the sums are small, and then the largest: rounding
is then about as seldom as where chains of sixteen are added up. K = 512 of normally distributed values has a relative
error of 8e-8, where `products` has 1.3e-7.

Every output value is one chain of operations in a fixed order, whatever block it is computed in: the same bits for any
cut into tiles, tasks and threads. They are not the bits that `products` gives.

Source: Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3 (TDPBF16PS).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from fluxvae.engine.kernels.cpu.products import NR, THIRD
from fluxvae.engine.kernels.cpu.vector_code import I64, LINE, VECTOR, VECTOR_BYTES, Code, vector_function

__all__ = [
    "CHUNK",
    "CHUNK_BYTES",
    "REGISTER",
    "ROWS",
    "multiply_16",
    "multiply_32",
    "release_registers",
    "shape_registers",
    "split_rows",
    "split_weights",
]

ROWS = 16
"""How many rows a register has."""
CHUNK = 32
"""How many channels one register of tiles has. A pair of bfloat16 that is multiplied together are channels c and c + 16
of a chunk, so that two vectors of float32 become one of pairs without shuffling."""
REGISTER = ROWS * LINE
"""The bytes of one register."""
CHUNK_BYTES = 3 * REGISTER
"""The bytes of the three parts of 16 tiles, or of 16 output channels' weights, for one chunk."""
HIGH, MIDDLE, LOW = 0, 1, 2


class _Registers:
    """The eight registers, by AMX's instructions."""

    def __init__(self, code: Code) -> None:
        self.x = code

    def _call(self, name: str, *arguments: ir.Value) -> None:
        module = self.x.function.module
        full = f"llvm.x86.{name}"
        function = module.globals.get(full)
        if function is None:
            kinds = [argument.type for argument in arguments]
            function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), full)
        self.x.b.call(function, arguments)

    def _pointer(self, address: ir.Value) -> ir.Value:
        return self.x.b.inttoptr(address, ir.IntType(8).as_pointer())

    def _number(self, register: int) -> ir.Constant:
        return ir.Constant(ir.IntType(8), register)

    def shape(self, address: ir.Value) -> None:
        self._call("ldtilecfg", self._pointer(address))

    def release(self) -> None:
        self._call("tilerelease")

    def zero(self, register: int) -> None:
        self._call("tilezero", self._number(register))

    def load(self, register: int, address: ir.Value) -> None:
        """Load rows that lie one cache line after the other."""
        self._call("tileloadd64", self._number(register), self._pointer(address), self.x.i(LINE))

    def store(self, register: int, address: ir.Value) -> None:
        """Store rows that lie as far apart as those of a panel of NR products."""
        self._call("tilestored64", self._number(register), self._pointer(address), self.x.i(NR * 4))

    def multiply(self, sums: int, left: int, right: int) -> None:
        self._call("tdpbf16ps", *(self._number(register) for register in (sums, left, right)))


def _shape_registers() -> Any:
    """``shape_registers(first, second)``: get ready for `multiply_32` of 16 and ``second`` tiles, or `multiply_16`.

    ``first`` and ``second``: how many rows, 1 to 16, the registers of the first and of the second 16 tiles have.
    """

    def emit(x: Code, first: ir.Value, second: ir.Value) -> None:
        byte, short = ir.IntType(8), ir.IntType(16)
        where = x.b.ptrtoint(x.array(1), I64)
        x.b.store(x.const(0.0), x.b.inttoptr(where, VECTOR.as_pointer()))
        x.store(ir.Constant(byte, 1), where)  # the palette: there is one
        for register in range(8):
            rows = (first, first, second, second, first, second, x.i(ROWS), x.i(ROWS))[register]
            x.store(ir.Constant(short, LINE), x.at(where, 16 + 2 * register))
            x.store(x.b.trunc(rows, byte), x.at(where, 48 + register))
        _Registers(x).shape(where)

    return vector_function("fluxvae_amx_shape_registers", 2, emit)


def _release_registers() -> Any:
    """``release_registers()``: after the last product, or the system would save 8 kB at every change of threads."""
    return vector_function("fluxvae_amx_release_registers", 0, lambda x: _Registers(x).release())


def _multiply(halves: int) -> Any:
    """``f(a, half, b, chunks, c, ahead, lines)``: up to 16 * halves tiles, K channels, by NR output channels, to ``c``.

    ``a``: the parts of 16 tiles as `split_rows` writes them; those of the next 16 are ``half`` bytes further. ``b``:
    those of the weights of NR output channels, as `split_weights` writes them. ``c``: (tiles, NR) float32 contiguous.
    Meanwhile ``lines`` cache lines for each chunk are fetched from ``ahead`` into L2.
    """
    pairs = [(half, w) for half in range(halves) for w in range(2)]

    def emit(
        x: Code, a: ir.Value, half: ir.Value, b: ir.Value, chunks: ir.Value, c: ir.Value, ahead: ir.Value,
        lines: ir.Value,
    ) -> None:  # fmt: skip
        registers = _Registers(x)
        for k in range(4):
            registers.zero(k)

        def tiles(left: ir.Value, part: int) -> None:
            for k in range(halves):
                registers.load(4 + k, x.at(left, x.b.mul(half, x.i(k)), part * REGISTER))

        def weights(right: ir.Value, part: int) -> None:
            for w in range(2):
                registers.load(6 + w, x.at(right, w * CHUNK_BYTES, part * REGISTER))

        def multiply() -> None:
            for k, w in pairs:
                registers.multiply(2 * k + w, 4 + k, 6 + w)

        def smaller(index: ir.Value) -> None:
            left, right = x.at(a, x.b.mul(index, x.i(CHUNK_BYTES))), x.at(b, x.b.mul(index, x.i(2 * CHUNK_BYTES)))
            # In an order in which every product but the first needs one new operand.
            tiles(left, HIGH)
            weights(right, LOW)
            multiply()
            weights(right, MIDDLE)
            multiply()
            tiles(left, MIDDLE)
            multiply()
            weights(right, HIGH)
            multiply()
            tiles(left, LOW)
            multiply()
            distant = x.at(ahead, x.b.mul(x.b.mul(index, lines), x.i(LINE)))
            x.loop(lines, lambda line: x.prefetch(x.at(distant, x.b.mul(line, x.i(LINE)))))

        def largest(index: ir.Value) -> None:
            tiles(x.at(a, x.b.mul(index, x.i(CHUNK_BYTES))), HIGH)
            weights(x.at(b, x.b.mul(index, x.i(2 * CHUNK_BYTES))), HIGH)
            multiply()

        x.loop(chunks, smaller)
        x.loop(chunks, largest)
        for k, w in pairs:
            registers.store(2 * k + w, x.at(c, k * ROWS * NR * 4 + w * VECTOR_BYTES))

    return vector_function(f"fluxvae_amx_multiply_{ROWS * halves}", 7, emit)


def _split_rows() -> Any:
    """``split_rows(src, group, row, block, rows, blocks, dst)``: rows of blocks * LANES values into parts.

    ``src``: groups of THIRD rows ``group`` bytes apart, the rows of a group ``row`` bytes apart, and their vectors
    ``block`` bytes apart. ``dst``: for every 16 rows, for every chunk, the three parts, each of 16 cache lines. Where
    the last chunk has 16 channels, the rest of it is zero. What follows the last row is not written.
    """

    def emit(
        x: Code, src: ir.Value, group: ir.Value, row: ir.Value, block: ir.Value, rows: ir.Value, blocks: ir.Value,
        dst: ir.Value,
    ) -> None:  # fmt: skip
        chunks = x.b.sdiv(x.b.add(blocks, x.i(1)), x.i(2))

        def split(first: ir.Value, count: int) -> None:
            which, place = x.b.sdiv(first, x.i(THIRD)), x.b.srem(first, x.i(THIRD))
            source = x.at(src, x.b.mul(which, group), x.b.mul(place, row))
            sixteen, line = x.b.sdiv(first, x.i(ROWS)), x.b.srem(first, x.i(ROWS))
            target = x.at(dst, x.b.mul(sixteen, x.b.mul(chunks, x.i(CHUNK_BYTES))), x.b.mul(line, x.i(LINE)))

            def chunk(k: ir.Value) -> None:
                left = x.at(source, x.b.mul(k, x.b.mul(block, x.i(2))))
                right = x.at(target, x.b.mul(k, x.i(CHUNK_BYTES)))
                there = x.b.icmp_signed("<", x.b.add(x.b.mul(k, x.i(2)), x.i(1)), blocks)
                far = x.b.select(there, block, x.i(0))
                for t in range(count):
                    where = x.at(left, x.b.mul(row, x.i(t)))
                    second = x.b.select(there, x.load(x.at(where, far)), x.const(0.0))
                    for part, value in enumerate(x.parts(x.load(where), second)):
                        x.store(value, x.at(right, part * REGISTER + t * LINE))

            x.loop(chunks, chunk)

        # A group at a time, because lines that lie side by side are written faster.
        groups, rest = x.b.sdiv(rows, x.i(THIRD)), x.b.srem(rows, x.i(THIRD))
        whole = x.b.sub(rows, rest)
        with x.b.if_then(x.b.icmp_signed(">", groups, x.i(0))):
            x.loop(groups, lambda index: split(x.b.mul(index, x.i(THIRD)), THIRD))
        with x.b.if_then(x.b.icmp_signed(">", rest, x.i(0))):
            x.loop(rest, lambda index: split(x.b.add(whole, index), 1))

    return vector_function("fluxvae_amx_split_rows", 7, emit)


def _split_weights() -> Any:
    """``split_weights(src, row, rows, dst)``: (rows, NR) float32, ``row`` bytes apart, as `multiply_32` takes weights.

    ``dst``: for every chunk of 32 rows, for the first and the second 16 columns, the three parts, each of 16 cache
    lines of pairs. What a last chunk lacks of rows is zero.
    """

    def emit(x: Code, src: ir.Value, row: ir.Value, rows: ir.Value, dst: ir.Value) -> None:
        def chunk(k: ir.Value) -> None:
            target = x.at(dst, x.b.mul(k, x.i(2 * CHUNK_BYTES)))

            def pair(c: ir.Value) -> None:
                first = x.b.add(x.b.mul(k, x.i(CHUNK)), c)
                line = x.at(target, x.b.mul(c, x.i(LINE)))
                for w in range(2):
                    values = []
                    for index in (first, x.b.add(first, x.i(ROWS))):
                        there = x.b.icmp_signed("<", index, rows)
                        where = x.at(src, x.b.select(there, x.b.mul(index, row), x.i(0)), w * VECTOR_BYTES)
                        values.append(x.b.select(there, x.load(where), x.const(0.0)))
                    for part, value in enumerate(x.parts(*values)):
                        x.store(value, x.at(line, w * CHUNK_BYTES + part * REGISTER))

            x.loop(x.i(ROWS), pair)

        x.loop(x.b.sdiv(x.b.add(rows, x.i(CHUNK - 1)), x.i(CHUNK)), chunk)

    return vector_function("fluxvae_amx_split_weights", 4, emit)


shape_registers, release_registers = _shape_registers(), _release_registers()
multiply_16, multiply_32 = _multiply(1), _multiply(2)
split_rows, split_weights = _split_rows(), _split_weights()
