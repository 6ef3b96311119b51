"""Our threads: who takes part, who is woken, and what becomes of errors and of those who come late."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from engine_models import needs_vector_code
from fluxvae import system
from fluxvae.engine.kernels.cpu import counters, threads
from serve.waiting import wait_for

pytestmark = needs_vector_code
SECONDS = 30.0


def meet(workers: int) -> list[int]:
    """Have so many workers meet, each of whom waits for the others; their numbers."""
    barrier, came = threading.Barrier(workers, timeout=SECONDS), []

    def work(worker: int) -> None:
        came.append(worker)
        barrier.wait()

    threads.run(work, workers)
    return sorted(came)


def test_every_worker_takes_part() -> None:
    for workers in (1, 2, 5, 3):
        assert meet(workers) == list(range(workers))
    assert threads._team._work is None, "what is done is not kept"


def test_threads_that_sleep_are_woken() -> None:
    meet(3)
    team = threads._team
    wait_for(lambda: team._asleep == team._size, "all helpers to sleep", SECONDS)
    assert meet(3) == [0, 1, 2]


def test_what_a_helper_raises_is_raised() -> None:
    barrier = threading.Barrier(2, timeout=SECONDS)

    def work(worker: int) -> None:
        barrier.wait()
        if worker == 1:
            raise KeyError("of the helper")

    with pytest.raises(KeyError, match="of the helper"):
        threads.run(work, 2)
    assert meet(2) == [0, 1], "and it goes on helping"


def test_what_the_caller_raises_is_raised_when_its_helpers_are_done() -> None:
    barrier, done = threading.Barrier(2, timeout=SECONDS), threading.Event()

    def work(worker: int) -> None:
        barrier.wait()
        if worker == 0:
            raise KeyError("of the caller")
        counters.changed(np.zeros((1, 8), np.int64), 0, 1_000_000)  # works for some tens of milliseconds
        done.set()

    with pytest.raises(KeyError, match="of the caller"):
        threads.run(work, 2)
    assert done.is_set()


def test_who_comes_late_finds_nothing_to_do() -> None:
    came: list[int] = []
    work = threads._Work(came.append, 2)
    work.take_part()
    work.close()
    work.take_part()
    assert came == [1]


@pytest.mark.parametrize("gives_way", [False, True])
def test_waiting_ends_when_the_counter_is_there(gives_way: bool) -> None:
    shared, seen = np.zeros((2, 8), np.int64), threading.Event()

    def wait() -> None:
        counters.wait(shared, 1, 3, system.give_way() if gives_way else 0)
        seen.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert [counters.advance(shared, 1, 2), seen.is_set()] == [0, False]
    counters.advance(shared, 1, 1)
    assert seen.wait(SECONDS)
    waiting.join()
    assert shared[:, 0].tolist() == [0, 3]


def test_a_change_is_seen_and_looking_ends_without_one() -> None:
    shared = np.zeros((1, 8), np.int64)
    assert counters.changed(shared, 0, 100) == 0
    counters.advance(shared, 0, 7)
    assert counters.changed(shared, 0, 1 << 60) == 7


def test_this_system_lets_a_thread_give_way() -> None:
    assert system.give_way() != 0
