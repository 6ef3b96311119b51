"""What a file claims to hold, against what a decode may take: judged by its header, before a value is read.

A few bytes can claim anything: zeros pack a thousandfold, and a tensor of stride 0 has any size at no cost. Whoever
reads latents from outside asks here first, with shapes and sizes only; nothing here opens or allocates anything.
"""

from __future__ import annotations

import math
import zipfile

from fluxvae.errors import InvalidLatentsError

__all__ = ["MAX_PIXELS", "MAX_ROWS", "check_member", "check_packing", "check_pixels", "check_rows", "most_unpacked"]

MAX_PIXELS = 16384 * 16384
"""Of one image, where the caller names no other: its latents take 256 MiB in float32, its pixels 3 GiB."""
MAX_ROWS = 1_000_000
"""Images of one file."""
_UNSUSPICIOUS = 64 * 2**20
_RATIO = 64


def check_pixels(
    name: str, shape: tuple[int, ...], channels: int, vae_scale_factor: int, max_pixels: int, advice: str
) -> None:
    """Refuse latents of an image larger than allowed; packed or not, they have as many values.

    Args:
        name: of what claims it, for the message.
        shape: of one image's latents, with or without a batch axis of 1.
        channels, vae_scale_factor: of the checkpoint.
        advice: how the caller allows more.

    Raises:
        InvalidLatentsError: more than ``max_pixels``.
    """
    pixels = math.prod(shape) * vae_scale_factor**2 // channels
    if pixels > max_pixels:
        raise InvalidLatentsError(
            f"{name}: got latents of shape {tuple(shape)}, which decode to {pixels} pixels, more than the {max_pixels} "
            f"that one image may have; {advice}"
        )


def check_rows(name: str, rows: int) -> None:
    """Refuse a file that claims more images than one may hold.

    Raises:
        InvalidLatentsError: more than `MAX_ROWS`.
    """
    if rows > MAX_ROWS:
        raise InvalidLatentsError(
            f"{name}: claims {rows} images, more than the {MAX_ROWS} that one file may hold; split it into several"
        )


def most_unpacked(stored: int) -> int:
    """Bytes that a file, or a part of one, of ``stored`` bytes may unpack to. Latents are noise: they hardly pack."""
    return max(_UNSUSPICIOUS, _RATIO * stored)


def check_packing(name: str, claimed: int, stored: int) -> None:
    """Refuse what claims far more bytes than are stored of it.

    Args:
        claimed: bytes once unpacked, or of all elements of an expanded tensor.
        stored: bytes in the file.

    Raises:
        InvalidLatentsError: more than `most_unpacked`.
    """
    if claimed > most_unpacked(stored):
        raise InvalidLatentsError(
            f"{name}: claims {claimed} bytes, but {stored} are stored: no latents pack so well, and it was not "
            "unpacked; if they are real, save them as they are (a tensor's .contiguous(), np.savez without compression)"
        )


def check_member(name: str, member: zipfile.ZipInfo) -> None:
    """`check_packing` of one file in a zip archive, by what the archive's directory says of it."""
    check_packing(f"{name}: {member.filename}", member.file_size, member.compress_size)
