"""How an answer gets to Triton, and whether there is room for it: a region of /dev/shm, which grows and never shrinks.

Triton's ``send`` counts a response before it makes room for it. Where the region cannot grow any more, ``send`` raises,
no error can be sent in the response's place, and the client would wait for ever. Two things are done against that. What
certainly has no room is refused before the work, and once more before it is sent (`check_room`). And images are sent in
two steps, themselves and then the end (`send_images`): whatever becomes of the first, the second ends the request, and
Triton tells the client that nothing came ("expected a single response, got 0"). Errors are small, and sent in one step:
Triton forgets one that the end follows.

Source: Triton's python_backend, ``response_sender.cc`` and ``shm_manager.h``; seen to hold with Triton 2.51.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvae.errors import UnavailableError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LOG_MARK", "check_room", "lacks_room", "least_bytes", "send_images", "sent_bytes"]

LOG_MARK = "fluxvae: shared memory"
"""What lines of the log about it begin with; `fluxvae serve` looks for them."""
_SHM = Path("/dev/shm")
_GROWTH = 2**20  # the region grows by whole ones of these, at least one (shm-growth-byte-size, by default)
_BYTES_PER_PIXEL = {"images": 3, "images_np": 12, "images_pt": 12, "images_raw": 12}


def least_bytes(outputs: Iterable[str], pixels: int) -> list[int]:
    """Bytes of each output of so many pixels, before there are any; files may be of any size."""
    return [_BYTES_PER_PIXEL[name] * pixels for name in outputs if name in _BYTES_PER_PIXEL]


def sent_bytes(arrays: Iterable[np.ndarray[Any, Any]]) -> list[int]:
    """Bytes that each output takes as it is handed over; files have their length before them."""
    return [sum(4 + len(file) for file in array.flat) if array.dtype == object else array.nbytes for array in arrays]


def check_room(sizes: list[int]) -> None:
    """Refuse outputs for which there is no room.

    Raises:
        UnavailableError: says what they take, and what there is.
    """
    stat = os.statvfs(_SHM)
    disk = stat.f_bavail * stat.f_frsize
    region = _region_free()
    if region is not None and lacks_room(sizes, region, disk):
        raise UnavailableError(
            f"shared memory: the answer takes {sum(sizes) / 1e6:.1f} MB; {_SHM} has {disk / 1e6:.1f} MB free, the "
            f"server's region {region / 1e6:.1f} MB; try again later, or ask for 'images', a quarter of the bytes"
        )


def lacks_room(sizes: list[int], region: int, disk: int) -> bool:
    """Whether tensors of these sizes can certainly not be handed over.

    Args:
        region: bytes that are free in the region; perhaps not in one piece.
        disk: bytes by which regions can grow.
    """
    return sum(sizes) > region and sum(_GROWTH * (size // _GROWTH + 1) for size in sizes) > disk


def send_images(pb_utils: Any, sender: Any, response: Any) -> None:
    """Send the one response to a request, and end the request, whether or not that went well."""
    try:
        sender.send(response)
    finally:
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _region_free() -> int | None:
    """Bytes that are free in the region of this process; None outside of Triton's stub."""
    pool: Any = getattr(sys.modules.get("c_python_backend_utils"), "shared_memory", None)
    return int(pool.free_memory()) if hasattr(pool, "free_memory") else None
