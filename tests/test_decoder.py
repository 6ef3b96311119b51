"""`Decoder` with the reference engine: its options, its errors, and what a caller gets back."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import fluxvae
from fluxvae import (
    DecodeCancelled,
    Decoder,
    InvalidLatentsError,
    InvalidOptionError,
    MemoryLimitError,
    NonFiniteOutputError,
    SizeFlooredWarning,
)
from fluxvae.errors import FluxVAEError, status_of
from fluxvae.pictures import encode
from models import random_vae

LATENTS = torch.randn(2, 4 * 6, 64, generator=torch.Generator().manual_seed(0))
SIZE = {"height": 64, "width": 96}


def test_output_types(decoder: Decoder) -> None:
    pt, array, pixels, pictures = (
        decoder.decode(LATENTS, **SIZE, output_type=kind) for kind in ("pt", "np", "uint8", "pil")
    )
    assert (pt.shape, pt.dtype) == ((2, 3, 64, 96), torch.float32)
    assert float(pt.min()) >= 0
    assert float(pt.max()) <= 1
    assert (array.shape, array.dtype) == ((2, 64, 96, 3), np.float32)
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert (pixels.shape, pixels.dtype) == ((2, 64, 96, 3), np.uint8)
    assert [picture.size for picture in pictures] == [(96, 64)] * 2
    assert np.array_equal(pixels, np.stack([np.asarray(picture) for picture in pictures]))


def test_progress_and_cancel(decoder: Decoder) -> None:
    seen: list[tuple[int, int]] = []
    decoder.decode(LATENTS, **SIZE, progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]
    with pytest.raises(DecodeCancelled):
        decoder.decode(LATENTS, **SIZE, cancel=lambda: True)


def test_auto_leaves_a_callers_module_as_it_is() -> None:
    vae = random_vae(dtype=torch.bfloat16)
    decoder = Decoder(vae)
    assert decoder.vae is vae
    assert (decoder.dtype, decoder.device.type) == (torch.bfloat16, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float16])
def test_dtypes(dtype: str | torch.dtype) -> None:
    decoder = Decoder(random_vae(), dtype=dtype, engine="diffusers")
    image = decoder.decode(LATENTS, **SIZE, output_type="pt")
    assert image.dtype == decoder.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)


BAD_OPTIONS = {
    "engine": {"engine": "fast"},
    "dtype": {"dtype": "float64"},
    "torch dtype": {"dtype": torch.int8},
    "device": {"device": "tpu"},
    "device type": {"device": "meta"},
    "memory_limit": {"engine": "diffusers", "memory_limit": "1GiB"},
    "kernels": {"engine": "diffusers", "kernels": "winograd"},
    "spill_dir": {"engine": "diffusers", "spill_dir": "."},
    "tiling": {"engine": "exact", "tiling": True},
    "slicing": {"slicing": True},
    "limit text": {"memory_limit": "lots"},
    "limit sign": {"memory_limit": -1},
    "unknown kernels": {"kernels": "fast"},
    "no such folder": {"spill_dir": "no/such/folder"},
}


@pytest.mark.parametrize("options", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_refused_by_name(vae: AutoencoderKL, options: dict) -> None:
    with pytest.raises(InvalidOptionError, match=f"{list(options)[-1]}: got"):
        Decoder(vae, **options)


def test_cuda_is_refused_where_there_is_none(vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidOptionError, match="sees no CUDA GPU"):
        Decoder(vae, device="cuda:0")


def test_not_a_vae() -> None:
    with pytest.raises(InvalidOptionError, match="vae: got Linear"):
        Decoder(torch.nn.Linear(1, 1))


def test_bad_requests_are_refused_before_any_work(vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(vae, engine="diffusers")

    def decode(*_: object, **__: object) -> None:
        raise AssertionError("work started")

    monkeypatch.setattr(decoder.engine, "decode", decode)
    with pytest.raises(InvalidOptionError, match="output_type: got 'jpg'"):
        decoder.decode(LATENTS, **SIZE, output_type="jpg")
    with pytest.raises(InvalidLatentsError, match="patches"):
        decoder.decode(LATENTS, height=64, width=64)
    with pytest.raises(InvalidOptionError, match="scaling_factor"):
        decoder.decode(LATENTS, **SIZE, scaling_factor=0)


@pytest.mark.parametrize("memory_limit", [None, "1GiB"])
def test_a_decode_warns_once_of_a_floored_size(vae: AutoencoderKL, memory_limit: str | None) -> None:
    decoder = Decoder(vae, memory_limit=memory_limit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = decoder.decode(LATENTS, height=70, width=100, output_type="uint8")
    assert images.shape == (2, 64, 96, 3)
    assert [each.category for each in caught] == [SizeFlooredWarning]


def test_the_exact_engine_is_the_default_and_close_to_the_reference(vae: AutoencoderKL, decoder: Decoder) -> None:
    exact = Decoder(vae)
    assert exact.engine.name == "exact"
    ours, reference = (one.decode(LATENTS, **SIZE, output_type="uint8") for one in (exact, decoder))
    difference = np.abs(ours.astype(int) - reference)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_an_image_does_not_depend_on_its_batch(vae: AutoencoderKL) -> None:
    exact = Decoder(vae)
    together = exact.decode(LATENTS, **SIZE, output_type="pt")
    alone = [exact.decode(one[None], **SIZE, output_type="pt")[0] for one in LATENTS]
    assert torch.equal(together, torch.stack(alone))


def test_plan(vae: AutoencoderKL, decoder: Decoder) -> None:
    plan = Decoder(vae, memory_limit="64MiB").plan(256, 384, batch=2)
    assert plan.peak_bytes <= 64 * 2**20
    assert plan.work_ratio >= 1
    assert "384x256" in str(plan)
    with pytest.raises(InvalidLatentsError, match="width: got 20"):
        Decoder(vae).plan(16, 20)
    with pytest.raises(InvalidOptionError, match="needs engine='exact'"):
        decoder.plan(64, 64)


def test_a_limit_below_what_the_output_takes_is_refused_before_any_work(vae: AutoencoderKL) -> None:
    latents = torch.zeros(1, 16, 64, 64)
    limited = Decoder(vae, memory_limit=10_000_000)
    started: list[int] = []
    for kind in ("np", "pt", "uint8", "pil"):
        with pytest.raises(MemoryLimitError, match="memory_limit: got 10000000"):
            limited.decode(latents, output_type=kind, progress=lambda done, _: started.append(done))
    assert not started


def test_non_finite_output_is_never_a_picture() -> None:
    vae = random_vae()
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(NonFiniteOutputError, match="NaN"):
        Decoder(vae, engine="diffusers").decode(LATENTS, **SIZE)
    with pytest.raises(NonFiniteOutputError, match="NaN"):
        Decoder(vae).decode(LATENTS, **SIZE)


def test_the_error_table_covers_every_error() -> None:
    for name in fluxvae.__all__:
        kind = getattr(fluxvae, name)
        if isinstance(kind, type) and issubclass(kind, FluxVAEError):
            status = status_of(kind("..."))
            assert status.http in (400, 500, 503, 504)
            assert status.exit_code > 0
            assert kind is FluxVAEError or status != status_of(FluxVAEError("...")), f"{name} has a row of its own"
    assert status_of(KeyError("x")).triton == "INTERNAL"


@pytest.mark.parametrize(("format", "lossless"), [("png", True), ("jpeg", False), ("webp", False)])
def test_encode(decoder: Decoder, format: str, lossless: bool) -> None:
    import io

    pixels = decoder.decode(LATENTS, **SIZE, output_type="uint8")[0]
    picture = Image.open(io.BytesIO(encode(pixels, format)))
    assert picture.format == format.upper()
    assert picture.size == (96, 64)
    assert np.array_equal(np.asarray(picture), pixels) == lossless


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("gif",), "format: got 'gif'"),
        (("png", 90), "lossless"),
        (("jpeg", 0), "quality: got 0"),
        (("webp", 101), "quality: got 101"),
        (("jpeg", "90"), "quality: got '90'"),
    ],
)
def test_encode_refuses(options: tuple, message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        encode(np.zeros((16, 16, 3), np.uint8), *options)
