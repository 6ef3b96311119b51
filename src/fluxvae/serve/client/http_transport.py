"""Sends requests to Triton's HTTP endpoint, with binary tensors, from threads that share connections kept open."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import urllib3

from fluxvae.serve.client.transports import TYPES, Call
from fluxvae.serve.client.wire import Request, Unsent, error_of

__all__ = ["Http"]

_NAMES = {triton_name: name for name, triton_name in TYPES.items()}
_CODES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 501: "UNIMPLEMENTED", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}


class Http:
    """Carries requests over HTTP with binary tensors.

    Over HTTP Triton does not notice that a client has gone, so its work goes on after it was cancelled here.

    Args:
        url: the ``host:port`` of Triton's HTTP endpoint.
        connections: how many requests may be on their way at the same time, and how many connections are kept open.
    """

    def __init__(self, url: str, connections: int = 32) -> None:
        self._address = f"http://{url}"
        self._pool = urllib3.connection_from_url(self._address, maxsize=connections, block=False)
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="fluxvae-http")

    def start(self, request: Request, timeout_s: float) -> Call:
        """Send a request; see `Transport.start`."""
        call = Call()
        call.future = self._threads.submit(self._post, request, timeout_s)
        call.cancel = call.future.cancel
        return call

    def close(self) -> None:
        """Wait for the requests on their way, and close the connections, which would delay a server's shutdown."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pool.close()  # not left to garbage collection, because a request's error may keep response and pool alive

    def _post(self, request: Request, timeout_s: float) -> Any:
        body, header_length = _body(request, timeout_s)
        try:
            response = self._pool.request(
                "POST",
                f"/v2/models/{request.model}/infer",
                body=body,
                headers={"Inference-Header-Content-Length": str(header_length)},
                timeout=urllib3.Timeout(total=timeout_s),
                retries=False,
            )
        except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError) as error:
            raise Unsent(
                f"no connection to the server at {self._address}: {error}; is it running, and at this address?"
            ) from error
        except urllib3.exceptions.TimeoutError as error:
            raise error_of("DEADLINE_EXCEEDED", str(error), request, timeout_s=timeout_s) from error
        except urllib3.exceptions.HTTPError as error:
            raise error_of("UNAVAILABLE", f"the connection broke: {error}", request, timeout_s=timeout_s) from error
        if response.status != 200:
            status = _CODES.get(response.status, "INTERNAL")
            raise error_of(status, _message(response.data), request, timeout_s=timeout_s)
        split = int(response.headers["Inference-Header-Content-Length"])
        [output] = json.loads(response.data[:split])["outputs"]
        array = np.frombuffer(response.data, _NAMES[output["datatype"]], offset=split).reshape(output["shape"])
        return request.read(array)


def _body(request: Request, timeout_s: float) -> tuple[bytes, int]:
    """Encode a request by Triton's binary tensor extension: a JSON header, and behind it the tensors in its order.

    Returns:
        The body, and the number of bytes of its header.
    """
    parameters = {**request.parameters, "timeout": max(1, int(timeout_s * 1e6))}
    if request.priority:
        parameters["priority"] = request.priority
    header = {
        "id": request.id,
        "parameters": parameters,
        "inputs": [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": TYPES[array.dtype.name],
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in request.inputs.items()
        ],
        "outputs": [{"name": request.output, "parameters": {"binary_data": True}}],
    }
    encoded = json.dumps(header).encode()
    return b"".join([encoded, *(array.tobytes() for array in request.inputs.values())]), len(encoded)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
