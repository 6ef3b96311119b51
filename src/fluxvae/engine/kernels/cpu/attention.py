"""Exact attention of one wide head on a CPU, in float32.

The softmax is computed online, so that only the scores of a few keys are stored at a time. Keys and values are the same
rows here, those of the normalised map (`TorchKernels.attend` says why). NR queries make a panel, whose inner loops are
in `attention_loops`, and in `attention_amx` what else AMX needs. The result of a query is one chain of operations in a
fixed order, whichever thread computes it and whatever other queries there are.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention" (2022).
Compiled by Numba, without the GIL. Addresses and strides are in bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fluxvae.engine import thread_count
from fluxvae.engine.kernels.cpu import threads
from fluxvae.engine.kernels.cpu.amx import (
    CHUNK,
    CHUNK_BYTES,
    ROWS,
    multiply_32,
    release_registers,
    shape_registers,
    split_rows,
    split_weights,
)
from fluxvae.engine.kernels.cpu.attention_amx import add_to_sums, finish_rows, split_exponentials
from fluxvae.engine.kernels.cpu.attention_loops import (
    KEYS,
    ROW,
    finish_panel,
    mix_few,
    mix_many,
    scores_few,
    scores_many,
    scores_one,
    softmax_panel,
    start_panel,
)
from fluxvae.engine.kernels.cpu.counters import fetch_add
from fluxvae.engine.kernels.cpu.multiply import multiply_parts, panel_bytes
from fluxvae.engine.kernels.cpu.products import NR, THIRD, TILES
from fluxvae.engine.kernels.cpu.vector_code import AMX, LANES, VECTOR_BYTES, compiled

if TYPE_CHECKING:
    import torch

__all__ = ["AttentionJob", "attention", "attention_bytes", "attention_tasks", "attention_tasks_amx", "padded_queries"]

VECTOR_CODE = "35ab4ff49856a543"
"""The digest of the files that this one calls, for the reason that `winograd_tasks.VECTOR_CODE` gives."""
PANELS = 8 if AMX else 4
"""How many panels of queries a task has: the more, the less often the map is read. That counts where memory is slow: on
a Xeon whose L3 cache gives 20 GB/s, 4 panels with 256 keys reach 0.86 of the products' peak, and 2 with 384 keys 0.75.
On an EPYC (Zen 5) they are equally fast. With AMX each task also splits the map into parts, which takes as long as
multiplying it by two panels."""


class AttentionJob(NamedTuple):
    """The job of one call: whole panels of queries against all tokens."""

    queries: int
    """The address of the queries, (panels * NR, channels) float32."""
    tokens: int
    """The address of the tokens, which are keys and values at once, (keys, channels) float32."""
    dst: int
    """The address of the result, which is as large as the queries."""
    scale: int
    """The address of the softmax's scale, one float32."""
    panels: int
    keys: int
    channels: int
    scratch: int
    scratch_bytes: int
    """The bytes of scratch that each thread has."""


