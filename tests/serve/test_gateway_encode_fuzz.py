"""Requests to encode, made from the gateway's own OpenAPI document, good and bad: never a 500, never a hang."""

from __future__ import annotations

import io
import json
import math
from functools import partial
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fluxvae.serve.gateway.openapi import document
from serve.fuzzing import assert_fuzzed
from serve.gateways import Gateways, ask
from serve.test_gateway_fuzz import GARBAGE, LIMITS, LONGEST_S, by_schema

MODEL = "vae_encoder"
OPERATION = document(LIMITS, "0", models=[MODEL], token=False)["paths"]["/encode"]["post"]
PARAMETERS = {parameter["name"]: parameter for parameter in OPERATION["parameters"] if parameter["in"] == "query"}
STATUSES = {int(code) for code in OPERATION["responses"]} - {500, 502, 503, 504}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
CONTENT_TYPES = [None, "tensor/binary", "application/octet-stream", "image/png", "image/jpeg"]

# Parameters of whose allowed values only few fit the other parameters.
SANE: dict[str, st.SearchStrategy[Any]] = {
    "scaling_factor": st.floats(0.125, 2, width=32),
    "shift_factor": st.floats(-2, 2, width=32),
    "do_scaling": st.just("True"),
    "sample": st.sampled_from(["true", "True"]),
    "seed": st.integers(0, 2**63 - 1),
}


@pytest.fixture(scope="module")
def gateway(gateways: Gateways) -> str:
    return gateways.start(models=(MODEL,))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A picture file of any size, mode and kind, now and then damaged."""
    mode = draw(st.sampled_from(["RGB"] * 6 + ["L", "RGBA", "P", "1", "I;16", "CMYK"]))
    side = st.sampled_from([8, 16, 24, 8, 16, 24, 1, 17])
    picture = Image.new(mode, (draw(side), draw(side)))
    kind = "TIFF" if mode == "CMYK" else draw(st.sampled_from(["PNG", "PNG", "JPEG", "WEBP", "GIF", "BMP"]))
    buffer = io.BytesIO()
    try:
        picture.save(buffer, kind)
    except (OSError, ValueError):  # the kind has no such mode
        picture.convert("RGB").save(buffer, kind)
    file = buffer.getvalue()
    fate = draw(st.integers(0, 9))
    if fate == 0:
        return file[: draw(st.integers(0, len(file)))]
    if fate == 1:
        at = draw(st.integers(0, len(file) - 1))
        return file[:at] + draw(st.binary(min_size=1, max_size=4)) + file[at + 1 :]
    return file


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, str], bytes]:
    """A request whose parameters often fit together at first; then some are left out, replaced or spoilt."""
    query: dict[str, Any] = {}
    body = b""
    tensor = draw(st.booleans())
    if tensor:
        dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
        batch, rows, columns = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
        size = [8 * rows, 8 * columns]
        inner = [*size, 3] if dtype == "uint8" and draw(st.booleans()) else [3, *size]
        query = {"shape": inner if batch == 1 and draw(st.booleans()) else [batch, *inner], "dtype": dtype}
    for name, parameter in PARAMETERS.items():
        if name not in ("shape", "dtype", "seed", "background") and draw(st.integers(0, 4)) == 0:
            query[name] = draw(SANE.get(name, by_schema(parameter["schema"])))
    if "sample" in query:
        query["seed"] = draw(SANE["seed"])
    if not tensor and draw(st.booleans()):
        query.pop("do_normalize", None)
        query["background"] = draw(st.sampled_from(["white", "#102030", "rgb(1,2,3)"]))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        name = draw(st.sampled_from(sorted(PARAMETERS)))
        if draw(st.booleans()):
            query.pop(name, None)
        else:
            query[name] = draw(st.one_of(GARBAGE, st.lists(GARBAGE, max_size=5)))
    if draw(st.integers(0, 19)) == 0:
        query[draw(st.text(max_size=8))] = draw(GARBAGE)
    shape, itemsize = query.get("shape"), ITEMSIZE.get(str(query.get("dtype")))
    if tensor and isinstance(shape, list) and all(isinstance(side, int) for side in shape) and itemsize is not None:
        random = np.random.default_rng(draw(st.integers(0, 99)))
        kind = draw(st.sampled_from(["zeros", "ones", "any"]))
        count = math.prod(shape)
        ones = {"float32": np.float32(1).tobytes(), "float16": np.float16(1).tobytes(), "uint8": b"\xff"}
        one = ones.get(str(query["dtype"]), b"\x80\x3f")
        body = {"zeros": bytes(count * itemsize), "ones": one * count, "any": random.bytes(count * itemsize)}[kind]
        if draw(st.integers(0, 19)) == 0:
            body = body[:-1]
    else:
        body = draw(files())
    content_type = draw(st.sampled_from([*(CONTENT_TYPES[:3] if tensor else CONTENT_TYPES)] * 5 + ["text/plain", ""]))
    headers = {} if content_type is None else {"Content-Type": content_type}
    path = draw(st.sampled_from(["/encode", f"/models/{MODEL}/encode"]))
    return f"{path}?{urlencode(query, doseq=True, errors='replace')}", headers, body


def check(gateway: str, request: tuple[str, dict[str, str], bytes]) -> int:
    target, headers, body = request
    answer = ask(gateway, "POST", target, headers=headers, body=body, timeout_s=LONGEST_S)
    assert answer.status in STATUSES, (answer.status, answer.body)
    assert answer.status != 403, "no page of another origin has sent it"
    if answer.status != 200:
        told = json.loads(answer.body)
        assert told.keys() == {"error", "kind", "request_id"}
        assert len(told["error"]) < 1000
        return answer.status
    latents = np.frombuffer(answer.body, answer.headers["dtype"]).reshape(json.loads(answer.headers["shape"]))
    assert latents.ndim == 4
    assert latents.shape[1] == 16
    assert np.isfinite(latents).all()
    return answer.status


@given(request=requests())
@settings(max_examples=200)
def test_fuzz(gateway: str, request: tuple[str, dict[str, str], bytes]) -> None:
    check(gateway, request)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fuzz_at_length(gateway: str) -> None:
    assert_fuzzed(partial(check, gateway), requests(), 3000)
