"""The CUDA kernels, tested without a GPU: run in the Triton language's interpreter.

`test_compiled_resources` compiles them for several cards, `test_gpu_launches` counts their launches.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_models import Shape
from fluxvae.engine.exact import ExactDecoder
from fluxvae.engine.kernels.choose import make_kernels
from fluxvae.engine.kernels.direct import cudnn
from fluxvae.engine.kernels.direct.kernels import TorchKernels
from fluxvae.engine.statistics import FiniteChecks, NonFiniteMap
from fluxvae.errors import InvalidOptionError
from fluxvae.pictures import _as_bytes, postprocess

HERE = Path(__file__).parent

if importlib.util.find_spec("triton") is None:
    pytest.skip("PyTorch brings the Triton language on Linux only", allow_module_level=True)
import triton  # noqa: E402, F401  # where it is there, it must be importable


@pytest.mark.timeout(600)
def test_in_the_interpreter() -> None:
    """`cuda_in_interpreter` in a process of its own, which the interpreter's variable cannot leak out of."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "cuda_in_interpreter.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    assert re.search(r"\d\d passed", child.stdout), child.stdout
    assert "TRITON_INTERPRET" not in os.environ


# -- which kernels where ---------------------------------------------------------------------------------------------


def test_cuda_kernels_on_a_cpu_are_refused() -> None:
    with pytest.raises(
        InvalidOptionError, match="kernels: got 'cuda', but those kernels are for an NVIDIA GPU, not cpu"
    ):
        make_kernels("cuda", torch.device("cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(InvalidOptionError, match="kernels: got 'cuda'"):
            ExactDecoder(Shape().vae(), kernels="cuda")


def test_auto_on_a_gpu_is_cuda_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = torch.device("cuda")
    if not torch.cuda.is_available():
        kernels = make_kernels("auto", gpu)
        assert type(kernels) is TorchKernels
        assert "the CUDA kernels would be faster, but this PyTorch sees no NVIDIA GPU" in kernels.note
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with caplog.at_level("WARNING"):
        assert "this card's compute capability is 7.5" in make_kernels("auto", gpu).note
        assert make_kernels("auto", gpu).name == "torch"
    told = [record.message for record in caplog.records if "7.5" in record.message]
    assert told == [make_kernels("auto", gpu).note], "once"
    with pytest.raises(InvalidOptionError, match=r"kernels: got 'cuda', but this card's compute capability is 7\.5"):
        make_kernels("cuda", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert make_kernels("auto", gpu).name == "cuda"
    assert make_kernels("torch", gpu).name == "torch"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "the Triton language cannot be imported here" in make_kernels("auto", gpu).note


@pytest.mark.parametrize("given", [True, False], ids=["into", "made"])
def test_cudnn_is_called_as_it_is_declared(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator takes these arguments, and nothing but the GPU is missing."""
    monkeypatch.setattr(cudnn, "available", lambda device: True)
    rows, weight = torch.zeros(5, 6, 4), torch.zeros(8, 3, 3, 4).permute(0, 3, 1, 2)
    out = torch.zeros(3, 6, 8) if given else None
    with pytest.raises(NotImplementedError, match="aten::cudnn_convolution.*from the 'CPU' backend"):
        cudnn.convolve(rows, weight, out)
    image = cudnn._image(rows)
    assert image.shape == (1, 4, 5, 6)
    assert image.stride() == (120, 1, 24, 4), "PyTorch sees channels last"


# -- what is not waited for on a GPU ---------------------------------------------------------------------------------


def test_on_a_gpu_the_finite_checks_are_read_at_the_end() -> None:
    checks = FiniteChecks(torch.device("cuda"))  # the values may be anywhere
    checks.require(torch.ones(3), "first")
    checks.require(torch.tensor([1.0, torch.nan]), "second")
    checks.require(torch.tensor([torch.inf]), "third")
    with pytest.raises(NonFiniteMap, match="second"):
        checks.settle()
    checks.settle()  # and are not read twice


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_are_rounded_on_the_device_as_diffusers_rounds_them(dtype: torch.dtype) -> None:
    """Every finite value of half precision; in float32 random ones, every boundary of two bytes and its neighbours."""
    if dtype == torch.float32:
        edges = (torch.arange(-3, 515, dtype=torch.float32) / 2 / 255 - 0.5) * 2
        around = [torch.nextafter(edges, torch.tensor(side)) for side in (-9.0, 9.0)]
        values = torch.cat([edges, *around, torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))])
    else:
        values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[torch.isfinite(values)]
    image = values[: len(values) // 3 * 3].view(3, 1, -1)
    assert np.array_equal(_as_bytes(image).permute(1, 2, 0).numpy(), postprocess(image[None], "uint8")[0])
