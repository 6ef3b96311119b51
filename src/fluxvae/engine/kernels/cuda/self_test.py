"""Whether the kernels in the Triton language work on a card: each is compiled and tried on a small map before use.

Against float64 on the CPU. What fails to compile, to launch or to agree is not used on that card: never a wrong image,
and `note`, which every plan prints, says what serves instead and why. The first time takes seconds (the compiled
kernels are kept in ``~/.triton``), later ones a fraction of one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from fluxvae.engine.kernels.cuda import attention, passes
from fluxvae.engine.kernels.direct.cudnn import convolve
from fluxvae.engine.records import Norm
from fluxvae.engine.sweep.statistics import FiniteChecks, Moments, Partial

__all__ = ["PYTORCH_HEAD", "attention_cut", "note", "on", "prepare", "works"]

PYTORCH_HEAD = 256
"""Up to this head dimension PyTorch has attention kernels for tensor cores."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_log = logging.getLogger(__name__)
_lock = threading.RLock()
_passes: dict[str, str] = {}
"""By device: what is wrong with the passes; "" is nothing."""
_cuts: dict[tuple[str, int, int], tuple[int, int, int, int] | str] = {}
"""By device, head dimension and item size: how attention is cut, or what is wrong with it."""


def prepare(device: torch.device) -> float:
    """Compile and try everything that a FLUX decoder needs; seconds it took."""
    start = time.perf_counter()
    if works(device):
        attention_cut(device, 512, 2)
    seconds = time.perf_counter() - start
    if seconds > 1:
        _log.info("compiled and checked the CUDA kernels in %.1f s", seconds)
    return seconds


def on(device: torch.device) -> AbstractContextManager[None]:
    """``device`` is the current one, which is where the Triton language launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def works(device: torch.device) -> bool:
    """Whether the kernels of `passes`, and cuDNN as `cudnn` calls it, do on ``device`` what they should."""
    with _lock:
        key = str(device)
        if key not in _passes:
            with on(device):
                _passes[key] = _wrong(lambda: _check_passes(device))
        return not _passes[key]


def attention_cut(device: torch.device, dim: int, itemsize: int) -> tuple[int, int, int, int] | None:
    """How `attention.attention` is cut on ``device``; None: PyTorch's own attention is used.

    A rule, not a race, so that the bits do not depend on the day: ours for half precision and heads that PyTorch has
    no kernel on tensor cores for. In float32, PyTorch's (benchmarks/gpu.py measures both).
    """
    if itemsize != 2 or dim <= PYTORCH_HEAD:
        return None
    with _lock:
        key = str(device), dim, itemsize
        if key not in _cuts:
            with on(device):
                _cuts[key] = _first_cut(device, dim)
        found = _cuts[key]
    return None if isinstance(found, str) else found


def note(device: torch.device) -> str:
    """What was tried on ``device`` and is not used, and why; "" is nothing."""
    wrong = []
    if not works(device):
        wrong.append(f"PyTorch's own operations serve between convolutions: {_passes[str(device)]}")
    for (key, dim, _), found in _cuts.items():
        if key == str(device) and isinstance(found, str):
            wrong.append(f"PyTorch's own attention serves for a head of {dim}: {found}")
    return "; ".join(wrong)


def _first_cut(device: torch.device, dim: int) -> tuple[int, int, int, int] | str:
    """The largest cut that the card has room for, if it is right."""
    wrong = "no way to cut it"
    for cut in attention.CUTS[2]:
        wrong = _wrong(lambda cut=cut: _check_attention(device, dim, cut))  # type: ignore[misc]
        if not wrong:
            return cut
        if "OutOfResources" not in wrong:
            break
    return wrong


def _wrong(check: Callable[[], None]) -> str:
    """What ``check`` raised, in a line; an error of a kernel must not leave PyTorch's state of the device broken."""
    try:
        check()
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels
    except Exception as error:
        _log.warning("a CUDA kernel is not used on this card", exc_info=True)
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0] if text else 'no message'}"
    return ""


