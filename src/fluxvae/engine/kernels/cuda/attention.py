"""Exact attention of one wide head in the Triton language: softmax online, the scores never stored.

PyTorch's fused kernels for tensor cores stop at a head dimension of 256, the VAE's is 512; what
`F.scaled_dot_product_attention` picks beyond that keeps its accumulator in memory. Here keys and values are the same
rows (see `TorchKernels.attend`), so a block of them is loaded once for both products, and 64 queries' accumulators
stay in registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

__all__ = ["attention"]


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


CUTS = {2: ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1)), 4: ((16, 16, 4, 1),)}
"""By item size: queries and tokens of a block, warps, stages; the first that a card has room for. With a head of 512 in
half precision they take 197, 131 and 98 kB of shared memory (H100: 228, A100: 164, RTX 4090: 100), the first two
without spilled registers on an H100."""


def attention(
    queries: torch.Tensor, tokens: torch.Tensor, scale: float, out: torch.Tensor, cut: tuple[int, int, int, int]
) -> None:
    """``out = softmax(queries @ tokens.T * scale) @ tokens``, sums in float32, float32 without TF32.

    queries, out: (n, D) contiguous and distinct; tokens: (N, D) contiguous, of the same dtype; cut: one of `CUTS`.
    """
    rows, columns, warps, stages = cut
    count, dim = queries.shape
    _attention[(triton.cdiv(count, rows),)](
        queries, tokens, out, count, len(tokens), scale * math.log2(math.e),
        DIM=dim, QUERIES=rows, TOKENS=columns, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        WIDE=not queries.is_cuda, num_warps=warps, num_stages=stages,
    )  # fmt: skip
