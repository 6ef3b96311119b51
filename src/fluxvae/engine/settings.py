"""Settings of the process and of the calling thread that would change an image, set aside while one is decoded.

PyTorch keeps several switches that change what an operation computes or where its result lies. Whoever calls `decode`
may have set them for a model of their own, so every engine decodes with PyTorch's defaults instead and puts the
caller's settings back afterwards. The default dtype is not among them: it belongs to the whole process, other threads
make tensors meanwhile, and every call here names its dtype. Nor is ``torch.backends.cudnn.enabled``, by which a user
says that cuDNN does not work on a machine: another kernel set serves then, and the plan says so.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fluxvae.errors import InvalidOptionError
from fluxvae.forked import refuse_to_hang
from fluxvae.system import after_fork

__all__ = ["check_environment", "set_aside"]

_FPMATH_VARIABLES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")


@dataclass(frozen=True)
class _Switch:
    """One setting that PyTorch keeps for the whole process."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    default: Any


def _switch(name: str, default: Any, setter: str = "") -> list[_Switch]:
    """The switch that ``torch._C._get_<name>`` reads, if this version of PyTorch has it."""
    read = getattr(torch._C, f"_get_{name}", None)
    write: Any = getattr(torch._C, setter or f"_set_{name}", None)
    if read is None or write is None:
        return []
    if isinstance(read(), tuple):  # two flags in one, whose setter takes them one by one
        return [_Switch(read, lambda value: write(*value), (default, default))]
    return [_Switch(read, write, default)]


def _precision(backend: str, operation: str, default: str = "none") -> _Switch:
    """In which precision float32 may be multiplied by one kind of operation of one backend."""
    c = torch._C
    return _Switch(
        lambda: c._get_fp32_precision_getter(backend, operation),
        lambda value: c._set_fp32_precision_setter(backend, operation, value),
        default,
    )


def _older(read: Callable[[], Any], write: Callable[[Any], object], default: Any, same: list[_Switch]) -> _Switch:
    """A switch older than the precisions by operation. Writing it writes some of them too, which are then put back."""

    def write_alone(value: Any) -> None:
        before = [switch.read() for switch in same]
        write(value)
        for switch, kept in zip(same, before, strict=True):
            switch.write(kept)

    return _Switch(read, write_alone, default)


def _cudnn_tf32() -> bool:
    try:
        return bool(torch._C._get_cudnn_allow_tf32())
    except RuntimeError:  # it differs from the precisions of the operations, which are at their default "tf32"
        return False