@compiled
def attention_tasks(job: AttentionJob, counter: Any, worker: int) -> None:
    """Take panels of queries until none is left."""
    channels, row, size = job.channels, job.channels * 4, job.channels * ROW
    queries = job.scratch + worker * job.scratch_bytes
    sums = queries + PANELS * size
    scores, state = sums + PANELS * size, sums + PANELS * (size + KEYS * ROW)
    while True:
        first = fetch_add(counter.ctypes.data, 1) * PANELS
        if first >= job.panels:
            return
        panels = min(PANELS, job.panels - first)
        src, dst = job.queries + first * NR * row, job.dst + first * NR * row
        for p in range(panels):
            own = state + p * 3 * ROW
            start_panel(src + p * NR * row, row, channels, job.scale, queries + p * size, sums + p * size, own)
        done = 0
        while done < job.keys:
            tokens, keys = job.tokens + done * row, min(KEYS, job.keys - done)
            for p in range(panels):
                right, out = queries + p * size, scores + p * KEYS * ROW
                key = 0
                while key < keys:
                    if keys - key >= TILES:
                        scores_many(tokens + key * row, row, 4, right, channels, out + key * ROW, 0)
                        key += TILES
                    elif keys - key >= THIRD:
                        scores_few(tokens + key * row, row, 4, right, channels, out + key * ROW, 0)
                        key += THIRD
                    else:
                        scores_one(tokens + key * row, row, 4, right, channels, out + key * ROW, 0)
                        key += 1
                softmax_panel(out, keys, state + p * 3 * ROW)
            for p in range(panels):
                right, out, factors = scores + p * KEYS * ROW, sums + p * size, state + (p * 3 + 2) * ROW
                c = 0
                while c < channels:
                    if channels - c >= TILES:
                        mix_many(tokens + c * 4, 4, row, right, keys, out + c * ROW, factors)
                        c += TILES
                    else:
                        mix_few(tokens + c * 4, 4, row, right, keys, out + c * ROW, factors)
                        c += THIRD
            done += keys
        for p in range(panels):
            finish_panel(sums + p * size, state + p * 3 * ROW, channels // LANES, dst + p * NR * row, row)


@compiled
def attention_tasks_amx(job: AttentionJob, counter: Any, worker: int) -> None:
    """The same by AMX.

    The keys are the tiles and a panel of queries the weights of the scores; then the exponentials are the tiles and the
    same keys the weights of the sums. So keys are split into parts twice, for all panels of a task.
    """
    channels, row, size, blocks = job.channels, job.channels * 4, job.channels * ROW, job.channels // LANES
    chunks, half = (channels + CHUNK - 1) // CHUNK, KEYS // CHUNK * CHUNK_BYTES
    queries = job.scratch + worker * job.scratch_bytes
    sums = queries + PANELS * chunks * 2 * CHUNK_BYTES
    exponentials = sums + PANELS * size
    parts = exponentials + PANELS * 2 * half
    scores = parts + KEYS // ROWS * chunks * CHUNK_BYTES
    fresh, state = scores + KEYS * ROW, scores + KEYS * ROW + NR * ROW
    while True:
        first = fetch_add(counter.ctypes.data, 1) * PANELS
        if first >= job.panels:
            return
        panels = min(PANELS, job.panels - first)
        src, dst = job.queries + first * NR * row, job.dst + first * NR * row
        for p in range(panels):
            own = state + p * 3 * ROW
            start_panel(src + p * NR * row, row, channels, job.scale, parts, sums + p * size, own)
            split_weights(parts, ROW, channels, queries + p * chunks * 2 * CHUNK_BYTES)
        done = 0
        while done < job.keys:
            tokens, keys = job.tokens + done * row, min(KEYS, job.keys - done)
            split_rows(tokens, THIRD * row, row, VECTOR_BYTES, keys, blocks, parts)
            for p in range(panels):
                right, out = queries + p * chunks * 2 * CHUNK_BYTES, exponentials + p * 2 * half
                multiply_parts(parts, keys, right, chunks, scores, right, 1)
                softmax_panel(scores, keys, state + p * 3 * ROW)
                split_exponentials(scores, keys, half, out)
            for c in range(channels // NR):  # the keys of NR channels are the weights now
                split_weights(tokens + c * ROW, row, keys, parts + c * 2 * half)
            for p in range(panels):
                factors = state + (p * 3 + 2) * ROW
                shape_registers(ROWS, ROWS)
                for c in range(channels // NR):
                    right = parts + c * 2 * half
                    multiply_32(exponentials + p * 2 * half, half, right, (keys + CHUNK - 1) // CHUNK, fresh, right, 1)
                    add_to_sums(fresh, factors, sums + p * size + c * ROW, row)
            done += keys
        release_registers()
        for p in range(panels):
            finish_rows(sums + p * size, state + p * 3 * ROW, blocks, dst + p * NR * row)


def padded_queries(count: int) -> int:
    """Round a number of queries up to whole panels."""
    return -(-count // NR) * NR


def attention_bytes(count: int, channels: int) -> int:
    """Bytes of `attention`'s workspace for so many queries.

    At 512 channels it is 0.66 MB for each thread that finds work, and 2.5 MB with AMX.
    """
    return _workers(padded_queries(count) // NR) * _scratch_bytes(channels)


def _workers(panels: int) -> int:
    return min(thread_count.count(), -(-panels // PANELS))


def _scratch_bytes(channels: int) -> int:
    """The bytes of a thread's scratch: the queries, sums, scores and state of the softmax of its panels."""
    if not _by_amx(channels):
        return PANELS * (2 * channels + KEYS + 3) * ROW
    in_parts = PANELS * (panel_bytes(channels) + panel_bytes(KEYS)) + KEYS // NR * panel_bytes(channels)
    return in_parts + PANELS * (channels + 3) * ROW + (KEYS + NR) * ROW


def _by_amx(channels: int) -> bool:
    """Whether AMX computes it: that reads the channels of keys by NR."""
    return AMX and channels % NR == 0


def attention(queries: torch.Tensor, tokens: torch.Tensor, scale: float, out: torch.Tensor, work: torch.Tensor) -> None:
    """Compute ``out = softmax(scale * queries tokens^T) tokens`` in float32.

    A result is NaN where one of its scores is NaN or infinite.

    Args:
        queries, out: (n, channels), contiguous, with whole vectors of channels; n is what `padded_queries` gives, and
            the rows that were added may hold anything.
        tokens: (keys, channels), contiguous.
        work: flat uint8 scratch of `attention_bytes`.
    """
    count, channels = queries.shape
    factor = np.full(1, scale, np.float32)
    # Threads added since the work was planned have no scratch.
    workers = min(_workers(count // NR), work.numel() // _scratch_bytes(channels))
    if workers < 1:
        raise RuntimeError(f"attention: got a workspace of {work.numel()} bytes, too small: the plan was wrong")
    job = AttentionJob(
        queries=queries.data_ptr(), tokens=tokens.data_ptr(), dst=out.data_ptr(), scale=factor.ctypes.data,
        panels=count // NR, keys=tokens.shape[0], channels=channels, scratch=work.data_ptr(),
        scratch_bytes=_scratch_bytes(channels),
    )  # fmt: skip
    counter = np.zeros(1, np.int64)
    tasks = attention_tasks_amx if _by_amx(channels) else attention_tasks
    threads.run(lambda worker: tasks(job, counter, worker), workers)
