"""Measures what a server costs while nobody asks it for anything: processor time per process, in percent of a core.

    python benchmarks/idle.py                          the demo checkpoint
    python benchmarks/idle.py --full --seconds 120     FLUX.1's widths, with random weights

It starts ``fluxvae serve`` on free ports, waits until it serves, and reads the processor time that the kernel counts
for each process. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKL

from fluxvae.checkpoints import ASSETS

SETTLE_S = 3.0  # the first health checks after the start are answered by real decodes, which are not the idle state


def full_widths(folder: Path) -> str:
    """Write a checkpoint with FLUX.1's widths and random weights, and return its path."""
    torch.manual_seed(0)
    AutoencoderKL.from_config(AutoencoderKL.load_config(ASSETS / "flux1")).save_pretrained(folder)
    return str(folder)


def part(process: psutil.Process) -> str:
    """Tell by its command line which part of the server a process is."""
    words = " ".join(process.cmdline())
    for found, name in (
        ("triton_python_backend_stub", "model"),
        ("bin/tritonserver", "Triton"),
        ("fluxvae.serve.gateway", "gateway"),
        ("guardian", "guardian"),
    ):
        if found in words:
            return name
    return "supervisor"


def measure(server: subprocess.Popen[str], seconds: float) -> dict[str, float]:
    """Return the processor time of each part of the server while it is idle, in percent of a core."""
    assert server.stdout is not None
    if not any("Ctrl-C stops it." in line for line in server.stdout):
        raise SystemExit("the server did not start")
    time.sleep(SETTLE_S)
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    start = time.perf_counter()
    time.sleep(seconds)
    took = time.perf_counter() - start
    after = [sum(process.cpu_times()[:2]) for process in processes]
    used: dict[str, float] = {}
    for process, first, last in zip(processes, before, after, strict=True):
        used[part(process)] = used.get(part(process), 0.0) + 100 * (last - first) / took
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full",
        action="store_true",
        help="serve a model of FLUX.1's widths instead of the demo's, to see what its own tiny decodes cost",
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how many seconds to measure for (default: %(default)s)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = full_widths(Path(folder)) if args.full else "demo"
        command = [sys.executable, "-m", "fluxvae.cli", "serve", "--checkpoint", checkpoint]
        for port in ("--port", "--http-port", "--grpc-port", "--metrics-port"):
            command += [port, "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            used = measure(server, args.seconds)
        finally:
            server.terminate()
            server.wait()
    for name, percent in used.items():
        print(f"{name:<12} {percent:5.2f} % of a core")
    print(f"{'all':<12} {sum(used.values()):5.2f}")
    machine = {"cpu": platform.processor() or platform.machine(), "cores": psutil.cpu_count()}
    figures = {name: round(percent, 2) for name, percent in used.items()}
    print(json.dumps({"benchmark": "idle", "full": args.full, "seconds": args.seconds, **machine, "percent": figures}))


if __name__ == "__main__":
    main()
