"""What the tests know of the server that serves every model: `conftest.family`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fluxvae import Decoder, Encoder
from fluxvae.client import Client
from fluxvae.serve.models import MODELS
from fluxvae.serve.triton.server import TritonServer
from serve.client import Request, Serving

FLUX1, FLUX2, QWEN_IMAGE, PREVIEW, *ENCODERS = MODELS
DECODERS = (FLUX1, FLUX2, QWEN_IMAGE, PREVIEW)


@dataclass(frozen=True)
class Family:
    """A server, and for each of its models the library with the same weights."""

    server: TritonServer
    library: dict[str, Decoder]
    encoders: dict[str, Encoder]

    def serving(self, model: str) -> Serving:
        return Serving(self.server, self.library[model])

    def infer_pictures(self, request: Request, model: str) -> dict[str, np.ndarray]:
        """Send a request whose pictures, not latents, are in ``request.latents``."""
        inputs = {"images": request.latents, "latents": None, "height": None, "width": None}
        return Serving(self.server, self.library[FLUX1]).infer("grpc", replace(request, inputs=inputs), model)

    def client(self, model: str) -> Client:
        return Client(self.server.grpc_url, model=model)
