"""The work of Winograd's convolutions as tasks that threads take from a counter. Compiled by Numba, without the GIL.

All threads work on a block in three steps, each of which waits for the one before: they transform groups of tiles,
then multiply position by position, then transform groups of tiles back with bias, residual and statistics. So the
weights of a position are read once for the whole block, by one thread. Which thread does a task changes nothing in its
result.

The products of a position go where the transformed tiles of an earlier one were: every thread owns one place more than
there are positions, and takes in exchange the place of the position that it has finished. That halves the memory, and
what is written to is in the thread's cache.

Addresses and strides are in bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fluxvae.engine.kernels.cpu.counters import fence, fetch_add, wait_until
from fluxvae.engine.kernels.cpu.multiply import multiply
from fluxvae.engine.kernels.cpu.pixel_loops import copy, let_in, let_in_as_it_is
from fluxvae.engine.kernels.cpu.products import GROUP_BYTES, NR, THIRD
from fluxvae.engine.kernels.cpu.vector_code import LANES, VECTOR_BYTES, compiled
from fluxvae.engine.kernels.cpu.winograd_job import (
    DOWN,
    PLAIN,
    POSITIONS,
    PRECISE,
    REACHES,
    SIZES,
    SPAN,
    STEPS,
    STRIP,
    ConvJob,
    Shared,
)
from fluxvae.engine.kernels.cpu.winograd_loops import (
    input_transform,
    input_transform_down,
    input_transform_precise,
    input_transform_up,
    output_transform,
    output_transform_down,
    output_transform_precise,
    output_transform_precise_residual,
    output_transform_residual,
)

__all__ = ["convolve", "merge"]

VECTOR_CODE = "35ab4ff49856a543"
"""The digest of the files that this one calls. Numba keeps compiled code until this file changes and does not look at
the others, so their digest is written here, and a test says when it has to be renewed."""


@compiled
def convolve(job: ConvJob, shared: Shared, worker: int) -> None:
    """Take part in every block's three steps until they are done; ``worker`` is the number of this thread."""
    positions = POSITIONS[job.form]
    if job.units == 0:
        free = job.scratch + (positions + worker) * job.place
        places = shared.places[0]
        for block in range(job.blocks):
            counters = shared.counters[block]
            _transform(job, block, 0, job.tiles, job.scratch, counters)
            _multiply(job, 0, job.tiles, job.scratch, free, places, counters)
            _transform_back(job, shared, block, 0, job.tiles, places, counters)
        return
    scratch = job.scratch + worker * (positions + 1) * job.place
    free = scratch + positions * job.place
    spans = (job.tiles + SPAN - 1) // SPAN
    while True:
        unit = fetch_add(shared.counters[0, 6].ctypes.data, 1)
        if unit >= job.blocks * job.units:
            return
        block, part = unit // job.units, unit % job.units
        first = spans * part // job.units * SPAN
        last = min(spans * (part + 1) // job.units * SPAN, job.tiles)
        places, counters = shared.places[worker], shared.counters[unit]
        _transform(job, block, first, last, scratch, counters)
        _multiply(job, first, last, scratch, free, places, counters)
        _transform_back(job, shared, block, first, last, places, counters)


@compiled
def _transform(job: ConvJob, block: int, first: int, last: int, scratch: int, counters: Any) -> None:
    """The first step: transform groups of tiles of a block.

    They are read from where they are. A group that goes through a norm, or that reaches beyond the map, is copied first
    to a strip of the thread's own, a few channels at a time, so that it is in the caches when it is transformed.
    """
    size, reach = SIZES[job.form], REACHES[job.form]
    skipped = 1 if job.form == DOWN else 0  # the halo above the block and left of the map, which stride 2 does not see
    origin = block * job.block_rows + skipped
    vectors_in = job.cin // LANES
    past = 1 if job.units == 0 else 0  # the tiles of a whole block would push one another out of the caches
    strip = np.empty(THIRD * size * size * STRIP, np.float32)
    table = np.empty((THIRD, 3), np.int64)
    strip_at, table_at = strip.ctypes.data, table.ctypes.data
    groups = (last - first + THIRD - 1) // THIRD
    tasks = (groups + job.piece - 1) // job.piece
    while True:
        task = fetch_add(counters[0].ctypes.data, 1)
        if task >= tasks:
            break
        for group in range(task * job.piece, min((task + 1) * job.piece, groups)):
            begin = first + group * THIRD
            count = min(THIRD, last - begin)
            copied = job.scale != 0
            for t in range(count):
                top = origin + (begin + t) // job.tiles_across * reach
                left = (begin + t) % job.tiles_across * reach - 1 + skipped
                table[t, 0] = job.src + top * job.src_row + left * job.src_column
                table[t, 1], table[t, 2] = job.src_row, job.src_column
                if top < job.src_first or top + size > job.src_rows or left < 0 or left + size > job.src_columns:
                    copied = True
            target = scratch + group * THIRD * job.cin * 4
            if not copied:
                _transform_group(job.form, table_at, count, target, job.place, vectors_in, past)
                continue
            for vector in range(0, vectors_in, STRIP // LANES):
                vectors = min(STRIP // LANES, vectors_in - vector)
                pixel = vectors * VECTOR_BYTES
                at = strip_at
                t = 0
                while t < count:  # the tiles of one row of tiles at a time: they have pixels in common
                    row, column = (begin + t) // job.tiles_across, (begin + t) % job.tiles_across
                    run = min(count - t, job.tiles_across - column)
                    width = (run - 1) * reach + size
                    _fill(job, origin + row * reach, column * reach - 1 + skipped, size, width, vector, vectors, at)
                    for k in range(run):
                        table[t + k, 0] = at + k * reach * pixel
                        table[t + k, 1], table[t + k, 2] = width * pixel, pixel
                    at += size * width * pixel
                    t += run
                _transform_group(
                    job.form, table_at, count, target + vector * GROUP_BYTES, job.place, vectors, past
                )  # fmt: skip
        fence()
        fetch_add(counters[1].ctypes.data, 1)
    # Numba frees an array after its last use, and does not see uses of its address.
    strip[0] = 0.0
    table[0, 0] = 0
    wait_until(counters[1].ctypes.data, tasks, job.give_way)


@compiled
def _transform_group(form: int, table: int, count: int, target: int, place: int, blocks: int, past: int) -> None:
    if form == PLAIN:
        input_transform(table, count, target, place, blocks, past)
    elif form == PRECISE:
        input_transform_precise(table, count, target, place, blocks, past)
    elif form == DOWN:
        input_transform_down(table, count, target, place, blocks, past)
    else:
        input_transform_up(table, count, target, place, blocks, past)


@compiled
def _fill(job: ConvJob, top: int, left: int, rows: int, width: int, vector: int, vectors: int, dst: int) -> None:
    """Fill a strip of so many rows and columns with some channels: zeros outside the map, inside through the norm."""
    offset, pixel = vector * VECTOR_BYTES, vectors * VECTOR_BYTES
    before = min(max(-left, 0), width)
    after = min(max(left + width - job.src_columns, 0), width - before)
    inside = width - before - after
    for row in range(top, top + rows):
        src = job.src + row * job.src_row + (left + before) * job.src_column + offset
        if row < job.src_first or row >= job.src_rows:
            copy(0, dst, width * vectors)
        else:
            copy(0, dst, before * vectors)
            target = dst + before * pixel
            if job.scale != 0:
                let_in(src, job.src_column, target, job.scale + offset, job.shift + offset, inside, vectors)
            else:
                let_in_as_it_is(src, job.src_column, target, 0, 0, inside, vectors)
            copy(0, target + inside * pixel, after * vectors)
        dst += width * pixel


@compiled
def _multiply(job: ConvJob, first: int, last: int, scratch: int, free: int, places: Any, counters: Any) -> None:
    """The second step: multiply the tiles of one position by its weights."""
    positions, tiles = POSITIONS[job.form], last - first
    panel_out = (tiles + THIRD - 1) // THIRD * THIRD * NR * 4
    split = np.empty(job.split // 4 + 16, np.float32)
    split_at = (split.ctypes.data + 63) // 64 * 64
    while True:
        position = fetch_add(counters[2].ctypes.data, 1)
        if position >= positions:
            break
        transformed = scratch + position * job.place
        multiply(
            transformed, tiles, job.weights + position * job.position_weights, job.panel_weights, job.panels, job.cin,
            free, panel_out, split_at,
        )  # fmt: skip
        places[position] = free
        free = transformed
        fetch_add(counters[3].ctypes.data, 1)
    split[0] = 0.0
    wait_until(counters[3].ctypes.data, positions, job.give_way)


@compiled
def _transform_back(
    job: ConvJob, shared: Shared, block: int, first: int, last: int, places: Any, counters: Any
) -> None:
    """The third step: transform groups of tiles back, with bias, residual and statistics."""
    step = STEPS[job.form]
    panel_out = (last - first + THIRD - 1) // THIRD * THIRD * NR * 4
    terms = np.empty((3, NR), np.float32)
    shares = np.empty(3, np.float64)
    terms_at, shares_at = terms.ctypes.data, shares.ctypes.data
    places_at = places.ctypes.data
    dst = job.dst + block * job.rows * job.dst_row
    spans = (last - first + SPAN - 1) // SPAN
    while True:
        task = fetch_add(counters[4].ctypes.data, 1)
        if task >= spans:
            break
        span = first // SPAN + task
        for panel in range(job.panels):
            channel = panel * NR
            vectors = min(NR, job.cout - channel) // LANES
            terms[:2] = shared.factor_bias[:, channel : channel + NR]
            stats_at = shared.stats[block, span, panel].ctypes.data
            before = 0
            for tile in range(span * SPAN, min((span + 1) * SPAN, last)):
                y = tile // job.tiles_across * step
                x = tile % job.tiles_across * step
                target = dst + y * job.dst_row + x * job.dst_column + channel * 4
                offset = panel * panel_out + (tile - first) * NR * 4
                rows, columns = min(step, job.rows - y), min(step, job.columns - x)
                pixels = rows * columns
                shares[0] = 1.0 / pixels
                shares[1] = pixels / (before + pixels)
                shares[2] = shares[1] * before
                if job.form == DOWN:
                    output_transform_down(
                        places_at, offset, target, job.dst_row, job.dst_column, rows, columns, 0, terms_at, NR * 4,
                        stats_at, shares_at, before == 0, vectors,
                    )  # fmt: skip
                elif job.form == PRECISE and job.residual == -1:
                    output_transform_precise(
                        places_at, offset, target, job.dst_row, job.dst_column, rows, columns, 0, terms_at, NR * 4,
                        stats_at, shares_at, before == 0, vectors,
                    )  # fmt: skip
                elif job.form == PRECISE:
                    output_transform_precise_residual(
                        places_at, offset, target, job.dst_row, job.dst_column, rows, columns, job.residual, terms_at,
                        NR * 4, stats_at, shares_at, before == 0, vectors,
                    )  # fmt: skip
                elif job.residual == -1:
                    output_transform(
                        places_at, offset, target, job.dst_row, job.dst_column, rows, columns, 0, terms_at, NR * 4,
                        stats_at, shares_at, before == 0, vectors,
                    )  # fmt: skip
                else:
                    output_transform_residual(
                        places_at, offset, target, job.dst_row, job.dst_column, rows, columns, job.residual, terms_at,
                        NR * 4, stats_at, shares_at, before == 0, vectors,
                    )  # fmt: skip
                before += pixels
            shared.counts[block, span] = before
        fence()
        fetch_add(counters[5].ctypes.data, 1)
    terms[0, 0] = 0.0
    shares[0] = 0.0
    wait_until(counters[5].ctypes.data, spans, job.give_way)


@compiled
def merge(shared: Shared, block: int, out: Any) -> None:
    """Combine the statistics of a block's spans in their order into (2, cout): mean and deviations.

    Source: Chan, Golub and LeVeque 1979.
    """
    out[:] = 0.0
    before = 0
    stats, counts = shared.stats[block], shared.counts[block]
    for span in range(len(counts)):
        count = counts[span]
        share = count / (before + count)
        weight = share * before
        before += count
        for c in range(out.shape[1]):
            apart = stats[span, c // NR, 0, c % NR] - out[0, c]
            out[0, c] += apart * share
            out[1, c] += stats[span, c // NR, 1, c % NR] + apart * apart * weight
