"""What is decided by the device: the dtype, the kernels, who convolves, what is refused, and what an error means.

Most of it needs a GPU only to be asked what it is. Such a card is described here, and PyTorch answers as it would
there.
"""

from __future__ import annotations

import ast
import copy
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fluxvae
from engine_models import Shape
from fluxvae import Decoder, devices
from fluxvae.batch import ray_job
from fluxvae.engine import planned
from fluxvae.engine.calls import Call
from fluxvae.engine.exact import ExactDecoder, OutOfMemoryWarning
from fluxvae.engine.kernels import ConvBlock, choose
from fluxvae.engine.kernels.choose import check_kernels, make_kernels
from fluxvae.engine.kernels.direct import cudnn, gpu
from fluxvae.engine.kernels.direct.costs import GPU_BLOCK_VALUES, DirectCosts, workspace_bound
from fluxvae.engine.kernels.direct.kernels import TorchKernels
from fluxvae.engine.memory import free
from fluxvae.engine.memory.free import is_out_of_memory
from fluxvae.engine.network import read_network
from fluxvae.engine.planner import make_planner
from fluxvae.engine.records import Conv
from fluxvae.engine.settings import set_aside
from fluxvae.errors import InvalidOptionError, UnavailableError
from fluxvae.options import resolve_device, resolve_dtype
from models import random_vae

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]
Describe = Callable[..., None]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Describe]:
    """Describe the machine's GPUs by their compute capabilities; ``hip``: they are AMD's."""

    def describe(*capabilities: tuple[int, int], hip: str | None = None, library: bool = True) -> None:
        def capability(device: torch.device | None = None) -> tuple[int, int]:
            return capabilities[0 if device is None or device.index is None else device.index]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: library)

    choose._tell.cache_clear()
    gpu._faults.clear()
    yield describe
    choose._tell.cache_clear()
    gpu._faults.clear()


# -- the dtype -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), torch.float32), ((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_auto_is_bfloat16_where_the_card_computes_with_it(
    cards: Describe, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    cards(capability)
    for device in ("auto", "cuda", "cuda:0"):
        assert resolve_dtype("auto", resolve_device(device)) == dtype
    assert resolve_dtype("auto", CPU) == torch.float32


def test_auto_asks_the_very_card(cards: Describe) -> None:
    cards((7, 5), (8, 6))
    names = [str(resolve_dtype("auto", resolve_device(f"cuda:{index}"))) for index in (0, 1)]
    assert names == ["torch.float32", "torch.bfloat16"]


def test_auto_is_float32_on_cards_of_amd(cards: Describe) -> None:
    """They have bfloat16, whose large convolutions ComfyUI found very slow."""
    cards((9, 4), hip="7.0")
    assert resolve_dtype("auto", GPU) == torch.float32
    assert devices.computes_directly(torch.bfloat16, GPU)


def test_a_ray_job_asks_a_node_that_has_a_gpu(cards: Describe) -> None:
    """What it asks there is done here."""
    asked: list[dict[str, Any]] = []

    def remote(**resources: Any) -> Callable[..., Any]:
        asked.append(resources)
        return lambda function: SimpleNamespace(remote=function)

    ray = SimpleNamespace(remote=remote, get=lambda value: value)
    cards((7, 5))
    assert ray_job._usual_dtype(ray, "cuda") == "float32"
    cards((9, 0))
    assert ray_job._usual_dtype(ray, "cuda") == "bfloat16"
    assert asked == [{"num_gpus": 1}] * 2
    assert ray_job._usual_dtype(ray, "cpu") == "float32"
    assert len(asked) == 2


def test_no_other_module_chooses_bfloat16() -> None:
    chosen = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("src", "comfyui", "triton_models")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.IfExp)
        and {ast.unparse(node.body), ast.unparse(node.orelse)} & {"torch.bfloat16", "'bfloat16'"}
    ]
    assert not chosen


def test_bfloat16_weights_are_computed_in_float32_where_the_card_has_none(cards: Describe) -> None:
    cards((7, 5))
    kernels = TorchKernels(GPU)
    assert kernels.compute_dtype(torch.bfloat16) == torch.float32
    assert kernels.compute_dtype(torch.float16) == torch.float16
    why = "this card's compute capability is 7.5, and bfloat16 needs 8.0 or later"
    assert kernels.note == f"bfloat16 is computed in float32, because {why}"
    cards((8, 0))
    assert (TorchKernels(GPU).compute_dtype(torch.bfloat16), TorchKernels(GPU).note) == (torch.bfloat16, "")


