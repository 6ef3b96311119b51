"""`Decoder`'s options: what each may be, for which model and engine; one that cannot be honoured is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch

from fluxvae.errors import InvalidOptionError

__all__ = ["VAE", "check_engine_options", "is_a", "resolve_device", "resolve_dtype", "resolve_engine"]

if TYPE_CHECKING:  # importing diffusers takes seconds, which a plan does without
    from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny

VAE: TypeAlias = "AutoencoderKL | AutoencoderKLFlux2 | AutoencoderTiny"
"""What can be decoded with; which one it is decides how latents become raw latents and which engines there are."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_a(vae: object, *kinds: str) -> bool:
    """Whether it is of a class of diffusers' by that name, or of one below it."""
    return any(kind.__name__ in kinds for kind in type(vae).__mro__)


def resolve_engine(engine: str, vae: VAE) -> str:
    """The engine that is meant; refuse an unknown one, and one that this model has no use for."""
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
    "exact": {"kernels", "memory_limit", "spill_dir"},
    "preview": {"memory_limit"},
    "diffusers": {"tiling", "slicing"},
}


def check_engine_options(engine: str, given: Mapping[str, object]) -> None:
    """Refuse options of another engine: none is ignored."""
    for name, value in given.items():
        if value not in (None, False, "auto") and name not in _OPTIONS_OF[engine]:
            other = next(other for other, options in _OPTIONS_OF.items() if name in options)
            raise InvalidOptionError(
                f"{name}: got {value!r} with engine={engine!r}, which cannot honour it; it is for engine={other!r}"
            )


def resolve_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidOptionError(f"device: got {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if found.type not in ("cpu", "cuda"):
        raise InvalidOptionError(f"device: got {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidOptionError(
            f"device: got {device!r}, but this PyTorch sees no CUDA GPU; use device='cpu', or install a CUDA build"
        )
    if found.index is not None and found.type == "cuda" and found.index >= torch.cuda.device_count():
        raise InvalidOptionError(f"device: got {device!r}, but there are {torch.cuda.device_count()} GPUs, from cuda:0")
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device, name: str = "dtype") -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise InvalidOptionError(f"{name}: got {dtype!r}, expected 'auto', {', '.join(map(repr, _DTYPES))}")
    return found
