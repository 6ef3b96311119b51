"""The kernels of an upsample's 2x2 convolutions, summed from its 3x3 kernel in one launch for each row phase.

`fluxvae.engine.kernels.direct.subpixel` explains which taps are added; it takes ninety launches for one upsample, and
float64 copies of the weights beside the arena.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fluxvae.engine.kernels.cuda import CONTRACTION

__all__ = ["fold"]

_CHANNELS = 128
"""Input channels of one program."""


@triton.jit(do_not_specialize=["couts"])
def _fold(
    weight, dst, couts, cin, out_step, in_step, row_step, column_step, PHASE: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """One output channel of one column phase; steps are the strides of ``weight``."""
    phase = tl.program_id(0) // couts
    cout = tl.program_id(0) % couts
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < cin
    at = weight + cout.to(tl.int64) * out_step + channel.to(tl.int64) * in_step
    to = dst + tl.program_id(0).to(tl.int64) * (4 * cin) + channel
    # Of the three taps, the one above alone and the two below together, or the other way round.
    _fold_row(at, to, cin, row_step, column_step, phase, inside, PHASE == 1)
    _fold_row(at + (1 + PHASE) * row_step, to + 2 * cin, cin, row_step, column_step, phase, inside, PHASE == 0)


@triton.jit
def _fold_row(at, to, cin, row_step, column_step, phase, inside, PAIR: tl.constexpr):
    """One row of the kernel, of the tap at ``at`` and, for a pair, of the one below it."""
    left = _taps(at, row_step, inside, PAIR)
    middle = _taps(at + column_step, row_step, inside, PAIR)
    right = _taps(at + 2 * column_step, row_step, inside, PAIR)
    near = tl.where(phase == 0, left, left + middle)
    far = tl.where(phase == 0, middle + right, right)
    # By way of float32, as PyTorch rounds float64 to half precision.
    tl.store(to, near.to(tl.float32).to(to.dtype.element_ty), mask=inside)
    tl.store(to + cin, far.to(tl.float32).to(to.dtype.element_ty), mask=inside)


@triton.jit
def _taps(at, step, inside, PAIR: tl.constexpr):
    """One tap in float64, or the sum of two that stand one below the other."""
    value = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    if PAIR:
        value += tl.load(at + step, mask=inside, other=0.0).to(tl.float64)
    return value


def fold(weight: torch.Tensor, phase: int, kernel: torch.Tensor) -> None:
    """Write the kernel of one row phase.

    Args:
        weight: (cout, cin, 3, 3), any float dtype and strides.
        phase: 0 or 1.
        kernel: (2 * cout, cin, 2, 2), channels last: its two column phases one after the other.
    """
    cout, cin = weight.shape[:2]
    _fold[(2 * cout, -(-cin // _CHANNELS))](
        weight, kernel, cout, cin, *weight.stride(), PHASE=phase, BLOCK_C=_CHANNELS, **CONTRACTION
    )
