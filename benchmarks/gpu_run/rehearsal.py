"""A run from end to end on a CPU, so that no line of it runs for the first time on a card.

Networks and pictures are tiny, ``torch.cuda`` is faked where the parts call it, and every fake takes the arguments of
the real function only. Our kernels run in the Triton language's interpreter where a part calls them, and once for a
whole decode; elsewhere PyTorch's kernels stand in for them. What goes wrong on a card is made to go wrong too: a part
that raises, one that hangs, one that kills its process, one that loses the CUDA context, and time that runs out.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from fluxvae.engine import planned
from fluxvae.engine.kernels.cuda import attention
from fluxvae.engine.kernels.cuda.kernels import CudaKernels
from fluxvae.engine.kernels.direct.kernels import TorchKernels
from gpu_run import sglang_path, timing
from gpu_run.networks import small_vae

__all__ = ["fake_card", "prepare"]

CPU = torch.device("cpu")
STATE: dict[str, Any] = {"part": lambda: "", "lost": False, "peak": 1 << 20, "free": 1 << 33, "levels": 4}
SHALLOW = ("profile",)
"""The parts whose networks have two levels. Their launches are counted, and the interpreter takes seconds for each."""
TEST = """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("value", [1, 2])
def test_rehearsed(value):
    assert value == 1, "one test fails, so that this is rehearsed too"
"""
CONVOLUTION = SimpleNamespace(
    device_type=torch.autograd.DeviceType.CPU, name="aten::cudnn_convolution",
    input_shapes=[[1, 512, 66, 128], [512, 512, 3, 3], [], [1, 512, 64, 128]],
    kernels=[SimpleNamespace(name="sm90_xmma_fprop", duration=40.0), SimpleNamespace(name="nchwToNhwc", duration=2.0)],
)  # fmt: skip


def prepare(bench: Any) -> None:
    """Let a `bench.Bench` compute here."""
    fake_card()
    STATE["part"] = lambda: bench.part
    bench.device, bench.tests = CPU, bench.out / "test_rehearsed.py"
    bench.tests.write_text(TEST)
    bench._make = lambda model, dtype: small_vae((8,) * _levels(), dtype, groups=4, model=model)
    ours = bench.ours

    def engine(*given: Any, cuda_graphs: bool = False, **more: Any) -> Any:
        if STATE["levels"] != _levels():
            bench._vaes.clear()
            STATE["levels"] = _levels()
        return ours(*given, **more)  # graphs are refused on a CPU

    bench.ours = engine
    load = sglang_path.load
    sglang_path.load = lambda folder: _computes_here(load(folder))  # type: ignore[assignment]


def fake_card() -> None:
    """Put something in the place of what needs a card, for this process."""
    torch.set_num_threads(1)
    timing.LEAST = timing.MOST = 1
    properties = SimpleNamespace(total_memory=1 << 34, multi_processor_count=132, shared_memory_per_block_optin=1)
    for name, fake in {
        "synchronize": _synchronize, "empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1 << 20, "max_memory_allocated": lambda: (1 << 20) + _peak(),
        "memory_reserved": lambda: 1 << 22, "mem_get_info": _free,
        "get_device_properties": lambda: properties, "get_device_name": lambda: "a rehearsal on a CPU",
        "get_device_capability": lambda: (9, 0),
    }.items():  # fmt: skip
        setattr(torch.cuda, name, _as_declared(getattr(torch.cuda, name), fake))
    torch.cuda.Event = _Event  # type: ignore[assignment, misc]
    torch.compile = _compile(torch.compile)  # type: ignore[assignment]
    torch.profiler.profile = _Profile  # type: ignore[assignment, misc]
    planned.make_kernels, planned.check_kernels = _kernels, lambda name: None
    attention.PYTORCH_HEAD = 0  # so that narrow heads go to our attention too
    attend = attention.attention

    def attention_of_a_card(q: Any, kv: Any, scale: float, out: Any, cut: Any) -> None:
        if cut == next(iter(attention.CUTS)):
            raise RuntimeError("out of resource: shared memory (rehearsed)")
        attend(q, kv, scale, out, cut)

    attention.attention = attention_of_a_card


def _as_declared(real: Callable[..., Any], fake: Callable[[], Any]) -> Callable[..., Any]:
    """``fake``, called with what ``real`` may be called with."""
    signature = inspect.signature(real)

    def call(*given: Any, **named: Any) -> Any:
        signature.bind(*given, **named)
        return fake()

    return call


def _synchronize() -> None:
    if STATE["lost"]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered (rehearsed)")


def _free() -> tuple[int, int]:
    """Free and total bytes of the card: more is taken after the first look, so that there is a third of something."""
    free, STATE["free"] = STATE["free"], (1 << 33) - (1 << 27)
    return free, 1 << 34


def _peak() -> int:
    """What decodes take here: much in one part, so that a peak above its limit is rehearsed too."""
    return (1 << 40) if STATE["part"]() == "decodes 512" else int(STATE["peak"])


def _levels() -> int:
    return 2 if STATE["part"]() in SHALLOW else 4


def _kernels(name: str, device: torch.device) -> TorchKernels:
    """The CUDA kernels while launches are counted, which needs some; PyTorch's elsewhere."""
    counted = InterpretedFunction.run.__module__ == "gpu_run.profiling"
    return CudaKernels(device, unseen=True) if counted else TorchKernels(device)


