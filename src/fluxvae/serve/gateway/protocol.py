"""uvicorn's HTTP protocol with limits of its own, because it has none before a request's headers are complete.

Each connection may send `MAX_HEAD_BYTES` without getting any further (request line, headers, trailers, extensions of
chunks), has `HEAD_SECONDS` for the head of a request, and gives way to others when there are `MAX_CONNECTIONS`.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["HEAD_SECONDS", "MAX_CONNECTIONS", "MAX_HEAD_BYTES", "LimitedProtocol", "first_to_go"]

MAX_HEAD_BYTES = 64 * 2**10
HEAD_SECONDS = 20.0
MAX_CONNECTIONS = 512
_PIECE = 16 * 2**10  # the parser keeps an unfinished header to itself: what it holds is looked at this often
_LINGER_S = 2.0  # a client that still sends reads the answer only if its connection is not reset at once
_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    """Nothing of the next request has come, or its headers are not complete."""
    _silent = 0
    """Bytes since the parser last got anywhere."""
    _head_size = 0
    _refused = False
    made_at = 0.0

    @property
    def receiving(self) -> bool:
        """Whether the client is to send something: closing this connection costs no work that was begun."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body

    @property
    def address(self) -> str:
        """Of the client."""
        return self.client[0] if self.client else ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; where there are too many, one of them goes."""
        self.made_at = self.loop.time()
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > MAX_CONNECTIONS:
            others = sorted((each for each in self.connections if isinstance(each, LimitedProtocol)), key=_age)
            leaving = first_to_go((each.address, each.receiving) for each in others)
            if leaving is not None:
                others[leaving].transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of it."""
        self._head_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client, in pieces between which the limits are looked at."""
        for start in range(0, len(data), _PIECE):
            if self._refused or self.transport.is_closing():
                return
            if self._in_head:
                self._await_head()
            piece = data[start : start + _PIECE]
            self._silent += len(piece)
            super().data_received(piece)
            if self._silent > MAX_HEAD_BYTES:
                self._refuse(431, f"headers: got more than {MAX_HEAD_BYTES} bytes; send fewer or shorter ones")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._head_size = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        if self._counts(len(url)):
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or, behind the body, a trailer: those are counted and dropped."""
        if self._counts(len(name) + len(value) + 4) and self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._head_is_here()
        self._in_head, self._silent = False, 0
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._silent = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete; another may follow."""
        self._in_head, self._silent = True, 0
        if not self._refused:
            super().on_message_complete()

    def _counts(self, size: int) -> bool:
        self._head_size += size
        if self._head_size > MAX_HEAD_BYTES:
            self._refuse(431, f"headers: got more than {MAX_HEAD_BYTES} bytes; send fewer or shorter ones")
        return not self._refused

    def _await_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_here(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()  # the request before it is still at work, and reading may have been halted for it
        else:
            self._refuse(408, f"headers: they were not complete within {HEAD_SECONDS:g} s")

    def _refuse(self, status: int, message: str) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._head_is_here()
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # an answer in the midst of another would be read as a part of it
            return
        kind = _REASONS[status].title().replace(" ", "")
        body = json.dumps({"error": message, "kind": kind, "request_id": ""}).encode()
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)


def first_to_go(connections: Iterable[tuple[str, bool]]) -> int | None:
    """Which connection makes room for others: of the address that has most, the oldest that only receives.

    Args:
        connections: address, and whether it only receives; the oldest first.

    Returns:
        Its index; None where all are being answered.
    """
    listed = list(connections)
    counts = Counter(address for address, _ in listed)
    receiving = [index for index, (_, receives) in enumerate(listed) if receives]
    return max(receiving, key=lambda index: (counts[listed[index][0]], -index), default=None)


def _age(connection: LimitedProtocol) -> float:
    return connection.made_at
