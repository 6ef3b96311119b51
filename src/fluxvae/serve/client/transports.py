"""How a client's requests reach Triton: a call is started and gives back its future, to wait on or to await. gRPC here.

HTTP and shared memory: `http_transport`, `shared_memory`. Not covered: TLS, and Triton's
restricted protocols; put a proxy in front where the network is not trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from fluxvae.errors import FluxVAEError
from fluxvae.serve.client.wire import Request, error_of, read_answer

__all__ = ["TYPES", "Call", "Grpc", "Transport"]

TYPES = {"float32": "FP32", "int32": "INT32", "int64": "INT64", "uint8": "UINT8"}
_FINAL = ("StatusCode.INVALID_ARGUMENT", "StatusCode.INTERNAL", "StatusCode.NOT_FOUND")
"""Errors after which the server does nothing more about the request."""
_CHANNEL = [
    # A restarted server is found again within a second; by default gRPC waits up to two minutes between attempts.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


class Call:
    """A request on its way: ``future`` gives what ``decode`` returns, or raises; `cancel` stops it where it can."""

    def __init__(self) -> None:
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # only the answer ends it: nobody else may set its state
        self.cancel: Callable[[], object] = lambda: None


class Transport(Protocol):
    """Carries requests to one model."""

    def start(self, request: Request, timeout_s: float) -> Call:
        """Send a request; from several threads at a time if need be."""

    def close(self) -> None:
        """Let go of connections and memory."""


class Grpc:
    """gRPC: the default. Its deadline and its cancellation stop the decode itself."""

    def __init__(self, url: str, model: str) -> None:
        self._model = model
        self._client = triton.InferenceServerClient(url, channel_args=_CHANNEL)

    def start(self, request: Request, timeout_s: float) -> Call:
        """Send; see `Transport`."""
        inputs = []
        for name, array in request.inputs.items():
            inputs.append(triton.InferInput(name, list(array.shape), TYPES[array.dtype.name]))
            inputs[-1].set_data_from_numpy(array)
        output = triton.InferRequestedOutput(request.output)
        return self._send(request, timeout_s, inputs, output, lambda result: result.as_numpy(request.output))

    def close(self) -> None:
        """Close the channel; what is in flight fails."""
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
        call = Call()

        def take(result: Any, error: InferenceServerException | None) -> None:
            try:
                if error is not None:
                    raise self._translate(error, request, timeout_s)
                answer = read_answer(request, array_of(result))
            except BaseException as caught:
                done(result is not None or (error is not None and error.status() in _FINAL))
                call.future.set_exception(caught)
            else:
                done(True)
                call.future.set_result(answer)

        context = self._client.async_infer(
            self._model,
            inputs,
            take,
            outputs=[output],
            request_id=request.id,
            priority=request.priority,
            timeout=max(1, int(timeout_s * 1e6)),  # in Triton's queue: no decode for a caller who gave up
            client_timeout=timeout_s,
            parameters=request.parameters or None,
        )
        call.cancel = context.cancel
        return call

    def _translate(self, error: InferenceServerException, request: Request, timeout_s: float) -> FluxVAEError:
        status = (error.status() or "UNKNOWN").removeprefix("StatusCode.")
        return error_of(status, error.message() or "", request, model=self._model, timeout_s=timeout_s)
