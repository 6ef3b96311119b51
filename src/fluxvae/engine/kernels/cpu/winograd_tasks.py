"""The work of one Winograd convolution as tasks that threads take from a counter. Compiled by Numba, without the GIL.

A task is a run of tiles and a slice of output channels, taken by one thread from input to output: transform the tiles,
multiply position by position, transform back with bias, residual and statistics. Its products stay in that thread's
cache, and no thread waits for another. Which thread does a task changes nothing in its result.

Addresses and strides are in bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fluxvae.engine.kernels.cpu.pixel_loops import copy
from fluxvae.engine.kernels.cpu.vector_code import LANES, compiled, fetch_add
from fluxvae.engine.kernels.cpu.winograd_loops import (
    NR,
    THIRD,
    TILES,
    input_transform,
    input_transform_down,
    input_transform_precise,
    input_transform_up,
    kernel_transform,
    kernel_transform_down,
    kernel_transform_precise,
    output_transform,
    output_transform_down,
    output_transform_precise,
    output_transform_precise_residual,
    output_transform_residual,
    products_1,
    products_2,
    products_3,
)

__all__ = ["ConvJob", "WeightsJob", "convolve", "merge", "transform_weights"]

VECTOR_CODE = "81423cbeaaf58af1"
"""The digest of the files that this one calls. Numba keeps compiled code until this file changes and does not look at
the others, so their digest is written here, and a test says when it has to be renewed."""
PLAIN, UP, DOWN, PRECISE = 0, 1, 2, 3
"""The forms of a tile. PLAIN is F(6, 3); UP is the same of a map that is enlarged twofold; DOWN are three outputs of
stride 2; PRECISE is F(4, 3), which takes more products and rounds to a third of the error."""
STEPS = (6, 6, 3, 4)
"""How many outputs a tile has in each direction, by form."""
SIZES = (8, 5, 7, 6)
"""How many inputs a tile has in each direction; for UP, on the small map."""
REACHES = (6, 3, 6, 4)
"""How many inputs there are from the beginning of a tile to that of the next."""
POSITIONS = (64, 64, 49, 36)
"""How many products a tile has for each pair of an input and an output channel."""


class ConvJob(NamedTuple):
    """The job of one call: a 3x3 convolution of a block of rows, of the map as it is or enlarged, or of stride 2."""

    src: int
    src_row: int
    src_column: int
    src_rows: int
    """How many rows there are, halo included. Outside of these rows and of the columns, zeros are read."""
    src_columns: int
    cin: int
    dst: int
    dst_row: int
    dst_column: int
    rows: int
    """The rows of the output; ``columns`` and ``cout`` are its too."""
    columns: int
    cout: int
    form: int
    """The form of the tiles, such as PLAIN."""
    residual: int
    """The address of the residual minus that of the output; -1 if there is none."""
    weights: int
    """The address of the transformed weights, (positions, panels, cin, NR) float32."""
    position_weights: int
    """The bytes of one position's weights, padding included."""
    panels: int
    """How many panels of NR output channels one slice has."""
    slices: int
    tiles_across: int
    tiles: int
    run: int
    """How many tiles a task has at most. Tasks have equally many THIRDs of a register block, or one more."""
    units: int
    """How many runs of tiles there are."""
    tasks: int
    position_in: int
    """The bytes between two positions of the transformed tiles."""
    position_out: int
    """The bytes between two positions of the products."""
    scratch: int
    scratch_bytes: int
    """The bytes of scratch that each thread has."""


@compiled
def add_tile(stats: Any, terms: Any, before: int, pixels: int) -> int:
    """Join a tile's sums, which lie around a shift, to the statistics so far; their mean is the next tile's shift.

    float32 sums around a nearby shift, joined in float64 (Chan, Golub and LeVeque 1979), lose nothing to cancellation:
    what a far shift costs a tile is small against what the distance itself adds to the squared deviations.
    """
    after = before + pixels
    share, weight, inverse = pixels / after, before * pixels / after, 1.0 / pixels
    for c in range(stats.shape[1]):
        total = np.float64(terms[3, c])
        apart = terms[2, c] + total * inverse - stats[0, c]
        stats[0, c] += apart * share
        stats[1, c] += max(terms[4, c] - total * total * inverse, 0.0) + apart * apart * weight
        terms[2, c] = stats[0, c]
    return after


