"""diffusers' own, unmodified ``remote_encode`` against a real gateway and Triton: the library's latents, and back.

Not covered here: what is refused, limits, pages of other origins (test_gateway_encode_refusals.py), and the page
(test_page_encode.py).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fluxvae import Encoder
from fluxvae.serve.gateway.pictures import read_pictures
from fluxvae.serve.gateway.query import Limits
from fluxvae.serve.gateway.remote_encode import parse
from serve.client import Serving
from serve.families import Family
from serve.gateways import Answer, Gateways, ask

FACTORS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
SIZES = {"even": (48, 64), "odd": (40, 56)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LIMITS = Limits(max_request_bytes=1, max_picture_bytes=10**7, max_pixels=10**6)
sizes = pytest.mark.parametrize("size", SIZES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture(scope="module")
def gateway(gateways: Gateways) -> str:
    return gateways.start(models=("vae_decoder", "vae_encoder"))


def photograph(size: str = "even", seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZES[size], 3), np.uint8))


def values(dtype: torch.dtype, size: str = "even", batch: int = 1) -> torch.Tensor:
    """Random values in [0, 1] of which 2x - 1 has to be rounded in 16 bits."""
    return torch.rand(batch, 3, *SIZES[size], generator=torch.Generator().manual_seed(1)).to(dtype)


def post(url: str, body: Any, content_type: str | None = None, path: str = "/encode", **query: Any) -> Answer:
    headers = {} if content_type is None else {"Content-Type": content_type}
    return ask(url, "POST", f"{path}?{urlencode(query, doseq=True)}", headers=headers, body=body)


def latents_of(answer: Answer) -> torch.Tensor:
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "tensor/binary"
    assert answer.headers["dtype"] == "float32"
    shape = json.loads(answer.headers["shape"])
    return torch.frombuffer(bytearray(answer.body), dtype=torch.float32).reshape(shape)


def file_of(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


# -- diffusers' client ---------------------------------------------------------------------------------------------


@sizes
@pytest.mark.parametrize(
    ("given_factors", "applied"),
    [
        ({}, {"raw": True}),
        (FACTORS, FACTORS),
        ({"scaling_factor": 0.5}, {"scaling_factor": 0.5, "shift_factor": 0.0}),
        ({"shift_factor": 0.25}, {"scaling_factor": 1.0, "shift_factor": 0.25}),
    ],
    ids=["raw", "both factors", "the scale alone", "the shift alone"],
)
def test_a_picture(
    gateway: str, encoder: Encoder, size: str, given_factors: dict[str, float], applied: dict[str, Any]
) -> None:
    latents = remote_encode(f"{gateway}/encode", photograph(size), **given_factors)
    assert torch.equal(latents, encoder.encode(photograph(size), packed=False, **applied))


@sizes
@dtypes
def test_a_tensor(gateway: str, encoder: Encoder, size: str, dtype: torch.dtype) -> None:
    """One picture without its batch is taken too, and values in [-1, 1] as the processor leaves them."""
    images = values(dtype, size)
    expected = encoder.encode(images, packed=False, raw=True)
    assert torch.equal(remote_encode(f"{gateway}/models/vae_encoder/encode", images), expected)
    assert torch.equal(remote_encode(f"{gateway}/encode", images[0]), expected)
    preprocessed = VaeImageProcessor().normalize(images)
    assert preprocessed.min() < 0
    assert torch.equal(remote_encode(f"{gateway}/encode", preprocessed), expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_tensor_of_bytes(gateway: str, encoder: Encoder, batch: int) -> None:
    pixels = np.stack([np.asarray(photograph(seed=seed)) for seed in range(batch)])
    expected = encoder.encode(pixels, packed=False, **FACTORS)
    last = torch.from_numpy(pixels)
    # diffusers' client makes a copy of a tensor that is not contiguous, and frees it before it reads it.
    for tensor in (last, last.permute(0, 3, 1, 2).contiguous()):
        assert torch.equal(remote_encode(f"{gateway}/encode", tensor, **FACTORS), expected)
        if batch == 1:
            assert torch.equal(remote_encode(f"{gateway}/encode", tensor[0], **FACTORS), expected)


@sizes
@pytest.mark.parametrize("factors", [{}, FACTORS], ids=["raw", "scaled"])
def test_there_and_back(gateway: str, encoder: Encoder, serving: Serving, size: str, factors: dict[str, float]) -> None:
    """What ``remote_encode`` gives, ``remote_decode`` takes with the same factors."""
    latents = remote_encode(f"{gateway}/encode", photograph(size), **factors)
    options: dict[str, Any] = {**factors, "do_scaling": bool(factors), "image_format": "png"}
    picture = remote_decode(gateway, latents, **options)
    [expected] = serving.library.decode(encoder.encode(photograph(size), packed=False), output_type="uint8")
    assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1, "the factors round a little"
    raw = {"scaling_factor": 1.0, "shift_factor": 0.0}
    [exactly] = serving.library.decode(latents, output_type="uint8", **(factors or raw))
    assert np.array_equal(np.asarray(picture), exactly)


def test_errors_arrive_as_its_runtime_error(gateway: str) -> None:
    with pytest.raises(RuntimeError, match="40x50.*multiples of 8.*'request_id'"):
        remote_encode(f"{gateway}/encode", photograph().resize((50, 40)))
    with pytest.raises(RuntimeError, match="'kind': 'InvalidImagesError'"):
        remote_encode(f"{gateway}/encode", torch.full((1, 3, 16, 16), torch.nan))


# -- what other clients may say ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ({"do_scaling": "True"}, {}),
        ({"do_scaling": "False"}, {"raw": True}),
        ({"do_scaling": "True", "shift_factor": 0.5}, {"shift_factor": 0.5}),
    ],
)
def test_scaling(gateway: str, encoder: Encoder, query: dict[str, Any], options: dict[str, Any]) -> None:
    answer = post(gateway, file_of(photograph()), **query)
    assert torch.equal(latents_of(answer), encoder.encode(photograph(), packed=False, **options))


@dtypes
@pytest.mark.parametrize("said", ["True", "False", None])
def test_the_range_of_floats(gateway: str, encoder: Encoder, dtype: torch.dtype, said: str | None) -> None:
    """Values that may be read both ways are read as the client says; where it says nothing, it is told how."""
    images = (values(dtype) / 2 + 0.5).to(dtype)
    assert images.min() >= 0
    query: dict[str, Any] = {"shape": list(images.shape), "dtype": str(images.dtype).partition(".")[2]}
    body = images.contiguous().view(torch.uint8).numpy().tobytes()
    answer = post(gateway, body, "tensor/binary", **query, **({} if said is None else {"do_normalize": said}))
    given_range = images if said != "False" else (images.float() / 2 + 0.5)  # exactly back again for half the values
    expected = encoder.encode(given_range, packed=False, raw=True)
    if said == "False" and dtype is torch.float32:  # 2 * (x / 2 + 0.5) - 1 is not x to the last bit
        assert torch.allclose(latents_of(answer), expected, atol=1e-3)
    else:
        assert torch.equal(latents_of(answer), expected)
    assert ("read as in [0, 1]" in answer.headers.get("x-fluxvae-warning", "")) == (said is None)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_a_sample(gateway: str, encoder: Encoder, seed: int) -> None:
    images = values(torch.float32, batch=3)
    body = images.numpy().tobytes()
    query = {"shape": list(images.shape), "dtype": "float32", "do_normalize": "True", "seed": seed}
    for word in ("true", "True"):
        answer = post(gateway, body, sample=word, **query)
        drawn = encoder.encode(images, packed=False, raw=True, sample=torch.Generator("cpu").manual_seed(seed))
        assert torch.equal(latents_of(answer), drawn)
    assert not torch.equal(drawn, encoder.encode(images, packed=False, raw=True))


@pytest.mark.parametrize("batch", [8, 9, 19])
def test_more_pictures_than_triton_takes_at_once(gateway: str, encoder: Encoder, batch: int) -> None:
    images = values(torch.float32, batch=batch)
    assert torch.equal(remote_encode(f"{gateway}/encode", images), encoder.encode(images, packed=False, raw=True))


def test_a_photograph_is_turned_upright_where_its_type_is_said(gateway: str, encoder: Encoder) -> None:
    """Without a type its pixels are taken as they lie, as the pipelines take what diffusers' client sends."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    file = file_of(photograph(), "JPEG", exif=exif, quality=95)
    lying = Image.open(io.BytesIO(file)).convert("RGB")
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    assert lying.size != upright.size
    for content_type, picture in (
        (None, lying),
        ("", lying),
        ("image/jpeg", upright),
        ("IMAGE/JPEG; q=1", upright),
        ("application/octet-stream", upright),
        ("tensor/binary", upright),
    ):
        answer = post(gateway, file, content_type)
        assert torch.equal(latents_of(answer), encoder.encode(picture, packed=False, raw=True)), content_type


