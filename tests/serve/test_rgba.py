"""A model whose pictures are RGBA, without Triton: what it answers and takes, and what its clients expect of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxvae import Encoder, InvalidImagesError, InvalidOptionError
from fluxvae.latents.reading import Reading
from fluxvae.serve.client.decoding import make_decode_request
from fluxvae.serve.client.encoding import make_encode_request, make_pixels_request
from fluxvae.serve.gateway.decode import in_the_querys_words
from fluxvae.serve.gateway.errors import InvalidRequest, http_status
from fluxvae.serve.gateway.query import Limits
from fluxvae.serve.gateway.remote_encode import parse
from fluxvae.serve.model.encoding import Encoding
from fluxvae.serve.model.outputs import OUTPUTS
from fluxvae.serve.model.startup import Settings, make_work, warm_up
from models import random_vae

MAX_PIXELS = 10**6
LATENTS = np.random.default_rng(0).standard_normal((2, 6, 64), dtype=np.float32)
PIXELS = np.random.default_rng(1).integers(0, 256, (1, 32, 48, 4), np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rgba")
    random_vae(channels=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoding(checkpoint: Path) -> Any:
    return make_work(Settings(checkpoint=str(checkpoint), device="cpu", max_pixels=MAX_PIXELS))


@pytest.fixture(scope="module")
def encoding(checkpoint: Path) -> Encoding:
    # Not make_work, which sets the filter of warnings that this whole process has.
    return Encoding(Encoder.from_pretrained(checkpoint, device="cpu"), MAX_PIXELS)


def read(decoding: Any, *outputs: str, **parameters: Any) -> Any:
    size = {"height": np.full((2, 1), 32, np.int32), "width": np.full((2, 1), 48, np.int32)}
    return decoding.read(0, {"latents": LATENTS, **size}, json.dumps(parameters), frozenset(outputs))


def answers(decoding: Any, *outputs: str, **parameters: Any) -> dict[str, Any]:
    job = read(decoding, *outputs, **parameters)
    return decoding.make_outputs(job, decoding.compute([job], lambda: False))


def test_outputs_have_four_channels(decoding: Any) -> None:
    warm_up(decoding)
    job, made = read(decoding, *OUTPUTS), answers(decoding, *OUTPUTS)
    shapes = {name: made[name].shape for name in OUTPUTS if name != "images_encoded"}
    last, first = (2, 32, 48, 4), (2, 4, 32, 48)
    assert shapes == {"images": last, "images_np": last, "images_pt": first, "images_raw": first}
    assert sorted(decoding.sizes(job)) == sorted(made[name].nbytes for name in shapes)
    library = decoding.half.decode(torch.from_numpy(LATENTS), height=32, width=48, output_type="uint8")
    np.testing.assert_array_equal(made["images"], library)
    kept = sum(array.nbytes for name, array in made.items() if name in shapes and name != "images_raw")
    assert decoding.output_bytes(job) >= kept + sum(len(file) for [file] in made["images_encoded"])
    assert decoding.held_bytes(32, 48) == made["images_raw"][0].nbytes


@pytest.mark.parametrize("format", ["png", "webp"])
def test_encoded_pictures_keep_alpha(decoding: Any, format: str) -> None:
    made = answers(decoding, "images", "images_encoded", format=format)
    for [file], pixels in zip(made["images_encoded"], made["images"], strict=True):
        picture = Image.open(io.BytesIO(file))
        assert picture.mode == "RGBA"
        kept = slice(None) if format == "png" else slice(3, 4)
        np.testing.assert_array_equal(np.asarray(picture)[..., kept], pixels[..., kept])


def test_jpeg_is_refused_as_the_request_is_read(decoding: Any) -> None:
    with pytest.raises(
        InvalidOptionError, match="format: got 'jpeg' for pictures with alpha; expected 'png' or 'webp'"
    ):
        read(decoding, "images_encoded", format="jpeg")


def encoded(encoding: Encoding, **given: np.ndarray[Any, Any]) -> torch.Tensor:
    job = encoding.read(0, given, "{}", frozenset({"latents"}))
    made = encoding.make_outputs(job, encoding.compute([job], lambda: False))
    return torch.from_numpy(made["latents"])


def test_every_way_to_bring_a_picture_keeps_its_alpha(encoding: Encoding) -> None:
    warm_up(encoding)
    expected = encoding.half.encode(PIXELS)
    file = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(file, "PNG")
    files = np.array([[file.getvalue()]], np.object_)
    assert torch.equal(encoded(encoding, images=PIXELS), expected)
    assert torch.equal(encoded(encoding, images_encoded=files), expected)
    raw = np.ascontiguousarray((PIXELS.astype(np.float32) / 255 * 2 - 1).transpose(0, 3, 1, 2))
    torch.testing.assert_close(encoded(encoding, images_raw=raw), expected, atol=1e-5, rtol=0)


def test_three_channels_are_opaque(encoding: Encoding) -> None:
    """So that a watcher's question, whose pixels are RGB, is answered too."""
    opaque = np.dstack([PIXELS[0, ..., :3], np.full((32, 48), 255, np.uint8)])[None]
    assert torch.equal(encoded(encoding, images=PIXELS[..., :3].copy()), encoded(encoding, images=opaque))


