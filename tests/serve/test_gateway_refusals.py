"""What the gateway refuses: with its status, a JSON message that says what to do, in 100 ms, before Triton sees it."""

from __future__ import annotations

import json
import socket
import time
from typing import Any
from urllib.parse import urlencode

import numpy as np
import psutil
import pytest

from fluxvae.errors import InvalidOptionError
from fluxvae.serve.gateway.app import GatewaySettings
from serve.client import Serving
from serve.gateways import Answer, Gateways, ask, wait_until

QUICK_S = 0.1
ATTEMPTS = 5  # on a busy machine, the shortest of some times is what the code itself takes

SHAPE = (1, 16, 64)
QUERY = {"shape": list(SHAPE), "dtype": "float32", "height": 64, "width": 64}
HEADERS = {"Content-Type": "tensor/binary"}
BODY = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32).tobytes()


@pytest.fixture(scope="module", autouse=True)
def counted(serving: Serving) -> None:
    triton_has_counted(serving)


def post(url: str, *, body: Any = BODY, headers: dict[str, str] | None = None, **changes: Any) -> Answer:
    """Send a good request with ``changes`` to its query. None leaves a parameter out."""
    query = {name: value for name, value in {**QUERY, **changes}.items() if value is not None}
    path = f"/decode?{urlencode(query, doseq=True)}"
    return ask(url, "POST", path, headers={**HEADERS, **(headers or {})}, body=body)


def refused(answer: Answer, status: int, *words: str) -> None:
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    told = json.loads(answer.body)
    assert told.keys() == {"error", "kind", "request_id"}
    assert told["request_id"] == answer.headers["x-request-id"]
    for word in words:
        assert word in told["error"], told["error"]


def with_value(value: float) -> bytes:
    values = np.frombuffer(BODY, np.float32).copy()
    values[5 * 64 + 7] = value
    return values.tobytes()


