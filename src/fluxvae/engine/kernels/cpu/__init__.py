"""Kernels for a CPU in float32: Winograd's convolution, attention and passes over rows, compiled by Numba."""
