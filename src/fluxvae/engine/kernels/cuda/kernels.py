"""Kernels for an NVIDIA GPU: cuDNN's convolutions, and one pass over memory between two of them.

A block of rows takes three launches: one moves the window down and puts the new rows through affine and SiLU, then
cuDNN convolves, and one adds bias and residual, puts an upsample's pixels in their places and gathers the block's
statistics, which are combined for many blocks at once (`moments`). Results stand in the arena, so that only cuDNN's own
workspace is allocated beside it.

Before the kernels are used in a precision, all of them are tried on the card (`self_test`). If they do not work there,
`TorchKernels` serve instead, and `note` says so. `TorchKernels` also compute what these kernels do not cover: float64,
and layers whose pixels are not a multiple of 16 bytes, such as the last one with its three channels. The order of a sum
may depend on the alignment of what is summed, and a block of rows of such a map may begin at any address.

TF32 is never used. cuDNN's sum is rounded once, and once more after bias and residual were added; diffusers rounds
after the bias as well.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F

from fluxvae.engine.calls import Call, Kind, aligned
from fluxvae.engine.kernels import AttentionBlock, ConvBlock, Refill
from fluxvae.engine.kernels.cuda import attention, folding, passes, self_test
from fluxvae.engine.kernels.cuda.attention import cut_for
from fluxvae.engine.kernels.cuda.moments import CardMoments, scale_and_shift
from fluxvae.engine.kernels.direct.costs import ROUNDING_BYTES, workspace_bound
from fluxvae.engine.kernels.direct.cudnn import convolve
from fluxvae.engine.kernels.direct.kernels import TorchKernels
from fluxvae.engine.records import Conv, Norm, Projections, parameters
from fluxvae.engine.statistics import Affine, FiniteChecks, Moments, PixelScale, Scaling

__all__ = ["CudaKernels"]


class CudaKernels(TorchKernels):
    """cuDNN and the Triton language. On a CPU only in that language's interpreter, for tests."""

    name = "cuda"

    def __init__(self, device: torch.device, *, unseen: bool = False) -> None:
        """``unseen`` makes kernels that are used without a self-test, for the self-test itself."""
        super().__init__(device)
        self._onednn = False  # as on a GPU, also where the interpreter stands for one
        self._working = {2: True, 4: True, 8: False} if unseen else {8: False}

    def _works(self, itemsize: int) -> bool:
        """Whether these kernels compute with values of so many bytes on this card."""
        if itemsize not in self._working:  # asked several times for each block
            fault = self_test.fault(self._device, itemsize, lambda: CudaKernels(self._device, unseen=True))
            self._working[itemsize] = not fault
        return self._working[itemsize]

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of the weights themselves."""
        return stored

    @property
    def note(self) -> str:
        """What was found not to work on this card and is done by PyTorch instead; usually nothing."""
        return self_test.note(self._device)

    def unfolds(self, itemsize: int) -> bool:
        """As `TorchKernels`; where these kernels work, cuDNN does."""
        return not self._works(itemsize) and super().unfolds(itemsize)

    def runtime_bytes(self, itemsize: int) -> int:
        """As `DirectCosts`, but without cuBLAS's workspace where cuDNN computes every product."""
        whole = super().runtime_bytes(itemsize)
        return min(whole, ROUNDING_BYTES) if self._works(itemsize) else whole

    # -- what the planner asks ---------------------------------------------------------------------------------

    def loaded(self, call: Call) -> int:
        """As `DirectCosts`, but with the projections in any case, since cuDNN wants them in its own layout."""
        if call.kind == "attend" and self._covers(call):
            return 4 * call.cin * call.cin * call.itemsize
        return super().loaded(call)

    def overhead(self, call: Call) -> int:
        """Bytes outside the arena: cuDNN's workspace, and PyTorch's results where it computes attention."""
        if not self._covers(call):
            return super().overhead(call)
        n, width, cin, cout, size = call.rows, call.width, call.cin, call.cout, call.itemsize
        if call.kind == "conv3":
            return workspace_bound((n + 2, width, cin), (cout, 3, 3), size)
        if call.kind == "down":
            return workspace_bound((n + 1, width + 1, cin), (cout, 3, 3), size)
        if call.kind == "up":
            return workspace_bound((n + 1, width, cin), (2 * cout, 2, 2), size)
        product = workspace_bound((n, width, cin), (cout, 1, 1), size)
        if call.kind == "linear" or cut_for(self._device, cin, size) is not None:
            return product
        return max(product, n * width * cin * (size + 4))  # PyTorch's result and its float32 accumulator

    def workspace(self, call: Call) -> int:
        """Bytes of the arena during one call: cuDNN's result, and what stands in for statistics nobody wants."""
        if not self._covers(call) or call.kind == "linear":
            return super().workspace(call)
        pixels = call.rows * call.width
        if call.kind == "up":
            result = call.rows * (call.width + 1) * 2 * call.cout * call.itemsize
            return aligned(result) + passes.parts_bytes(2 * pixels, call.cout, 2)
        if call.kind == "down":
            padded = aligned((call.rows + 1) * (call.width + 1) * call.cin * call.itemsize)
            pixels = call.out(call.rows) * call.out(call.width)
            return padded + aligned(pixels * call.cout * call.itemsize) + passes.parts_bytes(pixels, call.cout)
        results = (2 if call.kind == "attend" else 1) * aligned(pixels * call.cout * call.itemsize)
        return results + passes.parts_bytes(pixels, call.cout)

    def statistics(self, call: Call, blocks: int) -> tuple[int, int]:
        """What the programs of some blocks leave until they are combined, and the table of all blocks."""
        if not self._covers(call):
            return super().statistics(call, blocks)
        return (
            CardMoments.scratch_bytes(call.cout, blocks, *_phases(call)),
            CardMoments.table_bytes(call.cout, blocks),
        )

    # -- what the sweeps ask -----------------------------------------------------------------------------------

    def prepare(self) -> float:
        """Compile and try the kernels for half precision, which most decodes are in. Returns the seconds it took."""
        start = time.perf_counter()
        self._works(2)
        return time.perf_counter() - start

    def affine(self, moments: Moments, norm: Norm, dtype: torch.dtype, checks: FiniteChecks) -> Affine:
        """Compute `Moments.affine` in one launch instead of about thirty."""
        weight, bias = parameters(norm) if norm.learned else (None, None)
        if weight is None or bias is None or not isinstance(moments, CardMoments):
            return super().affine(moments, norm, dtype, checks)
        scale, shift, finite = scale_and_shift(moments, norm.groups, norm.eps, weight, bias)
        checks.note(finite, f"the input of {norm.name} holds NaN or Inf")
        return Affine(scale, shift)

    def moments(self, call: Call, blocks: int, room: torch.Tensor) -> Moments:
        """Statistics that are combined for many blocks at once, where these kernels compute the call."""
        if not self._covers(call):
            return super().moments(call, blocks, room)
        return CardMoments(call.cout, blocks, *_phases(call), room)

    def load(self, conv: Conv, kind: Kind, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """As `TorchKernels.load`; an upsample's kernels are summed in one launch each, and its bias is not doubled."""
        if kind != "up" or not self._covers_channels(conv.cout, dtype):
            return super().load(conv, kind, dtype, into)
        weight, bias = parameters(conv)
        shape = torch.Size((2 * conv.cout, conv.cin, 2, 2))
        kernels = [self._weight(half, shape, dtype) for half in into.chunk(2)]
        for phase, kernel in enumerate(kernels):
            folding.fold(weight, phase, kernel)
        return kernels, None if bias is None else bias.to(dtype)

    def prologue(
        self, rows: torch.Tensor, norm: Scaling | None, silu: bool, out: torch.Tensor, work: torch.Tensor
    ) -> None:
        """Norm and SiLU in one pass over memory, rounded once."""
        if norm is None or not self._works(out.itemsize):
            super().prologue(rows, norm, silu, out, work)
        else:
            passes.prologue(rows, norm.scale, norm.shift, silu, out, _least(norm))

    def refill(self, refill: Refill) -> None:
        """Halo, prologue and the zeros around the map in one launch, where the map's rows are to be read in place."""
        window, (start, stop) = refill.window, refill.fresh
        one = refill.source.views and (refill.first or len(window) > 3) and self._works(window.itemsize)
        if not one:
            super().refill(refill)
            return
        rows = refill.source.take(window[start:stop]) if stop > start else window[:0]
        norm = refill.norm
        scale, shift = (None, None) if norm is None else (norm.scale, norm.shift)
        passes.refill(window, refill.first, refill.fresh, refill.bottom, rows, scale, shift, _least(norm))

    def convolve(self, block: ConvBlock) -> None:
        """cuDNN convolves, then everything else is done in one pass over memory."""
        if not self._covers_channels(block.out.shape[-1], block.out.dtype):
            super().convolve(block)
            return
        if block.kind == "up":
            self._interleaved(block)
            return
        weight, bias = block.weights
        if block.kind == "linear":  # by cuDNN too: cuBLAS would ask the process whether TF32 is allowed
            convolve(block.rows, weight[:, :, None, None], block.out)
            if bias is not None:
                block.out.add_(bias)
            return
        rows, work, stride = block.rows, block.work, 1
        if block.kind == "down":
            count, width, channels = rows.shape
            padded, work = _carve(work, rows, (count - 1, width + 1, channels))
            padded[:, :width].copy_(rows[1:])
            padded[:, width:].zero_()
            rows, stride = padded, 2
        result, work = _carve(work, block.out)
        convolve(rows, weight, result, stride=stride)
        _finish(result, bias, block.residual, block.scale, block.out, block.statistics, work)

    def _interleaved(self, block: ConvBlock) -> None:
        """An upsample as `TorchKernels` has it; one pass puts both column phases of a row phase in their places."""
        kernels, bias = block.weights
        n, width, channels = block.rows.shape[0] - 2, block.rows.shape[1], block.out.shape[2]
        result, work = _carve(block.work, block.out, (n, width + 1, 2 * channels))
        pixels = 2 * n * width
        parts = _place(block.statistics, work)
        bias = _bias(bias, block.out)
        for phase, kernel in enumerate(kernels):
            convolve(block.rows[phase : phase + n + 1], kernel, result)
            passes.interleave(result, bias, phase, block.out, parts)
        _placed(block.statistics, pixels)

    def load_attention(self, projections: Projections, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """As `TorchKernels`, with the keys' projection transposed, as `TorchKernels.attend` explains."""
        weights = super().load_attention(projections, dtype, into)
        cin, cout = projections.q.cin, projections.q.cout
        if not self._covers_channels(cin, dtype):
            return weights
        copies = into[: 4 * cin**2 * dtype.itemsize].view(dtype).view(4, cout, cin)
        for copy, (weight, _), turned in zip(copies, weights, (False, True, False, False), strict=True):
            if copy.data_ptr() != weight.data_ptr():
                copy.copy_(weight.t() if turned else weight)
            elif turned:
                copy.copy_(weight.t().clone())
        return [(copy, bias) for copy, (_, bias) in zip(copies, weights, strict=True)]

    def attend(self, block: AttentionBlock) -> None:
        """Compute it as `TorchKernels.attend` does, within two results that stand in the arena."""
        layer, out = block.projections, block.out
        channels, dtype = out.shape[-1], out.dtype
        if not self._covers_channels(channels, dtype):
            super().attend(block)
            return
        (wq, bq), (wk, _), (wv, bv), (wo, bo) = [(weight[:, :, None, None], bias) for weight, bias in block.weights]
        first, work = _carve(block.work, out)
        second, work = _carve(work, out)
        convolve(block.queries, wq, first)
        if bq is not None:
            first.add_(bq)
        convolve(first, wk, second)
        flat, cut = second.view(-1, channels), cut_for(self._device, channels, dtype.itemsize)
        if cut is not None:
            attention.attention(flat, block.tokens, layer.softmax_scale, first.view(-1, channels), cut)
        else:
            tokens = block.tokens[None, None]
            mixed = F.scaled_dot_product_attention(flat[None, None], tokens, tokens, scale=layer.softmax_scale)
            first.view(-1, channels).copy_(mixed[0, 0])
        convolve(first, wv, second)
        if bv is not None:
            second.add_(bv)
        convolve(second, wo, first)
        _finish(first, bo, out if layer.residual else None, layer.scale, out, block.statistics, work)

    # -- what goes where ---------------------------------------------------------------------------------------

    def _covers(self, call: Call) -> bool:
        return call.cout * call.itemsize % 16 == 0 and self._works(call.itemsize)

    def _covers_channels(self, channels: int, dtype: torch.dtype) -> bool:
        return channels * dtype.itemsize % 16 == 0 and self._works(dtype.itemsize)


def _carve(
    work: torch.Tensor, out: torch.Tensor, shape: tuple[int, ...] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ``out``'s dtype, and of its shape unless one is given, from the workspace's start; and what is left."""
    shape = tuple(out.shape) if shape is None else shape
    nbytes = torch.Size(shape).numel() * out.dtype.itemsize
    return work[:nbytes].view(out.dtype).view(shape), work[aligned(nbytes) :]


def _least(norm: Scaling | None) -> float | None:
    """The least length of a pixel, where the norm is one of pixels."""
    return norm.eps if isinstance(norm, PixelScale) else None


def _bias(bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    return torch.zeros(out.shape[-1], dtype=out.dtype, device=out.device) if bias is None else bias


def _finish(
    result: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, scale: float, out: torch.Tensor,
    statistics: Moments | None, work: torch.Tensor,
) -> None:  # fmt: skip
    passes.finish(result, _bias(bias, out), residual, scale, out, _place(statistics, work))
    _placed(statistics, out.numel() // out.shape[-1])


def _place(statistics: Moments | None, work: torch.Tensor) -> torch.Tensor:
    """Where a pass leaves its statistics: in the workspace if nobody wants them."""
    if statistics is None:
        return work[: work.numel() // 4 * 4].view(torch.float32)
    assert isinstance(statistics, CardMoments)  # `CudaKernels.moments` made it for this very call
    return statistics.place()


def _placed(statistics: Moments | None, pixels: int) -> None:
    if isinstance(statistics, CardMoments):
        statistics.placed(pixels)


def _phases(call: Call) -> tuple[int, int]:
    """The pixels of one phase of a block of results, and how many phases there are."""
    pixels = call.out(call.rows) * call.out(call.width)
    return (pixels // 2, 2) if call.kind == "up" else (pixels, 1)
