"""PyTorch's own convolution of a block of rows on a GPU, and whether the library behind it can be relied on.

This is what serves where the CUDA kernels do not, so it must not depend on what made them fail. The operator is the one
behind `F.conv2d`: PyTorch chooses how it is computed, and takes its own way, without a library, where it is told to
(`torch.backends.cudnn.enabled`), where the library fails its trial, and where it knows that the library cannot. Its
settings are arguments, so those of the process are neither changed nor asked: no TF32, deterministic algorithms only,
and none chosen by timing.
"""

from __future__ import annotations

import logging
import threading

import torch
import torch.nn.functional as F

from fluxvae.devices import computes_directly
from fluxvae.engine.memory.free import is_out_of_memory
from fluxvae.engine.settings import set_aside
from fluxvae.errors import UnavailableError

__all__ = ["convolve", "library_fault", "library_missing"]

_DTYPES = {2: (torch.bfloat16, torch.float16), 4: (torch.float32,)}
_ROWS, _WIDTH, _CHANNELS = 6, 20, 32
_log = logging.getLogger(__name__)
_lock = threading.RLock()
_faults: dict[tuple[str, int], str] = {}
"""What is wrong with the library's convolutions, by device and bytes of a value; "" where nothing is."""


def convolve(
    image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, stride: int = 1, library: bool = True
) -> torch.Tensor:
    """Convolve with zeros left and right of the rows and none above or below; with a larger stride, without any.

    Args:
        image: (1, cin, n, W), any memory format.
        weight: (cout, cin, kh, kw).
        stride: in both directions.
        library: whether cuDNN, or MIOpen on AMD's GPUs, may be used. On a CPU this changes nothing.
    """
    padding = (0, int(weight.shape[3] > 1 and stride == 1))
    # After the strides: dilation, not transposed, output padding, groups; then benchmark, deterministic, allow_tf32.
    made: torch.Tensor = torch.ops.aten._convolution(
        image, weight, bias, (stride, stride), padding, (1, 1), False, (0, 0), 1, False, True, library, False
    )
    return made


def library_missing() -> str | None:
    """Why the GPUs' library (cuDNN, or MIOpen for AMD's) is not to be used at all, in words; None where it is.

    ``torch.backends.cudnn.enabled = False`` is how a user says that it does not work on a machine. It is the one switch
    of the process that `fluxvae.engine.settings` does not set aside.
    """
    library = "cuDNN" if torch.version.hip is None else "MIOpen"
    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return f"this PyTorch has no {library}"
    if not torch.backends.cudnn.enabled:
        return f"{library} is switched off (torch.backends.cudnn.enabled is False)"
    return None


def library_fault(device: torch.device, itemsize: int) -> str:
    """What is wrong with the library's convolutions on a GPU for values of so many bytes; "" if they work.

    Two small convolutions are compared with float64 on the CPU, once in a process.

    Raises:
        UnavailableError: the GPU had no memory left for that.
    """
    with _lock:
        key = str(device), itemsize
        if key not in _faults:
            with set_aside(device), torch.cuda.device(device):
                _faults[key] = _tried(device, itemsize)
        return _faults[key]


def _tried(device: torch.device, itemsize: int) -> str:
    try:
        for dtype in _DTYPES.get(itemsize, ()):
            if computes_directly(dtype, device):
                _compare(device, dtype)
    except Exception as error:
        if is_out_of_memory(error, device):
            raise UnavailableError(
                f"memory: {device} ran out while its convolutions were tried ({error}); try again when more is free"
            ) from error
        _log.warning("PyTorch convolves without its library on %s, which is slow", device, exc_info=True)
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return ""


def _compare(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ArithmeticError if a result is further from that in float64 than rounding can take it."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    image = draw(1, _ROWS, _WIDTH, _CHANNELS).permute(0, 3, 1, 2)
    for cout in (3, _CHANNELS):  # a picture's channels, which few algorithms are for, and a map's
        weight = (draw(cout, 3, 3, _CHANNELS) / 17).permute(0, 3, 1, 2)
        true = F.conv2d(image.double(), weight.double(), padding=(0, 1))
        found = convolve(image.to(device), weight.to(device), None).double().cpu()
        allowed = max(4 * torch.finfo(dtype).eps * float(true.abs().max()), 1e-4)
        off = float((found - true).abs().max())
        if not off <= allowed:  # also where it is NaN
            raise ArithmeticError(f"a convolution in {dtype} is off by {off:.2g}, allowed are {allowed:.2g}")
