"""The kernels of the four 2x2 convolutions of a small map that a 3x3 convolution of the enlarged map amounts to.

Of a large pixel with phase 0 (an even one), the three taps see the small pixels i-1, i and i; of one with phase 1, they
see i, i and i+1. Taps that see the same pixel are added. That takes 2.25 times fewer multiplications, and there is no
large map in between.
"""

from __future__ import annotations

import torch

__all__ = ["sum_kernels"]


def sum_kernels(weight: torch.Tensor, kernels: list[torch.Tensor], chunk: int) -> None:
    """Sum the taps in float64, into one (2*cout, cin, 2, 2) kernel for each row phase.

    Args:
        weight: (cout, cin, 3, 3), any float dtype.
        kernels: the kernels of both row phases, which are overwritten, in any dtype and memory format. Each has its two
            column phases one after the other.
        chunk: output channels whose float64 sums are held at once.
    """
    cout = weight.shape[0]
    for start in range(0, cout, chunk):
        part = weight[start : start + chunk].to(torch.float64)
        for p, kernel in enumerate(kernels):
            rows = _pair(part, p, 2)
            for q in range(2):
                kernel[q * cout + start : q * cout + start + len(part)] = _pair(rows, q, 3).to(kernel.dtype)


def _pair(taps: torch.Tensor, phase: int, dim: int) -> torch.Tensor:
    """Three taps along ``dim`` on the large map as two on the small one."""
    a, b, c = taps.unbind(dim)
    return torch.stack((a, b + c) if phase == 0 else (a + b, c), dim)
