"""Measures where a decode's time goes on a CPU, and the least that each part could take on this machine.

    uv run --group bench benchmarks/roofline.py                        # FLUX.1 at 512 and 1024 pixels
    uv run --group bench benchmarks/roofline.py --model flux2-small --sizes 256

First the machine: how many multiply-adds in float32 a second our product loop does on all threads while everything is
in the L1 cache (with AMX each of them is six in bfloat16), and how many bytes a second a large copy reads and writes.
Then one decode, timed call by call. For each kind of call the table has two floors: its multiply-adds at that rate, and
the bytes of its maps and of its weights at that bandwidth. Whatever is in a cache by then is not read from memory, so a
call can be faster than its floor of bytes. The products of Winograd's form are counted, not those that direct
convolution would take; the transforms are not.

The machine is measured before and after each decode, because its speed may swing; the larger rate counts. The decode
must be equal, bit for bit, to one that is not timed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fluxvae.engine import planned
from fluxvae.engine.calls import Call
from fluxvae.engine.exact import ExactDecoder
from fluxvae.engine.kernels import AttentionBlock, ConvBlock
from fluxvae.engine.kernels.cpu import threads
from fluxvae.engine.kernels.cpu.multiply import multiply, pack_panel, panel_bytes, split_bytes
from fluxvae.engine.kernels.cpu.products import NR, TILES
from fluxvae.engine.kernels.cpu.vector_code import AMX, compiled
from measure import MODELS, full_vae, machine, raw_latents

K = 128
"""The length of the products with which the machine is measured: everything is in the L1 cache."""
ROWS = 32 if AMX else TILES
"""How many tiles they are of: one register block."""
PANELS = 64
"""How often a block is multiplied, each time by the same weights; with AMX it is split into parts once before."""


@dataclass
class Spent:
    """What all calls of one kind took together."""

    seconds: float = 0.0
    macs: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Machine:
    """What all threads do together."""

    macs_per_second: float
    bytes_per_second: float


@compiled
def _multiply(left: Any, right: Any, out: Any, split: Any, times: int) -> None:
    aligned = (split.ctypes.data + 63) // 64 * 64
    for _ in range(times):
        multiply(left.ctypes.data, ROWS, right.ctypes.data, 0, PANELS, K, out.ctypes.data, 0, aligned)


def measure_machine(workers: int, repeats: int = 5) -> Machine:
    """Measure the multiply-adds and the bytes copied in a second by so many threads; the best of ``repeats``."""
    times = 300
    random = np.random.default_rng(0)  # with zeros a processor draws less power, and may run faster
    sizes = (K * ROWS, panel_bytes(K) // 4, ROWS * NR, split_bytes(ROWS, K) // 4 + 16)
    arrays = [[random.random(n, np.float32) for n in sizes] for _ in range(workers)]
    weights = random.random((K, NR), np.float32)
    for _, right, *_ in arrays:
        pack_panel(weights.ctypes.data, K, right.ctypes.data)
    source, target = torch.zeros(2, 1 << 26, dtype=torch.float32, device="cpu")
    _multiply(*arrays[0], 1)
    macs = nbytes = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        threads.run(lambda worker: _multiply(*arrays[worker], times), workers)
        macs = max(macs, workers * times * PANELS * K * ROWS * NR / (time.perf_counter() - start))
        start = time.perf_counter()
        target.copy_(source)
        nbytes = max(nbytes, 2 * source.nbytes / (time.perf_counter() - start))
    return Machine(macs, nbytes)


def watch(kernels: Any, spent: dict[str, Spent]) -> Any:
    """Have ``kernels`` note in ``spent`` what each call takes."""
    convolve, attend, prologue, load = kernels.convolve, kernels.attend, kernels.prologue, kernels.load

    def timed(name: str, macs: int, nbytes: int, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        own = spent.setdefault(name, Spent())
        own.seconds += time.perf_counter() - start
        own.macs, own.nbytes = own.macs + macs, own.nbytes + nbytes
        return result

    def watched_convolve(block: ConvBlock) -> None:
        rows, out = block.rows, block.out
        halo = 0 if block.kind == "linear" else 2
        blocks = 1
        if block.raw is not None:
            halo, blocks = block.raw.above + block.raw.below, block.raw.blocks
        height = (rows.shape[0] - halo) // blocks
        call = Call(block.kind, rows.shape[2], out.shape[2], height, rows.shape[1], rows.itemsize, False)
        maps = rows.nbytes + out.nbytes + (0 if block.residual is None else out.nbytes)
        name = f"{block.kind} {call.cin}->{call.cout}, {out.shape[1]} wide"
        timed(name, blocks * kernels.macs(call), maps + blocks * kernels.loaded(call), lambda: convolve(block))

    def watched_attend(block: AttentionBlock) -> None:
        tokens, channels = block.tokens.shape
        queries = block.queries.numel() // channels
        macs = 2 * queries * tokens * channels + 4 * queries * channels**2
        nbytes = block.tokens.nbytes + block.queries.nbytes + 2 * block.out.nbytes
        timed("attention", macs, nbytes, lambda: attend(block))

    def watched_prologue(rows: torch.Tensor, norm: Any, silu: bool, out: torch.Tensor, work: torch.Tensor) -> None:
        name = "copies" if norm is None else "norms and SiLU"
        timed(name, 0, rows.nbytes + out.nbytes, lambda: prologue(rows, norm, silu, out, work))

    def watched_load(conv: Any, kind: Any, dtype: torch.dtype, into: torch.Tensor) -> Any:
        nbytes = conv.module.weight.nbytes + into.nbytes
        return timed("transforms of weights", 0, nbytes, lambda: load(conv, kind, dtype, into))

    kernels.convolve, kernels.attend = watched_convolve, watched_attend
    kernels.prologue, kernels.load = watched_prologue, watched_load
    return kernels


def decode(model: str, size: int, workers: int) -> tuple[Machine, float, dict[str, Spent]]:
    """Decode once, watched: the machine, the seconds of it all, and what each kind of call took."""
    torch.set_num_threads(workers)
    vae, raw = full_vae(model), raw_latents(model, size)
    expected = ExactDecoder(vae, kernels="winograd").decode(raw)
    spent: dict[str, Spent] = {}
    make = planned.make_kernels
    planned.make_kernels = lambda name, device: watch(make(name, device), spent)  # type: ignore[assignment]
    try:
        engine = ExactDecoder(vae, kernels="winograd")
        engine.decode(raw[:, :, :2, :2])
        before = measure_machine(workers)
        spent.clear()
        start = time.perf_counter()
        image = engine.decode(raw)
        seconds = time.perf_counter() - start
        after = measure_machine(workers)
    finally:
        planned.make_kernels = make
    if not torch.equal(image, expected):
        raise SystemExit(f"{model} at {size}: the watched decode differs from an ordinary one")
    if not spent:
        raise SystemExit("no call was watched: the engine makes its kernels in another place now")
    spent["everything else"] = Spent(seconds - sum(one.seconds for one in spent.values()))
    best = Machine(
        max(before.macs_per_second, after.macs_per_second), max(before.bytes_per_second, after.bytes_per_second)
    )  # fmt: skip
    return best, seconds, spent


def table(size: int, found: Machine, seconds: float, spent: dict[str, Spent]) -> Table:
    """One line for each kind of call, those that take longest first, and one for all."""
    title = (
        f"{size}x{size}: {found.macs_per_second / 1e9:.0f} G multiply-adds and {found.bytes_per_second / 1e9:.1f} GB "
        "a second"
    )
    made = Table("call", "seconds", "share", "floor by products", "floor by bytes", "reached", title=title)
    total = Spent(seconds, sum(one.macs for one in spent.values()), sum(one.nbytes for one in spent.values()))
    lines = sorted(spent.items(), key=lambda item: -item[1].seconds)
    for name, one in [*lines, ("all", total)]:
        products, memory = one.macs / found.macs_per_second, one.nbytes / found.bytes_per_second
        reached = f"{max(products, memory) / one.seconds:.0%}" if name != "all" else f"{products / one.seconds:.0%}"
        made.add_row(
            name, f"{one.seconds:.3f}", f"{one.seconds / seconds:.1%}", f"{products:.3f}" if one.macs else "",
            f"{memory:.3f}" if one.nbytes else "", reached if one.nbytes else "",
        )  # fmt: skip
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="flux",
        help="which decoder; each has full widths and seeded weights (default: flux)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=[512, 1024],
        help="the sizes of the images in pixels each way (default: 512 1024)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="how many threads it decodes with (default: PyTorch's choice, %(default)s)",
    )
    args = parser.parse_args()
    console, rows = Console(width=140), []
    with torch.inference_mode():
        for size in args.sizes:
            print(f"{MODELS[args.model]}, {size} pixels, {args.threads} threads ...", file=sys.stderr, flush=True)
            found, seconds, spent = decode(args.model, size, args.threads)
            console.print(table(size, found, seconds, spent))
            calls = {name: asdict(one) for name, one in spent.items()}
            rows.append({"size": size, "seconds": seconds, **asdict(found), "calls": calls})
    print(
        json.dumps({"benchmark": "roofline", **machine(), "model": args.model, "threads": args.threads, "rows": rows})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
