"""What both endpoints do with a request: read its body within limits, wait in line, and work while the client is there.

`DecodeEndpoint` and `EncodeEndpoint` share one `Service`: decodes and encodes take turns for the same slots, and their
bodies count in the same memory. Each request is one `Exchange`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from fluxvae.errors import UnavailableError
from fluxvae.serve.gateway.errors import RequestTimeout
from fluxvae.serve.gateway.forward import Question, TritonModel
from fluxvae.serve.gateway.http import CLIENT_GONE, GatewayMetrics, request_id_of
from fluxvae.serve.gateway.line import BODY_GRACE_S, BODY_RATE, BodyMemory, Line, body_deadline

__all__ = ["Exchange", "Service"]

_T = TypeVar("_T")


class _ClientGone(Exception):
    """The client has disconnected, so that nobody waits for the answer."""


class Service:
    """What the requests to all models share: the slots and the line in front of them, and the memory of their bodies.

    Args:
        timeout_s: how many seconds may pass from a request's beginning to its answer.
        max_in_flight: how many requests, to all models together, may be at work at a time.
        max_queue: how many more may wait for that, with their bodies in memory.
        max_body_bytes: how many bytes the bodies of all requests may have that arrive, wait or are at work.
        metrics: the metrics to count in.
    """

    def __init__(
        self, *, timeout_s: float, max_in_flight: int, max_queue: int, max_body_bytes: int, metrics: GatewayMetrics
    ) -> None:
        self.timeout_s = timeout_s
        self.line = Line(max_in_flight, max_queue)
        self.memory = BodyMemory(max_body_bytes)
        self.metrics = metrics
        metrics.in_flight.set_function(lambda: self.line.at_work)
        metrics.waiting.set_function(lambda: self.line.waiting)

    async def answer(self, request: Request, respond: Callable[[Exchange], Awaitable[Response]]) -> Response:
        """Answer one request, and give back the memory of its body whatever comes of it.

        Args:
            request: the request.
            respond: makes the answer.

        Raises:
            FluxVAEError: the request is refused or failed. The app's handlers turn it into an answer.
        """
        exchange = Exchange(self, request)
        try:
            return await respond(exchange)
        except _ClientGone:
            return Response(status_code=CLIENT_GONE)
        finally:
            exchange.close()


class Exchange:
    """One request, from its beginning to its answer.

    Args:
        service: what all requests share.
        request: the request.
    """

    def __init__(self, service: Service, request: Request) -> None:
        self.request = request
        self.body: bytearray | bytes = b""
        """What has arrived of the body. An endpoint that turns it into something else may put that in its place."""
        self._service = service
        self._address = request.client.host if request.client else ""
        self._held = 0
        self._start = time.perf_counter()
        self._received = self._checked = self._began = self._done = self._start

    def close(self) -> None:
        """Stop counting the memory of the body."""
        self._service.memory.give_back(self._address, self._held)
        self._held = 0

    async def read_body(
        self, most: int, wrong: Callable[[str], Exception], *, exactly: bool = False, copies: int = 1
    ) -> None:
        """Read the request's body into ``body``, and count its memory.

        Args:
            most: how many bytes it may have at most.
            wrong: makes the error for another length, from words for what came.
            exactly: whether it must have just as many. Where its length is not announced, the caller checks it.
            copies: how many times the bytes will be in memory, and so are counted.

        Raises:
            FluxVAEError: the error of ``wrong``; the body arrives too slowly; or its bytes would be too many beside
                those of other requests.
        """
        service = self._service
        announced = self.request.headers.get("content-length")
        if announced is not None and not (announced == str(most) if exactly else int(announced) <= most):
            raise wrong(f"a Content-Length of {announced[:20]}")
        data, more = bytearray(), True
        self.body = data
        while more:
            deadline = min(body_deadline(self._start, len(data)), self._start + service.timeout_s)
            try:
                message = await asyncio.wait_for(self.request.receive(), max(deadline - time.perf_counter(), 1e-3))
            except asyncio.TimeoutError:
                raise RequestTimeout(
                    f"body: {len(data)} of {announced or most} bytes arrived within "
                    f"{time.perf_counter() - self._start:.3g} s; expected {BODY_RATE} bytes a second after the first "
                    f"{BODY_GRACE_S:g} s, and all within {service.timeout_s:g} s"
                ) from None
            if message["type"] == "http.disconnect":
                raise _ClientGone
            part = message.get("body", b"")
            more = message.get("more_body", False)
            if len(data) + len(part) > most:
                raise wrong(f"{len(data) + len(part)} bytes or more")
            if not service.memory.take(self._address, copies * len(part)):
                raise UnavailableError("the requests at hand hold as many bytes as this gateway keeps; try again")
            self._held += copies * len(part)
            data += part
        service.metrics.received.inc(len(data))
        self._received = time.perf_counter()

    async def ask(self, model: TritonModel, question: Question) -> NDArray[Any]:
        """Wait in line for a slot, and return what the model answers. When the client disconnects, it is cancelled.

        Raises:
            FluxVAEError: the line is full, or the model refused the request or failed.
        """
        self._checked = time.perf_counter()
        deadline = self._start + self._service.timeout_s

        async def in_turn() -> NDArray[Any]:
            async with self._service.line.slot(self._address, max(deadline - self._checked, 1e-3)):
                self._began = time.perf_counter()
                left = max(deadline - self._began, 1e-3)
                return await model.ask(question, request_id=request_id_of(self.request), timeout_s=left)

        answer = await _while_connected(self.request, in_turn())
        self._done = time.perf_counter()
        return answer

    def headers(self, *warnings: str | None) -> dict[str, str]:
        """Return the headers of the answer that say how long each phase took, and of what the client is warned."""
        phases = {
            "body": self._received - self._start,
            "check": self._checked - self._received,
            "line": self._began - self._checked,
            "triton": self._done - self._began,
        }
        headers = {"Server-Timing": ", ".join(f"{name};dur={1e3 * took:.1f}" for name, took in phases.items())}
        if said := [text for text in warnings if text]:
            headers["X-Fluxvae-Warning"] = "; ".join(said)
        return headers


async def _while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of ``work``, or cancel it when the client disconnects.

    Raises:
        _ClientGone: the client has disconnected.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
