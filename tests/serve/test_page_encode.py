"""The page encodes pictures, in a real browser: headless Chromium against the real gateway and Triton.

Not covered here: what the page does with latents (test_page.py).
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, Route, expect
from safetensors import safe_open

from fluxvae import Encoder
from fluxvae.batch import Job, decode_files
from serve.client import Serving
from serve.gateways import Gateways
from serve.test_page import choose, error

pytestmark = pytest.mark.browser

MODELS = ("vae_decoder", "vae_encoder")
DECODE = "**/models/vae_decoder/decode?*"


@pytest.fixture(scope="module")
def gateway(gateways: Gateways) -> str:
    return gateways.start(models=MODELS)


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(mode)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8), mode)


def put(page: Page, url: str, path: Path, picture: Image.Image, **options: Any) -> None:
    """Save a picture, and choose the file on a new page."""
    picture.save(path, **options)
    page.goto(url)
    choose(page, path)


def saved(page: Page, name: str) -> Path:
    """The file that a link of the page saves."""
    with page.expect_download() as download:
        page.get_by_role("link", name=f"Save {name}", exact=True).click()
    assert download.value.suggested_filename == name
    return Path(download.value.path())


def latents_in(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["latents"]
        return file.get_tensor("latents"), file.metadata()


def test_there_and_back(page: Page, gateway: str, encoder: Encoder, serving: Serving, tmp_path: Path) -> None:
    """The file of latents is the library's, and is read by the page itself and by ``fluxvae decode``."""
    picture = noise(48, 64)
    put(page, gateway, tmp_path / "noise.png", picture)
    expect(page.locator("#facts")).to_contain_text("PSNR")
    file = saved(page, "noise.safetensors")
    latents, metadata = latents_in(file)
    assert metadata == {"height": "48", "width": "64"}
    assert torch.equal(latents, encoder.encode(picture, packed=False))
    [expected] = serving.library.decode(latents, output_type="uint8")
    decoded = np.asarray(Image.open(io.BytesIO(saved(page, "noise-decoded.png").read_bytes())))
    assert np.array_equal(decoded, expected)
    mean = np.square(np.asarray(picture).astype(float) - expected).mean()
    facts = page.locator("#facts")
    expect(facts).to_contain_text(f"{10 * math.log10(255**2 / mean):.2f} dB")
    expect(facts).to_contain_text("48 × 64 pixels")
    expect(facts).to_contain_text("(1, 16, 6, 8) float32")
    expect(facts).not_to_contain_text("Note")
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(file.read_bytes())
    choose(page, mine)
    again = np.asarray(Image.open(io.BytesIO(saved(page, "mine.png").read_bytes())))
    assert np.array_equal(again, expected)
    decode_files(Job(inputs=(str(mine),), out=str(tmp_path / "out")), decoder=serving.library)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "mine.png")), expected)


def test_a_size_that_does_not_fit_is_cropped_and_told(
    page: Page, gateway: str, encoder: Encoder, tmp_path: Path
) -> None:
    picture = noise(53, 75)
    put(page, gateway, tmp_path / "odd.png", picture)
    expect(page.locator("#facts")).to_contain_text("the middle of 53 × 75 pixels")
    latents, metadata = latents_in(saved(page, "odd.safetensors"))
    assert metadata == {"height": "48", "width": "64"}
    middle = picture.crop((5, 2, 69, 50))
    assert torch.equal(latents, encoder.encode(middle, packed=False))


def test_a_photograph_is_drawn_upright(page: Page, gateway: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    put(page, gateway, tmp_path / "photograph.jpg", noise(48, 64), exif=exif)
    expect(page.locator("#facts")).to_contain_text("64 × 48 pixels")
    latents, _ = latents_in(saved(page, "photograph.safetensors"))
    assert latents.shape == (1, 16, 8, 6)


def test_transparent_parts_are_on_white_and_told(page: Page, gateway: str, encoder: Encoder, tmp_path: Path) -> None:
    picture = noise(32, 48, "RGBA")
    alpha = Image.fromarray(np.where(np.arange(48) < 20, 255, 0).astype(np.uint8)[None].repeat(32, axis=0))
    picture.putalpha(alpha)
    put(page, gateway, tmp_path / "cut.webp", picture, lossless=True, exact=True)
    expect(page.locator("#facts")).to_contain_text("on white")
    latents, _ = latents_in(saved(page, "cut.safetensors"))
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=alpha)
    assert torch.equal(latents, encoder.encode(white, packed=False))


@pytest.mark.parametrize(("off", "told"), [(0, "identical"), (1, "48.13 dB"), (5, "34.15 dB")])
def test_how_far_apart_two_pictures_are(page: Page, gateway: str, tmp_path: Path, off: int, told: str) -> None:
    """The answer of the decode is replaced by a picture that is off by a known number everywhere."""
    picture = np.full((32, 32, 3), 100, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture + np.uint8(off)).save(buffer, "PNG")

    def answer(route: Route) -> None:
        route.fulfill(status=200, content_type="image/png", body=buffer.getvalue())

    page.route(DECODE, answer)
    put(page, gateway, tmp_path / "flat.png", Image.fromarray(picture))
    expect(page.locator("#facts")).to_contain_text(told)


