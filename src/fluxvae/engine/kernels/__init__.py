"""The arithmetic behind the sweeps: one small interface, so that a sweep does not know who computes.

A kernel set is given blocks of rows, each laid out afresh in scratch as (rows, width, channels), and computes blocks of
rows from them. `fluxvae.engine.kernels.choose` makes a kernel set. Importing this module does not import PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fluxvae.engine.calls import Call, Costs, Kind

if TYPE_CHECKING:
    import torch

    from fluxvae.engine.records import Conv, Norm, Projections
    from fluxvae.engine.statistics import Affine, FiniteChecks, Moments, Scaling

__all__ = ["AttentionBlock", "ConvBlock", "Kernels", "Padded", "Raw", "Refill", "Stream"]


class Stream(Protocol):
    """The rows of a map, each of them once and in order."""

    @property
    def views(self) -> bool:
        """Whether `take` answers with views of where the rows are, and never writes to ``into``."""

    def take(self, into: torch.Tensor) -> torch.Tensor:
        """The next ``len(into)`` rows: a view of where they are, or ``into`` itself, filled."""

    def pour(self, into: torch.Tensor, put: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        """Let ``put`` bring the next ``len(into)`` rows there, in as many pieces as they lie in.

        It is called with some rows and the part of ``into`` that they belong to, which may be the rows themselves.
        """


@dataclass(frozen=True)
class Raw:
    """What is still to be done to the rows of a block that were not put into a window: `Costs.reads_in_place`."""

    norm: Scaling | None
    """What the rows go through, with SiLU after it; None: nothing."""
    above: bool
    """Whether there is a row above the block. Outside of the map are zeros, which do not go through the norm."""
    below: bool
    """Whether there is one below it."""
    blocks: int = 1
    """How many blocks these rows are, all of them equally high. Each has statistics of its own, and the bits that it
    has alone: `Costs.blocks_at_once`."""


class Padded(NamedTuple):
    """The input of one block of a 3x3 convolution."""

    rows: torch.Tensor
    """As `ConvBlock.rows`."""
    raw: Raw | None = None
    """As `ConvBlock.raw`."""


@dataclass(frozen=True)
class ConvBlock:
    """One convolution of one block of rows: ``out = (conv(rows) + bias + residual) / scale``."""

    kind: Kind
    """``"conv3"``, a 3x3 convolution; ``"up"``, one of the map enlarged twofold by its nearest pixels; ``"down"``, one
    of stride 2 that is centred on the second row and column, the fourth, and so on; ``"linear"``, a 1x1 convolution."""
    rows: torch.Tensor
    """(n + 2, W, cin): the block with one row above and one below, which are zero outside the map. For ``"down"``, n is
    even, the first output is centred on the block's second row, and the row above is not looked at. For ``"linear"``,
    (n, W, cin). Where the rows are `raw`, those of them that there are."""
    weights: Any
    """What `Kernels.load` gave for this convolution and this kind."""
    out: torch.Tensor
    """(n, W, cout); (2n, 2W, cout) for ``"up"``; (n / 2, W // 2, cout) for ``"down"``; contiguous."""
    work: torch.Tensor
    """Flat uint8 scratch of at least `Costs.workspace` bytes, aligned to 256, with arbitrary contents."""
    residual: torch.Tensor | None = None
    """As large as ``out``, and possibly ``out`` itself. Only for ``"conv3"``."""
    scale: float = 1.0
    """What the sum is divided by. Only for ``"conv3"``."""
    statistics: Moments | None = None
    """Where the statistics of ``out`` are added to, if they are wanted; `Kernels.moments` made it. Not for
    ``"linear"``."""
    raw: Raw | None = None
    """What is still to be done to the rows; None: nothing. Only where `Costs.reads_in_place` says so."""


@dataclass(frozen=True)
class AttentionBlock:
    """Attention for some pixels, added to the layer's input in place: ``out = (attention + out) / scale``."""

    projections: Projections
    weights: Any
    """What `Kernels.load_attention` gave for these projections."""
    queries: torch.Tensor
    """(n, W, C): rows of the normalised map."""
    tokens: torch.Tensor
    """(pixels, C): the whole normalised map."""
    out: torch.Tensor
    """(n, W, C): the layer's input at the start, its result at the end."""
    work: torch.Tensor
    """Scratch, as `ConvBlock.work`."""
    statistics: Moments | None
    """As `ConvBlock.statistics`."""


@dataclass(frozen=True)
class Refill:
    """How a sweep's window moves down to its next block of rows."""

    window: torch.Tensor
    """(rows + 2, W, C): a block and one row above and below it, which are zero outside the map. Before, it holds the
    last block, if there was one."""
    first: bool
    """This is the map's first block. Otherwise the last two rows of the window become its first two."""
    fresh: tuple[int, int]
    """The rows of the window that are to be filled from the map, as (start, stop); they may be none."""
    bottom: int | None
    """The row of the window that lies below the map; None: there is none yet."""
    source: Stream
    """Gives the map's next rows."""
    norm: Scaling | None
    """What the map's rows go through on their way, with SiLU after it; None: nothing."""
    work: torch.Tensor
    """Scratch, as `ConvBlock.work`."""


class Kernels(Costs, Protocol):
    """What a sweep asks for. The same call with the same values must give the same bits, whatever came before."""

    channels_last: bool
    """The model's weights are in channels-last memory format; the engine sets it before anything else."""

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype that is computed in when the model's weights are ``stored`` in that one."""

    def prepare(self) -> float:
        """Compile, or load from a cache, what is not ready in this process yet. Returns the seconds that it took."""

    def session(self) -> AbstractContextManager[None]:
        """A context around a whole decode, in which the process's threads are as the kernels need them."""

    def affine(self, moments: Moments, norm: Norm, dtype: torch.dtype, checks: FiniteChecks) -> Affine:
        """The scale and shift that ``norm`` amounts to on the map with these statistics: see `Moments.affine`."""

    def pointwise(self, latents: torch.Tensor, conv: Conv) -> torch.Tensor:
        """A 1x1 convolution of latents (cin, lh, lw), in their dtype, to rows (lh, lw, cout), contiguous."""

    def load(self, conv: Conv, kind: Kind, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """The weights of ``conv`` as blocks of this kind want them, in ``dtype``.

        ``into``: flat uint8 scratch of `Costs.loaded` bytes that lives as long as the weights are used.
        """

    def load_attention(self, projections: Projections, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """The four projections, for `attend`; ``into`` as for `load`."""

    def prologue(
        self, rows: torch.Tensor, norm: Scaling | None, silu: bool, out: torch.Tensor, work: torch.Tensor
    ) -> None:
        """Bring raw rows (n, W, C) into a convolution's input: ``out = silu(norm(rows))``.

        ``rows`` may be ``out`` itself. Without a norm: a copy.
        """

    def refill(self, refill: Refill) -> None:
        """Move a window down to its next block, whose rows go through `prologue` with SiLU."""

    def moments(self, call: Call, blocks: int, room: torch.Tensor) -> Moments:
        """What the statistics of a map are gathered in that ``blocks`` calls of this kind make.

        ``room``: flat uint8 scratch of the arena's bytes in `Costs.statistics`, until all blocks are computed.
        """

    def convolve(self, block: ConvBlock) -> None:
        """Compute the block, and add the statistics of its result where they are wanted."""

    def attend(self, block: AttentionBlock) -> None:
        """Compute the block, and add the statistics of its result where they are wanted."""