# -- the client, which does not know how many channels the server's pictures have ----------------------------------


def decode_request(output_type: str) -> Any:
    latents = torch.from_numpy(LATENTS)
    return make_decode_request(latents, Reading(height=32, width=48), model="vae_decoder", output_type=output_type)


@pytest.mark.parametrize("output_type", ["pil", "uint8", "np", "pt", "raw"])
def test_the_client_gives_what_the_library_gives(decoding: Any, output_type: str) -> None:
    request = decode_request(output_type)
    answer = answers(decoding, request.output)[request.output]
    assert request.answer_bytes >= answer.nbytes, "there is room for it in shared memory"
    latents, size = torch.from_numpy(LATENTS), {"height": 32, "width": 48}
    library = decoding.half
    expected: Any
    if output_type == "raw":
        expected = library.decode_raw(latents, **size)
    else:
        expected = library.decode(latents, **size, output_type=output_type)
    found = request.read(answer)
    if output_type == "pil":
        assert [one.mode for one in found] == ["RGBA", "RGBA"]
        assert [one.tobytes() for one in found] == [one.tobytes() for one in expected]
    else:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_the_client_sends_alpha_where_there_is_any(encoding: Encoding) -> None:
    clear, opaque = Image.fromarray(PIXELS[0]), Image.fromarray(PIXELS[0]).convert("RGB")
    for images, channels in (
        (clear, 4),
        (opaque, 3),
        (opaque.convert("RGBA"), 3),
        ([opaque, clear], 4),
        (PIXELS, 4),
        (PIXELS[..., :3], 3),
        (PIXELS.astype(np.float32) / 255, 4),
        (torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255, 4),
    ):
        request = make_encode_request(images, model="vae_encoder")
        [(name, array)] = request.inputs.items()
        assert array.shape[1 if name == "images_raw" else 3] == channels
        assert torch.equal(encoded(encoding, **request.inputs), torch.as_tensor(encoding.half.encode(images)))
    resized = make_encode_request(clear, model="vae_encoder", resize=True).inputs["images"]
    np.testing.assert_array_equal(resized[0], PIXELS[0])
    pixels = torch.rand(1, 4, 16, 16) * 2 - 1
    assert make_pixels_request(pixels, model="vae_encoder").inputs["images_raw"].shape == (1, 4, 16, 16)


def test_a_model_of_three_channels_refuses_what_such_a_client_sends() -> None:
    plain = Encoding(Encoder(random_vae(), engine="diffusers"), MAX_PIXELS)
    request = make_encode_request(Image.fromarray(PIXELS[0]), model="vae_encoder")
    with pytest.raises(
        InvalidImagesError, match=r"expected \(batch, height, width, 3\); if the fourth is alpha, latents"
    ):
        encoded(plain, **request.inputs)


# -- the gateway ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "last"),
    [((1, 4, 32, 48), "float32", False), ((4, 32, 48), "uint8", False), ((2, 32, 48, 4), "uint8", True)],
)
def test_the_gateway_takes_tensors_of_four_channels(shape: tuple[int, ...], dtype: str, last: bool) -> None:
    query = [*(("shape", str(length)) for length in shape), ("dtype", dtype)]
    tensor = parse(
        query, "tensor/binary", Limits(max_request_bytes=10**6, max_pixels=10**6, max_picture_bytes=10**6)
    ).tensor
    assert tensor is not None
    assert (tensor.channels_last, tensor.fitted) == (last, (32, 48))


def test_the_gateway_says_what_to_send_in_place_of_jpg(decoding: Any) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        read(decoding, "images_encoded", format="jpeg")
    told = in_the_querys_words(InvalidRequest(str(caught.value)))
    assert (str(told), http_status(told)) == (f"{caught.value}: send image_format=png", 400)
    assert str(in_the_querys_words(InvalidRequest("latents: got NaN"))) == "latents: got NaN"