@compiled
def convolve(job: ConvJob, factor_bias: Any, stats: Any, counter: Any, worker: int) -> None:
    """Take tasks until none is left.

    Args:
        factor_bias: (2, cout) float32. Outputs are multiplied by the first row, then the second is added.
        stats: (3, units, cout) float64, which is filled with each unit's count, mean and sum of squared deviations.
        counter: (1,) int64, which starts at 0.
        worker: the number of this thread, which says what part of the scratch is its own.
    """
    lane_bytes = 4 * LANES
    transformed = job.scratch + worker * job.scratch_bytes
    positions, size, step, reach = POSITIONS[job.form], SIZES[job.form], STEPS[job.form], REACHES[job.form]
    skipped = 1 if job.form == DOWN else 0  # the halo above the block and left of the map, which stride 2 does not see
    multiplied = transformed + positions * job.position_in
    blocks = job.cin // LANES
    thirds = (job.tiles + THIRD - 1) // THIRD
    whole, longer = thirds // job.units, thirds % job.units
    block_bytes = job.run * lane_bytes
    panel_out = job.run * NR * 4
    panel_weights = job.cin * NR * 4
    slice_width = job.panels * NR
    patch = np.empty(positions * job.cin, np.float32)
    terms = np.empty((5, slice_width), np.float32)
    terms_step = slice_width * 4
    patch_at = patch.ctypes.data
    terms_at = terms.ctypes.data
    while True:
        task = fetch_add(counter.ctypes.data)
        if task >= job.tasks:
            patch[0] = 0.0  # Numba frees an array after its last use, and does not see uses of its address
            return
        part = task % job.slices
        unit = task // job.slices
        first = (unit * whole + min(unit, longer)) * THIRD
        count = min((whole + (unit < longer)) * THIRD, job.tiles - first)

        for t in range(count):
            tile = first + t
            top = tile // job.tiles_across * reach + skipped
            left = tile % job.tiles_across * reach - 1 + skipped
            target = transformed + t * lane_bytes
            src, row, column = job.src + top * job.src_row + left * job.src_column, job.src_row, job.src_column
            if top + size > job.src_rows or left < 0 or left + size > job.src_columns:
                for i in range(size):
                    for j in range(size):
                        inside = top + i < job.src_rows and left + j >= 0 and left + j < job.src_columns
                        pixel = src + i * job.src_row + j * job.src_column
                        copy(pixel if inside else 0, patch_at + (i * size + j) * job.cin * 4, blocks)
                src, row, column = patch_at, size * job.cin * 4, job.cin * 4
            if job.form == PLAIN:
                input_transform(src, row, column, target, job.position_in, block_bytes, blocks)
            elif job.form == PRECISE:
                input_transform_precise(src, row, column, target, job.position_in, block_bytes, blocks)
            elif job.form == DOWN:
                input_transform_down(src, row, column, target, job.position_in, block_bytes, blocks)
            else:
                input_transform_up(src, row, column, target, job.position_in, block_bytes, blocks)

        first_weights = job.weights + part * job.panels * panel_weights
        pace = NR * 4 // (-(-count // TILES))
        for position in range(positions):
            for panel in range(job.panels):
                weights = first_weights + position * job.position_weights + panel * panel_weights
                next_weights = weights + panel_weights
                left_at = transformed + position * job.position_in
                out_at = multiplied + position * job.position_out + panel * panel_out
                done = 0
                while done < count:
                    left_row, out_row = left_at + done * lane_bytes, out_at + done * NR * 4
                    ahead = next_weights + done // TILES * pace * job.cin
                    rest = count - done
                    if rest > 2 * THIRD:
                        products_3(left_row, block_bytes, weights, blocks, out_row, ahead, pace)
                    elif rest > THIRD:
                        products_2(left_row, block_bytes, weights, blocks, out_row, ahead, pace)
                    else:
                        products_1(left_row, block_bytes, weights, blocks, out_row, ahead, pace)
                    done += TILES

        channel = part * slice_width
        width = min(slice_width, job.cout - channel)
        for c in range(width):
            terms[0, c] = factor_bias[0, channel + c]
            terms[1, c] = factor_bias[1, channel + c]
            terms[2:5, c] = 0.0
        stats[:, unit, channel : channel + width] = 0.0
        pixels = 0
        for t in range(-1, count):  # at -1 the first tile's first pixel, which becomes the statistics' first shift
            tile = first + max(t, 0)
            y = tile // job.tiles_across * step
            x = tile % job.tiles_across * step
            target = job.dst + y * job.dst_row + x * job.dst_column + channel * 4
            source = multiplied + max(t, 0) * NR * 4
            rows, columns = min(step, job.rows - y), min(step, job.columns - x)
            residual = job.residual
            if t < 0:
                rows, columns = 1, 1
                residual += target - (terms_at + 2 * terms_step)
                target = terms_at + 2 * terms_step
            if job.form == DOWN:
                output_transform_down(
                    source, job.position_out, panel_out, target, job.dst_row, job.dst_column, rows, columns,
                    0, terms_at, terms_step, width // LANES,
                )  # fmt: skip
            elif job.form == PRECISE and job.residual == -1:
                output_transform_precise(
                    source, job.position_out, panel_out, target, job.dst_row, job.dst_column, rows, columns,
                    0, terms_at, terms_step, width // LANES,
                )  # fmt: skip
            elif job.form == PRECISE:
                output_transform_precise_residual(
                    source, job.position_out, panel_out, target, job.dst_row, job.dst_column, rows, columns,
                    residual, terms_at, terms_step, width // LANES,
                )  # fmt: skip
            elif job.residual == -1:
                output_transform(
                    source, job.position_out, panel_out, target, job.dst_row, job.dst_column, rows, columns,
                    0, terms_at, terms_step, width // LANES,
                )  # fmt: skip
            else:
                output_transform_residual(
                    source, job.position_out, panel_out, target, job.dst_row, job.dst_column, rows, columns,
                    residual, terms_at, terms_step, width // LANES,
                )  # fmt: skip
            if t >= 0:
                pixels = add_tile(stats[1:, unit, channel : channel + width], terms, pixels, rows * columns)
                stats[0, unit, channel : channel + width] = pixels
            terms[3:5, :] = 0.0


