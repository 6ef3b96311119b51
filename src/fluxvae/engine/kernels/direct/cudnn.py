"""cuDNN's convolution of a block of rows, with every setting that PyTorch keeps per process given explicitly.

``torch.backends.cudnn`` has one `allow_tf32`, `benchmark` and `deterministic` for all threads, and a pipeline in
another thread may want others. The operator behind `F.conv2d` takes them as arguments, so nothing is set and nothing
has to be restored: no TF32, no timing of algorithms (its winner changes from run to run), deterministic ones only.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
import torch.nn.functional as F

__all__ = ["available", "convolve", "workspace_bytes"]

_measuring = threading.Lock()


def available(device: torch.device) -> bool:
    """``device`` is an NVIDIA GPU and this PyTorch has cuDNN for it."""
    cudnn = torch.backends.cudnn
    return device.type == "cuda" and torch.version.cuda is not None and bool(cudnn.is_available())  # type: ignore[no-untyped-call]


def convolve(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Stride 1, zeros left and right of a kernel wider than one, none above and below; no bias.

    Args:
        rows: (n, W, cin) contiguous, CUDA (any device for tests of what is built on this).
        weight: (cout, cin, kh, kw), channels last.
        out: (n - kh + 1, W + 2 p - kw + 1, cout) contiguous, p = 1 for kw > 1, else 0; made where it is None.
    """
    padding = (0, int(weight.shape[3] > 1))
    image = _image(rows)
    if not available(rows.device):
        result = F.conv2d(image, weight, padding=padding).squeeze(0).permute(1, 2, 0)
        return result if out is None else out.copy_(result)
    settings = (padding, (1, 1), (1, 1), 1, False, True, False)  # groups, benchmark, deterministic, allow_tf32
    if out is None:
        made: torch.Tensor = torch.ops.aten.cudnn_convolution(image, weight, *settings)
        return made.squeeze(0).permute(1, 2, 0)
    torch.ops.aten.cudnn_convolution.out(image, weight, *settings, out=_image(out))
    return out


def workspace_bytes(
    device: torch.device, shape: tuple[int, int, int], kernel: tuple[int, int, int], itemsize: int
) -> int:
    """What cuDNN allocates during one `convolve`: measured with the real shapes, once per process.

    It depends on the algorithm that cuDNN picks, which only cuDNN knows. Measuring resets PyTorch's peak statistics
    of the device. ``shape``: (n, W, cin); ``kernel``: (cout, kh, kw). 0 where the convolution is not cuDNN's, and
    where there is no memory to measure in now (a decode will then run out of it, and be planned anew).
    """
    if not available(device):
        return 0
    dtypes = {2: (torch.bfloat16, torch.float16), 4: (torch.float32,), 8: (torch.float64,)}[itemsize]
    try:
        return max(_measured(device, shape, kernel, dtype) for dtype in dtypes)
    except torch.OutOfMemoryError:
        return 0


@lru_cache(maxsize=4096)
def _measured(
    device: torch.device, shape: tuple[int, int, int], kernel: tuple[int, int, int], dtype: torch.dtype
) -> int:
    n, width, cin = shape
    cout, height, across = kernel
    with _measuring, torch.no_grad():
        rows = torch.zeros(shape, dtype=dtype, device=device)
        weight = torch.zeros((cout, height, across, cin), dtype=dtype, device=device).permute(0, 3, 1, 2)
        wide = width + 2 * int(across > 1) - across + 1
        out = torch.empty((n - height + 1, wide, cout), dtype=dtype, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        convolve(rows, weight, out)
        return torch.cuda.max_memory_allocated(device) - before


def _image(rows: torch.Tensor) -> torch.Tensor:
    """(n, W, C) rows as the (1, C, n, W) channels-last image they already are.

    In this order of operations: the stride of the batch decides whether PyTorch sees channels last.
    """
    return rows.unsqueeze(0).permute(0, 3, 1, 2)
