"""A described NVIDIA GPU for tests on a machine that has none: everything is asked of it, and nothing is computed.

Inside `faked_card`, tensors on ``"cuda"`` are PyTorch's fake tensors, which have shapes, strides and storages and no
values. So the engine runs as it does on a card, at full widths and sizes, in the time that its Python takes. The Triton
language runs up to where it would compile a kernel: its own way of specialising a launch by its arguments is the real
one. Every launch is counted, every kernel and every convolution that was asked for is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.compiler
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from family_models import SMALL_DECODER
from fluxvae.engine import module_state, settings
from fluxvae.engine.kernels import choose
from fluxvae.engine.kernels.cuda import self_test
from fluxvae.engine.memory import pool

__all__ = [
    "CARDS",
    "MODELS",
    "Card",
    "Convolution",
    "Launches",
    "Wanted",
    "by_library",
    "card_of",
    "fake_vae",
    "faked_card",
]


class Card(NamedTuple):
    """What ``torch.cuda.get_device_properties`` says of a card, under the names that it uses."""

    name: str
    major: int
    minor: int
    shared_memory_per_block_optin: int
    multi_processor_count: int
    total_memory: int

    @property
    def capability(self) -> int:
        return 10 * self.major + self.minor


CARDS = {
    card.capability: card
    for card in (
        Card("NVIDIA A100-SXM4-40GB", 8, 0, 163 << 10, 108, 40 << 30),
        Card("NVIDIA GeForce RTX 3090", 8, 6, 99 << 10, 82, 24 << 30),
        Card("NVIDIA GeForce RTX 4090", 8, 9, 99 << 10, 128, 24 << 30),
        Card("NVIDIA H100 80GB HBM3", 9, 0, 227 << 10, 132, 80 << 30),
        Card("NVIDIA B200", 10, 0, 227 << 10, 148, 180 << 30),
        Card("NVIDIA GeForce RTX 5090", 12, 0, 99 << 10, 170, 32 << 30),
    )
}
"""One card of every compute capability that is tested, by that (major and minor as one number). The shared memory is
what a program may have: CUDA's programming guide takes 1 KiB of each multiprocessor's for itself."""


def card_of(capability: int) -> Card:
    return CARDS[capability]


class Convolution(NamedTuple):
    """A convolution that cuDNN was asked for."""

    rows: int
    width: int
    cin: int
    cout: int
    kernel: tuple[int, int]
    padding: tuple[int, int]
    stride: tuple[int, int]
    dtype: torch.dtype
    deterministic: bool
    tf32: bool


@dataclass(frozen=True)
class Wanted:
    """A kernel that the Triton language was about to compile for a launch."""

    source: Any
    """The `ASTSource`: function, signature, constants, and what is known of the arguments."""
    options: dict[str, Any]
    """``num_warps`` and so on, complete, as the language has parsed them for the card."""
    card: Card

    @property
    def name(self) -> str:
        return str(self.source.fn.__name__)

    @property
    def label(self) -> str:
        """The name and the constants, for tables."""
        pointers = {kind for kind in map(str, self.source.signature.values()) if kind.startswith("*")}
        values = ",".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.name}[{values}] {'/'.join(sorted(kind[1:] for kind in pointers))}"

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel was specialised by, by the names of its parameters."""
        names = self.source.fn.arg_names
        return {names[path[0]]: value for path, value in self.source.constants.items()}

    def changed(self, constants: dict[str, Any], **options: Any) -> Wanted:
        """The same launch with other constants and options."""
        source, names = self.source, self.source.fn.arg_names
        merged = {path: constants.get(names[path[0]], value) for path, value in source.constants.items()}
        made = type(source)(source.fn, source.signature, merged, source.attrs)
        return Wanted(made, self.options | options, self.card)

    def compiled(self) -> Any:
        """The kernel as machine code for the card, by the language's own compiler and ptxas."""
        return triton.compile(self.source, target=_target(self.card), options=self.options)


@dataclass
class Launches:
    """What was asked of a card."""

    counts: Counter[str] = field(default_factory=Counter)
    """By name: ``"triton _finish"``, ``"torch copy_"``, ``"cudnn"``."""
    wanted: list[Wanted] = field(default_factory=list)
    """Every kernel once, in the order of their first launches."""
    convolutions: Counter[Convolution] = field(default_factory=Counter)

    def clear(self) -> None:
        """Begin to count anew. Kernels that were compiled stay so, as they do on a card."""
        self.counts.clear()
        self.convolutions.clear()


