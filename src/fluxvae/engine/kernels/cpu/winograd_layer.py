"""One convolution by Winograd's F(6, 3): transforms its weights, and makes the job that the tasks do."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from fluxvae import system
from fluxvae.engine.kernels import ConvBlock, Raw
from fluxvae.engine.kernels.cpu import threads
from fluxvae.engine.kernels.cpu.multiply import panel_bytes, split_bytes
from fluxvae.engine.kernels.cpu.products import NR, THIRD
from fluxvae.engine.kernels.cpu.vector_code import LANES, LINE, VECTOR_BYTES
from fluxvae.engine.kernels.cpu.winograd_cut import cut_tasks, position_bytes
from fluxvae.engine.kernels.cpu.winograd_job import POSITIONS, STEPS, ConvJob, Shared
from fluxvae.engine.kernels.cpu.winograd_tasks import convolve, merge
from fluxvae.engine.kernels.cpu.winograd_weights import WeightsJob, transform_weights
from fluxvae.engine.statistics import Partial

__all__ = ["Weights", "run", "transformed"]

Array: TypeAlias = "np.ndarray[Any, Any]"


class Weights(NamedTuple):
    """One layer's weights, transformed and laid out for `run`."""

    transformed: torch.Tensor
    factor_bias: Array
    """(2, cout rounded up to whole panels) float32: ones, and the bias. `run` divides both by a block's scale."""
    cin: int
    cout: int
    form: int
    """The form of the tiles that they are for."""


def transformed(form: int, weight: torch.Tensor, bias: torch.Tensor | None, into: torch.Tensor) -> Weights:
    """Transform weights (cout, cin, 3, 3) in float64 and round them once; ``into`` is `transformed_bytes` of uint8."""
    cout, cin = weight.shape[:2]
    weight = weight.float()
    kernel, channel, row, column = (4 * stride for stride in weight.stride())
    job = WeightsJob(
        src=weight.data_ptr(), kernel=kernel, channel=channel, row=row, column=column, dst=into.data_ptr(),
        cin=cin, cout=cout, panel=panel_bytes(cin), position=position_bytes(cin, cout), form=form,
    )  # fmt: skip
    _check_aligned(into)
    threads.share(transform_weights, job, cout // LANES)
    factor_bias = np.ones((2, -(-cout // NR) * NR), np.float32)
    factor_bias[1, :cout] = 0 if bias is None else bias.detach().float().numpy()
    return Weights(into, factor_bias, cin, cout, form)


def run(block: ConvBlock) -> None:
    """Compute blocks of a 3x3 convolution of whatever kind, and their statistics: see `ConvBlock`."""
    padded, weights, out, residual = block.rows, block.weights, block.out, block.residual
    work = block.work
    raw = block.raw or Raw(None, above=True, below=True)  # a window has both, zeros where the map ends
    rows, width = padded.shape[0] - raw.above - raw.below, padded.shape[1]
    cin, cout, form = weights.cin, weights.cout, weights.form
    blocks = raw.blocks
    block_rows, made_rows = rows // blocks, out.shape[0] // blocks
    if blocks > 1 and (rows % blocks or made_rows % STEPS[form]):  # tiles would read what is the next block's
        raise RuntimeError(f"{rows} rows are not {blocks} blocks of whole tiles: the plan was wrong")
    cut = cut_tasks(form, cin, cout, block_rows, width)
    row = width * cin * 4
    workers = cut.workers
    while workers and cut.scratch_bytes(form, workers) > work.numel():
        workers -= 1  # threads that were added since the work was planned have no place of their own
    if workers < 1:
        needed = cut.scratch_bytes(form, 1)
        raise RuntimeError(f"the workspace of {work.numel()} bytes is too small for {needed}: the plan was wrong")
    _check_aligned(work, out)
    scale, shift = (0, 0) if raw.norm is None else (raw.norm.scale.data_ptr(), raw.norm.shift.data_ptr())
    job = ConvJob(
        src=padded.data_ptr() - (0 if raw.above else row), src_row=row, src_column=cin * 4,
        src_first=0 if raw.above else 1, src_rows=1 + rows + raw.below, src_columns=width, cin=cin, scale=scale,
        shift=shift, dst=out.data_ptr(), dst_row=out.shape[1] * cout * 4, dst_column=cout * 4, rows=made_rows,
        columns=out.shape[1], cout=cout, form=form,
        residual=-1 if residual is None else residual.data_ptr() - out.data_ptr(),
        weights=weights.transformed.data_ptr(), position_weights=position_bytes(cin, cout), panels=cut.panels,
        panel_weights=panel_bytes(cin), split=split_bytes(cut.longest, cin), blocks=blocks, block_rows=block_rows,
        tiles_across=cut.across, tiles=cut.tiles, units=cut.units,
        piece=max(1, cut.tiles // (4 * THIRD * workers)),  # a few for each thread, so that none waits for long
        place=cut.place, scratch=work.data_ptr(), give_way=system.give_way(),
    )  # fmt: skip
    factor_bias = weights.factor_bias
    if block.scale != 1.0:
        factor_bias = (factor_bias / block.scale).astype(np.float32)
    shared = Shared(
        factor_bias=factor_bias,
        stats=np.zeros((blocks, cut.spans, cut.panels, 2, NR)),
        counts=np.empty((blocks, cut.spans), np.int64),
        places=np.empty((workers, POSITIONS[form]), np.int64),
        counters=np.zeros((blocks * max(cut.units, 1), 7, 8), np.int64),
    )
    threads.run(lambda worker: convolve(job, shared, worker), workers)
    if block.statistics is None:
        return
    merged = torch.empty(2, cout, dtype=torch.float64, device="cpu")
    for index in range(blocks):
        merge(shared, index, merged.numpy())
        block.statistics.add(Partial(made_rows * out.shape[1], merged[0], merged[1]))


def _check_aligned(*written: torch.Tensor) -> None:
    """Raise RuntimeError where `Code.stream`, which stores whole cache lines where a vector is one, would crash."""
    if VECTOR_BYTES == LINE and any(tensor.data_ptr() % LINE for tensor in written):
        raise RuntimeError("got memory that does not begin at a cache line, which stores past the caches need")
