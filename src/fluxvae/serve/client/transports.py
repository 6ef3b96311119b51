"""The interface by which a client's requests reach Triton (`Transport`), and gRPC as such a transport.

A transport starts a call, which has a future that a thread can wait for and an event loop can await. HTTP is in
`http_transport`, and shared memory in `shared_memory`. No transport has TLS or knows Triton's restricted protocols;
where the network is not trusted, put a proxy in front of the server.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from fluxvae.errors import FluxVAEError
from fluxvae.serve.client.wire import Request, error_of

__all__ = ["TYPES", "Call", "Grpc", "Transport"]

TYPES = {"float32": "FP32", "int32": "INT32", "int64": "INT64", "uint8": "UINT8"}
"""Triton's names of dtypes by NumPy's."""
_FINAL = ("StatusCode.INVALID_ARGUMENT", "StatusCode.INTERNAL", "StatusCode.NOT_FOUND")
"""The errors after which the server no longer works on the request, nor touches its memory."""
_CHANNEL = [
    # By default gRPC waits up to two minutes between attempts to connect. So a restarted server is found in a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


class Call:
    """A request on its way to the server."""

    def __init__(self) -> None:
        self.future: Future[Any] = Future()
        """Gives what the client's method returns or raises."""
        self.future.set_running_or_notify_cancel()  # from here on only the answer ends it, and nobody can cancel it
        self.cancel: Callable[[], object] = lambda: None
        """Stops the request, where the transport can."""


class Transport(Protocol):
    """Carries requests to one server."""

    def start(self, request: Request, timeout_s: float) -> Call:
        """Send a request, without waiting for its answer. Several threads may do so at the same time.

        Args:
            request: what to send.
            timeout_s: after how many seconds the answer is no longer wanted.

        Raises:
            FluxVAEError: the request could not be sent.
        """

    def close(self) -> None:
        """Close the connections and free the memory of this transport."""


class Grpc:
    """Carries requests over gRPC, which is the default.

    When a request's deadline passes or it is cancelled, gRPC tells the server, which stops its work.

    Args:
        url: the ``host:port`` of Triton's gRPC endpoint.
    """

    def __init__(self, url: str) -> None:
        self._client = triton.InferenceServerClient(url, channel_args=_CHANNEL)

    def start(self, request: Request, timeout_s: float) -> Call:
        """Send a request; see `Transport.start`."""
        inputs = []
        for name, array in request.inputs.items():
            inputs.append(triton.InferInput(name, list(array.shape), TYPES[array.dtype.name]))
            inputs[-1].set_data_from_numpy(array)
        output = triton.InferRequestedOutput(request.output)
        return self._send(request, timeout_s, inputs, output, lambda result: result.as_numpy(request.output))

    def close(self) -> None:
        """Close the channel. Requests that are on their way fail."""
        self._client.close()

    def _send(
        self,
        request: Request,
        timeout_s: float,
        inputs: list[Any],
        output: Any,
        array_of: Callable[[Any], NDArray[Any]],
        done: Callable[[bool], None] = lambda answered: None,
    ) -> Call:
        """Send a request, and let its future have the answer.

        Args:
            request, timeout_s: as for `Transport.start`.
            inputs, output: tritonclient's.
            array_of: returns the output's array from tritonclient's result.
            done: is called once the request has ended, with whether the server is certainly done with its memory.
        """
        call = Call()

        def take(result: Any, error: InferenceServerException | None) -> None:
            try:
                if error is not None:
                    raise self._translate(error, request, timeout_s)
                answer = request.read(array_of(result))
            except BaseException as caught:
                done(result is not None or (error is not None and error.status() in _FINAL))
                call.future.set_exception(caught)
            else:
                done(True)
                call.future.set_result(answer)

        context = self._client.async_infer(
            request.model,
            inputs,
            take,
            outputs=[output],
            request_id=request.id,
            priority=request.priority,
            timeout=max(1, int(timeout_s * 1e6)),  # so that Triton computes nothing for a caller who has given up
            client_timeout=timeout_s,
            parameters=request.parameters or None,
        )
        call.cancel = context.cancel
        return call

    def _translate(self, error: InferenceServerException, request: Request, timeout_s: float) -> FluxVAEError:
        status = (error.status() or "UNKNOWN").removeprefix("StatusCode.")
        return error_of(status, error.message() or "", request, timeout_s=timeout_s)
