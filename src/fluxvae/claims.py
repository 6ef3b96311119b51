"""Refuses files of latents that claim far too much, by their headers, before any value is read.

A small file can claim any size: zeros pack a thousandfold, and a tensor of stride 0 has any size at no cost. Whoever
reads latents from outside therefore asks here first. Only shapes and sizes are looked at; nothing here opens a file or
allocates memory.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

from fluxvae.errors import InvalidLatentsError

__all__ = [
    "MAX_PICTURE_PIXELS",
    "MAX_PIXELS",
    "MAX_ROWS",
    "check_member",
    "check_packing",
    "check_pixels",
    "check_rows",
    "is_special",
    "most_unpacked",
]

MAX_PIXELS = 16384 * 16384
"""The most pixels of one image, unless the caller says otherwise. Such an image's latents take 256 MiB in float32, and
its pixels 3 GiB."""
MAX_PICTURE_PIXELS = 178_956_970
"""The most pixels of a picture that is encoded: what Pillow opens, which is twice its ``Image.MAX_IMAGE_PIXELS``."""
MAX_ROWS = 1_000_000
"""The most images that one file may hold."""
_UNSUSPICIOUS = 64 * 2**20
"""Unpacking to so many bytes is harmless, whatever the file's size."""
_RATIO = 64
"""Beyond that, to how many times its stored size a file may unpack."""


def check_pixels(
    name: str, shape: tuple[int, ...], channels: int, vae_scale_factor: int, max_pixels: int, advice: str
) -> None:
    """Refuse the latents of an image that is larger than allowed.

    Packed or not, the latents of an image have the same number of values, so the number of pixels follows from it.

    Args:
        name: what the latents come from, such as a file and a tensor in it, for the message.
        shape: the shape of one image's latents, with or without a batch axis of 1.
        channels, vae_scale_factor: those of the checkpoint: 16 and 8 for FLUX.1.
        max_pixels: the most pixels that the image may have.
        advice: what the user can do to allow more, for the message.

    Raises:
        InvalidLatentsError: the image would have more than ``max_pixels``.
    """
    pixels = math.prod(shape) * vae_scale_factor**2 // channels
    if pixels > max_pixels:
        raise InvalidLatentsError(
            f"{name}: got latents of shape {tuple(shape)}, which decode to {pixels} pixels, more than the {max_pixels} "
            f"that one image may have; {advice}"
        )


def check_rows(name: str, rows: int) -> None:
    """Refuse a file that claims to hold more images than a file may.

    Raises:
        InvalidLatentsError: it claims more than `MAX_ROWS`.
    """
    if rows > MAX_ROWS:
        raise InvalidLatentsError(
            f"{name}: claims {rows} images, more than the {MAX_ROWS} that one file may hold; split it into several"
        )


def most_unpacked(stored: int) -> int:
    """Return how many bytes a file, or a part of one, may unpack to if it is stored in ``stored`` bytes.

    Real latents look like noise and hardly pack, so this bound is generous to them.
    """
    return max(_UNSUSPICIOUS, _RATIO * stored)


def check_packing(name: str, claimed: int, stored: int) -> None:
    """Refuse a file, or a part of one, that claims far more bytes than it stores.

    Args:
        name: what claims this, for the message.
        claimed: the bytes once unpacked, or of all elements of an expanded tensor.
        stored: the bytes in the file.

    Raises:
        InvalidLatentsError: it claims more than `most_unpacked` allows.
    """
    if claimed > most_unpacked(stored):
        raise InvalidLatentsError(
            f"{name}: claims {claimed} bytes, but {stored} are stored: no latents pack so well, and it was not "
            "unpacked; if they are real, save them as they are (a tensor's .contiguous(), np.savez without compression)"
        )


def is_special(path: Path) -> bool:
    """Whether something other than a file is there. To open a pipe would mean to wait until someone writes to it."""
    return path.exists() and not path.is_file()


def check_member(name: str, member: zipfile.ZipInfo) -> None:
    """Apply `check_packing` to one file in a zip archive, by the sizes that the archive's directory gives."""
    check_packing(f"{name}: {member.filename}", member.file_size, member.compress_size)
