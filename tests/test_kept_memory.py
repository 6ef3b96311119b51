"""``keep_memory``: the arena stays from one call to the next, with the same bits and within the same limits."""

from __future__ import annotations

import copy
import mmap
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_models import Shape
from engine_peaks import measure
from fluxvae import Decoder, Encoder, install
from fluxvae.engine import planned
from fluxvae.engine.calls import ALIGN
from fluxvae.engine.exact import ExactDecoder, ExactEncoder, OutOfMemoryWarning
from fluxvae.engine.memory import kept, pages
from fluxvae.engine.memory.pages import in_large_pages
from fluxvae.engine.plan import peak_of
from fluxvae.errors import InvalidOptionError
from fluxvae.system import FreeMemory
from fluxvae.verify.tolerances import PEAK_PREDICTION

SHAPE = Shape()
SIZES = ((6, 5), (3, 9), (12, 7), (5, 5))


@pytest.fixture(scope="module")
def vae() -> Any:
    return SHAPE.vae()


def raw(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return Shape(height=height, width=width, batch=batch).latents()


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_same_bits_and_the_same_block(vae: Any, kernels: str) -> None:
    decoder = ExactDecoder(vae, kernels=kernels, keep_memory=True)
    assert decoder._kept.held_bytes == 0
    held = []
    for height, width in (*SIZES, *SIZES):
        given = raw(height, width, 2)
        assert torch.equal(decoder.decode(given), ExactDecoder(vae, kernels=kernels).decode(given))
        plan = decoder.plan(height, width, 2)
        assert decoder._kept.held_bytes >= plan.kept_bytes + ALIGN == plan.arena_bytes + ALIGN
        held.append(decoder._kept.held_bytes)
    largest = max(decoder.plan(*size, 2).kept_bytes for size in SIZES) + ALIGN
    assert held[: len(SIZES)] == sorted(held[: len(SIZES)]), "a block is replaced by a larger one only"
    assert set(held[len(SIZES) :]) == {largest}


def test_a_block_is_handed_out_again(vae: Any) -> None:
    decoder = ExactDecoder(vae, kernels="torch", keep_memory=True)
    decoder.decode(raw(6, 5))
    block = decoder._kept.take(1)
    decoder.decode(raw(6, 5))
    assert decoder._kept.take(1).data_ptr() == block.data_ptr()


def test_encodes_too() -> None:
    half, pixels = SHAPE.vae(encoder=True), SHAPE.pixels()
    encoder = ExactEncoder(half, kernels="torch", keep_memory=True)
    for _ in range(2):
        assert torch.equal(encoder.encode(pixels), ExactEncoder(half, kernels="torch").encode(pixels))
    assert encoder._kept.held_bytes == encoder.plan(*pixels.shape[2:]).kept_bytes + ALIGN


@settings(max_examples=8)
@given(st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from((0.0, 0.3, 1.0))), min_size=2, max_size=6))
def test_no_limit_is_exceeded_by_what_is_kept(calls: list[tuple[tuple[int, int], float]]) -> None:
    """Whatever sizes came before, and whatever their limits were."""
    network = SHAPE.vae()
    decoder = ExactDecoder(network, kernels="torch", keep_memory=True)
    for (height, width), part in calls:
        decoder.memory_limit = None
        low, high = decoder.smallest_limit(height, width), decoder.plan(height, width).peak_bytes
        decoder.memory_limit = limit = int(low + part * (high - low))
        plan = decoder.plan(height, width)
        image = decoder.decode(raw(height, width))
        assert decoder._kept.held_bytes - ALIGN + plan.peak_bytes - plan.arena_bytes <= limit
        assert torch.equal(image, ExactDecoder(network, kernels="torch").decode(raw(height, width)))


def test_the_peak_of_two_calls_is_what_was_predicted() -> None:
    wide = {
        "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [64, 64], "layers_per_block": 1,
        "latent_channels": 16, "norm_num_groups": 32, "use_quant_conv": False, "use_post_quant_conv": False,
    }  # fmt: skip
    cases = [{"size": [120, 80]}, {"size": [80, 120], "fraction": 0.5}]
    job = {"vae": wide, "kernels": "auto", "threads": 1, "keep_memory": True, "cases": cases}
    for row in measure(job):
        assert row["measured"] <= row["predicted"], row
        assert row["measured"] + row["runtime"] >= (1 - PEAK_PREDICTION.bound) * row["predicted"], row


def test_the_plan_says_what_is_kept(vae: Any) -> None:
    usual, keeping = ExactDecoder(vae).plan(6, 5), ExactDecoder(vae, keep_memory=True).plan(6, 5)
    assert usual.kept_bytes == 0
    assert "between calls" not in str(usual)
    assert "memory: keeps " in str(keeping)
    assert keeping.kept_bytes == keeping.arena_bytes == usual.arena_bytes
    assert usual.peak_bytes <= keeping.peak_bytes
    assert keeping.peak_bytes == keeping.fixed_bytes + peak_of(keeping.layers, at_once=True), "nothing of it is new"


