"""Compares our attention on a CPU with PyTorch's: one head of 512 channels over all tokens of a map, as in the decoder.

The two take turns. For a block of 2,048 queries it measures the time, the GFLOP/s of the two matrix products, and the
rms error against float64. An image of 512x512 pixels has 4,096 tokens, and one of 2048x2048 has 65,536. The last line
is JSON. Exits 1 where our largest error is above PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from fluxvae.engine import thread_count
from fluxvae.engine.kernels.cpu.attention import attention, attention_bytes
from measure import machine

CHANNELS, QUERIES, CHECKED = 512, 2048, 128
SCALE = CHANNELS**-0.5


def run_size(tokens: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Measure both with this many tokens and threads, and return a row of the table for each."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(tokens, CHANNELS, generator=generator)
    queries = 2 * torch.randn(QUERIES, CHANNELS, generator=generator)
    out, work = torch.empty_like(queries), torch.empty(attention_bytes(QUERIES, CHANNELS), dtype=torch.uint8)

    def ours() -> torch.Tensor:
        with thread_count.alone():
            attention(queries, keys, SCALE, out, work)
        return out

    def theirs() -> torch.Tensor:
        return F.scaled_dot_product_attention(queries[None, None], keys[None, None], keys[None, None], scale=SCALE)[
            0, 0
        ]

    calls: dict[str, Callable[[], torch.Tensor]] = {"fluxvae": ours, "PyTorch": theirs}
    right = (queries[:CHECKED].double() @ keys.double().t() * SCALE).softmax(1) @ keys.double()
    errors = {name: float((call()[:CHECKED] - right).square().mean().sqrt()) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "tokens": tokens, "threads": threads, "attention": name, "seconds": statistics.median(seconds[name]),
            "spread": [min(seconds[name]), max(seconds[name])],
            "gflops": 4e-9 * tokens * QUERIES * CHANNELS / statistics.median(seconds[name]), "rms_error": errors[name],
        }
        for name in calls
    ]  # fmt: skip


def main() -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[4096, 16384, 131072],
        help="how many tokens the map has (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1, torch.get_num_threads()],
        help="how many threads to compute with (default: one, and all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed, in turn (default: %(default)s)")
    options = parser.parse_args()
    rows = []
    for tokens in options.tokens:
        for threads in sorted(set(options.threads)):
            print(f"{tokens} tokens, {threads} threads ...", file=sys.stderr, flush=True)
            rows += run_size(tokens, threads, options.rounds)
    table = Table("tokens", "threads", "attention", "seconds", "spread", "GFLOP/s", "rms error")
    for row in rows:
        low, high = row["spread"]
        table.add_row(
            str(row["tokens"]), str(row["threads"]), row["attention"], f"{row['seconds']:.3f}",
            f"{low:.3f} to {high:.3f}", f"{row['gflops']:.0f}", f"{row['rms_error']:.2e}",
        )  # fmt: skip
    Console(width=120).print(table)
    print(json.dumps({"benchmark": "attention", "machine": machine(), "rows": rows}))
    ours, theirs = (max(r["rms_error"] for r in rows if r["attention"] == name) for name in ("fluxvae", "PyTorch"))
    return int(not ours <= theirs)


if __name__ == "__main__":
    sys.exit(main())
