"""`fluxvae.client` on the real server, over every transport; what a server does rarely, on a fake of it.

Not covered here: encoding (test_client_encode.py), TLS, and a server on another machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import fluxvae.client
from fluxvae import (
    Decoder,
    FluxVAEError,
    InvalidImagesError,
    InvalidLatentsError,
    InvalidOptionError,
    MemoryLimitError,
    SizeFlooredWarning,
)
from fluxvae.client import AsyncClient, Client, RemoteVAE
from fluxvae.errors import DeadlineExceededError, DecodeCancelled, NonFiniteOutputError, UnavailableError
from fluxvae.latents.reading import Reading
from fluxvae.serve.client.decoding import make_decode_request
from fluxvae.serve.client.encoding import make_encode_request
from fluxvae.serve.client.wire import Unsent, error_of
from models import flux_pipeline, run_pipeline
from serve.client import Serving
from serve.test_server_behaviour import metric
from serve.waiting import wait_for

PROTOCOLS = ("grpc", "http", "shared_memory")
protocols = pytest.mark.parametrize("protocol", PROTOCOLS)


def url_of(serving: Serving, protocol: str) -> str:
    return serving.server.http_url if protocol == "http" else serving.server.grpc_url


def packed(seed: int, height: int, width: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, (height // 16) * (width // 16), 64, generator=generator)


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], set[str]]]:
    """Returns the shared memory regions of the clients in this process, and asserts that none are left in the end."""
    made: list[str] = []

    def make(*args: Any, **options: Any) -> SharedMemory:
        region = SharedMemory(*args, **options)
        made.append(region.name)
        return region

    monkeypatch.setattr("fluxvae.serve.client.shared_memory.SharedMemory", make)

    def there() -> set[str]:
        return set(made) & set(os.listdir("/dev/shm"))

    yield there
    assert not there()


@pytest.fixture
def client(serving: Serving, protocol: str, regions: Callable[[], set[str]]) -> Iterator[Client]:
    with Client(url_of(serving, protocol), protocol=protocol) as client:
        yield client


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_close_leaves_no_connection(serving: Serving, protocol: str) -> None:
    """Even while somebody holds an error of a request. A connection left open would delay the server's shutdown."""
    port = int(url_of(serving, protocol).rpartition(":")[2])

    def connections() -> list[Any]:
        found = psutil.Process().net_connections("tcp")
        return [one for one in found if one.raddr and one.raddr.port == port and one.status != psutil.CONN_TIME_WAIT]

    before = len(connections())
    client = Client(url_of(serving, protocol), protocol=protocol)
    with pytest.raises(InvalidLatentsError) as held:
        client.decode(torch.full((1, 4, 64), float("nan")), height=32, width=32)
    assert len(connections()) == before + 1
    client.close()
    wait_for(lambda: len(connections()) == before, "the connection's end")
    assert held.value


@protocols
def test_every_output_type_is_the_librarys(client: Client, serving: Serving) -> None:
    latents = packed(0, 48, 64, batch=2)
    library = serving.library
    size = {"height": 48, "width": 64}
    for kind in ("uint8", "np", "pt"):
        mine, expected = (
            client.decode(latents, **size, output_type=kind),
            library.decode(latents, **size, output_type=kind),
        )
        assert type(mine) is type(expected)
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(expected))
    assert torch.equal(client.decode(latents, **size, output_type="raw"), library.decode_raw(latents, **size))
    pictures, expected = client.decode(latents, **size), library.decode(latents, **size)
    assert [np.asarray(one).tobytes() for one in pictures] == [np.asarray(one).tobytes() for one in expected]


