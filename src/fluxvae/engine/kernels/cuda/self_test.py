"""Tries the CUDA kernels on a card: a small map goes through all of them before they are used in a precision.

The results are compared with those of PyTorch's kernels in float64 on the CPU. If a kernel does not compile, does not
launch or gives a wrong result, none of them is used on that card in that precision, so that there is never a wrong
image; the plan says what serves instead and why. The first trial takes seconds, because the kernels are compiled and
kept in ``~/.triton``; later ones take a fraction of a second.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from fluxvae.engine.calls import Call, Kind
from fluxvae.engine.kernels import AttentionBlock, ConvBlock, Kernels, Refill
from fluxvae.engine.kernels.direct.kernels import TorchKernels
from fluxvae.engine.memory.free import is_out_of_memory
from fluxvae.engine.records import Conv, Linear, Norm, Projections
from fluxvae.engine.settings import set_aside
from fluxvae.engine.statistics import FiniteChecks, Moments, Partial, PixelScale
from fluxvae.errors import UnavailableError

__all__ = ["fault", "note", "on"]

_DTYPES = {2: (torch.bfloat16, torch.float16), 4: (torch.float32,)}
"""The dtypes that the kernels compute in, by the bytes of a value."""
_CPU = torch.device("cpu")
_ROWS, _WIDTH = 9, 31
_log = logging.getLogger(__name__)
_lock = threading.RLock()
_faults: dict[tuple[str, int], str] = {}
"""What is wrong with the kernels, by device and bytes of a value; "" where nothing is."""


def on(device: torch.device) -> AbstractContextManager[None]:
    """A context in which ``device`` is the current one, which is where the Triton language launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def fault(device: torch.device, itemsize: int, make: Callable[[], Kernels]) -> str:
    """What is wrong with the kernels on ``device`` for values of so many bytes, in a line; "" if they work.

    It is found out once in a process. ``make`` makes kernels that do not ask for a self-test themselves.
    """
    with _lock:
        key = str(device), itemsize
        if key not in _faults:
            start = time.perf_counter()
            with set_aside(device), on(device):
                _faults[key] = _tried(device, itemsize, make)
            seconds = time.perf_counter() - start
            if seconds > 1:
                _log.info("compiled and checked the CUDA kernels for %d-byte values in %.1f s", itemsize, seconds)
        return _faults[key]


def note(device: torch.device) -> str:
    """In which precisions the kernels were tried on ``device`` and are not used, and why; "" where there are none."""
    found = {itemsize: wrong for (key, itemsize), wrong in _faults.items() if key == str(device) and wrong}
    return "; ".join(
        f"PyTorch's own operations serve in {' and '.join(_name(dtype) for dtype in _DTYPES[itemsize])}: {wrong}"
        for itemsize, wrong in found.items()
    )


def _tried(device: torch.device, itemsize: int, make: Callable[[], Kernels]) -> str:
    try:
        for dtype in _DTYPES[itemsize]:
            _compare(device, dtype, make())
    except Exception as error:
        if is_out_of_memory(error, device):  # it says nothing about the kernels
            raise UnavailableError(
                f"memory: {device} ran out while the CUDA kernels were tried ({error}); try again when more is free"
            ) from error
        _log.warning("the CUDA kernels are not used on this card", exc_info=True)
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return ""


def _compare(device: torch.device, dtype: torch.dtype, kernels: Kernels) -> None:
    """Raise ArithmeticError if a result is further from that in float64 than rounding can take it."""
    found = _walk(kernels, device, dtype, dtype)
    expected = _walk(TorchKernels(_CPU), _CPU, dtype, torch.float64)
    for (name, values, moments), (_, true, _) in zip(found, expected, strict=True):
        # Four units in the last place of the largest value. An error of logic would be far larger.
        allowed = max(4 * torch.finfo(values.dtype).eps * float(true.abs().max()), 1e-4)
        _agree(f"{name} in {_name(dtype)}", values, true, allowed)
        if moments is not None:
            flat = values.double().cpu().view(-1, values.shape[-1])
            squares = (flat - flat.mean(0)).square().sum(0)
            (mean,), (m2,) = moments.stacked()
            _agree(f"the mean of {name} in {_name(dtype)}", mean, flat.mean(0), 1e-4)
            _agree(f"the deviations of {name} in {_name(dtype)}", m2, squares, 1e-4 * float(squares.max()))


