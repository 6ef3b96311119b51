"""Whether there is room to hand an answer to Triton: a region of /dev/shm, which grows and never shrinks.

Triton's ``send`` counts a response before it makes room for it. Where the region cannot grow any more, ``send`` raises,
no error can be sent in the response's place, and the client would wait for ever. So what has no room is refused, before
the work where its size is known, and again before it is sent. Between the two lies an answer for which the region has
enough that may not be in one piece. If it is alone, ``execute`` returns it instead of sending it: Triton then answers a
failure with an error of its own. (To send the response and the end one after the other would do as well, were it not
that Triton 2.51 crashes where the client has left in between.)

Source: Triton's python_backend, ``response_sender.cc``, ``shm_manager.h`` and ``pb_stub.cc``; seen with Triton 2.51.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvae.errors import UnavailableError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LOG_MARK", "Room", "find_room", "least_bytes", "room_for", "sent_bytes"]

LOG_MARK = "fluxvae: shared memory"
"""What lines of the log about it begin with; `fluxvae serve` looks for them."""
_SHM = Path("/dev/shm")
_GROWTH = 2**20  # the region grows by whole ones of these, at least one (shm-growth-byte-size, by default)
_SPARE = 2**26  # what others may take in the moment between our look and Triton's
_BYTES_PER_PIXEL = {"images": 3, "images_np": 12, "images_pt": 12, "images_raw": 12}


class Room(Enum):
    """What there is for an answer."""

    AMPLE = "the region can grow by all of it"
    TIGHT = "the region has as much, but perhaps not in one piece, or can grow by hardly more"
    NONE = "it cannot be handed over"


def least_bytes(outputs: Iterable[str], pixels: int) -> list[int]:
    """Bytes of each output of so many pixels, before there are any; files may be of any size."""
    return [_BYTES_PER_PIXEL[name] * pixels for name in outputs if name in _BYTES_PER_PIXEL]


def sent_bytes(arrays: Iterable[np.ndarray[Any, Any]]) -> list[int]:
    """Bytes that each output takes as it is handed over; files have their length before them."""
    return [sum(4 + len(file) for file in array.flat) if array.dtype == object else array.nbytes for array in arrays]


def find_room(sizes: list[int]) -> Room:
    """The room for outputs of these sizes, in bytes: `Room.AMPLE` or `Room.TIGHT`.

    Raises:
        UnavailableError: there is none; it says what they take, and what there is.
    """
    stat = os.statvfs(_SHM)
    disk = stat.f_bavail * stat.f_frsize
    region = _region_free()
    room = room_for(sizes, sum(sizes) if region is None else region, disk)
    if room is Room.NONE:
        assert region is not None
        raise UnavailableError(
            f"shared memory: the answer takes {sum(sizes) / 1e6:.1f} MB; {_SHM} has {disk / 1e6:.1f} MB free, the "
            f"server's region {region / 1e6:.1f} MB; try again later, or ask for 'images', a quarter of the bytes"
        )
    return room


def room_for(sizes: list[int], region: int, disk: int) -> Room:
    """What there is for tensors of these sizes.

    Args:
        region: bytes that are free in the region; perhaps not in one piece.
        disk: bytes by which regions can grow.
    """
    growth = sum(_GROWTH * (size // _GROWTH + 1) for size in sizes)
    if growth + _SPARE <= disk:
        return Room.AMPLE
    return Room.TIGHT if growth <= disk or sum(sizes) <= region else Room.NONE


def _region_free() -> int | None:
    """Bytes that are free in the region of this process; None outside of Triton's stub."""
    pool: Any = getattr(sys.modules.get("c_python_backend_utils"), "shared_memory", None)
    return int(pool.free_memory()) if hasattr(pool, "free_memory") else None
