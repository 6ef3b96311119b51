"""The passes over memory between cuDNN's convolutions, in the Triton language (the compiler, not the server).

Maps are channels last: (pixels, channels), contiguous. All arithmetic is float32, and every stored value is rounded
once.

Statistics are gathered in three steps, whose order depends on the number of pixels alone. A program takes the mean of
each of its tiles, then the squared deviations from it, and merges its tiles in float32. It stores one mean and one sum
of squared deviations. `_combine` combines those of all programs in float64.

Offsets have 64 bits, because a map of 16384x16384 latents has more than 2**31 values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["affine", "combine", "finish", "interleave", "parts_bytes", "parts_pixels", "prologue"]

_TILE_VALUES = 4096
_TILES = 8
"""How many tiles a program has. It then has 256 pixels of 128 channels, and 32 MB of half precision 512 programs."""


@triton.jit(do_not_specialize=["pixels"])
def _prologue(
    src, dst, scale, shift, pixels, channels, SILU: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (pixel[:, None] < pixels) & (channel[None, :] < channels)
    at = pixel[:, None] * channels + channel[None, :]
    value = tl.load(src + at, mask=mask, other=0.0).to(tl.float32)
    value = value * tl.load(scale + channel, mask=channel < channels, other=0.0)[None, :]
    value = value + tl.load(shift + channel, mask=channel < channels, other=0.0)[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(dst + at, value.to(dst.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "has_residual", "factor", "width", "phase"])
def _finish(
    result, bias, residual, dst, parts, pixels, channels, has_residual, factor, width, phase,
    UP: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * (TILES * TILE)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    added = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(TILES):
        start = first + tile * TILE
        pixel = start + tl.arange(0, TILE)
        mask = (pixel[:, None] < pixels) & inside[None, :]
        if UP:
            # `result` has both column phases of a row phase: phase 1 in the upper channels, one column further right.
            row, column = pixel // (2 * width), pixel % (2 * width)
            right = column % 2
            at = (row * (width + 1) + column // 2 + right)[:, None] * (2 * channels)
            at = at + right[:, None] * channels + channel[None, :]
            to = ((2 * row + phase) * (2 * width) + column)[:, None] * channels + channel[None, :]
        else:
            at = pixel[:, None] * channels + channel[None, :]
            to = at
        value = tl.load(result + at, mask=mask, other=0.0).to(tl.float32) + added
        # No pixel where there is no residual. (In triton 3.9's interpreter a mask and a scalar's truth make integers.)
        held = (pixel[:, None] < pixels * has_residual) & inside[None, :]
        value = value + tl.load(residual + to, mask=held, other=0.0).to(tl.float32)
        value = tl.where(factor == 1.0, value, value / factor)
        rounded = value.to(dst.dtype.element_ty)
        tl.store(dst + to, rounded, mask=mask)
        value = tl.where(mask, rounded.to(tl.float32), 0.0)
        n = tl.minimum(tl.maximum(pixels - start, 0), TILE).to(tl.float32)
        centre = tl.sum(value, 0) / tl.maximum(n, 1.0)
        deviation = tl.where(mask, value - centre[None, :], 0.0)
        share = n / tl.maximum(count + n, 1.0)
        apart = centre - mean
        m2 = m2 + tl.sum(deviation * deviation, 0) + apart * apart * (count * share)
        mean = mean + apart * share
        count = count + n
    at = tl.program_id(0).to(tl.int64) * (2 * channels) + channel
    tl.store(parts + at, mean, mask=inside)
    tl.store(parts + at + channels, m2, mask=inside)


@triton.jit(do_not_specialize=["programs", "phases", "each", "pixels"])
def _combine(
    parts, moments, programs, phases, each, pixels, channels, PROGRAMS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
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
    tl.store(moments + channel, centre, mask=inside)
    tl.store(moments + channels + channel, m2, mask=inside)


@triton.jit(do_not_specialize=["blocks", "each", "last", "eps"])
def _affine(
    means, m2s, weight, bias, scale, shift, blocks, each, last, eps, channels,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One group of ``WIDTH`` channels: combine all blocks of each channel, then all channels of the group."""
    own = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) * WIDTH + own
    inside = own < WIDTH
    total = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        n = tl.where(block == blocks - 1, last, each).to(tl.float64)
        at = block.to(tl.int64)[:, None] * channels + channel[None, :]
        mean = tl.load(means + at, mask=(block[:, None] < blocks) & inside[None, :], other=0.0)
        total += tl.sum(mean * n[:, None], 0)
    pixels = each.to(tl.float64) * (blocks - 1) + last.to(tl.float64)
    centre = total / pixels
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        mask = (block[:, None] < blocks) & inside[None, :]
        n = tl.where(block == blocks - 1, last, each).to(tl.float64)
        at = block.to(tl.int64)[:, None] * channels + channel[None, :]
        apart = tl.load(means + at, mask=mask, other=0.0) - centre[None, :]
        m2 += tl.sum(tl.load(m2s + at, mask=mask, other=0.0) + tl.where(mask, apart * apart, 0.0) * n[:, None], 0)
    whole = tl.sum(tl.where(inside, centre, 0.0), 0) / WIDTH
    apart = tl.where(inside, centre - whole, 0.0)
    variance = (tl.sum(tl.where(inside, m2, 0.0), 0) / pixels + tl.sum(apart * apart, 0)) / WIDTH
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float64) / tl.sqrt(variance + eps)
    factor = tl.where(variance < float("inf"), factor, float("nan"))  # Inf would make it 0, which looks well
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float64) - whole * factor
    tl.store(scale + channel, factor.to(tl.float32), mask=inside)
    tl.store(shift + channel, offset.to(tl.float32), mask=inside)


