"""Gateways for these tests: real uvicorn servers on loopback in front of the shared Triton, all on one event loop."""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from fluxvae.serve.gateway.app import GatewaySettings, make_app
from fluxvae.serve.gateway.protocol import LimitedProtocol

TIMEOUT_S = 100.0
DRAIN_S = 30
"""How many seconds requests under way get to finish when a gateway is stopped, as in ``fluxvae.serve.gateway``."""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer that was read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float


@dataclass
class Gateways:
    """Starts gateways; `stop` ends them all."""

    grpc_url: str
    metrics_url: str
    config_key: str
    _servers: dict[str, uvicorn.Server] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # All gateways share one event loop, because gRPC's asyncio works with only one in a process.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateways", daemon=True)
        self._thread.start()

    def start(self, **settings: Any) -> str:
        """Start a new gateway, and return its address without a slash at the end."""
        usual = {
            "triton_grpc_url": self.grpc_url,
            "triton_metrics_url": self.metrics_url,
            "triton_config_key": self.config_key,
        }
        app = make_app(GatewaySettings(**{**usual, **settings}))
        config = uvicorn.Config(
            app,
            port=0,
            http=LimitedProtocol,
            lifespan="on",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=DRAIN_S,
        )
        server = uvicorn.Server(config)
        serving = asyncio.run_coroutine_threadsafe(server.serve(), self._loop)
        wait_until(lambda: server.started or serving.done(), "the gateway did not start")
        assert server.started, serving.exception()
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.finished = serving  # type: ignore[attr-defined]
        self._servers[url] = server
        return url

    def stop(self) -> None:
        for server in self._servers.values():
            server.should_exit = True
        for url, server in self._servers.items():
            ended: Future[None] = server.finished  # type: ignore[attr-defined]
            if not wait([ended], DRAIN_S / 2).done:
                waiting = _still_open(server, self._loop)
                warnings.warn(f"the gateway at {url} waits for what is under way:\n{waiting}", stacklevel=1)
            ended.result(TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        self._loop.close()


def _still_open(server: uvicorn.Server, loop: asyncio.AbstractEventLoop) -> str:
    """Say what a server may be waiting for before it ends: its connections, and where the loop's tasks stand."""
    lines = []
    for connection in server.server_state.connections:
        cycle: Any = connection.cycle  # type: ignore[union-attr]
        asked = None if cycle is None else (cycle.scope["method"], cycle.scope["path"], cycle.response_complete)
        transport: Any = connection.transport
        unsent = transport.get_write_buffer_size()
        lines.append(f"connection: asked {asked}, closing {transport.is_closing()}, {unsent} bytes unsent")
    for task in asyncio.all_tasks(loop):
        frames, awaited = [], task.get_coro()
        while (frame := getattr(awaited, "cr_frame", None)) is not None:
            frames.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            awaited = awaited.cr_await  # type: ignore[union-attr]
        lines.append(f"task: {' > '.join(frames)}")
    return "\n".join(lines)


def wait_until(condition: Callable[[], object], complaint: str, timeout_s: float = TIMEOUT_S) -> None:
    """Return when ``condition`` holds; fail with ``complaint`` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.01)


def ask(
    url: str,
    method: str = "GET",
    path: str = "/",
    *,
    headers: Mapping[str, str] | None = None,
    body: Any = None,
    timeout_s: float = TIMEOUT_S,
) -> Answer:
    """Send one request with the standard library, which uses no proxy, and neither retries nor follows redirects."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout_s)
    start = time.perf_counter()
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        response = connection.getresponse()
        data = response.read()
        lower = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, lower, data, time.perf_counter() - start)
    finally:
        connection.close()
