"""What a model takes, by the class of its checkpoint, and whose latents are, by their shape: no checkpoint is read."""

from __future__ import annotations

from collections.abc import Mapping

from fluxvae.errors import InvalidOptionError
from fluxvae.latents import LatentFormat

__all__ = ["PATCH_CHANNELS", "family_of", "format_of", "has_factors", "read_raw"]

PATCH_CHANNELS = 128
"""Of unpacked latents in FLUX.2's 2x2 patches."""
_INSTEAD = {
    "AutoencoderKLFlux2": "FLUX.2's latents are rescaled by the checkpoint's statistics",
    "AutoencoderTiny": "a preview takes latents as the transformer leaves them",
}
"""Of factors, for the classes that have none."""
# As far as a shape tells: statistics and factors are the model's.
_FLUX2 = LatentFormat(channels=32, scaling_factor=1.0, shift_factor=None, flux2=True)
_TAEF1 = LatentFormat(scaling_factor=1.0, shift_factor=None, preview=True)
_TAEF2 = LatentFormat(channels=32, scaling_factor=1.0, shift_factor=None, flux2=True, preview=True)
_PACKED_FEATURES = {64: "AutoencoderKL", 128: "AutoencoderKLFlux2"}
_CHANNELS = {16: "AutoencoderKL", 32: "AutoencoderKLFlux2", PATCH_CHANNELS: "AutoencoderKLFlux2"}


def family_of(shape: tuple[int, ...]) -> str | None:
    """The class of the full VAE that decodes latents of this shape, packed or not; None: of none that is known here."""
    return _PACKED_FEATURES.get(shape[2]) if len(shape) == 3 else _CHANNELS.get(shape[1])


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


def format_of(vae_class: str, shape: tuple[int, ...]) -> LatentFormat:
    """How a model takes latents, as far as its class tells; the model itself checks against its checkpoint.

    Args:
        vae_class: of the model.
        shape: of the latents: whether a preview is TAEF1's or TAEF2's only the model knows, so either passes here.
    """
    if vae_class == "AutoencoderKLFlux2":
        return _FLUX2
    if vae_class == "AutoencoderTiny":
        return _TAEF2 if family_of(shape) == "AutoencoderKLFlux2" else _TAEF1
    return LatentFormat()
