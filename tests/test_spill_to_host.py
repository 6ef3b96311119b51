"""Feature maps that are kept in host memory, and memory that runs out, tested without a GPU.

The code is the same as on a GPU, with a queue of copies that completes late.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_models import Shape, one_thread
from fluxvae.engine import bounded
from fluxvae.engine.exact import ExactDecoder, OutOfMemoryWarning
from fluxvae.engine.kernels.direct.kernels import TorchKernels
from fluxvae.engine.memory import host_map, spill
from fluxvae.engine.memory.host_map import HostMap
from fluxvae.errors import UnavailableError

pytestmark = pytest.mark.usefixtures("one_thread")

__all__ = ["one_thread"]  # a fixture, found by its name

direct = partial(ExactDecoder, kernels="torch", block_values=3000)
CPU = torch.device("cpu")


class LateCopies:
    """A queue that does nothing until it is waited for, and then only as much as it must.

    A copy that nobody waits for finds its source overwritten, or its destination read before it came.
    """

    def __init__(self) -> None:
        self._queue: list[Callable[[], None]] = []
        self.done = 0

    def start(self, copy: Callable[[], None]) -> int:
        self._queue.append(copy)
        return len(self._queue)

    def wait(self, mark: int) -> None:
        while self.done < mark:
            self._queue[self.done]()
            self.done += 1

    @property
    def waiting(self) -> int:
        return len(self._queue) - self.done


class EagerCopies(LateCopies):
    """A queue that is done at once."""

    def start(self, copy: Callable[[], None]) -> int:
        mark = super().start(copy)
        self.wait(mark)
        return mark


@pytest.fixture(params=[LateCopies, EagerCopies])
def spilled_to_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[HostMap]:
    """Spilled maps are `HostMap`s of small chunks, as on a GPU."""
    made: list[HostMap] = []

    def create(self: spill.Spill, shape: tuple[int, int, int], dtype: torch.dtype) -> HostMap:
        self._copies = self._copies or request.param()
        made.append(HostMap(shape, dtype, CPU, self._copies))
        return made[-1]

    monkeypatch.setattr(spill.Spill, "create", create)
    monkeypatch.setattr(host_map, "_CHUNK_BYTES", 5000)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_host_memory(spilled_to_host: list[HostMap], dtype: torch.dtype) -> None:
    shape = Shape(widths=(16, 32, 32), layers_per_block=2, height=12, width=10, batch=2)
    vae, raw = shape.vae(dtype), shape.latents(dtype)
    free = direct(vae)
    image, low, high = free.decode(raw), free.smallest_limit(12, 10, 2), free.plan(12, 10, 2).peak_bytes
    assert not spilled_to_host
    for step in range(5):
        tight = direct(vae, memory_limit=low + (high - low) * step // 8)
        assert torch.equal(tight.decode(raw), image), tight.plan(12, 10, 2).rungs
    assert len(spilled_to_host) > 10


@given(data=st.data(), height=st.integers(1, 23), block=st.integers(1, 9))
def test_two_readers_and_a_writer_in_place(data: st.DataObject, height: int, block: int) -> None:
    """As a sweep over its own input: a reader with a halo ahead, one beside it, rows written behind both."""
    copies = LateCopies()
    store = HostMap((height, 2, 3), torch.float32, CPU, copies)
    truth = torch.rand(height, 2, 3)
    for start in range(0, height, block):
        rows = truth[start : start + block].clone()
        store.write(start, rows)
        rows.zero_()
    for _ in range(2):
        ahead = 0
        for start in range(0, height, block):
            stop = min(start + block, height)
            need = min(stop + 1, height)
            if need > ahead:
                assert torch.equal(store.read(ahead, need, torch.empty(need - ahead, 2, 3)), truth[ahead:need])
                ahead = need
            if data.draw(st.booleans()):
                assert torch.equal(store.read(start, stop, torch.empty(stop - start, 2, 3)), truth[start:stop])
            if data.draw(st.booleans()):
                truth[start:stop] = torch.rand(stop - start, 2, 3)
                store.write(start, truth[start:stop].clone())
    store.close()
    assert copies.waiting == 0, "buffers are given back when their copies are done"


def test_the_next_rows_are_on_their_way() -> None:
    copies = LateCopies()
    store = HostMap((12, 1, 1), torch.float32, CPU, copies)
    store.write(0, torch.arange(12.0).view(12, 1, 1))
    store.read(0, 4, torch.empty(4, 1, 1))
    assert copies.waiting == 1
    started = len(copies._queue)
    assert store.read(4, 8, torch.empty(4, 1, 1)).flatten().tolist() == [4, 5, 6, 7]
    assert len(copies._queue) == started + 1, "only the ones after these were asked for"


def test_rows_on_their_way_are_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = direct(Shape(height=16, width=16).vae())
    limit = engine.smallest_limit(16, 16)
    plan = direct(Shape(height=16, width=16).vae(), memory_limit=limit).plan(16, 16)
    assert plan.spill_bytes > 0
    monkeypatch.setattr(TorchKernels, "stages_spills", True)
    staged = direct(Shape(height=16, width=16).vae())
    assert staged.smallest_limit(16, 16) > limit
    assert staged.plan(16, 16).peak_bytes == engine.plan(16, 16).peak_bytes, "only of maps that are spilled"


# -- memory that runs out --------------------------------------------------------------------------------------------


def full(monkeypatch: pytest.MonkeyPatch, capacity: int, error: Exception) -> list[int]:
    """No block for an arena above ``capacity`` bytes: what was asked for."""
    asked: list[int] = []

    class Full(bounded.ArenaPool):
        def take(self, nbytes: int) -> torch.Tensor:
            asked.append(nbytes)
            if nbytes > capacity:
                raise error
            return super().take(nbytes)

    monkeypatch.setattr(bounded, "ArenaPool", Full)
    return asked


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]
)
def test_out_of_memory_becomes_a_smaller_plan(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    shape = Shape(height=24, width=24, batch=2)
    vae, raw = shape.vae(), shape.latents()
    free = direct(vae)
    image, plan = free.decode(raw), free.plan(24, 24, 2)
    free.memory_limit = free.smallest_limit(24, 24, 2)
    capacity = (plan.arena_bytes + free.plan(24, 24, 2).arena_bytes) // 2
    asked = full(monkeypatch, capacity, error)
    seen: list[tuple[int, int]] = []
    with pytest.warns(OutOfMemoryWarning, match="cpu ran out of memory with a plan for .*; decoding again within"):
        again = direct(vae).decode(raw, progress=lambda *at: seen.append(at))
    assert torch.equal(again, image)
    assert max(asked) > capacity
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.filterwarnings("ignore::fluxvae.engine.exact.OutOfMemoryWarning")
def test_when_no_smaller_plan_is_left_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape()
    vae = shape.vae()
    smallest = direct(vae).smallest_limit(6, 5)
    full(monkeypatch, 1000, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UnavailableError, match=f"smallest plan for .*, {smallest} bytes"):
        direct(vae).decode(shape.latents())


def test_other_errors_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shape: Any = Shape()
    asked = full(monkeypatch, 1000, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        direct(shape.vae()).decode(shape.latents())
    assert len(asked) == 1