def by_library(counts: Counter[str]) -> dict[str, int]:
    """How many launches are the Triton language's, PyTorch's and cuDNN's."""
    together: Counter[str] = Counter()
    for name, count in counts.items():
        together[name.split()[0]] += count
    return dict(together)


@contextmanager
def faked_card(capability: int) -> Iterator[Launches]:
    """Stand in for a card of this compute capability, and count what is asked of it.

    Within, tensors and models that are made on ``"cuda"`` are fake, and the engine takes the CUDA kernels for them
    without a self-test. All that is changed is put back at the end.
    """
    launches, card = Launches(), card_of(capability)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # What the driver would say. `torch.cuda.is_available` stays false, or fake tensors would look for the card.
        patch.setattr(choose, "no_cuda", lambda device: None)
        patch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        patch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
        for name, answer in {
            "get_device_properties": card,
            "get_device_capability": (card.major, card.minor),
            "get_device_name": card.name,
            "mem_get_info": (card.total_memory * 9 // 10, card.total_memory),
            "memory_reserved": 0,
            "memory_allocated": 0,
            "memory_stats": {},
            "get_allocator_backend": "native",
            "get_per_process_memory_fraction": 1.0,
            "is_current_stream_capturing": False,
            "current_device": 0,
            "device": nullcontext(),
            "empty_cache": None,
            "synchronize": None,
        }.items():
            patch.setattr(torch.cuda, name, _always(answer))
        patch.setattr(pool, "_has_pools", lambda: False)  # fake tensors are allocated nowhere
        patch.setattr(self_test, "fault", lambda *arguments: "")
        # The engine takes dispatch modes away while it decodes, and fake tensors are one.
        patch.setattr(settings, "_disable_current_modes", nullcontext)
        patch.setattr(module_state, "_PLAIN", (*module_state._PLAIN, FakeTensor))  # it refuses subclasses of tensors
        # What a fake tensor does not have, and what would have to wait for a card's answer.
        patch.setattr(FakeTensor, "data_ptr", _addresses(), raising=False)
        patch.setattr(FakeTensor, "tolist", lambda tensor: _filled(tensor.shape), raising=False)
        stack.enter_context(_language(card, launches, patch))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_Counted(launches))
        yield launches


MODELS = ("FLUX.1", "FLUX.2", "FLUX.2-small-decoder", "Qwen-Image")
"""What `fake_vae` makes: every architecture whose kernels are to be compiled."""


def fake_vae(dtype: torch.dtype, model: str = "FLUX.1") -> AutoencoderKL:
    """A VAE with both halves at its full widths, on the faked card. It is made in ``dtype``, as it cannot be cast."""
    widths, before = (128, 256, 512, 512), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            if model == "FLUX.1":
                vae = AutoencoderKL(
                    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                    block_out_channels=widths, layers_per_block=2, latent_channels=16, use_quant_conv=False,
                    use_post_quant_conv=False,
                )  # fmt: skip
            elif model == "Qwen-Image":
                vae = AutoencoderKLQwenImage()
            else:
                narrow = {"FLUX.2": None, "FLUX.2-small-decoder": SMALL_DECODER}[model]
                vae = AutoencoderKLFlux2(block_out_channels=widths, decoder_block_out_channels=narrow)
    finally:
        torch.set_default_dtype(before)
    return vae.eval().requires_grad_(False)


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *arguments, **named: answer


def _filled(shape: torch.Size) -> Any:
    """True everywhere, as nested lists: only questions about whether all is well are answered."""
    return [_filled(shape[1:]) for _ in range(shape[0])] if shape else True


def _addresses() -> Callable[[torch.Tensor], int]:
    """``data_ptr`` of fake tensors: storages lie 1 TiB apart, and each is aligned as PyTorch's allocator aligns."""
    storages: dict[int, int] = {}

    def data_ptr(tensor: torch.Tensor) -> int:
        storage = storages.setdefault(tensor.untyped_storage()._cdata, 1 + len(storages))
        return (storage << 40) + tensor.storage_offset() * tensor.itemsize

    return data_ptr


# -- PyTorch's launches and cuDNN's ------------------------------------------------------------------------------------

