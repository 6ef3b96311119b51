"""What the memory plan allows the server, on real decoders with real limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fluxvae import Decoder, MemoryLimitError, UnavailableError
from fluxvae.engine.exact import ExactDecoder
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.reading import Reading
from fluxvae.latents.request import LatentRequest
from fluxvae.serve.model.decoding import Decoding
from fluxvae.serve.model.jobs import Job
from fluxvae.serve.model.memory import MemoryBudget, compute
from fluxvae.serve.model.metrics import rung_of
from fluxvae.serve.model.outputs import OUTPUTS, make_outputs, output_bytes
from fluxvae.serve.model.requests import Parameters
from fluxvae.system import FreeMemory
from models import random_vae

SIZE = 256
IMAGE = 3 * SIZE * SIZE * 4
MAX_PIXELS = 10**8


def job(rows: int = 1, outputs: tuple[str, ...] = ("images",), size: int = SIZE, index: int = 0) -> Job:
    generator = torch.Generator().manual_seed(index)
    latents = torch.randn(rows, (size // 16) ** 2, 64, generator=generator)
    request = LatentRequest.read(LatentFormat(), latents, Reading(height=size, width=size))
    return Job(index=index, request=request, parameters=Parameters(), outputs=frozenset(outputs))


def limited(limit: int | None) -> Decoder:
    return Decoder(random_vae(), memory_limit=limit)


def decoding(decoder: Decoder) -> Decoding:
    return Decoding(decoder, MAX_PIXELS)


def never() -> bool:
    return False


def test_a_group_grows_as_long_as_its_plan_has_room() -> None:
    alone = limited(1 << 30).plan(SIZE, SIZE).peak_bytes
    decoder = limited(alone + 2 * IMAGE)
    budget = MemoryBudget(decoding(decoder))
    assert budget.fits([job()] * 3)
    assert not budget.fits([job()] * 4)
    for rows in (1, 3):
        assert decoder.plan(SIZE, SIZE, rows).work_ratio == 1, "as cheap as alone"
    assert decoder.plan(SIZE, SIZE, 4).work_ratio > 1 or decoder.plan(SIZE, SIZE, 4).spill_bytes, (
        "and no more than that"
    )


def test_a_group_leaves_room_for_outputs() -> None:
    alone = limited(1 << 30).plan(SIZE, SIZE).peak_bytes
    rows = 2 + alone // IMAGE  # so many that their images and outputs take more than the decode of one
    many = [job(rows, OUTPUTS), job(1)]
    assert MemoryBudget(decoding(limited(alone + (rows + 1) * IMAGE))).fits([job(rows), job(1)])
    assert not MemoryBudget(decoding(limited(alone + (rows + 1) * IMAGE))).fits(many)


def test_pixels_bound_a_group_of_any_engine() -> None:
    for engine in ("exact", "diffusers"):
        budget = MemoryBudget(Decoding(Decoder(random_vae(), engine=engine), 2 * SIZE * SIZE))
        assert budget.fits([job()] * 2)
        assert not budget.fits([job()] * 3)
    assert budget.plan(SIZE, SIZE, 1) is None


def test_outputs_that_cannot_fit_are_refused_by_name() -> None:
    decoder = limited(10 * IMAGE)
    budget = MemoryBudget(decoding(decoder))
    budget.check(job(2))
    with pytest.raises(MemoryLimitError, match=r"2 x 256x256 .* as images, images_encoded, .*send fewer rows"):
        budget.check(job(2, OUTPUTS))
    MemoryBudget(decoding(limited(None))).check(job(2, OUTPUTS))


@pytest.mark.parametrize("names", [*[(name,) for name in OUTPUTS], OUTPUTS], ids=str)
def test_output_bytes_bound_what_is_kept(names: tuple[str, ...]) -> None:
    asked = job(2, names)
    image = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    made = make_outputs(asked, image)
    assert made.keys() == set(names)
    kept = sum(
        sum(map(len, array.ravel())) if array.dtype == object else array.nbytes
        for name, array in made.items()
        if name != "images_raw"  # that output is the image itself
    )
    assert output_bytes(asked.outputs, 2, SIZE, SIZE, 4, 3) >= kept


def test_sizes_are_those_of_the_outputs() -> None:
    """Those of floats and of pixels are known; where files are asked for there is none."""
    asked = job(1, ("images", "images_raw"))
    assert sorted(decoding(limited(None)).sizes(asked)) == [3 * SIZE**2, 12 * SIZE**2]


def test_plans_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = limited(1 << 30)
    budget = MemoryBudget(decoding(decoder))
    first = budget.plan(SIZE, SIZE, 1)
    monkeypatch.setattr(decoder, "plan", lambda *_: pytest.fail("planned again"))
    assert budget.plan(SIZE, SIZE, 1) is first
    assert first is not None
    assert rung_of(first) == "memory"


def test_a_plan_cut_to_what_was_free_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = limited(None)
    budget = MemoryBudget(decoding(decoder))
    first = budget.plan(SIZE, SIZE, 1)
    assert budget.plan(SIZE, SIZE, 1) is first
    free = FreeMemory(first.peak_bytes, "free memory")  # of which nine tenths are taken
    monkeypatch.setattr("fluxvae.engine.planned.available_memory", lambda device: free)
    assert budget.plan(SIZE, SIZE, 1).peak_bytes < first.peak_bytes


class ScarceMemory:
    """Lets a decode run out of memory if its plan needs more than there is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, has: int) -> None:
        self.peaks: list[int] = []
        real = ExactDecoder._run

        def run(engine: ExactDecoder, plan: Any, *rest: Any) -> None:
            self.peaks.append(plan.peak_bytes)
            if plan.peak_bytes > has:
                raise torch.OutOfMemoryError("CUDA out of memory")
            real(engine, plan, *rest)

        monkeypatch.setattr(ExactDecoder, "_run", run)


