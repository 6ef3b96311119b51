"""Passes over pixels as tasks that threads take from a counter: norms and SiLU, copies, linear layers.

Compiled by Numba, without the GIL. Addresses and strides are in bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fluxvae.engine.kernels.cpu import threads
from fluxvae.engine.kernels.cpu.counters import fetch_add
from fluxvae.engine.kernels.cpu.multiply import multiply, pack_panel, panel_bytes, split_bytes
from fluxvae.engine.kernels.cpu.pixel_loops import (
    add_bias,
    affine,
    affine_silu,
    by_pixel,
    by_pixel_silu,
    copy,
    gather_tiles,
)
from fluxvae.engine.kernels.cpu.products import NR, THIRD
from fluxvae.engine.kernels.cpu.vector_code import LANES, compiled
from fluxvae.engine.kernels.cpu.winograd_cut import rounded

if TYPE_CHECKING:
    import torch

__all__ = [
    "AFFINE",
    "BY_PIXEL",
    "COPY",
    "LinearJob",
    "LinearWeights",
    "RowsJob",
    "affine_rows",
    "linear",
    "linear_bytes",
    "linear_rows",
    "linear_weights",
]

VECTOR_CODE = "35ab4ff49856a543"
"""The digest of the files that this one calls, for the reason that `winograd_tasks.VECTOR_CODE` gives."""


class RowsJob(NamedTuple):
    """A pass over pixels: a norm, SiLU after it, or a copy."""

    src: int
    dst: int
    scale: int
    """The address of the scale, one float32 for each channel; that of ``shift`` likewise."""
    shift: int
    pixels: int
    channels: int
    run: int
    """How many pixels one task has."""
    what: int
    """What is done to each value: COPY, AFFINE or BY_PIXEL."""
    silu: int
    """Whether SiLU comes after it."""
    least: int
    """The address of the least length that a pixel is divided by, one float32. Only for BY_PIXEL."""


COPY, AFFINE, BY_PIXEL = 0, 1, 2


@compiled
def affine_rows(job: RowsJob, counter: Any) -> None:
    """Compute runs of pixels, taken from the counter one by one until none is left."""
    vectors = job.channels // LANES
    while True:
        first = fetch_add(counter.ctypes.data, 1) * job.run
        if first >= job.pixels:
            return
        count = min(job.run, job.pixels - first)
        offset = first * job.channels * 4
        src, dst = job.src + offset, job.dst + offset
        if job.what == COPY:
            copy(src, dst, count * vectors)
        elif job.what == BY_PIXEL and job.silu:
            by_pixel_silu(src, dst, job.scale, job.shift, count, vectors, job.least)
        elif job.what == BY_PIXEL:
            by_pixel(src, dst, job.scale, job.shift, count, vectors, job.least)
        elif job.silu:
            affine_silu(src, dst, job.scale, job.shift, count, vectors)
        else:
            affine(src, dst, job.scale, job.shift, count, vectors)


MOST_RUN = 48
"""How many rows a task of a linear layer has at most."""


class LinearJob(NamedTuple):
    """A linear layer over pixels: src (rows, cin) times weights (cin, cout), plus a bias."""

    src: int
    dst: int
    weights: int
    """The address of the weights, panels as `multiply` reads them."""
    panel_weights: int
    """The bytes of one panel's weights."""
    bias: int
    rows: int
    cin: int
    cout: int
    run: int
    """How many rows one task has: a multiple of THIRD."""
    split: int
    """The bytes of scratch that a thread needs for `multiply`."""
    tasks: int


@compiled
def linear_rows(job: LinearJob, counter: Any) -> None:
    """Compute runs of rows, taken from the counter one by one until none is left."""
    blocks, panels = job.cin // LANES, (job.cout + NR - 1) // NR
    group, panel_out = job.cin * THIRD * 4, job.run * NR * 4
    gathered = np.empty(job.run * job.cin, np.float32)
    multiplied = np.empty(job.run * panels * NR, np.float32)
    split = np.empty(job.split // 4 + 16, np.float32)
    left_at, out_at, split_at = gathered.ctypes.data, multiplied.ctypes.data, (split.ctypes.data + 63) // 64 * 64
    while True:
        task = fetch_add(counter.ctypes.data, 1)
        if task >= job.tasks:
            # Numba frees an array after its last use, and sees no use of its address.
            gathered[0] = multiplied[0] = split[0] = 0.0
            return
        first = task * job.run
        count = min(job.run, job.rows - first)
        gather_tiles(job.src + first * job.cin * 4, job.cin * 4, left_at, group, count, blocks)
        multiply(left_at, count, job.weights, job.panel_weights, panels, job.cin, out_at, panel_out, split_at)
        for row in range(count):
            target = job.dst + (first + row) * job.cout * 4
            add_bias(out_at + row * NR * 4, panel_out, target, job.bias, job.cout // LANES)


class LinearWeights(NamedTuple):
    """A linear layer's weights, laid out for `linear`."""

    panels: torch.Tensor
    bias: torch.Tensor
    """The bias, (cout,) float32."""
    cin: int
    cout: int


def linear_bytes(cin: int, cout: int) -> int:
    """Bytes that a linear layer's weights take when they are laid out in panels."""
    return -(-cout // NR) * panel_bytes(cin)


def linear_weights(weight: torch.Tensor, bias: torch.Tensor | None, into: torch.Tensor) -> LinearWeights:
    """(cout, cin) or (cout, cin, 1, 1) as panels; what stands for outputs beyond cout is arbitrary."""
    import torch  # here, because a plan asks this module for sizes without it

    cout, cin = weight.shape[:2]
    panels = into[: linear_bytes(cin, cout)].view(-1, panel_bytes(cin))
    columns = torch.zeros(cin, NR, dtype=torch.float32, device="cpu")
    for index, panel in enumerate(panels):
        part = weight.reshape(cout, cin)[index * NR : (index + 1) * NR]
        columns[:, : len(part)] = part.t()
        pack_panel(columns.data_ptr(), cin, panel.data_ptr())
    if bias is None:
        bias = torch.zeros(cout, dtype=torch.float32, device=weight.device)
    return LinearWeights(panels, bias.float(), cin, cout)


def linear(rows: torch.Tensor, weights: LinearWeights, out: torch.Tensor) -> None:
    """(n, W, cin) to ``out`` (n, W, cout), both contiguous float32."""
    count = rows.numel() // weights.cin
    run = min(MOST_RUN, rounded(count))
    job = LinearJob(
        src=rows.data_ptr(), dst=out.data_ptr(), weights=weights.panels.data_ptr(), bias=weights.bias.data_ptr(),
        panel_weights=panel_bytes(weights.cin), rows=count, cin=weights.cin, cout=weights.cout, run=run,
        split=split_bytes(run, weights.cin), tasks=-(-count // run),
    )  # fmt: skip
    threads.share(linear_rows, job, job.tasks)
