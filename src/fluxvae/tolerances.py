"""Every tolerance of the project, with the value it was measured at beside it: tests, demo and benchmarks read these.

A bound is set once from a measurement and then kept; a looser one needs a reason in its commit. Where a contract
says *identical*, there is no tolerance and nothing stands here.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BATCH_VS_SINGLE", "Tolerance"]


class Tolerance(NamedTuple):
    """One bound and where it comes from."""

    bound: float
    measured: float
    """The worst value seen when the bound was set."""
    what: str


BATCH_VS_SINGLE = {
    "float32": Tolerance(2e-5, 0.0, "largest difference in [0, 1] between a diffusers batch and its images alone"),
    "bfloat16": Tolerance(4e-2, 0.0, "the same in bfloat16, whose own step near 1 is 3.9e-3"),
    "float16": Tolerance(5e-3, 0.0, "the same in float16"),
}