def test_such_a_decode_is_that_of_float32_and_its_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for such a card, also for a VAE that is in memory already."""
    monkeypatch.setattr(devices, "no_bfloat16", lambda device: "it is a T4")
    shape = Shape()
    vae, raw = shape.vae(torch.bfloat16), shape.latents(torch.bfloat16)
    precise = torch.nn.Module.to(copy.deepcopy(vae), torch.float32)
    wanted = ExactDecoder(precise, kernels="torch").decode(raw.float()).bfloat16()
    engine = ExactDecoder(vae, kernels="torch")
    assert torch.equal(engine.decode(raw), wanted)
    assert "note: bfloat16 is computed in float32, because it is a T4" in str(engine.plan(shape.height, shape.width))


# -- the kernels -----------------------------------------------------------------------------------------------------


def test_any_card_of_the_machine_may_be_meant(cards: Describe) -> None:
    """The VAE may be on the second card, which is not the current one."""
    cards((7, 5), (8, 6))
    check_kernels("cuda")
    ExactDecoder(Shape().vae(), kernels="cuda")  # the VAE is on the CPU yet
    assert make_kernels("cuda", torch.device("cuda", 1)).name == "cuda"
    with pytest.raises(InvalidOptionError, match=r"kernels: got 'cuda', but this card's compute capability is 7\.5"):
        make_kernels("cuda", GPU)
    cards((7, 5))
    with pytest.raises(InvalidOptionError, match=r"kernels: got 'cuda', but this card's compute capability is 7\.5"):
        ExactDecoder(Shape().vae(), kernels="cuda")


def test_a_user_who_switched_cudnn_off_is_obeyed(cards: Describe, monkeypatch: pytest.MonkeyPatch) -> None:
    cards((9, 0))
    assert make_kernels("auto", GPU).name == "cuda"
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    with set_aside(CPU):
        assert not torch.backends.cudnn.enabled
        kernels = make_kernels("auto", GPU)
    off = "cuDNN is switched off (torch.backends.cudnn.enabled is False)"
    assert kernels.name == "torch"
    assert kernels.note == f"the CUDA kernels would be faster, but {off}; convolutions are slow, because {off}"
    assert kernels.block_values is not None
    assert kernels.block_values < GPU_BLOCK_VALUES
    with pytest.raises(InvalidOptionError, match=r"kernels: got 'cuda', but cuDNN is switched off"):
        make_kernels("cuda", GPU)


WAYS = {
    "no Triton language": "the Triton language cannot be imported here",
    "no cuDNN": "this PyTorch has no cuDNN",
    "cuDNN is off": "cuDNN is switched off (torch.backends.cudnn.enabled is False)",
    "an old card": "this card's compute capability is 7.5",
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_keeps_auto_from_the_cuda_kernels_is_logged_once(
    cards: Describe, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cards((7, 5) if way == "an old card" else (8, 9), library=way != "no cuDNN")
    if way == "no Triton language":
        monkeypatch.setitem(sys.modules, "triton", None)
    if way == "cuDNN is off":
        monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    with caplog.at_level(logging.WARNING):
        notes = {make_kernels("auto", GPU).note for _ in range(3)}
    assert [record.message for record in caplog.records] == list(notes)
    assert f"the CUDA kernels would be faster, but {WAYS[way]}" in caplog.text
    caplog.clear()
    make_kernels("torch", GPU)  # as asked
    assert not caplog.records


def test_amd_is_told_nothing_of_nvidia(cards: Describe, caplog: pytest.LogCaptureFixture) -> None:
    cards((11, 0), hip="7.0")
    kernels = make_kernels("auto", GPU)
    assert (kernels.name, kernels.note, caplog.records) == ("torch", "", [])
    with pytest.raises(InvalidOptionError, match="those kernels are for an NVIDIA GPU, and cuda:0 is one of AMD's"):
        make_kernels("cuda", GPU)


# -- who convolves on a GPU ------------------------------------------------------------------------------------------


class _Arguments(TorchDispatchMode):
    """Keeps the arguments of every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._convolution.default:
            self.seen.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_names_every_setting_and_is_that_of_pytorch(library: bool, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image, weight, bias = (torch.randn(*size, generator=generator) for size in ((1, 8, 9, 7), (6, 8, 3, 3), (6,)))
    with _Arguments() as arguments:
        made = gpu.convolve(image, weight, bias, stride=stride, library=library)
    assert torch.equal(made, F.conv2d(image, weight, bias, stride, (0, int(stride == 1))))
    names = [argument.name for argument in torch.ops.aten._convolution.default._schema.arguments]
    given = dict(zip(names, arguments.seen[0], strict=True))
    settings = [given[name] for name in ("benchmark", "deterministic", "cudnn_enabled", "allow_tf32")]
    assert settings == [False, True, library, False]


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The trial of the library's convolutions takes place on the CPU."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    gpu._faults.clear()
    yield
    gpu._faults.clear()


@pytest.mark.usefixtures("trial")
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_a_library_that_works_passes_its_trial_in_any_surroundings(
    itemsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan asks for it too, and what is found is kept for the process."""
    right, autocast = gpu.convolve, []

    def convolve(*given: Any, **options: Any) -> torch.Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return right(*given, **options)

    monkeypatch.setattr(gpu, "convolve", convolve)
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert gpu.library_fault(CPU, itemsize) == ""
    assert not any(autocast)


@pytest.mark.usefixtures("trial")
@pytest.mark.parametrize("how", ["fails", "is wrong", "is NaN"])
def test_a_library_that_does_not_is_done_without(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, tried = gpu.convolve, []

    def broken(image: torch.Tensor, *given: Any, library: bool = True, **options: Any) -> torch.Tensor:
        tried.append(library)
        made = right(image, *given, **options)
        if library and how == "fails":
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return made + {"is wrong": 0.01, "is NaN": torch.nan}[how] if library else made

    monkeypatch.setattr(gpu, "convolve", broken)
    found = gpu.library_fault(CPU, 4)
    assert found.startswith("RuntimeError: GET was" if how == "fails" else "ArithmeticError: a convolution in")
    kernels = TorchKernels(CPU)
    kernels._device, kernels._onednn = torch.device("meta"), False
    gpu._faults["meta", 4] = found
    made = kernels._conv(torch.ones(5, 6, 4), torch.ones(8, 4, 3, 3), None, torch.empty(0))
    assert torch.isfinite(made).all()
    assert tried[-1] is False


@pytest.mark.usefixtures("trial")
def test_want_of_memory_is_no_fault_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "convolve", full)
        with pytest.raises(UnavailableError, match="^memory: cpu ran out while its convolutions were tried"):
            gpu.library_fault(CPU, 4)
    assert gpu.library_fault(CPU, 4) == "", "it is tried again"


@pytest.mark.skipif(torch.__version__ < "2.7", reason="PyTorch 2.6 convolves no tensors without values")
@pytest.mark.parametrize("kind", ["conv3", "up", "down", "pointwise"])
def test_pytorchs_kernels_do_not_call_the_cuda_kernels_operator(
    cards: Describe, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be what has failed. Tensors without values stand for a card's."""
    cards((9, 0))
    monkeypatch.setattr(cudnn, "available", lambda device: True)
    monkeypatch.setattr(gpu, "library_fault", lambda device, itemsize: "")
    meta = torch.device("meta")
    kernels = TorchKernels(meta)
    module = torch.nn.Conv2d(16, 8, 1 if kind == "pointwise" else 3, device=meta)
    conv = Conv("", 16, 8, module.kernel_size[0], module)
    with _Operators() as operators:
        if kind == "pointwise":
            assert kernels.pointwise(torch.empty(16, 6, 10, device=meta), conv).shape == (6, 10, 8)
        else:
            call = Call(kind, 16, 8, 4, 10, 4, False)  # type: ignore[arg-type]
            weights = kernels.load(conv, kind, torch.float32, _room(kernels.loaded(call)))  # type: ignore[arg-type]
            out = torch.empty(call.out(4), call.out(10), 8, device=meta)
            rows = torch.empty(6, 10, 16, device=meta)
            kernels.convolve(ConvBlock(kind, rows, weights, out, _room(kernels.workspace(call))))  # type: ignore[arg-type]
    assert "aten._convolution" in operators.names
    assert not [name for name in operators.names if "cudnn" in name]


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).rpartition(".")[0])
        return func(*args, **(kwargs or {}))


