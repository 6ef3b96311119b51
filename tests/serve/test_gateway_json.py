"""Latents in base64, as the first clients of the hosted endpoints and kijai's ComfyUI-HFRemoteVae (``nodes.py``) send.

Not covered here: what a query may say (test_gateway.py, test_gateway_refusals.py), bytes without JSON.
"""

from __future__ import annotations

import base64
import io
import json
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import requests
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from fluxvae import InvalidLatentsError, InvalidOptionError
from fluxvae.pictures import encode
from fluxvae.serve.gateway.body import base64_answer, read_json
from serve.client import Serving
from serve.gateways import Answer, Gateways, ask

DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
HEIGHT, WIDTH = 40, 56


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def latents_of(dtype: torch.dtype = torch.float32, batch: int = 1) -> torch.Tensor:
    made = torch.randn(batch, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))
    return made.to(dtype)


def text_of(latents: torch.Tensor) -> str:
    return base64.b64encode(latents.contiguous().view(torch.uint8).numpy().tobytes()).decode()


def first_client(
    url: str,
    tensor: torch.Tensor,
    *,
    output_type: str,
    accept: str,
    partial_postprocess: bool = False,
    output_tensor_type: str = "base64",
) -> Any:
    """Decode as the first ``remote_decode`` did, of which kijai's node has a copy: by default both types are base64."""
    parameters = {
        "do_scaling": True,
        "output_type": output_type,
        "partial_postprocess": partial_postprocess,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).split(".")[-1],
    }
    headers = {"Content-Type": "tensor/base64", "Accept": accept}
    answer = requests.post(url, params=parameters, json={"inputs": text_of(tensor)}, headers=headers, timeout=100)
    if not answer.ok:
        raise RuntimeError(answer.json())
    if accept.startswith("image/"):
        return Image.open(io.BytesIO(answer.content)).convert("RGB")
    if output_tensor_type == "base64":
        content = answer.json()
        data, told = base64.b64decode(content["inputs"]), content["parameters"]
        shape = told["shape"]
    else:
        data, told = answer.content, answer.headers
        shape = json.loads(told["shape"])
    return torch.frombuffer(bytearray(data), dtype=DTYPES[told["dtype"]]).reshape(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("answered", ["base64", "binary"])
def test_tensors_are_the_librarys(gateway: str, serving: Serving, dtype: torch.dtype, answered: str) -> None:
    latents = latents_of(dtype, batch=2)
    asked = {"accept": f"tensor/{answered}", "output_tensor_type": answered}
    raw = first_client(gateway, latents, output_type="pt", **asked)
    assert torch.equal(raw, serving.library.decode_raw(latents))
    pixels = first_client(gateway, latents, output_type="pt", partial_postprocess=True, **asked)
    assert np.array_equal(pixels.numpy(), serving.library.decode(latents, output_type="uint8"))
    for_a_processor = first_client(gateway, latents, output_type="pil", **asked)
    assert torch.equal(for_a_processor, serving.library.decode(latents, output_type="pt"))


@pytest.mark.parametrize("file", ["png", "jpeg"])
def test_pictures_are_what_is_accepted(gateway: str, serving: Serving, file: str) -> None:
    """The first clients had no ``image_format``, and said only what they accept."""
    latents = latents_of()
    picture = first_client(gateway, latents, output_type="pil", accept=f"image/{file}")
    [expected] = serving.library.decode(latents, output_type="uint8")
    same = Image.open(io.BytesIO(encode(expected, file))).convert("RGB")  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(picture), np.asarray(same))
    assert np.array_equal(np.asarray(picture), expected) == (file == "png")


def post(url: str, body: Any, query: str = "", **headers: str) -> Answer:
    given = {"Content-Type": "application/json", **headers}
    return ask(url, "POST", f"/{query}", headers=given, body=body if isinstance(body, bytes) else json.dumps(body))


PARAMETERS = {"shape": [1, 16, 5, 7], "dtype": "float32", "output_type": "pt", "do_scaling": True, "height": None}


def test_parameters_in_the_body(gateway: str, serving: Serving) -> None:
    """Parameters in JSON may be numbers, truth values and null, as for Hugging Face's endpoints."""
    latents = latents_of()
    expected = serving.library.decode_raw(latents).numpy()
    inputs = text_of(latents)
    whole = post(gateway, {"parameters": PARAMETERS, "inputs": inputs})
    half = {name: value for name, value in PARAMETERS.items() if name != "output_type"}
    split = post(gateway, {"inputs": inputs, "parameters": half}, "?output_type=pt&output_tensor_type=binary")
    for answer in (whole, split):
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"] == "tensor/binary"
        assert np.array_equal(np.frombuffer(answer.body, np.float32).reshape(expected.shape), expected)
    told = post(gateway, {"inputs": inputs, "parameters": {**PARAMETERS, "output_tensor_type": "base64"}})
    assert told.headers["content-type"] == "tensor/base64"
    assert int(told.headers["content-length"]) == len(told.body)
    assert base64.b64decode(json.loads(told.body)["inputs"]) == expected.tobytes()


