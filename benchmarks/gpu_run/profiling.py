"""The kernels of one decode by time, what bounds each of them, and what the host does meanwhile."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.profiler
from torch.autograd import DeviceType
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from gpu_run.bench import Bench
from gpu_run.hardware import rates

__all__ = ["Work", "profile"]

LONGEST = 10
"""How many kernels are listed with their bound."""
ATTENTION = "_attention"
"""Our kernel of this name multiplies; all others of ours only move bytes."""


@dataclass
class Work:
    """What a kernel's launches amount to in one decode."""

    ms: float = 0.0
    launches: int = 0
    nbytes: int = 0
    """Bytes of the tensors that are given to it and that it makes, each counted once a launch."""
    operations: int = 0
    """Multiplications and additions."""

    def bound(self, tflops: float, gb_per_second: float) -> dict[str, Any]:
        """How long it must take by its operations and by its bytes, and which of them bounds it."""
        operations, nbytes = self.operations / tflops / 1e9, self.nbytes / gb_per_second / 1e6
        least = max(operations, nbytes)
        name = "multiplications" if operations > nbytes else "bytes" if nbytes else "not known"
        share = least / self.ms if self.ms else 0.0
        return {"bound": name, "operations_ms": operations, "bytes_ms": nbytes, "share_of_bound": share}


def profile(bench: Bench) -> None:
    """Profile a decode at 1024, and time what the host spends on asking for it."""
    engine, raw = bench.ours(), bench.raw("flux", 1024, 1, "bfloat16")
    engine.decode(raw)
    begun = asked = time.perf_counter()

    def note(done: int, total: int) -> None:
        nonlocal asked
        asked = time.perf_counter()

    engine.decode(raw, progress=note)  # which is told of every block as soon as it has been asked for
    torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    ours: dict[str, Work] = defaultdict(Work)
    with _counted(ours):
        bench.ours().decode(raw)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds, record_shapes=True) as recorded:
        engine.decode(raw)
        torch.cuda.synchronize()
    averages = recorded.key_averages()
    tables = [averages.table(sort_by=by, row_limit=40) for by in ("self_device_time_total", "self_cpu_time_total")]
    (bench.out / "profile.txt").write_text("\n\n".join(tables))
    events = recorded.events()
    found = kernels(events, ours)
    launches, busy = sum(work.launches for work in found.values()), sum(work.ms for work in found.values())
    bench.row(
        kind="profile", launches=launches, device_ms=busy, wall_ms=1e3 * wall, host_ms=1e3 * (asked - begun),
        kernels=len(found),
    )  # fmt: skip
    measured = rates(bench, 0.2)
    for place, (name, work) in enumerate(sorted(found.items(), key=lambda item: -item[1].ms)[:LONGEST], 1):
        bound = work.bound(measured["tflops_bfloat16"], measured["copy_gb_per_second"])
        bench.row(kind="kernel", place=place, name=name[:120], ms=work.ms, launches=work.launches, **bound)


def kernels(events: Any, ours: dict[str, Work]) -> dict[str, Work]:
    """All that ran on the card, by name.

    The shapes of a convolution are those that the profiler noted of the operation that launched it. If an operation
    launches several kernels, the longest one is taken to do its work, and the others (transposes, for example) to do
    nothing that counts. The work of our own kernels was counted by their names.
    """
    found: dict[str, Work] = defaultdict(Work)
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found[event.name].ms += event.time_range.elapsed_us() / 1e3
            found[event.name].launches += 1
        elif event.kernels and "convolution" in event.name and len(event.input_shapes) > 1:
            longest = max(event.kernels, key=lambda kernel: kernel.duration)
            nbytes, operations = convolved(*event.input_shapes[:2], event.input_shapes[-1])
            found[longest.name].nbytes += nbytes
            found[longest.name].operations += operations
    for name, work in ours.items():
        if name in found:
            found[name].nbytes, found[name].operations = work.nbytes, work.operations
    return found


def convolved(image: list[int], weight: list[int], out: list[int], itemsize: int = 2) -> tuple[int, int]:
    """Bytes and operations of a convolution without padding in height and with "same" width.

    Args:
        image: (1, cin, n, W); weight: (cout, cin, kh, kw).
        out: (1, cout, n', W') if the operation was given its result, else anything.
    """
    cout, cin, height, width = weight
    if len(out) != 4 or out[1] != cout or out == weight:
        out = [1, cout, image[2] - height + 1, image[3]]
    values = out[2] * out[3] * cout
    nbytes = (image[1] * image[2] * image[3] + cout * cin * height * width + values) * itemsize
    return nbytes, 2 * values * cin * height * width


@contextmanager
def _counted(ours: dict[str, Work]) -> Iterator[None]:
    """Count the launches of the Triton language's kernels and the bytes of the tensors that they are given."""
    before = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def counting(kind: Any) -> Any:
        def run(kernel: Any, *given: Any, **more: Any) -> Any:
            work, tensors = ours[kernel.fn.__name__], [one for one in given if isinstance(one, torch.Tensor)]
            places = {(one.data_ptr(), one.shape): one.numel() * one.element_size() for one in tensors}
            work.launches += 1
            work.nbytes += sum(places.values())
            if kernel.fn.__name__ == ATTENTION:
                work.operations += 4 * len(tensors[0]) * len(tensors[1]) * tensors[0].shape[1]
            return before[kind](kernel, *given, **more)

        return run

    try:
        for kind in before:
            kind.run = counting(kind)
        yield
    finally:
        for kind, run in before.items():
            kind.run = run
