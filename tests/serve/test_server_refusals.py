"""The real server on bad requests: each gets its own status over both protocols, and its neighbour gets its image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from fluxvae.serve.triton.server import TritonServer, TritonServerError
from serve.client import (
    BAD_REQUEST,
    GATHER_ROWS,
    NOT_FOUND,
    PROTOCOLS,
    SERVER_ERROR,
    Protocol,
    Request,
    Serving,
    random_latents,
)
from serve.conftest import copy_model

protocols = pytest.mark.parametrize("protocol", PROTOCOLS)

GOOD = random_latents(0, 32, 32)
PAIR = random_latents(0, 32, 32, batch=2)


def with_value(value: float) -> np.ndarray:
    latents = GOOD.copy()
    latents[0, 2, 5] = value
    return latents


def per_row(*values: int) -> np.ndarray:
    return np.array(values, np.int32).reshape(-1, 1)


# Requests that the model refuses, each with a part of the message.
OURS = {
    "features of FLUX.2": (Request(np.zeros((1, 4, 128), np.float32), 32, 32), "looks like FLUX.2"),
    "features of nothing": (Request(np.zeros((1, 4, 63), np.float32), 32, 32), "got 63 features"),
    "too few patches": (Request(GOOD[:, :3], 32, 32), "but the latents hold 3"),
    "no patches": (Request(GOOD[:, :0], 32, 32), "holds no values"),
    "another size": (Request(GOOD, 32, 64), "a grid of 2 x 4 = 8 patches"),
    "zero height": (Request(GOOD, 0, 32), "height: got 0"),
    "negative width": (Request(GOOD, 32, -32), "width: got -32"),
    "both negative": (Request(GOOD, -32, -32), "height: got -32"),
    "smaller than a patch": (Request(GOOD, 15, 32), "a grid of 0 x 2 = 0 patches"),
    "too many pixels": (Request(GOOD, 2**31 - 1, 2**31 - 1), "more than the 16777216 this server allows"),
    "rows of two heights": (Request(PAIR, 32, 32, inputs={"height": per_row(32, 64)}), "height: got [32, 64]"),
    "rows of two widths": (Request(PAIR, 32, 32, inputs={"width": per_row(64, 32)}), "width: got [32, 64]"),
    "NaN": (Request(with_value(np.nan), 32, 32), "latents: got nan at index [0, 2, 5]"),
    "Inf": (Request(with_value(-np.inf), 32, 32), "latents: got -inf at index [0, 2, 5]"),
    "unknown parameter": (Request(GOOD, 32, 32, parameters={"colour": "red"}), "parameter 'colour': unknown"),
    "unknown format": (Request(GOOD, 32, 32, parameters={"format": "bmp"}), "format: got 'bmp'"),
    "format of another type": (Request(GOOD, 32, 32, parameters={"format": 7}), "format: got 7"),
    "quality as text": (Request(GOOD, 32, 32, parameters={"format": "jpeg", "quality": "90"}), "quality: got '90'"),
    "quality out of range": (Request(GOOD, 32, 32, parameters={"format": "jpeg", "quality": 101}), "quality: got 101"),
    "quality of a PNG": (Request(GOOD, 32, 32, parameters={"quality": 90}), "quality: got 90 with format png"),
    "scaling by zero": (Request(GOOD, 32, 32, parameters={"scaling_factor": 0}), "scaling_factor: got 0"),
    "shift as text": (Request(GOOD, 32, 32, parameters={"shift_factor": "0.1"}), "shift_factor: got '0.1'"),
}


@protocols
@pytest.mark.parametrize("case", OURS)
def test_refused_alone_beside_a_good_request(serving: Serving, protocol: Protocol, case: str) -> None:
    bad, message = OURS[case]
    good = Request(random_latents(1, 32, 32, batch=GATHER_ROWS - len(bad.latents)), 32, 32)
    error, answer = serving.infer_together(protocol, [bad, good])
    assert isinstance(error, InferenceServerException)
    assert error.status() == BAD_REQUEST[protocol]
    assert message in error.message()
    assert not isinstance(answer, InferenceServerException), answer
    serving.assert_same_pixels(answer["images"], good)


@protocols
def test_a_picture_of_nan_is_an_error_and_its_group_is_decoded_without_it(serving: Serving, protocol: Protocol) -> None:
    """The latents of one request are finite, but not its pixels. The other shared its decode until that failed."""
    bad = Request(np.full_like(GOOD, 1e38), 32, 32)
    good = Request(random_latents(1, 32, 32, batch=GATHER_ROWS - 1), 32, 32)
    error, answer = serving.infer_together(protocol, [bad, good])
    assert isinstance(error, InferenceServerException)
    assert error.status() == SERVER_ERROR[protocol]
    assert "NaN or Inf" in error.message()
    assert not isinstance(answer, InferenceServerException), answer
    serving.assert_same_pixels(answer["images"], good)


# Requests that Triton itself refuses before it forms a batch, each with the status.
TRITONS = {
    "rank": (Request(GOOD[0], 32, 32, inputs={"height": per_row(32), "width": per_row(32)}), BAD_REQUEST),
    "float16 latents": (Request(GOOD.astype(np.float16), 32, 32), BAD_REQUEST),
    "float64 latents": (Request(GOOD.astype(np.float64), 32, 32), BAD_REQUEST),
    "fractional height": (Request(GOOD, 32, 32, inputs={"height": np.float32([[32.5]])}), BAD_REQUEST),
    "two heights in a row": (Request(GOOD, 32, 32, inputs={"height": np.int32([[32, 32]])}), BAD_REQUEST),
    "no width": (Request(GOOD, 32, 32, inputs={"width": None}), BAD_REQUEST),
    "an input too many": (Request(GOOD, 32, 32, inputs={"depth": per_row(1)}), BAD_REQUEST),
    "empty batch": (Request(GOOD[:0], 32, 32), BAD_REQUEST),
    "more rows than max_batch_size": (Request(random_latents(0, 16, 16, batch=9), 16, 16), BAD_REQUEST),
    "rows that disagree": (Request(PAIR, 32, 32, inputs={"height": per_row(32)}), BAD_REQUEST),
    "unknown output": (Request(GOOD, 32, 32, outputs=("pictures",)), BAD_REQUEST),
}


@protocols
@pytest.mark.parametrize("case", TRITONS)
def test_refused_by_triton(serving: Serving, protocol: Protocol, case: str) -> None:
    request, status = TRITONS[case]
    with pytest.raises(InferenceServerException) as caught:
        serving.infer(protocol, request)
    assert caught.value.status() == status[protocol], caught.value
    good = Request(GOOD, 32, 32)
    serving.assert_same_pixels(serving.infer(protocol, good)["images"], good)


@protocols
def test_unknown_model(serving: Serving, protocol: Protocol) -> None:
    with pytest.raises(InferenceServerException) as caught:
        serving.infer(protocol, Request(GOOD, 32, 32), "vae_unknown")
    assert caught.value.status() == NOT_FOUND[protocol]


@pytest.mark.usefixtures("tritonserver")
def test_a_model_that_cannot_serve_keeps_the_server_from_starting(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLUXVAE_CHECKPOINT", raising=False)

    def set_to(name: str, value: str, default: str = "") -> dict[str, str]:
        line = f'key: "{name}" value: {{ string_value: "%s" }}'
        return {line % default: line % value}

    checkpoint = set_to("checkpoint", str(tiny_checkpoint), "demo")
    copy_model(tmp_path, "no_checkpoint", **set_to("checkpoint", "/no/such/folder", "demo"))
    copy_model(tmp_path, "misspelt", **checkpoint, **{'key: "engine"': 'key: "engin"'})
    with pytest.raises(TritonServerError, match="Triton exited before it was ready") as caught:
        TritonServer(tmp_path).start()
    log = str(caught.value)
    assert "CheckpointError: checkpoint: nothing at /no/such/folder; expected 'demo', a diffusers VAE folder" in log
    assert "InvalidOptionError: config.pbtxt: unknown parameter 'engin', expected one of checkpoint," in log
