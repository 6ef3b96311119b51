"""The transforms of Winograd's minimal filtering, derived exactly.

``F(m, r)`` gives m outputs of an r-tap correlation from n = m + r - 1 inputs with n multiplications:
``y = AT @ ((G @ g) * (BT @ d))``. It is Toom-Cook multiplication transposed: evaluate at n - 1 points and at infinity
(A. Lavin, S. Gray, "Fast algorithms for convolutional neural networks", CVPR 2016; B. Barabasz et al., "Error analysis
and improving the accuracy of Winograd convolution for deep neural networks", ACM TOMS 46(4), 2020, on the points).

Scaling a row of BT and the matching row of G by inverse powers of two changes no rounding in floating point, so the
rows are left as they fall: BT's are monic.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

__all__ = ["POINTS", "PRECISE_POINTS", "Transforms", "halving", "matmul", "toom_cook"]

Matrix = tuple[tuple[Fraction, ...], ...]

POINTS = tuple(Fraction(p) for p in ("0", "1", "-1", "1/2", "-1/2", "2", "-2"))
"""Points +a and -a stand together: their rows share half of the work (`vector_code`)."""
PRECISE_POINTS = tuple(Fraction(p) for p in ("0", "1", "-1", "1/2", "-2"))
"""Those of F(4, 3), whose rounding errors are a third of F(6, 3)'s; with other points they are half of them."""


class Transforms(NamedTuple):
    """The three matrices of one F(m, r): m outputs of a filter of r taps, by n products of n inputs."""

    at: Matrix
    """(m, n): turns products into outputs."""
    g: Matrix
    """(n, r): transforms the taps."""
    bt: Matrix
    """(n, n): transforms the inputs."""


def toom_cook(outputs: int, taps: int, points: Sequence[Fraction] = POINTS) -> Transforms:
    """F(outputs, taps) on ``points`` and infinity; needs outputs + taps - 2 distinct points."""
    n = outputs + taps - 1
    if len(points) != n - 1 or len(set(points)) != n - 1:
        raise ValueError(f"F({outputs}, {taps}) needs {n - 1} distinct points, got {points}")
    one, zero = Fraction(1), Fraction(0)
    at = [[p**i for p in points] + [one if i == outputs - 1 else zero] for i in range(outputs)]
    g, bt = [], []
    for k, p in enumerate(points):
        others = [q for j, q in enumerate(points) if j != k]
        scale = one
        for q in others:
            scale *= p - q
        g.append([p**i / scale for i in range(taps)])
        bt.append([*_monic(others), zero])
    g.append([one if i == taps - 1 else zero for i in range(taps)])
    bt.append(_monic(points))
    return Transforms(_freeze(at), _freeze(g), _freeze(bt))


def halving(outputs: int) -> Transforms:
    """Three taps at every second input: ``y[i] = g[0] d[2i] + g[1] d[2i+1] + g[2] d[2i+2]``.

    The even inputs meet the outer taps, which is F(outputs, 2), and the odd ones the middle tap, which is one product
    for each output: 2 * outputs + 1 products in place of 3 * outputs.
    """
    outer = toom_cook(outputs, 2, POINTS[:outputs])
    one, zero = Fraction(1), Fraction(0)
    inputs = 2 * outputs + 1
    at = [[*row, *(one if j == i else zero for j in range(outputs))] for i, row in enumerate(outer.at)]
    g = [[first, zero, last] for first, last in outer.g] + [[zero, one, zero]] * outputs
    bt = [[zero if k % 2 else row[k // 2] for k in range(inputs)] for row in outer.bt]
    bt += [[one if k == 2 * i + 1 else zero for k in range(inputs)] for i in range(outputs)]
    return Transforms(_freeze(at), _freeze(g), _freeze(bt))


def matmul(a: Sequence[Sequence[Fraction]], b: Sequence[Sequence[Fraction]]) -> Matrix:
    """The product of two matrices, computed exactly."""
    return _freeze(
        [
            [sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0)) for column in zip(*b, strict=True)]
            for row in a
        ]
    )


def _monic(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of prod (x - root), constant term first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [high - root * low for high, low in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def _freeze(rows: Sequence[Sequence[Fraction]]) -> Matrix:
    return tuple(tuple(row) for row in rows)
