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
    """The transport by its name: ``"grpc"``, ``"http"`` or ``"shared_memory"``."""
    kinds: dict[str, Callable[[str, str], Transport]] = {"grpc": Grpc, "http": Http, "shared_memory": SharedMemoryGrpc}
    if protocol not in kinds:
        raise InvalidOptionError(f"protocol: got {protocol!r}, expected one of {', '.join(kinds)}")
    if "://" in url:
        raise InvalidOptionError(f"url: got {url!r}, expected host:port, such as 'localhost:8001'")
    return kinds[protocol](url, model)


class _Base:
    """What both clients share.

    Args:
        url: ``host:port`` of Triton's gRPC endpoint (8001), or of its HTTP endpoint (8000) with ``protocol="http"``.
        protocol: ``"grpc"``; ``"http"``; or ``"shared_memory"``: gRPC for a server on this machine, with latents and
            images in system shared memory.
        model: its name on the server: ``"vae_decoder"``, ``"vae_decoder_flux2"``, or, approximate, ``"vae_preview"``.
        timeout_s: from the call of ``decode`` to its answer, retries included.
        retries: how often a request is repeated that was refused before any work: no connection, a full queue. An
            error after that is never retried.
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
        """What a copy takes along, into another process too: everything but the connection, which it makes itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_transport"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._transport = _make_transport(self._protocol, self.url, self._model)

    def _pauses(self) -> Iterator[float]:
        """Seconds before each retry: longer and longer, and not all clients at once."""
        for attempt in range(self._retries):
            yield min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)

    def _next_pause(self, error: UnavailableError, pauses: Iterator[float], deadline: float) -> float:
        """How long to wait before the request is repeated; raises ``error`` where it is not to be."""
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
            latents: packed (B, patches, 64) with height and width, or unpacked (B, 16, lh, lw), scaled; any device.
                FLUX.2's and previews', one frame, and one image without its batch are as for ``Decoder.decode``. What
                comes out always has its batch.
            height, width: pixels. As the client does not know the server's checkpoint, but only the class its model's
                name stands for, they are also needed where an image of one family would be another's packed ones:
                (4, n, 64) to ``"vae_decoder"``.
            output_type: as for ``Decoder.decode``: ``"pil"``, ``"np"``, ``"pt"``, ``"uint8"``; or ``"raw"``:
                (B, 3, H, W) nominally in [-1, 1], not clamped. Tensors come as float32 on the CPU.
            latent_ids, raw: of FLUX.2's latents, as for ``Decoder.decode``.
            scaling_factor, shift_factor, batch_norm_eps: instead of the checkpoint's own; refused where it has none.
            priority: 1 is served first; None: the model's default.
            timeout_s: instead of the client's. Past it the server stops the decode (not over HTTP).
            request_id: for the server's log; None: a random one.

        Raises:
            InvalidLatentsError, InvalidOptionError, MemoryLimitError, NonFiniteOutputError: as the library would.
            DeadlineExceededError: no answer in time.
            UnavailableError: no connection, a full queue, no memory: the same request may work later.
            FluxVAEError: the server failed.
        """
        request = make_request(
            latents,
            model=self.model,
            height=height,
            width=width,
            output_type=output_type,
            latent_ids=latent_ids,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            batch_norm_eps=batch_norm_eps,
            raw=raw,
            priority=priority,
            request_id=request_id,
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
                    call.cancel()  # Ctrl-C here ends the decode there
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
        request = make_request(
            latents,
            model=self.model,
            height=height,
            width=width,
            output_type=output_type,
            latent_ids=latent_ids,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            batch_norm_eps=batch_norm_eps,
            raw=raw,
            priority=priority,
            request_id=request_id,
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
        # In a thread: shared memory registers a region, and large latents are copied.
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
