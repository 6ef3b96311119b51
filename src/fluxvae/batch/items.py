"""What a job is made of: items to decode, and what became of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fluxvae.errors import FluxVAEError

__all__ = ["Entry", "Failure", "Item", "Latents", "Result"]


@dataclass(frozen=True)
class Latents:
    """One row of a source, read."""

    tensor: torch.Tensor
    """With a batch axis of 1, in a dtype of the file's own."""
    ids: torch.Tensor | None = None
    """(1, N, 4): where each token belongs, of FLUX.2's packed latents; None: row by row."""


@dataclass(frozen=True)
class Entry:
    """One row of a source, as its metadata tells it: nothing is decoded, and no values are read, to make one."""

    row: int
    shape: tuple[int, ...] | None
    """With a batch axis of 1: (1, N, 4C) or (1, C, lh, lw). None: only reading the values would tell."""
    dtype: str
    """As torch names it: ``"float32"``."""
    height: Any = None
    """As the file says, unchecked; None: it says nothing."""
    width: Any = None
    name: str | None = None
    """From a column; None: the source's own name serves."""
    raw: object = None
    """As the file says, unchecked: the latents are raw already; None: it says nothing."""
    ids: torch.Tensor | None = None
    """As `Latents.ids`; read where only they tell the size."""
    label: str = ""
    """What tells it from the other pictures of its file, for the output's name; with it, the row says nothing."""
    ask: str | None = None
    """Why the caller has to say whether the latents are raw; None: ``raw`` says it, or nothing need be said."""


@dataclass(frozen=True)
class Item:
    """One image to make."""

    source: str
    """Path or URL of the file that holds the latents."""
    row: int
    name: str
    """Of the output, below the output folder, with ``/`` between folders and without a suffix."""
    height: int
    """Of the image, in pixels; already floored to what is decoded."""
    width: int
    raw: bool | None = None
    """As for `Decoder.decode`."""

    @property
    def pixels(self) -> int:
        """Of the image."""
        return self.height * self.width


@dataclass(frozen=True)
class Failure:
    """Why one item, or one whole source, gave no image: a line of ``failures.jsonl``."""

    source: str
    row: int | None
    """None: the source as a whole."""
    name: str | None
    error: str
    """Class of the error."""
    message: str

    @classmethod
    def of(cls, error: BaseException, source: str, row: int | None = None, name: str | None = None) -> Failure:
        """The failure that ``error`` is. Errors that are not fluxvae's are told with their class."""
        words = str(error).strip() or type(error).__name__
        return cls(source, row, name, type(error).__name__, words if isinstance(error, FluxVAEError) else words[:500])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """What became of one item: written, or not."""

    item: Item
    failure: Failure | None = None
