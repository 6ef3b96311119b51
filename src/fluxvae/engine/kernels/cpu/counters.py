"""Counters in memory that threads share without the GIL: they are added to at once, and waited for.

The first functions are for compiled code to call, and the last three for Python code. Addresses are in bytes.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from fluxvae.engine.kernels.cpu.vector_code import I32, I64, LINE, VECTOR_BYTES, compiled

__all__ = ["advance", "changed", "fence", "fetch_add", "wait", "wait_until"]

PATIENCE = 1000
"""How many times a thread that waits looks before it gives its core to another one: a few tens of microseconds."""


class _Looks:
    """A loop that looks again and again, until something branches to ``done``."""

    def __init__(self, builder: Any) -> None:
        self._head = builder.append_basic_block("look")
        self.done = builder.append_basic_block("seen")
        before = builder.block
        builder.branch(self._head)
        builder.position_at_end(self._head)
        self.number = builder.phi(I64)
        self.number.add_incoming(ir.Constant(I64, 0), before)

    def again(self, builder: Any) -> None:
        """Rest for a few cycles, and look again."""
        arm = platform.machine().lower() in ("aarch64", "arm64")
        name, arguments = ("llvm.aarch64.hint", [ir.Constant(I32, 1)]) if arm else ("llvm.x86.sse2.pause", [])
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(
                builder.module, ir.FunctionType(ir.VoidType(), [one.type for one in arguments]), name
            )
        builder.call(function, arguments)
        self.number.add_incoming(builder.add(self.number, ir.Constant(I64, 1)), builder.block)
        builder.branch(self._head)


def _fetch_add(typing: Any, address: Any, by: Any) -> Any:
    """The counter at ``address`` (int64), which is ``by`` more afterwards; atomic."""

    def define(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), define


def _wait_until(typing: Any, address: Any, count: Any, give_way: Any) -> Any:
    """Wait for the counter at ``address`` (int64) to reach ``count``: at first spinning, then giving way.

    ``give_way``: the address of the operating system's function that lets other threads run (`system.give_way`), which
    are perhaps those that this one waits for; 0: there is none.
    """

    def define(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where, least, give_way = arguments
        look = _Looks(builder)
        now = builder.load_atomic(builder.inttoptr(where, I64.as_pointer()), "seq_cst", 8)
        with builder.if_then(builder.icmp_signed(">=", now, least)):
            builder.branch(look.done)
        patient = builder.icmp_signed("<", look.number, ir.Constant(I64, PATIENCE))
        with builder.if_then(builder.or_(patient, builder.icmp_signed("==", give_way, ir.Constant(I64, 0)))):
            look.again(builder)
        function = ir.FunctionType(I32, []).as_pointer()
        builder.call(builder.inttoptr(give_way, function), [])
        look.again(builder)
        builder.position_at_end(look.done)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), define


def _wait_for_change(typing: Any, address: Any, value: Any, looks: Any) -> Any:
    """The counter at ``address`` (int64) as soon as it is not ``value``, or after so many looks."""

    def define(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where, value, most = arguments
        look = _Looks(builder)
        now = builder.load_atomic(builder.inttoptr(where, I64.as_pointer()), "seq_cst", 8)
        over = builder.or_(builder.icmp_signed("!=", now, value), builder.icmp_signed(">=", look.number, most))
        with builder.if_then(over):
            builder.branch(look.done)
        look.again(builder)
        builder.position_at_end(look.done)
        return builder.load_atomic(builder.inttoptr(where, I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64, types.int64, types.int64), define


def _fence(typing: Any) -> Any:
    """Let what was stored past the caches be seen by other threads before what this one stores from now on."""

    def define(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if VECTOR_BYTES == LINE:  # only then `Code.stream` stores so, and only on x86 are there registers so wide
            name, module = "llvm.x86.sse.sfence", builder.module
            function = module.globals.get(name) or ir.Function(module, ir.FunctionType(ir.VoidType(), []), name)
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), define


fetch_add: Any = intrinsic(_fetch_add)
wait_until: Any = intrinsic(_wait_until)
wait_for_change: Any = intrinsic(_wait_for_change)
fence: Any = intrinsic(_fence)


@compiled
def advance(counters: Any, index: int, by: int) -> int:
    """Add to counter ``index`` of (n, 8) int64, the first of its row; what it was before."""
    before: int = fetch_add(counters[index].ctypes.data, by)
    return before


@compiled
def wait(counters: Any, index: int, count: int, give_way: int) -> None:
    """Return when counter ``index`` has reached ``count``; ``give_way`` as for `wait_until`."""
    wait_until(counters[index].ctypes.data, count, give_way)


@compiled
def changed(counters: Any, seen: int, looks: int) -> int:
    """The first counter as soon as it is not ``seen``, or after so many looks."""
    now: int = wait_for_change(counters[0].ctypes.data, seen, looks)
    return now
