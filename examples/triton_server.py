"""Serve the model folder with a real Triton server on this machine, for local use. Ctrl-C stops it.

    uv run examples/triton_server.py

In production, run NVIDIA's container instead, in which the same folder serves unchanged (docs/triton.md).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from fluxvae.serve.triton.server import TritonServer

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end(number: int, frame: FrameType | None) -> None:
    """Leave the ``with`` block below, which stops Triton whether it is starting or serving.

    Further signals are ignored, so that they do not interrupt the stopping.
    """
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = Path(__file__).parent.parent / "triton_models"
    parser.add_argument("--models", type=Path, default=models, help="the folder of models (default: triton_models)")
    parser.add_argument(
        "--load",
        nargs="+",
        default=["vae_decoder"],
        help="which of them to serve; the others need checkpoints of yours (default: vae_decoder)",
    )
    parser.add_argument(
        "--http-port", type=int, default=8000, help="the port of Triton's HTTP; 0 is a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--grpc-port", type=int, default=8001, help="the port of Triton's gRPC; 0 is a free one (default: %(default)s)"
    )
    args = parser.parse_args()
    for number in _SIGNALS:
        signal.signal(number, end)
    print("starting Triton and loading the checkpoint ...", flush=True)
    with TritonServer(args.models, models=args.load, http_port=args.http_port, grpc_port=args.grpc_port) as server:
        print(
            f"{', '.join(args.load)}: served at http://{server.http_url} and grpc://{server.grpc_url}; Ctrl-C stops it",
            flush=True,
        )
        while server.running:
            time.sleep(0.5)
    sys.exit(f"Triton ended. {server.log_tail()}")


if __name__ == "__main__":
    main()
