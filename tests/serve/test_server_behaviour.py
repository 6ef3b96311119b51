"""The real server under pressure and on odd requests: unpacked latents, cancellation, full queue, priorities, metrics.

Not covered here: many requests at once (test_load.py).
"""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fluxvae import Decoder
from fluxvae.serve.triton.server import TritonServer
from serve.client import BAD_REQUEST, PROTOCOLS, Protocol, Request, Serving, random_latents
from serve.conftest import copy_model
from serve.waiting import wait_for
from shared_servers import killed_in_the_end

protocols = pytest.mark.parametrize("protocol", PROTOCOLS)
SLOW = "slow_queue"
LONG = 2048  # height and width in pixels; a decode takes six seconds with the tiny checkpoint, in hundreds of blocks
QUEUE = 3


def metric(server: TritonServer, name: str, **labels: str) -> float:
    """The value of a metric; 0 where the page does not have it yet."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.metrics_url, timeout=10) as answer:
        page = answer.read().decode()
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    for line in page.splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if match and match[1] == name and wanted <= set((match[2] or "").split(",")):
            return float(match[3])
    return 0.0


@pytest.fixture(scope="module")
def pressed(
    tritonserver: None, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, library: Decoder
) -> Iterator[Serving]:
    """A server whose model takes one row at a time and lets three wait."""
    repository = tmp_path_factory.mktemp("pressed")
    copy_model(
        repository,
        SLOW,
        **{"max_batch_size: 8": "max_batch_size: 1", "max_queue_size: 64": f"max_queue_size: {QUEUE}"},
    )
    log = tmp_path_factory.mktemp("pressed_log") / "triton.log"
    environment = {"FLUXVAE_CHECKPOINT": str(tiny_checkpoint), "OMP_NUM_THREADS": "1"}
    alone = TritonServer(repository, open_apis=["statistics"], env=environment, log_path=log)
    with killed_in_the_end(alone) as server:
        yield Serving(server, library)


class Asked:
    """A request on its way; ``error`` or ``images`` once it is done."""

    def __init__(self, serving: Serving, request: Request, request_id: str, **options: Any) -> None:
        self.client = tritonclient.grpc.InferenceServerClient(serving.server.grpc_url)
        self.done = threading.Event()
        self.images: np.ndarray | None = None
        self.error: InferenceServerException | None = None
        self.finished = 0.0
        inputs = []
        for name, array in request.arrays().items():
            inputs.append(tritonclient.grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        self.started = time.monotonic()
        self.context = self.client.async_infer(
            SLOW,
            inputs,
            self._take,
            outputs=[tritonclient.grpc.InferRequestedOutput("images")],
            request_id=request_id,
            parameters=request.parameters or None,
            **options,
        )

    def _take(self, result: Any, error: InferenceServerException | None) -> None:
        self.finished = time.monotonic()
        self.error = error
        self.images = None if result is None else result.as_numpy("images")
        self.done.set()

    def wait(self) -> Asked:
        assert self.done.wait(120)
        self.client.close()
        return self


def long_request(seed: int = 0) -> Request:
    return Request(random_latents(seed, LONG, LONG), LONG, LONG)


def pending(serving: Serving) -> float:
    return metric(serving.server, "nv_inference_pending_request_count", model=SLOW)


@contextmanager
def busy(serving: Serving) -> Iterator[Asked]:
    """Keep the model busy with a long decode, which is cancelled at the end."""
    asked = Asked(serving, long_request(), "busy", priority=1)
    wait_for(lambda: running(serving), "the long decode to begin")
    try:
        yield asked
    finally:
        asked.context.cancel()
        asked.wait()
        wait_for(lambda: not running(serving), "the long decode to stop")


def running(serving: Serving) -> bool:
    """Whether the model has taken a request that it has not answered."""
    return metric(serving.server, "fluxvae_in_flight", model=SLOW) > 0


# -- unpacked latents ------------------------------------------------------------------------------------------------


@protocols
@pytest.mark.parametrize("size", [(7, 5), (8, 6), (1, 1)], ids=str)
def test_unpacked_latents_odd_sizes_too(serving: Serving, protocol: Protocol, size: tuple[int, int]) -> None:
    lh, lw = size
    latents = np.random.default_rng(0).standard_normal((2, 16, lh, lw), dtype=np.float32)
    request = Request(latents.reshape(2, 16, -1), 8 * lh, 8 * lw, parameters={"layout": "unpacked"})
    images = serving.infer(protocol, request)["images"]
    np.testing.assert_array_equal(images, serving.library.decode(torch.from_numpy(latents), output_type="uint8"))


def test_layouts_do_not_mix_in_one_execute(serving: Serving) -> None:
    """Packed and unpacked latents of one size are decoded in the same ``execute``."""
    packed = Request(random_latents(0, 32, 32, batch=4), 32, 32)
    latents = np.random.default_rng(1).standard_normal((4, 16, 4, 4), dtype=np.float32)
    unpacked = Request(latents.reshape(4, 16, 16), 32, 32, parameters={"layout": "unpacked"})
    answers = serving.infer_together("grpc", [packed, unpacked])
    assert not any(isinstance(answer, InferenceServerException) for answer in answers), answers
    serving.assert_same_pixels(answers[0]["images"], packed)
    np.testing.assert_array_equal(
        answers[1]["images"], serving.library.decode(torch.from_numpy(latents), output_type="uint8")
    )


@protocols
@pytest.mark.parametrize(
    ("shape", "height", "width", "layout", "message"),
    [
        ((1, 16, 35), 56, 44, "unpacked", "width: got 44 with layout unpacked, expected a positive multiple of 8"),
        ((1, 16, 35), 0, 40, "unpacked", "height: got 0 with layout unpacked"),
        ((1, 16, 35), 48, 40, "unpacked", "latents: got 35 values per channel"),
        ((1, 8, 35), 56, 40, "unpacked", "latents: got 8 channels"),
        ((1, 16, 64), 64, 64, "tiled", "layout: got 'tiled', expected one of packed, unpacked"),
        ((1, 16, 35), 56, 40, "packed", "but the latents hold 16"),
    ],
)
def test_unpacked_latents_refused(
    serving: Serving, protocol: Protocol, shape: tuple[int, ...], height: int, width: int, layout: str, message: str
) -> None:
    request = Request(np.zeros(shape, np.float32), height, width, parameters={"layout": layout})
    with pytest.raises(InferenceServerException) as caught:
        serving.infer(protocol, request)
    assert caught.value.status() == BAD_REQUEST[protocol]
    assert message in caught.value.message() or "got 35 features" in caught.value.message()


# -- cancellation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_decode_stops_within_a_strip_of_its_cancellation(pressed: Serving, how: str) -> None:
    before = metric(pressed.server, "fluxvae_errors_total", model=SLOW, kind="DecodeCancelled")
    decoded = metric(pressed.server, "fluxvae_decodes_total", model=SLOW)
    options = {"client_timeout": 0.7} if how == "deadline" else {}
    asked = Asked(pressed, long_request(), f"gone-by-{how}", **options)
    wait_for(lambda: running(pressed), "the model to take the request")
    if how == "cancel":
        # Reading and checking the latents comes before the decode. After as long as in the other case it is long done.
        wait_for(lambda: time.monotonic() - asked.started > 0.7, "the decode to be under way")
        asked.context.cancel()
    asked.wait()
    assert asked.error is not None
    assert asked.error.status() == ("StatusCode.CANCELLED" if how == "cancel" else "StatusCode.DEADLINE_EXCEEDED")
    # How long a strip takes depends on the machine. A decode that went on would count as one, and not as cancelled.
    wait_for(lambda: not running(pressed), "the decode to stop")
    assert metric(pressed.server, "fluxvae_errors_total", model=SLOW, kind="DecodeCancelled") == before + 1
    [line] = re.findall(rf"request gone-by-{how}: DecodeCancelled: (.*)", pressed.server.log())
    match = re.fullmatch(r"decode: cancelled after (\d+) of (\d+) blocks.*", line)
    assert match, line
    assert int(match[1]) < int(match[2])
    assert metric(pressed.server, "fluxvae_decodes_total", model=SLOW) == decoded
    small = Request(random_latents(1, 32, 32), 32, 32)
    pressed.assert_same_pixels(pressed.infer("grpc", small, SLOW)["images"], small)


# -- the queue -------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once(pressed: Serving) -> None:
    small = Request(random_latents(1, 32, 32), 32, 32)
    with busy(pressed):
        # Triton may hold one request more than the queue does, because it stages one for the model. So the queue is
        # filled with one more than it holds.
        waiting = [Asked(pressed, small, f"waits-{number}") for number in range(QUEUE + 1)]
        wait_for(lambda: pending(pressed) >= QUEUE, "the queue to fill")
        refused = []
        for number in range(2):
            refused.append(Asked(pressed, small, f"refused-{number}").wait())
    for asked in refused:
        assert asked.error is not None
        assert asked.error.status() == "StatusCode.UNAVAILABLE"
        assert "Exceeds maximum queue size" in asked.error.message()
        assert asked.finished - asked.started < 1.0
    answered = [asked.wait() for asked in waiting]
    good = [asked for asked in answered if asked.error is None]
    assert len(good) >= QUEUE
    for asked in good:
        assert asked.images is not None
        pressed.assert_same_pixels(asked.images, small)


def test_priority_1_overtakes_the_default(pressed: Serving) -> None:
    small = Request(random_latents(1, 32, 32), 32, 32)
    with busy(pressed):
        low = [Asked(pressed, small, f"low-{number}") for number in range(QUEUE)]
        wait_for(lambda: pending(pressed) >= QUEUE - 1, "the low ones to wait")
        high = Asked(pressed, small, "high", priority=1)
        wait_for(lambda: pending(pressed) >= QUEUE, "the high one to wait")
    for asked in (*low, high):
        assert asked.wait().error is None
    # Triton may have staged one request for the model before the one of high priority came.
    assert sum(asked.finished < high.finished for asked in low) <= 1


# -- metrics and logs ------------------------------------------------------------------------------------------------


def test_metrics_count_what_was_done(pressed: Serving) -> None:
    def counts() -> list[float]:
        names = ("fluxvae_decodes_total", "fluxvae_megapixels_total", "fluxvae_decode_seconds_total")
        found = [metric(pressed.server, name, model=SLOW) for name in names]
        found.append(metric(pressed.server, "fluxvae_plan_decodes_total", model=SLOW, rung="memory"))
        return [*found, metric(pressed.server, "fluxvae_errors_total", model=SLOW, kind="InvalidLatentsError")]

    before = counts()
    for seed in range(2):
        pressed.infer("grpc", Request(random_latents(seed, 48, 64), 48, 64), SLOW)
    with pytest.raises(InferenceServerException):
        pressed.infer("grpc", Request(random_latents(0, 48, 64), 64, 64), SLOW)
    after = wait_for(lambda: counts() if counts()[0] == before[0] + 2 else None, "the decodes to be counted")
    decodes, megapixels, seconds, plans, errors = (now - then for now, then in zip(after, before, strict=True))
    assert (decodes, plans, errors) == (2, 2, 1)
    assert megapixels == pytest.approx(2 * 48 * 64 / 1e6)
    assert 0 < seconds < 10
    assert metric(pressed.server, "fluxvae_peak_bytes", model=SLOW) == pressed.library.plan(48, 64).peak_bytes
    assert metric(pressed.server, "fluxvae_spilled_decodes_total", model=SLOW) == 0


def test_the_first_decode_is_done_before_the_server_is_ready(pressed: Serving) -> None:
    assert re.search(rf"fluxvae: {SLOW}_\S+ serves .*; its first decode took \d+\.\d s", pressed.server.log())


def test_what_is_refused_is_logged_with_its_request_id(pressed: Serving) -> None:
    asked = Asked(pressed, Request(random_latents(0, 32, 32), 32, 64), "who-was-it\nforged line").wait()
    assert asked.error is not None
    line = wait_for(
        lambda: re.search(r"request who-was-it\?forged line: InvalidLatentsError: (.*)", pressed.server.log()),
        "the log line",
        10,
    )
    assert "a grid of 2 x 4" in line[1]