def _check_passes(device: torch.device) -> None:
    generator = torch.Generator(device="cpu").manual_seed(0)
    for dtype in _DTYPES:

        def draw(*shape: int, dtype: torch.dtype = dtype) -> tuple[torch.Tensor, torch.Tensor]:
            """On the device, and as float64 on the CPU."""
            made = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
            return made.to(device), made.double()

        rows, expected = draw(9, 31, 128)
        (scale, true_scale), (shift, true_shift) = draw(128, dtype=torch.float32), draw(128, dtype=torch.float32)
        out = torch.empty_like(rows)
        passes.prologue(rows, scale, shift, True, out)
        _agree("prologue", out, F.silu(expected * true_scale + true_shift))

        weight, true_weight = draw(128, 3, 3, 128)
        weight, true_weight = (w.permute(0, 3, 1, 2) / 32 for w in (weight, true_weight))
        result = torch.empty(7, 31, 128, dtype=dtype, device=device)
        convolve(rows, weight, result)
        _agree("cuDNN's convolution", result, convolve(expected, weight.double().cpu()))

        (bias, true_bias), (residual, true_residual) = draw(128), draw(9, 31, 128)
        parts = torch.empty(passes.parts_bytes(9 * 31, 128) // 4, dtype=torch.float32, device=device)
        passes.finish(rows, bias, residual, 2.0, residual, parts)
        _agree("finish", residual, (expected + true_bias + true_residual) / 2)
        _agree_moments("finish", passes.combine(parts, 9 * 31, 128), residual)

        phases = [draw(9, 32, 256) for _ in range(2)]
        large = torch.empty(18, 62, 128, dtype=dtype, device=device)
        parts = torch.empty(passes.parts_bytes(9 * 62, 128, 2) // 4, dtype=torch.float32, device=device)
        wanted = torch.empty(9, 2, 31, 2, 128, dtype=torch.float64, device="cpu")
        for phase, (result, true_result) in enumerate(phases):
            passes.interleave(result, bias, phase, large, parts)
            wanted[:, phase, :, 0] = true_result[:, :31, :128] + true_bias
            wanted[:, phase, :, 1] = true_result[:, 1:, 128:] + true_bias
        _agree("interleave", large, wanted.view(18, 62, 128))
        _agree_moments("interleave", passes.combine(parts, 9 * 62, 128, 2), large)

    means, m2s = torch.randn(2, 7, 128, generator=generator, dtype=torch.float64, device="cpu").abs()
    weight, bias = torch.randn(2, 128, generator=generator, dtype=torch.float32, device="cpu")
    moments = Moments()
    for n, mean, m2 in zip([50] * 6 + [20], means, m2s, strict=True):
        moments.add(Partial(n, mean, m2))
    on_device = [values.to(device) for values in (means, m2s, weight, bias)]
    scale, shift = passes.affine(on_device[0], on_device[1], 50, 20, 32, 1e-6, on_device[2], on_device[3])
    module = torch.nn.GroupNorm(32, 128, dtype=torch.float32, device="cpu")
    module.weight, module.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    true = moments.affine(Norm("", 128, 32, 1e-6, True, module), torch.float64, FiniteChecks(torch.device("cpu")))
    _agree("affine's scale", scale, true.scale)
    _agree("affine's shift", shift, true.shift)


def _check_attention(device: torch.device, dim: int, cut: tuple[int, int, int, int]) -> None:
    generator = torch.Generator(device="cpu").manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        queries, tokens = (
            torch.randn(n, dim, generator=generator, dtype=torch.float32, device="cpu").to(dtype) for n in (70, 150)
        )
        out = torch.empty(70, dim, dtype=dtype, device=device)
        attention.attention(queries.to(device), tokens.to(device), dim**-0.5, out, cut)
        scores = queries.double() @ tokens.double().T * dim**-0.5
        _agree("attention", out, scores.softmax(1) @ tokens.double())


def _agree(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within four units in the last place of values as large as the largest: an error of logic is far beyond."""
    largest = float((found.double().cpu() - expected).abs().max())
    allowed = 4 * torch.finfo(found.dtype).eps * float(expected.abs().max())
    if not largest <= max(allowed, 1e-5):
        raise ArithmeticError(f"{what} in {found.dtype} is off by {largest:.2g}, allowed are {allowed:.2g}")


def _agree_moments(what: str, moments: torch.Tensor, block: torch.Tensor) -> None:
    flat = block.double().cpu().view(-1, block.shape[-1])
    mean = flat.mean(0)
    expected = torch.stack([mean, (flat - mean).square().sum(0)])
    worst = float(((moments.cpu() - expected).abs() / expected.abs().clamp(min=1)).max())
    if not worst <= 1e-4:
        raise ArithmeticError(f"the statistics of {what} in {block.dtype} are off by {worst:.2g}")
