"""The models of ``triton_models``, and which one serves what: for the supervisor and the gateway, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

from fluxvae.errors import InvalidOptionError

__all__ = ["MODEL", "MODELS", "read_memory_limits", "read_models", "vae_class_of"]

MODEL = "vae_decoder"
MODELS = {
    MODEL: "AutoencoderKL",
    "vae_decoder_flux2": "AutoencoderKLFlux2",
    "vae_preview": "AutoencoderTiny",
}
"""Name to the class of checkpoint it serves, as its ``config.pbtxt`` says too."""


def vae_class_of(model: str) -> str:
    """The class of checkpoint behind a model; one with another name is taken for a copy of ``vae_decoder``."""
    return MODELS.get(model, MODELS[MODEL])


def read_models(given: Iterable[str], checkpoint: str | None) -> dict[str, str]:
    """What `fluxvae serve` is to serve, in order.

    Args:
        given: ``NAME=CHECKPOINT``, each name at most once.
        checkpoint: of ``vae_decoder``, which then comes first; None: it is served only where ``given`` names it, or
            names nothing: then with the demo checkpoint.

    Returns:
        Name to checkpoint.

    Raises:
        InvalidOptionError: no such name, one twice, or no checkpoint.
    """
    models = {} if checkpoint is None else {MODEL: checkpoint}
    for one in given:
        name, _, source = one.partition("=")
        if name not in MODELS or not source:
            raise InvalidOptionError(
                f"--model: got {one!r}, expected NAME=CHECKPOINT, where NAME is one of {', '.join(MODELS)}"
            )
        if name in models:
            raise InvalidOptionError(
                f"--model: got {name} twice, with {models[name]} and with {source}; --checkpoint counts as "
                f"--model {MODEL}=..., and each model is served once"
            )
        models[name] = source
    return models or {MODEL: "demo"}


def read_memory_limits(given: Iterable[str]) -> dict[str, str]:
    """Memory limits of single models: ``NAME=SIZE``, each name at most once, to size by name.

    Raises:
        InvalidOptionError: no size, or a name twice. Whether the model is served is for `ServeSettings` to say.
    """
    limits: dict[str, str] = {}
    for one in given:
        name, _, size = one.partition("=")
        if not name or not size:
            raise InvalidOptionError(
                f"--model-memory-limit: got {one!r}, expected NAME=SIZE, such as vae_preview=500MB"
            )
        if name in limits:
            raise InvalidOptionError(f"--model-memory-limit: got {name} twice, with {limits[name]} and with {size}")
        limits[name] = size
    return limits
