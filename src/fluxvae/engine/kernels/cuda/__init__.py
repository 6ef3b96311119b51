"""Kernels for an NVIDIA GPU: cuDNN's convolutions, and passes and attention in the Triton language."""
