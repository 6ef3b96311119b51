"""Answers a request of the ``remote_decode`` protocol with the image, or with an error.

A request is checked in this order, so that bad input costs neither memory nor time: query and headers, announced
length, body, latents; only then Triton is asked. A JSON body is read before the query, because it may hold a part of
it. When a client disconnects, its decode is cancelled.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fluxvae.errors import InvalidLatentsError, UnavailableError
from fluxvae.latents.format import PREVIEW_NOTE
from fluxvae.latents.layout import Layout
from fluxvae.serve.families import families_of
from fluxvae.serve.gateway.body import Form, base64_answer, largest_json, read_form, read_json
from fluxvae.serve.gateway.errors import RequestTimeout, TooLarge
from fluxvae.serve.gateway.forward import TritonModel
from fluxvae.serve.gateway.http import CLIENT_GONE, GatewayMetrics, request_id_of
from fluxvae.serve.gateway.latents import read_latents, read_shape, wrong_length
from fluxvae.serve.gateway.line import BODY_GRACE_S, BODY_RATE, BodyMemory, Line, body_deadline
from fluxvae.serve.gateway.remote_decode import Asked, Limits, merge, parse
from fluxvae.serve.models import vae_class_of

__all__ = ["DecodeEndpoint", "decode_path"]

_T = TypeVar("_T")


class _ClientGone(Exception):
    """The client has disconnected, so that nobody waits for the answer."""


@dataclass
class _Body:
    """What has arrived of a request's body."""

    address: str
    """The client's IP address."""
    data: bytearray | bytes = b""
    """The latents' bytes. Of a JSON body it is the text first, and the latents' bytes once that was read."""
    held: int = 0
    """How many bytes `BodyMemory` counts for it."""


def decode_path(model: str) -> str:
    """Return the path of the address at which a model is served."""
    return f"/models/{model}/decode"