def test_transparency(gateway: str, encoder: Encoder) -> None:
    picture = photograph().convert("RGBA")
    picture.putalpha(128)
    file = file_of(picture)
    answer = post(gateway, file)
    assert answer.status == 400
    assert "transparent" in json.loads(answer.body)["error"]
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    encoded = latents_of(post(gateway, file, background="white"))
    assert torch.equal(encoded, encoder.encode(white, packed=False, raw=True))
    assert not torch.equal(encoded, latents_of(post(gateway, file, background="#000")))


@pytest.mark.parametrize("word", ["true", "True"])
def test_resized_as_diffusers_does(gateway: str, encoder: Encoder, word: str) -> None:
    picture = photograph().resize((60, 50))
    expected = encoder.encode(picture, packed=False, raw=True, resize=True)
    assert expected.shape[2:] == (6, 7)
    assert torch.equal(latents_of(post(gateway, file_of(picture), resize=word)), expected)
    images = torch.rand(1, 3, 50, 60, generator=torch.Generator().manual_seed(2))
    query = {"shape": list(images.shape), "dtype": "float32", "do_normalize": "True", "resize": word}
    answer = post(gateway, images.numpy().tobytes(), **query)
    assert torch.equal(latents_of(answer), encoder.encode(images, packed=False, raw=True, resize=True))