@pytest.mark.parametrize("limit", [None, 1 << 30])
def test_out_of_memory_is_decoded_on_a_smaller_plan_to_the_same_bits(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = limited(limit)
    expected = compute(decoding(decoder), [job()], never)
    whole = decoder.plan(SIZE, SIZE).peak_bytes
    scarce = ScarceMemory(monkeypatch, int(whole * 0.7))
    assert torch.equal(compute(decoding(decoder), [job()], never), expected)
    assert scarce.peaks[0] == whole
    assert scarce.peaks[-1] <= whole * 0.7
    assert decoder.engine.memory_limit == limit, "only for that decode"


@pytest.mark.parametrize("rows", [1, 2])
def test_out_of_memory_on_every_plan_is_unavailable(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = limited(1 << 30)
    scarce = ScarceMemory(monkeypatch, 0)
    with pytest.raises(UnavailableError, match="ran out with the smallest plan"):
        compute(decoding(decoder), [job(index=index) for index in range(rows)], never)
    assert scarce.peaks == sorted(scarce.peaks, reverse=True)
    assert scarce.peaks[-1] <= decoder.engine.smallest_limit(SIZE // 8, SIZE // 8, rows)


def test_scarce_free_memory_is_unavailable_a_set_limit_is_the_requests_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryLimitError, match="memory_limit: got 1000 bytes"):
        compute(decoding(limited(1000)), [job()], never)
    monkeypatch.setattr("fluxvae.engine.planned.available_memory", lambda device: FreeMemory(1000, "free memory"))
    with pytest.raises(UnavailableError, match="free memory: got 900 bytes.*try again"):
        compute(decoding(limited(None)), [job()], never)


def test_jobs_of_a_group_get_their_own_rows() -> None:
    decoder = limited(None)
    jobs = [job(2, index=1), job(1, index=2)]
    together = compute(decoding(decoder), jobs, never)
    for one, image in zip(jobs, (together[:2], together[2:]), strict=True):
        np.testing.assert_array_equal(image, compute(decoding(decoder), [one], never))
