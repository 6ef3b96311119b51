"""Who is decoded for next, and how much may wait: the gateway's slots, the line in front of them, and bodies' memory.

A slot is for work: it is taken once a request's body is here and has been checked.
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
BODY_RATE = 64 * 2**10
"""Bytes per second that a body has to arrive with, once `BODY_GRACE_S` is over."""
_NEWEST = 0.2  # the weight of the last request in the pace: about the last five count


def body_deadline(start: float, received: int) -> float:
    """When the next bytes of a body that began at ``start`` must be here, in the same seconds."""
    return start + BODY_GRACE_S + received / BODY_RATE


def retry_after(ahead: int, pace_s: float) -> int:
    """Whole seconds, 1 to 600, until a request behind ``ahead`` others is likely to find room."""
    return max(1, min(600, math.ceil(ahead * pace_s)))


class BodyMemory:
    """Bytes of bodies, from their arrival to their answer; one address may hold half of them.

    Args:
        limit: of all addresses together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: Counter[str] = Counter()

    def take(self, address: str, size: int) -> bool:
        """Whether ``size`` more bytes of this address may be kept; they are then counted until `give_back`."""
        if self._held[address] + size > self._limit // 2 or self._held.total() + size > self._limit:
            return False
        self._held[address] += size
        return True

    def give_back(self, address: str, size: int) -> None:
        """These bytes are gone."""
        self._held[address] -= size
        if not self._held[address]:
            del self._held[address]


class Line:
    """Slots, and a line in front of them that takes its clients in turn.

    Args:
        slots: requests at work at a time.
        max_queue: requests that may wait; 0: none.
    """

    def __init__(self, slots: int, max_queue: int) -> None:
        self._slots = slots
        self._max_queue = max_queue
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._pace_s = 0.0
        self.at_work = 0

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return sum(map(len, self._waiting.values()))

    @contextlib.asynccontextmanager
    async def slot(self, client: str, timeout_s: float) -> AsyncIterator[None]:
        """Hold a slot; leaving the block, however that happens, hands it on.

        Args:
            client: whose turn it is; those of one client are taken in the order in which they came.
            timeout_s: to wait in the line.

        Raises:
            Busy: the line is full, or this request waited too long in it.
        """
        await self._enter(client, timeout_s)
        start, done = time.perf_counter(), False
        try:
            yield
            done = True
        finally:
            if done:  # what failed or was given up says nothing about how long a decode takes
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
        if turn.done():  # its turn came as it left
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
        turns.popleft().set_result(None)  # the slot goes from hand to hand
        if turns:
            self._waiting[client] = turns  # behind the other clients

    def _busy(self, why: str) -> Busy:
        return Busy(f"{why}; try again", retry_after_s=retry_after(self.at_work + self.waiting, self._pace_s))
