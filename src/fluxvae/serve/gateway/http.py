"""Does what every request to the gateway needs: an id, the checks of host and token, a log line, counting and timing.

`OuterLayer` is a plain ASGI wrapper instead of Starlette's ``BaseHTTPMiddleware``, because that one hides from the app
that a client has disconnected.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxvae.errors import InvalidOptionError, UnavailableError
from fluxvae.serve.gateway.body import media_type
from fluxvae.serve.gateway.errors import (
    Busy,
    Forbidden,
    GatewayError,
    Misdirected,
    Unauthorized,
    error_body,
    http_status,
)
from fluxvae.serve.gateway.hosts import may_call, may_send

__all__ = ["CLIENT_GONE", "GatewayMetrics", "OuterLayer", "error_response", "request_id_of", "sent_token"]

_log = logging.getLogger("fluxvae.gateway")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
CLIENT_GONE = 499
"""The status in log and metrics of a request whose client disconnected, so that nobody reads the answer."""


class GatewayMetrics:
    """The gateway's own Prometheus metrics, beside those of Triton and of the model."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fluxvae_gateway_requests", "Requests answered", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "fluxvae_gateway_request_seconds",
            "From a request's first byte to its answer's last",
            ["path"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
            registry=self.registry,
        )
        self.in_flight = Gauge("fluxvae_gateway_in_flight", "Decodes and encodes under way", registry=self.registry)
        self.waiting = Gauge("fluxvae_gateway_waiting", "Requests that wait in line", registry=self.registry)
        self.received = Counter(
            "fluxvae_gateway_received_bytes", "Bytes of latents and pictures that arrived", registry=self.registry
        )
        self.triton_up = Gauge(
            "fluxvae_gateway_triton_metrics_up", "1 if Triton's own metrics follow", registry=self.registry
        )


class OuterLayer:
    """The outermost layer of the gateway: it refuses who may not enter, gives requests ids, and logs and counts them.

    Args:
        app: the rest of the gateway.
        token: the token that a client must send; None lets everyone in.
        allowed_hosts: the host names by which requests may call the gateway besides loopback's; None: any.
        open_paths: the paths that need no token.
        known_paths: the paths that metrics have labels for. All others share one label, because a scanner would
            otherwise make a new one with every path that it tries.
        ask_for_token: makes the page that a browser gets instead of ``/`` when it sends no token.
        metrics: the metrics to count in.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        allowed_hosts: frozenset[str] | None,
        open_paths: frozenset[str],
        known_paths: frozenset[str],
        ask_for_token: Callable[[], Response],
        metrics: GatewayMetrics,
    ) -> None:
        self._app = app
        # Python holds what is not UTF-8 in the environment as surrogates; this turns them back into the same bytes.
        self._token = token.encode("utf-8", "surrogateescape") if token is not None else None
        self._allowed_hosts = allowed_hosts
        self._open_paths = open_paths
        self._known_paths = known_paths
        self._ask_for_token = ask_for_token
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id")
        request_id = given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:16]
        scope.setdefault("state", {})["request_id"] = request_id
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-ID"] = request_id
                answer["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            app: ASGIApp = self._app
            if (foreign := self._foreign(scope, headers)) is not None:
                app = error_response(foreign, request_id)
            elif not self._may_enter(scope, headers):
                app = self._refuse(scope, headers)
            elif given is not None and given != request_id:
                app = error_response(
                    InvalidOptionError(
                        f"X-Request-ID: got {given[:80]!r}, expected 1 to 128 visible ASCII characters; or leave it out"
                    ),
                    request_id,
                )
            await app(scope, receive, send_with_id)
        except Exception:  # the app has answered it with a 500 and raised it again, so it is only logged here
            _log.exception("request %s failed", request_id)
        finally:
            path = scope["path"] if scope["path"] in self._known_paths else "other"
            seconds = time.perf_counter() - start
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(seconds)
            level = logging.DEBUG if path in self._open_paths else logging.INFO
            _log.log(level, "%s %s %s %.1f ms %s", scope["method"], path, status, seconds * 1e3, request_id)

    def _foreign(self, scope: Scope, headers: Headers) -> GatewayError | None:
        """Return the error for a request that a web page of another origin may have sent; None where it may enter.

        A browser lets a page of any origin send a body without a Content-Type, and asks nobody first. Such a body may
        be a picture for ``/encode``, so whatever the gateway is bound to, it is taken only from programs and from pages
        that may send here.
        """
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if self._allowed_hosts is not None and not may_call(hosts, self._allowed_hosts):
            return Misdirected(
                f"Host: got {', '.join(hosts)[:80]!r}, but this gateway answers to loopback's names only, so that no "
                "web page can pass for it; start it with --allowed-host NAME, or with a token, to use another name"
            )
        typeless = not media_type(headers.get("content-type", ""))
        if scope["method"] in ("GET", "HEAD") or (self._allowed_hosts is None and not typeless):
            return None
        if not may_send(origins, hosts, self._allowed_hosts or frozenset()):
            return Forbidden(
                f"Origin: got {', '.join(origins)[:80]!r}, a page of another origin, which may send nothing here; "
                "start the gateway with --allowed-host NAME to let that host's pages send"
            )
        site = headers.get("sec-fetch-site", "").strip().lower()
        if typeless and not origins and site in ("cross-site", "same-site"):
            return Forbidden(
                f"Sec-Fetch-Site: got {site!r} without an Origin and a Content-Type: a page of another origin, which "
                "may send nothing here"
            )
        return None

    def _may_enter(self, scope: Scope, headers: Headers) -> bool:
        if self._token is None or scope["path"] in self._open_paths:
            return True
        sent = headers.get("authorization", "").encode("latin-1")  # Starlette reads every header as latin-1
        return hmac.compare_digest(sent_token(sent), self._token)

    def _refuse(self, scope: Scope, headers: Headers) -> ASGIApp:
        if scope["method"] == "GET" and scope["path"] == "/" and "text/html" in headers.get("accept", ""):
            return self._ask_for_token()
        error = Unauthorized(
            "Authorization: got no token, or a wrong one; send 'Authorization: Bearer TOKEN', or, where a client takes "
            "only an address, http://any:TOKEN@host/"
        )
        return error_response(error, scope["state"]["request_id"])


def sent_token(authorization: bytes) -> bytes:
    """Return the token in an ``Authorization`` header, or nothing where it holds none.

    It is what follows ``Bearer``, or the password of Basic authentication, which is what clients make of a token in an
    address (``http://any:TOKEN@host/``).

    Args:
        authorization: the header's value. It is bytes, because letters beyond ASCII arrive in UTF-8 (RFC 7617), and a
            text would depend on how the header was decoded.
    """
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def request_id_of(request: Request) -> str:
    """Return the id of a request: the one that the client sent, or else the one that `OuterLayer` made."""
    return str(request.scope["state"]["request_id"])


def error_response(error: Exception, request_id: str) -> JSONResponse:
    """Return the answer to a request that failed: the error as JSON, with the status and headers that belong to it."""
    headers: dict[str, Any] = dict(error.headers) if isinstance(error, GatewayError) else {}
    if isinstance(error, UnavailableError):
        headers["Retry-After"] = str(error.retry_after_s) if isinstance(error, Busy) else "1"
    kind = UnavailableError if isinstance(error, Busy) else type(error)
    body = error_body(kind.__name__, str(error), request_id)
    return JSONResponse(body, http_status(error), headers)
