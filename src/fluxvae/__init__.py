"""FLUX latents to pixels and pixels to latents, exactly as diffusers' pipelines compute them, in bounded memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fluxvae.errors import (
    CheckpointError,
    DeadlineExceededError,
    DecodeCancelled,
    FluxVAEError,
    ForkedProcessError,
    InvalidImagesError,
    InvalidLatentsError,
    InvalidOptionError,
    MemoryLimitError,
    MissingExtraError,
    NonFiniteOutputError,
    UnavailableError,
)
from fluxvae.install import install

if TYPE_CHECKING:
    from fluxvae.decoder import Decoder
    from fluxvae.encoder import Encoder
    from fluxvae.latents.packing import SizeFlooredWarning, pack_latents, unpack_latents

__all__ = [
    "CheckpointError",
    "DeadlineExceededError",
    "DecodeCancelled",
    "Decoder",
    "Encoder",
    "FluxVAEError",
    "ForkedProcessError",
    "InvalidImagesError",
    "InvalidLatentsError",
    "InvalidOptionError",
    "MemoryLimitError",
    "MissingExtraError",
    "NonFiniteOutputError",
    "SizeFlooredWarning",
    "UnavailableError",
    "__version__",
    "install",
    "pack_latents",
    "unpack_latents",
]

__version__ = "0.1.0"

# These need PyTorch, whose import takes seconds and memory, so they are imported when they are first used. The
# supervisor and `fluxvae --help` never use them.
_WITH_TORCH = {
    "Decoder": "fluxvae.decoder",
    "Encoder": "fluxvae.encoder",
    "SizeFlooredWarning": "fluxvae.latents.packing",
    "pack_latents": "fluxvae.latents.packing",
    "unpack_latents": "fluxvae.latents.packing",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_WITH_TORCH[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
