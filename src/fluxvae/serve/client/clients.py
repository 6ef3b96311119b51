"""The sync and the async client of the Triton model; `fluxvae.client` is where users find them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from fluxvae.errors import InvalidOptionError, UnavailableError
from fluxvae.latents.reading import Reading
from fluxvae.serve.client.http_transport import Http
from fluxvae.serve.client.shared_memory import SharedMemoryGrpc
from fluxvae.serve.client.transports import Call, Grpc, Transport
from fluxvae.serve.client.wire import Request, make_request, refused_before_work

if TYPE_CHECKING:
    import torch

__all__ = ["AsyncClient", "Client"]

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


def _make_transport(protocol: str, url: str, model: str) -> Transport:
    """Return the transport of this name: ``"grpc"``, ``"http"`` or ``"shared_memory"``."""
    kinds: dict[str, Callable[[str, str], Transport]] = {"grpc": Grpc, "http": Http, "shared_memory": SharedMemoryGrpc}
    if protocol not in kinds:
        raise InvalidOptionError(f"protocol: got {protocol!r}, expected one of {', '.join(kinds)}")
    if "://" in url:
        raise InvalidOptionError(f"url: got {url!r}, expected host:port, such as 'localhost:8001'")
    return kinds[protocol](url, model)


class _Base:
    """What both clients share.

    Args:
        url: the ``host:port`` of Triton's gRPC endpoint (8001), or with ``protocol="http"`` of its HTTP endpoint
            (8000).
        protocol: ``"grpc"``, ``"http"``, or ``"shared_memory"``, which is gRPC to a server on this machine, with
            latents and images in system shared memory.
        model: the model's name on the server: ``"vae_decoder"``, ``"vae_decoder_flux2"``, or ``"vae_preview"``, whose
            images are approximate.
        timeout_s: the seconds that a ``decode`` may take from its call to its answer, retries included.
        retries: how often a request is repeated that was refused before any work, because there was no connection or
            the queue was full. After any other error nothing is repeated.
    """

    def __init__(
        self,
        url: str,
        *,
        protocol: str = "grpc",
        model: str = "vae_decoder",
        timeout_s: float = 120.0,
        retries: int = 4,
    ) -> None:
        if timeout_s <= 0:
            raise InvalidOptionError(f"timeout_s: got {timeout_s!r}, expected seconds above 0")
        if retries < 0:
            raise InvalidOptionError(f"retries: got {retries!r}, expected 0 or more")
        self.url = url
        self.model = model
        self._timeout_s = timeout_s
        self._retries = retries
        self._protocol, self._model = protocol, model
        self._transport = _make_transport(protocol, url, model)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes along, also into another process: all but the connection, which it makes itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_transport"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._transport = _make_transport(self._protocol, self.url, self._model)

    def _pauses(self) -> Iterator[float]:
        """Yield the seconds to wait before each retry. They grow, and are not the same for all clients."""
        for attempt in range(self._retries):
            yield min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)

    def _next_pause(self, error: UnavailableError, pauses: Iterator[float], deadline: float) -> float:
        """Return how long to wait before the request is repeated, or raise ``error`` if it is not to be repeated."""
        pause = next(pauses, None)
        if not refused_before_work(error) or pause is None or time.monotonic() + pause >= deadline:
            raise error
        return pause


class Client(_Base):
    __doc__ = "A client that waits; may be shared by threads.\n" + (_Base.__doc__ or "").partition("\n")[2]

    def decode(
        self,
        latents: torch.Tensor | NDArray[Any],
        *,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        latent_ids: torch.Tensor | NDArray[Any] | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        batch_norm_eps: float | None = None,
        raw: bool | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Any:
        """Decode latents on the server.

        Args:
            latents: packed (B, patches, 64) with height and width, or unpacked (B, 16, lh, lw); float32, bfloat16 or
                float16; scaled, as the transformer leaves them; on any device. FLUX.2's latents, previews', one frame,
                and one image without its batch may be given as to ``Decoder.decode``.
            height, width: the size of the image in pixels. The client does not know the server's checkpoint, but only
                the class that its model's name stands for. So they are also needed where an image of one family has
                the shape of another's packed latents: (4, n, 64) to ``"vae_decoder"``.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"uint8"`` as for ``Decoder.decode``, or ``"raw"``:
                (B, 3, H, W), nominally in [-1, 1], not clamped. Tensors are float32, on the CPU.
            latent_ids, raw: for FLUX.2's latents, as for ``Decoder.decode``.
            scaling_factor, shift_factor, batch_norm_eps: are used instead of the checkpoint's own. They are refused
                where it has none.
            priority: requests with 1 are served first. None is the model's default.
            timeout_s: is used instead of the client's. After it the server stops the decode, except over HTTP.
            request_id: names the request in the server's log. None: a random one.

        Returns:
            The images, always with their batch.

        Raises:
            InvalidLatentsError, InvalidOptionError, MemoryLimitError, NonFiniteOutputError: as the library would.
            DeadlineExceededError: there was no answer in time.
            UnavailableError: there was no connection, or the server's queue was full, or it had no memory. The same
                request may work later.
            FluxVAEError: the server failed.
        """
        reading = Reading(
            height=height, width=width, latent_ids=latent_ids, scaling_factor=scaling_factor,
            shift_factor=shift_factor, batch_norm_eps=batch_norm_eps, raw=raw,
        )  # fmt: skip
        request = make_request(
            latents, reading, model=self.model, output_type=output_type, priority=priority, request_id=request_id
        )
        return self._send(request, self._timeout_s if timeout_s is None else timeout_s)

    def _send(self, request: Request, timeout_s: float) -> Any:
        deadline, pauses = time.monotonic() + timeout_s, self._pauses()
        while True:
            try:
                call = self._transport.start(request, max(deadline - time.monotonic(), 1e-3))
                try:
                    return call.future.result()
                except BaseException:
                    call.cancel()  # so that Ctrl-C here ends the decode on the server
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


class AsyncClient(_Base):
    __doc__ = (
        "A client for asyncio. Cancelling a ``decode`` stops it on the server too (not over HTTP).\n"
        + (_Base.__doc__ or "").partition("\n")[2]
    )

    async def decode(
        self,
        latents: torch.Tensor | NDArray[Any],
        *,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        latent_ids: torch.Tensor | NDArray[Any] | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        batch_norm_eps: float | None = None,
        raw: bool | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Any:
        """As `Client.decode`."""
        reading = Reading(
            height=height, width=width, latent_ids=latent_ids, scaling_factor=scaling_factor,
            shift_factor=shift_factor, batch_norm_eps=batch_norm_eps, raw=raw,
        )  # fmt: skip
        request = make_request(
            latents, reading, model=self.model, output_type=output_type, priority=priority, request_id=request_id
        )
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline, pauses = time.monotonic() + timeout_s, self._pauses()
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
        # This happens in a thread, because shared memory registers a region and copies the latents.
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
