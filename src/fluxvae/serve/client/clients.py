"""The sync and the async client of our Triton models; `fluxvae.client` is where users find them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

from fluxvae.errors import UnavailableError
from fluxvae.serve.client.base import Base
from fluxvae.serve.client.transports import Call
from fluxvae.serve.client.wire import Request

__all__ = ["AsyncClient", "Client"]


class Client(Base[Any]):
    """A client that waits; may be shared by threads.

    Args:
        url: the ``host:port`` of Triton's gRPC endpoint (8001), or with ``protocol="http"`` of its HTTP endpoint
            (8000).
        protocol: ``"grpc"``, ``"http"``, or ``"shared_memory"``, which is gRPC to a server on this machine, with
            the tensors in system shared memory.
        model: the name of the model on the server that decodes: ``"vae_decoder"``, ``"vae_decoder_flux2"``,
            ``"vae_decoder_qwen_image"``, or ``"vae_preview"``, whose images are approximate. It may also be that of a
            model that encodes, if nothing is decoded.
        encoder_model: the name of the model that encodes. None: the one that encodes what ``model`` decodes,
            ``"vae_encoder"``, ``"vae_encoder_flux2"`` or ``"vae_encoder_qwen_image"``. For previews and for models of
            other names there is none.
        timeout_s: the seconds that a call may take from its beginning to its answer, retries included.
        retries: how often a request is repeated that was refused before any work, because there was no connection or
            the queue was full. After any other error nothing is repeated.

    Raises:
        InvalidOptionError: an option is wrong.
    """

    def send(self, make: Callable[[], Request], timeout_s: float | None = None) -> Any:
        """Make a request, send it, and wait for its answer; see `Base.send`."""
        deadline, pauses = self._deadline(timeout_s), self._pauses()
        request = make()
        while True:
            try:
                call = self._transport.start(request, max(deadline - time.monotonic(), 1e-3))
                try:
                    return call.future.result()
                except BaseException:
                    call.cancel()  # so that Ctrl-C here ends the work on the server
                    raise
            except UnavailableError as error:
                time.sleep(self._next_pause(error, pauses, deadline))

    def close(self) -> None:
        """Close connections and shared memory."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(Base[Coroutine[Any, Any, Any]]):
    """A client for asyncio, whose methods are awaited. Cancelling one stops it on the server too (not over HTTP).

    Arguments, methods and errors are those of `Client`.
    """

    async def send(self, make: Callable[[], Request], timeout_s: float | None = None) -> Any:
        """Make a request, send it, and await its answer; see `Base.send`."""
        deadline, pauses = self._deadline(timeout_s), self._pauses()
        # Both happen in threads: pictures are checked and converted, and shared memory registers a region and copies.
        request = await asyncio.to_thread(make)
        while True:
            try:
                call = await self._start(request, max(deadline - time.monotonic(), 1e-3))
                try:
                    return await asyncio.wrap_future(call.future)
                except asyncio.CancelledError:
                    call.cancel()
                    raise
            except UnavailableError as error:
                await asyncio.sleep(self._next_pause(error, pauses, deadline))

    async def _start(self, request: Request, timeout_s: float) -> Call:
        starting = asyncio.ensure_future(asyncio.to_thread(self._transport.start, request, timeout_s))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(lambda done: None if done.exception() else done.result().cancel())
            raise

    async def close(self) -> None:
        """Close connections and shared memory."""
        await asyncio.to_thread(self._transport.close)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
