"""From the gateway to Triton over gRPC: one decode, a probe that proves readiness, facts for people, metrics.

Not covered here: HTTP, and what a client may ask for (`fluxvae.serve.gateway.remote_decode`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import urllib.request
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from fluxvae.errors import DeadlineExceededError, FluxVAEError, UnavailableError
from fluxvae.serve.gateway.errors import BadGateway, InvalidRequest, ServerError
from fluxvae.serve.gateway.latents import Latents
from fluxvae.serve.gateway.remote_decode import Asked
from fluxvae.serve.models import vae_class_of
from fluxvae.serve.triton.controls import CONFIG_HEADER
from fluxvae.serve.triton_words import passing_trouble

__all__ = ["MAX_ROWS", "Readiness", "TritonModel", "read_metrics"]

MAX_ROWS = 8
"""The ``max_batch_size`` of the models' configuration: what Triton takes in one request."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # Triton is near: never through a proxy
_FACTS_TIMEOUT_S = 5.0
_ALIVE_TIMEOUT_S = 1.0
_FIRST = 1  # the model's highest priority: what waits is no reason not to be ready, what does not move is
# gRPC waits up to two minutes between attempts to reach a server that went away; a restarted one is back in seconds.
_CHANNEL = (
    ("grpc.enable_http_proxy", 0),  # Triton is near
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
_ERRORS: dict[str, type[FluxVAEError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "UNAVAILABLE": UnavailableError,
    "RESOURCE_EXHAUSTED": UnavailableError,
    "CANCELLED": UnavailableError,  # by Triton, as it stops: our own cancellation does not come back as an error
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "NOT_FOUND": BadGateway,
    "UNIMPLEMENTED": BadGateway,
    "INTERNAL": ServerError,
}


class TritonModel:
    """The model on its Triton server. To be made inside the event loop that uses it.

    Args:
        url: ``host:port`` of Triton's gRPC endpoint.
        name: of the model.
        config_key: opens the model's configuration, where Triton guards it (`fluxvae.serve.triton.controls`).
    """

    def __init__(self, url: str, name: str, config_key: str | None = None) -> None:
        self.url = url
        self._headers = {} if config_key is None else {f"triton-grpc-protocol-{CONFIG_HEADER}": config_key}
        self.name = name
        self.approximate = vae_class_of(name) == "AutoencoderTiny"
        """Its pictures are previews."""
        self.last_success: float | None = None
        """When the last decode answered, by ``time.monotonic``; None: not since one was told to try again."""
        self._client = triton.InferenceServerClient(url, channel_args=list(_CHANNEL))

    async def close(self) -> None:
        """Close the channel; what is in flight fails."""
        await self._client.close()

    async def decode(self, asked: Asked, latents: Latents, *, request_id: str, timeout_s: float) -> Any:
        """One request to the model; one after the other where it has more than `MAX_ROWS` rows. Cancelling it cancels
        the decode.

        Returns:
            ``bytes`` of the picture for ``images_encoded``, else the output's array, with its batch.

        Raises:
            FluxVAEError: what Triton answered, as its HTTP equivalent.
        """
        parameters = dict(latents.parameters)
        if asked.output == "images_encoded":
            parameters["format"] = asked.image_format
        deadline = time.monotonic() + timeout_s
        rows = latents.array.shape[0]
        whole: NDArray[Any] | None = None
        for start in range(0, rows, MAX_ROWS):
            answer = await self._infer(
                latents.array[start : start + MAX_ROWS],
                latents.height,
                latents.width,
                asked.output,
                parameters,
                request_id=request_id,
                timeout_s=max(deadline - time.monotonic(), 1e-3),
            )
            if rows <= MAX_ROWS:
                return bytes(answer[0, 0]) if asked.output == "images_encoded" else answer
            if whole is None:  # once, for all rows: joining the parts in the end would need them twice
                whole = np.empty((rows, *answer.shape[1:]), answer.dtype)
            whole[start : start + MAX_ROWS] = answer
        return whole

    async def alive(self) -> bool:
        """Whether Triton itself answers, now. Where it has died, the connection is refused at once."""
        try:
            return bool(await self._client.is_server_live(client_timeout=_ALIVE_TIMEOUT_S))
        except InferenceServerException:
            return False

    async def probe(self, timeout_s: float) -> None:
        """Decode 16x16 pixels: the one proof that the model, its process and its weights are there.

        Raises:
            FluxVAEError: it did not answer, or not with pixels.
        """
        latents, parameters = np.zeros((1, 1, 1), np.float32), {"probe": True}  # whatever the model's features are
        answer = await self._infer(
            latents, 16, 16, "images", parameters, request_id="readyz", timeout_s=timeout_s, priority=_FIRST
        )
        if answer.shape != (1, 16, 16, 3):
            raise BadGateway(f"model {self.name}: a probe of 16x16 pixels answered with shape {answer.shape}")

    async def facts(self) -> dict[str, Any]:
        """The server's version and the model's settings, from its configuration.

        Raises:
            FluxVAEError: Triton does not answer.
        """
        try:
            server = await self._client.get_server_metadata(as_json=True, client_timeout=_FACTS_TIMEOUT_S)
            answer = await self._client.get_model_config(
                self.name, as_json=True, headers=self._headers, client_timeout=_FACTS_TIMEOUT_S
            )
        except InferenceServerException as error:
            raise self._translate(error) from error
        config = answer["config"]
        settings = {name: value.get("string_value", "") for name, value in config.get("parameters", {}).items()}
        return {
            "model": self.name,
            "vae_class": vae_class_of(self.name),
            "approximate": self.approximate,
            "triton": server.get("version", ""),
            "max_batch_size": int(config.get("max_batch_size", 0)),
            "settings": {name: value for name, value in sorted(settings.items()) if value and not name.isupper()},
        }

    async def _infer(
        self,
        latents: NDArray[np.float32],
        height: int,
        width: int,
        output: str,
        parameters: dict[str, Any],
        *,
        request_id: str,
        timeout_s: float,
        priority: int = 0,
    ) -> NDArray[Any]:
        rows = latents.shape[0]
        inputs = [triton.InferInput("latents", list(latents.shape), "FP32")]
        inputs[0].set_data_from_numpy(latents)
        for name, value in (("height", height), ("width", width)):
            inputs.append(triton.InferInput(name, [rows, 1], "INT32"))
            inputs[-1].set_data_from_numpy(np.full((rows, 1), value, np.int32))
        try:
            result = await self._client.infer(
                self.name,
                inputs,
                outputs=[triton.InferRequestedOutput(output)],
                request_id=request_id,
                priority=priority,
                timeout=max(1, int(timeout_s * 1e6)),  # in Triton's queue: no decode for a caller who gave up
                client_timeout=timeout_s,
                parameters=parameters or None,
            )
        except InferenceServerException as error:
            translated = self._translate(error)
            if isinstance(translated, UnavailableError):  # what answered before may be gone
                self.last_success = None
            raise translated from error
        answer: NDArray[Any] | None = result.as_numpy(output)
        if answer is None:
            raise BadGateway(f"model {self.name}: the answer holds no {output}; is it fluxvae's model?")
        self.last_success = time.monotonic()
        return answer

    def _translate(self, error: InferenceServerException) -> FluxVAEError:
        code = (error.status() or "").removeprefix("StatusCode.")
        message = error.message() or str(error)
        if code == "INTERNAL" and (trouble := passing_trouble(message)):
            return UnavailableError(f"{trouble}; try again")
        kind = _ERRORS.get(code, ServerError)
        if kind is DeadlineExceededError or "timeout expired" in message:  # the latter in Triton's queue
            return DeadlineExceededError(
                "the image was not ready in time; the decode was cancelled. Allow more with --timeout"
            )
        if kind is UnavailableError:
            return UnavailableError(f"Triton cannot take this request now ({_shorten(message)}); try again")
        if kind is BadGateway:
            return BadGateway(f"Triton does not serve the model {self.name!r} ({_shorten(message)})")
        return kind(message)


class Readiness:
    """Whether decodes are answered: by the last one that was, or by a probe. Many askers share one probe.

    Args:
        model: what to ask.
        age_s: a decode that answered this recently is proof enough.
        timeout_s: how long a probe may take.
    """

    def __init__(self, model: TritonModel, *, age_s: float = 3.0, timeout_s: float = 5.0) -> None:
        self._model = model
        self._age_s = age_s
        self._timeout_s = timeout_s
        self._probe: asyncio.Task[str | None] | None = None

    async def reason_against(self) -> str | None:
        """None where decodes are answered, else what stands against it."""
        last = self._model.last_success
        if last is not None and time.monotonic() - last <= self._age_s and await self._model.alive():
            return None
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._ask())
        return await asyncio.shield(self._probe)  # one asker who leaves does not end it for the others

    async def close(self) -> None:
        """End a probe that is under way."""
        if self._probe is not None:
            self._probe.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probe

    async def _ask(self) -> str | None:
        try:
            await self._model.probe(self._timeout_s)
        except DeadlineExceededError:
            return f"a decode of 16x16 pixels was not answered within {self._timeout_s:g} s"
        except FluxVAEError as error:
            return str(error)
        return None


async def read_metrics(url: str, timeout_s: float = 5.0) -> str | None:
    """Triton's Prometheus page; None where it cannot be had."""

    def read() -> str | None:
        try:
            with _DIRECT.open(url, timeout=timeout_s) as answer:
                return str(answer.read().decode())
        except OSError:
            return None

    return await asyncio.to_thread(read)


def _shorten(message: str) -> str:
    """The first line, within reason: gRPC's own messages run long and name addresses."""
    return message.partition("\n")[0][:200]
