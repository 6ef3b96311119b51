"""Kernels for an NVIDIA GPU: cuDNN's convolutions, and passes and attention in the Triton language."""

__all__ = ["CONTRACTION"]

CONTRACTION = {"enable_fp_fusion": True}
"""An option of every launch in the Triton language: a product and the sum that it goes into become one operation, which
rounds once. The language does so by default until 3.9, and announces that it will not from 3.10 on; without the option
a kernel's last bits would depend on its version."""