_NOTHING = {"empty", "empty_strided", "empty_like", "new_empty", "detach", "lift_fresh", "_unsafe_view"}
"""Operations beside views that launch nothing."""


def _on_card(values: Any) -> bool:
    return any(isinstance(value, FakeTensor) and value.fake_device.type == "cuda" for value in tree_leaves(values))


class _Counted(TorchDispatchMode):
    """Counts what launches, and answers for cuDNN."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, (library, _, name) = kwargs or {}, func.name().split(".")[0].partition("::")
        if name == "cudnn_convolution":
            return self._convolve(*args, **kwargs)
        if name == "_convolution":  # PyTorch takes cuDNN for it, and adds the bias by itself
            return self._convolve_and_add(*args, **kwargs)
        if name == "_local_scalar_dense":
            return True
        result = func(*args, **kwargs)
        if library == "aten" and not func.is_view and name not in _NOTHING and _on_card((args, kwargs, result)):
            self._launches.counts[f"torch {name}"] += 1
        return result

    def _convolve_and_add(
        self, image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any,
        dilation: Any, transposed: bool, output_padding: Any, groups: int, benchmark: bool, deterministic: bool,
        library: bool, allow_tf32: bool,
    ) -> torch.Tensor:  # fmt: skip
        assert (transposed, tuple(output_padding), library) == (False, (0, 0), True)
        if bias is not None:
            self._launches.counts["torch add_"] += 1
        return self._convolve(image, weight, padding, stride, dilation, groups, benchmark, deterministic, allow_tf32)

    def _convolve(
        self, image: torch.Tensor, weight: torch.Tensor, padding: Any, stride: Any, dilation: Any, groups: int,
        benchmark: bool, deterministic: bool, allow_tf32: bool, out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        assert image.dtype == weight.dtype, "cuDNN takes one dtype"
        assert (tuple(dilation), groups, benchmark) == ((1, 1), 1, False)
        (batch, cin, rows, width), (cout, wanted, *kernel) = image.shape, weight.shape
        assert (batch, cin) == (1, wanted)
        size = [
            (length + 2 * pad - taps) // step + 1
            for length, pad, taps, step in zip((rows, width), padding, kernel, stride, strict=True)
        ]
        if out is None:
            out = torch.empty((1, *size, cout), dtype=image.dtype, device=image.device).permute(0, 3, 1, 2)
        assert out.shape == (1, cout, *size)
        assert out.dtype == image.dtype
        for tensor in (image, weight, out):
            assert tensor.is_contiguous(memory_format=torch.channels_last), "or PyTorch makes a copy"
        self._launches.counts["cudnn"] += 1
        convolution = Convolution(
            rows, width, cin, cout, tuple(kernel), tuple(padding), tuple(stride), image.dtype, deterministic, allow_tf32
        )  # fmt: skip
        self._launches.convolutions[convolution] += 1
        return out


# -- the Triton language -----------------------------------------------------------------------------------------------


def _target(card: Card) -> GPUTarget:
    return GPUTarget("cuda", card.capability, 32)


class _Driver(DriverBase):
    """The language's driver for a card: it says what card that is."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self._card = card
        self.device = object()
        """The key under which the language keeps what it compiles. No real card has it, and it is cleared away."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return _target(self._card)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> Any:
        return self.device

    def get_current_stream(self, device: Any) -> int:
        return 0


class _Kernel:
    """In the place of a `CompiledKernel`: it counts launches."""

    function = packed_metadata = None

    def __init__(self, name: str, launches: Launches) -> None:
        self._name, self._launches = name, launches

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self._launches.counts[self._name] += 1

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.run


@contextmanager
def _language(card: Card, launches: Launches, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the language believe in the card, and keep what it wants to compile instead of compiling it."""
    config, functions, driver = triton.runtime.driver, set(), _Driver(card)
    compile_, before = triton.compiler.compile, config._active

    def compile(source: Any, target: Any, options: dict[str, Any], **named: Any) -> _Kernel:
        functions.add(source.fn)
        launches.wanted.append(Wanted(source, options, card))
        return _Kernel(f"triton {source.fn.__name__}", launches)

    patch.setattr(triton.compiler, "compile", compile)
    config.set_active(driver)
    try:
        yield
    finally:
        config._active = before
        for function in functions:
            function.device_caches.pop(driver.device, None)
            function.compile = compile_  # which the function took as it met the card
