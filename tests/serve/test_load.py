"""Many requests at once on the real server: mixed sizes and layouts, a tenth of them bad, a tenth cancelled.

Every request is answered, with its own image or its own error; nothing stays in the queue; memory does not grow.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fluxvae import DecodeCancelled, Decoder, InvalidLatentsError
from fluxvae.client import AsyncClient
from fluxvae.errors import DeadlineExceededError
from fluxvae.serve.triton.server import TritonServer
from serve.client import Serving
from serve.conftest import TRITON_MODELS
from serve.test_server_behaviour import metric
from serve.waiting import wait_for

CONCURRENCY = 8
SIZES = [(16, 64), (64, 16), (32, 32), (32, 48), (48, 32)]  # the first three have the same number of patches
MODEL = "vae_decoder"


@dataclass(frozen=True)
class Case:
    latents: torch.Tensor
    options: dict[str, Any]
    expected: np.ndarray


@pytest.fixture
def own_server(
    tritonserver: None, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path
) -> Iterator[TritonServer]:
    """A server for one test alone, because its memory is measured."""
    repository = tmp_path_factory.mktemp("load")
    (repository / MODEL).symlink_to(TRITON_MODELS / MODEL)
    environment = {"FLUXVAE_CHECKPOINT": str(tiny_checkpoint), "OMP_NUM_THREADS": "1"}
    with TritonServer(repository, open_apis=["shared-memory", "statistics"], env=environment) as server:
        yield server


@pytest.fixture(scope="module")
def cases(library: Decoder) -> list[Case]:
    """Latents that decode to different images, so that a mixed-up answer would be noticed."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for height, width in SIZES:
        for batch in (1, 1, 2):
            latents = torch.randn(batch, height * width // 256, 64, generator=generator)
            size = {"height": height, "width": width}
            made.append(Case(latents, size, library.decode(latents, **size, output_type="uint8")))
    for lh, lw in ((3, 5), (4, 4)):
        latents = torch.randn(1, 16, lh, lw, generator=generator)
        made.append(Case(latents, {}, library.decode(latents, output_type="uint8")))
    return made


async def load(server: TritonServer, cases: list[Case], requests: int, protocol: str, seed: int) -> Counter[str]:
    """Send requests, ``CONCURRENCY`` at a time, and return how many ended in which way. Raises if one ended wrongly."""
    draw = random.Random(seed)
    numbers = iter(range(requests))
    ends: Counter[str] = Counter()

    async def one(client: AsyncClient, number: int) -> str:
        case = draw.choice(cases)
        kind = {0: "bad", 1: "cancelled"}.get(number % 10, "good")
        if kind == "bad":
            with pytest.raises(InvalidLatentsError, match="got nan at index"):
                await client.decode(torch.full_like(case.latents, float("nan")), **case.options, request_id=str(number))
            return "bad"
        decode = client.decode(case.latents, **case.options, output_type="uint8", request_id=str(number))
        task = asyncio.ensure_future(decode)
        if kind == "cancelled":
            await asyncio.wait([task], timeout=draw.uniform(0, 0.1))  # in the queue, in its decode, or already answered
            task.cancel()
        try:
            image = await task
        except (asyncio.CancelledError, DecodeCancelled, DeadlineExceededError):
            assert kind == "cancelled", number
            return "cancelled"
        np.testing.assert_array_equal(image, case.expected)
        return "good"

    async def work(client: AsyncClient) -> None:
        for number in numbers:
            ends[await one(client, number)] += 1

    async with AsyncClient(server.grpc_url, protocol=protocol, timeout_s=120) as client:
        await asyncio.gather(*(work(client) for _ in range(CONCURRENCY)))
    return ends


def resident(server: TritonServer) -> int:
    """How many bytes the server and its models have in memory, with shared memory."""
    assert server.pid is not None
    group = [process for process in psutil.process_iter() if _group(process.pid) == server.pid]
    assert group
    return sum(process.memory_info().rss for process in group)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def shared(server: TritonServer) -> int:
    return sum(region.stat().st_size for region in server.shm_regions())


def run(server: TritonServer, cases: list[Case], requests: int, protocol: str) -> None:
    def bad() -> float:
        return metric(server, "fluxvae_errors_total", model=MODEL, kind="InvalidLatentsError")

    def faults() -> list[float]:
        kinds = ("InternalError", "OutOfMemory")
        return [metric(server, "fluxvae_errors_total", model=MODEL, kind=kind) for kind in kinds]

    before, faults_before = bad(), faults()
    ends = asyncio.run(load(server, cases, requests, protocol, seed=requests))
    assert sum(ends.values()) == requests
    assert ends["bad"] == len(range(0, requests, 10))
    assert ends["good"] >= requests * 8 // 10
    wait_for(lambda: metric(server, "fluxvae_in_flight", model=MODEL) == 0, "the last decode to end")
    assert metric(server, "nv_inference_pending_request_count", model=MODEL) == 0
    assert bad() == before + ends["bad"]
    assert faults() == faults_before, server.log()[-4000:]


@pytest.mark.parametrize("protocol", ["grpc", "shared_memory"])
def test_a_short_load(serving: Serving, cases: list[Case], protocol: str) -> None:
    run(serving.server, cases, 120, protocol)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_2000_requests_at_concurrency_8(own_server: TritonServer, cases: list[Case]) -> None:
    run(own_server, cases, 200, "grpc")  # afterwards allocators and regions have the size that they keep
    memory, regions = resident(own_server), shared(own_server)
    run(own_server, cases, 2000, "grpc")
    assert shared(own_server) == regions
    assert resident(own_server) - memory < 32 << 20