@protocols
def test_unpacked_latents_factors_and_dtypes(client: Client, serving: Serving) -> None:
    latents = torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(1)).bfloat16()
    mine = client.decode(latents, scaling_factor=0.5, shift_factor=0.25, output_type="uint8")
    expected = serving.library.decode(latents, scaling_factor=0.5, shift_factor=0.25, output_type="uint8")
    np.testing.assert_array_equal(mine, expected)
    np.testing.assert_array_equal(client.decode(latents.float().numpy(), output_type="uint8"),
                                  serving.library.decode(latents.float(), output_type="uint8"))  # fmt: skip


@protocols
def test_a_floored_size_warns(client: Client) -> None:
    with pytest.warns(SizeFlooredWarning, match="the server decoded 32x48"):
        images = client.decode(packed(0, 32, 48), height=40, width=50, output_type="uint8")
    assert images.shape == (1, 32, 48, 3)


@protocols
def test_errors_are_the_librarys(client: Client) -> None:
    latents = packed(0, 32, 32)
    bad = latents.clone()
    bad[0, 1, 2] = float("nan")
    cases: list[tuple[type[Exception], str, torch.Tensor, dict[str, Any]]] = [
        (InvalidLatentsError, "but the latents hold 4", latents, {"height": 32, "width": 64}),
        (InvalidLatentsError, "got nan at index", bad, {"height": 32, "width": 32}),
        (InvalidOptionError, "scaling_factor: got 0", latents, {"height": 32, "width": 32, "scaling_factor": 0}),
        (NonFiniteOutputError, "NaN or Inf", torch.full_like(latents, 1e38), {"height": 32, "width": 32}),
        (InvalidLatentsError, "batch-size must be <= 8", packed(0, 16, 16, batch=9), {"height": 16, "width": 16}),
    ]
    for kind, message, data, options in cases:
        with pytest.raises(kind, match=message):
            client.decode(data, **options)
    assert len(client.decode(latents, height=32, width=32)) == 1


@protocols
def test_a_model_that_is_not_there(serving: Serving, protocol: str) -> None:
    with (
        Client(url_of(serving, protocol), protocol=protocol, model="vae_preview") as client,
        pytest.raises(InvalidOptionError, match="model: got 'vae_preview'.*fluxvae serve --model vae_preview="),
    ):
        client.decode(packed(0, 16, 16), height=16, width=16)