def affine(
    means: torch.Tensor, m2s: torch.Tensor, each: int, last: int, groups: int, eps: float, weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """A GroupNorm as scale and shift, (C,) float32 each.

    means, m2s: (blocks, C) float64, of blocks of ``each`` pixels, the last of ``last``; weight, bias: (C,).
    """
    blocks, channels = means.shape
    scale, shift = torch.empty(2, channels, dtype=torch.float32, device=means.device)
    width = channels // groups
    _affine[(groups,)](
        means, m2s, weight, bias, scale, shift, blocks, each, last, eps, channels,
        WIDTH=width, BLOCKS=32, BLOCK_C=triton.next_power_of_2(width),
    )  # fmt: skip
    return scale, shift


def prologue(rows: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, silu: bool, out: torch.Tensor) -> None:
    """Compute ``out = silu(rows * scale + shift)``, or without SiLU.

    rows, out: (..., C) contiguous, possibly the same. scale, shift: (C,) float32.
    """
    channels = rows.shape[-1]
    pixels = rows.numel() // channels
    tile, block = _cut(channels)
    grid = (triton.cdiv(pixels, tile), triton.cdiv(channels, block))
    _prologue[grid](rows, out, scale, shift, pixels, channels, SILU=silu, TILE=tile, BLOCK_C=block)


def parts_pixels(channels: int) -> int:
    """How many pixels one program of `finish` has."""
    return _TILES * _cut(channels)[0]


def parts_bytes(pixels: int, channels: int, phases: int = 1) -> int:
    """Bytes of float32 scratch that `finish` and `interleave` leave their programs' statistics in."""
    return phases * -(-pixels // parts_pixels(channels)) * 2 * channels * 4


def finish(
    result: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    factor: float,
    out: torch.Tensor,
    parts: torch.Tensor,
) -> None:
    """Compute ``out = (result + bias + residual) / factor``, and leave the statistics of ``out`` in ``parts``.

    result, residual, out: (..., C) contiguous, of one dtype; ``out`` may be either of the others. bias: (C,).
    parts: float32 scratch of `parts_bytes`.
    """
    channels = out.shape[-1]
    pixels = out.numel() // channels
    tile, block = _cut(channels)
    grid = (triton.cdiv(pixels, _TILES * tile), triton.cdiv(channels, block))
    _finish[grid](
        result, bias, out if residual is None else residual, out, parts, pixels, channels,
        int(residual is not None), factor, 1, 0, UP=False, TILES=_TILES, TILE=tile, BLOCK_C=block,
    )  # fmt: skip


def interleave(result: torch.Tensor, bias: torch.Tensor, phase: int, out: torch.Tensor, parts: torch.Tensor) -> None:
    """Write every other row of an enlarged map, from row ``phase`` on, and its statistics in its half of ``parts``.

    result: (n, W + 1, 2 C), the sums of the two column phases side by side; out: (2 n, 2 W, C); bias: (C,).
    parts: float32 scratch of `parts_bytes` of n * 2 W pixels in two phases.
    """
    n, width, channels = result.shape[0], result.shape[1] - 1, out.shape[2]
    pixels = n * 2 * width
    tile, block = _cut(channels)
    programs = triton.cdiv(pixels, _TILES * tile)
    _finish[(programs, triton.cdiv(channels, block))](
        result, bias, out, out, parts.view(2, programs, 2, channels)[phase], pixels, channels, 0, 1.0, width, phase,
        UP=True, TILES=_TILES, TILE=tile, BLOCK_C=block,
    )  # fmt: skip


def combine(parts: torch.Tensor, pixels: int, channels: int, phases: int = 1) -> torch.Tensor:
    """(2, C) float64: the mean and the squared deviations of all pixels of all phases, from `finish`'s ``parts``."""
    moments = torch.empty(2, channels, dtype=torch.float64, device=parts.device)
    each = parts_pixels(channels)
    block = 16
    _combine[(triton.cdiv(channels, block),)](
        parts, moments, triton.cdiv(pixels, each), phases, each, pixels, channels, PROGRAMS=32, BLOCK_C=block
    )
    return moments


def _cut(channels: int) -> tuple[int, int]:
    """How many pixels and how many channels a tile has."""
    block = min(128, max(16, triton.next_power_of_2(channels)))
    return _TILE_VALUES // block, block
