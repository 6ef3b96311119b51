"""One image without its batch and one frame, through every door of a real server: the library's reading and pixels.

The gateway is asked as SD.Next asks (``modules/vae/sd_vae_remote.py``), and kijai's ComfyUI-HFRemoteVae (``nodes.py``).
Not covered here: what has no reading (test_gateway_refusals.py), and the reading itself (tests/test_latent_layout.py).
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from tritonclient.utils import InferenceServerException

from fluxvae import InvalidLatentsError, pack_latents
from fluxvae.client import Client, RemoteVAE
from fluxvae.pictures import encode
from serve.client import PROTOCOLS, Request, Serving

FACTORS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "uint8": torch.uint8}
# The last image is as wide as a packed token has features, so only its height and width tell it from 16 packed images.
SIZES = [(4, 6), (5, 7), (4, 64)]
sizes = pytest.mark.parametrize("size", SIZES, ids=["small", "odd", "ambiguous"])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def image(size: tuple[int, int], batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, *size, generator=torch.Generator().manual_seed(0))


def pixels_of(size: tuple[int, int]) -> dict[str, int]:
    return {"height": 8 * size[0], "width": 8 * size[1]}


def bytes_of(latents: torch.Tensor) -> bytes:
    return latents.contiguous().view(torch.uint8).numpy().tobytes()


def sdnext(url: str, latents: torch.Tensor, height: int, width: int, kind: str) -> Any:
    """What SD.Next's ``remote_decode`` does for FLUX.1 and Chroma: each image of the batch, without the batch.

    Packed latents it wraps into a batch of one first, and so sends whole. A parameter that is None is not sent.
    """
    answers = []
    for latent in latents[None] if latents.ndim == 3 else latents:
        params: dict[str, Any] = {
            "input_tensor_type": "binary",
            "shape": list(latent.shape),
            "dtype": str(latent.dtype).split(".", maxsplit=1)[-1],
        }
        headers = {"Content-Type": "tensor/binary"}
        if kind == "raw":
            params |= {"partial_postprocess": False, "output_type": "pt", "output_tensor_type": "binary"}
            headers["Accept"] = "tensor/binary"
        else:
            params |= {"image_format": kind, "output_type": "pil"}
            headers["Accept"] = {"png": "image/png", "jpg": "image/jpeg"}[kind]
        params |= {"width": width, "height": height, **FACTORS}
        answer = requests.post(f"{url}/", params=params, headers=headers, data=bytes_of(latent), timeout=100)
        assert answer.ok, answer.json()
        if kind == "raw":
            shape, dtype = json.loads(answer.headers["shape"]), DTYPES[answer.headers["dtype"]]
            answers.append(torch.frombuffer(bytearray(answer.content), dtype=dtype).reshape(shape))
        else:
            answers.append(Image.open(io.BytesIO(answer.content)).convert("RGB"))
    return torch.cat(answers, dim=0) if kind == "raw" else answers


@sizes
@pytest.mark.parametrize("kind", ["png", "jpg", "raw"])
def test_sdnext(gateway: str, serving: Serving, size: tuple[int, int], kind: str) -> None:
    latents = image(size, batch=2).to(torch.bfloat16)
    answer = sdnext(gateway, latents, **pixels_of(size), kind=kind)
    if kind == "raw":
        assert torch.equal(answer, serving.library.decode_raw(latents, **FACTORS))
        return
    expected = serving.library.decode(latents, output_type="uint8", **FACTORS)
    for picture, one in zip(answer, expected, strict=True):
        file = encode(one, "jpeg" if kind == "jpg" else kind)
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


def test_sdnext_with_packed_latents(gateway: str, serving: Serving) -> None:
    """The latents are as its FLUX.1 pipelines leave them, which floor a size that is no multiple of 16, as we do."""
    tokens = pack_latents(image((4, 6)))
    expected = serving.library.decode_raw(tokens, height=32, width=48, **FACTORS)
    assert torch.equal(sdnext(gateway, tokens, 32, 48, "raw"), expected)
    assert torch.equal(sdnext(gateway, tokens, 40, 50, "raw"), expected)


def test_kijais_node_with_one_frame(gateway: str, serving: Serving) -> None:
    """ComfyUI's latents are raw, (B, C, lh, lw) or with a frame. They come without a size, but ``do_scaling=False``."""
    latents = image((5, 7), batch=2)
    expected = serving.library.decode_raw(latents, raw=True)
    for samples in (latents, latents[:, :, None]):
        query = {"do_scaling": False, "output_type": "pt", "partial_postprocess": False, "dtype": "float32"}
        answer = requests.post(
            f"{gateway}/",
            params={**query, "shape": list(samples.shape)},
            headers={"Content-Type": "tensor/binary", "Accept": "tensor/binary"},
            data=bytes_of(samples),
            timeout=100,
        )
        assert answer.ok, answer.json()
        found = torch.frombuffer(bytearray(answer.content), dtype=torch.float32)
        assert torch.equal(found.reshape(json.loads(answer.headers["shape"])), expected)


@sizes
def test_the_client(serving: Serving, size: tuple[int, int]) -> None:
    latents = image(size)
    expected = serving.library.decode_raw(latents)
    shapes = [latents[0], latents[:, :, None], latents[0, :, None], latents[0].numpy()]
    if not size[0] % 2:
        shapes += [pack_latents(latents), pack_latents(latents)[0]]
    with Client(serving.server.grpc_url) as client:
        for one in shapes:
            assert torch.equal(client.decode(one, **pixels_of(size), output_type="raw"), expected)


def test_as_many_packed_images_as_channels(gateway: str, serving: Serving) -> None:
    """Packed latents (4, 4, 64) and their size are never taken for one image of SD's that has this shape."""
    tokens = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(0))
    expected = serving.library.decode_raw(tokens, height=32, width=32)
    with Client(serving.server.grpc_url) as client:
        assert torch.equal(client.decode(tokens, height=32, width=32, output_type="raw"), expected)
    factors = serving.library.format
    assert (factors.scaling_factor, factors.shift_factor) == tuple(FACTORS.values())
    assert torch.equal(sdnext(gateway, tokens, 32, 32, "raw"), expected)


def test_the_remote_vae_takes_what_a_vae_takes(serving: Serving) -> None:
    latents = image((4, 64), batch=2)
    expected = serving.library.decode_raw(latents, raw=True)
    with Client(serving.server.grpc_url) as client:
        vae = RemoteVAE(client)
        for z in (latents, latents[:, :, None]):
            assert torch.equal(vae.decode(z).sample, expected)
        assert torch.equal(vae.decode(latents[0]).sample, expected[:1])
        for z, message in ((pack_latents(latents), "z: .*packed latents"), (latents[0, 0, :, :5], "5 features")):
            with pytest.raises(InvalidLatentsError, match=message):
                vae.decode(z)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_model_itself_has_a_batch_always(serving: Serving, protocol: Any) -> None:
    """The model's inputs have a row for each image. Latents that read as one image without its batch are refused."""
    as_image = Request(image((4, 6))[0, :8].reshape(8, 4, 6).numpy(), 32, 48)  # Triton lets 8 rows through
    one_channel = Request(image((4, 6))[0, :8].reshape(8, 1, 24).numpy(), 32, 48, parameters={"layout": "unpacked"})
    for request, message in ((as_image, "6 features per token"), (one_channel, "1 channels")):
        with pytest.raises(InferenceServerException, match=message):
            serving.infer(protocol, request)
