"""Decides whose request is decoded next and how much may wait: slots, the line in front of them, and bodies' memory.

A request takes a slot only when its body has arrived and has been checked, so that a client that sends slowly holds up
nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator

from fluxvae.serve.gateway.errors import Busy

__all__ = ["BODY_GRACE_S", "BODY_RATE", "BodyMemory", "Line", "body_deadline", "retry_after"]

BODY_GRACE_S = 10.0
"""For how many seconds a body may arrive as slowly as it likes."""
BODY_RATE = 64 * 2**10
"""How many bytes a second of a body have to arrive, on average, once `BODY_GRACE_S` is over."""
_NEWEST = 0.2  # the weight of the newest request in the average of the pace, in which about the last five count


def body_deadline(start: float, received: int) -> float:
    """Return when the next bytes of a body must have arrived.

    Args:
        start: when its request began, in seconds by any clock; the result is by the same.
        received: how many bytes of it have arrived.
    """
    return start + BODY_GRACE_S + received / BODY_RATE


def retry_after(ahead: int, pace_s: float) -> int:
    """Return after how many seconds a request is likely to find room: a whole number from 1 to 600.

    Args:
        ahead: how many requests are before it.
        pace_s: how many seconds pass from the end of one request to the end of the next.
    """
    return max(1, min(600, math.ceil(ahead * pace_s)))


class BodyMemory:
    """Counts the bytes of bodies that the gateway holds, from their arrival to their answer, and limits them.

    Args:
        limit: how many bytes all addresses may hold together. A single address may hold half of them, so that it cannot
            keep out all others.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: Counter[str] = Counter()

    def take(self, address: str, size: int) -> bool:
        """Count ``size`` more bytes for this address, until `give_back`. Return false, and count none, without room."""
        if self._held[address] + size > self._limit // 2 or self._held.total() + size > self._limit:
            return False
        self._held[address] += size
        return True

    def give_back(self, address: str, size: int) -> None:
        """Stop counting ``size`` bytes for this address, because they are no longer held."""
        self._held[address] -= size
        if not self._held[address]:
            del self._held[address]


class Line:
    """Slots for requests at work, and a line in front of them in which clients take turns.

    A slot that becomes free goes to the next client, for one request. So a client with many requests does not keep the
    others waiting.

    Args:
        slots: how many requests may be at work at a time.
        max_queue: how many more may wait in line; with 0 none may.
    """

    def __init__(self, slots: int, max_queue: int) -> None:
        self._slots = slots
        self._max_queue = max_queue
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._pace_s = 0.0
        self.at_work = 0
        """How many requests hold a slot."""

    @property
    def waiting(self) -> int:
        """How many requests wait in line."""
        return sum(map(len, self._waiting.values()))

    @contextlib.asynccontextmanager
    async def slot(self, client: str, timeout_s: float) -> AsyncIterator[None]:
        """Wait for a slot, and hold it for the length of the ``async with`` block, however that ends.

        Args:
            client: who takes turns with the other clients. Requests of one client are served in the order they came.
            timeout_s: how many seconds the request may wait in line.

        Raises:
            Busy: the line is full, or this request waited too long in it.
        """
        await self._enter(client, timeout_s)
        start, done = time.perf_counter(), False
        try:
            yield
            done = True
        finally:
            if done:  # a request that failed or was given up does not tell how long a decode takes
                took = (time.perf_counter() - start) / self.at_work
                self._pace_s = took if not self._pace_s else (1 - _NEWEST) * self._pace_s + _NEWEST * took
            self._leave()

    async def _enter(self, client: str, timeout_s: float) -> None:
        if self.at_work < self._slots:
            self.at_work += 1
            return
        if self.waiting >= self._max_queue:
            raise self._busy(f"{self.at_work} requests are under way and {self.waiting} wait, as many as may")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            done, _ = await asyncio.wait({turn}, timeout=timeout_s)
        except asyncio.CancelledError:
            self._withdraw(client, turn)
            raise
        if not done:
            self._withdraw(client, turn)
            raise self._busy(f"{timeout_s:.3g} s went by in the line of requests")

    def _withdraw(self, client: str, turn: asyncio.Future[None]) -> None:
        if turn.done():  # the request got its slot in the moment in which it left the line
            self._leave()
            return
        self._waiting[client].remove(turn)
        if not self._waiting[client]:
            del self._waiting[client]

    def _leave(self) -> None:
        if not self._waiting:
            self.at_work -= 1
            return
        client, turns = self._waiting.popitem(last=False)
        turns.popleft().set_result(None)  # the slot passes to this request, so as many are at work as before
        if turns:
            self._waiting[client] = turns  # the client's other requests line up behind the other clients

    def _busy(self, why: str) -> Busy:
        return Busy(f"{why}; try again", retry_after_s=retry_after(self.at_work + self.waiting, self._pace_s))
