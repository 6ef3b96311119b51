"""The arithmetic behind the sweeps: one small interface, so that a sweep does not know who computes.

A kernel set is told about blocks of rows, (rows, width, channels), channels last, each laid out afresh in scratch, and
gives blocks back. It may fuse what it likes: GroupNorm's affine and SiLU either in `Kernels.prologue` (applied to
every row once, when the row enters the scratch) or inside `Kernels.conv3x3` (then ``prologue`` only copies).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from fluxvae.engine.plan import Costs
from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:
    import torch

    from fluxvae.engine.norm import Affine, FiniteChecks, Moments, Partial
    from fluxvae.engine.records import Attention, Conv, Norm

__all__ = ["KERNELS", "Kernels", "make_kernels"]

KERNELS = ("auto", "torch", "winograd", "cuda")
_IN_WORDS = {"winograd": "Winograd", "cuda": "the CUDA kernels"}


class Kernels(Costs, Protocol):
    """What a sweep asks for. The same call with the same values must give the same bits, whatever came before.

    ``work`` is a flat uint8 scratch of at least `Costs.workspace` bytes, aligned to 256, with arbitrary contents.
    """

    channels_last: bool
    """The model's weights are in channels-last memory format; the engine sets it before anything else."""

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """What a model whose weights are ``stored`` so is computed in."""

    def prepare(self) -> float:
        """Compile, or load from a cache, what is not ready in this process yet; seconds it took."""

    def session(self) -> AbstractContextManager[None]:
        """Around a whole decode: what the kernels need of the process's threads meanwhile."""

    def affine(self, moments: Moments, norm: Norm, dtype: torch.dtype, checks: FiniteChecks) -> Affine:
        """What ``norm`` amounts to on the map whose statistics ``moments`` has: `Moments.affine`, or as good."""

    def load(self, conv: Conv, kind: str, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """The weights of ``conv`` as the calls of ``kind`` want them, in ``dtype``.

        ``into``: flat uint8 scratch of `Costs.loaded` bytes that lives as long as the weights are used.
        """

    def prologue(
        self, rows: torch.Tensor, affine: Affine | None, silu: bool, out: torch.Tensor, work: torch.Tensor
    ) -> None:
        """Bring raw rows (n, W, C) into a convolution's input: ``out = silu(rows * scale + shift)``.

        ``rows`` may be ``out`` itself. Without an affine: a copy.
        """

    def conv3x3(
        self,
        padded: torch.Tensor,
        weights: Any,
        affine: Affine | None,
        pad_rows: tuple[bool, bool],
        out: torch.Tensor,
        residual: torch.Tensor | None,
        scale: float,
        statistics: bool,
        work: torch.Tensor,
    ) -> Partial | None:
        """``out = (conv(padded) + bias + residual) / scale``, and the statistics of ``out``.

        ``padded`` (n+2, W, cin) has been through `prologue` with this affine; its first or last row is the image's
        zero padding where ``pad_rows`` says so (already zero). ``out`` (n, W, cout) may be ``residual`` itself.
        """

    def upsample(
        self, padded: torch.Tensor, weights: Any, out: torch.Tensor, statistics: bool, work: torch.Tensor
    ) -> Partial | None:
        """Nearest 2x enlargement and 3x3 convolution: (n+2, W, C) with its border rows to ``out`` (2n, 2W, C)."""

    def linear(self, rows: torch.Tensor, weights: Any, out: torch.Tensor) -> None:
        """A 1x1 convolution: (n, W, cin) to ``out`` (n, W, cout), both contiguous scratch."""

    def attend(
        self,
        layer: Attention,
        weights: Any,
        queries: torch.Tensor,
        normed: torch.Tensor,
        out: torch.Tensor,
        statistics: bool,
        work: torch.Tensor,
    ) -> Partial | None:
        """Attention for some pixels, added to ``out`` in place: ``out = (attention + out) / scale``.

        ``normed`` (tokens, C) is the normalised map, ``queries`` (n, W, C) rows of it, ``out`` (n, W, C) the input's.
        """

    def load_attention(self, layer: Attention, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """The four projections, for `attend`; ``into`` as for `load`."""


def make_kernels(name: str, device: torch.device) -> Kernels:
    """The kernel set called ``name``; ``"auto"`` is the fastest that runs on ``device``."""
    from fluxvae.engine.kernels.torch import TorchKernels

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
        return TorchKernels(device, instead=instead_of(name, reason))
    if name == "winograd":
        from fluxvae.engine.kernels.winograd import WinogradKernels

        return WinogradKernels(device)
    from fluxvae.engine.kernels.cuda import CudaKernels

    return CudaKernels(device)


def instead_of(name: str, reason: str) -> str:
    """What a plan says where PyTorch's kernels serve because the faster ones of this name do not run."""
    return f"{_IN_WORDS[name]} would be faster, but {reason}"


def no_winograd(device: torch.device | str) -> str | None:
    """Why the Winograd kernels do not run on ``device``; None where they do."""
    if str(device) != "cpu":
        return f"those kernels are for a CPU, not {device}"
    try:
        from fluxvae.engine.kernels.vector_code import supported
    except ImportError as error:  # Numba has no build for this machine
        return f"Numba cannot be imported here ({error})"
    return supported()


def no_cuda(device: torch.device) -> str | None:
    """Why the CUDA kernels do not run on ``device``; None where they do."""
    import torch

    from fluxvae.engine.kernels.cudnn import available

    if device.type != "cuda":
        return f"those kernels are for an NVIDIA GPU, not {device}"
    if not torch.cuda.is_available() or not available(device):
        return "this PyTorch sees no NVIDIA GPU, or has no cuDNN"
    try:
        import triton  # noqa: F401
    except ImportError as error:  # PyTorch brings it on Linux only
        return f"the Triton language cannot be imported here ({error})"
    return None
