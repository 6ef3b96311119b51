"""The block of memory that a CPU's arenas are made of, where the engine keeps it from one call to the next.

A block that is new to the process has no pages yet. The system finds and clears one whenever a page is touched for the
first time, which on a virtual machine was measured to take a tenth to a fifth of a decode. A block that is kept has its
pages, and large ones are worth their time there: weights and tiles are read with fewer misses of the address cache.
"""

from __future__ import annotations

import torch

from fluxvae.engine.memory.pages import in_large_pages
from fluxvae.errors import InvalidOptionError

__all__ = ["KeptMemory", "check_device"]


def check_device(device: torch.device) -> None:
    """Refuse a device whose memory is not kept.

    Raises:
        InvalidOptionError: it is no CPU.
    """
    if device.type != "cpu":
        raise InvalidOptionError(
            f"keep_memory: got True with a model on {device}; expected one on a CPU. A GPU's memory goes back to the "
            "card after every call; on a GPU leave it out, or use cuda_graphs"
        )


class KeptMemory:
    """One block, which serves every arena that it is large enough for: an `arena.Room`."""

    def __init__(self) -> None:
        """Nothing is allocated before `take`."""
        self._block: torch.Tensor | None = None

    @property
    def held_bytes(self) -> int:
        """What stays allocated between two calls. It may be asked while another thread decodes."""
        block = self._block
        return 0 if block is None else len(block)

    def fit(self, most: int) -> None:
        """Give the block back if it is larger than a call's limit leaves room for."""
        if self.held_bytes > most:
            self.drop()

    def take(self, nbytes: int) -> torch.Tensor:
        """A block of at least ``nbytes``, flat uint8, with arbitrary contents: the one that is kept, if that will do.

        Raises:
            MemoryError, RuntimeError: there is no such block.
        """
        if self.held_bytes < nbytes:
            self.drop()  # before the new one is allocated
            large = in_large_pages(nbytes)
            if large is None:
                self._block = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            else:
                self._block = torch.frombuffer(large, dtype=torch.uint8)
        assert self._block is not None
        return self._block

    def close(self) -> None:
        """Nothing is given back at the end of a call."""

    def drop(self) -> None:
        """Give the block back. Nothing may refer to it any more."""
        self._block = None
