"""Checks the options of `Decoder`: which values each may have, and with which model and engine.

An option that cannot be honoured is refused by its name rather than ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fluxvae.devices import EXACT, usual_dtype
from fluxvae.errors import InvalidOptionError

__all__ = [
    "CLASSES",
    "FULL_CLASSES",
    "VAE",
    "check_engine_options",
    "check_vae",
    "is_a",
    "name_of_usual_dtype",
    "resolve_device",
    "resolve_dtype",
    "resolve_engine",
]

if TYPE_CHECKING:  # importing diffusers takes seconds, and making a plan does not need it
    from diffusers import (
        AutoencoderKL,
        AutoencoderKLFlux2,
        AutoencoderKLQwenImage,
        AutoencoderKLWan,
        AutoencoderTiny,
    )

VAE: TypeAlias = "AutoencoderKL | AutoencoderKLFlux2 | AutoencoderKLQwenImage | AutoencoderKLWan | AutoencoderTiny"
"""The classes of diffusers that can be decoded with. The class decides how latents become raw latents, and which
engines there are."""
FULL_CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderKLWan")
"""The names of those that compute the image itself."""
CLASSES = (*FULL_CLASSES, "AutoencoderTiny")
"""The names of all of them, with the one that computes an approximate preview."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_a(vae: object, *kinds: str) -> bool:
    """Return whether ``vae`` is an instance of a class of one of these names, or of a subclass.

    Names are compared instead of classes, because importing the classes would import diffusers.
    """
    return any(kind.__name__ in kinds for kind in type(vae).__mro__)


def check_vae(vae: Any, instead: str, *, classes: tuple[str, ...] = CLASSES) -> None:
    """Refuse what is no VAE of one of these classes, or has another network than the class's usual one.

    Args:
        instead: what to do about it, for the message.

    Raises:
        InvalidOptionError: names the class, or the settings that make it another network.
    """
    if not is_a(vae, *classes):
        expected = f"{', '.join(classes[:-1])} or {classes[-1]}"
        raise InvalidOptionError(f"vae: got {type(vae).__name__}, expected diffusers' {expected}; {instead}")
    if is_a(vae, "AutoencoderKLWan") and (vae.config.is_residual or vae.config.patch_size):
        raise InvalidOptionError(
            f"vae: got {type(vae).__name__} with is_residual={vae.config.is_residual}, "
            f"patch_size={vae.config.patch_size}, which is Wan 2.2's network; expected that of Wan 2.1, whose latents "
            "have 16 channels: decode with diffusers itself"
        )


def resolve_engine(engine: str, vae: VAE) -> str:
    """Return the engine that is meant: for ``"auto"`` the one for this class of VAE, otherwise the named one.

    Raises:
        InvalidOptionError: the engine is unknown, or does not decode with this class of VAE.
    """
    if engine not in ("auto", "exact", "diffusers", "preview"):
        raise InvalidOptionError(f"engine: got {engine!r}, expected 'auto', 'exact', 'diffusers' or 'preview'")
    tiny = is_a(vae, "AutoencoderTiny")
    if engine == "auto":
        return "preview" if tiny else "exact"
    if engine == ("exact" if tiny else "preview"):
        raise InvalidOptionError(
            f"engine: got {engine!r} for {type(vae).__name__}; "
            + ("a preview is approximate: use 'preview', or the full VAE" if tiny else "it is for AutoencoderTiny")
        )
    return engine


_OPTIONS_OF = {
    "exact": {"kernels", "memory_limit", "spill_dir", "cuda_graphs", "keep_memory"},
    "preview": {"memory_limit"},
    "diffusers": {"tiling", "slicing"},
}


def check_engine_options(engine: str, given: Mapping[str, object]) -> None:
    """Refuse options that only another engine can honour.

    Args:
        engine: the engine that will decode.
        given: the options by name. None, False and ``"auto"`` count as left out.

    Raises:
        InvalidOptionError: names the first option that is another engine's.
    """
    for name, value in given.items():
        if value not in (None, False, "auto") and name not in _OPTIONS_OF[engine]:
            other = next(other for other, options in _OPTIONS_OF.items() if name in options)
            raise InvalidOptionError(
                f"{name}: got {value!r} with engine={engine!r}, which cannot honour it; it is for engine={other!r}"
            )


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device that is meant; ``"auto"`` is the GPU where there is one.

    Raises:
        InvalidOptionError: the device is no CPU or CUDA device, or this machine does not have it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidOptionError(f"device: got {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if found.type not in EXACT:
        raise InvalidOptionError(f"device: got {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidOptionError(
            f"device: got {device!r}, but this PyTorch sees no CUDA GPU; use device='cpu', or install a CUDA build"
        )
    if found.index is not None and found.type == "cuda" and found.index >= torch.cuda.device_count():
        raise InvalidOptionError(f"device: got {device!r}, but there are {torch.cuda.device_count()} GPUs, from cuda:0")
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device, name: str = "dtype") -> torch.dtype:
    """Return the dtype that is meant; ``"auto"`` is what `usual_dtype` says of the device.

    Args:
        name: the option that the dtype comes from, for the message.

    Raises:
        InvalidOptionError: it is not float32, bfloat16 or float16.
    """
    if dtype == "auto":
        return usual_dtype(device)
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise InvalidOptionError(f"{name}: got {dtype!r}, expected 'auto', {', '.join(map(repr, _DTYPES))}")
    return found


def name_of_usual_dtype(device: str) -> str:
    """What ``dtype="auto"`` stands for on a device of the machine that this runs on, such as ``"bfloat16"``."""
    return str(resolve_dtype("auto", resolve_device(device))).removeprefix("torch.")