BAD: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "NaN": ({"body": with_value(np.nan)}, 400, ("NaN",)),
    "Inf": ({"body": with_value(np.inf)}, 400, ("Inf",)),
    "no latents of any model": ({"body": with_value(1e30)}, 400, ("dtype=float32",)),
    "truncated": ({"body": BODY[:-1]}, 400, ("Content-Length of 4095", "expected 4096")),
    "too long": ({"body": BODY + b"x"}, 400, ("Content-Length of 4097", "expected 4096")),
    "empty": ({"body": b""}, 400, ("Content-Length of 0",)),
    "another dtype's bytes": ({"dtype": "bfloat16"}, 400, ("expected 2048",)),
    "truncated, in chunks": ({"body": iter([BODY[:100], BODY[100:-1]])}, 400, ("got 4095 bytes",)),
    "too long, in chunks": ({"body": iter([BODY, b"x"])}, 400, ("expected 4096",)),
    "more bytes than allowed": ({"shape": [1, 2**20, 64]}, 413, ("268435456 bytes", "16777216")),
    "more pixels than allowed": ({"shape": [1, 131072, 64], "dtype": "float16"}, 413, ("33554432 pixels",)),
    "a shape beyond all": ({"shape": [10**11, 10**11, 10**11]}, 413, ("bytes",)),
    "a dimension of zero": ({"shape": [1, 0, 64]}, 400, ("shape", "'0'")),
    "a negative dimension": ({"shape": [1, -16, 64]}, 400, ("'-16'",)),
    "a fraction": ({"shape": [1, 16.0, 64]}, 400, ("'16.0'",)),
    "digits of another script": ({"shape": [1, "１６", 64]}, 400, ("shape",)),
    "a number too long": ({"height": "9" * 5000}, 400, ("height",)),
    "one dimension": ({"shape": [1024]}, 400, ("1 dimensions", "shape=1&shape=1024")),
    "six dimensions": ({"shape": [1, 1, 1, 1, 16, 64]}, 400, ("6 dimensions",)),
    "a video": ({"shape": [1, 16, 2, 4, 8], "height": 32}, 400, ("video of 2 frames",)),
    "one image or packed ones": (
        {"shape": [16, 4, 64], "body": BODY * 4, "height": None},
        400,
        ("16 packed images", "one image of 32x512", "(1, 16, 4, 64)"),
    ),
    "one image of another family": (
        {"shape": [4, 16, 16], "height": None, "width": None},
        400,
        ("one image without its batch they have 4 channels", "SD"),
    ),
    "pil for 16 packed images": (
        {"shape": [16, 1, 64], "height": 16, "width": 16},
        400,
        ("batch of 16", "partial_postprocess=True"),
    ),
    "shape as one list": ({"shape": "[1, 16, 64]"}, 400, ("1 dimensions",)),
    "no shape": ({"shape": None}, 400, ("shape",)),
    "no dtype": ({"dtype": None}, 400, ("dtype: missing",)),
    "unknown dtype": ({"dtype": "float64"}, 400, ("'float64'", "bfloat16")),
    "no height": ({"height": None}, 400, ("height and width",)),
    "height of zero": ({"height": 0}, 400, ("height",)),
    "another size": ({"height": 32}, 400, ("32x64", "16")),
    "FLUX.2's features": ({"shape": [1, 8, 128]}, 400, ("128 features", "FLUX.2")),
    "too few channels": ({"shape": [1, 4, 16, 16], "height": None, "width": None}, 400, ("4 channels",)),
    "unpacked, the wrong height": ({"shape": [1, 16, 8, 8], "height": 72}, 400, ("height: got 72",)),
    "mp4": ({"output_type": "mp4"}, 400, ("mp4", "video")),
    "unknown output type": ({"output_type": "gif"}, 400, ("output_type", "'gif'")),
    "unknown image format": ({"image_format": "webp"}, 400, ("image_format", "jpg, png")),
    "no boolean": ({"partial_postprocess": "maybe"}, 400, ("partial_postprocess", "True, False")),
    "scaling of zero": ({"scaling_factor": 0}, 400, ("scaling_factor",)),
    "scaling that float32 loses": ({"scaling_factor": 1e-30}, 400, ("scaling_factor",)),
    "scaling that is no number": ({"scaling_factor": "big"}, 400, ("scaling_factor: got 'big'",)),
    "infinite shift": ({"shift_factor": "inf"}, 400, ("shift_factor",)),
    "shift beyond all": ({"shift_factor": 1e9}, 400, ("latents",)),
    "contradiction": ({"do_scaling": "False", "scaling_factor": 1}, 400, ("do_scaling", "contradict")),
    "unknown parameter": ({"heigth": 64}, 400, ("'heigth'", "height")),
    "given twice": ({"width": [64, 64]}, 400, ("width: got it twice",)),
    "base64": ({"input_tensor_type": "base64"}, 400, ("input_tensor_type",)),
    "no content type": ({"headers": {"Content-Type": ""}}, 415, ("tensor/binary",)),
    "a form": ({"headers": {"Content-Type": "application/x-www-form-urlencoded"}}, 415, ("tensor/binary",)),
    "compressed": ({"headers": {"Content-Encoding": "gzip"}}, 415, ("gzip",)),
    "a request id with spaces": ({"headers": {"X-Request-ID": "a b"}}, 400, ("X-Request-ID",)),
    "a request id too long": ({"headers": {"X-Request-ID": "a" * 129}}, 400, ("X-Request-ID",)),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(gateway: str, serving: Serving, case: str) -> None:
    changes, status, words = BAD[case]
    body = list(changes.get("body", BODY)) if "chunks" in case else None
    best = float("inf")
    before = triton_requests(serving)
    for _ in range(ATTEMPTS):
        answer = post(gateway, **(changes if body is None else {**changes, "body": iter(body)}))
        refused(answer, status, *words)
        best = min(best, answer.seconds)
        if best < QUICK_S:
            break
    assert best < QUICK_S
    assert triton_requests(serving) == before, "Triton saw it"


def test_the_good_request_is_good(gateway: str) -> None:
    """The request that the refusals above change is itself accepted; otherwise they would show nothing."""
    assert post(gateway).status == 200
    assert post(gateway, shape=[1, 16, 8, 8]).status == 200
    assert post(gateway, shape=[1, 16, 8, 8], height=None, width=None).status == 200
    assert post(gateway, body=iter([BODY[:1000], BODY[1000:]])).status == 200, "in chunks, without a length"


