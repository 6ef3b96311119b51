"""diffusers' own, unmodified ``remote_decode`` against a real gateway and Triton: every mode, the library's pixels.

Not covered here: what is refused (test_gateway_refusals.py), and everything around a decode (test_gateway_service.py).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode
from PIL import Image

from fluxvae.pictures import encode
from fluxvae.serve.gateway.forward import MAX_ROWS
from serve.client import Serving, assert_same_pixels

FACTORS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
PACKED = (1, 24, 64)
HEIGHT, WIDTH = 64, 96
SHAPES = {"packed": PACKED, "unpacked": (1, 16, 6, 10), "odd": (1, 16, 5, 7)}
layouts = pytest.mark.parametrize("layout", SHAPES)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def some_latents(layout: str, dtype: torch.dtype = torch.float32, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, *SHAPES[layout][1:], generator=generator).to(dtype)


def size_of(latents: torch.Tensor) -> dict[str, int]:
    return {"height": HEIGHT, "width": WIDTH} if latents.ndim == 3 else {}


def remote(gateway: str, latents: torch.Tensor, **options: Any) -> Any:
    return remote_decode(f"{gateway}/", latents, **{**FACTORS, **size_of(latents), **options})


def local(serving: Serving, latents: torch.Tensor, output_type: str, **factors: float) -> Any:
    given = factors or FACTORS
    if output_type == "raw":
        return serving.library.decode_raw(latents, **size_of(latents), **given)
    return serving.library.decode(latents, **size_of(latents), output_type=output_type, **given)  # type: ignore[arg-type]


@layouts
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(("image_format", "pil_format"), [("png", "png"), ("jpg", "jpeg")])
def test_an_encoded_picture(
    gateway: str, serving: Serving, layout: str, image_format: Any, pil_format: str, partial: bool
) -> None:
    latents = some_latents(layout)
    picture = remote(gateway, latents, image_format=image_format, partial_postprocess=partial)
    assert picture.format == pil_format
    file = encode(local(serving, latents, "uint8")[0], pil_format)
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


@layouts
@pytest.mark.parametrize("batch", [1, 3])
def test_pil_with_a_processor(gateway: str, serving: Serving, layout: str, batch: int) -> None:
    latents = some_latents(layout, batch=batch)
    pictures = remote(gateway, latents, processor=VaeImageProcessor())
    assert len(pictures) == batch
    same(serving, np.stack([np.asarray(picture) for picture in pictures]), latents)


@layouts
def test_pil_with_a_processor_as_tensor(gateway: str, serving: Serving, layout: str) -> None:
    latents = some_latents(layout, batch=2)
    tensor = remote(gateway, latents, processor=VaeImageProcessor(), return_type="pt", image_format="png")
    assert torch.equal(tensor, local(serving, latents, "pt"))


@layouts
def test_pt_with_a_processor(gateway: str, serving: Serving, layout: str) -> None:
    latents = some_latents(layout)
    picture = remote(gateway, latents, output_type="pt", processor=VaeImageProcessor())
    same(serving, np.asarray(picture)[None], latents)


@layouts
@pytest.mark.parametrize("batch", [1, 2])
def test_pt(gateway: str, serving: Serving, layout: str, batch: int) -> None:
    """The tensor is not post-processed: its values are about [-1, 1] and not clamped."""
    latents = 4 * some_latents(layout, batch=batch)
    tensor = remote(gateway, latents, output_type="pt", return_type="pt")
    assert torch.equal(tensor, local(serving, latents, "raw"))
    assert tensor.abs().max() > 1, "beyond what a clamp would leave: or this test shows nothing"


@layouts
def test_pt_partial(gateway: str, serving: Serving, layout: str) -> None:
    latents = some_latents(layout, batch=2)
    tensor = remote(gateway, latents, output_type="pt", return_type="pt", partial_postprocess=True)
    same(serving, tensor.numpy(), latents)


@pytest.mark.parametrize("batch", [8, 9, 19])
def test_more_rows_than_triton_takes_at_once(gateway: str, serving: Serving, batch: int) -> None:
    latents = some_latents("packed", batch=batch)
    tensor = remote(gateway, latents, output_type="pt", return_type="pt", partial_postprocess=True)
    alone = [
        remote(gateway, one[None], output_type="pt", return_type="pt", partial_postprocess=True) for one in latents
    ]
    assert torch.equal(tensor, torch.cat(alone))


def test_rows_are_split_as_the_models_are_configured() -> None:
    for config in (Path(__file__).parents[2] / "triton_models").glob("*/config.pbtxt"):
        assert f"max_batch_size: {MAX_ROWS}" in config.read_text(), config


@pytest.mark.parametrize("batch", [1, 2])
def test_pt_partial_as_pictures(gateway: str, serving: Serving, batch: int) -> None:
    latents = some_latents("packed", batch=batch)
    pictures = remote(gateway, latents, output_type="pt", partial_postprocess=True)
    pictures = [pictures] if batch == 1 else pictures
    same(serving, np.stack([np.asarray(picture) for picture in pictures]), latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(gateway: str, serving: Serving, dtype: torch.dtype) -> None:
    latents = some_latents("packed", dtype)
    tensor = remote(gateway, latents, output_type="pt", return_type="pt", partial_postprocess=True)
    same(serving, tensor.numpy(), latents)


@pytest.mark.filterwarnings("ignore:`do_scaling` is deprecated:FutureWarning")
@layouts
@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, {"scaling_factor": 0.5, "shift_factor": 0.25}),
        ({"scaling_factor": 0.5, "shift_factor": None}, {"scaling_factor": 0.5, "shift_factor": 0.0}),
        # By default the client sends do_scaling=True without factors, which asks for the server's own.
        ({"scaling_factor": None, "shift_factor": None}, FACTORS),
        ({"scaling_factor": None, "shift_factor": 0.25}, {"scaling_factor": 0.3611, "shift_factor": 0.25}),
        # Without do_scaling the latents are raw already.
        ({"do_scaling": False}, {"scaling_factor": 1.0, "shift_factor": 0.0}),
        ({"do_scaling": None}, {"scaling_factor": 1.0, "shift_factor": 0.0}),
    ],
)
def test_scaling(
    gateway: str, serving: Serving, layout: str, options: dict[str, Any], factors: dict[str, float]
) -> None:
    latents = some_latents(layout)
    tensor = remote(gateway, latents, output_type="pt", return_type="pt", partial_postprocess=True, **options)
    assert_same_pixels(tensor.numpy(), local(serving, latents, "uint8", **factors), exact=serving.exact)


def test_size_of_unpacked_latents_may_be_given(gateway: str, serving: Serving) -> None:
    latents = some_latents("odd")
    tensor = remote(
        gateway, latents, output_type="pt", return_type="pt", partial_postprocess=True, height=5 * 8, width=7 * 8
    )
    same(serving, tensor.numpy(), latents)


def test_the_upright_and_the_lying_picture(gateway: str) -> None:
    """The same latents have as many patches with height and width exchanged, so both must arrive as they were sent."""
    latents = some_latents("packed")
    assert remote(gateway, latents).size == (WIDTH, HEIGHT)
    assert remote(gateway, latents, height=WIDTH, width=HEIGHT).size == (HEIGHT, WIDTH)


def test_errors_arrive_as_its_runtime_error(gateway: str) -> None:
    latents = some_latents("packed")
    with pytest.raises(RuntimeError, match="got 64x64 .* 16 patches .* but the latents hold 24"):
        remote(gateway, latents, height=64, width=64)
    with pytest.raises(RuntimeError, match="'kind': 'InvalidOptionError'"):
        remote(gateway, latents, output_type="mp4", return_type="mp4")
    with pytest.raises(RuntimeError, match="output_type: got 'pil' for a batch of 2"):
        remote(gateway, some_latents("packed", batch=2))
    latents[0, 7, 3] = torch.nan
    with pytest.raises(RuntimeError, match="NaN"):
        remote(gateway, latents)


def same(serving: Serving, pixels: np.ndarray, latents: torch.Tensor) -> None:
    assert_same_pixels(pixels, local(serving, latents, "uint8"), exact=serving.exact)
