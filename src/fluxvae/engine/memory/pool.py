"""The one block of memory that an arena is made of, and on a GPU the pool of its own that it comes from.

On a GPU an arena is about 1 GB in one piece. PyTorch keeps freed memory in a cache, and whatever is allocated next may
be cut out of it. Then an image that a caller keeps lies in the piece that the arena was, and the next arena finds no
room in it. A `torch.cuda.MemPool` is a cache apart. Nothing but the arena is allocated in it, so nothing is cut out of
the arena's memory, and when the pool is dropped at the end of the call, PyTorch gives that memory back to the card,
where the pipeline's next allocation finds it. The pool takes its memory from the card too, so the arena is never cut
out of what a pipeline has in PyTorch's cache. If the card has too little, PyTorch gives that cache back first.

The pool is the current one only while the block is allocated. All else that a call needs (the image, cuDNN's workspace,
rows of spilled maps on their way) comes from PyTorch's cache as ever, and so does what other threads allocate.

Versions of PyTorch before `FIRST_WITH_POOLS` have pools that are not safe to use. There the block comes from PyTorch's
cache, and the end of a call gives back the whole of that, the pipeline's share included.
"""

from __future__ import annotations

import os

import torch

__all__ = ["FIRST_WITH_POOLS", "ArenaPool"]

FIRST_WITH_POOLS = (2, 13)
"""The first version of PyTorch whose pools are used. In 2.6 a pool takes what other threads allocate meanwhile too, its
allocations do not give PyTorch's cache back when memory runs out, and to drop a pool while another thread captures a
CUDA graph ends the process. 2.13 and 2.15 were tried and do none of this; versions between were not."""

_ROUNDING = 2 << 20
"""PyTorch rounds up what it takes from the card to a multiple of this."""


class ArenaPool:
    """Allocates a call's arenas, one at a time, and gives their memory back at `close`."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is allocated before `take`."""
        self._device = device
        self._pool: torch.cuda.MemPool | None = None
        self._cached = False

    def take(self, nbytes: int) -> torch.Tensor:
        """A block of ``nbytes``, flat uint8, with arbitrary contents. A pool gives its last one again if it is free.

        While the current stream captures a CUDA graph, the block comes from the graph's own pool, as all that a capture
        allocates must, and `close` leaves everything as it is.

        Raises:
            torch.OutOfMemoryError: the GPU has no such block (on a CPU: RuntimeError).
        """
        if self._device.type != "cuda" or not _fragments() or torch.cuda.is_current_stream_capturing():
            return self._empty(nbytes)
        if not _has_pools():
            self._cached = True
            return self._empty(nbytes)
        if self._pool is None:
            if torch.cuda.mem_get_info(self._device)[0] < nbytes + _ROUNDING:
                torch.cuda.empty_cache()  # as PyTorch would by itself, but 2.13 prints a warning when it comes to that
            with torch.cuda.device(self._device):  # a pool belongs to the device that is current when it is made
                self._pool = torch.cuda.MemPool()
        try:
            with torch.cuda.use_mem_pool(self._pool, self._device):
                return self._empty(nbytes)
        except BaseException as error:
            # Its traceback holds a frame that holds the pool, which would then live for as long as the error does.
            raise error.with_traceback(None) from None

    def close(self) -> None:
        """Give the memory back to the card. Nothing may refer to the block any more.

        Where something does, as an error's traceback may, PyTorch gives the block back later: when it is freed and
        PyTorch gives its cache back, which it does before it lets memory run out.
        """
        self._pool = None
        if self._cached:
            self._cached = False
            try:
                torch.cuda.empty_cache()
            except RuntimeError as error:  # it refuses while another thread captures a CUDA graph; the cache stays then
                if "captures_underway" not in str(error):
                    raise

    def _empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)


def _fragments() -> bool:
    """Whether this process's allocator can end up with enough free memory, but in pieces.

    It is PyTorch's own that can, unless the environment lets it put pieces together from pages. CUDA's asynchronous
    allocator does so too, and has no pools; of any other allocator nothing is known.
    """
    settings = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    pages = any("expandable_segments:true" in value.replace(" ", "").lower() for value in settings)
    return torch.cuda.get_allocator_backend() == "native" and not pages


def _has_pools() -> bool:
    return tuple(map(int, torch.__version__.split(".")[:2])) >= FIRST_WITH_POOLS
