"""How long requests wait for a server, by how busy it is.

    uv run benchmarks/arrivals.py --size 512 --utilisation 0.5 0.7 0.9 --seconds 120

Requests arrive at the gateway at random (Poisson: each moment is as likely as any other, whatever is under way), as
those of many independent users do; `benchmarks/serve.py` has clients that wait for their answer before they ask again,
who can make no line longer than they are many. First the seconds for one image alone are measured; a utilisation of
0.7 is then 0.7 requests in that time. For each utilisation it gives how long a request took from its arrival to its
answer, as a multiple of an image's seconds too, and how many requests were in the server on average and at most. Beside
it is what queueing theory says of one server and equal work (M/D/1): 1 + u / (2 (1 - u)) times an image's seconds, on
average.

Every image is compared with the library's. Exits 1 where one differs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fluxvae import Decoder
from fluxvae.serve.triton.server import TritonServer
from measure import machine, packed_latents
from serve import MODEL, TRITON_MODELS, remote_decode, run_gateway

_MOST = 128
"""How many requests may be under way at a time. More than wait here in any measurement that has a meaning."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo", help="the checkpoint that is served (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="pixels each way (default: %(default)s)")
    parser.add_argument(
        "--utilisation",
        type=float,
        nargs="+",
        default=[0.5, 0.7, 0.9],
        help="how much of its time the server should be at work, one share after another (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="for how long requests arrive, each time (default: %(default)s)"
    )
    args = parser.parse_args()
    size = args.size
    latents = packed_latents(size, size)
    expected = Decoder.from_pretrained(args.checkpoint, device="cpu").decode(
        latents, height=size, width=size, output_type="uint8"
    )
    env = {"FLUXVAE_CHECKPOINT": args.checkpoint}
    with TritonServer(TRITON_MODELS, models=[MODEL], env=env) as server, run_gateway(server) as gateway:
        alone = one_after_another(gateway, latents, size)
        rows = [arrive(gateway, latents, size, expected, share / alone, args.seconds) for share in args.utilisation]
    result = {"benchmark": "arrivals", "checkpoint": args.checkpoint, "size": size, "alone_s": alone, **machine()}
    result["rows"] = [
        {"utilisation": share, "theory_mean_s": alone * (1 + share / (2 * (1 - share))) if share < 1 else None, **row}
        for share, row in zip(args.utilisation, rows, strict=True)
    ]
    print_rows(Console(), result)
    print(json.dumps(result))
    return 1 if any(row["wrong"] for row in rows) else 0


def one_after_another(gateway: str, latents: torch.Tensor, size: int, count: int = 10) -> float:
    """Return the median seconds of one request, with nothing beside it."""
    seconds = []
    for _ in range(count + 2):  # the first two warm up
        start = time.perf_counter()
        remote_decode(gateway, latents, size, [])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def arrive(
    gateway: str, latents: torch.Tensor, size: int, expected: np.ndarray, rate: float, seconds: float
) -> dict[str, Any]:
    """Let requests arrive at random, ``rate`` a second, for these seconds, and measure each until its answer."""
    draw = random.Random(0)
    moments, moment = [], draw.expovariate(rate)
    while moment < seconds:
        moments.append(moment)
        moment += draw.expovariate(rate)
    ended: list[tuple[float, bool]] = []

    def ask(arrival: float) -> None:
        image = remote_decode(gateway, latents, size, [])
        ended.append((time.perf_counter() - start - arrival, not np.array_equal(image, expected)))

    with ThreadPoolExecutor(_MOST) as pool:
        start = time.perf_counter()
        most, futures = 0, []
        for arrival in moments:
            time.sleep(max(0.0, start + arrival - time.perf_counter()))
            futures.append(pool.submit(ask, arrival))
            most = max(most, len(futures) - len(ended))
        for future in futures:
            future.result()
        took = time.perf_counter() - start
    if most > _MOST:
        raise RuntimeError(f"{most} requests were under way at a time, more than {_MOST}, which this can send")
    latencies = [latency for latency, _ in ended]
    return {
        "requests": len(latencies),
        "mean_s": statistics.mean(latencies),
        "p50_s": float(np.percentile(latencies, 50)),
        "p95_s": float(np.percentile(latencies, 95)),
        "in_server": sum(latencies) / took,  # Little's law
        "most_in_server": most,
        "wrong": sum(wrong for _, wrong in ended),
    }


def print_rows(console: Console, result: dict[str, Any]) -> None:
    alone = result["alone_s"]
    table = Table(title=f"{result['size']}x{result['size']} alone: {alone:.3f} s")
    for column in (
        "utilisation",
        "requests",
        "mean s",
        "times alone",
        "theory",
        "p95 s",
        "times alone",
        "in it",
        "most",
    ):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        theory = "" if row["theory_mean_s"] is None else f"{row['theory_mean_s'] / alone:.1f}"
        cells = [
            f"{row['utilisation']:g}",
            str(row["requests"]),
            f"{row['mean_s']:.2f}",
            f"{row['mean_s'] / alone:.1f}",
        ]
        cells += [theory, f"{row['p95_s']:.2f}", f"{row['p95_s'] / alone:.1f}", f"{row['in_server']:.1f}"]
        table.add_row(*cells, str(row["most_in_server"]))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
