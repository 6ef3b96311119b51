"""What a job is made of: the rows of its sources, the items to decode, and what became of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fluxvae.errors import FluxVAEError
from fluxvae.latents.reading import UNSAID, Reading

__all__ = ["Entry", "Failure", "Item", "Latents", "Result"]


@dataclass(frozen=True)
class Latents:
    """The values of one row of a source."""

    tensor: torch.Tensor
    """The latents, with a batch axis of 1, in the file's dtype."""
    ids: torch.Tensor | None = None
    """(1, N, 4): where each token of FLUX.2's packed latents belongs. None: the tokens come row by row."""


@dataclass(frozen=True)
class Entry:
    """One row of a source, as its metadata describe it. Nothing is decoded and no values are read to make one."""

    row: int
    shape: tuple[int, ...] | None
    """The shape with a batch axis of 1: (1, N, 4C) or (1, C, lh, lw). None: only reading the values would tell."""
    dtype: str
    """The dtype, as torch names it: ``"float32"``."""
    reading: Reading = UNSAID
    """What the file says about the row, unchecked. Its ids are there only where nothing else tells the size."""
    name: str | None = None
    """The name in the file's column of names. None: the source's own name serves."""
    label: str = ""
    """What tells the row from the other pictures of its file, in the output's name, where its number does not."""
    ask: str | None = None
    """Why the caller has to say whether the latents are raw. None: the file says it, or it need not be said."""


@dataclass(frozen=True)
class Item:
    """One image to make."""

    source: str
    """The path or URL of the file that holds the latents."""
    row: int
    name: str
    """The name of the output, below the output folder, with ``/`` between folders and without a suffix."""
    reading: Reading
    """How the latents are to be read, checked as far as it goes without their values. The size is that of the image,
    already floored. Ids are not here; they are read together with the latents."""

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) of the image in pixels."""
        assert self.reading.height is not None
        assert self.reading.width is not None
        return self.reading.height, self.reading.width

    @property
    def pixels(self) -> int:
        """The number of pixels of the image."""
        height, width = self.size
        return height * width

    def as_dict(self) -> dict[str, Any]:
        """Return the item as values that JSON can hold; `from_dict` undoes it."""
        return vars(self) | {"reading": vars(self.reading)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Item:
        """Make the item that `as_dict` was called on."""
        return cls(**{**values, "reading": Reading(**values["reading"])})


@dataclass(frozen=True)
class Failure:
    """Why one item, or one whole source, gave no image: a line of ``failures.jsonl``."""

    source: str
    row: int | None
    """The row of the source; None: the source as a whole."""
    name: str | None
    error: str
    """The name of the error's class."""
    message: str

    @classmethod
    def of(cls, error: BaseException, source: str, row: int | None = None, name: str | None = None) -> Failure:
        """The failure that ``error`` is. Errors that are not fluxvae's are told with their class."""
        words = str(error).strip() or type(error).__name__
        return cls(source, row, name, type(error).__name__, words if isinstance(error, FluxVAEError) else words[:500])

    def as_dict(self) -> dict[str, Any]:
        """Return the failure as values that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """What became of one item: written, or not."""

    item: Item
    failure: Failure | None = None