def _room(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="meta")


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_last_convolution_has_its_workspace_in_the_plan(
    cards: Describe, itemsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its three channels are not for the CUDA kernels, which leave it to PyTorch's."""
    cards((9, 0))
    call = Call("conv3", 128, 3, 64, 1024, itemsize, False)
    result, workspace = 64 * 1024 * 3 * itemsize, workspace_bound((66, 1024, 128), (3, 3, 3), itemsize)
    assert workspace >= 1 << 20
    assert DirectCosts("cuda").overhead(call) == result + workspace
    kernels = make_kernels("cuda", GPU)
    monkeypatch.setattr(type(kernels), "_works", lambda self, itemsize: True)
    assert kernels.overhead(call) == result + workspace


def test_a_block_that_is_unfolded_is_in_the_plan(cards: Describe, monkeypatch: pytest.MonkeyPatch) -> None:
    """``slow_conv2d_forward`` in ATen: input, weights and result channels first, and nine values for each pixel."""
    cards((7, 5))
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    call = Call("conv3", 64, 32, 10, 100, 4, False)
    values = 12 * 100 * 64 + 9 * 64 * 32 + 9 * 64 * 10 * 100 + 32 * 10 * 100
    assert TorchKernels(GPU).overhead(call) == 4 * values


@pytest.mark.parametrize("itemsize", [2, 4])
def test_all_of_the_arena_counts_from_the_start_on_a_gpu(
    cards: Describe, itemsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one allocation there, of which no page is touched first, and it stands beside the largest workspace."""
    cards((9, 0))
    monkeypatch.setattr(gpu, "library_fault", lambda device, itemsize: "")
    network = read_network(Shape(widths=(32, 64, 64)).vae())
    planner = make_planner(
        network, TorchKernels(GPU), (48, 48), batch=1, computed=itemsize, stored=itemsize, cast=False, on_cpu=False,
        threads=1, block_values=1 << 15,
    )  # fmt: skip
    least, most = planner.smallest_limit(1 << 40), planner.plan(None).peak_bytes
    assert least < most
    for part in range(9):
        limit = least + (most - least) * part // 8
        plan = planner.plan(limit, spill_free=1 << 40)
        held = plan.fixed_bytes + plan.arena_bytes + max(step.overhead for step in plan.steps)
        assert held == plan.peak_bytes <= limit


def test_a_plan_is_made_anew_when_the_switch_was_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned with are the kernels that compute."""
    engine = ExactDecoder(Shape().vae(), kernels="torch")
    for why in ("", "cuDNN is off", ""):
        monkeypatch.setattr(planned, "make_kernels", lambda name, device, why=why: TorchKernels(device, instead=why))
        assert engine.plan(6, 5).kernels_note == why


# -- what is refused -------------------------------------------------------------------------------------------------


class _Elsewhere(torch.Tensor):
    """Weights on a device that this machine does not have; a real one's are plain tensors."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: str) -> _Elsewhere:
        made: _Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, dtype=values.dtype, device=device, requires_grad=False
        )
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise AssertionError(f"nothing may be computed there, but {func} was asked for")


def _moved(vae: torch.nn.Module, device: str) -> torch.nn.Module:
    for module in vae.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(_Elsewhere(weight.detach(), device), requires_grad=False)
    return vae


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
@pytest.mark.parametrize("door", ["install", "Decoder", "Encoder"])
def test_devices_that_the_engine_has_no_kernels_for_are_refused_by_name(device: str, door: str) -> None:
    vae = _moved(random_vae(), device)
    make = {"install": fluxvae.install, "Decoder": Decoder, "Encoder": fluxvae.Encoder}[door]
    with pytest.raises(
        InvalidOptionError, match=rf"^vae: .*\.weight is on {device}\S*, and the exact engine"
    ) as refusal:
        make(vae)
    assert "Move the VAE to the CPU (vae.to('cpu')), or let diffusers itself compute it" in str(refusal.value)
    assert Decoder(vae, engine="diffusers").device.type == device


def test_a_vae_that_moved_there_later_is_refused_at_the_next_call() -> None:
    vae = random_vae()
    with fluxvae.install(vae), torch.no_grad():
        vae.decode(torch.zeros(1, 16, 2, 2))
        _moved(vae, "mps")
        with pytest.raises(InvalidOptionError, match="is on mps"):
            vae.decode(torch.zeros(1, 16, 2, 2))


# -- what is ambient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_autocast_of_either_kind_is_off_during_a_decode_on_a_gpu(kind: str) -> None:
    torch.set_autocast_enabled(kind, True)
    try:
        with set_aside(GPU):
            assert not torch.is_autocast_enabled(kind)
        assert torch.is_autocast_enabled(kind)
    finally:
        torch.set_autocast_enabled(kind, False)


def test_the_self_test_is_made_with_pytorchs_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan asks for it too, in whatever surroundings, and what it finds is kept for the process."""
    from fluxvae.engine.kernels.cuda import self_test

    monkeypatch.setattr(self_test, "_faults", {})
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode():
        assert self_test.fault(CPU, 4, lambda: TorchKernels(CPU)) == ""
        assert self_test.fault(CPU, 2, lambda: TorchKernels(CPU)) == ""


# -- what an error means ---------------------------------------------------------------------------------------------

CERTAIN = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory"),
]
UNCLEAR = [
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
]


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what is free on a card of 12 GB, and how much of it PyTorch may have and has."""

    def say(nbytes: int, fraction: float = 1.0, reserved: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (nbytes, 12 << 30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction, raising=False)

    return say


@pytest.mark.parametrize("error", CERTAIN, ids=str)
def test_want_of_memory_is_known_by_every_name(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert is_out_of_memory(error, GPU)


@pytest.mark.parametrize("message", UNCLEAR)
def test_errors_with_two_causes_depend_on_what_is_left(message: str, left: Callable[..., None]) -> None:
    error = RuntimeError(message)
    assert not is_out_of_memory(error, GPU), "no GPU was used"
    left(100 << 20)
    assert is_out_of_memory(error, GPU)
    assert is_out_of_memory(error)
    assert not is_out_of_memory(error, CPU)
    left(4 << 30)
    assert not is_out_of_memory(error, GPU)
    left(4 << 30, fraction=0.5, reserved=(6 << 30) - 1000)  # PyTorch may not have more
    assert is_out_of_memory(error, GPU)


def test_other_errors_are_not_for_want_of_memory(left: Callable[..., None]) -> None:
    left(0)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"), GPU)
    assert not is_out_of_memory(ValueError("out of memory"), GPU)


@pytest.mark.parametrize("short", [True, False])
def test_a_real_fault_ends_and_names_what_was_said(short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short, smaller plans are tried; the last error is told, as it may have had another cause."""

    def fails(*given: Any) -> None:
        raise RuntimeError(f"{UNCLEAR[0]}\nand more")

    monkeypatch.setattr(TorchKernels, "convolve", fails)
    monkeypatch.setattr(free, "_is_short", lambda device: short)
    engine, raw = ExactDecoder(Shape(height=24, width=24).vae(), kernels="torch"), Shape(height=24, width=24).latents()
    wanted = (UnavailableError, RuntimeError)[not short]
    words = (
        r"ran out with the smallest plan .* \(the last error was RuntimeError: GET was unable" if short else "^GET was"
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(wanted, match=words):
            engine.decode(raw)
    retries = [str(one.message) for one in told if one.category is OutOfMemoryWarning]
    assert bool(retries) == short
    assert all("the error was RuntimeError: GET was unable" in one for one in retries)


@pytest.mark.parametrize("error", [*CERTAIN[2:4], RuntimeError(UNCLEAR[0])], ids=str)
def test_want_of_memory_in_the_self_test_does_not_switch_the_kernels_off(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxvae.engine.kernels.cuda import self_test

    def full() -> TorchKernels:
        raise error

    monkeypatch.setattr(self_test, "_faults", {})
    monkeypatch.setattr(free, "_is_short", lambda device: True)
    with pytest.raises(UnavailableError, match="^memory: cpu ran out while the CUDA kernels were tried"):
        self_test.fault(CPU, 4, full)
    monkeypatch.setattr(free, "_is_short", lambda device: False)
    assert self_test.fault(CPU, 4, lambda: TorchKernels(CPU)) == ""
