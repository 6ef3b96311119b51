"""Every call in our code that makes a tensor states its dtype and device, whose defaults a process may have changed.

Where compiled code is handed the memory of a tensor, and the tensor has another dtype or device than that code takes
it for, the result is a wrong picture without any error, or a crash.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("src", "comfyui", "triton_models", "examples") for path in (ROOT / folder).rglob("*.py")
)

FACTORIES = {function.__name__ for function in _device_constructors()}
"""PyTorch's own list of the functions whose device is the default one where none is named."""

WITHOUT_DTYPE = {"frombuffer": {"dtype"}, "Generator": {"device"}}
"""Of functions that are not among them, what they have a default for."""

LEGACY = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"}
"""Constructors that can be told neither."""


def _wanted(name: str) -> set[str]:
    parts = name.split(".")
    if parts[:2] == ["torch", "nn"] or parts[0] == "nn":
        kind = getattr(torch.nn, parts[-1], None)
        made = inspect.isclass(kind) and issubclass(kind, torch.nn.Module)
        return {"dtype", "device"} & set(inspect.signature(kind).parameters) if made else set()
    if parts[0] != "torch":
        return set()
    if parts[-1] in WITHOUT_DTYPE:
        return WITHOUT_DTYPE[parts[-1]]
    return {"dtype", "device"} if parts[-1] in FACTORIES | LEGACY else set()


def missing(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every call that leaves a dtype or a device to the process."""
    shared = {
        target.id: {key.value for key in of.keys if isinstance(key, ast.Constant)}
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(of := node.value, ast.Dict)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                if alias.name in FACTORIES | LEGACY | set(WITHOUT_DTYPE):
                    yield node.lineno, f"from {node.module} import {alias.name}: call it as torch.{alias.name}"
        if not isinstance(node, ast.Call):
            continue
        wanted = _wanted(ast.unparse(node.func))
        given = {keyword.arg for keyword in node.keywords if keyword.arg}
        for keyword in node.keywords:
            if keyword.arg is None and isinstance(keyword.value, ast.Name):
                given |= shared.get(keyword.value.id, set())
        if wanted - given:
            yield node.lineno, f"{ast.unparse(node)} without {' and '.join(sorted(wanted - given))}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_is_made_with_a_dtype_and_a_device(path: Path) -> None:
    found = [f"{path.name}:{line}: {text}" for line, text in missing(ast.parse(path.read_text(encoding="utf-8")))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "torch.zeros(3)",
        "torch.zeros(3, dtype=torch.float32)",
        "torch.full((2,), 1.0, device='cpu')",
        "torch.tensor([1.0], dtype=torch.float32)",
        "torch.nn.GroupNorm(2, 4)",
        "nn.Conv2d(1, 1, 1, device='cpu')",
        "torch.Tensor(3)",
        "torch.frombuffer(b'1234')",
        "torch.fft.fft_fftfreq(3)",
        "from torch import zeros",
        "M = {'dtype': 1}\ntorch.empty(2, **M)",
        "def f(**options): return torch.empty(2, **options)",
    ],
)
def test_a_call_that_leaves_one_out_is_found(code: str) -> None:
    assert list(missing(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "torch.zeros(3, dtype=torch.float32, device='cpu')",
        "torch.empty_like(x)",
        "x.new_zeros(3)",
        "torch.from_numpy(x)",
        "np.zeros(3)",
        "torch.nn.SiLU()",
        "M = {'dtype': 1, 'device': 2}\ntorch.empty(2, **M)",
    ],
)
def test_a_call_that_leaves_none_out_is_not(code: str) -> None:
    assert not list(missing(ast.parse(code)))
