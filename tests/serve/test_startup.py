"""The model's settings, and its refusal to serve where tensors do not survive the trip."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fluxvae import CheckpointError, Decoder, FluxVAEError, InvalidOptionError, MemoryLimitError, NonFiniteOutputError
from fluxvae.serve.model.decoding import Decoding
from fluxvae.serve.model.startup import Settings, check_tensor_exchange, warm_up
from models import random_vae
from serve import fake_pb_utils


def settings(parameters: dict[str, str], kind: str = "CPU", **environ: str) -> Settings:
    wrapped = {name: {"string_value": value} for name, value in parameters.items()}
    return Settings.read(wrapped, environ, kind=kind, device_id="1")


def test_defaults_leave_the_choice_to_the_decoder() -> None:
    found = settings({"checkpoint": "", "dtype": " ", "max_pixels": "", "threads": ""})
    assert found == Settings(device="cpu")
    assert found.checkpoint == "demo"
    assert found.options() == {"device": "cpu"}


def test_every_parameter_is_honoured() -> None:
    found = settings(
        {
            "checkpoint": "owner/name",
            "revision": "v1",
            "device": "cpu",
            "dtype": "bfloat16",
            "engine": "diffusers",
            "memory_limit": "2GiB",
            "cuda_graphs": "true",
            "keep_memory": "true",
            "max_pixels": "1024",
            "threads": "3",
        }
    )
    assert (found.checkpoint, found.max_pixels, found.threads) == ("owner/name", 1024, 3)
    assert found.options() == {
        "revision": "v1",
        "device": "cpu",
        "dtype": "bfloat16",
        "engine": "diffusers",
        "memory_limit": "2GiB",
        "cuda_graphs": True,
        "keep_memory": True,
    }


def test_the_environment_wins() -> None:
    found = settings(
        {"checkpoint": "demo", "device": "cpu"},
        FLUXVAE_CHECKPOINT="elsewhere",
        FLUXVAE_DEVICE="cuda:3",
        FLUXVAE_MEMORY_LIMIT="1GiB",
    )
    assert (found.checkpoint, found.device, found.memory_limit) == ("elsewhere", "cuda:3", "1GiB")


def test_each_model_has_a_variable_of_its_own_for_its_checkpoint() -> None:
    everything = {f"FLUXVAE_{name}CHECKPOINT": f"{name}weights" for name in ("", "FLUX2_", "PREVIEW_")}
    for vae_class, name in {"AutoencoderKL": "", "AutoencoderKLFlux2": "FLUX2_", "AutoencoderTiny": "PREVIEW_"}.items():
        found = settings({"checkpoint": "file", "vae_class": vae_class}, **everything)
        assert found.checkpoint == f"{name}weights"
    with pytest.raises(
        CheckpointError, match="none is set, and none for AutoencoderTiny ships.* or FLUXVAE_PREVIEW_CHE"
    ):
        settings({"checkpoint": "", "vae_class": "AutoencoderTiny"}, FLUXVAE_CHECKPOINT="a FLUX.1")


@pytest.mark.parametrize(
    ("kind", "device", "expected"),
    [
        ("CPU", "", "cpu"),
        ("CPU", "auto", "cpu"),
        ("CPU", "cuda", "cuda"),
        ("GPU", "", "cuda:1"),
        ("GPU", "cuda", "cuda:1"),
        ("GPU", "cuda:0", "cuda:0"),
        ("GPU", "cpu", "cpu"),
        ("MODEL", "", "auto"),
    ],
)
def test_the_device_is_the_one_triton_gave_unless_told_otherwise(kind: str, device: str, expected: str) -> None:
    assert settings({"device": device}, kind).device == expected


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"chekpoint": "demo"}, r"unknown parameter 'chekpoint', expected one of checkpoint, vae_class, "),
        ({"approximate": "yes"}, r"approximate: got 'yes', expected true or false"),
        ({"cuda_graphs": "1"}, r"cuda_graphs: got '1', expected true or false"),
        ({"threads": "two"}, r"threads: got 'two', expected a whole number above 0"),
        ({"threads": "0"}, r"threads: got '0'"),
        ({"max_pixels": "-1"}, r"max_pixels: got '-1'"),
        ({"max_pixels": "1e6"}, r"max_pixels: got '1e6'"),
    ],
)
def test_refused(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        settings(parameters)


def test_tritons_own_parameters_are_not_ours() -> None:
    assert settings({"EXECUTION_ENV_PATH": "/x", "FORCE_CPU_ONLY_INPUT_TENSORS": "no"}) == Settings(device="cpu")


def test_tensors_that_survive_are_accepted() -> None:
    check_tensor_exchange(fake_pb_utils)


def test_a_first_decode_that_fails_keeps_the_model_from_loading() -> None:
    warm_up(Decoding(Decoder(random_vae()), 4096))
    with pytest.raises(MemoryLimitError, match="memory_limit: got 1000 bytes"):
        warm_up(Decoding(Decoder(random_vae(), memory_limit=1000), 4096))
    broken = random_vae()
    broken.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteOutputError):
        warm_up(Decoding(Decoder(broken), 4096))


class ReadsFirstValueOnly(fake_pb_utils.Tensor):
    """The array that the wheel's stub makes of a tensor under NumPy 2."""

    @staticmethod
    def from_dlpack(name: str, tensor: torch.Tensor) -> fake_pb_utils.Tensor:
        return fake_pb_utils.Tensor(name, np.full(tensor.shape, tensor[0].item(), np.float32))


class SendsNothing(fake_pb_utils.Tensor):
    def __init__(self, name: str, array: np.ndarray) -> None:
        super().__init__(name, array[:0])

    from_dlpack = staticmethod(fake_pb_utils.Tensor.from_dlpack)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (ReadsFirstValueOnly, r"read \[1.0, 2.0, 3.0\], got \[1.0, 1.0, 1.0\].*numpy<2"),
        (SendsNothing, r"sent \[1.0, 2.0, 3.0\], got \[\]"),
    ],
)
def test_corrupted_tensors_are_refused(tensor: type, message: str) -> None:
    with pytest.raises(FluxVAEError, match=message):
        check_tensor_exchange(SimpleNamespace(Tensor=tensor))
