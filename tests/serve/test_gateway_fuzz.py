"""Requests made from the gateway's own OpenAPI document, good and bad, to the real server: never a 500, never a hang.

Not covered here: broken HTTP itself, which is uvicorn's to refuse.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import time
from functools import partial
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fluxvae.serve.gateway.openapi import document
from fluxvae.serve.gateway.query import Limits
from serve.fuzzing import assert_fuzzed
from serve.gateways import ask

LIMITS = Limits(max_request_bytes=2**24, max_picture_bytes=2**24, max_pixels=2**24)
OPERATION = document(LIMITS, "0", token=False)["paths"]["/decode"]["post"]
PARAMETERS = {parameter["name"]: parameter for parameter in OPERATION["parameters"] if parameter["in"] == "query"}
STATUSES = {int(code) for code in OPERATION["responses"]} - {500, 502, 503, 504}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
JSON = ("tensor/base64", "application/json")
ACCEPTED = ("tensor/binary", "tensor/base64", "image/png", "image/jpeg")
LONGEST_S = 30.0  # how long any answer may take on a busy machine, with the tiny images used here

GARBAGE = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "1e9", "nan", "inf", "None", "null", "[]", "%00", "True,False", "９", "1_0", "0x10"]
    ),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)

# Parameters of whose allowed values only few fit the other parameters.
SANE = {
    "scaling_factor": st.floats(0.125, 2, width=32),
    "shift_factor": st.floats(-2, 2, width=32),
    "do_scaling": st.just("True"),
}


def by_schema(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Draw values that the OpenAPI document allows."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "array":
        return st.lists(by_schema(schema["items"]), min_size=schema["minItems"], max_size=schema["maxItems"])
    if schema["type"] == "integer":
        return st.integers(schema["minimum"], schema["maximum"])
    assert schema["type"] == "number"
    return st.floats(width=32)


@st.composite
def queries(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a query. Often its parameters fit together at first, and then some are left out, replaced or spoilt."""
    query: dict[str, Any] = {"dtype": draw(by_schema(PARAMETERS["dtype"]["schema"]))}
    batch, rows, columns = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        query |= {"shape": [batch, rows * columns, 64], "height": 16 * rows, "width": 16 * columns}
    else:
        front = draw(st.sampled_from([[batch, 16], [16], [16, 1], [batch, 16, 1]]))  # with and without batch and frame
        query["shape"] = [*front, rows, columns]
    for name, parameter in PARAMETERS.items():
        if name not in query and name not in ("height", "width") and draw(st.integers(0, 3)) == 0:
            query[name] = draw(SANE.get(name, by_schema(parameter["schema"])))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        name = draw(st.sampled_from(sorted(PARAMETERS)))
        fate = draw(st.integers(0, 3))
        if fate == 0:
            query.pop(name, None)
        elif fate == 1:
            query[name] = draw(by_schema(PARAMETERS[name]["schema"]))
        else:
            query[name] = draw(st.one_of(GARBAGE, st.lists(GARBAGE, max_size=4)))
    if draw(st.integers(0, 19)) == 0:
        query[draw(st.text(max_size=8))] = draw(GARBAGE)
    return query


def right_length(query: dict[str, Any]) -> int:
    """Return how many bytes the body should have, by the query; 64 where the query says nothing usable."""
    shape, itemsize = query.get("shape"), ITEMSIZE.get(str(query.get("dtype")))
    if isinstance(shape, list) and all(isinstance(each, int) for each in shape) and itemsize is not None:
        length = math.prod(shape) * itemsize
        return length if length <= 2**16 else 64
    return 64


