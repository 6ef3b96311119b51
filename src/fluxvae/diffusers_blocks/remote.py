"""`RemoteVaeStep`: a VAE on a server, so that the pipeline needs none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from fluxvae.checkpoints.defaults import DEFAULTS
from fluxvae.client import Client, RemoteVAE
from fluxvae.diffusers_blocks.step import VaeStep
from fluxvae.errors import InvalidOptionError
from fluxvae.latents.packing import unpatchify
from fluxvae.options import resolve_dtype
from fluxvae.serve.models import vae_class_of

if TYPE_CHECKING:
    from diffusers.modular_pipelines import ModularPipelineBlocks

__all__ = ["RemoteVaeStep"]

_FAMILIES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "flux": ("vae_decoder", None),
    "z_image": ("vae_decoder", None),
    "flux2": ("vae_decoder_flux2", {"raw": False}),
    "flux3": ("vae_decoder_flux2", {"raw": False}),
    "ideogram4": ("vae_decoder_flux2", {"raw": False, "feature_order": "row_column_channel"}),
    "qwenimage": ("vae_decoder_qwen_image", {"raw": False}),
    "anima": ("vae_decoder_qwen_image", {"raw": False}),
    "krea2": ("vae_decoder_qwen_image", {"raw": False}),
}
"""For each package of diffusers' modular pipelines the model that decodes, and what it is told of latents where it has
to rescale them, by the VAE's statistics. How the steps of others rescale latents, and by which factors, is not known
here."""


class RemoteVaeStep(VaeStep):
    """A step that decodes or encodes on a server of fluxvae. The pipeline needs no ``vae``, and loads none.

    FLUX.1's and Z-Image's steps rescale latents themselves, by FLUX.1's factors. Those of all others rescale by the
    VAE's statistics, which are on the server alone, so the server does it, in its VAE's dtype (docs/pipelines.md).

    Args:
        step: diffusers' step, of the families Flux, Flux2, Flux3, ZImage, Ideogram4, QwenImage, Anima or Krea2, such as
            ``Flux2DecodeStep()``.
        url: the ``host:port`` of the server's gRPC endpoint.
        dtype: that of the VAE for the step, ``"float32"``, ``"bfloat16"``, ``"float16"`` or a ``torch.dtype``: some
            steps cast latents to it, and all give encoded latents in it. ``"auto"`` is the pipeline's, ``pipe.dtype``.
        options: options for `fluxvae.client.Client`. Its ``model`` is that of the family, if it is left out.

    Raises:
        InvalidOptionError: the step has no VAE that fluxvae knows, or is another family's, or an option is wrong.
    """

    def __init__(
        self, step: ModularPipelineBlocks, url: str, *, dtype: str | torch.dtype = "auto", **options: Any
    ) -> None:
        super().__init__(step)
        packages = [kind.__module__.split(".") for kind in type(step).__mro__]
        families = [names[2] for names in packages if names[:2] == ["diffusers", "modular_pipelines"] and names[2:]]
        family = next((_FAMILIES[name] for name in families if name in _FAMILIES), None)
        if family is None:
            raise InvalidOptionError(
                f"step: got {type(step).__name__}, which is none of {', '.join(_FAMILIES)}; how it rescales latents "
                "is not known here: use LocalVaeStep"
            )
        self._dtype = None if dtype == "auto" else resolve_dtype(dtype, torch.device("cpu"))
        self._model, self._reading = family
        self._url, self._options = url, {"model": self._model, **options}
        if not isinstance(url, str):
            raise InvalidOptionError(f"url: got {type(url).__name__}, expected host:port, such as 'localhost:8001'")
        Client(url, **self._options).close()  # which refuses what is wrong with them

    @property
    def expected_components(self) -> list[Any]:
        return [spec for spec in self.step.expected_components if spec.name != "vae"]

    def vae_for(self, components: Any) -> RemoteVAE:
        # A connection of each call's own: blocks are copied again and again, and this takes milliseconds.
        client = Client(self._url, **self._options)
        vae = RemoteVAE(client) if self._reading is None else _NormalisedVAE(client, self._model, self._reading)
        return vae.to(device=components._execution_device, dtype=self._dtype or components.dtype)

    def close(self, vae: RemoteVAE) -> None:
        vae.client.close()


class _NormalisedVAE(RemoteVAE):
    """A VAE on a server that rescales latents by its statistics: a pipeline that rescales them by this changes nothing.

    FLUX.2's pipelines compute ``latents * sqrt(1 + 0) + 0`` before they decode, Qwen-Image's ``latents / (1 / 1) + 0``,
    and the reverse of it after they encode.

    Args:
        model: the family's model, which tells the class of the VAE; the client's may have another name.
        reading: what the server is told of latents that it decodes.
    """

    def __init__(self, client: Client, model: str, reading: dict[str, Any]) -> None:
        vae_class = vae_class_of(model)
        config, bn = dict(DEFAULTS[vae_class]), None
        if "batch_norm_eps" in config:
            config["batch_norm_eps"] = 0.0
            features = 4 * config["latent_channels"]
            bn = torch.nn.BatchNorm2d(features, eps=0.0, affine=False, device="cpu", dtype=torch.float32)
        else:
            config |= {"latents_mean": [0.0] * config["z_dim"], "latents_std": [1.0] * config["z_dim"]}
        super().__init__(client, config, bn)
        self._reading = reading

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Encode pixels in [-1, 1] to normalised latents, of which what is returned has the mode alone.

        Args:
            x: (B, 3, H, W) for FLUX.2, whose latents are (B, 32, lh, lw); (B, 3 or 4, 1, H, W) for Qwen-Image, whose
                latents are (B, 16, 1, lh, lw).
        """
        latents = self._encoded(x, "latents_unpacked")
        mode = _Mode(latents if self._frames else unpatchify(latents))
        return AutoencoderKLOutput(latent_dist=mode) if return_dict else (mode,)


class _Mode:
    """Stands for a distribution of which the server sent the mode alone. Few steps of diffusers take anything else."""

    def __init__(self, latents: torch.Tensor) -> None:
        self._latents = latents

    def mode(self) -> torch.Tensor:
        """Return the mode, in the shape of the latents."""
        return self._latents

    def sample(self, generator: object = None) -> torch.Tensor:
        """Refuse to draw, because the variance stayed on the server."""
        raise InvalidOptionError(
            "sample: got a step that draws from the distribution of its latents, of which the server sends the mode "
            "alone; use LocalVaeStep for it"
        )
