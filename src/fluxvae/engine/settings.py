"""Settings of the process and of the calling thread that would change an image, set aside while one is decoded.

PyTorch keeps several switches that change what an operation computes or where its result lies. Whoever calls `decode`
may have set them for a model of their own, so every engine decodes with PyTorch's defaults instead and puts the
caller's settings back afterwards. The default dtype is not among them: it belongs to the whole process, other threads
make tensors meanwhile, and every call here names its dtype.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fluxvae.forked import refuse_to_hang

__all__ = ["set_aside"]


@dataclass(frozen=True)
class _Switch:
    """One setting that PyTorch keeps for the whole process."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    default: Any


def _precision(backend: str, operation: str, default: str = "none") -> _Switch:
    """In which precision float32 may be multiplied by one kind of operation of one backend."""
    c = torch._C
    return _Switch(
        lambda: c._get_fp32_precision_getter(backend, operation),
        lambda value: c._set_fp32_precision_setter(backend, operation, value),
        default,
    )


def _switches() -> list[_Switch]:
    """All of them; the general precisions come before those of single operations, which inherit from them."""
    c: Any = torch._C
    found = [
        _Switch(
            lambda: (c._get_deterministic_algorithms(), c._get_deterministic_algorithms_warn_only()),
            lambda value: c._set_deterministic_algorithms(value[0], warn_only=value[1]),
            (False, False),
        ),
        _Switch(c._get_mkldnn_enabled, c._set_mkldnn_enabled, True),
        _Switch(c._get_cudnn_enabled, c._set_cudnn_enabled, True),
        _Switch(c._get_cudnn_benchmark, c._set_cudnn_benchmark, False),
        _Switch(c._get_cudnn_deterministic, c._set_cudnn_deterministic, False),
        _Switch(c._get_flash_sdp_enabled, c._set_sdp_use_flash, True),
        _Switch(c._get_mem_efficient_sdp_enabled, c._set_sdp_use_mem_efficient, True),
        _Switch(c._get_math_sdp_enabled, c._set_sdp_use_math, True),
        _Switch(c._get_cudnn_sdp_enabled, c._set_sdp_use_cudnn, True),
    ]
    if not hasattr(c, "_get_fp32_precision_getter"):  # PyTorch before 2.9 has one switch for all of them
        return [*found, _Switch(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")]
    return [
        *found,
        _precision("generic", "all"),
        _precision("mkldnn", "all"),
        _precision("mkldnn", "conv"),
        _precision("mkldnn", "matmul"),
        _precision("cuda", "all"),
        _precision("cuda", "conv", "tf32"),
        _precision("cuda", "matmul"),
    ]


@dataclass
class _Process:
    """The process's switches while at least one decode runs, in however many threads."""

    lock: Any = field(default_factory=threading.Lock)
    running: int = 0
    changed: list[tuple[_Switch, Any]] = field(default_factory=list)

    def enter(self) -> None:
        with self.lock:
            self.running += 1
            for switch in _switches() if self.running == 1 else ():
                value = switch.read()
                if value != switch.default:
                    switch.write(switch.default)
                    self.changed.append((switch, value))

    def leave(self) -> None:
        with self.lock:
            self.running -= 1
            while self.running == 0 and self.changed:
                switch, value = self.changed.pop()
                switch.write(value)


_process = _Process()


@contextmanager
def _no_function_modes() -> Iterator[None]:
    """Without the modes that see every call of PyTorch in this thread: the default device is one of them."""
    from torch._C import _len_torch_function_stack
    from torch.overrides import _pop_mode, _push_mode

    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)  # type: ignore[no-untyped-call]


@contextmanager
def set_aside(device: torch.device) -> Iterator[None]:
    """Decode with PyTorch's defaults on ``device``, whatever the caller has set; all of it is put back at the end.

    In the calling thread: autocast, gradients, inference mode, the default device. In the whole process, so that other
    threads see the defaults meanwhile too: deterministic algorithms, float32 precisions (matmul precision, TF32),
    whether oneDNN and cuDNN and which kinds of attention are used. The last decode that ends puts these back.

    Raises:
        ForkedProcessError: PyTorch would hang in this process, with any settings.
    """
    refuse_to_hang()
    with ExitStack() as stack:
        stack.enter_context(_no_function_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        _process.enter()
        stack.callback(_process.leave)
        yield
