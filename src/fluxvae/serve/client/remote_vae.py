"""A VAE on a server, for diffusers' pipelines: `RemoteVAE` replaces ``pipe.vae``, and `install` puts it there."""

from __future__ import annotations

import inspect
import re
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
from fluxvae.serve.models import MODEL, MODELS, model_for, vae_class_of

__all__ = ["Installed", "RemoteVAE", "install"]

_TIME = "temperal_downsample"
"""diffusers' name, in the configuration of VAEs whose tensors have an axis of time, of the levels that shorten it."""


class RemoteVAE(torch.nn.Module):
    """A VAE that decodes and encodes on a server. It takes the place of ``pipe.vae`` in a diffusers pipeline.

    What the pipeline does before and after is its own, so its images, and the latents that it makes of pictures, are
    those that it would have with `fluxvae.install` and a VAE in the server's dtype. The images of a batch are sent one
    by one.

    Args:
        client: the client to send with, or the ``host:port`` of the server's gRPC endpoint.
        config: the VAE's configuration, as in ``pipe.vae.config``. None: FLUX.1's. Pipelines read the factors of their
            latents from it, or the mean and the deviation.
        bn: the statistics of FLUX.2's latents, ``pipe.vae.bn``, because its pipelines rescale latents themselves.
        options: options for `Client`, where ``client`` is an address. Its ``model`` is the one for VAEs of this
            configuration, if it is left out.

    Raises:
        InvalidOptionError: the client's model serves other VAEs than this configuration's.
    """

    def __init__(
        self,
        client: Client | str,
        config: Mapping[str, Any] | None = None,
        bn: torch.nn.BatchNorm2d | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if config is None:
            config = AutoencoderKL.load_config(ASSETS / "flux1")
        vae_class = _class_of(config)
        if isinstance(client, str):
            client = Client(client, **{"model": model_for(vae_class, encodes=False) or MODEL, **options})
        _check_models(client, vae_class)
        self.client = client
        if bn is not None:
            self.bn = bn
        self._reading: dict[str, Any] = {"scaling_factor": 1.0, "shift_factor": 0.0}
        """What the server is told of latents that it decodes: pipelines have rescaled them already."""
        self._frames = _TIME in config
        """Whether pipelines give and expect tensors with an axis of time, (B, C, F, H, W)."""
        if self._frames:
            self.temperal_downsample = config[_TIME]  # pipelines count its entries
        if self._frames or "batch_norm_eps" in config:
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
        """Decode raw latents, as the VAE's own ``decode`` does.

        Args:
            z: raw latents (B, C, lh, lw). One frame, (B, C, 1, lh, lw), and one image without its batch, (C, lh, lw),
                are taken too. VAEs with an axis of time take one frame, and nothing else.
            return_dict: whether to return a ``DecoderOutput`` instead of a tuple.
            generator: ignored.

        Returns:
            The images (B, 3, H, W), or (B, 4, H, W) where the server's are RGBA, nominally in [-1, 1], in the dtype of
            ``z`` and on its device. Those of VAEs with an axis of time are one frame, (B, 3, 1, H, W).

        Raises:
            InvalidLatentsError: the latents have another shape, such as that of packed ones, which are not raw.
            FluxVAEError: the request failed, as for `Client.decode`.
        """
        z = z.reshape(self._images(z))
        parts = [self.client.decode(one[None], output_type="raw", **self._reading) for one in z]
        sample = torch.cat(parts).to(device=z.device, dtype=z.dtype)
        if self._frames:
            sample = sample.unsqueeze(2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _images(self, z: torch.Tensor) -> tuple[int, ...]:
        """Return the shape that raw latents have with their batch axis and without frames."""
        channels = self.config["z_dim" if self._frames else "latent_channels"]
        format = LatentFormat(channels=channels)  # not flux2: raw latents are never in patches
        shape, scale = tuple(z.shape), format.vae_scale_factor
        if self._frames and (len(shape) != 5 or shape[2] != 1):
            raise InvalidLatentsError(
                f"z: got shape {shape}, expected one frame, (batch, {channels}, 1, height/{scale}, width/{scale}), "
                "which a VAE with an axis of time takes; videos are not decoded"
            )
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
        """Encode pixels to a distribution of raw latents, as the VAE's own ``encode`` does.

        Args:
            x: the pixels (B, 3, H, W), or (B, 4, H, W) for a VAE of RGBA pictures, in [-1, 1]; H and W are multiples of
                8. VAEs with an axis of time take one frame, (B, 3 or 4, 1, H, W).
            return_dict: whether to return an ``AutoencoderKLOutput`` instead of a tuple.

        Returns:
            diffusers' distribution of the latents (B, C, lh, lw), or (B, C, 1, lh, lw) where there is an axis of time,
            in the dtype of ``x`` and on its device. Its mode and the samples that are drawn from it here have the bits
            of an exact encode in this process, where the server's VAE has the same dtype.

        Raises:
            InvalidImagesError: the pixels have another shape or dtype, or values outside of [-1, 1].
            InvalidOptionError: the client knows no model that encodes, or the server does not have it.
            FluxVAEError: the request failed, as for `Client.encode`.
        """
        moments = self._encoded(x, "moments")
        distribution = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def _encoded(self, x: torch.Tensor, output: str) -> torch.Tensor:
        """Return the server's output for pixels (`make_pixels_request`), in the dtype of ``x`` and on its device.

        Both have an axis of time where the VAE has one.
        """
        shape = (*x.shape[:2], *x.shape[3:]) if self._frames and x.ndim == 5 and x.shape[2] == 1 else tuple(x.shape)
        takes = x.ndim == (5 if self._frames else 4) and len(shape) == 4 and shape[1] in (3, 4) and 0 not in shape
        if not takes or not x.is_floating_point():
            frame = "1, " if self._frames else ""
            raise InvalidImagesError(
                f"x: got a tensor of {x.dtype} {tuple(x.shape)}, expected floats (batch, 3 or 4, {frame}height, width) "
                f"in [-1, 1], which {_class_of(self.config)}.encode takes; Client.encode takes pictures"
            )
        x = x.reshape(shape)
        check_pixels(x, SCALE, None)  # all of them, before the first is sent
        model = self.client.encoder_model
        parts = [self.client.send(partial(make_pixels_request, one[None], model=model, output=output)) for one in x]
        made = torch.cat(parts).to(device=x.device, dtype=x.dtype)
        return made.unsqueeze(2) if self._frames else made


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
    FLUX.1's configuration. FLUX.2's pipelines, and Qwen-Image's, must be loaded with their VAE, because they rescale
    latents by its statistics; they decode with the model ``vae_decoder_flux2`` or ``vae_decoder_qwen_image`` and encode
    with the encoder beside it. A model that the server does not have is missed only when it is asked for.

    Args:
        pipe: the pipeline.
        url: the ``host:port`` of the server's gRPC endpoint.
        options: options for `Client`: ``protocol``, ``model``, ``encoder_model``, ``timeout_s``, ``retries``.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        InvalidOptionError: the pipeline's VAE is on a server already, or it has none and does not take FLUX.1's.
    """
    vae = getattr(pipe, "vae", None)
    if isinstance(vae, RemoteVAE):
        raise InvalidOptionError(
            "pipe: its vae is a RemoteVAE already; call remove() on the handle of the first install"
        )
    if vae is None:
        if "AutoencoderKL" not in (wanted := _wanted(pipe)):
            raise InvalidOptionError(
                f"pipe: got a {type(pipe).__name__} with vae=None, but it rescales latents by the statistics of its "
                f"{' or '.join(wanted)}; load it with its VAE, or set pipe.vae to a fluxvae.client.RemoteVAE with that "
                "VAE's configuration"
            )
        return Installed(pipe, RemoteVAE(url, **options))
    return Installed(pipe, RemoteVAE(url, vae.config, getattr(vae, "bn", None), **options))


def _class_of(config: Mapping[str, Any]) -> str:
    """Return the class that stands for all VAEs with a configuration such as this (`fluxvae.serve.models.Served`)."""
    if _TIME in config:
        return "AutoencoderKLQwenImage"
    return "AutoencoderKLFlux2" if "batch_norm_eps" in config else "AutoencoderKL"


def _check_models(client: Client, vae_class: str) -> None:
    """Refuse a client whose models serve other VAEs, where their names tell.

    Latents of two classes may have one shape, and once they are raw, nothing but the name of the model tells whose they
    are. A preview refuses raw latents itself.
    """
    for encodes, model in ((False, client.model), (True, client.encoder_model)):
        if model in MODELS and (served := vae_class_of(model)) not in (vae_class, "AutoencoderTiny"):
            option = "encoder_model" if encodes else "model"
            raise InvalidOptionError(
                f"{option}: got {model!r}, which serves {served}, with the configuration of an {vae_class}; expected "
                f"{model_for(vae_class, encodes=encodes)!r}"
            )


def _wanted(pipe: Any) -> list[str]:
    """Return the classes of VAEs that a pipeline says that it takes; ``AutoencoderKL`` where it does not say."""
    parameter = inspect.signature(type(pipe).__init__).parameters.get("vae")
    annotation = getattr(parameter, "annotation", None)
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.findall(r"Autoencoder\w+", text) or ["AutoencoderKL"]
