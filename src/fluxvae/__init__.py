"""Packed FLUX latents in, exactly the image that diffusers' FluxPipeline would have made out."""

from fluxvae.decoder import Decoder
from fluxvae.errors import (
    CheckpointError,
    DecodeCancelled,
    FluxVAEError,
    InvalidLatentsError,
    InvalidOptionError,
    MemoryLimitError,
    NonFiniteOutputError,
)
from fluxvae.install import install
from fluxvae.latents import SizeFlooredWarning, pack_latents, unpack_latents

__all__ = [
    "CheckpointError",
    "DecodeCancelled",
    "Decoder",
    "FluxVAEError",
    "InvalidLatentsError",
    "InvalidOptionError",
    "MemoryLimitError",
    "NonFiniteOutputError",
    "SizeFlooredWarning",
    "__version__",
    "install",
    "pack_latents",
    "unpack_latents",
]

__version__ = "0.1.0"