def test_dropping_a_picture(page: Page, gateway: str, tmp_path: Path) -> None:
    noise(32, 32).save(tmp_path / "dropped.png")
    page.goto(gateway)
    transfer = page.evaluate_handle(
        """(content) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(content)], "dropped.png", { type: "image/png" }));
            return transfer;
        }""",
        list((tmp_path / "dropped.png").read_bytes()),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(page.get_by_role("img")).to_have_count(2)
    expect(page.locator("#file-name")).to_have_text("dropped.png")


def test_from_a_picture_to_latents_and_back_to_a_picture(page: Page, gateway: str, tmp_path: Path) -> None:
    """What one kind of file showed does not stay beside the other's, and the button says what it does."""
    put(page, gateway, tmp_path / "one.png", noise(32, 32))
    expect(page.get_by_role("img")).to_have_count(2)
    expect(page.get_by_role("button", name="Encode")).to_be_enabled()
    page.get_by_role("button", name="chelsea").click()
    expect(page.get_by_role("img")).to_have_count(1)
    expect(page.locator("#facts")).not_to_contain_text("PSNR")
    expect(page.get_by_role("button", name="Decode")).to_be_enabled()
    choose(page, tmp_path / "one.png")
    expect(page.locator("#facts")).to_contain_text("PSNR")
    first = page.locator("#facts").inner_text()
    page.get_by_role("button", name="Encode").click()
    expect(page.locator("#facts")).not_to_have_text(first, use_inner_text=True)
    expect(page.locator("#facts")).to_contain_text("PSNR")


def test_cancel(page: Page, gateway: str, tmp_path: Path) -> None:
    put(page, gateway, tmp_path / "large.png", Image.new("RGB", (2048, 2048), "teal"))
    expect(page.locator("#stage-text")).to_contain_text("Encoding … ")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#stage-text")).to_have_text("The picture appears here.")
    assert page.get_by_role("img").count() == 0
    noise(32, 32).save(tmp_path / "small.png")
    choose(page, tmp_path / "small.png")
    expect(page.get_by_role("img")).to_have_count(2)


def test_cancel_while_it_is_decoded_keeps_the_latents(
    page: Page, gateway: str, encoder: Encoder, tmp_path: Path
) -> None:
    held: list[Route] = []
    page.route(DECODE, lambda route: held.append(route))  # so that its answer never comes
    picture = noise(32, 48)
    put(page, gateway, tmp_path / "noise.png", picture)
    expect(page.locator("#awaited-text")).to_contain_text("Decoding … ")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(page.locator("#awaited")).to_have_count(0)
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_role("img")).to_have_count(1)
    latents, _ = latents_in(saved(page, "noise.safetensors"))
    assert torch.equal(latents, encoder.encode(picture, packed=False))
    page.unroute(DECODE)
    page.get_by_role("button", name="Encode").click()
    expect(page.get_by_role("img")).to_have_count(2)


def test_files_that_are_no_pictures(page: Page, gateways: Gateways, tmp_path: Path) -> None:
    page.goto(gateways.start(models=MODELS, max_pixels=64 * 64))
    whole = io.BytesIO()
    noise(32, 32).save(whole, "PNG")
    tiny, large = io.BytesIO(), io.BytesIO()
    noise(15, 32).save(tiny, "PNG")
    noise(80, 64).save(large, "PNG")
    for content, told in (
        (whole.getvalue()[:40], "this browser cannot read it"),
        (tiny.getvalue(), "got 15 × 32 pixels (height × width); expected at least 16 × 16"),
        (large.getvalue(), "5120 pixels, more than the 4096 this server takes"),
    ):
        (tmp_path / "bad.png").write_bytes(content)
        choose(page, tmp_path / "bad.png")
        expect(page.get_by_role("alert")).to_contain_text(told)
        expect(page.locator("#form")).to_be_hidden()
    (tmp_path / "good.png").write_bytes(whole.getvalue())
    choose(page, tmp_path / "good.png")
    expect(page.get_by_role("img")).to_have_count(2)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_servers_words_reach_the_page(page: Page, gateways: Gateways, tmp_path: Path) -> None:
    put(page, gateways.start(models=MODELS, max_picture_bytes=1000), tmp_path / "noise.png", noise(32, 32))
    assert "more than the 1000 of pictures that this gateway takes" in error(page)
    assert page.get_by_role("img").count() == 0


def test_without_a_model_that_encodes_it_says_what_to_start(page: Page, gateways: Gateways, tmp_path: Path) -> None:
    put(page, gateways.start(models=("vae_decoder",)), tmp_path / "noise.png", noise(32, 32))
    told = error(page)
    assert "This server encodes no pictures" in told
    assert "fluxvae serve --model vae_decoder=" in told
    assert "--model vae_encoder=" in told
    expect(page.locator("#server-facts")).to_contain_text("no pictures")
    page.get_by_role("button", name="chelsea").click()
    expect(page.get_by_role("img")).to_have_count(1)


def test_without_a_model_that_decodes_there_are_the_latents(
    page: Page, gateways: Gateways, encoder: Encoder, tmp_path: Path
) -> None:
    picture = noise(32, 32)
    put(page, gateways.start(models=("vae_encoder",)), tmp_path / "noise.png", picture)
    expect(page.locator("#facts")).to_contain_text("no model that decodes such latents is served")
    expect(page.get_by_role("img")).to_have_count(1)
    latents, _ = latents_in(saved(page, "noise.safetensors"))
    assert torch.equal(latents, encoder.encode(picture, packed=False))
    expect(page.locator("#examples")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "beside"), [(360, False), (1280, True)])
def test_side_by_side_where_there_is_room(
    page: Page, gateway: str, tmp_path: Path, width: int, beside: bool, scheme: str
) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    put(page, gateway, tmp_path / "a-name-that-is-rather-long-for-a-button.png", noise(160, 480))
    expect(page.get_by_role("img")).to_have_count(2)
    one, other = (image.bounding_box() for image in page.get_by_role("img").all())
    assert one is not None
    assert other is not None
    assert (one["y"] == other["y"]) == beside
    assert one["width"] == other["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
