"""How these tests talk to the server: the same request over HTTP or gRPC, and several at once."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fluxvae import Decoder, SizeFlooredWarning
from fluxvae.serve.triton.server import TritonServer

Protocol = Literal["http", "grpc"]
PROTOCOLS: tuple[Protocol, ...] = ("http", "grpc")
GATHER = "vae_decoder_gather"
GATHER_ENCODES = "vae_encoder_gather"
GATHER_ROWS = 8
_TIMEOUT_S = 200.0

BAD_REQUEST = {"http": "400", "grpc": "StatusCode.INVALID_ARGUMENT"}
SERVER_ERROR = {"http": "500", "grpc": "StatusCode.INTERNAL"}
NOT_FOUND = {"http": "404", "grpc": "StatusCode.NOT_FOUND"}


def random_latents(seed: int, height: int, width: int, batch: int = 1) -> np.ndarray:
    patches = (height // 16) * (width // 16)
    return np.random.default_rng(seed).standard_normal((batch, patches, 64), dtype=np.float32)


@dataclass(frozen=True)
class Request:
    latents: np.ndarray
    height: int
    width: int
    outputs: tuple[str, ...] | None = ("images",)
    parameters: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, np.ndarray | None] = field(default_factory=dict)
    """Tensors that replace the usual inputs, by name; None leaves an input out."""

    def arrays(self) -> dict[str, np.ndarray]:
        rows = (len(self.latents), 1)
        usual = {
            "latents": self.latents,
            "height": np.full(rows, self.height, np.int32),
            "width": np.full(rows, self.width, np.int32),
        }
        return {name: array for name, array in {**usual, **self.inputs}.items() if array is not None}


@dataclass(frozen=True)
class Serving:
    server: TritonServer
    library: Decoder

    @property
    def exact(self) -> bool:
        """Whether the engine promises the same bits in any batch. Only diffusers' engine does not."""
        return self.library.engine.name == "exact"

    def infer(self, protocol: Protocol, request: Request, model: str = "vae_decoder") -> dict[str, np.ndarray]:
        """Send one request and return its outputs. Raises InferenceServerException when the server refuses it."""
        module: Any = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
        inputs = []
        for name, array in request.arrays().items():
            tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        asked = request.outputs and [module.InferRequestedOutput(name) for name in request.outputs]
        options: dict[str, Any] = {"outputs": asked, "parameters": request.parameters or None}
        if protocol == "http":
            options_of_client = {"connection_timeout": _TIMEOUT_S, "network_timeout": _TIMEOUT_S}
            client = module.InferenceServerClient(self.server.http_url, **options_of_client)
        else:
            client = module.InferenceServerClient(self.server.grpc_url)
            options["client_timeout"] = _TIMEOUT_S
        with client:  # an HTTP connection that stays open, even idle, delays the server's shutdown
            result = client.infer(model, inputs, **options)
            response = result.get_response()
            outputs = response["outputs"] if protocol == "http" else response.outputs
            names = [output["name"] if protocol == "http" else output.name for output in outputs]
            return {name: result.as_numpy(name) for name in names}

    def infer_together(
        self, protocol: Protocol, requests: Sequence[Request]
    ) -> list[dict[str, np.ndarray] | InferenceServerException]:
        """Send requests so that they share one ``execute``, and return their answers.

        They go to the gathering model, which waits until it has 8 rows. Its counts prove that it has run once.
        """
        assert sum(len(request.latents) for request in requests) == GATHER_ROWS

        def one(request: Request) -> dict[str, np.ndarray] | InferenceServerException:
            try:
                return self.infer(protocol, request, GATHER)
            except InferenceServerException as error:
                return error

        before = self._executions()
        with ThreadPoolExecutor(len(requests)) as pool:
            answers = list(pool.map(one, requests))
        deadline = time.monotonic() + 60
        while (after := self._executions()) == before:  # Triton counts only after it has sent the answers
            assert time.monotonic() < deadline, "no execute was counted"
            time.sleep(0.01)
        assert after - before == Counter({GATHER_ROWS: 1})
        return answers

    def _executions(self) -> Counter[int]:
        """How many times the gathering model has run, by the rows of an ``execute``."""
        with tritonclient.http.InferenceServerClient(self.server.http_url) as client:
            [statistics] = client.get_inference_statistics(GATHER)["model_stats"]
        return Counter(
            {batch["batch_size"]: batch["compute_infer"]["count"] for batch in statistics.get("batch_stats", [])}
        )

    def decode(self, request: Request, output_type: str = "uint8") -> Any:
        """The image that the library decodes the same request to."""
        factors = {k: v for k, v in request.parameters.items() if k.endswith("_factor")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SizeFlooredWarning)
            return self.library.decode(
                torch.from_numpy(request.latents),
                height=request.height,
                width=request.width,
                output_type=output_type,  # type: ignore[arg-type]
                **factors,
            )

    def decode_raw(self, request: Request) -> np.ndarray:
        """The library's pixels in about [-1, 1], before any post-processing."""
        return self.library.decode_raw(
            torch.from_numpy(request.latents), height=request.height, width=request.width
        ).numpy()

    def assert_same_pixels(self, images: np.ndarray, request: Request) -> None:
        """Assert that ``images`` (uint8) are those of the library."""
        assert_same_pixels(images, self.decode(request), exact=self.exact)


def assert_same_pixels(images: np.ndarray, expected: np.ndarray, *, exact: bool) -> None:
    """Assert that pixels are the same bits. diffusers' engine wavers from batch to batch, so it may be off by one."""
    assert (images.shape, images.dtype) == (expected.shape, np.uint8)
    if exact:
        np.testing.assert_array_equal(images, expected)
        return
    difference = np.abs(images.astype(np.int16) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001
