"""What is known of devices: which of them the exact engine computes on, and which dtypes they have arithmetic for.

Every default that depends on a device is decided here, so that the library, the command line, the jobs and the server
cannot differ in it.
"""

from __future__ import annotations

import torch

__all__ = ["EXACT", "computes_directly", "is_amd", "no_bfloat16", "usual_dtype"]

EXACT = ("cpu", "cuda")
"""The types of device that the exact engine computes on. PyTorch calls AMD's GPUs ``cuda`` too. On others, such as
``mps`` and ``xpu``, its float64, its memory and its convolutions are not known to be what the engine needs."""

_ONEDNN_HAS = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}


def is_amd(device: torch.device) -> bool:
    """Whether ``device`` is a GPU of AMD's, for which PyTorch was built with ROCm."""
    return device.type == "cuda" and torch.version.hip is not None


def no_bfloat16(device: torch.device) -> str | None:
    """Why ``device`` is an NVIDIA GPU without arithmetic for bfloat16, in words; None for all others.

    cuDNN has no bfloat16 convolution below compute capability 8.0 (Volta and Turing). PyTorch's own unfolds the map to
    nine times its size there, and its products are emulated.
    """
    if device.type != "cuda" or is_amd(device) or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"this card's compute capability is {major}.{minor}, and bfloat16 needs 8.0 or later"


def computes_directly(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has arithmetic for this dtype, so that PyTorch's convolutions are fast in it.

    On a CPU, float16 needs AVX512-FP16 or AMX, and bfloat16 AVX-512; without them, a convolution takes over a hundred
    times as long. On a GPU, see `no_bfloat16`.
    """
    if dtype == torch.bfloat16 and no_bfloat16(device) is not None:
        return False
    if device.type != "cpu" or dtype not in _ONEDNN_HAS:
        return True
    supported = getattr(torch.ops.mkldnn, _ONEDNN_HAS[dtype], None)
    return supported is not None and bool(supported())


def usual_dtype(device: torch.device) -> torch.dtype:
    """The dtype that ``dtype="auto"`` stands for: bfloat16 on NVIDIA GPUs that have arithmetic for it, else float32.

    It is never float16: FLUX's VAE overflows in it for some latents (InvokeAI's issue 7208). Such a decode is done
    again in float32, so both its time and its last bits would depend on the picture. On AMD's GPUs bfloat16 works, but
    ComfyUI found large convolutions in it far slower than in float32 (``vae_dtype`` in its ``model_management.py``).
    ComfyUI decodes in float32 wherever this says float32.
    """
    if device.type == "cuda" and not is_amd(device) and no_bfloat16(device) is None:
        return torch.bfloat16
    return torch.float32