@protocols
def test_many_threads_share_a_client(client: Client, serving: Serving) -> None:
    sizes = [(32, 32), (16, 48), (48, 16), (32, 16)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(4):
                height, width = sizes[(number + turn) % len(sizes)]
                latents = packed(number, height, width)
                mine = client.decode(latents, height=height, width=width, output_type="uint8")
                expected = serving.library.decode(latents, height=height, width=width, output_type="uint8")
                np.testing.assert_array_equal(mine, expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@protocols
def test_async(serving: Serving, protocol: str, regions: Callable[[], set[str]]) -> None:
    async def main() -> list[np.ndarray]:
        async with AsyncClient(url_of(serving, protocol), protocol=protocol) as client:
            work = (client.decode(packed(seed, 32, 48), height=32, width=48, output_type="uint8") for seed in range(6))
            images = await asyncio.gather(*work)
            with pytest.raises(InvalidLatentsError):
                await client.decode(packed(0, 32, 48), height=32, width=32)
            return images

    for seed, image in enumerate(asyncio.run(main())):
        expected = serving.library.decode(packed(seed, 32, 48), height=32, width=48, output_type="uint8")
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("protocol", ["grpc", "shared_memory"])
@pytest.mark.parametrize("how", ["deadline", "cancelled task"])
def test_a_decode_nobody_waits_for_stops(
    serving: Serving, protocol: str, how: str, regions: Callable[[], set[str]]
) -> None:
    latents = packed(0, 2048, 2048)

    def cancellations() -> float:
        return metric(serving.server, "fluxvae_errors_total", model="vae_decoder", kind="DecodeCancelled")

    def in_flight() -> float:
        return metric(serving.server, "fluxvae_in_flight", model="vae_decoder")

    before = cancellations()
    if how == "deadline":
        with (
            Client(serving.server.grpc_url, protocol=protocol) as client,
            pytest.raises(DeadlineExceededError, match="0.5 s"),
        ):
            client.decode(latents, height=2048, width=2048, timeout_s=0.5)
    else:

        async def main() -> None:
            async with AsyncClient(serving.server.grpc_url, protocol=protocol) as client:
                task = asyncio.create_task(client.decode(latents, height=2048, width=2048))
                await asyncio.to_thread(wait_for, lambda: in_flight() > 0, "the decode to begin")
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                assert task.cancelled()

        asyncio.run(main())
    wait_for(lambda: cancellations() == before + 1 and in_flight() == 0, "the decode to stop", 5.0)


def test_shared_memory_is_used_again_and_given_back(serving: Serving, regions: Callable[[], set[str]]) -> None:
    with Client(serving.server.grpc_url, protocol="shared_memory") as client:
        for seed in range(5):
            client.decode(packed(seed, 32, 32), height=32, width=32)
            client.encode(np.zeros((32, 32, 3), np.uint8))
            with pytest.raises(InvalidLatentsError):
                client.decode(packed(seed, 32, 32), height=32, width=48)
        assert len(regions()) == 1


@protocols
def test_no_server(protocol: str) -> None:
    start = time.monotonic()
    with (
        Client("127.0.0.1:1", protocol=protocol, retries=2) as client,
        pytest.raises(UnavailableError, match="is it running, and at this address"),
    ):
        client.decode(packed(0, 16, 16), height=16, width=16, timeout_s=30)
    assert time.monotonic() - start < 10


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next of ``server.answers``, which the test has put there."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, message = self.server.answers.pop(0)  # type: ignore[attr-defined]
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("answers", "left", "kind"),
    [
        ([(503, "Exceeds maximum queue size")] * 2 + [(400, "latents: no")] * 2, 1, InvalidLatentsError),
        ([(503, "Exceeds maximum queue size")] * 9, 5, UnavailableError),
        ([(503, "out of memory; the server's log")] * 2, 1, UnavailableError),
        ([(500, "internal error")] * 2, 1, FluxVAEError),
        ([(503, "Request timeout expired")] * 2, 1, DeadlineExceededError),
    ],
)
def test_only_what_was_refused_before_any_work_is_retried(
    answers: list[tuple[int, str]], left: int, kind: type[Exception]
) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers = list(answers)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with Client(f"127.0.0.1:{server.server_port}", protocol="http", retries=3) as client, pytest.raises(kind):
            client.decode(packed(0, 16, 16), height=16, width=16)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert len(server.answers) == left  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("status", "message", "kind", "encoding"),
    [
        ("INVALID_ARGUMENT", "memory_limit: got 5 bytes", MemoryLimitError, MemoryLimitError),
        ("INVALID_ARGUMENT", "parameter 'colour': unknown", InvalidOptionError, InvalidOptionError),
        ("INVALID_ARGUMENT", "sample: got True", InvalidOptionError, InvalidOptionError),
        ("INVALID_ARGUMENT", "height and width: got 1x2", InvalidLatentsError, InvalidImagesError),
        ("INVALID_ARGUMENT", "batch-size must be <= 8", InvalidLatentsError, InvalidImagesError),
        ("CANCELLED", "decode: cancelled", DecodeCancelled, DecodeCancelled),
        ("UNAVAILABLE", "failed to connect to all addresses", Unsent, Unsent),
        ("UNAVAILABLE", "Socket closed", UnavailableError, UnavailableError),
        ("INTERNAL", "Stub process 'vae_decoder_0_0' is not healthy.", UnavailableError, UnavailableError),
        ("INTERNAL", "the latents hold NaN or Inf", NonFiniteOutputError, NonFiniteOutputError),
        ("INTERNAL", "anything", FluxVAEError, FluxVAEError),
    ],
)
def test_errors_by_status(status: str, message: str, kind: type[FluxVAEError], encoding: type[FluxVAEError]) -> None:
    decode = make_decode_request(
        packed(0, 16, 16), Reading(height=16, width=16), model="vae_decoder", output_type="pil", request_id="it"
    )
    encode = make_encode_request(np.zeros((16, 16, 3), np.uint8), model="vae_encoder")
    assert type(error_of(status, message, decode, timeout_s=1.0)) is kind
    assert type(error_of(status, message, encode, timeout_s=1.0)) is encoding


