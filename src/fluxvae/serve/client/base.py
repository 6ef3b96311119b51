"""What the sync and the async client share: their methods, whose requests each of them sends in its own way."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from numpy.typing import NDArray

from fluxvae.errors import InvalidOptionError, UnavailableError
from fluxvae.latents.reading import Reading
from fluxvae.serve.client.decoding import make_decode_request
from fluxvae.serve.client.encoding import make_encode_request, resolve_encoder
from fluxvae.serve.client.http_transport import Http
from fluxvae.serve.client.shared_memory import SharedMemoryGrpc
from fluxvae.serve.client.transports import Grpc, Transport
from fluxvae.serve.client.wire import Request, refused_before_work

if TYPE_CHECKING:
    import torch

__all__ = ["Base"]

Answer = TypeVar("Answer")
"""What the methods return: the answer itself, or a coroutine that does."""

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


def _make_transport(protocol: str, url: str) -> Transport:
    """Return the transport of this name: ``"grpc"``, ``"http"`` or ``"shared_memory"``."""
    kinds: dict[str, Callable[[str], Transport]] = {"grpc": Grpc, "http": Http, "shared_memory": SharedMemoryGrpc}
    if protocol not in kinds:
        raise InvalidOptionError(f"protocol: got {protocol!r}, expected one of {', '.join(kinds)}")
    if "://" in url:
        raise InvalidOptionError(f"url: got {url!r}, expected host:port, such as 'localhost:8001'")
    return kinds[protocol](url)


class Base(ABC, Generic[Answer]):
    """What both clients share. Arguments and errors are those of `fluxvae.client.Client`."""

    def __init__(
        self,
        url: str,
        *,
        protocol: str = "grpc",
        model: str = "vae_decoder",
        encoder_model: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 4,
    ) -> None:
        if timeout_s <= 0:
            raise InvalidOptionError(f"timeout_s: got {timeout_s!r}, expected seconds above 0")
        if retries < 0:
            raise InvalidOptionError(f"retries: got {retries!r}, expected 0 or more")
        self.url = url
        self.model = model
        self.encoder_model = resolve_encoder(model, encoder_model)
        """The name of the model that encodes. None where none is known."""
        self._timeout_s = timeout_s
        self._retries = retries
        self._protocol = protocol
        self._transport = _make_transport(protocol, url)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes along, also into another process: all but the connection, which it makes itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_transport"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._transport = _make_transport(self._protocol, self.url)

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
        feature_order: str | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Answer:
        """Decode latents on the server.

        Args:
            latents: packed (B, patches, 64) with height and width, or unpacked (B, 16, lh, lw); float32, bfloat16 or
                float16; scaled, as the transformer leaves them; on any device. FLUX.2's latents, previews', one frame,
                and one image without its batch may be given as to ``Decoder.decode``; the layers of one picture as a
                batch.
            height, width: the size of the image in pixels. The client does not know the server's checkpoint, but only
                the class that its model's name stands for. So they are also needed where an image of one family has
                the shape of another's packed latents: (4, n, 64) to ``"vae_decoder"``.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"uint8"`` as for ``Decoder.decode``, or ``"raw"``:
                (B, 3, H, W), nominally in [-1, 1], as ``Decoder.decode_raw`` gives them. Tensors are float32, on the
                CPU. Where the server's pictures are RGBA, all have four channels.
            latent_ids, raw, feature_order: for FLUX.2's latents, as for ``Decoder.decode``.
            scaling_factor, shift_factor, batch_norm_eps: are used instead of the checkpoint's own. They are refused
                where it has none.
            priority: requests with 1 are served first. None is the model's default.
            timeout_s: is used instead of the client's. After it the server stops its work, except over HTTP.
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
            shift_factor=shift_factor, batch_norm_eps=batch_norm_eps, raw=raw, feature_order=feature_order,
        )  # fmt: skip
        make = partial(
            make_decode_request, latents, reading, model=self.model, output_type=output_type, priority=priority,
            request_id=request_id,
        )  # fmt: skip
        return self.send(make, timeout_s)

    def encode(
        self,
        images: Any,
        *,
        packed: bool = True,
        sample: int | None = None,
        resize: bool = False,
        raw: bool = False,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        batch_norm_eps: float | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Answer:
        """Encode pictures on the server.

        Args:
            images: a PIL image or a list of them, an array (B, H, W, 3) or (H, W, 3) of uint8 or of floats in [0, 1],
                or a tensor (B, 3, H, W) or (3, H, W) of floats in [0, 1], on any device; as ``Encoder.encode`` takes
                them. The server takes up to 8 pictures in a request.
            packed: whether the latents come as tokens.
            sample: None takes the mode of the distribution. A seed, from 0 to 2**63 - 1, draws from it as
                ``Encoder.encode`` does with ``torch.Generator("cpu").manual_seed(sample)``.
            resize: make a size that does not fit smaller, as for ``Encoder.encode``. Arrays of float64 are
                refused then.
            raw: whether the latents are the VAE's own, without the model's scaling.
            scaling_factor, shift_factor, batch_norm_eps: are used instead of the checkpoint's own. They are refused
                where it has none.
            priority, timeout_s, request_id: as for `decode`.

        Returns:
            The latents that ``Encoder.encode`` returns, with the same values where the server has the exact engine, in
            float32 whatever the dtype of the server's VAE: (B, gh*gw, 4*C); or (B, C, lh, lw), for FLUX.2 in patches
            (B, 4*C, gh, gw), where ``packed`` is false; raw ones that are not packed (B, C, lh, lw). Tensors give a
            tensor on the CPU, arrays and PIL images an array.

        Raises:
            InvalidImagesError, InvalidOptionError, MemoryLimitError, NonFiniteOutputError: as the library would.
            DeadlineExceededError, UnavailableError, FluxVAEError: as for `decode`.
        """
        make = partial(
            make_encode_request, images, model=self.encoder_model, packed=packed, sample=sample, resize=resize, raw=raw,
            scaling_factor=scaling_factor, shift_factor=shift_factor, batch_norm_eps=batch_norm_eps,
            priority=priority, request_id=request_id,
        )  # fmt: skip
        return self.send(make, timeout_s)

    @abstractmethod
    def send(self, make: Callable[[], Request], timeout_s: float | None = None) -> Answer:
        """Make a request, send it, and return what it reads from its answer. `decode` and `encode` do this.

        Args:
            make: makes the request, or raises what is wrong with it.
            timeout_s: as for `decode`.
        """

    def _deadline(self, timeout_s: float | None) -> float:
        """Return when a call that begins now is to have its answer, on the monotonic clock."""
        return time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)

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
