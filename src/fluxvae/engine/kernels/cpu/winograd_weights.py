"""Transforms one layer's weights for the Winograd kernels, as tasks that threads take from a counter.

Compiled by Numba, without the GIL. Addresses and strides are in bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fluxvae.engine.kernels.cpu.amx import CHUNK, CHUNK_BYTES, ROWS
from fluxvae.engine.kernels.cpu.counters import fence, fetch_add
from fluxvae.engine.kernels.cpu.products import NR
from fluxvae.engine.kernels.cpu.vector_code import AMX, LANES, LINE, compiled
from fluxvae.engine.kernels.cpu.winograd_job import DOWN, PRECISE
from fluxvae.engine.kernels.cpu.winograd_loops import (
    kernel_transform,
    kernel_transform_down,
    kernel_transform_precise,
)

__all__ = ["WeightsJob", "transform_weights"]

VECTOR_CODE = "35ab4ff49856a543"
"""The digest of the files that this one calls, for the reason that `winograd_tasks.VECTOR_CODE` gives."""


class WeightsJob(NamedTuple):
    """The job of transforming one layer's weights."""

    src: int
    """The address of the weights (cout, cin, 3, 3), float32, which lie as the four strides that follow say."""
    kernel: int
    channel: int
    row: int
    column: int
    dst: int
    """The address of the result, laid out as `ConvJob.weights`. Columns beyond cout hold arbitrary values."""
    cin: int
    cout: int
    panel: int
    """The bytes of the weights of NR output channels, as in `ConvJob.panel_weights`."""
    position: int
    """The bytes of one position's weights, as in `ConvJob.position_weights`."""
    form: int
    """As in `ConvJob`."""


@compiled
def transform_weights(job: WeightsJob, counter: Any) -> None:
    """Transform half panels, taken from the counter one by one until none is left."""
    while True:
        half = fetch_add(counter.ctypes.data, 1)
        if half * LANES >= job.cout:
            fence()
            return
        panel = job.dst + half // 2 * job.panel
        for index in range((job.cin + CHUNK - 1) // CHUNK * ROWS if AMX else job.cin):
            channel, second, target = index, 0, panel + (index * NR + half % 2 * LANES) * 4
            if AMX:  # channels in pairs, as `amx` multiplies them
                chunk, pair = index // ROWS, index % ROWS
                channel = chunk * CHUNK + pair
                second = ROWS * job.channel if channel + ROWS < job.cin else 0
                target = panel + (2 * chunk + half % 2) * CHUNK_BYTES + pair * LINE
            src = job.src + half * LANES * job.kernel + channel * job.channel
            if job.form == DOWN:
                kernel_transform_down(src, second, job.kernel, job.row, job.column, target, job.position)
            elif job.form == PRECISE:
                kernel_transform_precise(src, second, job.kernel, job.row, job.column, target, job.position)
            else:
                kernel_transform(src, second, job.kernel, job.row, job.column, target, job.position)
