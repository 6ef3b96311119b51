"""3x3 convolutions on a CPU with a fifth of the multiplications, by Winograd's F(6, 3) in float32, channels last.

`products`, `amx`, `winograd_loops` and `pixel_loops` have the inner loops, and `multiply` chooses between the first
two. `winograd_tasks` and `winograd_weights` have the order of work, `winograd_layer` the weights and the job of one
convolution, and `threads` the threads. `row_tasks` has linear layers and passes over pixels, `attention` attention, and
`few_outputs` the last layer. What is not in float32, or has no whole vectors of channels, goes to the direct kernels.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from fluxvae.engine import thread_count
from fluxvae.engine.calls import Kind
from fluxvae.engine.kernels import AttentionBlock, ConvBlock, Refill
from fluxvae.engine.kernels.cpu import threads, winograd_layer
from fluxvae.engine.kernels.cpu.attention import (
    AttentionJob,
    attention,
    attention_tasks,
    attention_tasks_amx,
)
from fluxvae.engine.kernels.cpu.costs import WinogradCosts, attention_results, few, whole_vectors
from fluxvae.engine.kernels.cpu.few_outputs import (
    FewJob,
    FewWeights,
    few_outputs,
    few_outputs_rows,
    few_outputs_weights,
)
from fluxvae.engine.kernels.cpu.row_tasks import (
    AFFINE,
    BY_PIXEL,
    COPY,
    LinearJob,
    LinearWeights,
    RowsJob,
    affine_rows,
    linear,
    linear_rows,
    linear_weights,
)
from fluxvae.engine.kernels.cpu.vector_code import AMX
from fluxvae.engine.kernels.cpu.winograd_cut import form_of, transformed_bytes
from fluxvae.engine.kernels.cpu.winograd_job import ConvJob, Shared
from fluxvae.engine.kernels.cpu.winograd_layer import Weights, transformed
from fluxvae.engine.kernels.cpu.winograd_tasks import convolve, merge
from fluxvae.engine.kernels.cpu.winograd_weights import WeightsJob, transform_weights
from fluxvae.engine.kernels.direct.kernels import TorchKernels
from fluxvae.engine.records import Conv, Projections, parameters
from fluxvae.engine.statistics import PixelScale, Scaling, block_moments

__all__ = ["WinogradKernels"]

_log = logging.getLogger(__name__)

_prepared = False
PASS = 1 << 15
"""How many values a task has that only passes over pixels, without a convolution."""


class WinogradKernels(WinogradCosts, TorchKernels):
    """Winograd's convolution and our other kernels where they apply, PyTorch's elsewhere."""

    # -- what the sweeps ask -----------------------------------------------------------------------------------

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Half-precision weights are computed in float32: these kernels are faster than PyTorch's in bfloat16."""
        return torch.float32 if stored in (torch.bfloat16, torch.float16) else stored

    def prepare(self) -> float:
        """Compile what this machine has not compiled yet, or load it from Numba's cache; seconds it took."""
        global _prepared
        if _prepared:
            return 0.0
        start = time.perf_counter()
        done = np.ones(1, np.int64)  # a counter past the last task: there is nothing to do
        nothing = Shared(
            np.zeros((2, 1), np.float32), np.zeros((1, 1, 1, 1, 1)), np.ones((1, 1), np.int64),
            np.zeros((1, 1), np.int64),
            np.full((1, 7, 8), 1 << 20),  # past the last tasks, and all of them done
        )  # fmt: skip
        convolve(ConvJob(*[1] * len(ConvJob._fields)), nothing, 0)
        merge(nothing, 0, np.zeros((2, 1)))
        transform_weights(WeightsJob(*[1] * len(WeightsJob._fields)), done)
        linear_rows(LinearJob(*[1] * len(LinearJob._fields)), done)
        affine_rows(RowsJob(*[1] * len(RowsJob._fields)), done)
        for tasks in (attention_tasks, attention_tasks_amx) if AMX else (attention_tasks,):
            tasks(AttentionJob(*[1] * len(AttentionJob._fields)), done, 0)
        few_outputs_rows(FewJob(*[1] * len(FewJob._fields)), done)
        threads.run(lambda worker: None, 2)  # compiles how threads wait
        _prepared = True
        seconds = time.perf_counter() - start
        if seconds > 1:
            _log.info("compiled the Winograd kernels in %.1f s; Numba keeps them for the next process", seconds)
        return seconds

    def session(self) -> AbstractContextManager[None]:
        """A context without OpenMP's threads, which would spin in our way after each of PyTorch's operations."""
        return thread_count.alone()

    def load(self, conv: Conv, kind: Kind, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """The weights as the kernel wants them. Those for Winograd are transformed in float64 and rounded once."""
        # `loaded` decided by the map's size, which is not known here. Whether there is room for the transformed
        # weights tells what it decided.
        if kind == "linear" and whole_vectors(conv.cin, conv.cout, dtype.itemsize):
            return linear_weights(*parameters(conv), into)
        if few(kind, conv.cin, conv.cout, dtype.itemsize):
            return few_outputs_weights(*parameters(conv), into)
        form = form_of(kind, conv.precise)
        planned = into.numel() >= transformed_bytes(form, conv.cin, conv.cout)
        if kind not in ("conv3", "up", "down") or not planned or not whole_vectors(conv.cin, conv.cout, dtype.itemsize):
            return super().load(conv, kind, dtype, into)
        return transformed(form, *parameters(conv), into)

    def prologue(
        self, rows: torch.Tensor, norm: Scaling | None, silu: bool, out: torch.Tensor, work: torch.Tensor
    ) -> None:
        """Compute it in one pass by our threads, because PyTorch's would still be spinning when ours start."""
        channels = rows.shape[-1]
        if not whole_vectors(channels, channels, rows.element_size()):
            super().prologue(rows, norm, silu, out, work)
            return
        if norm is None and rows.data_ptr() == out.data_ptr():
            return
        scale, shift = (0, 0) if norm is None else (norm.scale.data_ptr(), norm.shift.data_ptr())
        what, least = COPY if norm is None else AFFINE, np.zeros(1, np.float32)
        if isinstance(norm, PixelScale):
            what, least[0] = BY_PIXEL, norm.eps
        pixels = rows.numel() // channels
        run = max(1, PASS // channels)
        job = RowsJob(
            src=rows.data_ptr(), dst=out.data_ptr(), scale=scale, shift=shift, pixels=pixels, channels=channels,
            run=run, what=what, silu=int(silu), least=least.ctypes.data,
        )  # fmt: skip
        threads.share(affine_rows, job, -(-pixels // run))

    def _let_in(self, refill: Refill, fresh: torch.Tensor) -> None:
        """From where the rows are, in any pieces: ours compute every pixel in the same way."""
        channels = fresh.shape[-1]
        if not whole_vectors(channels, channels, fresh.element_size()):
            super()._let_in(refill, fresh)
            return
        refill.source.pour(fresh, lambda rows, part: self.prologue(rows, refill.norm, True, part, refill.work))

    def convolve(self, block: ConvBlock) -> None:
        """Compute the block by the kernel that the weights were loaded for.

        1x1 convolutions use our own products too, because MKL's depend on the number of threads where rows are few.
        """
        match block.weights:
            case Weights():
                winograd_layer.run(block)
            case LinearWeights():
                linear(block.rows, block.weights, block.out)
            case FewWeights():
                if block.residual is not None or block.scale != 1.0 or block.statistics is not None:
                    raise RuntimeError("few_outputs: got a residual, a scale or statistics, which no last layer has")
                few_outputs(block.rows, block.weights, block.out)
            case _:
                with thread_count.pytorchs() if block.kind in ("conv3", "down") else nullcontext():
                    super().convolve(block)

    def load_attention(self, projections: Projections, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """The four projections. That of the keys is transposed, as `TorchKernels.attend` explains."""
        q, k, v, out = projections.q, projections.k, projections.v, projections.out
        if not whole_vectors(q.cin, q.cout, dtype.itemsize) or q.cin != q.cout:
            return super().load_attention(projections, dtype, into)
        weights = [parameters(conv) for conv in (q, k, v, out)]
        weights[1] = (weights[1][0].reshape(k.cout, k.cin).t(), None)
        return [linear_weights(*pair, part) for pair, part in zip(weights, into.chunk(4), strict=True)]

    def attend(self, block: AttentionBlock) -> None:
        """Compute it as `TorchKernels.attend` does, by our own products and softmax."""
        if not isinstance(block.weights[0], LinearWeights):
            super().attend(block)
            return
        q, k, v, o = block.weights
        layer, queries, tokens, out, work = block.projections, block.queries, block.tokens, block.out, block.work
        count, channels = queries.numel() // tokens.shape[1], tokens.shape[1]
        results = attention_results(count, channels)
        one, other = work[:results].view(torch.float32).view(2, -1, channels)
        linear(queries, q, one[:count])
        linear(one[:count], k, other[:count])
        attention(other, tokens, layer.softmax_scale, one, work[results:])
        linear(one[:count], v, other[:count])
        linear(other[:count], o, one[:count])
        result = one[:count].view_as(out)
        if layer.residual:
            out.add_(result)
        else:
            out.copy_(result)
        if layer.scale != 1.0:
            out.div_(layer.scale)
        if block.statistics is not None:
            block.statistics.add(block_moments(out, work))
