"""The decoder's last layer: a 3x3 convolution from many channels to three, float32, channels last.

Three outputs fill neither a panel of the Winograd kernels nor a vector of a direct convolution, so here the vectors lie
along the input channels: each output is a vector of partial sums over the nine taps, added up at the end. It reads the
map where it lies; PyTorch's copies it to channels first and leaves most of every vector empty.

Compiled by Numba, without the GIL. Addresses and strides are in bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]

from fluxvae.engine.kernels.cpu import threads
from fluxvae.engine.kernels.cpu.counters import fetch_add
from fluxvae.engine.kernels.cpu.vector_code import (
    F32,
    LANES,
    REGISTERS,
    VECTOR_BYTES,
    Code,
    compiled,
    vector_function,
)

if TYPE_CHECKING:
    import torch

__all__ = ["OUTPUTS", "FewJob", "FewWeights", "few_outputs", "few_outputs_rows", "few_outputs_weights"]

VECTOR_CODE = "35ab4ff49856a543"
"""The digest of the files that this one calls, for the reason that `winograd_tasks.VECTOR_CODE` gives."""
OUTPUTS = 3
PIXELS = 6 if REGISTERS == 32 else 3
"""How many pixels are computed at once. Each weight that is loaded serves all of their 18 (or 9) accumulators."""


def _pixels(count: int) -> Any:
    """``f(src, row, pixel, weights, row_weights, vectors, bias, dst)``: ``count`` neighbours, three outputs each.

    Of each of three rows, ``row`` bytes apart, ``vectors`` vectors are read from ``src`` on: the channels of the taps'
    pixels, which lie side by side. The next output reads ``pixel`` bytes further. ``weights``: for every vector one for
    each output, from the first tap that is read; ``row_weights`` bytes to those of the next row.
    """

    def emit(
        x: Code, src: ir.Value, row: ir.Value, pixel: ir.Value, weights: ir.Value, row_weights: ir.Value,
        vectors: ir.Value, bias: ir.Value, dst: ir.Value,
    ) -> None:  # fmt: skip
        sums = x.locals(count * OUTPUTS)
        for slot in sums:
            x.b.store(x.const(0.0), slot)
        starts = [x.b.mul(pixel, x.i(p)) for p in range(count)]

        def taps(index: ir.Value) -> None:
            top, kernel = x.at(src, x.b.mul(index, row)), x.at(weights, x.b.mul(index, row_weights))

            def channels(vector: ir.Value) -> None:
                left = x.at(top, x.b.mul(vector, x.i(VECTOR_BYTES)))
                own = x.at(kernel, x.b.mul(vector, x.i(OUTPUTS * VECTOR_BYTES)))
                factors = [x.load(x.at(own, o * VECTOR_BYTES)) for o in range(OUTPUTS)]
                for p, start in enumerate(starts):
                    value = x.load(x.at(left, start))
                    for o, factor in enumerate(factors):
                        slot = sums[OUTPUTS * p + o]
                        x.b.store(x.fma(value, factor, x.b.load(slot)), slot)

            x.loop(vectors, channels)

        x.loop(x.i(3), taps)
        for k, slot in enumerate(sums):
            total = x.b.fadd(x.added(x.b.load(slot)), x.load(x.at(bias, k % OUTPUTS * 4), F32))
            x.store(total, x.at(dst, k * 4))

    return vector_function(f"fluxvae_few_outputs_{count}", 8, emit)


_several, _one = _pixels(PIXELS), _pixels(1)


class FewJob(NamedTuple):
    """One call: padded rows (rows + 2, width, cin) to (rows, width, OUTPUTS); beyond the columns, zeros."""

    src: int
    dst: int
    weights: int
    """The address of the weights, (3, 3, cin / LANES, OUTPUTS, LANES) float32."""
    bias: int
    rows: int
    width: int
    cin: int


@compiled
def few_outputs_rows(job: FewJob, counter: Any) -> None:
    """Compute rows, taken from the counter one by one until none is left."""
    pixel = job.cin * 4
    row, blocks, tap = job.width * pixel, job.cin // LANES, pixel * OUTPUTS
    while True:
        y = fetch_add(counter.ctypes.data, 1)
        if y >= job.rows:
            return
        src, dst = job.src + y * row, job.dst + y * job.width * OUTPUTS * 4
        x = 0
        while x < job.width:
            first, last = max(x - 1, 0), min(x + 1, job.width - 1)
            at, weights = src + first * pixel, job.weights + (first - x + 1) * tap
            if first == x - 1 and x + PIXELS < job.width:
                _several(at, row, pixel, weights, 3 * tap, 3 * blocks, job.bias, dst + x * OUTPUTS * 4)
                x += PIXELS
            else:
                _one(at, row, pixel, weights, 3 * tap, (last - first + 1) * blocks, job.bias, dst + x * OUTPUTS * 4)
                x += 1


class FewWeights(NamedTuple):
    """The last layer's weights, laid out for `few_outputs`."""

    laid: torch.Tensor
    bias: torch.Tensor
    """The bias, (OUTPUTS,) float32."""
    cin: int


def few_outputs_weights(weight: torch.Tensor, bias: torch.Tensor | None, into: torch.Tensor) -> FewWeights:
    """(OUTPUTS, cin, 3, 3) as `FewJob.weights` has them; ``into``: flat uint8, 4 bytes for each or more."""
    import torch  # here, because a plan asks this module for sizes without it

    cin = weight.shape[1]
    laid = into[: weight.numel() * 4].view(torch.float32).view(3, 3, cin // LANES, OUTPUTS, LANES)
    laid.copy_(weight.reshape(OUTPUTS, cin // LANES, LANES, 3, 3).permute(3, 4, 1, 0, 2))
    if bias is None:
        bias = torch.zeros(OUTPUTS, dtype=torch.float32, device=weight.device)
    return FewWeights(laid, bias.float(), cin)


def few_outputs(padded: torch.Tensor, weights: FewWeights, out: torch.Tensor) -> None:
    """(n + 2, W, cin) with its border rows to ``out`` (n, W, OUTPUTS), both contiguous float32."""
    job = FewJob(
        src=padded.data_ptr(), dst=out.data_ptr(), weights=weights.laid.data_ptr(), bias=weights.bias.data_ptr(),
        rows=padded.shape[0] - 2, width=padded.shape[1], cin=weights.cin,
    )  # fmt: skip
    threads.share(few_outputs_rows, job, job.rows)