def test_what_is_kept_counts_as_free(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a decoder that keeps half of what is free would plan its next call for the other half."""
    monkeypatch.setattr(planned, "available_memory", lambda device: FreeMemory(40_000_000, "free memory"))
    decoder = ExactDecoder(vae, kernels="torch", keep_memory=True)
    assert decoder.limit()[0] == 36_000_000
    decoder.decode(raw(6, 5))
    assert decoder.limit()[0] == (40_000_000 + decoder._kept.held_bytes) * 9 // 10


@pytest.mark.parametrize("copied", [copy.copy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_keeps_its_own(vae: Any, copied: Any) -> None:
    decoder = ExactDecoder(vae, kernels="torch", keep_memory=True)
    image = decoder.decode(raw(6, 5))
    other = copied(decoder)
    assert other._kept.held_bytes == 0
    assert torch.equal(other.decode(raw(6, 5)), image)
    assert other._kept.take(1).data_ptr() != decoder._kept.take(1).data_ptr()


def test_preparing_keeps_nothing(vae: Any) -> None:
    decoder = ExactDecoder(vae, kernels="torch", keep_memory=True)
    decoder.prepare()
    assert decoder._kept.held_bytes == 0


def test_what_is_kept_is_given_back_when_memory_runs_out(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given, decoder = raw(24, 24), ExactDecoder(vae, kernels="torch", keep_memory=True)
    decoder.decode(raw(6, 5))
    take, held = kept.KeptMemory.take, []

    def full(self: kept.KeptMemory, nbytes: int) -> torch.Tensor:
        held.append(self.held_bytes)
        if len(held) == 1:
            raise MemoryError("cannot allocate")
        return take(self, nbytes)

    monkeypatch.setattr(kept.KeptMemory, "take", full)
    with pytest.warns(OutOfMemoryWarning, match="MemoryError: cannot allocate"):
        image = decoder.decode(given)
    assert held[1] == 0, "the second attempt begins with nothing"
    assert torch.equal(image, ExactDecoder(vae, kernels="torch").decode(given))


# -- who may ask for it ------------------------------------------------------------------------------------------------


def test_every_door_takes_it() -> None:
    both = SHAPE.vae()
    assert Decoder(both, keep_memory=True).engine._keeps
    assert Encoder(SHAPE.vae(encoder=True), keep_memory=True).engine._keeps
    handle = install(both, keep_memory=True)
    both.decode(SHAPE.latents())
    assert handle.decoder is not None
    assert handle.decoder._kept.held_bytes > 0
    handle.remove()


def test_only_the_exact_engine_takes_it(vae: Any) -> None:
    with pytest.raises(InvalidOptionError, match="keep_memory: got True with engine='diffusers'"):
        Decoder(vae, engine="diffusers", keep_memory=True)


def test_a_gpu_is_refused(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "keep_memory: got True with a model on cuda:0; expected one on a CPU"
    with pytest.raises(InvalidOptionError, match=message):
        kept.check_device(torch.device("cuda", 0))
    decoder = ExactDecoder(vae, keep_memory=True)
    with pytest.raises(InvalidOptionError, match=message):  # a model that was moved there since
        decoder._kernels(torch.device("cuda", 0))
    elsewhere = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(planned, "parameters", lambda record: (elsewhere, None))
    with pytest.raises(InvalidOptionError, match=message):
        ExactDecoder(vae, keep_memory=True)


# -- memory in large pages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, 4096, (2 << 20) - 1, 2 << 20, 5_000_001])
def test_memory_in_large_pages(nbytes: int) -> None:
    block = in_large_pages(nbytes)
    if block is None:
        assert not hasattr(mmap, "MADV_HUGEPAGE")
        return
    array = np.frombuffer(block, np.uint8)
    assert array.nbytes == nbytes
    assert array.ctypes.data % (2 << 20) == 0
    assert not array.any()
    array[:] = 7
    assert int(array.sum(dtype=np.int64)) == 7 * nbytes


def test_more_than_there_is() -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with pytest.raises(MemoryError, match=f"cannot allocate {1 << 60} bytes"):
            in_large_pages(1 << 60)


def test_a_system_without_large_pages(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE", raising=False)
    assert in_large_pages(4096) is None
    decoder = ExactDecoder(vae, kernels="torch", keep_memory=True)
    assert torch.equal(decoder.decode(raw(6, 5)), decoder.decode(raw(6, 5)))
    assert decoder._kept.held_bytes == decoder.plan(6, 5).kept_bytes + ALIGN
