"""Explicit vector code for Numba: functions of addresses, in LLVM's vectors as wide as this machine's registers.

Numba's own loop vectoriser neither keeps a block of products in registers nor vectorises a transform that reads and
writes 64 streams. `vector_function` turns a Python function that writes LLVM code into one that compiled code calls;
its arguments are addresses and byte strides (int64). LLVM lowers the vectors for any processor; `supported` says where
that is worth while (a fused multiply-add in hardware).
"""

from __future__ import annotations

import math
import platform
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic

from fluxvae import system

__all__ = [
    "AMX",
    "F32",
    "F64",
    "HAS_AMX",
    "I64",
    "LANES",
    "REGISTERS",
    "VECTOR",
    "VECTOR_BYTES",
    "WIDE",
    "Code",
    "compiled",
    "supported",
    "vector_function",
]

Matrix = Sequence[Sequence[Fraction]]


def _has(feature: str) -> bool:
    """Whether compiled code may use this feature of the processor: it has it, and Numba was not told otherwise."""
    told: Any = config  # its attributes are made from the environment, so a type checker does not know them
    own = [one for one in (told.CPU_FEATURES or "").split(",") if one.strip()[1:] == feature]
    return not own[-1].strip().startswith("-") if own else bool(llvm.get_host_cpu_features().get(feature))


def _registers() -> tuple[int, int]:
    """(float32 lanes of a vector register, how many registers there are) that compiled code may use."""
    if _has("avx512f"):
        return 16, 32
    if _has("avx2") and _has("fma"):
        return 8, 16
    return 4, 32  # Arm's NEON; others are refused by `supported`


LANES, REGISTERS = _registers()
HAS_AMX = LANES == 16 and _has("amx-tile") and _has("amx-bf16")
"""Whether there is AMX, used or not."""
AMX = HAS_AMX and system.may_use_amx()
"""Whether products are computed by AMX (`cpu.amx`), in place of fused multiply-adds (`cpu.products`)."""

F32, F64 = ir.FloatType(), ir.DoubleType()
VECTOR = ir.VectorType(F32, LANES)
WIDE = ir.VectorType(F64, LANES)
VECTOR_I = ir.VectorType(ir.IntType(32), LANES)
I64 = ir.IntType(64)
I32 = ir.IntType(32)
VECTOR_BYTES = 4 * LANES
LINE = 64
"""The bytes of a cache line."""


def supported() -> str | None:
    """None where these kernels run well, else why they do not."""
    told: Any = config  # its attributes are made from the environment, so a type checker does not know them
    if told.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set, so that Numba compiles nothing"
    if platform.machine().lower() in ("aarch64", "arm64"):
        return None
    if not (_has("avx2") and _has("fma")):
        return "this processor has no AVX2 with fused multiply-add"
    if told.CPU_NAME == "generic" and "+fma" not in (told.CPU_FEATURES or ""):
        # Each multiply-add would be a call of the C library, which takes 40 times as long for the same bits.
        return "NUMBA_CPU_NAME is 'generic', so that Numba compiles for a processor without fused multiply-add"
    return None


