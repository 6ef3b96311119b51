"""Lets diffusers' pipelines decode on a server: `RemoteVAE` replaces ``pipe.vae``, and `install` puts it there."""

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
    """A VAE that decodes on a server. It takes the place of ``pipe.vae`` in a diffusers pipeline that only decodes.

    The pipeline's own post-processing follows, so its images are those of a local `fluxvae` decode in the server's
    dtype. The images of a batch are sent one by one. It cannot encode, so image-to-image pipelines need a real VAE.

    Args:
        client: the client to send with, or the ``host:port`` of the server's gRPC endpoint.
        config: the VAE's configuration, as in ``pipe.vae.config``. None: FLUX.1's.
        bn: the statistics of FLUX.2's latents, ``pipe.vae.bn``, because its pipelines rescale latents themselves.
        options: options for `Client`, where ``client`` is an address.
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
        """The configuration, from which pipelines read the scaling and shift factors and the number of levels."""
        # An empty tensor, which is moved and cast with the pipeline, and so tells where it has its latents and as what.
        self._where: torch.Tensor
        self.register_buffer("_where", torch.empty(0, dtype=torch.float32, device="cpu"), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where pipelines put latents. To the server it makes no difference."""
        return self._where.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that pipelines cast latents to."""
        return self._where.dtype

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: object = None) -> Any:
        """Decode raw latents, as ``AutoencoderKL.decode`` does.

        Args:
            z: raw latents (B, C, lh, lw). One frame, (B, C, 1, lh, lw), and one image without its batch, (C, lh, lw),
                are taken too.
            return_dict: whether to return a ``DecoderOutput`` instead of a tuple.
            generator: ignored.

        Returns:
            The images (B, 3, H, W), nominally in [-1, 1], in the dtype of ``z`` and on its device.

        Raises:
            InvalidLatentsError: the latents have another shape, such as that of packed ones, which are not raw.
            FluxVAEError: the request failed, as for `Client.decode`.
        """
        flux2 = "batch_norm_eps" in self.config
        z = z.reshape(self._images(z))
        raw: dict[str, Any] = {"raw": True} if flux2 else {"scaling_factor": 1.0, "shift_factor": 0.0}
        parts = [self.client.decode(one[None], output_type="raw", **raw) for one in z]
        sample = torch.cat(parts).to(device=z.device, dtype=z.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _images(self, z: torch.Tensor) -> tuple[int, ...]:
        """Return the shape that raw latents have with their batch axis and without frames."""
        format = LatentFormat(channels=self.config["latent_channels"])  # not flux2: raw latents are never in patches
        shape, scale = tuple(z.shape), format.vae_scale_factor
        # What a VAE is given are images, not packed latents. Their size says so where the shape is (C, n, 4*C).
        size = (shape[-2] * scale, shape[-1] * scale) if len(shape) > 2 else ()
        layout = read_layout(shape, (format,), *size)
        if layout.packed:
            raise InvalidLatentsError(
                f"z: got shape {shape}, which are packed latents; expected raw ones {unpacked_shape(format)}, which "
                "AutoencoderKL.decode takes: unpack and rescale them first, or pass them to Client.decode"
            )
        return layout.shape

    def encode(self, *_: object, **__: object) -> Any:
        """Refuse to encode, because only decoding happens on the server.

        Raises:
            InvalidOptionError: always.
        """
        raise InvalidOptionError("vae: fluxvae.client.RemoteVAE only decodes; encode with an AutoencoderKL")


class Installed:
    """The handle of an `install`. `remove` undoes it, and so does leaving a ``with`` block of this object.

    Args:
        pipe: the pipeline.
        vae: what takes the place of its VAE.
    """

    def __init__(self, pipe: Any, vae: RemoteVAE) -> None:
        self.vae = vae
        self._pipe, self._before = pipe, pipe.vae
        pipe.vae = vae

    def remove(self) -> None:
        """Give the pipeline its own VAE back, and close the connection. A second call does nothing."""
        if self._pipe is not None:
            self._pipe.vae, self._pipe = self._before, None
            self.vae.client.close()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def install(pipe: Any, url: str, **options: Any) -> Installed:
    """Let a diffusers pipeline decode on a server instead of with its own VAE.

    A pipeline may be loaded with ``vae=None``, so that the VAE's weights never come into memory here. It is then given
    FLUX.1's configuration. FLUX.2's pipelines must be loaded with their VAE, because they rescale latents by its
    statistics; they decode with the model ``vae_decoder_flux2``.

    Args:
        pipe: the pipeline.
        url: the ``host:port`` of the server's gRPC endpoint.
        options: options for `Client`: ``protocol``, ``model``, ``timeout_s``, ``retries``.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        InvalidOptionError: the pipeline decodes on a server already, or is FLUX.2's without a VAE.
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