def test_in_chunks_without_a_length(gateway: str, encoder: Encoder) -> None:
    file = file_of(photograph())
    answer = post(gateway, iter([file[:1000], file[1000:]]), "image/png")
    assert torch.equal(latents_of(answer), encoder.encode(photograph(), packed=False, raw=True))


# -- the arithmetic ------------------------------------------------------------------------------------------------


@dtypes
@given(seed=st.integers(0, 2**32 - 1), small=st.booleans())
def test_values_have_the_bits_of_diffusers_processor(dtype: torch.dtype, seed: int, small: bool) -> None:
    """Tiny values too, where 2x - 1 has to be rounded most."""
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    images = (images**20 if small else images).to(dtype)
    query = [("shape", str(side)) for side in images.shape] + [("dtype", str(dtype).partition(".")[2])]
    body = bytearray(images.view(torch.uint8).numpy().tobytes())
    asked = parse([*query, ("do_normalize", "True")], "", LIMITS)
    [(name, array)] = read_pictures(asked, body).inputs.items()
    assert name == "images_raw"
    assert array.dtype == np.float32
    assert torch.equal(torch.from_numpy(array), VaeImageProcessor().normalize(images).float())


@settings(max_examples=50)
@given(height=st.integers(8, 400), width=st.integers(8, 400))
def test_pixels_are_those_that_pytorch_keeps(height: int, width: int) -> None:
    images = torch.arange(3 * height * width, dtype=torch.float32).reshape(1, 3, height, width) / (3 * height * width)
    query = [("shape", str(side)) for side in images.shape] + [("dtype", "float32"), ("resize", "true")]
    asked = parse([*query, ("do_normalize", "False")], "", LIMITS)
    assert asked.tensor is not None
    kept = read_pictures(asked, bytearray(images.numpy().tobytes()))
    expected = VaeImageProcessor().resize(images, *asked.tensor.fitted)
    assert torch.equal(torch.from_numpy(kept.inputs["images_raw"]), expected)
    assert kept.parameters == {"raw": True}


# -- FLUX.2, paths and descriptions --------------------------------------------------------------------------------


FLUX2 = ("vae_encoder_flux2", "vae_decoder_flux2")


@pytest.fixture(scope="module")
def flux2(family: Family) -> Iterator[str]:
    """A gateway to FLUX.2's models alone, the encoder first."""
    gateways = Gateways(family.server.grpc_url, family.server.metrics_url, family.server.config_key)
    yield gateways.start(models=FLUX2)
    gateways.stop()


