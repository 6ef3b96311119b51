"""Writes latents as trainers keep them in their caches, so that a trainer finds them there and encodes nothing.

Each format is what the trainer's source of June 2026 writes and looks for. `caches` reads them all back.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save

from fluxvae.errors import InvalidOptionError
from fluxvae.latents.format import LatentFormat

__all__ = ["CACHES", "Cache"]

Size = tuple[int, int]


@dataclass(frozen=True)
class Cache:
    """One trainer's cache of one model's latents, which are never packed."""

    program: str
    """What reads it, for messages."""
    end: str
    """What the name of a file ends with, after the picture's own name, width and height."""
    write: Callable[[torch.Tensor, Size, Size], bytes]
    """Makes a file of latents (1, C, lh, lw), the size that was encoded, and the picture's own."""
    flux2: bool = False
    """Whether the latents are FLUX.2's, rather than FLUX.1's."""
    raw: bool = False
    """Whether the latents are raw ones, which the trainer scales itself."""

    @property
    def suffix(self) -> str:
        """The suffix of the files, with its dot."""
        return self.end[self.end.index(".") :]

    def stem(self, name: str, own: Size) -> str:
        """Return the name of a picture's file without its suffix; ``own`` is the picture's (height, width)."""
        return f"{name}_{own[1]:04d}x{own[0]:04d}{self.end.removesuffix(self.suffix)}"

    def check(self, name: str, format: LatentFormat) -> None:
        """Refuse a checkpoint whose latents are not those of the model that the cache is for.

        Raises:
            InvalidOptionError: they are not; ``name`` is the format's.
        """
        flux1 = LatentFormat()  # whose shape SD3's and Qwen-Image's latents have too
        if self.flux2:
            fits = format.flux2 and format.channels == 32
        else:
            fits = (format.channels, format.scaling_factor) == (flux1.channels, flux1.scaling_factor)
        if format.preview or not fits:
            wanted = "FLUX.2's" if self.flux2 else "FLUX.1's"
            raise InvalidOptionError(
                f"format: got {name} with a checkpoint that is not {wanted}; it is the cache of {self.program}: write "
                "safetensors"
            )


def _sd_scripts(latents: torch.Tensor, size: Size, own: Size) -> bytes:
    """What ``save_latents_to_disk`` in ``library/strategy_base.py`` writes.

    ``crop_ltrb`` is what its ``get_crop_ltrb`` gives for the bucket and the picture's own size.
    """
    (height, width), (own_height, own_width) = size, own
    if width / height > own_width / own_height:
        resized = (height * own_width / own_height, float(height))
    else:
        resized = (float(width), width / (own_width / own_height))
    left, top = (width - resized[0]) // 2, (height - resized[1]) // 2
    end = f"_{latents.shape[2]}x{latents.shape[3]}"
    buffer = io.BytesIO()
    np.savez(
        buffer,
        **{
            f"latents{end}": latents[0].float().numpy(),
            f"original_size{end}": np.array([own_width, own_height], np.int64),
            f"crop_ltrb{end}": np.array([left, top, left + resized[0], top + resized[1]]),
        },
    )
    return buffer.getvalue()


def _musubi(architecture: str, frames: str = "") -> Callable[[torch.Tensor, Size, Size], bytes]:
    """What ``save_latent_cache_common`` in ``dataset/cache_io.py`` writes for an architecture.

    Args:
        architecture: its long name, as ``dataset/architectures.py`` has it.
        frames: what comes before height and width in the tensor's name.
    """

    def write(latents: torch.Tensor, size: Size, own: Size) -> bytes:
        dtype = str(latents.dtype).removeprefix("torch.")
        name = f"latents_{frames}{latents.shape[2]}x{latents.shape[3]}_{dtype}"
        metadata = {"architecture": architecture, "width": str(own[1]), "height": str(own[0])}
        return bytes(save({name: latents[0].contiguous()}, {**metadata, "format_version": "1.0.1"}))

    return write


CACHES = {
    "kohya": Cache("sd-scripts' FLUX.1 training", "_flux.npz", _sd_scripts),
    "musubi-flux2-dev": Cache(
        "musubi-tuner's FLUX.2 [dev] training", "_f2d.safetensors", _musubi("flux_2_dev"), flux2=True
    ),
    "musubi-flux2-klein-4b": Cache(
        "musubi-tuner's FLUX.2 [klein] 4B training", "_f2k4b.safetensors", _musubi("flux_2_klein_4b"), flux2=True
    ),
    "musubi-flux2-klein-9b": Cache(
        "musubi-tuner's FLUX.2 [klein] 9B training", "_f2k9b.safetensors", _musubi("flux_2_klein_9b"), flux2=True
    ),
    "musubi-z-image": Cache(
        "musubi-tuner's Z-Image training", "_zi.safetensors", _musubi("z_image", frames="1x"), raw=True
    ),
}
"""The caches by the names that ``fluxvae encode --format`` has for them. musubi-tuner's for FLUX.1 Kontext is not among
them, because it holds pairs of pictures."""
