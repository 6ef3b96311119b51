"""Asks a fluxvae gateway over HTTP, and stops asking when the user interrupts. Its protocol is in docs/gateway.md."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlencode, urlsplit

from fluxvae.errors import DeadlineExceededError, DecodeCancelled, FluxVAEError, InvalidOptionError, UnavailableError

__all__ = ["Answer", "Server", "split_address"]

_POLL_S = 0.1
"""How long an interruption may go unseen."""
_FULL = 503
_UNAUTHORIZED = 401
_PORTS = 65535


@dataclass(frozen=True)
class Answer:
    """An answer of status 200."""

    headers: Mapping[str, str]
    """By names in lower case."""
    body: bytes


@dataclass(frozen=True)
class Server:
    """Where a gateway is, and what it is told with every request."""

    address: str
    """``http://host:port`` or ``https://host:port``, perhaps with a path behind which a proxy has the gateway."""
    token: str
    """What is sent as ``Authorization: Bearer``; nothing where it is empty."""
    token_variable: str
    """The environment variable that the token was read from, for messages."""
    timeout_s: float
    """The seconds that a request may take, from its beginning to its answer, waiting for a full server included."""

    def ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        cancel: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Send a request and wait for its answer. While the server is full, it is sent again.

        Args:
            query: the parameters; lists are repeated parameters.
            body: bytes, or what has them in one piece, sent as ``tensor/binary``.
            cancel: is asked several times a second; when it returns true, the connection is closed, at which the server
                stops its work.

        Raises:
            DecodeCancelled: ``cancel`` returned true.
            DeadlineExceededError: there was no answer in time.
            UnavailableError: nobody answers there.
            FluxVAEError: the server refused the request or failed; the message has its words.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            status, answer = self._once(method, path, query, body, cancel, deadline)
            if status == http.client.OK:
                return answer
            pause = _seconds(answer.headers.get("retry-after", ""))
            if status != _FULL or pause is None or time.monotonic() + pause >= deadline:
                raise self._error(status, answer)
            until = time.monotonic() + pause
            while time.monotonic() < until:
                if cancel():
                    raise DecodeCancelled("interrupted while waiting for the server")
                time.sleep(min(_POLL_S, pause))

    def _once(
        self, method: str, path: str, query: Mapping[str, Any] | None, body: Any, cancel: Callable[[], bool],
        deadline: float,
    ) -> tuple[int, Answer]:  # fmt: skip
        where = split_address(self.address)
        kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
        connection = kind(where.netloc, timeout=max(deadline - time.monotonic(), _POLL_S))
        target = where.path.rstrip("/") + path + (f"?{urlencode(query, doseq=True)}" if query else "")
        headers = {"Accept": "tensor/binary, application/json"}
        if body is not None:
            headers["Content-Type"] = "tensor/binary"
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"

        future: Future[tuple[int, Answer]] = Future()

        def exchange() -> None:
            try:
                connection.request(method, target, body=body, headers=headers)
                response = connection.getresponse()
                lower = {name.lower(): value for name, value in response.getheaders()}
                future.set_result((response.status, Answer(lower, response.read())))
            except Exception as error:
                future.set_exception(error)

        # Nobody waits for this thread to end, since one that still connects cannot be stopped.
        threading.Thread(target=exchange, name="fluxvae", daemon=True).start()

        try:
            return _wait(future, cancel, deadline)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError(
                    f"server: {self.address} did not answer within {self.timeout_s:g} s; raise the node's timeout, or "
                    "see what the server does"
                ) from error
            raise UnavailableError(
                f"server: no answer from {self.address} ({error}); start it with `fluxvae serve`, or correct the "
                "address"
            ) from error
        finally:
            if connection.sock is not None and not future.done():
                with contextlib.suppress(OSError):  # the server may have closed it at this moment
                    connection.sock.shutdown(2)  # so that the thread ends too, and the server hears of it
            connection.close()

    def _error(self, status: int, answer: Answer) -> FluxVAEError:
        try:
            said = str(json.loads(answer.body)["error"])
        except (ValueError, KeyError, TypeError):
            said = f"it answered {status} in no form that fluxvae's gateway uses; is the address right?"
        if status == _UNAUTHORIZED:
            said += f"; set the environment variable {self.token_variable or 'FLUXVAE_TOKEN'} for ComfyUI to its token"
        kind = UnavailableError if status == _FULL else FluxVAEError
        return kind(f"server: {self.address}: {said}")


def split_address(address: str) -> SplitResult:
    """Return the parts of a gateway's address.

    Raises:
        InvalidOptionError: it is no address of a server, or has a user name, a query or a fragment.
    """
    try:
        parts = urlsplit(address.strip())
        good = parts.scheme in ("http", "https") and parts.hostname and 0 < (parts.port or 1) <= _PORTS
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise InvalidOptionError(f"address: got {address!r}, expected http://host:port or https://host:port")
    if "@" in parts.netloc:
        raise InvalidOptionError(
            "address: got one with a token in it, which ComfyUI would save in every picture; put the token into the "
            "environment variable that token_variable names"
        )
    return parts


def _wait(future: Future[tuple[int, Answer]], cancel: Callable[[], bool], deadline: float) -> tuple[int, Answer]:
    while True:
        if cancel():
            raise DecodeCancelled("interrupted; the connection to the server is closed")
        try:
            return future.result(_POLL_S)
        except NotYet:
            if future.done() or time.monotonic() >= deadline:
                raise TimeoutError from None


def _seconds(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdecimal() else None
