"""3x3 convolutions on a CPU with a fifth of the multiplications: Winograd's F(6, 3), float32, channels last.

`winograd_loops` has the inner loops, `winograd_tasks` the order of work, `winograd_layer` one convolution's weights and
job, `cpu_threads` the threads; `row_tasks` linear layers and passes over pixels, `cpu_attention` attention,
`few_outputs` the last layer. What is not float32 or has no whole vectors of channels goes to the direct kernels.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from fluxvae.engine.kernels import cpu_threads, winograd_layer
from fluxvae.engine.kernels.cpu_attention import (
    AttentionJob,
    attention,
    attention_tasks,
)
from fluxvae.engine.kernels.few_outputs import (
    FewJob,
    FewWeights,
    few_outputs,
    few_outputs_rows,
    few_outputs_weights,
)
from fluxvae.engine.kernels.row_tasks import (
    AFFINE,
    COPY,
    SILU,
    LinearJob,
    LinearWeights,
    RowsJob,
    affine_rows,
    linear,
    linear_rows,
    linear_weights,
)
from fluxvae.engine.kernels.torch import TorchKernels
from fluxvae.engine.kernels.winograd_costs import WinogradCosts, attention_results, few, whole_vectors
from fluxvae.engine.kernels.winograd_cut import transformed_bytes
from fluxvae.engine.kernels.winograd_layer import Weights, transformed
from fluxvae.engine.kernels.winograd_tasks import ConvJob, WeightsJob, convolve, merge, transform_weights
from fluxvae.engine.norm import Affine, Partial, block_moments
from fluxvae.engine.records import Attention, Conv, parameters

__all__ = ["WinogradKernels"]

_log = logging.getLogger(__name__)

_prepared = False
PASS = 1 << 15
"""Values of a task that only passes over pixels."""


class WinogradKernels(WinogradCosts, TorchKernels):
    """Winograd where it applies, PyTorch elsewhere."""

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
        convolve(ConvJob(*[1] * len(ConvJob._fields)), np.empty((2, 1), np.float32), np.empty((3, 1, 1)), done, 0)
        merge(np.zeros((3, 1, 1)), np.zeros((3, 1)))
        transform_weights(WeightsJob(*[1] * len(WeightsJob._fields)), done)
        linear_rows(LinearJob(*[1] * len(LinearJob._fields)), done)
        affine_rows(RowsJob(*[1] * len(RowsJob._fields)), done)
        attention_tasks(AttentionJob(*[1] * len(AttentionJob._fields)), done, 0)
        few_outputs_rows(FewJob(*[1] * len(FewJob._fields)), done)
        _prepared = True
        seconds = time.perf_counter() - start
        if seconds > 1:
            _log.info("compiled the Winograd kernels in %.1f s; Numba keeps them for the next process", seconds)
        return seconds

    def session(self) -> AbstractContextManager[None]:
        """OpenMP's threads would spin in the way of ours after each of PyTorch's small operations."""
        return cpu_threads.alone()

    def load(self, conv: Conv, kind: str, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """The weights transformed in float64 and rounded once."""
        # `loaded` knew the map's size and decided; room for the transformed weights is how this method is told.
        if kind == "linear" and whole_vectors(conv.cin, conv.cout, dtype.itemsize):
            return linear_weights(*parameters(conv.module), into)
        if few(kind, conv.cin, conv.cout, dtype.itemsize):
            return few_outputs_weights(*parameters(conv.module), into)
        planned = into.numel() >= transformed_bytes(conv.cin, conv.cout)
        if kind not in ("conv3", "up") or not planned or not whole_vectors(conv.cin, conv.cout, dtype.itemsize):
            return super().load(conv, kind, dtype, into)
        return transformed(*parameters(conv.module), into)

    def prologue(
        self, rows: torch.Tensor, affine: Affine | None, silu: bool, out: torch.Tensor, work: torch.Tensor
    ) -> None:
        """One pass, by our threads: PyTorch's would still be spinning when ours start."""
        channels = rows.shape[-1]
        if not whole_vectors(channels, channels, rows.element_size()):
            super().prologue(rows, affine, silu, out, work)
            return
        if affine is None and rows.data_ptr() == out.data_ptr():
            return
        scale, shift = (0, 0) if affine is None else (affine.scale.data_ptr(), affine.shift.data_ptr())
        pixels = rows.numel() // channels
        run = max(1, PASS // channels)
        job = RowsJob(
            src=rows.data_ptr(), dst=out.data_ptr(), scale=scale, shift=shift, pixels=pixels, channels=channels,
            run=run, what=COPY if affine is None else SILU if silu else AFFINE,
        )  # fmt: skip
        cpu_threads.share(affine_rows, job, -(-pixels // run))

    def conv3x3(
        self,
        padded: torch.Tensor,
        weights: Any,
        affine: Affine | None,
        pad_rows: tuple[bool, bool],
        out: torch.Tensor,
        residual: torch.Tensor | None,
        scale: float,
        statistics: bool,
        work: torch.Tensor,
    ) -> Partial | None:
        """F(6, 3); the last layer directly."""
        if isinstance(weights, FewWeights):
            if residual is not None or scale != 1.0 or statistics:
                raise RuntimeError("few_outputs: got a residual, a scale or statistics, which no last layer has")
            few_outputs(padded, weights, out)
            return None
        if not isinstance(weights, Weights):
            with cpu_threads.pytorchs():
                return super().conv3x3(padded, weights, affine, pad_rows, out, residual, scale, statistics, work)
        if scale != 1.0:
            weights = weights._replace(factor_bias=(weights.factor_bias / scale).astype(np.float32))
        return winograd_layer.run("conv3", padded, weights, out, residual, statistics, work)

    def upsample(
        self, padded: torch.Tensor, weights: Any, out: torch.Tensor, statistics: bool, work: torch.Tensor
    ) -> Partial | None:
        """F(6, 3) on the large map, which is never built: see `winograd_loops.PIXELS_UP`."""
        if not isinstance(weights, Weights):
            return super().upsample(padded, weights, out, statistics, work)
        return winograd_layer.run("up", padded, weights, out, None, statistics, work)

    def linear(self, rows: torch.Tensor, weights: Any, out: torch.Tensor) -> None:
        """Our products: MKL's, of few rows, depend on the number of threads."""
        if not isinstance(weights, LinearWeights):
            super().linear(rows, weights, out)
            return
        linear(rows, weights, out)

    def load_attention(self, layer: Attention, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """The four projections; the keys' the other way round, see `attend`."""
        if not whole_vectors(layer.q.cin, layer.q.cout, dtype.itemsize) or layer.q.cin != layer.q.cout:
            return super().load_attention(layer, dtype, into)
        weights = [parameters(conv.module) for conv in (layer.q, layer.k, layer.v, layer.out)]
        weights[1] = (weights[1][0].reshape(layer.k.cout, layer.k.cin).t(), None)
        return [linear_weights(*pair, part) for pair, part in zip(weights, into.chunk(4), strict=True)]

    def attend(
        self,
        layer: Attention,
        weights: Any,
        queries: torch.Tensor,
        normed: torch.Tensor,
        out: torch.Tensor,
        statistics: bool,
        work: torch.Tensor,
    ) -> Partial | None:
        """As `TorchKernels.attend`, with our own products and softmax."""
        if not isinstance(weights[0], LinearWeights):
            return super().attend(layer, weights, queries, normed, out, statistics, work)
        q, k, v, o = weights
        count, channels = queries.numel() // normed.shape[1], normed.shape[1]
        results = attention_results(count, channels)
        one, other = work[:results].view(torch.float32).view(2, -1, channels)
        self.linear(queries, q, one[:count])
        self.linear(one[:count], k, other[:count])
        attention(other, normed, layer.softmax_scale, one, work[results:])
        self.linear(one[:count], v, other[:count])
        self.linear(other[:count], o, one[:count])
        result = one[:count].view_as(out)
        if layer.residual:
            out.add_(result)
        else:
            out.copy_(result)
        if layer.scale != 1.0:
            out.div_(layer.scale)
        return block_moments(out, work) if statistics else None
