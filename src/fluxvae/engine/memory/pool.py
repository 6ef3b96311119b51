"""The one block of memory that an arena is made of, and on a GPU the pool of its own that it comes from.

On a GPU an arena is about 1 GB in one piece. PyTorch keeps freed memory in a cache, and whatever is allocated next may
be cut out of it. So an image that a caller keeps would lie in the piece that the arena was, and the next arena would
find no room in it. A `torch.cuda.MemPool` is a cache apart. Nothing but the arena is allocated in it, so nothing is cut
out of the arena's memory, and when the pool is dropped at the end of the call, PyTorch gives that memory back to the
card, where the pipeline's next allocation finds it. The pool takes its memory from the card too, so the arena is never
cut out of what a pipeline has in PyTorch's cache. When the card has too little, PyTorch empties its cache first.

The pool is the current one only while the block is allocated. All else that a call needs (the image, cuDNN's workspace,
rows of spilled maps on their way) comes from PyTorch's cache as ever, and so does what other threads allocate.
"""

from __future__ import annotations

import os

import torch

__all__ = ["FIRST_WITH_POOLS", "ArenaPool", "cache_advice"]

FIRST_WITH_POOLS = (2, 13)
"""The first version of PyTorch whose pools are used. In 2.6 a pool also takes what other threads allocate meanwhile,
its allocations do not empty PyTorch's cache when memory runs out, and to drop a pool while another thread captures a
CUDA graph ends the process. docs/notebook.md has what was tried, and with which versions."""


class ArenaPool:
    """Allocates a call's arenas, one at a time, and gives their memory back at `close`."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is allocated before `take`."""
        self._device = device
        self._pool: torch.cuda.MemPool | None = None

    def take(self, nbytes: int) -> torch.Tensor:
        """A block of ``nbytes``, flat uint8, with arbitrary contents: a pool's last one again, if that is free.

        While the current stream captures a CUDA graph, the block comes from the graph's own pool, as all that a capture
        allocates must.

        Raises:
            torch.OutOfMemoryError: the GPU has no such block (on a CPU: RuntimeError).
        """
        if self._device.type != "cuda" or not _has_pools() or torch.cuda.is_current_stream_capturing():
            return self._empty(nbytes)
        if self._pool is None:
            with torch.cuda.device(self._device):  # a pool belongs to the device that is current when it is made
                self._pool = torch.cuda.MemPool()
        failed: BaseException
        try:
            with torch.cuda.use_mem_pool(self._pool, self._device):
                return self._empty(nbytes)
        except BaseException as error:
            # Its traceback holds a frame that holds the pool, which would then live for as long as the error does.
            failed = error.with_traceback(None)
        raise failed

    def close(self) -> None:
        """Drop the pool. Its memory goes back to the card, or does so once nothing refers to the block any more.

        In the second case it is PyTorch that gives it back, when it empties its cache the next time.
        """
        self._pool = None

    def _empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)


def cache_advice(device: torch.device) -> str:
    """What can be done where memory ran out although enough is free, to be appended to a message; usually nothing."""
    if device.type != "cuda" or torch.cuda.get_allocator_backend() != "native" or _has_pools() or _expandable():
        return ""
    first = ".".join(map(str, FIRST_WITH_POOLS))
    return (
        f". PyTorch {torch.__version__} may have free memory in too many pieces: start the process with "
        f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or use PyTorch {first} or later, where decodes have a pool "
        "of their own"
    )


def _has_pools() -> bool:
    """Whether arenas come from pools. Allocators other than PyTorch's own caching one have none."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return version >= FIRST_WITH_POOLS and torch.cuda.get_allocator_backend() == "native"


def _expandable() -> bool:
    """Whether the user's environment lets PyTorch put memory together from pages, so that there are no pieces."""
    settings = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in value.replace(" ", "").lower() for value in settings)