def test_a_size_that_is_floored_says_so(gateway: str) -> None:
    answer = post(gateway, height=79, width=70)
    assert answer.status == 200
    assert "decoding 64x64" in answer.headers["x-fluxvae-warning"]


def test_an_oversized_upload_costs_no_memory(gateway: str) -> None:
    """A body of 64 MiB is refused before it is sent. What the client sends all the same is read and thrown away."""
    with connect(gateway) as connection:
        start = time.perf_counter()
        connection.sendall(head(2**26, shape=[1, 2**18, 64]))
        assert received(connection, until=b"more than").startswith(b"HTTP/1.1 413 ")
        assert time.perf_counter() - start < 1
        chunk = bytes(2**20)
        process = psutil.Process()  # the gateway runs in this process
        before = process.memory_info().rss
        for _ in range(64):  # a client may send its whole body before it reads, without being reset
            connection.sendall(chunk)
            assert process.memory_info().rss - before < 2**24


def test_a_body_that_stops_arriving(gateways: Gateways) -> None:
    with connect(gateways.start(timeout_s=0.5)) as connection:
        connection.sendall(head(len(BODY)) + BODY[:100])
        assert received(connection, until=b"100 of 4096 bytes").startswith(b"HTTP/1.1 408 ")


def test_a_client_that_leaves_in_mid_body_leaves_nothing(gateway: str) -> None:
    with connect(gateway) as connection:
        connection.sendall(head(len(BODY)) + BODY[:100])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(4096) == b"", "closed, without a picture"
    assert post(gateway).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "word"),
    [
        ("GET", "/decode", 405, "method"),
        ("DELETE", "/", 405, "method"),
        ("PUT", "/decode", 405, "method"),
        ("POST", "/healthz", 405, "method"),
        ("GET", "/nowhere", 404, "/docs"),
        ("GET", "/examples/../../../etc/passwd", 404, "path"),
        ("GET", "/examples/..%2f..%2fpyproject.toml", 404, "path"),
        ("GET", "/decode/", 404, "path"),
    ],
)
def test_other_paths_and_methods(gateway: str, method: str, path: str, status: int, word: str) -> None:
    refused(ask(gateway, method, path), status, word)


@pytest.mark.parametrize(
    "changes",
    [
        {"token": ""},
        {"token": "  "},
        {"timeout_s": 0},
        {"max_request_bytes": -1},
        {"max_picture_bytes": 0},
        {"max_in_flight": 0},
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError, match=next(iter(changes))):
        GatewaySettings(triton_grpc_url="127.0.0.1:1", **changes)


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def head(length: int, **changes: Any) -> bytes:
    """The head of a request whose body has ``length`` bytes."""
    lines = [
        f"POST /decode?{urlencode({**QUERY, **changes}, doseq=True)} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: tensor/binary",
        f"Content-Length: {length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def received(connection: socket.socket, until: bytes) -> bytes:
    """Read from a connection until ``until`` has arrived, and return everything."""
    answer = b""
    while until not in answer:
        part = connection.recv(65536)
        assert part, answer
        answer += part
    return answer


def triton_requests(serving: Serving, model: str = "vae_decoder") -> float:
    """How many requests have reached this model, whatever became of them."""
    page = ask(serving.server.metrics_url.removesuffix("/metrics"), path="/metrics").body.decode()
    names = ("nv_inference_request_success{", "nv_inference_request_failure{")
    return sum(
        float(line.rpartition(" ")[2])
        for line in page.splitlines()
        if line.startswith(names) and f'model="{model}"' in line
    )


def triton_has_counted(serving: Serving, model: str = "vae_decoder") -> None:
    """Wait until what earlier tests have asked for is counted, which Triton does some time after it has answered.

    Nothing tells when it is done, so the number must stay the same for a second.
    """
    seen, since = triton_requests(serving, model), time.monotonic()

    def settled() -> bool:
        nonlocal seen, since
        if (now := triton_requests(serving, model)) != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > 1

    wait_until(settled, "Triton went on counting")
