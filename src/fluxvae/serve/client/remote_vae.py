"""Diffusers pipelines that decode on a server: `RemoteVAE` in place of ``pipe.vae``, and `install` in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput

from fluxvae.checkpoints import ASSETS
from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.layout import read_layout, unpacked_shape
from fluxvae.serve.client.clients import Client

__all__ = ["Installed", "RemoteVAE", "install"]


class RemoteVAE(torch.nn.Module):
    """In place of ``pipe.vae`` where a diffusers pipeline only decodes: the decode happens on the server.

    The pipeline's own post-processing follows, so its images are those of a local `fluxvae` decode in the server's
    dtype. Images of a batch go one by one. ``encode`` is not there: image-to-image pipelines need a real VAE.

    Args:
        client: how to reach the server, or its gRPC ``host:port``.
        config: of the VAE, as ``pipe.vae.config``; None: FLUX.1's.
        bn: of FLUX.2's VAE, ``pipe.vae.bn``: its pipelines rescale latents themselves.
        options: for `Client`, where ``client`` is an address.
    """

    def __init__(
        self,
        client: Client | str,
        config: Mapping[str, Any] | None = None,
        bn: torch.nn.BatchNorm2d | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.client = Client(client, **options) if isinstance(client, str) else client
        if config is None:
            config = AutoencoderKL.load_config(ASSETS / "flux1")
        if bn is not None:
            self.bn = bn
        self.config = FrozenDict(config)
        """What pipelines read: scale, shift, block widths."""
        # Without weights; moved and cast with the pipeline, it tells where and in what dtype latents are expected.
        self._where: torch.Tensor
        self.register_buffer("_where", torch.empty(0, dtype=torch.float32, device="cpu"), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where pipelines put latents: no matter to the server."""
        return self._where.device

    @property
    def dtype(self) -> torch.dtype:
        """What pipelines cast latents to."""
        return self._where.dtype

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: object = None) -> Any:
        """As ``AutoencoderKL.decode``: raw latents (B, C, lh, lw) to (B, 3, H, W) in their dtype, on their device.

        One frame, (B, C, 1, lh, lw), and one image without its batch, (C, lh, lw), are taken too.

        Raises:
            InvalidLatentsError: other shapes: packed latents are not raw.
        """
        flux2 = "batch_norm_eps" in self.config
        z = z.reshape(self._images(z))
        raw: dict[str, Any] = {"raw": True} if flux2 else {"scaling_factor": 1.0, "shift_factor": 0.0}
        parts = [self.client.decode(one[None], output_type="raw", **raw) for one in z]
        sample = torch.cat(parts).to(device=z.device, dtype=z.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _images(self, z: torch.Tensor) -> tuple[int, ...]:
        """The shape of raw latents with their batch and without frames."""
        format = LatentFormat(channels=self.config["latent_channels"])  # raw ones are never in patches
        shape, scale = tuple(z.shape), format.vae_scale_factor
        # A VAE is given images: theirs is the size that tells (C, n, 4*C) from packed latents.
        size = (shape[-2] * scale, shape[-1] * scale) if len(shape) > 2 else ()
        layout = read_layout(shape, (format,), *size)
        if layout.packed:
            raise InvalidLatentsError(
                f"z: got shape {shape}, which are packed latents; expected raw ones {unpacked_shape(format)}, which "
                "AutoencoderKL.decode takes: unpack and rescale them first, or pass them to Client.decode"
            )
        return layout.shape

    def encode(self, *_: object, **__: object) -> Any:
        """Refused: only decoding is remote."""
        raise InvalidOptionError("vae: fluxvae.client.RemoteVAE only decodes; encode with an AutoencoderKL")


class Installed:
    """What `install` put into a pipeline; `remove` puts the pipeline's own VAE back. Also a context manager."""

    def __init__(self, pipe: Any, vae: RemoteVAE) -> None:
        self.vae = vae
        self._pipe, self._before = pipe, pipe.vae
        pipe.vae = vae

    def remove(self) -> None:
        """Undo `install` and close the connection; a second call does nothing."""
        if self._pipe is not None:
            self._pipe.vae, self._pipe = self._before, None
            self.vae.client.close()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def install(pipe: Any, url: str, **options: Any) -> Installed:
    """Make a diffusers pipeline decode on another machine.

    A pipeline loaded with ``vae=None`` never has the VAE's weights here; FLUX.1's configuration is used then. FLUX.2's
    pipelines need their VAE, of which the statistics of latents stay in use, and decode with ``vae_decoder_flux2``.

    Args:
        pipe: a pipeline with a ``vae``.
        url: the server's gRPC ``host:port``.
        options: for `Client`: ``protocol``, ``model``, ``timeout_s``, ``retries``.

    Returns:
        A handle whose ``remove()`` undoes it.
    """
    vae = getattr(pipe, "vae", None)
    if isinstance(vae, RemoteVAE):
        raise InvalidOptionError(
            "pipe: its vae is a RemoteVAE already; call remove() on the handle of the first install"
        )
    if vae is None:
        if "Flux2" in type(pipe).__name__:
            raise InvalidOptionError(
                "pipe: got a pipeline of FLUX.2 with vae=None, but it rescales latents by its VAE's statistics; load "
                "it with its VAE"
            )
        return Installed(pipe, RemoteVAE(url, **options))
    if "batch_norm_eps" in vae.config:
        options = {"model": "vae_decoder_flux2", **options}
    return Installed(pipe, RemoteVAE(url, vae.config, getattr(vae, "bn", None), **options))
