"""How often one decode asks a GPU to start something, counted on a described card: see `fake_card`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluxvae.engine import graphs
from fluxvae.engine.exact import ExactDecoder

if importlib.util.find_spec("triton") is None:
    pytest.skip("PyTorch brings the Triton language on Linux only", allow_module_level=True)
if importlib.util.find_spec("triton.knobs") is None:
    pytest.skip("the described card is one for triton 3.4 and later", allow_module_level=True)

from fake_card import by_library, fake_vae, faked_card

MOST_LAUNCHES = 1_040
"""At 1024x1024 in bfloat16, in 243 blocks of rows."""


def test_a_decode_of_1024_makes_few_launches() -> None:
    """Kernels of the Triton language, operations of PyTorch and convolutions of cuDNN, at full width and size."""
    blocks = []
    with faked_card(90) as launches:
        decoder = ExactDecoder(fake_vae(torch.bfloat16))
        raw = torch.empty(1, 16, 128, 128, dtype=torch.bfloat16, device="cuda")
        plan = decoder.plan(128, 128)
        assert plan.kernels == "cuda"
        launches.clear()
        image = decoder.decode(raw, progress=lambda done, total: blocks.append((done, total)))
        counts, convolutions = launches.counts.copy(), launches.convolutions.copy()
        assert (image.shape, image.device.type) == ((1, 3, 1024, 1024), "cuda")
        kernels = len(launches.wanted)
        decoder.decode(raw[..., :8, :8].clone())
        assert len(launches.wanted) == kernels, "a small image is computed by the same kernels"
    assert blocks[-1] == (plan.total_blocks, plan.total_blocks)
    print(f"{counts.total()} launches, {plan.total_blocks} blocks: {by_library(counts)}")  # seen with pytest -s
    print(dict(counts.most_common()))
    # What is known of each from the network alone, so that nothing has gone uncounted:
    assert counts["triton _attention"] == 1
    assert counts["cudnn"] == convolutions.total() > plan.total_blocks
    assert counts.total() <= MOST_LAUNCHES


def test_nothing_of_the_described_card_is_left_behind() -> None:
    from triton.runtime import driver

    before, available = driver._active, torch.cuda.get_device_properties
    with faked_card(86):
        assert torch.cuda.get_device_properties("cuda").name == "NVIDIA GeForce RTX 3090"
        assert torch.empty(2, device="cuda").is_cuda
    assert driver._active is before
    assert torch.cuda.get_device_properties is available
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.empty(2, device="cuda")


READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
"""Operations whose answer a program waits for, which a CUDA graph refuses to record."""


class _Recorded(TorchDispatchMode):
    """Refuses what a graph refuses: to wait for the card, and to copy from memory that is not pinned."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if name in READS or (not func.is_view and len({tensor.device.type for tensor in tensors if tensor.dim()}) > 1):
            raise RuntimeError(f"{name} while a graph is recorded")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_decode_can_be_recorded_as_a_graph(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all the CUDA kernels at full widths; `test_cuda_graphs` has the bits, with PyTorch's kernels."""
    recorded: list[int] = []

    def record(launch: Callable[[], None]) -> Callable[[], None]:
        before = launches.counts.total()
        with _Recorded():
            launch()
        recorded.append(launches.counts.total() - before)
        return lambda: None

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr("fluxvae.engine.planned.check_device", lambda device: None)
    with faked_card(90) as launches:
        decoder = ExactDecoder(fake_vae(dtype), cuda_graphs=True)
        raw = torch.empty(3, 16, 64, 48, dtype=dtype, device="cuda")
        plan = decoder.plan(64, 48, 3)
        assert decoder.decode(raw).shape == (3, 3, 512, 384)
        launches.clear()
        decoder.decode(raw)
        assert launches.counts.total() < 20, "two copies and one answer for each image"
    assert len(recorded) == 1
    assert recorded[0] > 300
    assert plan.graph_bytes
    assert plan.graph_bytes < plan.peak_bytes
