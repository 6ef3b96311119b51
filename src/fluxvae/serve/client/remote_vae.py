"""A VAE on a server, for diffusers' pipelines: `RemoteVAE` replaces ``pipe.vae``, and `install` puts it there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from fluxvae.checkpoints import ASSETS
from fluxvae.errors import InvalidImagesError, InvalidLatentsError, InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.layout import read_layout, unpacked_shape
from fluxvae.pixels import check_pixels
from fluxvae.serve.client.clients import Client
from fluxvae.serve.client.encoding import make_pixels_request
from fluxvae.serve.client.wire import SCALE

__all__ = ["Installed", "RemoteVAE", "install"]


class RemoteVAE(torch.nn.Module):
    """A VAE that decodes and encodes on a server. It takes the place of ``pipe.vae`` in a diffusers pipeline.

    What the pipeline does before and after is its own, so its images, and the latents that it makes of pictures, are
    those that it would have with `fluxvae.install` and a VAE in the server's dtype. The images of a batch are sent one
    by one.

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
        self._reading: dict[str, Any] = {"scaling_factor": 1.0, "shift_factor": 0.0}
        """What the server is told of latents that it decodes: pipelines have rescaled them already."""
        if "batch_norm_eps" in config:
            self._reading = {"raw": True}
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
            The images (B, 3, H, W), or (B, 4, H, W) where the server's are RGBA, nominally in [-1, 1], in the dtype of
            ``z`` and on its device.

        Raises:
            InvalidLatentsError: the latents have another shape, such as that of packed ones, which are not raw.
            FluxVAEError: the request failed, as for `Client.decode`.
        """
        z = z.reshape(self._images(z))
        parts = [self.client.decode(one[None], output_type="raw", **self._reading) for one in z]
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

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Encode pixels to a distribution of raw latents, as ``AutoencoderKL.encode`` does.

        Args:
            x: the pixels (B, 3, H, W), or (B, 4, H, W) for a VAE of RGBA pictures, in [-1, 1]; H and W are multiples of
                8.
            return_dict: whether to return an ``AutoencoderKLOutput`` instead of a tuple.

        Returns:
            diffusers' distribution of the latents (B, C, lh, lw), in the dtype of ``x`` and on its device. Its mode and
            the samples that are drawn from it here have the bits of an exact encode in this process, where the server's
            VAE has the same dtype.

        Raises:
            InvalidImagesError: the pixels have another shape or dtype, or values outside of [-1, 1].
            InvalidOptionError: the client knows no model that encodes, or the server does not have it.
            FluxVAEError: the request failed, as for `Client.encode`.
        """
        moments = self._encoded(x, "moments")
        distribution = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def _encoded(self, x: torch.Tensor, output: str) -> torch.Tensor:
        """Return the server's output for pixels (`make_pixels_request`), in the dtype of ``x`` and on its device."""
        if x.ndim != 4 or x.shape[1] not in (3, 4) or 0 in x.shape or not x.is_floating_point():
            raise InvalidImagesError(
                f"x: got a tensor of {x.dtype} {tuple(x.shape)}, expected floats (batch, 3 or 4, height, width), which "
                "AutoencoderKL.encode takes; Client.encode takes pictures"
            )
        check_pixels(x, SCALE, None)  # all of them, before the first is sent
        model = self.client.encoder_model
        parts = [self.client.send(partial(make_pixels_request, one[None], model=model, output=output)) for one in x]
        return torch.cat(parts).to(device=x.device, dtype=x.dtype)


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
    """Let a diffusers pipeline decode and encode on a server instead of with its own VAE.

    A pipeline may be loaded with ``vae=None``, so that the VAE's weights never come into memory here. It is then given
    FLUX.1's configuration. FLUX.2's pipelines must be loaded with their VAE, because they rescale latents by its
    statistics; they decode with the model ``vae_decoder_flux2`` and encode with ``vae_encoder_flux2``. A model that
    the server does not have is missed only when it is asked for.

    Args:
        pipe: the pipeline.
        url: the ``host:port`` of the server's gRPC endpoint.
        options: options for `Client`: ``protocol``, ``model``, ``encoder_model``, ``timeout_s``, ``retries``.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        InvalidOptionError: the pipeline's VAE is on a server already, or is FLUX.2's without a VAE.
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
