"""The passes over memory between cuDNN's convolutions, in the Triton language (the compiler, not the server).

Maps are channels last: (pixels, channels), contiguous. All arithmetic is float32, and every stored value is rounded
once.

Statistics are gathered in an order that depends on the number of pixels alone. A program takes the mean of each of its
tiles, then the squared deviations from it, and merges its tiles in float32. It stores one mean and one sum of squared
deviations, which `moments` combines.

Offsets have 64 bits, because a map of 16384x16384 latents has more than 2**31 values. The functions that launch call no
helpers of the Triton language's: `triton.cdiv` alone would take a fifth of the host's time for a decode.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fluxvae.engine.kernels.cuda import CONTRACTION

__all__ = ["finish", "interleave", "parts_bytes", "parts_pixels", "power_of_two", "prologue", "refill"]

_TILE_VALUES = 4096
_TILES = 8
"""How many tiles a program has. It then has 256 pixels of 128 channels, and 32 MB of half precision 512 programs."""


@triton.jit(do_not_specialize=["pixels", "least"])
def _prologue(
    src, dst, scale, shift, least, pixels, channels,
    BY_PIXEL: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (pixel[:, None] < pixels) & (channel[None, :] < channels)
    at = pixel[:, None] * channels + channel[None, :]
    value = tl.load(src + at, mask=mask, other=0.0)
    value = _scaled(value, scale, shift, least, channel, channels, BY_PIXEL, SILU)
    tl.store(dst + at, value.to(dst.dtype.element_ty), mask=mask)


@triton.jit
def _scaled(value, scale, shift, least, channel, channels, BY_PIXEL: tl.constexpr, SILU: tl.constexpr):
    """``BY_PIXEL``: divide by each pixel's length first; then a tile must have all channels."""
    value = value.to(tl.float32)
    if BY_PIXEL:
        length = tl.sqrt(tl.sum(value * value, 1))
        value = value / tl.maximum(length, least)[:, None]
    value = value * tl.load(scale + channel, mask=channel < channels, other=0.0)[None, :]
    value = value + tl.load(shift + channel, mask=channel < channels, other=0.0)[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    return value


@triton.jit(do_not_specialize=["least", "begin", "end", "top", "halo", "distance", "fresh", "stop", "bottom", "below"])
def _refill(
    src, window, scale, shift, least, begin, end, top, halo, distance, fresh, stop, bottom, below, channels,
    NORM: tl.constexpr, BY_PIXEL: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All numbers are pixels of the window. Those from ``halo`` on are moved up by ``distance`` first."""
    pixel = begin + tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (pixel[:, None] < end) & (channel[None, :] < channels)
    at = pixel[:, None] * channels + channel[None, :]
    moved = inside & (pixel[:, None] >= halo)
    old = tl.load(window + at, mask=moved, other=0.0)
    # What is moved must be read before it is overwritten, also where another thread of this program overwrites it. No
    # other program has to do with these pixels, and nobody else writes where they are moved to.
    tl.debug_barrier()
    tl.store(window + at - distance.to(tl.int64) * channels, old, mask=moved)
    given = inside & (pixel[:, None] >= fresh) & (pixel[:, None] < stop)
    value = tl.load(src + (pixel[:, None] - fresh) * channels + channel[None, :], mask=given, other=0.0)
    if NORM:
        value = _scaled(value, scale, shift, least, channel, channels, BY_PIXEL, True).to(window.dtype.element_ty)
    outside = (pixel[:, None] < top) | ((pixel[:, None] >= bottom) & (pixel[:, None] < below))
    value = tl.where(given, value, 0.0)
    tl.store(window + at, value.to(window.dtype.element_ty), mask=given | (inside & outside))


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


def prologue(
    rows: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, silu: bool, out: torch.Tensor,
    least: float | None = None,
) -> None:  # fmt: skip
    """Compute ``out = silu(rows * scale + shift)``, or without SiLU.

    rows, out: (..., C) contiguous, possibly the same. scale, shift: (C,) float32. least: None, or the least length of a
    pixel, by which its channels are divided first.
    """
    channels = rows.shape[-1]
    pixels = rows.numel() // channels
    tile, block = _cut(channels) if least is None else _cut_whole(channels)
    grid = (-(-pixels // tile), -(-channels // block))
    _prologue[grid](
        rows, out, scale, shift, least or 0.0, pixels, channels,
        BY_PIXEL=least is not None, SILU=silu, TILE=tile, BLOCK_C=block, **CONTRACTION,
    )  # fmt: skip


def refill(
    window: torch.Tensor, first: bool, fresh: tuple[int, int], bottom: int | None, rows: torch.Tensor,
    scale: torch.Tensor | None, shift: torch.Tensor | None, least: float | None = None,
) -> None:  # fmt: skip
    """Move a window down to its next block, as `fluxvae.engine.kernels.Refill` says, in one launch.

    Args:
        window: (n + 2, W, C) contiguous, n at least 2 unless it is the first block.
        rows: (fresh, W, C) contiguous, distinct from the window, in its dtype: the map's rows.
        scale, shift: (C,) float32, or None where rows are copied as they are.
        least: as for `prologue`.
    """
    height, width, channels = window.shape
    end = height * width
    begin, top, halo = (0, width, end) if first else (2 * width, 0, end - 2 * width)
    below = end if bottom is None else bottom * width
    tile, block = _cut(channels) if least is None else _cut_whole(channels)
    norm = scale is not None
    _refill[(-(-(end - begin) // tile), -(-channels // block))](
        rows, window, scale if norm else rows, shift if norm else rows, least or 0.0, begin, end, top, halo,
        end - 2 * width, fresh[0] * width, fresh[1] * width, below, below + width, channels,
        NORM=norm, BY_PIXEL=least is not None, TILE=tile, BLOCK_C=block, **CONTRACTION,
    )  # fmt: skip


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
    grid = (-(-pixels // (_TILES * tile)), -(-channels // block))
    _finish[grid](
        result, bias, out if residual is None else residual, out, parts, pixels, channels,
        int(residual is not None), factor, 1, 0, UP=False, TILES=_TILES, TILE=tile, BLOCK_C=block, **CONTRACTION,
    )  # fmt: skip


def interleave(result: torch.Tensor, bias: torch.Tensor, phase: int, out: torch.Tensor, parts: torch.Tensor) -> None:
    """Write every other row of an enlarged map, from row ``phase`` on, and its statistics in its half of ``parts``.

    result: (n, W + 1, 2 C), the sums of the two column phases side by side; out: (2 n, 2 W, C); bias: (C,).
    parts: float32 scratch of `parts_bytes` of n * 2 W pixels in two phases.
    """
    n, width, channels = result.shape[0], result.shape[1] - 1, out.shape[2]
    pixels = n * 2 * width
    tile, block = _cut(channels)
    programs = -(-pixels // (_TILES * tile))
    _finish[(programs, -(-channels // block))](
        result, bias, out, out, parts[phase * programs * 2 * channels :], pixels, channels, 0, 1.0, width, phase,
        UP=True, TILES=_TILES, TILE=tile, BLOCK_C=block, **CONTRACTION,
    )  # fmt: skip


@lru_cache
def _cut(channels: int) -> tuple[int, int]:
    """How many pixels and how many channels a tile has."""
    block = min(128, max(16, power_of_two(channels)))
    return _TILE_VALUES // block, block


@lru_cache
def _cut_whole(channels: int) -> tuple[int, int]:
    """The same where a tile must have all channels of its pixels."""
    block = max(16, power_of_two(channels))
    return max(1, _TILE_VALUES // block), block


def power_of_two(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
