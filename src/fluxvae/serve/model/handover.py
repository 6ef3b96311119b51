"""Finds out whether there is room to hand an answer to Triton, which takes it from a region of /dev/shm.

The region grows and never shrinks. Triton's ``send`` counts a response as sent before it makes room for it. Where the
region cannot grow any more, ``send`` raises, no error can be sent in the response's place, and the client would wait
for ever. So an answer that has no room is refused with an error: before the decode where the answer's size is known by
then, and again before it is sent.

One case is left, `Room.TIGHT`: the region may have enough free bytes, but not in one piece. If the request is alone in
its ``execute``, the answer is then returned from ``execute`` rather than sent, because Triton answers with an error of
its own where that fails. (Sending the response and the end of the answers separately would do as well, but Triton 2.51
crashes if the client leaves between the two.)

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

__all__ = ["LOG_MARK", "Room", "find_room", "room_for", "sent_bytes"]

LOG_MARK = "fluxvae: shared memory"
"""What the log's lines about a lack of room begin with. `fluxvae serve` looks for them."""
_SHM = Path("/dev/shm")
_GROWTH = 2**20  # the region grows by a multiple of so many bytes (the default of shm-growth-byte-size)
_SPARE = 2**26  # bytes that other processes may take between our look and the moment in which Triton takes its own


class Room(Enum):
    """How much room there is for an answer."""

    AMPLE = "the region can grow by all of it"
    TIGHT = "the region has as much, but perhaps not in one piece, or can grow by hardly more"
    NONE = "it cannot be handed over"


def sent_bytes(arrays: Iterable[np.ndarray[Any, Any]]) -> list[int]:
    """Return how many bytes each output takes when it is handed over. Files take 4 bytes more, for their length."""
    return [sum(4 + len(file) for file in array.flat) if array.dtype == object else array.nbytes for array in arrays]


def find_room(sizes: list[int]) -> Room:
    """Return how much room there is for outputs of these sizes in bytes: `Room.AMPLE` or `Room.TIGHT`.

    Raises:
        UnavailableError: there is none. The message says how much the outputs take and how much there is.
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
    """Decide how much room there is for tensors of these sizes.

    Args:
        sizes: the tensors' sizes in bytes.
        region: how many bytes are free in the region, perhaps not in one piece.
        disk: by how many bytes the regions in /dev/shm can still grow together.
    """
    growth = sum(_GROWTH * (size // _GROWTH + 1) for size in sizes)
    if growth + _SPARE <= disk:
        return Room.AMPLE
    return Room.TIGHT if growth <= disk or sum(sizes) <= region else Room.NONE


def _region_free() -> int | None:
    """Return how many bytes are free in the region of this process; None where it does not run inside Triton."""
    pool: Any = getattr(sys.modules.get("c_python_backend_utils"), "shared_memory", None)
    return int(pool.free_memory()) if hasattr(pool, "free_memory") else None
