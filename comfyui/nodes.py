"""The two nodes: what they take, and the VAEs that they make."""

from __future__ import annotations

import logging
import os

from comfy_api.latest import io

from .exact_vae import ExactVAE
from .remote_vae import KINDS, RemoteVAE, read_server
from .weights import Unsupported

__all__ = ["ExactVAENode", "RemoteVAENode"]

log = logging.getLogger(__name__)

_CATEGORY = "latent/fluxvae"
_GIB = 2**30
_PASS, _REFUSE = "pass through", "refuse"


class ExactVAENode(io.ComfyNode):
    """Makes a VAE exact and bounded in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="FluxvaeExactVAE",
            display_name="fluxvae VAE",
            category=_CATEGORY,
            description="Gives a VAE that decodes and encodes the whole picture exactly, without tiles, within the "
            "memory limit. Put it between a VAE loader and VAE Decode, VAE Encode, or any other node that takes a VAE.",
            inputs=[
                io.Vae.Input(
                    "vae",
                    tooltip="Of FLUX.1, FLUX.2, Qwen-Image, Wan 2.1 (single frames), SD, SDXL, SD3, or a model that "
                    "borrows one of these.",
                ),
                io.Float.Input(
                    "memory_limit", default=2.0, min=0.0, max=1024.0, step=0.1, round=0.01,
                    tooltip="GiB that a decode or an encode may add above the loaded weights. 0: what is free then. "
                    "Less memory takes more time; a limit that is too small says what the smallest is.",
                ),
                io.Combo.Input(
                    "other_vaes", options=[_PASS, _REFUSE], default=_PASS,
                    tooltip="What to do with a VAE of another kind, such as a video model's or a preview's: pass it "
                    "through as it is, with a warning in the log, or stop.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="VAE")],
        )  # fmt: skip

    @classmethod
    def execute(cls, vae, memory_limit: float, other_vaes: str) -> io.NodeOutput:
        """Return the exact VAE, or the given one where it is of another kind and that is allowed."""
        try:
            return io.NodeOutput(ExactVAE(vae, round(memory_limit * _GIB) or None))
        except Unsupported as error:
            what = f"vae: fluxvae does not compute this VAE: {error}"
            if other_vaes == _REFUSE:
                raise ValueError(
                    f"{what}; connect it without the fluxvae node, or set other_vaes to {_PASS!r}"
                ) from error
            log.warning("%s; it is passed through as it is", what)
            return io.NodeOutput(vae)


class RemoteVAENode(io.ComfyNode):
    """Makes a VAE that is on a fluxvae server."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="FluxvaeRemoteVAE",
            display_name="fluxvae remote VAE",
            category=_CATEGORY,
            description="Gives a VAE that decodes and encodes on a fluxvae server (`fluxvae serve`), which sends back "
            "the exact picture. No VAE has to be loaded here.",
            inputs=[
                io.String.Input(
                    "address", default="http://127.0.0.1:8080", tooltip="Of the server's gateway: http:// or https://."
                ),
                io.Combo.Input(
                    "latents", options=list(KINDS), default=next(iter(KINDS)),
                    tooltip="Whose latents are decoded and made: FLUX.1's and those of models that borrow its VAE, "
                    "SD3's, FLUX.2's, or Qwen-Image's. The server must have a model for them. FLUX.1's, SD3's and "
                    "Qwen-Image's have the same shape, so a wrong choice among these cannot be noticed.",
                ),
                io.String.Input(
                    "token_variable", default="FLUXVAE_TOKEN", optional=True,
                    tooltip="The environment variable of ComfyUI that holds the server's token; it is read when the "
                    "node runs. The token itself does not belong here: ComfyUI saves what is typed into nodes in "
                    "every picture.",
                ),
                io.Float.Input(
                    "timeout", default=300.0, min=1.0, max=86400.0, step=1.0, optional=True,
                    tooltip="Seconds that one picture may take, from sending it to its answer.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="VAE")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, address: str, latents: str, token_variable: str = "FLUXVAE_TOKEN", timeout: float = 300.0
    ) -> io.NodeOutput:
        """Ask the server what it serves, and return its VAE."""
        token = os.environ.get(token_variable, "") if token_variable else ""
        server = read_server(address, token, timeout, kind=KINDS[latents], token_variable=token_variable)
        return io.NodeOutput(RemoteVAE(server))
