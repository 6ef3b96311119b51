"""The Triton model's logic without Triton: which requests are decoded together, and who gets which answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from family_models import flux2_vae, ids_of
from fluxvae import DecodeCancelled, Decoder, FluxVAEError, InvalidLatentsError, InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.reading import Reading
from fluxvae.latents.request import LatentRequest
from fluxvae.serve.model.answering import answer, code_of, group
from fluxvae.serve.model.decoding import Decoding
from fluxvae.serve.model.jobs import Job
from fluxvae.serve.model.memory import compute
from fluxvae.serve.model.requests import Parameters, read_job, read_parameters

FLUX2 = LatentFormat.from_vae(flux2_vae())
SIZES = [(16, 64), (64, 16), (32, 32), (32, 16)]  # the first three have the same number of patches


def job(index: int, height: int, width: int, batch: int = 1, ids: torch.Tensor | None = None, **said: Any) -> Job:
    """A job whose latents carry its index in every value."""
    format = LatentFormat() if ids is None and "batch_norm_eps" not in said else FLUX2
    latents = torch.full((batch, height * width // 256, format.packed_features), float(index))
    reading = Reading(height=height, width=width, latent_ids=ids, **said)
    request = LatentRequest.read(format, latents, reading)
    return Job(index=index, request=request, parameters=Parameters(), outputs=frozenset({"images"}))


def within(max_pixels: int) -> Callable[[Sequence[Job]], bool]:
    return lambda jobs: sum(job.request.pixels for job in jobs) <= max_pixels


def asked(job: Job) -> tuple[object, ...]:
    """Everything that two jobs must have in common to share a decode."""
    reading = job.request.reading
    return (job.request.height, job.request.width, reading.scaling_factor, reading.shift_factor)


def paint(index: float, scaling_factor: float | None, shift_factor: float | None) -> float:
    """A colour that depends on the job and on the factors with which it was decoded."""
    return index + (0 if scaling_factor is None else 100) + (0 if shift_factor is None else 200)


@st.composite
def job_lists(draw: st.DrawFn) -> list[Job]:
    specs = draw(
        st.lists(
            st.tuples(
                st.sampled_from(SIZES), st.integers(1, 4), st.sampled_from([None, 0.5]), st.sampled_from([None, 0])
            ),
            max_size=12,
        )
    )
    return [
        job(index, *size, batch, scaling_factor=scaling, shift_factor=shift)
        for index, (size, batch, scaling, shift) in enumerate(specs)
    ]


@settings(max_examples=200)
@given(jobs=job_lists(), max_pixels=st.integers(1, 16 * 1024))
def test_groups_hold_every_job_once_in_order_and_within_the_budget(jobs: list[Job], max_pixels: int) -> None:
    groups = group(jobs, within(max_pixels))

    assert sorted(member.index for members in groups for member in members) == list(range(len(jobs)))
    for members in groups:
        assert members
        assert len({asked(member) for member in members}) == 1
        assert [member.index for member in members] == sorted(member.index for member in members)
        assert len(members) == 1 or sum(member.request.pixels for member in members) <= max_pixels
    for same in {asked(member) for member in jobs}:  # of those that may share a decode, an earlier one is never later
        order = [member.index for members in groups if asked(members[0]) == same for member in members]
        assert order == sorted(order)


def test_same_patch_count_is_not_the_same_group() -> None:
    groups = group([job(0, 16, 64), job(1, 64, 16), job(2, 16, 64)], within(10**6))
    assert [[member.index for member in members] for members in groups] == [[0, 2], [1]]


def test_what_changes_the_picture_of_flux2_is_not_decoded_together() -> None:
    ids = ids_of(2, 2, 1)
    jobs = [
        job(0, 32, 32, raw=False),
        job(1, 32, 32, batch_norm_eps=1e-5, raw=False),
        job(2, 32, 32, raw=True),
        job(3, 32, 32, ids=ids),
        job(4, 32, 32, ids=ids.flip(1)),
        job(5, 32, 32, batch_norm_eps=1e-5, raw=False, feature_order="row_column_channel"),
    ]
    groups = group([*jobs, jobs[0]], within(10**6))
    assert [[member.index for member in members] for members in groups] == [[0, 0], [1], [2], [3, 4], [5]]


def test_layouts_are_not_the_same_group() -> None:
    packed = job(0, 32, 32)
    images = LatentRequest.read(LatentFormat(), torch.zeros(1, 16, 4, 4), Reading())
    unpacked = replace(packed, request=images)
    assert [len(members) for members in group([packed, unpacked, packed], within(10**6))] == [2, 1]


@pytest.mark.parametrize("during", [False, True], ids=["before", "during"])
def test_one_of_a_group_that_is_cancelled_gets_no_image_and_the_other_does(during: bool) -> None:
    """A job cancelled before the shared decode is left out of it; later the decode goes on for the other one."""
    rows: list[int] = []
    gone: set[int] = set() if during else {0}

    def decode(jobs: Sequence[Job], cancel: Callable[[], bool]) -> torch.Tensor:
        gone.add(0)
        assert not cancel()
        rows.append(sum(job.request.batch for job in jobs))
        return torch.zeros(rows[-1], 3, 16, 16)

    answers: dict[int, torch.Tensor | Exception] = {}
    answer(
        decode,
        [job(0, 16, 16), job(1, 16, 16)],
        lambda job, outcome: answers.update({job.index: outcome}),
        fits=within(10**6),
        cancelled=lambda job: job.index in gone,
    )
    assert isinstance(answers[0], DecodeCancelled)
    assert isinstance(answers[1], torch.Tensor)
    assert rows == [2 if during else 1]


class FakeDecoder:
    """Decodes each job to a colour of its own, and fails for every batch with a job that is poisonous."""

    def __init__(self, poison: set[int]) -> None:
        self.poison = poison
        self.memory_limit = None
        self.approximate = False

    def decode_request(self, request: LatentRequest, *, cancel: Callable[[], bool]) -> torch.Tensor:
        assert request.latents.shape[1] * 256 == request.height * request.width
        if cancel():
            raise DecodeCancelled("cancelled")
        values = request.latents[:, 0, 0]
        if self.poison & {int(value) for value in values}:
            raise RuntimeError("boom")
        colours = values + paint(0, request.reading.scaling_factor, request.reading.shift_factor)
        return colours.reshape(-1, 1, 1, 1).expand(-1, 3, request.height, request.width)


@settings(max_examples=200)
@given(jobs=job_lists(), data=st.data(), max_pixels=st.integers(1, 16 * 1024))
def test_every_job_is_answered_once_with_its_own_image(jobs: list[Job], data: st.DataObject, max_pixels: int) -> None:
    indices = st.sets(st.integers(0, max(0, len(jobs) - 1)))
    poison, gone = data.draw(indices), data.draw(indices)
    answers: dict[int, torch.Tensor | Exception] = {}

    def deliver(job: Job, outcome: torch.Tensor | Exception) -> None:
        assert job.index not in answers
        answers[job.index] = outcome

    answer(
        partial(compute, Decoding(FakeDecoder(poison), 10**6)),
        jobs,
        deliver,
        fits=within(max_pixels),
        cancelled=lambda job: job.index in gone,
    )

    assert answers.keys() == {job.index for job in jobs}
    for job in jobs:
        outcome = answers[job.index]
        if job.index in gone:
            assert isinstance(outcome, DecodeCancelled)
        elif job.index in poison:
            assert isinstance(outcome, RuntimeError)
        else:
            assert isinstance(outcome, torch.Tensor)
            request = job.request
            assert outcome.shape == (request.batch, 3, request.height, request.width)
            assert (outcome == paint(job.index, request.reading.scaling_factor, request.reading.shift_factor)).all()


def test_the_decode_goes_on_while_one_of_its_requests_is_wanted() -> None:
    asked: list[bool] = []

    class Slow(FakeDecoder):
        def decode_request(self, request: LatentRequest, *, cancel: Callable[[], bool]) -> torch.Tensor:
            gone.add(0)
            asked.append(cancel())
            gone.add(1)
            asked.append(cancel())
            return torch.zeros(request.batch, 3, 16, 16)

    gone: set[int] = set()
    answer(
        partial(compute, Decoding(Slow(set()), 10**6)),
        [job(0, 16, 16), job(1, 16, 16)],
        lambda job, outcome: None,
        fits=within(10**6),
        cancelled=lambda job: job.index in gone,
    )
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("given_parameters", "expected"),
    [
        ({}, Parameters()),
        ({"format": "jpeg", "quality": 80}, Parameters(format="jpeg", quality=80)),
        ({"scaling_factor": 1, "shift_factor": 0}, Parameters(reading=Reading(scaling_factor=1.0, shift_factor=0.0))),
        ({"priority": 1, "timeout": 5, "triton_enable_empty_final_response": True}, Parameters()),
    ],
)
def test_parameters(given_parameters: dict[str, object], expected: Parameters) -> None:
    assert read_parameters(json.dumps(given_parameters)) == expected


def test_no_parameters() -> None:
    assert read_parameters("") == Parameters()


@pytest.mark.parametrize(
    ("given_parameters", "message"),
    [
        ({"colour": "red"}, r"parameter 'colour': unknown, expected one of format, quality, scaling_factor, shift_"),
        ({"format": "bmp"}, r"format: got 'bmp', expected one of png, jpeg, webp"),
        ({"format": 3}, r"format: got 3, expected one of png, jpeg, webp"),
        ({"format": "jpeg", "quality": "high"}, r"quality: got 'high', expected a whole number from 1 to 100"),
        ({"format": "jpeg", "quality": True}, r"quality: got True"),
        ({"format": "webp", "quality": 0}, r"quality: got 0"),
        ({"quality": 90}, r"quality: got 90 with format png"),
        ({"scaling_factor": 0}, r"scaling_factor: got 0"),
        ({"scaling_factor": "0.5"}, r"scaling_factor: got '0.5', expected a finite number"),
        ({"scaling_factor": True}, r"scaling_factor: got True"),
        ({"shift_factor": float("nan")}, r"shift_factor: got nan"),
        ({"shift_factor": None}, r"shift_factor: got None"),
        ({"layout": "tiled"}, r"layout: got 'tiled', expected one of packed, unpacked"),
    ],
)
def test_parameters_refused(given_parameters: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        read_parameters(json.dumps(given_parameters))


def read(decoder: Decoder, latents: np.ndarray, heights: object, widths: object, max_pixels: int = 4096) -> Job:
    column = (len(latents), 1)
    return read_job(
        3,
        latents,
        np.broadcast_to(np.array(heights, np.int32).reshape(-1, 1), column),
        np.broadcast_to(np.array(widths, np.int32).reshape(-1, 1), column),
        "{}",
        decoder=decoder,
        max_pixels=max_pixels,
    )


def test_a_job_has_the_size_that_is_decoded(decoder: Decoder) -> None:
    with pytest.warns(UserWarning, match="decoding 32x16"):
        found = read(decoder, np.zeros((2, 2, 64), np.float32), 40, 31)
    assert (found.index, found.request.height, found.request.width) == (3, 32, 16)
    assert found.request.pixels == 2 * 32 * 16


@pytest.mark.parametrize(
    ("batch", "heights", "widths", "message"),
    [
        (2, [32, 16], 16, r"height: got \[16, 32\] in one request"),
        (2, 16, [32, 16], r"width: got \[16, 32\] in one request"),
        (1, 2**31 - 1, 2**31 - 1, r"pixels, more than the 4096 this server allows in one request"),
        (2, 32, 80, r"2 x 32x80 \(batch x height x width\) = 5120 pixels"),
        (1, 0, 32, r"height: got 0, expected a positive number"),
        (1, -32, -32, r"height: got -32, expected a positive number"),
        (1, 32, 32, r"a grid of 2 x 2 = 4 patches of 16 pixels, but the latents hold 2"),
    ],
)
def test_a_job_refused(decoder: Decoder, batch: int, heights: object, widths: object, message: str) -> None:
    with pytest.raises(InvalidLatentsError, match=message):
        read(decoder, np.zeros((batch, 2, 64), np.float32), heights, widths)


@pytest.mark.parametrize(
    ("shape", "size", "layout"),
    [
        ((16, 2, 64), (16, 512), "packed"),
        ((16, 2, 6), (16, 48), "packed"),
        ((16, 1, 6), (16, 24), "unpacked"),
    ],
    ids=["ambiguous without its size", "by its channels", "one frame"],
)
def test_rows_that_are_the_channels_of_one_image_are_refused(
    decoder: Decoder, shape: tuple[int, ...], size: tuple[int, int], layout: str
) -> None:
    """The library reads these shapes as one image. The model does not: its first dimension is always the batch."""
    column = (shape[0], 1)
    with pytest.raises(
        InvalidLatentsError, match=r"one image \(1, 16, .*send it as \(1, 16, \d+\) with layout unpacked"
    ):
        read_job(
            0,
            np.zeros(shape, np.float32),
            np.full(column, size[0], np.int32),
            np.full(column, size[1], np.int32),
            json.dumps({"layout": layout}),
            decoder=decoder,
            max_pixels=10**6,
        )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidLatentsError("x"), "INVALID_ARG"),
        (InvalidOptionError("x"), "INVALID_ARG"),
        (DecodeCancelled("x"), "CANCELLED"),
        (FluxVAEError("x"), "INTERNAL"),
        (ZeroDivisionError("x"), "INTERNAL"),
        (MemoryError(), "UNAVAILABLE"),
        (torch.OutOfMemoryError("CUDA out of memory"), "UNAVAILABLE"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "UNAVAILABLE"),
    ],
)
def test_codes(error: Exception, code: str) -> None:
    assert code_of(error) == code
