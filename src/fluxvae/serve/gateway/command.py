"""Runs the gateway as an HTTP server of its own, as ``python -m fluxvae.serve.gateway`` does.

    python -m fluxvae.serve.gateway --triton 127.0.0.1:8001 --metrics http://127.0.0.1:8002/metrics --port 8080

The token comes from the environment (``FLUXVAE_TOKEN``), never from the command line, which every user of the machine
can read.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence

import uvicorn

from fluxvae.errors import InvalidOptionError
from fluxvae.serve.gateway.app import GatewaySettings, make_app
from fluxvae.serve.gateway.hosts import is_loopback
from fluxvae.serve.gateway.protocol import LimitedProtocol
from fluxvae.serve.models import MODEL
from fluxvae.serve.triton.controls import CONFIG_KEY_VARIABLE

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, after which the requests under way get ``--drain`` seconds to finish.

    Args:
        argv: the command line's arguments; None: those of this process.

    Returns:
        The exit status, 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fluxvae.serve.gateway",
        description="Serve an HTTP gateway to fluxvae's models on a Triton server that runs already. It speaks "
        "the protocols of diffusers' remote_decode and remote_encode, and has a page for people. 'fluxvae serve' "
        "starts both together.",
        epilog="FLUXVAE_TOKEN in the environment is what every client must send as 'Authorization: Bearer TOKEN'; "
        "without it the gateway asks for nothing. Example: python -m fluxvae.serve.gateway --triton 127.0.0.1:8001 "
        "--metrics http://127.0.0.1:8002/metrics --port 8080. docs/gateway.md has the protocol.",
    )
    defaults = GatewaySettings(triton_grpc_url="127.0.0.1:8001")
    parser.add_argument(
        "--triton",
        default=defaults.triton_grpc_url,
        help="host and port of Triton's gRPC endpoint; the default is Triton's own on this machine (%(default)s)",
    )
    parser.add_argument(
        "--metrics",
        help="the address of Triton's metrics, such as http://127.0.0.1:8002/metrics; "
        "without it /metrics shows the gateway's own only",
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="a model that Triton serves; repeat it for several. The first that decodes is at / and /decode too, the "
        f"first that encodes at /encode (default: {MODEL})",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen on; the default is reached from this machine only (%(default)s)",
    )
    parser.add_argument("--port", type=int, default=8080, help="the port to listen on (default: %(default)s)")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name that requests may call the gateway by; repeat it for several. On loopback without a token "
        "only loopback's names are answered, so that no web page can pretend to be of the gateway's origin",
    )
    parser.add_argument(
        "--max-request-bytes",
        type=int,
        default=defaults.max_request_bytes,
        help="the most bytes of one request's latents; the default is 4096x4096 in float32 (%(default)s)",
    )
    parser.add_argument(
        "--max-picture-bytes",
        type=int,
        default=defaults.max_picture_bytes,
        help="the most bytes of one request's pictures; the default is 4096x4096 in float32 (%(default)s)",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=defaults.max_pixels,
        help="the most pixels that all images "
        "of one request may have; keep it equal to the model's own (default: %(default)s)",
    )
    parser.add_argument(
        "--max-in-flight",
        type=int,
        default=defaults.max_in_flight,
        help="how many decodes and encodes may be under way; each holds its body and its answer in memory "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=defaults.max_queue,
        help="how many requests may wait for one "
        "of those; beyond them the answer is 503 with a time to try again (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=defaults.timeout_s,
        help="how many seconds a request may take until its "
        "answer, waiting included; Triton gets the same deadline (default: %(default)s)",
    )
    parser.add_argument(
        "--drain",
        type=int,
        default=30,
        help="how many seconds requests under way get to finish when the gateway is stopped (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        settings = GatewaySettings(
            triton_grpc_url=args.triton,
            triton_metrics_url=args.metrics,
            triton_config_key=os.environ.get(CONFIG_KEY_VARIABLE),
            models=args.model or defaults.models,
            token=os.environ.get("FLUXVAE_TOKEN"),
            host=args.host,
            allowed_hosts=args.allowed_host,
            max_request_bytes=args.max_request_bytes,
            max_picture_bytes=args.max_picture_bytes,
            max_pixels=args.max_pixels,
            timeout_s=args.timeout,
            max_in_flight=args.max_in_flight,
            max_queue=args.max_queue,
        )
    except InvalidOptionError as error:
        parser.error(str(error))
    if settings.token is None and not is_loopback(args.host):
        logging.getLogger("fluxvae.gateway").warning("listening on %s without a token: anyone may use it", args.host)
    uvicorn.run(
        make_app(settings),
        host=args.host,
        port=args.port,
        http=LimitedProtocol,
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=args.drain,
    )
    return 0
