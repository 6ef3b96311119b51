"""Which kernel set serves on a device, and why a faster one does not. Importing this module does not import PyTorch."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

from fluxvae.engine.kernels import Kernels
from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:
    import torch

__all__ = ["KERNELS", "check_kernels", "instead_of", "make_kernels", "no_cuda", "no_winograd"]

KERNELS = ("auto", "torch", "winograd", "cuda")
"""The values that the ``kernels`` option takes."""
_log = logging.getLogger(__name__)
_IN_WORDS = {"winograd": "Winograd", "cuda": "the CUDA kernels"}


def check_kernels(name: str) -> None:
    """Refuse kernels that no device of this machine runs. The model may still move from one to another.

    Raises:
        InvalidOptionError: the name is unknown, or the reason why they run nowhere.
    """
    import torch

    if name not in KERNELS:
        raise InvalidOptionError(f"kernels: got {name!r}, expected {', '.join(map(repr, KERNELS))}")
    places = [torch.device("cpu")]
    if name == "cuda" and torch.cuda.is_available():
        places = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    reasons = [_why_not(name, device) for device in places]
    if name != "auto" and None not in reasons:
        raise InvalidOptionError(f"kernels: got {name!r}, but {reasons[0]}; use 'auto' or 'torch'")


def make_kernels(name: str, device: torch.device) -> Kernels:
    """The kernel set called ``name``; ``"auto"`` is the fastest that runs on ``device``.

    Raises:
        InvalidOptionError: the name is unknown, or the kernels do not run there.
    """
    from fluxvae.devices import is_amd
    from fluxvae.engine.kernels.direct.kernels import TorchKernels

    if name not in KERNELS:
        raise InvalidOptionError(f"kernels: got {name!r}, expected {', '.join(map(repr, KERNELS))}")
    asked = name != "auto"
    if not asked:
        name = "winograd" if device.type == "cpu" else "torch" if is_amd(device) else "cuda"
    if name == "torch":
        return TorchKernels(device)
    reason = _why_not(name, device)
    if reason is not None:
        if asked:
            raise InvalidOptionError(f"kernels: got {name!r}, but {reason}; use 'auto' or 'torch'")
        kernels = TorchKernels(device, instead=instead_of(name, reason))
        if device.type == "cuda":
            _tell(kernels.note)
        return kernels
    if name == "winograd":
        from fluxvae.engine.kernels.cpu.kernels import WinogradKernels

        return WinogradKernels(device)
    from fluxvae.engine.kernels.cuda.kernels import CudaKernels

    return CudaKernels(device)


def _why_not(name: str, device: torch.device) -> str | None:
    """Why the kernels of this name do not run on ``device``; None where they do."""
    if name == "winograd":
        return no_winograd(device)
    return no_cuda(device) if name == "cuda" else None


@lru_cache
def _tell(note: str) -> None:
    """Log once in a process what plans say too: whoever installs the engine in a pipeline does not see a plan."""
    _log.warning("%s", note)


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

    from fluxvae.devices import is_amd
    from fluxvae.engine.kernels.direct.gpu import library_missing

    if device.type != "cuda":
        return f"those kernels are for an NVIDIA GPU, not {device}"
    if is_amd(device):
        return f"those kernels are for an NVIDIA GPU, and {device} is one of AMD's"
    if not torch.cuda.is_available():
        return "this PyTorch sees no NVIDIA GPU"
    if (missing := library_missing()) is not None:
        return missing
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"this card's compute capability is {major}.{minor}, and they need 8.0 (Ampere) or later"
    try:
        import triton  # noqa: F401
    except ImportError as error:  # PyTorch brings it on Linux only
        return f"the Triton language cannot be imported here ({error})"
    return None