class Code:
    """A little assembler over llvmlite's builder: float32 vectors at byte addresses."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.b = ir.IRBuilder(function.append_basic_block("entry"))

    def i(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def at(self, base: ir.Value, *offsets: ir.Value | int) -> ir.Value:
        for offset in offsets:
            base = self.b.add(base, self.i(offset) if isinstance(offset, int) else offset)
        return base

    def load(self, address: ir.Value, kind: ir.Type = VECTOR) -> ir.Value:
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=4)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=4)

    def stream(self, value: ir.Value, address: ir.Value) -> None:
        """Store a whole cache line past the caches, at a multiple of its size.

        Where many lines are written before the first of them is read, that takes half the time: a store through the
        caches reads each line from memory before. `fence` must follow before another thread reads them. Where a vector
        is less than a line, this is an ordinary store.
        """
        if VECTOR_BYTES != LINE:
            self.store(value, address)
            return
        made = self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=VECTOR_BYTES)
        made.set_metadata("nontemporal", self.function.module.add_metadata([ir.Constant(I32, 1)]))

    def prefetch(self, address: ir.Value, *, write: bool = False) -> None:
        """Ask for a cache line to be brought into the L2 cache, or made ready to be written to.

        Any address will do, for it never faults.
        """
        module = self.function.module
        function = module.globals.get("llvm.prefetch.p0")
        if function is None:
            kinds = [ir.IntType(8).as_pointer(), I32, I32, I32]
            function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0")
        flags = [ir.Constant(I32, value) for value in (int(write), 2, 1)]  # L2, data
        self.b.call(function, [self.b.inttoptr(address, ir.IntType(8).as_pointer()), *flags])

    def const(self, value: float, kind: ir.Type = VECTOR) -> ir.Constant:
        return ir.Constant(kind, [value] * LANES)

    def gather(self, address: ir.Value, stride: ir.Value) -> ir.Value:
        """A vector of values that lie ``stride`` bytes apart."""
        vector = ir.Constant(VECTOR, ir.Undefined)
        for lane in range(LANES):
            value = self.load(self.at(address, self.b.mul(stride, self.i(lane))), F32)
            vector = self.b.insert_element(vector, value, ir.Constant(I32, lane))
        return vector

    def splat(self, scalar: ir.Value) -> ir.Value:
        """A vector of ``scalar``, of either width."""
        kind = ir.VectorType(scalar.type, LANES)
        vector = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
        return self.b.shuffle_vector(vector, ir.Constant(kind, ir.Undefined), zeros)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        return self.intrinsic("llvm.fma", x, y, z)

    def intrinsic(self, name: str, *arguments: ir.Value) -> ir.Value:
        """LLVM's own function of that name for our vectors."""
        kind = arguments[0].type
        full = f"{name}.v{LANES}f{64 if kind == WIDE else 32}"
        function = self.function.module.globals.get(full)
        if function is None:
            function = ir.Function(self.function.module, ir.FunctionType(kind, [kind] * len(arguments)), full)
        return self.b.call(function, arguments)

    def parts(self, first: ir.Value, second: ir.Value) -> list[ir.Value]:
        """The high, middle and low parts of two vectors, as pairs of bfloat16: first[i] in the lower half of pair i.

        The three parts of a value add up to it exactly, unless it is so small (1e-33) that the low one underflows. An
        infinity's parts are infinite and NaN.
        """
        values, made = [first, second], []
        half, upper = (ir.Constant(VECTOR_I, [bits] * LANES) for bits in (0x8000, 0xFFFF0000))
        for part in range(3):
            bits = [self.b.bitcast(value, VECTOR_I) for value in values]
            if part < 2:  # rounded to the nearest; what is left for the last part is a bfloat16 as it is
                bits = [self.b.add(one, half) for one in bits]
            bits = [self.b.and_(one, upper) for one in bits]
            values = [self.b.fsub(value, self.b.bitcast(one, VECTOR)) for value, one in zip(values, bits, strict=True)]
            lower = self.b.lshr(bits[0], ir.Constant(VECTOR_I, [16] * LANES))
            made.append(self.b.bitcast(self.b.or_(lower, bits[1]), VECTOR))
        return made

    def transpose(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """LANES vectors as the columns of a square matrix, by swapping smaller and smaller blocks."""
        rows, distance = list(rows), LANES // 2
        while distance:
            for i in range(LANES):
                if i & distance:
                    continue
                one, other = rows[i], rows[i + distance]
                for k, begin in enumerate((0, distance)):
                    swapped = LANES - distance  # from a lane of one to a lane of the other, of which more follow
                    order = [lane + begin + (swapped if lane & distance else 0) for lane in range(LANES)]
                    picks = ir.Constant(ir.VectorType(I32, LANES), order)
                    rows[i + k * distance] = self.b.shuffle_vector(one, other, picks)
            distance //= 2
        return rows

    def exp(self, t: ir.Value) -> ir.Value:
        """exp(t), within 1 unit in the last place from -87 to 88; t is clamped to that range, and NaN stays NaN.

        exp(t) = 2**n exp(r) with n = round(t / ln 2) and |r| <= ln(2) / 2, where Taylor's polynomial of degree 7 is
        off by 6e-9 at most.
        """
        b = self.b
        t = b.select(b.fcmp_ordered(">", t, self.const(88.0)), self.const(88.0), t)
        t = b.select(b.fcmp_ordered("<", t, self.const(-87.0)), self.const(-87.0), t)
        n = self.intrinsic("llvm.rint", b.fmul(t, self.const(_f32(1 / math.log(2)))))
        high = _f32(math.log(2) * 2**12) // 1 / 2**12  # so few bits that n * high is exact
        r = self.fma(n, self.const(-high), t)
        r = self.fma(n, self.const(_f32(high - math.log(2))), r)
        e = self.const(_f32(1 / math.factorial(7)))
        for k in range(6, -1, -1):
            e = self.fma(e, r, self.const(_f32(1 / math.factorial(k))))
        exponent = b.shl(b.fptosi(n, VECTOR_I), ir.Constant(VECTOR_I, [23] * LANES))
        return b.bitcast(b.add(b.bitcast(e, VECTOR_I), exponent), VECTOR)

    def silu(self, y: ir.Value) -> ir.Value:
        """y / (1 + exp(-y)), within 2 units in the last place."""
        e = self.exp(self.b.fneg(y))
        return self.b.fdiv(y, self.b.fadd(e, self.const(1.0)))

    def added(self, vector: ir.Value) -> ir.Value:
        """The sum of a vector's lanes, added up by halves."""
        half = LANES
        while half > 1:
            half //= 2
            order = [min(lane + half, LANES - 1) for lane in range(LANES)]
            shuffled = self.b.shuffle_vector(
                vector, ir.Constant(VECTOR, ir.Undefined), ir.Constant(ir.VectorType(I32, LANES), order)
            )
            vector = self.b.fadd(vector, shuffled)
        return self.b.extract_element(vector, ir.Constant(I32, 0))

    def locals(self, count: int) -> list[ir.Value]:
        """Stack slots for vectors; LLVM keeps them in registers where it can."""
        with self.b.goto_entry_block():
            return [self.b.alloca(VECTOR) for _ in range(count)]

    def array(self, count: int, kind: ir.Type = VECTOR) -> ir.Value:
        """An array of vectors on the stack, which is indexed with gep."""
        with self.b.goto_entry_block():
            return self.b.alloca(kind, count)

    def loop(self, count: ir.Value, body: Callable[[ir.Value], None]) -> None:
        """``for i in range(count): body(i)``, count at least 1."""
        head = self.function.append_basic_block("loop")
        before = self.b.block
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(I64)
        index.add_incoming(self.i(0), before)
        body(index)
        following = self.b.add(index, self.i(1))
        index.add_incoming(following, self.b.block)
        done = self.function.append_basic_block("done")
        self.b.cbranch(self.b.icmp_signed("<", following, count), head, done)
        self.b.position_at_end(done)

    def combine(self, coefficients: Sequence[Fraction], values: Sequence[ir.Value]) -> ir.Value | None:
        """sum_k coefficients[k] * values[k], the unit coefficients first, then fused multiply-adds."""
        total: ir.Value | None = None
        terms = [(c, v) for c, v in zip(coefficients, values, strict=True) if c != 0]
        for c, v in sorted(terms, key=lambda term: {1: 0, -1: 1}.get(int(term[0]) if abs(term[0]) == 1 else 0, 2)):
            if total is None:
                total = v if c == 1 else self.b.fmul(v, self.const(float(c), v.type))
            elif abs(c) == 1:
                total = self.b.fadd(total, v) if c == 1 else self.b.fsub(total, v)
            else:
                total = self.fma(v, self.const(float(c), v.type), total)
        return total

    def rows_in_pairs(self, matrix: Matrix, values: Sequence[ir.Value]) -> list[ir.Value]:
        """``matrix @ values``; rows for points +a and -a share their even and odd halves."""
        out: list[Any] = [None] * len(matrix)
        for r, row in enumerate(matrix):
            if out[r] is not None:
                continue
            if r + 1 < len(matrix) and all(
                b == (-1) ** k * a for k, (a, b) in enumerate(zip(row, matrix[r + 1], strict=True))
            ):
                even = self.combine([c if k % 2 == 0 else Fraction(0) for k, c in enumerate(row)], values)
                odd = self.combine([c if k % 2 == 1 else Fraction(0) for k, c in enumerate(row)], values)
                out[r], out[r + 1] = self.b.fadd(even, odd), self.b.fsub(even, odd)
            else:
                out[r] = self.combine(row, values)
        return out

    def columns_in_pairs(self, matrix: Matrix, values: Sequence[ir.Value]) -> list[ir.Value]:
        """``matrix @ values``; columns for points +a and -a enter as their sum and their difference."""
        values, columns = list(values), [list(column) for column in zip(*matrix, strict=True)]
        k = 0
        while k + 1 < len(columns):
            if any(columns[k][1:]) and all(
                b == (-1) ** r * a for r, (a, b) in enumerate(zip(*columns[k : k + 2], strict=True))
            ):
                plus, minus = self.b.fadd(*values[k : k + 2]), self.b.fsub(*values[k : k + 2])
                values[k : k + 2] = [plus, minus]
                columns[k + 1] = [c if r % 2 else Fraction(0) for r, c in enumerate(columns[k])]
                columns[k] = [Fraction(0) if r % 2 else c for r, c in enumerate(columns[k])]
                k += 1
            k += 1
        return [self.combine(row, values) for row in zip(*columns, strict=True)]


def _f32(value: float) -> float:
    """The value rounded to float32, as llvmlite wants its constants."""
    return struct.unpack("f", struct.pack("f", value))[0]  # type: ignore[no-any-return]


def vector_function(name: str, count: int, emit: Callable[..., None]) -> Any:
    """A Numba-callable ``name(int64 * count) -> None`` whose body ``emit(code, *arguments)`` writes."""

    def define(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        module = builder.module
        if name not in module.globals:
            function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * count), name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            code = Code(function)
            emit(code, *function.args)
            code.b.ret_void()
        builder.call(module.globals[name], arguments)
        return context.get_dummy_value()

    source = (
        f"def {name}(typing, {', '.join(f'a{k}' for k in range(count))}):\n"
        f"    return types.void({', '.join(['types.int64'] * count)}), define\n"
    )
    scope = {"types": types, "define": define}
    exec(source, scope)  # Numba reads an intrinsic's arity from its Python signature
    return intrinsic(scope[name])


def compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call, without the GIL, and keep the code for the next process where there is a place."""
    if HAS_AMX and not AMX:
        # Numba keeps code by the processor's features and does not know what the system allows. Under another name,
        # it is not taken for that of a process that may use AMX.
        function.__qualname__ += "_without_amx"
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither beside the file nor in the user's cache folder
        return njit(nogil=True, error_model="numpy")(function)
