"""What a model takes, by its name or the class of its checkpoint: for those who read no checkpoint.

The gateway and the client read latents by these formats (`fluxvae.latents.layout`), the model by its checkpoint's.
"""

from __future__ import annotations

from collections.abc import Mapping

from fluxvae.errors import InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.layout import possible_layouts
from fluxvae.serve.models import MODELS

__all__ = ["families_of", "formats_of", "formats_of_model", "has_factors", "read_raw"]

_INSTEAD = {
    "AutoencoderKLFlux2": "FLUX.2's latents are rescaled by the checkpoint's statistics",
    "AutoencoderTiny": "a preview takes latents as the transformer leaves them",
}
"""Of factors, for the classes that have none."""
# As far as a shape tells: statistics and factors are the model's.
_FLUX1 = LatentFormat()
_FLUX2 = LatentFormat(channels=32, scaling_factor=1.0, shift_factor=None, flux2=True)
_SD = LatentFormat(channels=4, scaling_factor=1.0, shift_factor=None)
_FORMATS = {
    "AutoencoderKL": (_FLUX1,),
    "AutoencoderKLFlux2": (_FLUX2,),
    # Whether a preview is TAEF1's or TAEF2's only the model knows.
    "AutoencoderTiny": (
        LatentFormat(scaling_factor=1.0, shift_factor=None, preview=True),
        LatentFormat(channels=32, scaling_factor=1.0, shift_factor=None, flux2=True, preview=True),
    ),
}


def formats_of(vae_class: str) -> tuple[LatentFormat, ...]:
    """How the gateway takes latents for a model of this class, as far as the class tells."""
    return _FORMATS[vae_class]


def formats_of_model(model: str) -> tuple[LatentFormat, ...]:
    """How a model of this name may take latents, as far as its name tells: any checkpoint of its class."""
    if model not in MODELS:
        return (_FLUX1, _FLUX2, _SD)
    vae_class = MODELS[model]
    return _FORMATS[vae_class] if vae_class == "AutoencoderKLFlux2" else (*_FORMATS[vae_class], _SD)


def families_of(shape: tuple[int, ...]) -> list[str]:
    """The classes of the full VAEs that may decode latents of this shape."""
    return [name for name in ("AutoencoderKL", "AutoencoderKLFlux2") if possible_layouts(shape, _FORMATS[name])]


def has_factors(vae_class: str) -> bool:
    """Whether latents are rescaled by factors, which a request may override."""
    return vae_class not in _INSTEAD


def read_raw(given: Mapping[str, str], vae_class: str) -> bool | None:
    """Whether latents are raw already, for a model without factors; those are refused, not ignored.

    Args:
        given: the query; its ``do_scaling`` is the client's way to say that latents are not raw.
        vae_class: of the model.

    Returns:
        ``raw`` for the model; None: it has no such thing.

    Raises:
        InvalidOptionError: a factor, or raw latents for a preview.
    """
    for name in ("scaling_factor", "shift_factor"):
        if name in given:
            raise InvalidOptionError(f"{name}: got {given[name][:80]!r}, but {_INSTEAD[vae_class]}: leave {name} out")
    raw = given.get("do_scaling") != "True"
    if vae_class == "AutoencoderKLFlux2":
        return raw
    if raw:
        raise InvalidOptionError(
            f"do_scaling: got {given.get('do_scaling', 'none')}, which means raw latents, but {_INSTEAD[vae_class]}: "
            "send do_scaling=True"
        )
    return None
