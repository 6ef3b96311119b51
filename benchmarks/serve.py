"""Measures what serving costs over the bare engine, and a real Triton server under load of mixed sizes.

    uv run --group bench benchmarks/serve.py                         # about two minutes on two cores
    uv run --group bench benchmarks/serve.py --seconds 5 --rounds 2
    uv run --group bench benchmarks/serve.py --only load --concurrency 1 8 --sizes 512 1024

1. Overhead: one 1024x1024 image is decoded with the demo checkpoint by the library in this process, through Triton
   (gRPC, system shared memory) and through the gateway, in turns. It gives the median times, and the median of the
   differences within each round.
2. Load: several clients ask at the same time for some seconds, at one concurrency after another. It gives images per
   second, percentiles of the latency, and the sizes of the batches that Triton formed, by its own statistics; and the
   resident and shared memory before and after.

Every image is compared with the library's. Exits 1 where one differs. The last line is JSON. A network and clients on
another machine are not covered: these clients share the server's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import tritonclient.grpc
import urllib3
from rich.console import Console
from rich.table import Table

from fluxvae import Decoder
from fluxvae.client import AsyncClient, Client
from fluxvae.serve.triton.server import TritonServer
from measure import machine, packed_latents

TRITON_MODELS = Path(__file__).parent.parent / "triton_models"
MODEL = "vae_decoder"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo", help="the checkpoint that is served (default: %(default)s)")
    parser.add_argument("--only", choices=["overhead", "load"], help="run one of the two parts only (default: both)")
    parser.add_argument(
        "--size",
        type=int,
        default=1024,
        help="the size of the overhead's image, in pixels each way (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="how many rounds the overhead is measured in; the ways take turns (default: %(default)s)",
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[256, 384, 512],
        help="the sizes of the load's images in pixels each way, drawn at random (default: %(default)s)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="how many clients ask at the same time, one number after another (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help="how many seconds of load there are at each concurrency (default: %(default)s)",
    )
    parser.add_argument(
        "--protocol",
        default="grpc",
        choices=["grpc", "http", "shared_memory"],
        help="how the load's clients reach Triton (default: %(default)s)",
    )
    args = parser.parse_args()

    console = Console()
    decoder = Decoder.from_pretrained(args.checkpoint, device="cpu")
    result: dict[str, Any] = {"benchmark": "serve", "checkpoint": args.checkpoint, **machine()}
    env, open_apis = {"FLUXVAE_CHECKPOINT": args.checkpoint}, ["shared-memory", "statistics"]
    with TritonServer(TRITON_MODELS, models=[MODEL], open_apis=open_apis, env=env) as server:
        if args.only != "load":
            result["overhead"] = overhead(server, decoder, args.size, args.rounds)
            print_overhead(console, result["overhead"], args.size)
        if args.only != "overhead":
            result["load"] = load(server, decoder, args)
            print_load(console, result["load"])
    wrong = result.get("overhead", {}).get("wrong", 0) + result.get("load", {}).get("wrong", 0)
    result["wrong"] = wrong
    print(json.dumps(result))
    return 1 if wrong else 0


# -- overhead --------------------------------------------------------------------------------------------------------


def overhead(server: TritonServer, decoder: Decoder, size: int, rounds: int) -> dict[str, Any]:
    """Measure one decode in seconds by each way in, and how much longer it takes than by the library alone."""
    latents = packed_latents(size, size)
    pixels = {"height": size, "width": size}
    expected = decoder.decode(latents, **pixels, output_type="uint8")
    with contextlib.ExitStack() as stack:
        grpc = stack.enter_context(Client(server.grpc_url))
        shared = stack.enter_context(Client(server.grpc_url, protocol="shared_memory"))
        gateway = stack.enter_context(run_gateway(server))
        waits: list[float] = []
        ways: dict[str, Callable[[], Any]] = {
            "library": lambda: decoder.decode(latents, **pixels, output_type="uint8"),
            "triton grpc": lambda: grpc.decode(latents, **pixels, output_type="uint8"),
            "triton shared memory": lambda: shared.decode(latents, **pixels, output_type="uint8"),
            "gateway": lambda: remote_decode(gateway, latents, size, waits),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        wrong = 0
        for turn in range(rounds + 1):  # the first round warms up and is not counted
            for name, call in ways.items():
                start = time.perf_counter()
                image = call()
                took = time.perf_counter() - start
                wrong += not np.array_equal(image, expected)
                if turn:
                    seconds[name].append(took)
    bare = seconds["library"]
    return {
        "size": size,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "spread": {name: [min(times), max(times)] for name, times in seconds.items()},
        # Compared round by round, because whatever slows the machine for a while slows all ways alike.
        "over_library_percent": {
            name: 100 * statistics.median(a / b - 1 for a, b in zip(times, bare, strict=True))
            for name, times in seconds.items()
        },
        # Compared within each request, because two decodes of some seconds differ by more than a gateway costs.
        "gateway_over_triton_ms": 1e3
        * statistics.median(a - b for a, b in zip(seconds["gateway"], waits[1:], strict=True)),
        "wrong": wrong,
    }


@contextlib.contextmanager
def run_gateway(server: TritonServer) -> Iterator[str]:
    """Run the gateway in a process of its own, and give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fluxvae.serve.gateway", "--triton", server.grpc_url, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                if urllib3.request("GET", f"{address}/readyz", retries=False, timeout=10).status == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the gateway did not become ready")
            time.sleep(0.1)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


_HTTP = urllib3.PoolManager(maxsize=128)  # benchmarks/arrivals.py asks from as many threads