@compiled
def merge(stats: Any, out: Any) -> None:
    """Combine the tasks' statistics (3, n, C) in their order into (3, C) (Chan, Golub and LeVeque 1979)."""
    out[:] = stats[:, 0]
    for k in range(1, stats.shape[1]):
        for c in range(stats.shape[2]):
            count = out[0, c] + stats[0, k, c]
            apart = stats[1, k, c] - out[1, c]
            out[1, c] += apart * stats[0, k, c] / count
            out[2, c] += stats[2, k, c] + apart * apart * out[0, c] * stats[0, k, c] / count
            out[0, c] = count


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
    position: int
    """The bytes of one position's weights, as in `ConvJob.position_weights`."""
    form: int
    """As in `ConvJob`."""


@compiled
def transform_weights(job: WeightsJob, counter: Any) -> None:
    """Transform half panels, taken from the counter one by one until none is left."""
    while True:
        half = fetch_add(counter.ctypes.data)
        if half * LANES >= job.cout:
            return
        for channel in range(job.cin):
            src = job.src + half * LANES * job.kernel + channel * job.channel
            target = job.dst + ((half // 2 * job.cin + channel) * NR + half % 2 * LANES) * 4
            if job.form == DOWN:
                kernel_transform_down(src, job.kernel, job.row, job.column, target, job.position)
            elif job.form == PRECISE:
                kernel_transform_precise(src, job.kernel, job.row, job.column, target, job.position)
            else:
                kernel_transform(src, job.kernel, job.row, job.column, target, job.position)