class DecodeEndpoint:
    """Answers every ``POST`` that asks for a decode.

    Each model is at its `decode_path`. The first is also at ``/decode``, and at ``/``, where ``remote_decode`` usually
    sends.

    Args:
        models: the models by their names.
        limits: what one request may ask for.
        timeout_s: how many seconds may pass from a request's beginning to its answer.
        max_in_flight: how many requests, to all models together, may be at work at a time.
        max_queue: how many more may wait for that, with their bodies in memory.
        max_body_bytes: how many bytes the bodies of all requests may have that arrive, wait or are at work.
        metrics: the metrics to count in.
    """

    def __init__(
        self,
        models: Mapping[str, TritonModel],
        *,
        limits: Limits,
        timeout_s: float,
        max_in_flight: int,
        max_queue: int,
        max_body_bytes: int,
        metrics: GatewayMetrics,
    ) -> None:
        self._models = models
        self._limits = limits
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._line = Line(max_in_flight, max_queue)
        self._memory = BodyMemory(max_body_bytes)
        metrics.in_flight.set_function(lambda: self._line.at_work)
        metrics.waiting.set_function(lambda: self._line.waiting)

    async def __call__(self, request: Request, name: str) -> Response:
        """Answer one request to the model of this name.

        Raises:
            FluxVAEError: the request is refused or failed. The app's handlers turn it into an answer.
        """
        body = _Body(request.client.host if request.client else "")
        try:
            return await self._decode(request, name, body)
        except _ClientGone:
            return Response(status_code=CLIENT_GONE)
        finally:
            self._memory.give_back(body.address, body.held)

    async def _decode(self, request: Request, name: str, body: _Body) -> Response:
        start = time.perf_counter()
        form, query = read_form(request.headers), request.query_params.multi_items()
        if form is Form.BINARY:
            asked, layout = self._read_head(request, name, form, query)
            await self._read_body(request, body, asked.nbytes, lambda came: wrong_length(came, asked), start)
            received = time.perf_counter()
        else:  # the body is JSON, which may hold parameters too
            most = largest_json(self._limits.max_request_bytes)
            await self._read_body(request, body, most, lambda came: _too_large(came, most), start, copies=2)
            received = time.perf_counter()
            data, more = await asyncio.to_thread(read_json, body.data)
            body.data = data
            asked, layout = self._read_head(request, name, form, merge(query, more))
        deadline = start + self._timeout_s
        # Checking 16 MiB of latents takes milliseconds. In a thread it does not keep the other requests waiting.
        latents = await asyncio.to_thread(read_latents, asked, layout, body.data)
        checked = began = time.perf_counter()
        model = self._models[name]

        async def in_turn() -> Any:
            nonlocal began
            async with self._line.slot(body.address, max(deadline - checked, 1e-3)):
                began = time.perf_counter()
                remaining = max(deadline - began, 1e-3)
                return await model.decode(asked, latents, request_id=request_id_of(request), timeout_s=remaining)

        answer = await _while_connected(request, in_turn())
        phases = {"body": received - start, "check": checked - received, "line": began - checked}
        phases["triton"] = time.perf_counter() - began
        headers = {"Server-Timing": ", ".join(f"{name};dur={1e3 * took:.1f}" for name, took in phases.items())}
        if warnings := [text for text in (latents.warning, PREVIEW_NOTE if model.approximate else None) if text]:
            headers["X-Fluxvae-Warning"] = "; ".join(warnings)
        return _response(asked, answer, headers)

    def _read_head(self, request: Request, name: str, form: Form, query: list[tuple[str, str]]) -> tuple[Asked, Layout]:
        asked = parse(query, request.headers.get("accept", ""), self._limits, vae_class_of(name), form)
        try:
            return asked, read_shape(asked, self._limits)
        except InvalidLatentsError as error:
            raise InvalidLatentsError(f"{error}{self._elsewhere(asked)}") from None

    def _elsewhere(self, asked: Asked) -> str:
        """Return a sentence that names the address that decodes latents of this shape, if another model does."""
        families = families_of(asked.shape)
        if asked.vae_class in (*families, "AutoencoderTiny"):
            return ""
        paths = [decode_path(name) for name in self._models if vae_class_of(name) in families]
        return f". This server decodes such latents at {paths[0]}" if paths else ""

    async def _read_body(
        self,
        request: Request,
        body: _Body,
        most: int,
        wrong: Callable[[str], Exception],
        start: float,
        *,
        copies: int = 1,
    ) -> None:
        """Read the body of a request into ``body``, and count its memory.

        Args:
            request: the request.
            body: what is filled.
            most: how many bytes it must have, or, where there will be copies, may have at most.
            wrong: makes the error for another length, from words for what came.
            start: when the request began, by ``time.perf_counter``.
            copies: how many times the bytes will be in memory, and so are counted.

        Raises:
            FluxVAEError: the error of ``wrong``; the body arrives too slowly; or its bytes would be too many beside
                those of other requests.
            _ClientGone: the client has disconnected.
        """
        announced = request.headers.get("content-length")
        if announced is not None and not (announced == str(most) if copies == 1 else int(announced) <= most):
            raise wrong(f"a Content-Length of {announced[:20]}")
        data, more = bytearray(), True
        body.data = data
        while more:
            deadline = min(body_deadline(start, len(data)), start + self._timeout_s)
            try:
                message = await asyncio.wait_for(request.receive(), max(deadline - time.perf_counter(), 1e-3))
            except asyncio.TimeoutError:
                raise RequestTimeout(
                    f"body: {len(data)} of {announced or most} bytes arrived within {time.perf_counter() - start:.3g} "
                    f"s; expected {BODY_RATE} bytes a second after the first {BODY_GRACE_S:g} s, and all within "
                    f"{self._timeout_s:g} s"
                ) from None
            if message["type"] == "http.disconnect":
                raise _ClientGone
            part = message.get("body", b"")
            more = message.get("more_body", False)
            if len(data) + len(part) > most:
                raise wrong(f"{len(data) + len(part)} bytes or more")
            if not self._memory.take(body.address, copies * len(part)):
                raise UnavailableError("the requests at hand hold as many bytes as this gateway keeps; try again")
            body.held += copies * len(part)
            data += part
        self._metrics.received.inc(len(data))


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


def _response(asked: Asked, answer: Any, headers: dict[str, str]) -> Response:
    if asked.output == "images_encoded":
        return Response(answer, media_type=f"image/{asked.image_format}", headers=headers)
    headers |= {"shape": json.dumps(list(answer.shape)), "dtype": str(answer.dtype)}
    if not asked.base64:
        return Response(answer.data.cast("B"), media_type="tensor/binary", headers=headers)
    length, pieces = base64_answer(answer.data.cast("B"), answer.shape, str(answer.dtype))
    return StreamingResponse(pieces, media_type="tensor/base64", headers=headers | {"Content-Length": str(length)})


def _too_large(came: str, most: int) -> TooLarge:
    return TooLarge(f"body: got {came}, more than the {most} that JSON may have here; send fewer images in a request")