@st.composite
def bodies(draw: st.DrawFn, length: int) -> bytes:
    kind = draw(st.integers(0, 9))
    if kind <= 7:
        values = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(length // 2 + 2, dtype=np.float32)
        return values.tobytes()[:length]
    if kind == 8:
        return np.random.default_rng(draw(st.integers(0, 99))).bytes(length)  # such bytes hold huge values, NaN and Inf
    return draw(st.binary(max_size=300))


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, str], bytes]:
    query = draw(queries())
    headers = {
        "Content-Type": draw(st.sampled_from([*OPERATION["requestBody"]["content"]] * 9 + ["text/plain", ""])),
        "Accept": draw(st.sampled_from([*ACCEPTED, "*/*", "", "text/html;q=1"])),
    }
    if draw(st.integers(0, 4)) == 0:
        # Only what HTTP allows in a header, because uvicorn itself refuses everything else.
        allowed = st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f")
        headers["X-Request-ID"] = draw(st.text(allowed, max_size=140))
    path = draw(st.sampled_from(["/", "/decode"]))
    body = draw(bodies(right_length(query)))
    if headers["Content-Type"] in JSON and draw(st.integers(0, 9)):
        body, query = as_json(draw, query, body)
    return f"{path}?{urlencode(query, doseq=True, errors='replace')}", headers, body


def as_json(draw: st.DrawFn, query: dict[str, Any], latents: bytes) -> tuple[bytes, dict[str, Any]]:
    """Draw a JSON body that holds the latents, and perhaps some parameters, which then are not in the query."""
    inside = {name: query[name] for name in query if draw(st.booleans())} if draw(st.booleans()) else {}
    told: dict[str, Any] = {"inputs": base64.b64encode(latents).decode()}
    if inside or draw(st.booleans()):
        told["parameters"] = inside
    if draw(st.integers(0, 9)) == 0:
        told[draw(st.sampled_from(["inputs", "parameters", "more"]))] = draw(ANY_JSON)
    return json.dumps(told).encode(), {name: value for name, value in query.items() if name not in inside}


def check(gateway: str, request: tuple[str, dict[str, str], bytes]) -> int:
    target, headers, body = request
    start = time.perf_counter()
    answer = ask(gateway, "POST", target, headers=headers, body=body, timeout_s=LONGEST_S)
    assert time.perf_counter() - start < LONGEST_S
    assert answer.status in STATUSES, (answer.status, answer.body)
    assert 0 < len(answer.headers["x-request-id"]) <= 128
    kind = answer.headers["content-type"]
    if answer.status != 200:
        told = json.loads(answer.body)
        assert told.keys() == {"error", "kind", "request_id"}
        assert len(told["error"]) < 1000
    elif kind == "tensor/base64":
        told = json.loads(answer.body)
        shape, dtype = told["parameters"]["shape"], np.dtype(told["parameters"]["dtype"])
        assert np.isfinite(np.frombuffer(base64.b64decode(told["inputs"], validate=True), dtype).reshape(shape)).all()
    elif kind == "tensor/binary":
        shape, dtype = json.loads(answer.headers["shape"]), np.dtype(answer.headers["dtype"])
        assert math.prod(shape) * dtype.itemsize == len(answer.body)
        assert np.isfinite(np.frombuffer(answer.body, dtype)).all()
    else:
        picture = Image.open(io.BytesIO(answer.body))
        picture.load()
        assert kind == f"image/{picture.format.lower()}"  # type: ignore[union-attr]
    return answer.status


@given(request=requests())
@settings(max_examples=200)
def test_fuzz(gateway: str, request: tuple[str, dict[str, str], bytes]) -> None:
    check(gateway, request)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fuzz_at_length(gateway: str) -> None:
    assert_fuzzed(partial(check, gateway), requests(), 5000)


def test_broken_http_gets_an_answer(gateway: str) -> None:
    """uvicorn refuses these itself, and the server goes on."""
    for line in (
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\nno header\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        connection = http.client.HTTPConnection(gateway.removeprefix("http://"), timeout=LONGEST_S)
        connection.connect()
        connection.sock.sendall(line)
        assert connection.sock.recv(1000).startswith(b"HTTP/1.1 400 ")
        connection.close()
    assert ask(gateway, path="/healthz").status == 200
