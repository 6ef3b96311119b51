"""The gateway's line and what bodies may hold, by themselves, and a burst against the real server."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxvae.serve.gateway.errors import Busy
from fluxvae.serve.gateway.line import BodyMemory, Line, body_deadline, retry_after
from serve.gateways import Gateways, ask

PATH = "/decode?shape=1&shape=1&shape=64&dtype=float32&height=16&width=16&output_type=pt"
HEADERS = {"Content-Type": "tensor/binary"}
BODY = np.random.default_rng(0).standard_normal((1, 1, 64), dtype=np.float32).tobytes()


async def settle() -> None:
    """Let every task run until it waits for something."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_clients_are_taken_in_turn_and_each_in_its_order() -> None:
    async def main() -> list[str]:
        line, order = Line(1, 10), []

        async def one(client: str, name: str) -> None:
            async with line.slot(client, 60):
                order.append(name)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(one(name[0], name)) for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1")]
        await asyncio.gather(*tasks)
        assert (line.at_work, line.waiting) == (0, 0)
        return order

    assert asyncio.run(main()) == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


def test_a_full_line_and_a_passed_deadline_are_busy() -> None:
    async def main() -> None:
        line = Line(1, 1)
        async with line.slot("a", 60):
            waiting = asyncio.create_task(line.slot("a", 0.01).__aenter__())
            await settle()
            with pytest.raises(Busy, match="1 wait"):
                await line.slot("b", 60).__aenter__()
            with pytest.raises(Busy, match="in the line"):
                await waiting
        assert (line.at_work, line.waiting) == (0, 0)

    asyncio.run(main())


@given(st.lists(st.sampled_from(["enter", "cancel", "leave"]), max_size=40))
def test_no_slot_is_lost_whoever_leaves(steps: list[str]) -> None:
    async def main() -> None:
        line = Line(2, 50)
        tasks: list[tuple[asyncio.Task[None], asyncio.Event]] = []

        async def one(end: asyncio.Event) -> None:
            async with line.slot("a", 60):
                await end.wait()

        for number, step in enumerate(steps):
            if step == "enter":
                end = asyncio.Event()
                tasks.append((asyncio.create_task(one(end)), end))
            elif tasks:
                task, end = tasks.pop(number % len(tasks))
                end.set() if step == "leave" else task.cancel()
            if number % 3:
                await settle()
            assert line.at_work <= 2
        for _, end in tasks:
            end.set()
        await asyncio.gather(*(task for task, _ in tasks))
        await settle()
        assert (line.at_work, line.waiting) == (0, 0)

    asyncio.run(main())


def test_when_to_try_again() -> None:
    assert [retry_after(0, 5.0), retry_after(10, 0.25), retry_after(10**6, 9.0)] == [1, 3, 600]


def test_a_body_has_time_for_its_size() -> None:
    assert body_deadline(100, 0) == 110
    assert body_deadline(100, 2**20) == 126


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60)), max_size=40))
def test_bodies_never_hold_more_than_their_share(taken: list[tuple[str, int]]) -> None:
    memory, held = BodyMemory(100), dict.fromkeys("abc", 0)
    for address, size in taken:
        if memory.take(address, size):
            held[address] += size
        assert sum(held.values()) <= 100
        assert max(held.values()) <= 50
    for address, size in held.items():
        memory.give_back(address, size)
    assert memory.take("d", 50)


@pytest.mark.parametrize("slots", [4, 64])
def test_a_burst_is_answered(gateways: Gateways, slots: int) -> None:
    url = gateways.start(max_in_flight=slots)
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda _: ask(url, "POST", PATH, headers=HEADERS, body=BODY), range(200)))
        assert {answer.status for answer in answers} == {200}, [
            answer.body for answer in answers if answer.status != 200
        ][:3]
    assert len({answer.body for answer in answers}) == 1


def test_beyond_the_line_it_says_when_to_come_back(gateways: Gateways) -> None:
    url = gateways.start(max_in_flight=1, max_queue=2)
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: ask(url, "POST", PATH, headers=HEADERS, body=BODY), range(40)))
    refused = [answer for answer in answers if answer.status != 200]
    assert refused
    for answer in refused:
        assert answer.status == 503
        assert json.loads(answer.body)["kind"] == "UnavailableError"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
