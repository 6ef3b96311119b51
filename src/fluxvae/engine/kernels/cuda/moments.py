"""The statistics of a map's blocks on an NVIDIA GPU, and the scale and shift that a GroupNorm makes of them.

A pass over a block (`passes.finish`) leaves one mean and one sum of squared deviations of each of its programs, in
float32. They are combined in float64, sixteen blocks in one launch, so that a map of 1024x1024 pixels takes one or two
launches instead of one for each block. Each block has a row of its own in a small table, and `scale_and_shift`
combines the rows. The order of every sum depends on the layer and the image's size alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fluxvae.engine.kernels.cuda import CONTRACTION
from fluxvae.engine.kernels.cuda.passes import parts_bytes, parts_pixels, power_of_two
from fluxvae.engine.statistics import Moments, Partial

__all__ = ["KEPT_BLOCKS", "CardMoments", "scale_and_shift"]

KEPT_BLOCKS = 16
"""Blocks whose programs' statistics are kept before one launch combines them: 4 MB for the largest blocks."""
_CHANNELS = 16
"""Channels of one program that combines."""


@triton.jit(do_not_specialize=["blocks", "phases", "each", "pixels", "last"])
def _combine(
    parts, rows, blocks, phases, each, pixels, last, slot, channels, PROGRAMS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """One block of a map: all its programs' statistics become a row (2, channels) of the table.

    ``slot``: float32 values between two blocks' ``parts``. ``each``: pixels of one program, ``pixels``: of one phase of
    a block, ``last``: of one phase of the last block.
    """
    block = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    pixels = tl.where(block == blocks - 1, last, pixels)
    programs = (pixels + each - 1) // each
    parts += block.to(tl.int64) * slot
    total = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, programs * phases, PROGRAMS):
        program = start + tl.arange(0, PROGRAMS)
        mask = (program[:, None] < programs * phases) & inside[None, :]
        n = tl.minimum(tl.maximum(pixels - (program % programs) * each, 0), each).to(tl.float64)
        at = program.to(tl.int64)[:, None] * (2 * channels) + channel[None, :]
        mean = tl.load(parts + at, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(mean * n[:, None], 0)
    centre = total / (pixels * phases).to(tl.float64)
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, programs * phases, PROGRAMS):
        program = start + tl.arange(0, PROGRAMS)
        mask = (program[:, None] < programs * phases) & inside[None, :]
        n = tl.minimum(tl.maximum(pixels - (program % programs) * each, 0), each).to(tl.float64)
        at = program.to(tl.int64)[:, None] * (2 * channels) + channel[None, :]
        apart = tl.load(parts + at, mask=mask, other=0.0).to(tl.float64) - centre[None, :]
        own = tl.load(parts + at + channels, mask=mask, other=0.0).to(tl.float64)
        m2 += tl.sum(own + tl.where(mask, apart * apart, 0.0) * n[:, None], 0)
    at = block.to(tl.int64) * (2 * channels) + channel
    tl.store(rows + at, centre, mask=inside)
    tl.store(rows + at + channels, m2, mask=inside)


