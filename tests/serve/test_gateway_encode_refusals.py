"""What the gateway refuses to encode: bad requests before Triton sees them, bad files in the model's words, too much.

And what web pages of other origins send.
"""

from __future__ import annotations

import http.client
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from fluxvae.serve.gateway.command import main
from serve.client import Serving
from serve.gateways import Answer, Gateways, ask, wait_until
from serve.test_gateway_refusals import refused, triton_has_counted, triton_requests
from serve.test_gateway_service import stopped
from serve.test_server_behaviour import metric

MODEL = "vae_encoder"
SHAPE = (1, 3, 16, 24)
QUERY: dict[str, Any] = {"shape": list(SHAPE), "dtype": "float32", "do_normalize": "True"}
VALUES = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
BODY = VALUES.tobytes()


@pytest.fixture(scope="module")
def gateway(gateways: Gateways, serving: Serving) -> str:
    triton_has_counted(serving, MODEL)
    return gateways.start(models=("vae_decoder", MODEL))


def png(height: int = 16, width: int = 24, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def noise() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


FILE = png()
NOISE = noise()
FILE_QUERY: dict[str, Any] = dict.fromkeys(QUERY)


def post(url: str, *, body: Any = BODY, headers: dict[str, str] | None = None, **changes: Any) -> Answer:
    """Send a good tensor with ``changes`` to its query. None leaves a parameter out."""
    query = {name: value for name, value in {**QUERY, **changes}.items() if value is not None}
    path = f"/encode?{urlencode(query, doseq=True)}"
    return ask(url, "POST", path, headers={"Content-Type": "tensor/binary", **(headers or {})}, body=body)


def with_value(value: float) -> bytes:
    values = VALUES.copy()
    values[0, 2, 3, 4] = value
    return values.tobytes()


def typed(content_type: str, **more: Any) -> dict[str, Any]:
    return {**FILE_QUERY, "body": FILE, "headers": {"Content-Type": content_type}, **more}


BAD: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "NaN": ({"body": with_value(np.nan)}, 400, ("images: got nan at index [0, 2, 3, 4] (1 of 1152", "NaN or Inf")),
    "Inf": ({"body": with_value(-np.inf)}, 400, ("got -inf at index [0, 2, 3, 4]",)),
    "below its range": ({"body": with_value(-0.5)}, 400, ("got -0.5 at index", "in [0, 1], with do_normalize=True")),
    "above its range": ({"body": with_value(1.5), "do_normalize": "False"}, 400, ("got 1.5", "in [-1, 1], with do_n")),
    "bytes as floats": (
        {"body": with_value(255), "do_normalize": None},
        400,
        ("in [0, 1], with do_normalize left out and no value negative", "images / 255"),
    ),
    "below -1": (
        {"body": with_value(-1.5), "do_normalize": None},
        400,
        ("in [-1, 1]", "left out and a value negative"),
    ),
    "truncated": ({"body": BODY[:-1]}, 400, ("Content-Length of 4607", "expected 4608")),
    "too long": ({"body": BODY + b"x"}, 400, ("Content-Length of 4609",)),
    "truncated, in chunks": ({"body": iter([BODY[:-1]])}, 400, ("got 4607 bytes, expected 4608",)),
    "another dtype's bytes": ({"dtype": "float16"}, 400, ("expected 2304",)),
    "no bytes of a file": ({**FILE_QUERY, "body": b""}, 400, ("body: got no bytes, expected a picture file",)),
    "one dimension": ({"shape": [1152]}, 400, ("1 dimensions", "shape=1&shape=3&shape=512")),
    "five dimensions": ({"shape": [1, 1, 3, 16, 24]}, 400, ("5 dimensions",)),
    "five channels": ({"shape": [1, 5, 16, 18]}, 400, ("got (1, 5, 16, 18) of float32", "(batch, 3, height")),
    "floats with the channels last": ({"shape": [1, 16, 24, 3]}, 400, ("got (1, 16, 24, 3) of float32",)),
    "bytes without channels": (
        {"shape": [1, 16, 24, 5], "dtype": "uint8", "do_normalize": None},
        400,
        ("of uint8", "channels last"),
    ),
    "a size that does not fit": (
        {"shape": [1, 3, 20, 30]},
        400,
        ("20x30", "nearest are 16x24 or 24x32", "resize=true"),
    ),
    "a size too small": ({"shape": [1, 3, 4, 24], "resize": "true"}, 400, ("4x24", "nearest are 8x24;")),
    "a dimension of zero": ({"shape": [0, 3, 16, 24]}, 400, ("shape: got '0'",)),
    "a negative dimension": ({"shape": [1, 3, -16, 24]}, 400, ("'-16'",)),
    "a shape without a dtype": ({"dtype": None}, 400, ("dtype: missing", "float32, float16, bfloat16, uint8")),
    "a dtype without a shape": ({"shape": None}, 400, ("shape: missing",)),
    "an unknown dtype": ({"dtype": "float64"}, 400, ("dtype: got 'float64'",)),
    "more bytes than allowed": ({"shape": [5, 3, 4096, 4096]}, 413, ("1006632960 bytes", "201326592")),
    "more pixels than allowed": (
        {"shape": [1, 3, 8192, 4096], "dtype": "uint8", "do_normalize": None},
        413,
        ("33554432 pixels", "16777216"),
    ),
    "a shape beyond all": ({"shape": [10**11, 3, 10**11, 8]}, 413, ("bytes",)),
    "a range for bytes": ({"dtype": "uint8"}, 400, ("do_normalize: got 'True'", "uint8 is always")),
    "a range for a file": ({**FILE_QUERY, "do_normalize": "True", "body": FILE}, 400, ("do_normalize", "picture file")),
    "a background for a tensor": ({"background": "white"}, 400, ("background: got 'white'", "no transparency")),
    "a background that is none": ({**FILE_QUERY, "background": "ü", "body": FILE}, 400, ("background: got 'ü'",)),
    "a range in other words": ({"do_normalize": "true"}, 400, ("do_normalize: got 'true', expected one of True",)),
    "a scale of zero": ({"scaling_factor": 0}, 400, ("scaling_factor: got 0", "latents are multiplied by it")),
    "a scale that is no number": ({"scaling_factor": "1_0"}, 400, ("scaling_factor: got '1_0'",)),
    "a shift too large": ({"shift_factor": "-3e38"}, 400, ("shift_factor: got -3e+38", "at most 65504")),
    "a contradiction": ({"do_scaling": "False", "shift_factor": 1}, 400, ("do_scaling", "contradict")),
    "a seed alone": ({"seed": 1}, 400, ("seed: got it without sample=true",)),
    "a seed beside sample=false": ({"seed": 1, "sample": "false"}, 400, ("seed: got it without sample=true",)),
    "a sample without a seed": ({"sample": "true"}, 400, ("seed: missing",)),
    "a negative seed": ({"sample": "true", "seed": -1}, 400, ("seed: got '-1'",)),
    "a seed too large": (
        {"sample": "true", "seed": 2**63},
        400,
        ("expected a whole number from 0 to 9223372036854775",),
    ),
    "a sample of too many": (
        {"sample": "true", "seed": 1, "shape": [9, *SHAPE[1:]]},
        400,
        ("sample: got true for a batch of 9", "at most 8"),
    ),
    "yes": ({"resize": "yes"}, 400, ("resize: got 'yes', expected one of true, false",)),
    "an unknown parameter": ({"output_type": "pt"}, 400, ("'output_type': unknown", "do_normalize")),
    "given twice": ({"dtype": ["float32", "float32"]}, 400, ("dtype: got it twice",)),
    "a file with a shape": ({"headers": {"Content-Type": "image/png"}}, 400, ("shape: got it with", "'image/png'")),
    "a file with a dtype": (typed("image/png", dtype="uint8"), 400, ("dtype: got it with",)),
    "text": (typed("text/plain"), 415, ("'text/plain'", "image/png", "tensor/binary")),
    "a form": (typed("application/x-www-form-urlencoded"), 415, ("tensor/binary",)),
    "a form with files": (typed("multipart/form-data; boundary=x"), 415, ("multipart/form-data",)),
    "JSON": (typed("application/json"), 415, ("application/json",)),
    "compressed": (typed("image/png") | {"headers": {"Content-Encoding": "gzip"}}, 415, ("gzip",)),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_triton_sees_it(gateway: str, serving: Serving, case: str) -> None:
    changes, status, words = BAD[case]
    before = triton_requests(serving, MODEL)
    refused(post(gateway, **changes), status, *words)
    assert triton_requests(serving, MODEL) == before


def test_the_good_requests_are_good(gateway: str, serving: Serving) -> None:
    """The requests that the refusals above change are themselves accepted; otherwise they would show nothing."""
    before = triton_requests(serving, MODEL)
    assert post(gateway).status == 200
    assert post(gateway, **typed("image/png")).status == 200
    assert post(gateway, sample="true", seed=1).status == 200
    wait_until(lambda: triton_requests(serving, MODEL) == before + 3, "Triton has not counted them")


@pytest.mark.parametrize(
    ("body", "query", "words"),
    [
        (b"no picture at all", {}, ("images",)),
        (NOISE[: len(NOISE) // 2], {}, ("images",)),
        (png(20, 30), {}, ("20x30", "multiples of 8", "16x24")),
        (png(4, 24), {"resize": "true"}, ("4x24",)),
        (png(mode="I;16"), {}, ("more than 8 bits",)),
        (FILE, {"background": "no colour"}, ("background", "no colour")),
    ],
    ids=["no picture", "cut short", "a size that does not fit", "a size too small", "16 bits", "no colour"],
)
@pytest.mark.parametrize("content_type", ["image/png", ""])
def test_files_are_the_models_to_refuse(
    gateway: str, body: bytes, query: dict[str, str], words: tuple[str, ...], content_type: str
) -> None:
    answer = ask(gateway, "POST", f"/encode?{urlencode(query)}", headers={"Content-Type": content_type}, body=body)
    refused(answer, 400, *words)
    assert json.loads(answer.body)["kind"] == "InvalidRequest"


def test_too_large_a_file(gateways: Gateways) -> None:
    """It is refused by its announced length, or, in chunks, as soon as it is too long."""
    url = gateways.start(models=(MODEL,), max_picture_bytes=1000)
    refused(ask(url, "POST", "/encode", body=bytes(1001)), 413, "Content-Length of 1001", "1000 of pictures")
    refused(ask(url, "POST", "/encode", body=iter([bytes(600), bytes(600)])), 413, "got 1200 bytes or more")
    assert len(FILE) < 1000
    assert ask(url, "POST", "/encode", body=FILE).status == 200


def test_bodies_of_both_ways_count_in_one_memory(gateways: Gateways, serving: Serving) -> None:
    """One address may hold 12 MiB here: a picture of that size leaves no room for another body until it is answered."""
    url = gateways.start(models=("vae_decoder", MODEL), max_request_bytes=2**15, max_picture_bytes=12 * 2**20)
    decode = "/decode?shape=1&shape=16&shape=64&dtype=float32&height=64&width=64"
    tensor = {"Content-Type": "tensor/binary"}
    first = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    first.request(
        "POST", "/encode?shape=2048&shape=2048&shape=3&dtype=uint8", bytes(12 * 2**20), {"X-Request-ID": "left"}
    )
    wait_until(lambda: under_way(url) == 1, "the picture did not arrive")
    # Triton lets go of what is cancelled in its queue, and the model never hears of it.
    wait_until(lambda: metric(serving.server, "fluxvae_in_flight", model=MODEL) > 0, "the encode did not begin")
    refused(ask(url, "POST", "/encode", body=FILE), 503, "hold as many bytes as this gateway keeps")
    refused(ask(url, "POST", decode, headers=tensor, body=bytes(4096)), 503, "hold as many bytes as this gateway keeps")
    assert under_way(url) == 1, "or this shows nothing"
    first.close()
    wait_until(lambda: under_way(url) == 0, "the picture's encode was not cancelled")
    wait_until(lambda: stopped(serving, "left"), "the model did not notice", timeout_s=20)
    assert answers(url)["499"] == 1
    assert ask(url, "POST", "/encode", body=FILE).status == 200
    assert ask(url, "POST", decode, headers=tensor, body=bytes(4096)).status == 200


def test_an_encode_that_takes_too_long_is_cancelled(gateways: Gateways, serving: Serving) -> None:
    url = gateways.start(models=(MODEL,), timeout_s=1.0)
    path, headers = "/encode?shape=2048&shape=2048&shape=3&dtype=uint8", {"X-Request-ID": "too-long-to-encode"}
    answer = ask(url, "POST", path, headers=headers, body=bytes(12 * 2**20))
    refused(answer, 504, "the latents were not ready in time; the encode was cancelled")
    wait_until(lambda: stopped(serving, "too-long-to-encode"), "the model did not notice", timeout_s=20)


def test_the_command_line_sets_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--max-picture-bytes", "0"])
    assert "max_picture_bytes: got 0, expected a number above 0" in capsys.readouterr().err


def under_way(url: str) -> float:
    page = ask(url, path="/metrics").body.decode()
    return float(next(line for line in page.splitlines() if line.startswith("fluxvae_gateway_in_flight ")).split()[1])


# -- pages of other origins ----------------------------------------------------------------------------------------

OTHERS = ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1"]


@pytest.mark.parametrize("settings", [{}, {"host": "0.0.0.0"}, {"token": "secret"}], ids=["loopback", "open", "token"])
def test_a_body_without_a_type_comes_from_no_other_origin(gateways: Gateways, settings: dict[str, Any]) -> None:
    """A browser lets any page send it without asking first, so the Origin counts, whatever the gateway is bound to."""
    url = gateways.start(models=("vae_decoder", MODEL), **settings)
    token = {"Authorization": "Bearer secret"} if "token" in settings else {}
    for path in ("/encode", f"/models/{MODEL}/encode"):
        for origin in OTHERS:
            for nothing in ({}, {"Content-Type": ""}, {"Content-Type": "; q=1"}):
                foreign = ask(url, "POST", path, headers={**token, **nothing, "Origin": origin}, body=FILE)
                refused(foreign, 403, "Origin", origin)
        for site in ("cross-site", "same-site"):
            foreign = ask(url, "POST", path, headers={**token, "Sec-Fetch-Site": site}, body=FILE)
            refused(foreign, 403, "Sec-Fetch-Site", site)
        for own in ({}, {"Origin": url}, {"Origin": url, "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
            assert ask(url, "POST", path, headers={**token, **own}, body=FILE).status == 200, own


def test_an_allowed_hosts_pages_may_send(gateways: Gateways) -> None:
    url = gateways.start(models=(MODEL,), allowed_hosts=["studio.example"])
    headers = {"Origin": "https://studio.example", "Sec-Fetch-Site": "cross-site"}
    assert ask(url, "POST", "/encode", headers=headers, body=FILE).status == 200
    assert ask(url, "POST", "/encode", headers={"Origin": "https://other.example"}, body=FILE).status == 403


def test_it_is_refused_before_its_body_is_read(gateway: str) -> None:
    connection = http.client.HTTPConnection(gateway.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/encode")
    for name, value in (("Origin", "http://evil.example"), ("Content-Length", str(2**20))):
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 403, "although nothing of the body was sent"
    connection.close()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[str]:
    """A page of another origin, which is of the same site: only its port differs."""
    (tmp_path / "index.html").write_text("<!doctype html><title>another origin</title>")
    handler = lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


SEND = """async ([url, file, how]) => {
    const body = new Blob([new Uint8Array(file)], how.endsWith("typed") ? { type: "image/png" } : {});
    if (how === "beacon") return navigator.sendBeacon(url, body) ? "sent" : "not sent";
    try {
        const answer = await fetch(url, { method: "POST", mode: how.startsWith("opaque") ? "no-cors" : "cors", body });
        return answer.type === "opaque" ? "sent" : String(answer.status);
    } catch (error) {
        return "no";
    }
}"""


def sent(page: Page, url: str, how: str) -> str:
    return str(page.evaluate(SEND, [f"{url}/encode", list(FILE), how]))


@pytest.mark.browser
@pytest.mark.parametrize("settings", [{}, {"host": "0.0.0.0"}], ids=["loopback", "open"])
def test_what_a_page_of_another_origin_sends_is_not_encoded(
    gateways: Gateways, serving: Serving, browser: Browser, elsewhere: str, settings: dict[str, Any]
) -> None:
    """In Chromium: without a type the body is sent and refused; with one, the browser asks first and is refused."""
    url = gateways.start(models=("vae_decoder", MODEL), **settings)
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(elsewhere)
        before = triton_requests(serving, MODEL)
        assert [sent(page, url, how) for how in ("opaque", "opaque typed", "beacon")] == ["sent", "sent", "sent"]
        assert [sent(page, url, how) for how in ("cors", "typed")] == ["no", "no"]
        # Four bodies without a type (without asking, the browser leaves it out), and a question whether one with a type
        # may be sent.
        wait_until(lambda: answers(url) == {"403": 5}, f"they were not refused: {answers(url)}", timeout_s=20)
        assert triton_requests(serving, MODEL) == before
        page.goto(url)  # now the page is the gateway's own
        assert [sent(page, url, how) for how in ("cors", "typed")] == ["200", "200"]
    finally:
        context.close()


def answers(url: str) -> dict[str, float]:
    """How many requests to ``/encode`` were answered, by their status."""
    found = {}
    for line in ask(url, path="/metrics").body.decode().splitlines():
        if line.startswith('fluxvae_gateway_requests_total{path="/encode",status="'):
            found[line.split('"')[3]] = float(line.rpartition(" ")[2])
    return found
