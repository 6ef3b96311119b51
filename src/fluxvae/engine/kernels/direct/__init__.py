"""Kernels made of PyTorch's own operations, for any device and dtype."""