@triton.jit(do_not_specialize=["blocks", "each", "last", "eps"])
def _affine(
    table, weight, bias, affine, finite, blocks, each, last, eps, channels,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One group of ``WIDTH`` channels: combine all blocks of each channel, then all channels of the group."""
    group = tl.program_id(0)
    own = tl.arange(0, BLOCK_C)
    channel = group * WIDTH + own
    inside = own < WIDTH
    total = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        n = tl.where(block == blocks - 1, last, each).to(tl.float64)
        at = block.to(tl.int64)[:, None] * (2 * channels) + channel[None, :]
        mean = tl.load(table + at, mask=(block[:, None] < blocks) & inside[None, :], other=0.0)
        total += tl.sum(mean * n[:, None], 0)
    pixels = each.to(tl.float64) * (blocks - 1) + last.to(tl.float64)
    centre = total / pixels
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        mask = (block[:, None] < blocks) & inside[None, :]
        n = tl.where(block == blocks - 1, last, each).to(tl.float64)
        at = block.to(tl.int64)[:, None] * (2 * channels) + channel[None, :]
        apart = tl.load(table + at, mask=mask, other=0.0) - centre[None, :]
        within = tl.load(table + at + channels, mask=mask, other=0.0)
        m2 += tl.sum(within + tl.where(mask, apart * apart, 0.0) * n[:, None], 0)
    whole = tl.sum(tl.where(inside, centre, 0.0), 0) / WIDTH
    apart = tl.where(inside, centre - whole, 0.0)
    variance = (tl.sum(tl.where(inside, m2, 0.0), 0) / pixels + tl.sum(apart * apart, 0)) / WIDTH
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float64) / tl.sqrt(variance + eps)
    factor = tl.where(variance < float("inf"), factor, float("nan"))  # Inf would make it 0, which looks well
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float64) - whole * factor
    scale = factor.to(tl.float32)
    tl.store(affine + channel, scale, mask=inside)
    tl.store(affine + channels + channel, offset.to(tl.float32), mask=inside)
    well = tl.where(tl.abs(scale) < float("inf"), 1, 0)  # not where it is NaN
    tl.store(finite + group, tl.min(tl.where(inside, well, 1), 0).to(tl.int8))


class CardMoments(Moments):
    """The statistics of one map that is made block by block, in the order of its blocks."""

    def __init__(self, channels: int, blocks: int, pixels: int, phases: int, room: torch.Tensor) -> None:
        """Make room for the statistics.

        Args:
            blocks: how many blocks the map has; all but the last are of the same size.
            pixels: the most pixels that one phase of a block has.
            phases: in how many parts a block is made: 2 for an upsample's, else 1.
            room: flat uint8 scratch of `scratch_bytes`, until all blocks are there.
        """
        self._table = torch.empty(blocks, 2, channels, dtype=torch.float64, device=room.device)
        self._parts, self._phases = room.view(torch.float32), phases
        self._slot = parts_bytes(pixels, channels, phases) // 4
        self._counts: list[int] = []
        self._pixels: list[int] = []  # of each block whose programs' statistics are not combined yet

    @staticmethod
    def scratch_bytes(channels: int, blocks: int, pixels: int, phases: int) -> int:
        """Bytes of scratch that are needed until all blocks are there."""
        return min(blocks, KEPT_BLOCKS) * parts_bytes(pixels, channels, phases)

    @staticmethod
    def table_bytes(channels: int, blocks: int) -> int:
        """Bytes beside the scratch, for as long as the statistics are needed."""
        return blocks * 2 * channels * 8

    def place(self) -> torch.Tensor:
        """Where the programs of the next block leave their statistics: float32, of `passes.parts_bytes`."""
        return self._parts[len(self._pixels) * self._slot :]

    def placed(self, pixels: int) -> None:
        """The programs of a block with so many pixels in each phase were launched, and leave them at `place`."""
        self._pixels.append(pixels)
        self._counts.append(self._phases * pixels)
        if len(self._pixels) == KEPT_BLOCKS or len(self._counts) == len(self._table):
            self._combine()

    def _combine(self) -> None:
        """One launch for all blocks that wait."""
        channels, waiting = self._table.shape[2], self._pixels
        start, self._pixels = len(self._counts) - len(waiting), []
        _combine[(-(-channels // _CHANNELS), len(waiting))](
            self._parts, self._table[start:], len(waiting), self._phases, parts_pixels(channels), waiting[0],
            waiting[-1], self._slot, channels, PROGRAMS=64, BLOCK_C=_CHANNELS, **CONTRACTION,
        )  # fmt: skip

    def add(self, partial: Partial) -> None:
        """See `Moments.add`: a block whose statistics were gathered in another way."""
        row = self._table[len(self._counts)]
        row[0].copy_(partial.mean)
        row[1].copy_(partial.m2)
        self._counts.append(partial.count)

    def table(self) -> torch.Tensor:
        """(blocks, 2, C) float64: the mean and the squared deviations of each block that there was."""
        return self._table[: len(self._counts)]

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Moments.stacked`."""
        return self.table()[:, 0], self.table()[:, 1]


def scale_and_shift(
    moments: CardMoments, groups: int, eps: float, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A GroupNorm as scale and shift, (C,) float32 each, and whether each group's are finite, (groups,) bool.

    weight, bias: (C,), of any float dtype.
    """
    table, counts = moments.table(), moments.counts
    blocks, channels = len(table), table.shape[2]
    affine = torch.empty(2, channels, dtype=torch.float32, device=table.device)
    finite = torch.empty(groups, dtype=torch.int8, device=table.device)
    width = channels // groups
    _affine[(groups,)](
        table, weight, bias, affine, finite, blocks, counts[0], counts[-1], eps, channels,
        WIDTH=width, BLOCKS=32, BLOCK_C=power_of_two(width), **CONTRACTION,
    )  # fmt: skip
    return affine[0], affine[1], finite.view(torch.bool)
