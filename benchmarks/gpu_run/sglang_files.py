"""The files of SGLang's wheel that its decoder path consists of. Imports only the standard library."""

from __future__ import annotations

__all__ = ["FILES", "GATE", "KERNELS", "OPERATIONS", "OPTIMIZATIONS"]

_VAES = "sglang.multimodal_gen.runtime.models.vaes"
OPERATIONS = "sglang.kernels.ops.diffusion"
"""The package whose names the path imports its kernels by."""
OPTIMIZATIONS = f"{_VAES}.flux2_vae_cuda_opt"
GATE = f"{_VAES}.fast_path_gate"
KERNELS = f"{OPERATIONS}.norm.group_norm_silu_twopass_triton"
FILES = tuple(f"{name.replace('.', '/')}.py" for name in (OPTIMIZATIONS, f"{_VAES}.conv_fold", GATE, KERNELS))
"""Their paths in the wheel."""
