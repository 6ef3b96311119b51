"""GroupNorm over a map that is never in one place: statistics block by block, combined in one order.

Every block of rows gives, per channel, its count, its mean and its sum of squared deviations from that mean. The
blocks are combined in float64 in block order (Chan, Golub and LeVeque 1979), so the result depends on how the image
is cut into blocks (a function of layer and image size alone) and on nothing else. On a CPU 64 are combined into one as
soon as they are there: a map of 4096 pixels has thousands, whose statistics would be megabytes outside of every plan.
The kernels for an NVIDIA GPU have a way of their own, which takes fewer launches (`kernels.cuda.moments`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from fluxvae.engine.records import Norm, PixelNorm, parameters

__all__ = [
    "MOST_BLOCKS",
    "Affine",
    "FiniteChecks",
    "Moments",
    "NonFiniteMap",
    "Partial",
    "PixelScale",
    "Scaling",
    "block_moments",
    "pixel_scale",
    "raise_first",
]

MOST_BLOCKS = 64
"""Blocks whose statistics are kept apart on a CPU before they are combined. On a GPU all are kept apart, because there
combining them is one launch at the end of a map."""


class NonFiniteMap(ArithmeticError):
    """A feature map holds NaN or Inf (or overflowed when squared); the engine decides what that becomes."""


class FiniteChecks:
    """Looks for NaN and Inf in every map's statistics and in every block of pixels, without waiting for a GPU.

    To know the answer at once, the CPU would have to wait until the GPU has done all that was asked of it, and the GPU
    would then wait for the CPU. So on a GPU the answers stay on the device until `settle`, after the last block.
    """

    def __init__(self, device: torch.device, *, at_once: bool | None = None) -> None:
        """``at_once``: whether the answer to a question is known when it was asked; by default, on a CPU alone."""
        self.at_once = device.type == "cpu" if at_once is None else at_once
        self._answers: list[tuple[torch.Tensor, str]] = []

    def require(self, values: torch.Tensor, otherwise: str) -> None:
        """Raise NonFiniteMap(``otherwise``) if a value is not finite: now on a CPU, at `settle` elsewhere.

        NaN spreads to the smallest and the largest value. To look at each value would take memory that no plan has.
        """
        self.note(torch.isfinite(torch.stack(torch.aminmax(values))).all(), otherwise)

    def note(self, finite: torch.Tensor, otherwise: str) -> None:
        """As `require`, where it was found out already: ``finite`` (any shape, bool) is true where all is well."""
        if not self.at_once:
            self._answers.append((finite.view(-1), otherwise))
        elif not bool(finite.all()):
            raise NonFiniteMap(otherwise)

    def settle(self) -> None:
        """Raise NonFiniteMap with the first message of those that were not finite, and forget all of them."""
        raise_first(self.taken())

    def taken(self) -> list[tuple[torch.Tensor, str]]:
        """The answers so far, for `raise_first`; they are forgotten here."""
        answers, self._answers = self._answers, []
        return answers


def raise_first(answers: list[tuple[torch.Tensor, str]]) -> None:
    """Raise NonFiniteMap with the message of the first answer (n,) bool that is false somewhere.

    All answers are read from a GPU at once.
    """
    if answers:
        found = torch.cat([finite for finite, _ in answers]).tolist()
        for finite, message in answers:
            if not all(found[: len(finite)]):
                raise NonFiniteMap(message)
            del found[: len(finite)]


@dataclass(frozen=True)
class Affine:
    """What a GroupNorm does once its statistics are known: ``x * scale + shift`` per channel."""

    scale: torch.Tensor
    """(C,) float32; float64 where the decode is in float64."""
    shift: torch.Tensor
    """(C,), in the dtype of ``scale``."""


@dataclass(frozen=True)
class PixelScale:
    """What a norm of each pixel does: ``x / max(|x|, eps) * scale + shift``, with the length of the pixel's channels.

    It needs no statistics of a map, so whatever reads a map's rows may begin at once.
    """

    scale: torch.Tensor
    """(C,) float32; float64 where the decode is in float64."""
    shift: torch.Tensor
    """(C,), in the dtype of ``scale``."""
    eps: float


Scaling: TypeAlias = "Affine | PixelScale"
"""What a norm does to the rows of a map."""


def pixel_scale(norm: PixelNorm, dtype: torch.dtype) -> PixelScale:
    """What ``norm`` does, in ``dtype``."""
    weight, bias = parameters(norm)
    scale = (weight.to(torch.float64) * norm.channels**0.5).to(dtype)
    return PixelScale(scale, torch.zeros_like(scale) if bias is None else bias.to(dtype), norm.eps)


@dataclass(frozen=True)
class Partial:
    """The statistics of one block of rows, for each channel."""

    count: int
    mean: torch.Tensor
    """(C,) float32 or float64: the mean of each channel."""
    m2: torch.Tensor
    """(C,): the sum of squared deviations from ``mean``."""


class Moments:
    """The statistics of one map while its blocks come in; 16 bytes per channel for each that is kept apart."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._means: list[torch.Tensor] = []
        self._m2s: list[torch.Tensor] = []

    def add(self, partial: Partial) -> None:
        """Take the statistics of the next block; blocks come in order."""
        self._counts.append(partial.count)
        # These are copies, because a view would keep all that it is a view of.
        self._means.append(partial.mean.to(torch.float64, copy=True))
        self._m2s.append(partial.m2.to(torch.float64, copy=True))
        if len(self._counts) == MOST_BLOCKS and partial.mean.device.type == "cpu":
            total, mean, m2 = self._combined()
            self._counts, self._means, self._m2s = [total], [mean], [m2]

    @property
    def counts(self) -> list[int]:
        """How many values each channel has, for every block that is kept apart."""
        return self._counts

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(blocks, C) float64 each: the means, and the squared deviations from them."""
        return torch.stack(self._means), torch.stack(self._m2s)

    def _combined(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Count, mean and squared deviations of all blocks together."""
        means, m2s = self.stacked()
        counts, total = self._weights(means.device), sum(self._counts)
        mean = (means * counts).sum(0) / total
        return total, mean, m2s.sum(0) + ((means - mean).square() * counts).sum(0)

    def affine(self, norm: Norm, dtype: torch.dtype, checks: FiniteChecks) -> Affine:
        """The affine that ``norm`` amounts to, in ``dtype``, after the last block; ``checks`` looks for NaN and Inf."""
        total, mean, m2 = self._combined()
        grouped, grouped_m2 = mean.view(norm.groups, -1), m2.view(norm.groups, -1)
        centre = grouped.mean(1, keepdim=True)
        variance = (grouped_m2.sum(1, keepdim=True) / total + (grouped - centre).square().sum(1, keepdim=True)) / (
            grouped.shape[1]
        )
        checks.require(variance, f"the input of {norm.name} holds NaN or Inf")
        scale = (variance + norm.eps).rsqrt().expand_as(grouped).reshape(-1)
        shift = -centre.expand_as(grouped).reshape(-1)
        if not norm.learned:
            return Affine(scale.to(dtype), (shift * scale).to(dtype))
        weight, bias = parameters(norm)
        scale = scale * weight.to(torch.float64)
        shift = shift * scale if bias is None else shift * scale + bias.to(torch.float64)
        return Affine(scale.to(dtype), shift.to(dtype))

    def _weights(self, device: torch.device) -> torch.Tensor:
        """The counts, (blocks, 1) float64. All but the last are alike, so a fill makes them, which waits for no GPU."""
        first, last = self._counts[0], self._counts[-1]
        if any(count != first for count in self._counts[:-1]):
            return torch.tensor(self._counts, dtype=torch.float64, device=device)[:, None]
        counts = torch.full((len(self._counts), 1), float(first), dtype=torch.float64, device=device)
        counts[-1:].fill_(last)
        return counts


def block_moments(block: torch.Tensor, work: torch.Tensor) -> Partial:
    """The mean of each channel of a block (n, W, C) and, in a second pass, the squared deviations from that mean.

    Two passes lose nothing to cancellation. PyTorch's sum over the outer dimension adds pairwise, in an order that does
    not depend on the number of threads.

    Args:
        work: flat uint8 scratch with room for the block in float32 (float64 for a float64 block).
    """
    flat = block.view(-1, block.shape[-1])
    dtype = torch.float64 if block.dtype == torch.float64 else torch.float32
    wide = work[: flat.numel() * dtype.itemsize].view(dtype).view(flat.shape)
    if block.dtype == dtype:
        mean = flat.sum(0) / len(flat)
        torch.sub(flat, mean, out=wide)
    else:
        wide.copy_(flat)
        mean = wide.sum(0) / len(flat)
        wide.sub_(mean)
    return Partial(len(flat), mean, wide.square_().sum(0))
