"""oneDNN's convolution of a block on a CPU, and the memory that it leaves behind."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fluxvae.engine.memory.heap import trim_heap

__all__ = ["convolve"]

HEAP_BYTES = 1 << 20
"""Before a convolution on a CPU that takes more bytes than this, weights and result included, the heap is trimmed.
PyTorch asks for aligned memory, and glibc before 2.38 often cannot put an aligned block where one of the same size was
freed. What one call took then stayed resident beside what the next one took, 13 MB at the most. Trimming takes 22 % of
a decode's time, and 10 % in bfloat16."""


def convolve(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, stride: int = 1) -> torch.Tensor:
    """Convolve with zeros left and right of the rows and none above or below; with a larger stride, without any.

    Args:
        image: (1, cin, n, W), any memory format; float32 in the weight's.
        weight: (cout, cin, kh, kw).
        stride: in both directions.
    """
    across = int(stride == 1)
    made = image.nbytes // weight.shape[1] * weight.shape[0] // stride**2
    if image.nbytes + weight.nbytes + made > HEAP_BYTES:
        trim_heap()
    if image.dtype != torch.float32:
        return F.conv2d(image, weight, bias, stride, (0, across))
    # With one thread, F.conv2d does not use oneDNN for small blocks, which would change the image's last bits.
    blocked: torch.Tensor = torch.mkldnn_convolution(image, weight, bias, (0, across), (stride, stride), (1, 1), 1)
    return blocked
