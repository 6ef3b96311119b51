"""Asks Triton on behalf of the gateway, over gRPC: for decodes and encodes, for a probe, for facts and metrics.

HTTP is not covered here, nor is what a client may ask for (`fluxvae.serve.gateway.remote_decode` and
`fluxvae.serve.gateway.remote_encode`).
"""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tritonclient.grpc.aio as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fluxvae.errors import DeadlineExceededError, FluxVAEError, UnavailableError
from fluxvae.serve.gateway.errors import BadGateway, InvalidRequest, ServerError
from fluxvae.serve.models import encoder_of, encodes, vae_class_of
from fluxvae.serve.triton.controls import CONFIG_HEADER
from fluxvae.serve.triton_words import passing_trouble

__all__ = ["MAX_ROWS", "Question", "TritonModel", "read_metrics"]

MAX_ROWS = 8
"""How many rows Triton takes in one request: the ``max_batch_size`` of the models' configuration."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # opens URLs directly, never through a proxy
_FACTS_TIMEOUT_S = 5.0
_ALIVE_TIMEOUT_S = 1.0
_FIRST = 1  # the model's highest priority, because a line of requests is no reason not to be ready
# By default gRPC waits up to two minutes between attempts to connect. So a restarted server is found in a second.
_CHANNEL = (
    ("grpc.enable_http_proxy", 0),
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
    "CANCELLED": UnavailableError,  # Triton did it, as it stops; a cancellation of ours does not come back as an error
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "NOT_FOUND": BadGateway,
    "UNIMPLEMENTED": BadGateway,
    "INTERNAL": ServerError,
}


class Question(NamedTuple):
    """What a model is asked: a request to it, of any number of rows."""

    inputs: Mapping[str, NDArray[Any]]
    """The input tensors by name. The first dimension of each is the batch."""
    output: str
    """The output that is asked for."""
    parameters: Mapping[str, Any]


_SIXTEEN = np.full((1, 1), 16, np.int32)
_PROBES = {
    # These latents are for a model with any features.
    False: Question(
        {"latents": np.zeros((1, 1, 1), np.float32), "height": _SIXTEEN, "width": _SIXTEEN}, "images", {"probe": True}
    ),
    True: Question({"images": np.zeros((1, 16, 16, 3), np.uint8)}, "latents", {"probe": True}),
}
"""What a model that decodes (false) or encodes (true) is asked in order to see that it works."""
_PROBED = ((1, 16, 16, 3), (1, 16, 16, 4))
"""The shapes that pictures may have which answer a probe: RGB and RGBA."""


class TritonModel:
    """One model on its Triton server. It must be made inside the event loop that uses it.

    Args:
        url: the ``host:port`` of Triton's gRPC endpoint.
        name: the model's name.
        config_key: the key for the model's configuration, where Triton guards it (`fluxvae.serve.triton.controls`).
    """

    def __init__(self, url: str, name: str, config_key: str | None = None) -> None:
        self.url = url
        self._headers = {} if config_key is None else {f"triton-grpc-protocol-{CONFIG_HEADER}": config_key}
        self.name = name
        self.approximate = vae_class_of(name) == "AutoencoderTiny"
        """Whether its pictures are previews."""
        self.encodes = encodes(name)
        """Whether it turns pictures into latents; otherwise it turns latents into pictures."""
        self.last_success: float | None = None
        """When a request was last answered, by ``time.monotonic``. None: not since one was told to try again later."""
        self._client = triton.InferenceServerClient(url, channel_args=list(_CHANNEL))

    async def close(self) -> None:
        """Close the channel. Requests that are on their way fail."""
        await self._client.close()

    async def ask(self, question: Question, *, request_id: str, timeout_s: float) -> NDArray[Any]:
        """Have the model work, in several requests one after another where there are more than `MAX_ROWS` rows.

        Cancelling this cancels the work.

        Returns:
            The output that was asked for, with its batch.

        Raises:
            FluxVAEError: Triton's error, as one that has the right HTTP status.
        """
        deadline = time.monotonic() + timeout_s
        rows = next(iter(question.inputs.values())).shape[0]
        whole: NDArray[Any] | None = None
        for start in range(0, rows, MAX_ROWS):
            part = {name: array[start : start + MAX_ROWS] for name, array in question.inputs.items()}
            left = max(deadline - time.monotonic(), 1e-3)
            answer = await self._infer(question._replace(inputs=part), request_id=request_id, timeout_s=left)
            if rows <= MAX_ROWS:
                return answer
            if whole is None:  # made for all rows at once, because joining the parts at the end would hold them twice
                whole = np.empty((rows, *answer.shape[1:]), answer.dtype)
            whole[start : start + MAX_ROWS] = answer
        assert whole is not None, "a question has at least one row"
        return whole

    async def alive(self) -> bool:
        """Return whether Triton itself answers now. Where it has died, the connection is refused at once."""
        try:
            return bool(await self._client.is_server_live(client_timeout=_ALIVE_TIMEOUT_S))
        except InferenceServerException:
            return False

    async def probe(self, timeout_s: float) -> None:
        """Decode or encode 16x16 pixels, which alone proves that the model, its process and its weights are there.

        Raises:
            FluxVAEError: the model did not answer, or not with pixels or latents.
        """
        answer = await self._infer(_PROBES[self.encodes], request_id="readyz", timeout_s=timeout_s, priority=_FIRST)
        # A token has as many features as the model's latents, which only the model knows.
        fits = answer.ndim == 3 and answer.shape[:2] == (1, 1) if self.encodes else answer.shape in _PROBED
        if not fits:
            raise BadGateway(f"model {self.name}: a probe of 16x16 pixels answered with shape {answer.shape}")

    async def facts(self) -> dict[str, Any]:
        """Return the server's version, and the model's settings from its configuration.

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
            "encodes": self.encodes,
            "encoder": encoder_of(self.name),  # the name of the model that encodes such latents; null for previews
            "triton": server.get("version", ""),
            "max_batch_size": int(config.get("max_batch_size", 0)),
            "settings": {name: value for name, value in sorted(settings.items()) if value and not name.isupper()},
        }

    async def _infer(self, question: Question, *, request_id: str, timeout_s: float, priority: int = 0) -> NDArray[Any]:
        inputs = []
        for name, array in question.inputs.items():
            inputs.append(triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        try:
            result = await self._client.infer(
                self.name,
                inputs,
                outputs=[triton.InferRequestedOutput(question.output)],
                request_id=request_id,
                priority=priority,
                timeout=max(1, int(timeout_s * 1e6)),  # so that Triton does nothing for a caller who has given up
                client_timeout=timeout_s,
                parameters=dict(question.parameters) or None,
            )
        except InferenceServerException as error:
            translated = self._translate(error)
            if isinstance(translated, UnavailableError):  # so that an earlier success proves nothing any more
                self.last_success = None
            raise translated from error
        answer: NDArray[Any] | None = result.as_numpy(question.output)
        if answer is None:
            raise BadGateway(f"model {self.name}: the answer holds no {question.output}; is it fluxvae's model?")
        self.last_success = time.monotonic()
        return answer

    def _translate(self, error: InferenceServerException) -> FluxVAEError:
        code = (error.status() or "").removeprefix("StatusCode.")
        message = error.message() or str(error)
        if code == "INTERNAL" and (trouble := passing_trouble(message)):
            return UnavailableError(f"{trouble}; try again")
        kind = _ERRORS.get(code, ServerError)
        if kind is DeadlineExceededError or "timeout expired" in message:  # the words for one in its queue
            made, work = ("latents were", "encode") if self.encodes else ("image was", "decode")
            return DeadlineExceededError(
                f"the {made} not ready in time; the {work} was cancelled. Allow more with --timeout"
            )
        if kind is UnavailableError:
            return UnavailableError(f"Triton cannot take this request now ({_shorten(message)}); try again")
        if kind is BadGateway:
            return BadGateway(f"Triton does not serve the model {self.name!r} ({_shorten(message)})")
        return kind(message)


async def read_metrics(url: str, timeout_s: float = 5.0) -> str | None:
    """Return Triton's Prometheus page; None where it cannot be had."""

    def read() -> str | None:
        try:
            with _DIRECT.open(url, timeout=timeout_s) as answer:
                return str(answer.read().decode())
        except OSError:
            return None

    return await asyncio.to_thread(read)


def _shorten(message: str) -> str:
    """Return the first line of a message, cut to a length: gRPC's own are long, and name addresses."""
    return message.partition("\n")[0][:200]