class _Torch:
    """``torch`` for SGLang's kernels, which ask it to make a card the current one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)  # not rehearsed: SGLang's own files

    def get_device_module(self) -> Any:
        return SimpleNamespace(device=lambda device: nullcontext())  # not rehearsed: SGLang's own files


class _Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        _synchronize()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


def _compile(real: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` without compiling, which would take a minute here."""
    signature = inspect.signature(real)

    def compile_(model: Any, **named: Any) -> Any:
        signature.bind(model, **named)
        assert named["mode"] in torch._inductor.list_mode_options()
        return model

    return compile_


class _Profile:
    """The profiler, with two kernels that a card would have run beside what it saw here."""

    def __init__(self, *, activities: list[Any], record_shapes: bool) -> None:
        self._real = torch.autograd.profiler.profile(record_shapes=record_shapes)
        assert torch.profiler.ProfilerActivity.CUDA in activities

    def __enter__(self) -> _Profile:
        self._real.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._real.__exit__(*error)

    def key_averages(self) -> Any:
        return self._real.key_averages()

    def events(self) -> list[Any]:
        ran = SimpleNamespace(elapsed_us=lambda: 40.0)
        cuda = torch.autograd.DeviceType.CUDA
        names = ("sm90_xmma_fprop", "_finish", "_refill", "_attention", "Memset (Device)")
        fakes = [
            SimpleNamespace(device_type=cuda, name=name, time_range=ran, is_user_annotation=False) for name in names
        ]
        implicit = SimpleNamespace(**vars(CONVOLUTION) | {"input_shapes": CONVOLUTION.input_shapes[:2]})
        return [*self._real.function_events, *fakes, CONVOLUTION, implicit]


def _computes_here(path: sglang_path.FastPath) -> sglang_path.FastPath:
    """SGLang's kernels ask whether a tensor is on a card; here they are told so where they could compute it."""

    def supported(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> bool:
        channels = x.shape[1] if x.dim() == 4 else x.shape[-1]  # not rehearsed: SGLang's own files
        return channels & (channels - 1) == 0  # not rehearsed: SGLang's own files

    path.kernels._twopass_supported, path.kernels.torch = supported, _Torch()
    return path


# -- what goes wrong -----------------------------------------------------------------------------------------------


def loses(bench: Any) -> None:
    """An illegal access: this call fails, and every later one of the process."""
    STATE["lost"] = True
    torch.cuda.synchronize()


def rows_fail(bench: Any) -> None:
    """What fails within a part and leaves it running: a decode, a limit, and SGLang's files in two ways."""
    from gpu_run import decodes

    def no_room(raw: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory (rehearsed)")

    bench.measure("no engine", no_room, size=512)
    decodes.ours(bench, 512, 1000, limit_name="none at all")
    bench.must(bench.has_time("what takes for ever", 1e9), "there was no time (rehearsed)")
    unchanged = SimpleNamespace(_install_decoder_fast_paths=lambda vae, label: vae)
    for call in (
        lambda: sglang_path.load(Path("nowhere")),
        lambda: sglang_path.FastPath(unchanged, None, None).install(bench.vae()),
    ):
        try:
            call()
        except (FileNotFoundError, RuntimeError) as error:
            bench.row(kind="expected", error=str(error))
