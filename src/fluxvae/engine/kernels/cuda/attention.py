"""Exact attention of one wide head in the Triton language. The softmax is computed online, and scores are never stored.

PyTorch's fused kernels for tensor cores stop at a head dimension of 256, and the VAE's is 512. What
`F.scaled_dot_product_attention` picks beyond that keeps its accumulator in memory. Here keys and values are the same
rows (`TorchKernels.attend` says why), so a block of them is loaded once for both products, and the accumulators of 64
queries stay in registers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fluxvae.engine.kernels.cuda import CONTRACTION

__all__ = ["CUTS", "LARGEST_HEAD", "PYTORCH_HEAD", "SMALLEST", "Cut", "attention", "cut_for", "family_of"]


@triton.jit(do_not_specialize=["queries", "tokens"])
def _attention(
    query, token, dst, queries, tokens, factor,
    DIM: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``factor``: the softmax's scale times log2(e). ``WIDE``: multiply in float32, for the interpreter's bfloat16."""
    row = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    feature = tl.arange(0, BLOCK_D)
    inside = feature[None, :] < DIM
    q = tl.load(query + row[:, None] * DIM + feature[None, :], mask=(row[:, None] < queries) & inside, other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for start in range(0, tokens, TOKENS):
        at = start + tl.arange(0, TOKENS)
        k = tl.load(
            token + at.to(tl.int64)[:, None] * DIM + feature[None, :], mask=(at[:, None] < tokens) & inside, other=0.0
        )
        if WIDE:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        scores = tl.where(at[None, :] < tokens, scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - highest)
        weights = tl.exp2(scores - highest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(k.dtype), k, sums * shrink[:, None], input_precision="ieee")
        top = highest
    mixed = (sums / total[:, None]).to(dst.dtype.element_ty)
    tl.store(dst + row[:, None] * DIM + feature[None, :], mixed, mask=(row[:, None] < queries) & inside)


class Cut(NamedTuple):
    """How the work is cut into programs."""

    queries: int
    """Queries of one program."""
    tokens: int
    """Tokens that it reads at a time."""
    warps: int
    stages: int
    """Blocks of tokens that are on their way at once."""


CUTS = {
    Cut(64, 64, 8, 2): {8: 139264, 9: 196608, 10: 262688},
    Cut(64, 32, 8, 2): {8: 102400, 9: 131072, 10: 164384},
    Cut(64, 16, 8, 3): {8: 100352, 9: 114688, 10: 131616},
    Cut(32, 32, 8, 2): {8: 67584, 9: 67584, 10: 67584},
}
"""The cuts for half precision, the fastest first, with the bytes of shared memory that a head of `LARGEST_HEAD` takes
in each. The compiler needs more of it on Hopper (9) and on data-centre Blackwell (10) than on all other cards (8). The
numbers are the compiler's own; a test compiles every cut for every kind of card and compares."""

SMALLEST = Cut(16, 16, 4, 1)
"""What fits everywhere: for float32 in benchmarks, and for the Triton language's interpreter."""

PYTORCH_HEAD = 256
"""The largest head dimension for which PyTorch has attention kernels on tensor cores."""
LARGEST_HEAD = 512


def family_of(major: int) -> int:
    """The key in `CUTS` of a card whose compute capability begins with ``major``."""
    return {9: 9, 10: 10, 11: 10}.get(major, 8)


def cut_for(device: torch.device, dim: int, itemsize: int) -> Cut | None:
    """How attention is cut on a card; None: PyTorch's own is used.

    It is a rule and not a race, so that an image's bits do not depend on the day: ours serves half precision with heads
    that PyTorch has no kernel on tensor cores for (benchmarks/gpu.py measures both), in the first cut for which the
    card has enough shared memory.
    """
    if itemsize != 2 or not PYTORCH_HEAD < dim <= LARGEST_HEAD:
        return None
    if device.type != "cuda":
        return SMALLEST
    card: Any = torch.cuda.get_device_properties(device)  # its type does not know all that it has
    family, room = family_of(card.major), card.shared_memory_per_block_optin
    return next((cut for cut, needed in CUTS.items() if needed[family] <= room), None)


def attention(queries: torch.Tensor, tokens: torch.Tensor, scale: float, out: torch.Tensor, cut: Cut) -> None:
    """``out = softmax(queries @ tokens.T * scale) @ tokens``, sums in float32, float32 without TF32.

    Args:
        queries, out: (n, D), contiguous and distinct.
        tokens: (N, D), contiguous, of the same dtype.
    """
    count, dim = queries.shape
    _attention[(triton.cdiv(count, cut.queries),)](
        queries, tokens, out, count, len(tokens), scale * math.log2(math.e),
        DIM=dim, QUERIES=cut.queries, TOKENS=cut.tokens, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        WIDE=not queries.is_cuda, num_warps=cut.warps, num_stages=cut.stages, **CONTRACTION,
    )  # fmt: skip
