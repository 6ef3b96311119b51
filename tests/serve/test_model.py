"""``1/model.py`` between a fake Triton and a real decoder: what the real server cannot be made to do on demand."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxvae import Decoder
from fluxvae.latents.request import LatentRequest
from fluxvae.serve.model import outputs, triton_model
from fluxvae.serve.model.handover import LOG_MARK, Room
from fluxvae.serve.triton.guardian import RUN_VARIABLE
from serve import fake_pb_utils
from serve.client import assert_same_pixels
from serve.fake_pb_utils import InferenceRequest, TritonError

MODEL = Path(__file__).parents[2] / "triton_models" / "vae_decoder" / "1" / "model.py"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(triton_model, "pb_utils", fake_pb_utils)
    monkeypatch.setattr(fake_pb_utils.Logger, "lines", [])
    monkeypatch.setattr(fake_pb_utils.MetricFamily, "values", {})
    spec = importlib.util.spec_from_file_location("vae_decoder_model", MODEL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(**parameters: str) -> dict[str, str]:
    config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    return {
        "model_config": json.dumps(config),
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
        "model_instance_name": "vae_decoder_0_0",
        "model_name": "vae_decoder",
    }


def execute(model: Any, requests: list[InferenceRequest]) -> list[fake_pb_utils.InferenceResponse]:
    """Run ``execute``, and return the answers to the requests, after asserting that each has exactly one."""
    assert model.execute(requests) is None, "answers are sent, not returned"
    return [response for request in requests for [response] in [request.sender.responses]]


def count(name: str, *labels: str) -> float:
    return fake_pb_utils.MetricFamily.values[(name, "vae_decoder", *labels)]


@pytest.fixture
def model(module: ModuleType, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("FLUXVAE_CHECKPOINT", raising=False)
    model = module.TritonPythonModel()
    model.initialize(arguments(checkpoint=str(tiny_checkpoint)))
    return model


def latents(seed: int, patches: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, patches, 64), dtype=np.float32)


@pytest.mark.parametrize("engine", ["exact", "diffusers"])
def test_images_of_mixed_requests(module: ModuleType, tiny_checkpoint: Path, engine: str) -> None:
    model = module.TritonPythonModel()
    model.initialize(arguments(checkpoint=str(tiny_checkpoint), engine=engine))
    library = Decoder.from_pretrained(tiny_checkpoint, device="cpu", engine=engine)
    one, two = latents(0, 8), latents(1, 8, batch=2)
    requests = [
        InferenceRequest(one, 32, 64),
        InferenceRequest(one, 64, 32),
        InferenceRequest(one[:, :5], 32, 64),
        InferenceRequest(two, 32, 64),
    ]
    wide, tall, bad, pair = execute(model, requests)
    for response, data, (height, width) in ((wide, one, (32, 64)), (tall, one, (64, 32)), (pair, two, (32, 64))):
        expected = library.decode(torch.from_numpy(data), height=height, width=width, output_type="uint8")
        assert_same_pixels(response.outputs()["images"], expected, exact=engine == "exact")
    assert bad.error().code() == TritonError.INVALID_ARG


def test_only_what_is_asked_for_is_computed(model: Any, library: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for name in ("encode", "postprocess"):
        real = getattr(outputs, name)
        monkeypatch.setattr(
            outputs, name, lambda *args, real=real, **more: (made.append(str(args[1])), real(*args, **more))[1]
        )
    data = latents(0, 4)
    expected = library.decode(torch.from_numpy(data), height=32, width=32, output_type="uint8")

    for names, work in {
        ("images",): ["uint8"],
        ("images_np",): ["np"],
        ("images_pt",): ["pt"],
        ("images_encoded",): ["uint8", "webp"],
        ("images_encoded", "images"): ["uint8", "webp"],
        ("images_raw",): [],
    }.items():
        made.clear()
        [response] = execute(model, [InferenceRequest(data, 32, 32, names, format="webp", quality=100)])
        assert made == work
        assert response.outputs().keys() == set(names)
    [response] = execute(model, [InferenceRequest(data, 32, 32, ("images", "images_encoded"), format="webp")])
    picture = Image.open(io.BytesIO(response.outputs()["images_encoded"][0, 0]))
    assert picture.format == "WEBP"
    np.testing.assert_array_equal(response.outputs()["images"], expected)


def test_bfloat16_leaves_as_float32(module: ModuleType, tiny_checkpoint: Path) -> None:
    model = module.TritonPythonModel()
    model.initialize(arguments(checkpoint=str(tiny_checkpoint), dtype="bfloat16"))
    [response] = execute(model, [InferenceRequest(latents(0, 4), 32, 32, ("images_pt",))])
    images = response.outputs()["images_pt"]
    assert (images.dtype, images.shape) == (np.float32, (1, 3, 32, 32))
    assert torch.equal(torch.from_numpy(images).bfloat16().float(), torch.from_numpy(images))


def test_unexpected_errors_are_logged_not_sent(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(model.work.half, "decode_request", broken)
    responses = execute(model, [InferenceRequest(latents(seed, 4), 32, 32) for seed in range(2)])
    for response in responses:
        error = response.error()
        assert error.code() == TritonError.INTERNAL
        assert "secret" not in error.message()
        reference = error.message().rsplit(" ", 1)[1]
        [logged] = [line for line in fake_pb_utils.Logger.lines if reference in line]
        assert "KeyError: '/secret/path'" in logged
        assert "Traceback" in logged


def test_one_request_without_memory_leaves_its_neighbours_alone(
    model: Any, library: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = model.work.half.decode_request
    shapes = []

    def small_memory(request: LatentRequest, **options: Any) -> torch.Tensor:
        shapes.append(tuple(request.latents.shape))
        if request.batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(request, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(model.work.half, "decode_request", small_memory)
    one, two = latents(0, 4), latents(1, 4, batch=2)
    single, pair = execute(model, [InferenceRequest(one, 32, 32), InferenceRequest(two, 32, 32)])
    assert [shape[0] for shape in shapes] == [3, 1, 2], "together, then each alone"
    expected = library.decode(torch.from_numpy(one), height=32, width=32, output_type="uint8")
    np.testing.assert_array_equal(single.outputs()["images"], expected)
    assert pair.error().code() == TritonError.UNAVAILABLE
    assert pair.error().message().startswith("out of memory; the server's log has the details under request ")


def test_a_failing_encoder_fails_only_its_request(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **more: object) -> bytes:
        raise OSError("encoder")

    monkeypatch.setattr(outputs, "encode", broken)
    data = latents(0, 4)
    bad, good = execute(
        model, [InferenceRequest(data, 32, 32, ("images_encoded",)), InferenceRequest(data, 32, 32, ("images",))]
    )
    assert bad.error().code() == TritonError.INTERNAL
    assert good.outputs()["images"].shape == (1, 32, 32, 3)


def test_a_triton_that_misbehaves_leaves_nobody_without_an_answer(model: Any) -> None:
    class Broken(InferenceRequest):
        def is_cancelled(self) -> bool:
            raise RuntimeError("no answer from the server")

    data = latents(0, 4)
    requests = [InferenceRequest(data, 16, 64), Broken(data, 32, 32), InferenceRequest(data, 64, 16)]
    good, broken, after = execute(model, requests)
    assert good.outputs()["images"].shape == (1, 16, 64, 3)
    for response in (broken, after):
        assert response.error().code() == TritonError.INTERNAL
        assert "no answer" not in response.error().message()


def test_cancelled_requests_are_not_decoded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.work.half, "decode_request", lambda *args, **kwargs: pytest.fail("decoded"))
    [response] = execute(model, [InferenceRequest(latents(0, 4), 32, 32, cancelled=True)])
    assert response.error().code() == TritonError.CANCELLED


def test_the_pixel_limit_is_the_configured_one(module: ModuleType, tiny_checkpoint: Path) -> None:
    model = module.TritonPythonModel()
    model.initialize(arguments(checkpoint=str(tiny_checkpoint), max_pixels="2048"))
    small, large = execute(
        model, [InferenceRequest(latents(0, 4, batch=2), 32, 32), InferenceRequest(latents(0, 4, batch=3), 32, 32)]
    )
    assert small.outputs()["images"].shape == (2, 32, 32, 3)
    assert "more than the 2048 this server allows" in large.error().message()


def test_threads_are_set(module: ModuleType, tiny_checkpoint: Path) -> None:
    before = torch.get_num_threads()
    try:
        module.TritonPythonModel().initialize(arguments(checkpoint=str(tiny_checkpoint), threads=str(before + 1)))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"checkpoint": "/no/such/folder"}, "CheckpointError: checkpoint: nothing at /no/such/folder"),
        ({"engine": "warp"}, "InvalidOptionError: engine: got 'warp'"),
        ({"dtype": "int8"}, "InvalidOptionError: dtype: got 'int8'"),
        ({"device": "tpu"}, "InvalidOptionError: device: got 'tpu'"),
        ({"engine": "diffusers", "memory_limit": "1GiB"}, "InvalidOptionError: memory_limit: got '1GiB'"),
    ],
)
def test_refuses_to_load(module: ModuleType, tiny_checkpoint: Path, parameters: dict[str, str], message: str) -> None:
    with pytest.raises(fake_pb_utils.TritonModelException, match=message):
        module.TritonPythonModel().initialize(arguments(**{"checkpoint": str(tiny_checkpoint), **parameters}))


def test_refuses_a_stub_that_corrupts(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_pb_utils.Tensor, "as_numpy", lambda tensor: np.full(3, tensor._array[0]))
    with pytest.raises(fake_pb_utils.TritonModelException, match="corrupt tensors"):
        module.TritonPythonModel().initialize(arguments())


def test_finalize_lets_the_weights_go(model: Any) -> None:
    model.finalize()
    assert model.work is None


@pytest.mark.parametrize("supervised", [False, True])
def test_an_answer_that_triton_does_not_take(model: Any, monkeypatch: pytest.MonkeyPatch, supervised: bool) -> None:
    """Triton takes no other answer then. Under `fluxvae serve` the process ends, so that Triton tells the client."""
    ended: list[int] = []
    monkeypatch.setattr(triton_model.os, "_exit", ended.append)
    monkeypatch.setenv(RUN_VARIABLE, "a run") if supervised else monkeypatch.delenv(RUN_VARIABLE, raising=False)
    requests = [InferenceRequest(latents(seed, 4), 32, 32) for seed in range(2)]
    monkeypatch.setattr(requests[0].sender, "full", True, raising=False)
    model.execute(requests)
    assert [len(request.sender.responses) for request in requests] == [0, 1]
    assert any(line.startswith(LOG_MARK) for line in fake_pb_utils.Logger.lines)
    assert count("fluxvae_in_flight") == 0
    assert ended == [1] * supervised


@pytest.mark.parametrize("requests", [1, 2])
def test_where_room_is_tight_a_single_answer_is_returned(
    model: Any, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    """Triton can then answer a failure with an error. It could not if other requests had been answered already."""
    monkeypatch.setattr(triton_model, "find_room", lambda sizes: Room.TIGHT)
    asked = [InferenceRequest(latents(seed, 4), 32, 32) for seed in range(requests)]
    returned = model.execute(asked)
    assert count("fluxvae_in_flight") == 0
    if requests == 1:
        [answer] = returned
        assert asked[0].sender.counted == 0
        assert answer.outputs()["images"].shape == (1, 32, 32, 3)
    else:
        assert returned is None
        assert [request.sender.counted for request in asked] == [1, 1]


def probe() -> InferenceRequest:
    """A request as a health check sends it."""
    return InferenceRequest(np.zeros((1, 1, 1), np.float32), 16, 16, probe=True)


def decodes(model: Any, requests: list[InferenceRequest]) -> float:
    """Answer requests, and return how many images were decoded for that."""
    before = count("fluxvae_decodes_total")
    for response in execute(model, requests):
        with contextlib.suppress(AssertionError):
            response.outputs()
    return count("fluxvae_decodes_total") - before


def test_a_watchers_question_needs_no_decode_where_one_was_just_answered(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(triton_model.time, "monotonic", lambda: now)
    assert decodes(model, [probe()]) == 1, "the first"
    [again] = execute(model, [probe()])
    assert count("fluxvae_decodes_total") == 1
    assert again.outputs()["images"].shape == (1, 16, 16, 3)
    now += 299
    assert decodes(model, [InferenceRequest(latents(0, 4), 32, 32)]) == 1
    now += 299
    assert decodes(model, [probe()]) == 0, "a real request proves life too"
    now += 2
    assert decodes(model, [probe(), probe()]) == 2, "not for ever"
    assert decodes(model, [probe()]) == 0


def test_after_a_failure_a_watcher_is_not_told_that_all_is_well(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert decodes(model, [probe()]) == 1
    monkeypatch.setattr(model.work.half, "decode_request", broken)
    [answer] = execute(model, [probe()])
    assert answer.outputs(), "nobody knows yet"
    [answer] = execute(model, [InferenceRequest(latents(0, 4), 32, 32)])
    assert answer.error().code() == TritonError.INTERNAL
    for _ in range(2):
        [answer] = execute(model, [probe()])
        assert answer.error().code() == TritonError.INTERNAL


def test_what_a_client_got_wrong_says_nothing_about_the_model(model: Any) -> None:
    assert decodes(model, [probe()]) == 1
    [answer] = execute(model, [InferenceRequest(np.full((1, 4, 64), np.nan, np.float32), 32, 32)])
    assert answer.error().code() == TritonError.INVALID_ARG
    assert decodes(model, [probe()]) == 0
