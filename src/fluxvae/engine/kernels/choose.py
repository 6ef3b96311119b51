"""Which kernel set serves on a device, and why a faster one does not. Importing this module does not import PyTorch."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

from fluxvae.engine.kernels import Kernels
from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:
    import torch

__all__ = ["KERNELS", "instead_of", "make_kernels", "no_cuda", "no_winograd"]

KERNELS = ("auto", "torch", "winograd", "cuda")
"""The values that the ``kernels`` option takes."""
_log = logging.getLogger(__name__)
_IN_WORDS = {"winograd": "Winograd", "cuda": "the CUDA kernels"}


def make_kernels(name: str, device: torch.device) -> Kernels:
    """The kernel set called ``name``; ``"auto"`` is the fastest that runs on ``device``."""
    from fluxvae.engine.kernels.direct.kernels import TorchKernels

    if name not in KERNELS:
        raise InvalidOptionError(f"kernels: got {name!r}, expected {', '.join(map(repr, KERNELS))}")
    asked = name != "auto"
    if not asked:
        name = "winograd" if device.type == "cpu" else "cuda"
    if name == "torch":
        return TorchKernels(device)
    reason = no_winograd(device) if name == "winograd" else no_cuda(device)
    if reason is not None:
        if asked:
            raise InvalidOptionError(f"kernels: got {name!r}, but {reason}; use 'auto' or 'torch'")
        instead = instead_of(name, reason)
        if device.type == "cuda":
            _tell(instead)
        return TorchKernels(device, instead=instead)
    if name == "winograd":
        from fluxvae.engine.kernels.cpu.kernels import WinogradKernels

        return WinogradKernels(device)
    from fluxvae.engine.kernels.cuda.kernels import CudaKernels

    return CudaKernels(device)


@lru_cache
def _tell(instead: str) -> None:
    """Log once in a process what plans say too: whoever installs the engine in a pipeline does not see a plan."""
    _log.warning("%s", instead)


def instead_of(name: str, reason: str) -> str:
    """What a plan says where PyTorch's kernels serve because the faster ones of this name do not run."""
    return f"{_IN_WORDS[name]} would be faster, but {reason}"


def no_winograd(device: torch.device | str) -> str | None:
    """Why the Winograd kernels do not run on ``device``; None where they do."""
    if str(device) != "cpu":
        return f"those kernels are for a CPU, not {device}"
    try:
        from fluxvae.engine.kernels.cpu.vector_code import supported
    except ImportError as error:  # Numba has no build for this machine
        return f"Numba cannot be imported here ({error})"
    return supported()


def no_cuda(device: torch.device) -> str | None:
    """Why the CUDA kernels do not run on ``device``; None where they do."""
    import torch

    from fluxvae.engine.kernels.direct.cudnn import available

    if device.type != "cuda":
        return f"those kernels are for an NVIDIA GPU, not {device}"
    if not torch.cuda.is_available() or not available(device):
        return "this PyTorch sees no NVIDIA GPU, or has no cuDNN"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"this card's compute capability is {major}.{minor}, and they need 8.0 (Ampere) or later"
    try:
        import triton  # noqa: F401
    except ImportError as error:  # PyTorch brings it on Linux only
        return f"the Triton language cannot be imported here ({error})"
    return None