def _agree(what: str, found: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    off = float((found.double().cpu() - expected).abs().max())
    if not off <= allowed:  # also where it is NaN
        raise ArithmeticError(f"{what} is off by {off:.2g}, allowed are {allowed:.2g}")


def _walk(
    kernels: Kernels, device: torch.device, drawn: torch.dtype, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, Moments | None]]:
    """Use every kernel once, and yield each result with its name and its statistics.

    Every kernel starts from random values of its own, so that an error of one does not show in another. The values are
    rounded to ``drawn`` first, so that they are the same in every ``dtype``.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return values.to(drawn).to(device, dtype)

    def conv(cin: int, cout: int, kernel: int) -> Conv:
        module = torch.nn.Module()
        scale = kernel * cin**0.5
        module.weight, module.bias = draw(cout, cin, kernel, kernel) / scale, draw(cout)
        return Conv("", cin, cout, kernel, module)

    def room(nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def gathered(call: Call, blocks: int) -> Moments:
        return kernels.moments(call, blocks, room(kernels.statistics(call, blocks)[0]))

    def convolved(kind: Kind, layer: Conv, residual: torch.Tensor | None, scale: float) -> ConvBlock:
        count = _ROWS - 3 if kind == "down" else _ROWS - 2
        call = Call(kind, layer.cin, layer.cout, count, _WIDTH, dtype.itemsize, False)
        rows = draw(count if kind == "linear" else count + 2, _WIDTH, layer.cin)
        out = torch.empty(call.out(count), call.out(_WIDTH), layer.cout, dtype=dtype, device=device)
        weights = kernels.load(layer, kind, dtype, room(kernels.loaded(call)))
        moments = None if kind == "linear" else gathered(call, 1)
        return ConvBlock(kind, rows, weights, out, room(kernels.workspace(call)), residual, scale, moments)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for channels in (128, 256, 512):  # groups of 4, 8 and 16 channels, which are compiled separately
        module = torch.nn.Module()
        module.weight, module.bias = draw(channels), draw(channels)
        moments = gathered(Call("conv3", channels, channels, 5, 10, dtype.itemsize, False), 3)
        for count in (50, 50, 20):
            mean, m2 = draw(channels).double(), draw(channels).double().square() * count
            moments.add(Partial(count, mean, m2))
        norm = Norm("", channels, 32, 1e-6, True, module)
        affine = kernels.affine(moments, norm, wide, FiniteChecks(device))
        yield "the norm's scale", affine.scale, None
        yield "the norm's shift", affine.shift, None
    by_pixel = PixelScale(draw(384).to(wide), draw(384).to(wide), 1e-12)
    for scaling, silu in ((affine, True), (affine, False), (by_pixel, True), (by_pixel, False)):
        channels = len(scaling.scale)
        rows, out = draw(_ROWS, _WIDTH, channels), torch.empty(_ROWS, _WIDTH, channels, dtype=dtype, device=device)
        kernels.prologue(rows, scaling, silu, out, room(4 * rows.numel() * 8))
        yield "the norm", out, None
    for first, through in ((True, affine), (False, affine), (False, None), (True, by_pixel), (False, by_pixel)):
        channels = 512 if through is None else len(through.scale)
        window, fresh = draw(_ROWS, _WIDTH, channels), (1 if first else 2, _ROWS - 1)
        source = _Rows(draw(fresh[1] - fresh[0], _WIDTH, channels))
        kernels.refill(Refill(window, first, fresh, _ROWS - 1, source, through, room(9 * window.numel())))
        yield "the next block", window, None
    for kind, layer, residual, scale in (
        ("conv3", conv(128, 128, 3), None, 1.0),
        ("conv3", conv(128, 256, 3), draw(_ROWS - 2, _WIDTH, 256), 2.0),
        ("up", conv(128, 32, 3), None, 1.0),  # few channels, whose kernels the interpreter takes seconds to sum
        ("down", conv(128, 128, 3), None, 1.0),
        ("linear", conv(128, 256, 1), None, 1.0),
    ):
        block = convolved(kind, layer, residual, scale)  # type: ignore[arg-type]
        kernels.convolve(block)
        yield f"the convolution {kind!r}", block.out, block.statistics
    q, k, v, o = (Linear("", 512, 512, 1, conv(512, 512, 1).module) for _ in range(4))
    projections = Projections(q, k, v, o, 512**-0.5, True, 1.0)
    call = Call("attend", 512, 512, 5, 14, dtype.itemsize, False, 150)
    tokens, queries, out = draw(150, 512), draw(5, 14, 512), draw(5, 14, 512)
    weights = kernels.load_attention(projections, dtype, room(kernels.loaded(call)))
    work, moments = room(kernels.workspace(call)), gathered(call, 1)
    kernels.attend(AttentionBlock(projections, weights, queries, tokens, out, work, moments))
    yield "attention", out, moments


class _Rows:
    """The rows of a map that are read where they are."""

    views = True

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def take(self, into: torch.Tensor) -> torch.Tensor:
        return self._rows

    def pour(self, into: torch.Tensor, put: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        put(self._rows, into)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
