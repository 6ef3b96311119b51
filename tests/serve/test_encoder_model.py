"""The models that encode, on the real server: the library's latents, every way to bring a picture, and who is refused.

`test_family` has FLUX.2's. The gateway's and the client's ways to these models have tests of their own.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from family_models import tiny_vae
from fluxvae import CheckpointError, Encoder, InvalidImagesError, InvalidOptionError, MemoryLimitError
from fluxvae.serve.model.encoding import LATENT_OUTPUTS, Encoding
from fluxvae.serve.model.memory import MemoryBudget
from fluxvae.serve.model.picture_requests import read_parameters
from fluxvae.serve.model.startup import Settings, make_work
from models import random_vae
from serve.client import BAD_REQUEST, GATHER_ENCODES, GATHER_ROWS, PROTOCOLS, Protocol, Serving
from serve.test_server_behaviour import metric
from serve.waiting import wait_for

MODEL = "vae_encoder"
protocols = pytest.mark.parametrize("protocol", PROTOCOLS)


def pixels(seed: int, height: int = 32, width: int = 48, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8)


def file_of(picture: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format, **options)
    return buffer.getvalue()


def files(*contents: bytes) -> np.ndarray:
    return np.array([[content] for content in contents], np.object_)


def infer(
    serving: Serving,
    inputs: dict[str, np.ndarray],
    outputs: tuple[str, ...] = ("latents",),
    *,
    protocol: Protocol = "grpc",
    model: str = MODEL,
    **parameters: Any,
) -> dict[str, np.ndarray]:
    module: Any = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    tensors = []
    for name, array in inputs.items():
        tensors.append(module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    asked = [module.InferRequestedOutput(name) for name in outputs]
    url = serving.server.http_url if protocol == "http" else serving.server.grpc_url
    with module.InferenceServerClient(url) as client:
        result = client.infer(model, tensors, outputs=asked, parameters=parameters or None)
        return {name: result.as_numpy(name) for name in outputs}


def same(found: np.ndarray, expected: torch.Tensor) -> None:
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.float().numpy())


# -- what comes back ---------------------------------------------------------------------------------------------------


@protocols
def test_pixels_come_back_as_the_librarys_latents(serving: Serving, encoder: Encoder, protocol: Protocol) -> None:
    images = pixels(0, batch=2)
    made = infer(serving, {"images": images}, LATENT_OUTPUTS, protocol=protocol)
    same(made["latents"], encoder.encode(images))
    same(made["latents_unpacked"], encoder.encode(images, packed=False))
    distribution = DiagonalGaussianDistribution(torch.from_numpy(made["moments"]))
    mean, logvar = encoder.moments(images)
    same(mean.numpy(), distribution.mean)
    same(logvar.numpy(), distribution.logvar)


@protocols
def test_a_file_comes_back_as_its_pixels_would(serving: Serving, encoder: Encoder, protocol: Protocol) -> None:
    images = pixels(1, batch=2)
    given = {"images_encoded": files(*(file_of(image) for image in images))}
    same(infer(serving, given, protocol=protocol)["latents"], encoder.encode(images))


@protocols
def test_floats_are_what_a_vae_encodes(serving: Serving, encoder: Encoder, protocol: Protocol) -> None:
    images = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(2))
    made = infer(serving, {"images_raw": (2 * images - 1).numpy()}, ("latents_unpacked",), protocol=protocol)
    same(made["latents_unpacked"], encoder.encode(images, packed=False))


def test_a_drawing_is_that_of_a_generator_with_this_seed(serving: Serving, encoder: Encoder) -> None:
    images = pixels(3, batch=2)
    for seed in (0, 7, 2**63 - 1):
        expected = encoder.encode(images, sample=torch.Generator().manual_seed(seed))
        same(infer(serving, {"images": images}, sample=True, seed=seed)["latents"], expected)
    assert not np.array_equal(
        infer(serving, {"images": images}, sample=True, seed=1)["latents"],
        infer(serving, {"images": images}, sample=True, seed=2)["latents"],
    )


@pytest.mark.parametrize(
    "factors", [{"raw": True}, {"scaling_factor": 0.5}, {"scaling_factor": 2.0, "shift_factor": 1.0}]
)
def test_own_factors(serving: Serving, encoder: Encoder, factors: dict[str, Any]) -> None:
    images = pixels(4)
    same(infer(serving, {"images": images}, **factors)["latents"], encoder.encode(images, **factors))


def test_sizes_that_do_not_fit_are_resized_only_on_request(serving: Serving, encoder: Encoder) -> None:
    images = pixels(5, 41, 57)
    with pytest.raises(InferenceServerException, match=r"images: got 41x57 .*expected multiples of 16: the nearest"):
        infer(serving, {"images": images})
    same(infer(serving, {"images": images}, resize=True)["latents"], encoder.encode(images, resize=True))
    picture = Image.fromarray(images[0])
    made = infer(serving, {"images_encoded": files(file_of(images[0]))}, resize=True)["latents"]
    same(made, encoder.encode(picture, resize=True))
    odd = pixels(5, 40, 56)
    same(infer(serving, {"images": odd}, ("latents_unpacked",))["latents_unpacked"], encoder.encode(odd, packed=False))


def test_a_photograph_stands_upright_unless_its_pixels_are_meant(serving: Serving, encoder: Encoder) -> None:
    picture = pixels(6)[0]
    turned = Image.fromarray(picture).getexif()
    turned[0x0112] = 6  # a quarter turn clockwise brings it upright
    given = {"images_encoded": files(file_of(picture, exif=turned))}
    same(infer(serving, given)["latents"], encoder.encode(np.rot90(picture, -1).copy()))
    same(infer(serving, given, metadata="apply")["latents"], encoder.encode(np.rot90(picture, -1).copy()))
    same(infer(serving, given, metadata="ignore")["latents"], encoder.encode(picture))


def test_transparency_is_refused_or_put_on_a_background(serving: Serving, encoder: Encoder) -> None:
    clear = np.dstack([pixels(7)[0], np.full((32, 48), 255, np.uint8)])
    clear[:16, :, 3] = 0
    given = {"images_encoded": files(file_of(clear))}
    with pytest.raises(InferenceServerException, match="has transparent pixels, .*a background"):
        infer(serving, given)
    expected = clear[..., :3].copy()
    expected[:16] = 255
    same(infer(serving, given, background="white")["latents"], encoder.encode(expected))


# -- together, and alone -----------------------------------------------------------------------------------------------


def test_requests_that_share_an_execute_get_their_own_latents(serving: Serving, encoder: Encoder) -> None:
    """Of two sizes, with a sample and other factors among them, and one that is refused: 8 rows in one execute."""
    requests: list[tuple[np.ndarray, dict[str, Any]]] = [
        (pixels(10, batch=2), {}),
        (pixels(11), {"sample": True, "seed": 5}),
        (pixels(12, 48, 32), {}),
        (pixels(13), {"raw": True}),
        (pixels(14, batch=2), {"scaling_factor": 3.0}),
        (pixels(15, 33, 48), {}),
    ]
    assert sum(len(images) for images, _ in requests) == GATHER_ROWS

    def one(request: tuple[np.ndarray, dict[str, Any]]) -> Any:
        try:
            return infer(serving, {"images": request[0]}, model=GATHER_ENCODES, **request[1])["latents"]
        except InferenceServerException as error:
            return error

    before = executions(serving)
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(one, requests))
    wait_for(lambda: executions(serving) != before, "an execute to be counted")
    assert executions(serving) - before == Counter({GATHER_ROWS: 1})
    for (images, parameters), answer in zip(requests[:-1], answers[:-1], strict=True):
        seed = parameters.pop("seed", None)
        parameters.pop("sample", None)
        sample = None if seed is None else torch.Generator().manual_seed(seed)
        same(answer, encoder.encode(images, sample=sample, **parameters))
    assert "expected multiples of 16" in str(answers[-1])


def executions(serving: Serving) -> Counter[int]:
    with tritonclient.http.InferenceServerClient(serving.server.http_url) as client:
        [statistics] = client.get_inference_statistics(GATHER_ENCODES)["model_stats"]
    return Counter(
        {batch["batch_size"]: batch["compute_infer"]["count"] for batch in statistics.get("batch_stats", [])}
    )


def test_a_cancelled_request_ends_and_the_model_goes_on(serving: Serving, encoder: Encoder) -> None:
    cancelled = {"name": "fluxvae_errors_total", "model": MODEL, "kind": "DecodeCancelled"}
    before = metric(serving.server, **cancelled)
    images = pixels(16, 2048, 2048)
    tensor = tritonclient.grpc.InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    with tritonclient.grpc.InferenceServerClient(serving.server.grpc_url) as client:
        seen: list[Any] = []
        asked = [tritonclient.grpc.InferRequestedOutput("latents")]
        context = client.async_infer(MODEL, [tensor], lambda result, error: seen.append(error), outputs=asked)
        wait_for(lambda: metric(serving.server, "fluxvae_in_flight", model=MODEL) > 0, "the encode to begin")
        context.cancel()
        wait_for(lambda: seen, "the end of the request")
        assert "CANCELLED" in str(seen[0].status()).upper()
    small = pixels(17)
    same(infer(serving, {"images": small})["latents"], encoder.encode(small))
    wait_for(lambda: metric(serving.server, **cancelled) == before + 1, "the model to give the encode up")


def test_metrics_count_encodes(serving: Serving) -> None:
    def value(name: str) -> float:
        return metric(serving.server, name, model=MODEL)

    before = value("fluxvae_encodes_total")
    infer(serving, {"images": pixels(18, batch=3)})
    wait_for(lambda: value("fluxvae_encodes_total") == before + 3, "three more encodes")
    assert value("fluxvae_encode_seconds_total") > 0
    assert value("fluxvae_peak_bytes") > 0
    assert value("fluxvae_decodes_total") == 0, "a model that encodes decodes nothing"


# -- who is refused ----------------------------------------------------------------------------------------------------

GOOD = {"images": pixels(20)}
TINY_BOMB = b"BM" + (10**5).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
BOMB = (
    TINY_BOMB + (10**5).to_bytes(4, "little") * 2 + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24)
)
REFUSED: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "two kinds of pictures": ({**GOOD, "images_encoded": files(b"x")}, {}, "images: got images and images_encoded"),
    "no file": ({"images_encoded": files(b"no picture")}, {}, "images: cannot be read as a picture"),
    "a truncated file": ({"images_encoded": files(file_of(pixels(0)[0])[:900])}, {}, "images: cannot be read"),
    "a file that claims 10^10 pixels": ({"images_encoded": files(BOMB)}, {}, "images: claims"),
    "16 bits": ({"images_encoded": files(file_of(np.zeros((16, 16), np.uint16)))}, {}, "more than 8 bits"),
    "files of two sizes": (
        {"images_encoded": files(file_of(pixels(0)[0]), file_of(pixels(0, 16, 16)[0]))},
        {},
        "images: got 32x48 .* for picture 0 and 16x16",
    ),
    "too many pixels": ({"images": np.zeros((1, 8192, 4096, 3), np.uint8)}, {}, "pixels, more than the 16777216"),
    "values out of range": (
        {"images_raw": np.full((1, 3, 16, 16), 1.5, np.float32)},
        {},
        r"expected floats in \[-1, 1",
    ),
    "NaN": ({"images_raw": np.full((1, 3, 16, 16), np.nan, np.float32)}, {}, "images: got values from nan"),
    "four channels": (
        {"images_raw": np.zeros((1, 4, 16, 16), np.float32)},
        {},
        r"got a tensor of torch.float32 \(1, 4, 16, 16\), expected floats \(batch, 3, height, width\)",
    ),
    "an unknown parameter": (GOOD, {"format": "png"}, "parameter 'format': unknown"),
    "a seed alone": (GOOD, {"seed": 1}, "sample: got False with seed 1"),
    "a sample without a seed": (GOOD, {"sample": True}, "sample: got True with seed None"),
    "a negative seed": (GOOD, {"sample": True, "seed": -1}, "seed: got -1"),
    "a scale of 0": (GOOD, {"scaling_factor": 0.0}, "scaling_factor: got 0"),
    "raw with a factor": (GOOD, {"raw": True, "scaling_factor": 1.0}, "scaling_factor: got 1.0 with raw=True"),
    "a background for pixels": (GOOD, {"background": "white"}, "background: got 'white' with images"),
    "no colour": ({"images_encoded": files(b"x")}, {"background": "nice"}, "background: got 'nice'"),
    "no way to take metadata": ({"images_encoded": files(b"x")}, {"metadata": "keep"}, "metadata: got 'keep'"),
    "eps without statistics": (GOOD, {"batch_norm_eps": 1e-3}, "batch_norm_eps: got 0.001"),
}


@protocols
@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(serving: Serving, encoder: Encoder, protocol: Protocol, what: str) -> None:
    inputs, parameters, message = REFUSED[what]
    with pytest.raises(InferenceServerException, match=message) as caught:
        infer(serving, inputs, protocol=protocol, **parameters)
    assert caught.value.status() == BAD_REQUEST[protocol]
    same(infer(serving, GOOD)["latents"], encoder.encode(GOOD["images"]))


def test_what_changes_nothing_is_refused(serving: Serving) -> None:
    with pytest.raises(InferenceServerException, match="raw: got True for the output moments alone"):
        infer(serving, GOOD, ("moments",), raw=True)
    infer(serving, GOOD, ("moments", "latents"), raw=True)


def test_a_request_without_a_picture(serving: Serving) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer(serving, {})
    assert caught.value.status() == BAD_REQUEST["grpc"], caught.value
    infer(serving, GOOD)


JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers())
PARAMETER_NAMES = st.sampled_from(
    ["sample", "seed", "scaling_factor", "shift_factor", "raw", "resize", "background", "metadata", "probe", "x"]
)


@settings(max_examples=300)
@given(
    parameters=st.dictionaries(PARAMETER_NAMES, JSON_VALUES, max_size=4),
    kind=st.sampled_from(["images", "images_raw", "images_encoded"]),
    outputs=st.sets(st.sampled_from(LATENT_OUTPUTS), min_size=1),
)
def test_any_parameters_are_read_or_refused(parameters: dict[str, Any], kind: str, outputs: set[str]) -> None:
    try:
        read = read_parameters(json.dumps(parameters), kind, outputs)
    except InvalidOptionError:
        return
    assert read.seed == parameters.get("seed")
    assert read.resize == parameters.get("resize", False)
    factor = parameters.get("scaling_factor")
    assert read.reading.scaling_factor == (None if factor is None else float(factor))  # as JSON's numbers are read


# -- memory, and loading -----------------------------------------------------------------------------------------------


def test_what_a_group_takes_is_within_the_limit() -> None:
    free = Encoder(random_vae(), memory_limit=1 << 30)
    work = Encoding(free, 10**8)

    def job(rows: int) -> Any:
        return work.read(0, {"images": pixels(0, 256, 256, rows)}, "{}", frozenset(LATENT_OUTPUTS))

    row = work.held_bytes(256, 256)
    limit = free.plan(256, 256).peak_bytes + 2 * row
    limited = MemoryBudget(Encoding(Encoder(random_vae(), memory_limit=limit), 10**8))
    assert limited.fits([job(1)] * 2)
    assert not limited.fits([job(1)] * 5)
    budget = MemoryBudget(Encoding(Encoder(random_vae(), memory_limit=row), 10**8))
    with pytest.raises(MemoryLimitError, match=r"1 x 256x256 .* as latents, latents_unpacked, moments take"):
        budget.check(job(1))


def test_bytes_are_those_of_what_is_made() -> None:
    work = Encoding(Encoder(random_vae()), 10**8)
    job = work.read(0, {"images": pixels(0, batch=2)}, "{}", frozenset(LATENT_OUTPUTS))
    moments = work.compute([job], lambda: False)
    made = work.make_outputs(job, moments)
    assert sorted(work.sizes(job)) == sorted(array.nbytes for array in made.values())
    assert 2 * work.held_bytes(32, 48) == 2 * 3 * 32 * 48 * 4 + moments.nbytes
    assert work.output_bytes(job) >= sum(work.sizes(job))


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    tiny_vae(16).save_pretrained(tmp_path / "tiny")
    kind = Settings(checkpoint=str(tmp_path / "tiny"), vae_class="AutoencoderKL", encodes=True, device="cpu")
    with pytest.raises(CheckpointError, match="is AutoencoderTiny, expected AutoencoderKL for this model$"):
        make_work(kind)
    with pytest.raises(InvalidOptionError, match="encodes: got true, .*latents are approximate"):
        make_work(Settings(checkpoint=str(tmp_path / "tiny"), approximate=True, encodes=True, device="cpu"))


def test_images_of_another_class_are_refused_by_the_library(encoder: Encoder) -> None:
    with pytest.raises(InvalidImagesError, match="images: got none, expected one of the inputs"):
        Encoding(encoder, 10**8).read(0, {}, "{}", frozenset({"latents"}))