INPUTS = text_of(latents_of())
GOOD = {"inputs": INPUTS, "parameters": PARAMETERS}
DEEP = b'{"inputs": "", "parameters": ' + b"[" * 20000 + b"]" * 20000 + b"}"
REFUSED: dict[str, tuple[Any, str, int, str]] = {
    "no JSON": (b"AAAA", "", 400, "no JSON"),
    "half of it": (json.dumps(GOOD).encode()[:100], "", 400, "no JSON"),
    "a list": ([INPUTS], "", 400, "without the text 'inputs'"),
    "no inputs": ({"parameters": PARAMETERS}, "", 400, "without the text 'inputs'"),
    "inputs that are numbers": ({**GOOD, "inputs": [0.5] * 560}, "", 400, "without the text 'inputs'"),
    "inputs twice": (b'{"inputs": "AAAA", "inputs": "BBBB"}', "", 400, "'inputs' twice"),
    "inputs inside": ({"parameters": {"inputs": "AAAA"}, "inputs": "BBBB"}, "", 400, "without the text 'inputs'"),
    "parameters twice": (b'{"inputs": "AAAA", "parameters": {}, "parameters": {}}', "", 400, "'parameters' twice"),
    "something else": ({**GOOD, "options": {"wait_for_model": True}}, "", 400, "'options' beside 'inputs'"),
    "no base64": ({**GOOD, "inputs": "!!!!"}, "", 400, "inputs: got text that is no base64"),
    "the alphabet of addresses": ({**GOOD, "inputs": "-_-_"}, "", 400, "inputs: got text that is no base64"),
    "base64 with line breaks": ({**GOOD, "inputs": "AAAA\nAAAA"}, "", 400, "without the text 'inputs'"),
    "base64 without its end": ({**GOOD, "inputs": INPUTS.rstrip("=")[:-1]}, "", 400, "no base64"),
    "too few bytes": ({**GOOD, "inputs": "AAAA"}, "", 400, "body: got 3 bytes, expected 2240"),
    "parameters that are text": ({**GOOD, "parameters": "shape=1"}, "", 400, "parameters: got shape=1"),
    "a nested parameter": (
        {**GOOD, "parameters": {**PARAMETERS, "shape": [[1, 16, 5, 7]]}},
        "",
        400,
        "shape: got [1, 16, 5, 7], expected a text",
    ),
    "a parameter here and there": (GOOD, "?dtype=float32", 400, "dtype: got it in the query string and in the body"),
    "an unknown parameter": ({**GOOD, "parameters": {**PARAMETERS, "steps": 4}}, "", 400, "'steps': unknown"),
    "a contradiction": (GOOD, "?input_tensor_type=binary", 400, "input_tensor_type: got 'binary', but Content-Type"),
    "no shape": ({"inputs": INPUTS}, "?dtype=float32", 400, "shape: got 0 dimensions"),
    "very deep": (DEEP, "", 400, "no JSON"),
    "much beside the latents": ({**GOOD, "parameters": {"x": "y" * 2**17}}, "", 400, "beside the text 'inputs'"),
    "too many bytes": (b" " * (2**20 * 4), "", 413, "more than the"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(gateways: Gateways, small: str, case: str) -> None:
    body, query, status, message = REFUSED[case]
    answer = post(small, body, query)
    assert (answer.status, json.loads(answer.body)["error"]) == (status, answer_with(message, answer))


def answer_with(message: str, answer: Answer) -> str:
    told = str(json.loads(answer.body)["error"])
    return told if message in told and len(told) < 600 else message


@pytest.fixture(scope="module")
def small(gateways: Gateways) -> str:
    """A gateway that takes a megabyte of latents."""
    return gateways.start(max_request_bytes=2**20)


def test_contradictions_about_the_answer(gateway: str) -> None:
    for asked, accept in (("binary", "tensor/base64"), ("base64", "tensor/binary")):
        answer = post(gateway, GOOD, f"?output_tensor_type={asked}", Accept=accept)
        assert answer.status == 400
        assert b"output_tensor_type: got" in answer.body
    binary = ask(gateway, "POST", "/?input_tensor_type=base64", headers={"Content-Type": "tensor/binary"}, body=b"")
    assert binary.status == 400
    assert b"input_tensor_type: got 'base64', but Content-Type says that the body is binary" in binary.body


@pytest.mark.parametrize("piece", [b"[", b"[],", b'{"a":', b"1,", b'"inputs"', b'"inputs": '])
def test_json_costs_no_more_than_its_bytes(piece: bytes) -> None:
    """A JSON parser would turn these 20 MB into objects that take half a gigabyte."""
    body = bytearray(piece * (20 * 2**20 // len(piece)))
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(InvalidLatentsError, match="beside the text 'inputs'"):
            read_json(body)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        assert time.perf_counter() - start < 10  # the search must not backtrack
    finally:
        tracemalloc.stop()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(
    told=st.fixed_dictionaries(
        {}, optional={"inputs": st.binary(max_size=40).map(lambda data: base64.b64encode(data).decode()) | JSON}
    )
    | JSON,
    parameters=JSON,
    cut=st.integers(0, 9),
)
def test_any_json_is_read_or_refused(told: Any, parameters: Any, cut: int) -> None:
    if isinstance(told, dict):
        told = {**told, "parameters": parameters}
    body = bytearray(json.dumps(told).encode())
    try:
        latents, pairs = read_json(body[: len(body) - cut] if cut > 6 else body)
    except (InvalidLatentsError, InvalidOptionError):
        return
    assert base64.b64encode(latents).decode() == told["inputs"]
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in pairs)


@given(st.binary(max_size=40), st.lists(st.integers(0, 9), max_size=4))
@example(bytes(range(256)) * 2**13 + b"x", [1])  # large enough for several pieces
def test_a_tensor_as_json(data: bytes, shape: list[int]) -> None:
    length, pieces = base64_answer(memoryview(data), tuple(shape), "uint8")
    text = b"".join(pieces)
    assert len(text) == length
    assert json.loads(text) == {
        "inputs": base64.b64encode(data).decode(),
        "parameters": {"shape": shape, "dtype": "uint8"},
    }
