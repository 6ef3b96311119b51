"""Clients that send without end, or hardly at all, to a gateway in a process of its own: it answers the others."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from fluxvae.serve.gateway.protocol import first_to_go
from fluxvae.serve.triton.controls import CONFIG_KEY_VARIABLE
from serve.gateways import ask, wait_until

KIB, MIB = 2**10, 2**20
MOST_BYTES = 24 * MIB  # how much a flood sends, which is more than the gateway's memory may grow by
GROWTH = 8 * MIB
POST = b"POST /decode?shape=1&shape=16&shape=64&dtype=float32&height=64&width=64 HTTP/1.1\r\nHost: localhost\r\n"
POST += b"Content-Type: tensor/binary\r\n"


class Process:
    def __init__(self, triton: str = "127.0.0.1:1", config_key: str = "") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "fluxvae.serve.gateway", "--triton", triton, "--port", str(self.port)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", CONFIG_KEY_VARIABLE: config_key}
        env.pop("FLUXVAE_TOKEN", None)
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        self.url = f"http://127.0.0.1:{self.port}"
        wait_until(self.answers, "the gateway did not start")

    def answers(self) -> bool:
        try:
            return ask(self.url, path="/healthz", timeout_s=10).status == 200
        except OSError:
            return False

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    @property
    def memory(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    started = Process()
    yield started
    started.process.terminate()
    started.process.wait(60)


FLOODS: dict[str, tuple[bytes, Callable[[int], bytes]]] = {
    "one header without end": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ", lambda size: b"a" * size),
    "tiny headers": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", lambda size: b"a:b\r\n" * (size // 5)),
    "a name without end": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", lambda size: b"a" * size),
    "a request line without end": (b"GET /", lambda size: b"a" * size),
    "line feeds": (b"", lambda size: b"\r\n" * (size // 2)),
    "trailers": (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", lambda size: b"a:b\r\n" * (size // 5)),
    "a trailer without end": (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", lambda size: b"a" * size),
    "a chunk's extension": (POST + b"Transfer-Encoding: chunked\r\n\r\n1;a=", lambda size: b"a" * size),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_ends_and_leaves_no_trace(process: Process, flood: str) -> None:
    start, more = FLOODS[flood]
    before, sent, answer = process.memory, 0, b""
    with process.connect() as client:
        try:
            client.sendall(start)
            while sent < MOST_BYTES:
                client.sendall(more(256 * KIB))
                sent += 256 * KIB
                if select.select([client], [], [], 0)[0]:
                    break
            answer = client.recv(4096)
        except (ConnectionError, TimeoutError):
            pass
    assert sent < MOST_BYTES, "it took all of it"
    assert process.memory - before < GROWTH
    if "trailer" not in flood and "chunk" not in flood:  # those come within a request, and the connection just ends
        assert b" 431 " in answer or b" 400 " in answer, answer
    assert process.answers()


def test_headers_within_the_limit_are_taken_and_beyond_it_refused(process: Process) -> None:
    assert ask(process.url, path="/healthz", headers={"X": "a" * 63 * KIB}).status == 200
    answer = ask(process.url, path="/healthz", headers={"X": "a" * 64 * KIB})
    assert answer.status == 431
    assert b"65536 bytes" in answer.body


@pytest.mark.parametrize("count", [64, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "start", [b"G", POST + b"Content-Length: 4096\r\n\r\nx"], ids=["one byte", "one byte of a body"]
)
def test_many_that_send_one_byte_hinder_nobody(process: Process, count: int, start: bytes) -> None:
    clients = []
    try:
        for _ in range(count):
            client = process.connect()
            client.sendall(start)
            clients.append(client)
        started = time.monotonic()
        query = "/decode?shape=1&shape=16&shape=64&dtype=float32&height=64&width=64"
        answer = ask(process.url, "POST", query, headers={"Content-Type": "tensor/binary"}, body=bytes(4096))
        assert b"Triton cannot take this request now" in answer.body, "it came as far as Triton, which is not there"
        assert time.monotonic() - started < 5
        assert process.answers()
    finally:
        for client in clients:
            client.close()


def test_who_makes_room() -> None:
    assert first_to_go([("a", True), ("b", True), ("b", True)]) == 1
    assert first_to_go([("a", True), ("b", False), ("b", False)]) == 0
    assert first_to_go([("a", False)]) is None
