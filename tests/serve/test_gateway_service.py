"""Everything around a decode: token, health, ids, metrics, limits in time and number, a client that leaves."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from diffusers.utils.remote_utils import remote_decode

from fluxvae.serve.gateway import forward
from fluxvae.serve.gateway.command import main
from serve.client import Serving
from serve.gateways import Gateways, ask, wait_until

TOKEN = "s3cret-enough"
SMALL = (1, 4, 64)
QUERY = {
    "shape": SMALL,
    "dtype": "float32",
    "height": 32,
    "width": 32,
    "output_type": "pt",
    "partial_postprocess": True,
}
DECODE = f"/decode?{urlencode(QUERY, doseq=True)}"
BODY = np.zeros(SMALL, np.float32).tobytes()
TENSOR = {"Content-Type": "tensor/binary"}

MEDIUM = (1, 64 * 64, 64)  # 1024x1024
LARGE = (1, 128 * 128, 64)  # 2048x2048, which takes seconds to decode, so that something can happen meanwhile
LARGE_PATH = f"/decode?{urlencode({**QUERY, 'shape': LARGE, 'height': 2048, 'width': 2048}, doseq=True)}"
LARGE_BODY = np.zeros(LARGE, np.float32).tobytes()

PATHS = [
    "/",
    "/decode",
    "/docs",
    "/openapi.json",
    "/metrics",
    "/info",
    "/examples/astronaut_512x512.safetensors",
    "/nowhere",
]


@pytest.fixture(scope="module")
def guarded(gateways: Gateways) -> str:
    return gateways.start(token=TOKEN)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# The token.


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("wrong"),
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "x"),
        {"Authorization": TOKEN},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic " + base64.b64encode(f"{TOKEN}:".encode()).decode()},
        {"Authorization": "Bearer \xe9\xe8"},
        {"X-Request-ID": "not valid"},
    ],
)
def test_nothing_without_the_token(guarded: str, headers: dict[str, str]) -> None:
    for path in PATHS:
        for method in ("GET", "POST", "HEAD", "OPTIONS"):
            answer = ask(guarded, method, path, headers=headers)
            assert answer.status == 401, (method, path)
            assert answer.headers["www-authenticate"].startswith("Bearer")
            if method != "HEAD":
                assert json.loads(answer.body)["kind"] == "Unauthorized"
    assert ask(guarded, "POST", DECODE, headers={**TENSOR, **headers}, body=BODY).status == 401


def test_health_without_the_token(guarded: str) -> None:
    assert ask(guarded, path="/healthz").status == 200
    assert ask(guarded, path="/readyz").status == 200


@pytest.mark.parametrize(
    "headers", [bearer(TOKEN), {"Authorization": "Basic " + base64.b64encode(f"any:{TOKEN}".encode()).decode()}]
)
def test_everything_with_the_token(guarded: str, headers: dict[str, str]) -> None:
    for path in ("/", "/docs", "/openapi.json", "/metrics", "/info", "/examples/astronaut_512x512.safetensors"):
        assert ask(guarded, path=path, headers=headers).status == 200, path
    assert ask(guarded, "POST", DECODE, headers={**TENSOR, **headers}, body=BODY).status == 200


def test_remote_decode_carries_the_token_in_its_endpoint(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token may be in the address, because the unmodified client has no other way to send it."""
    monkeypatch.setenv("NO_PROXY", "*")
    latents = torch.zeros(1, 16, 4, 4)
    endpoint = guarded.replace("http://", f"http://any:{TOKEN}@")
    assert remote_decode(endpoint, latents, scaling_factor=1.0).size == (32, 32)
    with pytest.raises(RuntimeError, match="Unauthorized"):
        remote_decode(guarded, latents, scaling_factor=1.0)


def test_a_browser_is_asked_for_the_token(guarded: str) -> None:
    answer = ask(guarded, headers={"Accept": "text/html,*/*"})
    assert answer.status == 401
    assert b"This server asks for a token" in answer.body
    assert b"Decode latents" not in answer.body
    assert ask(guarded, path="/docs", headers={"Accept": "text/html"}).headers["content-type"] == "application/json"


# Request ids, metrics, facts.