def _precisions() -> list[_Switch]:
    """Every float32 precision, in the order in which they can be read.

    An operation whose own precision is not set reads as its backend's precision, and a backend's as the general one.
    Each is set to its default before the next one is read, so that all are read as the caller has set them.
    """
    c: Any = torch._C
    if not hasattr(c, "_get_fp32_precision_getter"):  # PyTorch before 2.9
        return [
            _Switch(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
            _Switch(c._get_cudnn_allow_tf32, c._set_cudnn_allow_tf32, True),
        ]
    matmul = [_precision("mkldnn", "matmul"), _precision("cuda", "matmul")]
    cudnn = [_precision("cuda", "conv", "tf32"), _precision("cuda", "rnn", "tf32")]
    return [
        _precision("generic", "all"),
        _precision("mkldnn", "all"),
        _precision("mkldnn", "conv"),
        _precision("cuda", "all"),
        *matmul,
        *cudnn,
        _older(c._get_float32_matmul_precision, c._set_float32_matmul_precision, "highest", matmul),
        _older(_cudnn_tf32, c._set_cudnn_allow_tf32, True, cudnn),
    ]


def _switches() -> list[_Switch]:
    c: Any = torch._C
    return [
        _Switch(
            lambda: (c._get_deterministic_algorithms(), c._get_deterministic_algorithms_warn_only()),
            lambda value: c._set_deterministic_algorithms(value[0], warn_only=value[1]),
            (False, False),
        ),
        *_switch("mkldnn_enabled", True),
        *_switch("mkldnn_deterministic", False),
        *_switch("nnpack_enabled", True),
        *_switch("cudnn_benchmark", False),
        *_switch("cudnn_deterministic", False),
        *_switch("flash_sdp_enabled", True, "_set_sdp_use_flash"),
        *_switch("mem_efficient_sdp_enabled", True, "_set_sdp_use_mem_efficient"),
        *_switch("math_sdp_enabled", True, "_set_sdp_use_math"),
        *_switch("cudnn_sdp_enabled", True, "_set_sdp_use_cudnn"),
        *_switch("overrideable_sdp_enabled", True, "_set_sdp_use_overrideable"),
        *_switch("math_sdp_allow_fp16_bf16_reduction", False),
        *_switch("cpu_allow_fp16_reduced_precision_reduction", False),
        *_switch("cublas_allow_fp16_reduced_precision_reduction", True),
        *_switch("cublas_allow_bf16_reduced_precision_reduction", True),
        *_switch("cublas_allow_fp16_accumulation", False),
        *_precisions(),
    ]


@dataclass
class _Process:
    """The process's switches while at least one decode runs, in however many threads."""

    lock: Any = field(default_factory=threading.Lock)
    switches: list[_Switch] = field(default_factory=_switches)
    running: int = 0
    changed: dict[int, Any] = field(default_factory=dict)
    """What the caller had set, by the switch's place in the list of all switches."""

    def enter(self) -> None:
        """Set all switches to their defaults. While others decode already, another thread may have set one anew."""
        with self.lock:
            self.running += 1
            for i, switch in enumerate(self.switches):
                value = switch.read()
                if value != switch.default:
                    switch.write(switch.default)
                    self.changed[i] = value

    def leave(self) -> None:
        with self.lock:
            self.running = max(0, self.running - 1)  # it is 0 already in a child that a decode's callback forked
            if self.running == 0:
                self.put_back()

    def put_back(self) -> None:
        """Put back what was set before. A switch that has been set anew meanwhile stays as it is."""
        untouched = [i for i in self.changed if self.switches[i].read() == self.switches[i].default]
        for i in sorted(untouched, reverse=True):
            self.switches[i].write(self.changed[i])
        self.changed.clear()

    def in_forked_child(self) -> None:
        """Start afresh in a forked child, where no decode runs and the thread that held the lock does not exist."""
        self.lock, self.running = threading.Lock(), 0
        self.put_back()


_process = _Process()
after_fork(_process.in_forked_child)


@contextmanager
def _no_function_modes() -> Iterator[None]:
    """Take away the modes that see every call of PyTorch in this thread; the default device is one of them."""
    from torch._C import _len_torch_function_stack
    from torch.overrides import _pop_mode, _push_mode

    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)  # type: ignore[no-untyped-call]


def check_environment(device: torch.device) -> None:
    """Refuse an environment that lowers oneDNN's float32, which oneDNN reads once and PyTorch cannot take back.

    With ``ONEDNN_DEFAULT_FPMATH_MODE=bf16``, oneDNN multiplies float32 values in bfloat16, and images differ by 1e-2.

    Raises:
        InvalidOptionError: the decode is on a CPU and such a mode is set.
    """
    for name in _FPMATH_VARIABLES if device.type == "cpu" else ():
        mode = os.environ.get(name, "")
        if mode.lower() not in ("", "strict"):
            raise InvalidOptionError(
                f"{name}: got {mode!r} in the environment, with which oneDNN computes float32 in a lower precision and "
                "images are no longer exact; expected 'strict' or no such variable: start the process without it"
            )


@contextmanager
def set_aside(device: torch.device) -> Iterator[None]:
    """Decode with PyTorch's defaults on ``device``, whatever the caller has set; all of it is put back at the end.

    In the calling thread: autocast, gradients, inference mode, the default device, modes that see every call. In the
    whole process, so that other threads see the defaults meanwhile too: deterministic algorithms, float32 precisions
    (matmul precision, TF32), reduced precision of sums, whether oneDNN and NNPACK and which kinds of attention are
    used. The last decode that ends puts these back, except for one that was set anew meanwhile. It can be nested.

    Raises:
        InvalidOptionError: as `check_environment`.
        ForkedProcessError: PyTorch would hang in this process, with any settings.
    """
    check_environment(device)
    refuse_to_hang()
    with ExitStack() as stack:
        stack.enter_context(_no_function_modes())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        _process.enter()
        stack.callback(_process.leave)
        yield
