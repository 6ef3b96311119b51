"""The models of ``triton_models``, and what each of them serves.

The supervisor, the gateway and the client need this, so it is to be had without PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fluxvae.errors import InvalidOptionError

__all__ = [
    "LARGEST_SEED",
    "MODEL",
    "MODELS",
    "Served",
    "encoder_of",
    "encodes",
    "model_for",
    "read_memory_limits",
    "read_models",
    "vae_class_of",
]

MODEL = "vae_decoder"
"""The name of the model that is served if nothing else is asked for."""


LARGEST_SEED = 2**63 - 1
"""The largest seed of a sample, which ``torch.Generator.manual_seed`` takes."""


class Served(NamedTuple):
    """What a model serves."""

    vae_class: str
    """The class in diffusers of its checkpoints. Where there are more, this one stands for all of them."""
    encodes: bool = False
    """Whether it turns pictures into latents; otherwise it turns latents into pictures."""
    also: tuple[str, ...] = ()
    """Other classes of its checkpoints: the same network, with latents of the same form."""

    @property
    def vae_classes(self) -> tuple[str, ...]:
        """All classes in diffusers that its checkpoints may be of."""
        return (self.vae_class, *self.also)


MODELS = {
    MODEL: Served("AutoencoderKL"),
    "vae_decoder_flux2": Served("AutoencoderKLFlux2"),
    "vae_decoder_qwen_image": Served("AutoencoderKLQwenImage", also=("AutoencoderKLWan",)),
    "vae_preview": Served("AutoencoderTiny"),
    "vae_encoder": Served("AutoencoderKL", encodes=True),
    "vae_encoder_flux2": Served("AutoencoderKLFlux2", encodes=True),
    "vae_encoder_qwen_image": Served("AutoencoderKLQwenImage", encodes=True, also=("AutoencoderKLWan",)),
}
"""The models by name. Their ``config.pbtxt`` files say the same of each."""


def vae_class_of(model: str) -> str:
    """Return the class of checkpoint that a model serves; a model of another name is taken for one like `MODEL`."""
    return MODELS.get(model, MODELS[MODEL]).vae_class


def encodes(model: str) -> bool:
    """Return whether a model turns pictures into latents; a model of another name is taken for one like `MODEL`."""
    return MODELS.get(model, MODELS[MODEL]).encodes


def encoder_of(model: str) -> str | None:
    """Return the name of the model that encodes what ``model`` decodes, or ``model`` itself where it encodes.

    None where no model of `MODELS` does, as for previews and for models of other names.
    """
    if model not in MODELS:
        return None
    return model_for(MODELS[model].vae_class, encodes=True)


def model_for(vae_class: str, *, encodes: bool) -> str | None:
    """Return the name of the model that decodes, or encodes, with checkpoints of a class; None where there is none."""
    fitting = (name for name, served in MODELS.items() if vae_class in served.vae_classes)
    return next((name for name in fitting if MODELS[name].encodes == encodes), None)


def read_models(given: Iterable[str], checkpoint: str | None) -> dict[str, str]:
    """Read which models `fluxvae serve` is to serve, from the values of ``--model`` and ``--checkpoint``.

    Args:
        given: texts of the form ``NAME=CHECKPOINT``, with each name at most once.
        checkpoint: the checkpoint of ``vae_decoder``, which then is the first model. With None, ``vae_decoder`` is
            served only where ``given`` names it, or where ``given`` is empty: then with the demo checkpoint.

    Returns:
        The checkpoints by the models' names, in the order in which they are served.

    Raises:
        InvalidOptionError: a name is none of `MODELS` or is given twice, or a checkpoint is missing.
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
    """Read the memory limits of single models, from the values of ``--model-memory-limit``.

    Args:
        given: texts of the form ``NAME=SIZE``, with each name at most once.

    Returns:
        The sizes by the models' names, as text and unchecked. `ServeSettings` checks that the models are served.

    Raises:
        InvalidOptionError: a size is missing, or a name is given twice.
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