def test_request_ids(gateway: str) -> None:
    assert ask(gateway, path="/healthz", headers={"X-Request-ID": "mine-1/2:3"}).headers["x-request-id"] == "mine-1/2:3"
    made = {ask(gateway, path="/healthz").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3


def test_the_id_reaches_triton_and_comes_back_in_errors(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id is in the error of Triton's core, which refuses more rows than a batch may have, if they are not split."""
    monkeypatch.setattr(forward, "MAX_ROWS", 16)
    query = urlencode({**QUERY, "shape": (9, 4, 64)}, doseq=True)
    answer = ask(gateway, "POST", f"/decode?{query}", headers={**TENSOR, "X-Request-ID": "mine-42"}, body=BODY * 9)
    told = json.loads(answer.body)
    assert (answer.status, told["request_id"]) == (400, "mine-42")
    assert "mine-42" in told["error"]


def metrics(url: str, headers: dict[str, str] | None = None) -> dict[str, float]:
    page = ask(url, path="/metrics", headers=headers).body.decode()
    values = {}
    for line in page.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name not in values, f"{name} is given twice"
            values[name] = float(value)
    return values


def test_metrics_are_the_gateways_and_tritons(gateways: Gateways) -> None:
    url = gateways.start()
    assert ask(url, "POST", DECODE, headers=TENSOR, body=BODY).status == 200
    assert ask(url, "POST", DECODE, headers=TENSOR, body=BODY[1:]).status == 400
    assert ask(url, path="/some/scanner's/path").status == 404
    seen = metrics(url)
    assert seen['fluxvae_gateway_requests_total{path="/decode",status="200"}'] == 1
    assert seen['fluxvae_gateway_requests_total{path="/decode",status="400"}'] == 1
    assert seen['fluxvae_gateway_requests_total{path="other",status="404"}'] == 1
    assert seen['fluxvae_gateway_request_seconds_count{path="/decode"}'] == 2
    assert seen["fluxvae_gateway_received_bytes_total"] == len(BODY)
    assert seen["fluxvae_gateway_in_flight"] == 0
    assert seen["fluxvae_gateway_triton_metrics_up"] == 1
    assert any(name.startswith('nv_inference_request_success{model="vae_decoder"') for name in seen)


def test_info(gateway: str) -> None:
    facts = json.loads(ask(gateway, path="/info").body)
    assert facts["model"] == "vae_decoder"
    assert facts["triton"].startswith("2.")
    assert facts["settings"]["max_pixels"] == str(facts["limits"]["max_pixels"])
    for name in facts["examples"]:
        assert ask(gateway, path=f"/examples/{name}").status == 200
    assert ask(gateway, path="/examples/other.safetensors").status == 404


def test_timings_are_told(gateway: str) -> None:
    timing = ask(gateway, "POST", DECODE, headers=TENSOR, body=BODY).headers["server-timing"]
    assert re.fullmatch(r"body;dur=[\d.]+, check;dur=[\d.]+, line;dur=[\d.]+, triton;dur=[\d.]+", timing)


# Triton out of reach, out of time, out of room.


def test_triton_is_not_there(gateways: Gateways) -> None:
    url = gateways.start(triton_grpc_url="127.0.0.1:1", triton_metrics_url="http://127.0.0.1:1/metrics")
    assert ask(url, path="/healthz").status == 200
    ready = ask(url, path="/readyz")
    assert ready.status == 503
    assert "Triton cannot take" in json.loads(ready.body)["reason"]
    answer = ask(url, "POST", DECODE, headers=TENSOR, body=BODY)
    assert (answer.status, json.loads(answer.body)["kind"]) == (503, "UnavailableError")
    assert answer.headers["retry-after"] == "1"
    assert ask(url, path="/info").status == 503
    assert metrics(url)["fluxvae_gateway_triton_metrics_up"] == 0
    assert ask(url).status == 200, "the page itself"


def test_the_model_is_not_there(gateways: Gateways) -> None:
    url = gateways.start(models=("another",))
    answer = ask(url, "POST", DECODE, headers=TENSOR, body=BODY)
    assert (answer.status, json.loads(answer.body)["kind"]) == (502, "BadGateway")
    assert ask(url, path="/readyz").status == 503


def test_a_decode_that_takes_too_long_is_cancelled(gateways: Gateways, serving: Serving) -> None:
    url = gateways.start(timeout_s=1.0)
    headers = {**TENSOR, "X-Request-ID": "too-long"}
    answer = ask(url, "POST", LARGE_PATH, headers=headers, body=LARGE_BODY)
    assert (answer.status, json.loads(answer.body)["kind"]) == (504, "DeadlineExceededError")
    assert answer.seconds < 5
    wait_until(lambda: stopped(serving, "too-long"), "the model did not notice", timeout_s=20)


def test_a_client_that_leaves_takes_its_decode_with_it(gateways: Gateways, serving: Serving) -> None:
    url, impatient = gateways.start(), gateways.start(timeout_s=0.3)
    client = start_large(url, "leaves")
    # The model has one instance, so while it decodes it answers nothing else.
    wait_until(lambda: ask(impatient, "POST", DECODE, headers=TENSOR, body=BODY).status == 504, "no decode began")
    client.sock.close()  # type: ignore[union-attr]
    wait_until(lambda: metrics(url)["fluxvae_gateway_in_flight"] == 0, "the gateway did not notice", timeout_s=10)
    wait_until(lambda: stopped(serving, "leaves"), "the model did not notice", timeout_s=20)
    assert metrics(url)['fluxvae_gateway_requests_total{path="/decode",status="499"}'] == 1
    assert ask(url, "POST", DECODE, headers=TENSOR, body=BODY).status == 200


def test_no_more_than_max_in_flight(gateways: Gateways) -> None:
    url = gateways.start(max_in_flight=1, max_queue=0)
    first = start_large(url, "first")
    answer = ask(url, "POST", DECODE, headers=TENSOR, body=BODY)
    assert (answer.status, json.loads(answer.body)["kind"]) == (503, "UnavailableError")
    assert answer.seconds < 1
    assert ask(url, path="/healthz").status == 200
    first.sock.close()  # type: ignore[union-attr]
    wait_until(lambda: ask(url, "POST", DECODE, headers=TENSOR, body=BODY).status == 200, "the room was not freed")


def start_large(url: str, request_id: str) -> http.client.HTTPConnection:
    """Send a request whose decode takes seconds, and return once it is under way in Triton."""
    running = under_way(url)
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=100)
    connection.request("POST", LARGE_PATH, LARGE_BODY, {**TENSOR, "X-Request-ID": request_id})
    wait_until(lambda: under_way(url) > running, "the request did not get to work")
    return connection


def under_way(url: str) -> float:
    """How many requests are at work or wait in line, their bodies having arrived."""
    seen = metrics(url)
    return seen["fluxvae_gateway_in_flight"] + seen["fluxvae_gateway_waiting"]


def stopped(serving: Serving, request_id: str) -> bool:
    """Whether the log says that the model took this request and gave it up, because nobody waited for it any more."""
    return f"request {request_id}: DecodeCancelled" in serving.server.log()


def test_many_at_once_get_their_own(gateway: str) -> None:
    """Answers are not mixed up, and each has the id of its request."""
    results: dict[int, Any] = {}

    def one(index: int) -> None:
        side = 16 * (1 + index % 4)
        shape = (1, (side // 16) ** 2, 64)
        query = urlencode({**QUERY, "shape": shape, "height": side, "width": side}, doseq=True)
        body = np.full(shape, index / 16, np.float32).tobytes()
        for _ in range(2):
            answer = ask(
                gateway, "POST", f"/decode?{query}", headers={**TENSOR, "X-Request-ID": f"n{index}"}, body=body
            )
            results.setdefault(index, []).append(
                (answer.status, answer.headers["x-request-id"], answer.headers["shape"], answer.body)
            )

    threads = [threading.Thread(target=one, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (first, second) in results.items():
        side = 16 * (1 + index % 4)
        assert first == second
        assert first[:3] == (200, f"n{index}", f"[1, {side}, {side}, 3]")
    assert len({answers[0][3] for answers in results.values()}) == 16


# The process.


@pytest.fixture
def process(serving: Serving) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "fluxvae.serve.gateway", "--triton", serving.server.grpc_url, "--port", "0"]
    command += ["--metrics", serving.server.metrics_url, "--timeout", "60"]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "FLUXVAE_TOKEN": TOKEN})
    try:
        assert started.stderr is not None
        url = None
        for line in started.stderr:
            if found := re.search(r"running on (http://[\d.]+:\d+)", line):
                url = found[1]
                break
        assert url, "it did not start"
        yield started, url
    finally:
        started.kill()
        started.communicate()


def test_as_a_process(process: tuple[subprocess.Popen[str], str]) -> None:
    """The process gets ready, asks for the environment's token, and finishes its last request after SIGTERM."""
    running, url = process
    assert url.startswith("http://127.0.0.1:")
    assert ask(url, path="/readyz").status == 200
    assert ask(url, path="/info").status == 401
    assert TOKEN not in Path(f"/proc/{running.pid}/cmdline").read_text()
    headers = {**TENSOR, **bearer(TOKEN)}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=100)
    query = urlencode({**QUERY, "shape": MEDIUM, "height": 1024, "width": 1024}, doseq=True)
    connection.request("POST", f"/decode?{query}", np.zeros(MEDIUM, np.float32).tobytes(), headers)
    wait_until(lambda: metrics(url, headers)["fluxvae_gateway_in_flight"] == 1, "the decode did not start")
    running.send_signal(signal.SIGTERM)
    response = connection.getresponse()
    assert response.status == 200
    assert len(response.read()) == 1024 * 1024 * 3
    connection.close()
    assert running.wait(20) in (0, -signal.SIGTERM)


def test_a_setting_that_makes_no_sense_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLUXVAE_TOKEN", "")
    with pytest.raises(SystemExit) as ended:
        main(["--port", "0"])
    assert ended.value.code == 2
    assert "FLUXVAE_TOKEN must hold a secret" in capsys.readouterr().err
