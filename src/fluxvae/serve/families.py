"""Tells what latents a model takes from its name or from its checkpoint's class, without reading the checkpoint.

The gateway and the client read latents by these formats (`fluxvae.latents.layout`), because they have no checkpoint.
The model reads them by the format of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.layout import possible_layouts
from fluxvae.serve.models import MODELS

__all__ = ["families_of", "formats_of", "formats_of_model", "has_factors", "read_raw", "refuse_layers"]

_INSTEAD = {
    "AutoencoderKLFlux2": "FLUX.2's latents are rescaled by the checkpoint's statistics",
    "AutoencoderKLQwenImage": "Qwen-Image's latents are rescaled by the checkpoint's latents_mean and latents_std",
    "AutoencoderTiny": "a preview takes latents as the transformer leaves them",
}
"""Why a class of checkpoint has no factors that a request could override, for messages."""
# These formats say which shapes latents have. The statistics and factors that they are rescaled by, only the model
# knows.
_FLUX1 = LatentFormat()
_FLUX2 = LatentFormat(channels=32, scaling_factor=1.0, shift_factor=None, flux2=True)
# Only the model knows whether the frames of its checkpoint may be layers; see `refuse_layers`.
_FRAMES = LatentFormat(scaling_factor=1.0, shift_factor=None, frames=True, layers=True)
_SD = LatentFormat(channels=4, scaling_factor=1.0, shift_factor=None)
_FORMATS = {
    "AutoencoderKL": (_FLUX1,),
    "AutoencoderKLFlux2": (_FLUX2,),
    "AutoencoderKLQwenImage": (_FRAMES,),
    # Only the model knows whether its preview is TAEF1, for FLUX.1, or TAEF2, for FLUX.2.
    "AutoencoderTiny": (
        LatentFormat(scaling_factor=1.0, shift_factor=None, preview=True),
        LatentFormat(channels=32, scaling_factor=1.0, shift_factor=None, flux2=True, preview=True),
    ),
}


def formats_of(vae_class: str) -> tuple[LatentFormat, ...]:
    """Return the formats in which the gateway takes latents for a model that serves checkpoints of this class."""
    return _FORMATS[vae_class]


def formats_of_model(model: str) -> tuple[LatentFormat, ...]:
    """Return the formats in which a model of this name may take latents: those of all checkpoints it could have."""
    if model not in MODELS:
        return (_FLUX1, _FLUX2, _SD)
    vae_class = MODELS[model].vae_class
    return (*_FORMATS[vae_class], _SD) if vae_class in ("AutoencoderKL", "AutoencoderTiny") else _FORMATS[vae_class]


def families_of(shape: tuple[int, ...]) -> list[str]:
    """Return the classes of full VAEs, not previews, that may decode latents of this shape."""
    if len(shape) == 5 and shape[2] > 1:
        return []  # frames or layers, which no model takes
    full = {name: formats for name, formats in _FORMATS.items() if not formats[0].preview}
    return [name for name, formats in full.items() if possible_layouts(shape, formats)]


def refuse_layers(shape: tuple[int, ...], layers: int) -> None:
    """Refuse latents whose rows have several layers or frames: a request has one picture for each of its rows.

    The library decodes the layers of QwenImageLayeredPipeline as pictures, but only a checkpoint tells that they are
    layers and not a video, and only the model has the checkpoint.

    Args:
        shape: of the latents, packed (B, N, 4*C) or (B, C, frames, lh, lw), for the message.
        layers: how many layers each row has.

    Raises:
        InvalidLatentsError: there is more than one.
    """
    if layers == 1:
        return
    how = "latents.movedim(2, 1).flatten(0, 1)"
    if len(shape) == 3:
        how = f"latents.reshape({shape[0] * layers}, {shape[1] // layers}, {shape[2]})"
    raise InvalidLatentsError(
        f"latents: got shape {shape}, which has {layers} layers or frames in each row; expected one picture in each: "
        f"send the layers of a picture as a batch, {how}; videos are not decoded here"
    )


def has_factors(vae_class: str) -> bool:
    """Return whether a class of checkpoint rescales latents by factors, which a request may override."""
    return vae_class not in _INSTEAD


def read_raw(given: Mapping[str, str], vae_class: str) -> bool | None:
    """Read whether latents are raw already, from a query to a model without factors.

    Args:
        given: the query's parameters. A client says with ``do_scaling=True`` that its latents are not raw.
        vae_class: the class of the model's checkpoint.

    Returns:
        The model's parameter ``raw``; None for a preview, which has none.

    Raises:
        InvalidOptionError: the query has a factor, which would be ignored, or raw latents for a preview.
    """
    for name in ("scaling_factor", "shift_factor"):
        if name in given:
            raise InvalidOptionError(f"{name}: got {given[name][:80]!r}, but {_INSTEAD[vae_class]}: leave {name} out")
    raw = given.get("do_scaling") != "True"
    if not _FORMATS[vae_class][0].preview:
        return raw
    if raw:
        raise InvalidOptionError(
            f"do_scaling: got {given.get('do_scaling', 'none')}, which means raw latents, but {_INSTEAD[vae_class]}: "
            "send do_scaling=True"
        )
    return None