@pytest.mark.filterwarnings("ignore:`do_scaling` is deprecated:FutureWarning")
def test_flux2(flux2: str, family: Family) -> None:
    url, encoder, decoder = flux2, family.encoders["vae_encoder_flux2"], family.library["vae_decoder_flux2"]
    picture = photograph()
    raw = remote_encode(f"{url}/encode", photograph("odd"))
    assert raw.shape == (1, 32, 5, 7)
    assert torch.equal(raw, encoder.encode(photograph("odd"), packed=False, raw=True))
    scaled = latents_of(post(url, file_of(picture), do_scaling="True"))
    assert scaled.shape == (1, 128, 3, 4)
    assert torch.equal(scaled, encoder.encode(picture, packed=False))
    back = remote_decode(f"{url}/", scaled, image_format="png")
    assert np.array_equal(np.asarray(back), decoder.decode(scaled, output_type="uint8")[0])
    with pytest.raises(RuntimeError, match="scaling_factor: got '0.5', but FLUX.2's latents are rescaled by"):
        remote_encode(f"{url}/encode", picture, scaling_factor=0.5)
    images = values(torch.float32, "odd")
    query = {"shape": list(images.shape), "dtype": "float32"}
    refused = post(url, images.numpy().tobytes(), **query, do_scaling="True")
    assert (refused.status, "multiples of 16" in json.loads(refused.body)["error"]) == (400, True)
    assert json.loads(ask(url, path="/info").body)["model"] == "vae_decoder_flux2", "the first that decodes"


def test_what_is_served_is_told(gateway: str) -> None:
    facts = json.loads(ask(gateway, path="/info").body)
    assert facts["model"] == "vae_decoder"
    assert {name: (each["encodes"], each["path"]) for name, each in facts["models"].items()} == {
        "vae_decoder": (False, "/models/vae_decoder/decode"),
        "vae_encoder": (True, "/models/vae_encoder/encode"),
    }
    assert facts["limits"]["max_picture_bytes"] == 192 * 2**20
    paths = json.loads(ask(gateway, path="/openapi.json").body)["paths"]
    told = {path for path, operations in paths.items() if "post" in operations}
    assert told == {"/", "/decode", "/encode", "/models/vae_decoder/decode", "/models/vae_encoder/encode"}
    assert {each["name"] for each in paths["/encode"]["post"]["parameters"]} >= {"shape", "seed", "background"}
    assert b"POST /encode" in ask(gateway, path="/docs").body


@pytest.mark.parametrize(
    ("models", "there", "missing"),
    [
        (("vae_decoder",), "/decode", ("/encode", "/models/vae_encoder/encode", "/models/vae_decoder/encode")),
        (("vae_encoder",), "/encode", ("/", "/decode", "/models/vae_encoder/decode")),
    ],
    ids=["no encoder", "no decoder"],
)
def test_paths_of_what_is_not_served_do_not_exist(
    gateways: Gateways, models: tuple[str, ...], there: str, missing: tuple[str, ...]
) -> None:
    url = gateways.start(models=models)
    for path in missing:
        answer = post(url, b"x", "image/png", path)
        assert answer.status == 404, path
        assert models[0] in json.loads(answer.body)["error"]
    assert post(url, b"x", "tensor/binary", there).status == 400
    assert ask(url).status == 200, "the page"
    assert set(json.loads(ask(url, path="/openapi.json").body)["paths"]) & set(missing) <= {"/"}
    assert json.loads(ask(url, path="/info").body)["model"] == models[0]


def test_readiness_and_timings(gateways: Gateways) -> None:
    url = gateways.start(models=("vae_encoder",))
    assert ask(url, path="/readyz").status == 200, "by a probe"
    timing = post(url, file_of(photograph())).headers["server-timing"]
    assert [part.partition(";")[0] for part in timing.split(", ")] == ["body", "check", "line", "triton"]
    absent = gateways.start(models=("vae_decoder", "vae_encoder_flux2"))
    reason = json.loads(ask(absent, path="/readyz").body)["reason"]
    assert reason.startswith("vae_encoder_flux2: Triton does not serve the model")