def remote_decode(address: str, latents: torch.Tensor, size: int, waits: list[float]) -> np.ndarray:
    """Send one request in diffusers' remote_decode protocol, which asks for the same bytes as Triton's ``images``.

    The gateway tells in its answer for how long it waited for Triton. These seconds are appended to ``waits``.
    """
    shape = "&".join(f"shape={n}" for n in latents.shape)
    query = f"{shape}&dtype=float32&height={size}&width={size}&output_type=pt&partial_postprocess=True&do_scaling=True"
    response = _HTTP.request(
        "POST",
        f"{address}/decode?{query}",
        body=latents.numpy().tobytes(),
        headers={"Content-Type": "tensor/binary", "Accept": "tensor/binary"},
        retries=False,
    )
    if response.status != 200:
        raise RuntimeError(f"gateway: {response.status} {response.data[:300]!r}")
    phases = dict(phase.split(";dur=") for phase in response.headers["Server-Timing"].split(", "))
    waits.append(float(phases["triton"]) / 1e3)
    return np.frombuffer(response.data, np.uint8).reshape(json.loads(response.headers["shape"]))


def print_overhead(console: Console, row: dict[str, Any], size: int) -> None:
    table = Table(title=f"One {size}x{size} image: what serving adds")
    for column in ("way", "median s", "min to max s", "over the library"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, median in row["seconds"].items():
        low, high = row["spread"][name]
        more = "" if name == "library" else f"{row['over_library_percent'][name]:+.1f} %"
        table.add_row(name, f"{median:.3f}", f"{low:.3f} to {high:.3f}", more)
    console.print(table)
    console.print(f"gateway over Triton: {row['gateway_over_triton_ms']:+.1f} ms")


# -- load ------------------------------------------------------------------------------------------------------------


def load(server: TritonServer, decoder: Decoder, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one concurrency after another, after a warm-up that brings memory to the size that it keeps."""
    cases = []
    for seed, height in enumerate(args.sizes):
        for width in {height, args.sizes[0]}:
            latents = packed_latents(height, width, seed=seed)
            expected = decoder.decode(latents, height=height, width=width, output_type="uint8")
            cases.append((latents, height, width, expected))
    asyncio.run(run_load(server, cases, max(args.concurrency), args.seconds / 2, args.protocol))
    before = memory(server)
    rows = []
    for concurrency in args.concurrency:
        batches = batch_counts(server)
        row = asyncio.run(run_load(server, cases, concurrency, args.seconds, args.protocol))
        row["batches"] = {str(size): n for size, n in sorted((batch_counts(server) - batches).items())}
        rows.append(row)
    return {
        "sizes": [f"{height}x{width}" for _, height, width, _ in cases],
        "protocol": args.protocol,
        "rows": rows,
        "memory_before": before,
        "memory_after": memory(server),
        "wrong": sum(row["wrong"] for row in rows),
    }


async def run_load(
    server: TritonServer, cases: list[Any], concurrency: int, seconds: float, protocol: str
) -> dict[str, Any]:
    """Let ``concurrency`` clients decode, each one request at a time, until the time is up."""
    latencies: list[float] = []
    counts: Counter[str] = Counter()
    url = server.http_url if protocol == "http" else server.grpc_url

    async def work(client: AsyncClient, seed: int) -> None:
        draw = random.Random(seed)
        while time.perf_counter() < end:
            latents, height, width, expected = draw.choice(cases)
            begin = time.perf_counter()
            image = await client.decode(latents, height=height, width=width, output_type="uint8")
            latencies.append(time.perf_counter() - begin)
            counts["pixels"] += height * width
            counts["wrong"] += not np.array_equal(image, expected)

    async with AsyncClient(url, protocol=protocol) as client:
        start = time.perf_counter()
        end = start + seconds
        await asyncio.gather(*(work(client, seed) for seed in range(concurrency)))
        took = time.perf_counter() - start
    p50, p95, p99 = (float(np.percentile(latencies, q)) for q in (50, 95, 99))
    return {
        "concurrency": concurrency,
        "requests": len(latencies),
        "images_per_second": len(latencies) / took,
        "megapixels_per_second": counts["pixels"] / took / 1e6,
        "p50_s": p50,
        "p95_s": p95,
        "p99_s": p99,
        "wrong": counts["wrong"],
    }


def batch_counts(server: TritonServer) -> Counter[int]:
    """Return how often the model has run so far for each number of rows in an ``execute``."""
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        [model] = client.get_inference_statistics(MODEL, as_json=True)["model_stats"]
    return Counter(
        {int(one["batch_size"]): int(one["compute_infer"].get("count", 0)) for one in model.get("batch_stats", [])}
    )


def memory(server: TritonServer) -> dict[str, int]:
    """Return the bytes that are resident in the server and its models, and those of its shared-memory regions."""
    resident = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == server.pid:
                resident += process.memory_info().rss
    return {"resident": resident, "shared": sum(region.stat().st_size for region in server.shm_regions())}


def print_load(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"Load over {result['protocol']}: {', '.join(result['sizes'])} at random")
    for column in ("clients", "requests", "images/s", "MP/s", "p50 s", "p95 s", "p99 s", "batch sizes: times"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["concurrency"]),
            str(row["requests"]),
            f"{row['images_per_second']:.2f}",
            f"{row['megapixels_per_second']:.2f}",
            *(f"{row[name]:.3f}" for name in ("p50_s", "p95_s", "p99_s")),
            ", ".join(f"{size}: {n}" for size, n in row["batches"].items()),
        )
    console.print(table)
    for kind in ("resident", "shared"):
        before, after = result["memory_before"][kind], result["memory_after"][kind]
        console.print(f"{kind} memory: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after")


if __name__ == "__main__":
    sys.exit(main())
