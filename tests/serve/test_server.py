"""The real server on good requests: every output, both protocols, mixed sizes in one ``execute``.

Not covered here: the network's own precision (tests of the engines), and throughput (benchmarks/serve.py).
"""

from __future__ import annotations

import io
import json
import urllib.request

import numpy as np
import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from fluxvae import Decoder
from fluxvae.pictures import encode
from fluxvae.serve.triton.server import TritonServer
from serve.client import PROTOCOLS, Protocol, Request, Serving, random_latents

OUTPUTS = ("images", "images_np", "images_pt", "images_encoded", "images_raw")

protocols = pytest.mark.parametrize("protocol", PROTOCOLS)


@protocols
@pytest.mark.parametrize("name", OUTPUTS)
def test_each_output_alone(serving: Serving, protocol: Protocol, name: str) -> None:
    request = Request(random_latents(0, 64, 96), 64, 96, outputs=(name,))
    answer = serving.infer(protocol, request)
    assert answer.keys() == {name}
    check_output(serving, name, answer[name], request)


@protocols
@pytest.mark.parametrize("outputs", [OUTPUTS, None], ids=["named", "by default"])
def test_all_outputs_together(serving: Serving, protocol: Protocol, outputs: tuple[str, ...] | None) -> None:
    request = Request(random_latents(1, 48, 64, batch=3), 48, 64, outputs=outputs)
    answer = serving.infer(protocol, request)
    assert answer.keys() == set(OUTPUTS)
    for name in OUTPUTS:
        check_output(serving, name, answer[name], request)


def check_output(serving: Serving, name: str, value: np.ndarray, request: Request) -> None:
    if name == "images":
        serving.assert_same_pixels(value, request)
    elif name == "images_encoded":
        assert value.shape == (len(request.latents), 1)
        pictures = [Image.open(io.BytesIO(data)) for data in value[:, 0]]
        assert {picture.format for picture in pictures} == {"PNG"}
        serving.assert_same_pixels(np.stack([np.asarray(picture) for picture in pictures]), request)
    elif name == "images_raw":
        expected = serving.decode_raw(request)
        assert (value.shape, value.dtype) == (expected.shape, np.float32)
        assert np.abs(value).max() > 1, "not clamped"
        np.testing.assert_allclose(value, expected, rtol=0, atol=0 if serving.exact else 4e-5)
    else:
        expected = np.asarray(serving.decode(request, name.removeprefix("images_")))
        assert (value.shape, value.dtype) == (expected.shape, np.float32)
        assert value.min() >= 0
        assert value.max() <= 1
        np.testing.assert_allclose(value, expected, rtol=0, atol=0 if serving.exact else 2e-5)


MIXED = [
    Request(random_latents(0, 64, 128), 64, 128),
    Request(random_latents(0, 64, 128), 128, 64),  # the same latents with height and width exchanged
    Request(random_latents(1, 64, 64), 64, 64),
    Request(random_latents(2, 64, 128, batch=2), 64, 128),
    Request(random_latents(3, 48, 80), 48, 80),
    Request(random_latents(4, 128, 64), 128, 64),
    Request(random_latents(5, 64, 128), 79, 130),  # floored to 64x128
]


@protocols
def test_mixed_sizes_in_one_execute(serving: Serving, protocol: Protocol) -> None:
    answers = serving.infer_together(protocol, MIXED)
    for request, answer in zip(MIXED, answers, strict=True):
        assert not isinstance(answer, InferenceServerException), answer
        serving.assert_same_pixels(answer["images"], request)


@protocols
def test_factors_in_one_execute(serving: Serving, protocol: Protocol) -> None:
    """Requests of one size with different factors must each be decoded with their own."""
    data = random_latents(0, 32, 32, batch=2)
    factors = [{}, {"scaling_factor": 0.5}, {"shift_factor": 0.0}, {"scaling_factor": 0.5, "shift_factor": 0.0}]
    requests = [Request(data, 32, 32, parameters=parameters) for parameters in factors]
    images = []
    for request, answer in zip(requests, serving.infer_together(protocol, requests), strict=True):
        assert not isinstance(answer, InferenceServerException), answer
        serving.assert_same_pixels(answer["images"], request)
        images.append(answer["images"].tobytes())
    assert len(set(images)) == len(factors)


@protocols
def test_a_batch_that_fills_the_execute(serving: Serving, protocol: Protocol) -> None:
    request = Request(random_latents(0, 32, 48, batch=8), 32, 48)
    serving.assert_same_pixels(serving.infer(protocol, request)["images"], request)


@protocols
@pytest.mark.parametrize(("format", "quality"), [("png", None), ("jpeg", 60), ("jpeg", None), ("webp", 80)])
def test_image_formats(serving: Serving, protocol: Protocol, format: str, quality: int | None) -> None:
    parameters = {"format": format} | ({} if quality is None else {"quality": quality})
    request = Request(random_latents(0, 32, 32), 32, 32, ("images", "images_encoded"), parameters)
    answer = serving.infer(protocol, request)
    assert answer["images_encoded"][0, 0] == encode(answer["images"][0], format, quality)


def test_http_without_a_client_library(serving: Serving) -> None:
    """The tensors are in plain JSON, as curl would send them."""
    data = random_latents(0, 32, 32)
    request = Request(data, 32, 32)
    body = {
        "inputs": [
            {"name": "latents", "datatype": "FP32", "shape": list(data.shape), "data": data.ravel().tolist()},
            {"name": "height", "datatype": "INT32", "shape": [1, 1], "data": [32]},
            {"name": "width", "datatype": "INT32", "shape": [1, 1], "data": [32]},
        ],
        "outputs": [{"name": "images"}],
    }
    url = f"http://{serving.server.http_url}/v2/models/vae_decoder/infer"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, json.dumps(body).encode()), timeout=100) as response:
        [output] = json.load(response)["outputs"]
    assert (output["name"], output["shape"]) == ("images", [1, 32, 32, 3])
    serving.assert_same_pixels(np.array(output["data"], np.uint8).reshape(output["shape"]), request)


@protocols
def test_the_shipped_folder_serves_the_demo_checkpoint(protocol: Protocol, demo_server: TritonServer) -> None:
    request = Request(random_latents(0, 64, 64), 64, 64)
    serving = Serving(demo_server, Decoder.from_pretrained("demo", device="cpu"))
    serving.assert_same_pixels(serving.infer(protocol, request)["images"], request)
