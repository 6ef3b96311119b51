"""Limits what a connection may do before its request's headers are complete, where uvicorn has no limits.

A connection may send `MAX_HEAD_BYTES` that bring its request no further (request line, headers, trailers, extensions of
chunks), and has `HEAD_SECONDS` for the head of a request: the request line and the headers. Where there are more than
`MAX_CONNECTIONS`, one of them is closed.
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
_PIECE = 16 * 2**10  # bytes between two checks of the limits: the parser reports a header only once it is complete
_LINGER_S = 2.0  # seconds until a refused connection is reset: reset at once, a client that still sends gets no answer
_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


class LimitedProtocol(HttpToolsProtocol):
    """One connection of uvicorn's HTTP server, with the limits of this module."""

    _timer: asyncio.TimerHandle | None = None
    """Runs out when the head of the next request is late; None while no head is awaited."""
    _in_head = True
    """Whether the head of the next request is awaited: none of it has come, or it is not complete."""
    _silent = 0
    """How many bytes have come since the parser last reported a complete head, a part of a body or a whole request."""
    _head_size = 0
    """How many bytes of request line, headers and trailers the parser has reported for the present request."""
    _refused = False
    """Whether the connection was refused, so that nothing else that comes is looked at."""
    made_at = 0.0
    """When the connection was made, by the event loop's clock."""

    @property
    def receiving(self) -> bool:
        """Whether it is the client's turn to send, so that closing the connection wastes no work that was begun."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body

    @property
    def address(self) -> str:
        """The client's IP address; empty where it is not known."""
        return self.client[0] if self.client else ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection. Where that makes too many, close the one that `first_to_go` chooses."""
        self.made_at = self.loop.time()
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > MAX_CONNECTIONS:
            others = sorted((each for each in self.connections if isinstance(each, LimitedProtocol)), key=_age)
            leaving = first_to_go((each.address, each.receiving) for each in others)
            if leaving is not None:
                others[leaving].transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the connection has ended."""
        self._head_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hand the client's bytes to the parser in pieces, and check the limits after each."""
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
        """Is called by the parser when a request begins."""
        self._in_head, self._head_size = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Is called by the parser with a part of the request line."""
        if self._counts(len(url)):
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Is called by the parser with a header, or with a trailer behind the body, which is counted and dropped."""
        if self._counts(len(name) + len(value) + 4) and self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Is called by the parser when the head of a request is complete."""
        self._head_is_here()
        self._in_head, self._silent = False, 0
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Is called by the parser with a part of the body."""
        self._silent = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Is called by the parser when a request is complete. Another may follow on the same connection."""
        self._in_head, self._silent = True, 0
        if not self._refused:
            super().on_message_complete()

    def _counts(self, size: int) -> bool:
        """Count bytes of the head, and return whether the request may go on."""
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
            self._await_head()  # the request before it is still at work, and uvicorn may have paused reading meanwhile
        else:
            self._refuse(408, f"headers: they were not complete within {HEAD_SECONDS:g} s")

    def _refuse(self, status: int, message: str) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._head_is_here()
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # the client would take a second answer for a part of the one that has begun
            return
        kind = _REASONS[status].title().replace(" ", "")
        body = json.dumps({"error": message, "kind": kind, "request_id": ""}).encode()
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)


def first_to_go(connections: Iterable[tuple[str, bool]]) -> int | None:
    """Choose the connection that is closed to make room for others.

    It is the oldest one of the address that has the most, among those that wait for their client.

    Args:
        connections: the address of each, and whether it waits for its client to send; the oldest first.

    Returns:
        Its index. None where all are being answered, and none is closed.
    """
    listed = list(connections)
    counts = Counter(address for address, _ in listed)
    receiving = [index for index, (_, receives) in enumerate(listed) if receives]
    return max(receiving, key=lambda index: (counts[listed[index][0]], -index), default=None)


def _age(connection: LimitedProtocol) -> float:
    return connection.made_at
