"""Clients for our Triton models: a server decodes and encodes for them as `fluxvae.Decoder` and `Encoder` would here.

    with fluxvae.client.Client("localhost:8001") as client:
        latents = client.encode(picture)
        [image] = client.decode(latents, height=1024, width=1024)

    fluxvae.client.install(pipe, "gpu-box:8001")   # from now on the pipeline decodes and encodes on that server

Needs the extra: ``pip install 'fluxvae[client]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fluxvae.extras import needs

with needs("client", "fluxvae.client"):
    from fluxvae.serve.client.clients import AsyncClient, Client

if TYPE_CHECKING:
    from fluxvae.serve.client.remote_vae import Installed, RemoteVAE, install

__all__ = ["AsyncClient", "Client", "Installed", "RemoteVAE", "install"]


def __getattr__(name: str) -> Any:
    """Import what needs diffusers only when it is first used: the clients themselves do not even need PyTorch."""
    if name not in ("Installed", "RemoteVAE", "install"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module("fluxvae.serve.client.remote_vae"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
