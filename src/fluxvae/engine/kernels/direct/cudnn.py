"""cuDNN's convolution of a block of rows, for the CUDA kernels: it writes its result where it is told to.

Every setting that PyTorch keeps per process is given explicitly.

``torch.backends.cudnn`` has one `allow_tf32`, `benchmark` and `deterministic` for all threads, and a pipeline in
another thread may want others. The operator behind `F.conv2d` takes them as arguments, so nothing is set and nothing
has to be restored. It never uses TF32, takes deterministic algorithms only, and does not choose them by timing, because
the fastest one changes from run to run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["available", "convolve"]


def available(device: torch.device) -> bool:
    """``device`` is an NVIDIA GPU and this PyTorch has cuDNN for it."""
    cudnn = torch.backends.cudnn
    return device.type == "cuda" and torch.version.cuda is not None and bool(cudnn.is_available())  # type: ignore[no-untyped-call]


def convolve(
    rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None, *, stride: int = 1
) -> torch.Tensor:
    """Convolve without bias. With stride 1 a 3x3 kernel sees zeros left and right of the rows, none above or below.

    Args:
        rows: (n, W, cin) contiguous, CUDA (any device for tests of what is built on this).
        weight: (cout, cin, kh, kw), channels last.
        out: (n - kh + 1, W + 2 p - kw + 1, cout) contiguous, p = 1 for kw > 1, else 0; made where it is None. With a
            larger stride p is 0, and both sizes are divided by it and rounded up.
        stride: in both directions.
    """
    padding = (0, int(weight.shape[3] > 1 and stride == 1))
    image = _image(rows)
    if not available(rows.device):
        result = F.conv2d(image, weight, None, stride, padding).squeeze(0).permute(1, 2, 0)
        return result if out is None else out.copy_(result)
    # What follows is groups, benchmark, deterministic and allow_tf32.
    settings = (padding, (stride, stride), (1, 1), 1, False, True, False)
    if out is None:
        made: torch.Tensor = torch.ops.aten.cudnn_convolution(image, weight, *settings)
        return made.squeeze(0).permute(1, 2, 0)
    torch.ops.aten.cudnn_convolution.out(image, weight, *settings, out=_image(out))
    return out


def _image(rows: torch.Tensor) -> torch.Tensor:
    """(n, W, C) rows as the (1, C, n, W) channels-last image they already are.

    In this order of operations: the stride of the batch decides whether PyTorch sees channels last.
    """
    return rows.unsqueeze(0).permute(0, 3, 1, 2)
