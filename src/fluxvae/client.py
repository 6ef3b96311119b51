"""Clients for the Triton model: latents to a server, the images back, as `fluxvae.Decoder` would give them.

    with fluxvae.client.Client("localhost:8001") as client:
        [image] = client.decode(latents, height=1024, width=1024)

    fluxvae.client.install(pipe, "gpu-box:8001")   # pipe decodes there from now on

Needs the extra: ``pip install fluxvae[serve]``.
"""

from __future__ import annotations

from fluxvae.serve.client.clients import AsyncClient, Client
from fluxvae.serve.client.remote_vae import Installed, RemoteVAE, install

__all__ = ["AsyncClient", "Client", "Installed", "RemoteVAE", "install"]
