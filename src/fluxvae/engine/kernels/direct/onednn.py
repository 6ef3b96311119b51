"""oneDNN's convolution of a block on a CPU: what it has code for, and the memory that it leaves behind."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fluxvae.engine.memory.heap import trim_heap

__all__ = ["computes_directly", "convolve"]

HEAP_BYTES = 1 << 20
"""A convolution of more than this, weights included, has the heap trimmed first, on a CPU. PyTorch asks for aligned
memory, and glibc (before 2.38) often cannot put an aligned block where one of the same size was freed: what one call
took stayed resident beside what the next took, 13 MB at the most. Costs 22 % of a decode's time, 10 % in bfloat16."""

_ONEDNN_HAS = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}


def computes_directly(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch convolves this dtype there in its fast way: all but what oneDNN has no code for on this CPU.

    float16 needs AVX512-FP16 or AMX, bfloat16 AVX-512. Without, a convolution takes over a hundred times as long.
    """
    if device.type != "cpu" or dtype not in _ONEDNN_HAS:
        return True
    supported = getattr(torch.ops.mkldnn, _ONEDNN_HAS[dtype], None)
    return supported is not None and bool(supported())


def convolve(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Stride 1, zeros left and right, none above and below.

    Args:
        image: (1, cin, n, W), any memory format; float32 in the weight's.
        weight: (cout, cin, kh, kw).
    """
    if image.nbytes + weight.nbytes > HEAP_BYTES:
        trim_heap()
    if image.dtype != torch.float32:
        return F.conv2d(image, weight, bias, padding=(0, 1))
    # F.conv2d leaves oneDNN for small blocks when there is one thread: the same image would change its last bits.
    blocked: torch.Tensor = torch.mkldnn_convolution(image, weight, bias, (0, 1), (1, 1), (1, 1), 1)
    return blocked