@pytest.mark.parametrize(
    ("latents", "options", "message"),
    [
        (packed(0, 32, 32), {}, "height: got None"),
        (packed(0, 32, 32), {"height": 32, "width": 32.0}, "width: got 32.0"),
        (packed(0, 32, 32).double(), {"height": 32, "width": 32}, "latents: got torch.float64"),
        (packed(0, 32, 32)[0, 0], {"height": 32, "width": 32}, "latents: got 1 dimensions"),
        (torch.zeros(16, 4, 64), {"width": 512}, "16 packed images.*one image of 32x512.*pass height and width"),
        (torch.zeros(4, 6, 64), {}, "4 packed images.*one image of 48x512"),
        (torch.zeros(1, 16, 3, 4, 4), {}, "video of 3 frames"),
        (torch.zeros(0, 16, 4, 4), {}, "holds no values"),
        ([torch.zeros(16, 4, 4)], {}, "latents: got list"),
        (torch.zeros(1, 16, 4, 4), {"height": 48}, "height: got 48, but unpacked latents"),
        (packed(0, 32, 32), {"height": 32, "width": 32, "output_type": "jpeg"}, "output_type: got 'jpeg'"),
        (packed(0, 32, 32), {"height": 32, "width": 32, "priority": 0}, "priority: got 0"),
        (packed(0, 32, 32), {"height": 32, "width": 32, "scaling_factor": "1"}, "scaling_factor: got '1'"),
    ],
)
def test_refused_before_it_is_sent(latents: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises((InvalidLatentsError, InvalidOptionError), match=message):
        client.decode(latents, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "carrier-pigeon"}, "protocol: got 'carrier-pigeon'"),
        ({"timeout_s": 0}, "timeout_s: got 0"),
        ({"retries": -1}, "retries: got -1"),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        Client("127.0.0.1:1", **options)
    with pytest.raises(InvalidOptionError, match="url: got 'http://x'"):
        Client("http://x")


# -- in a pipeline ---------------------------------------------------------------------------------------------------


def test_a_flux_pipeline_decodes_on_the_server(serving: Serving, library: Decoder) -> None:
    pipe = flux_pipeline(library.vae)
    own = pipe.vae
    with warnings.catch_warnings():
        warnings.simplefilter("error", SizeFlooredWarning)
        latents = run_pipeline(pipe, 48, 64, 2, "latent")
        expected = library.decode(latents, height=48, width=64, output_type="np")
        with fluxvae.client.install(pipe, serving.server.grpc_url) as handle:
            assert isinstance(pipe.vae, RemoteVAE)
            pipe.to("cpu")
            np.testing.assert_array_equal(run_pipeline(pipe, 48, 64, 2, "np"), expected)
            with pytest.raises(InvalidOptionError, match="a RemoteVAE already"):
                fluxvae.client.install(pipe, serving.server.grpc_url)
    assert pipe.vae is own
    handle.remove()


def test_a_pipeline_without_a_vae_of_its_own(serving: Serving, library: Decoder) -> None:
    pipe = flux_pipeline(library.vae)
    expected = library.decode(run_pipeline(pipe, 32, 32, 1, "latent"), height=32, width=32, output_type="np")
    pipe.vae = None
    with fluxvae.client.install(pipe, serving.server.grpc_url):
        np.testing.assert_array_equal(run_pipeline(pipe, 32, 32, 1, "np"), expected)
