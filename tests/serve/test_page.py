"""The page in a real browser: headless Chromium, driven by Playwright, against the real gateway and Triton."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, expect
from safetensors.torch import save_file

from fluxvae.demo import DEFAULT_LATENTS, read_latents
from serve.client import Serving, assert_same_pixels
from serve.gateways import Gateways

pytestmark = pytest.mark.browser

TOKEN = "let-me-in"


def pixels(page: Page) -> list[np.ndarray]:
    """The pixels of the files that the page's links save."""
    pictures = []
    for link in page.locator("figcaption a").all():
        with page.expect_download() as download:
            link.click()
        pictures.append(np.asarray(Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))))
    return pictures


def choose(page: Page, path: Path) -> None:
    page.locator("#file").set_input_files(path)


def error(page: Page) -> str:
    alert = page.get_by_role("alert")
    expect(alert).to_be_visible()
    return alert.inner_text()


def expected(serving: Serving, latents: torch.Tensor, **size: int) -> np.ndarray:
    pixels: np.ndarray = serving.library.decode(latents, **size, output_type="uint8")  # type: ignore[arg-type]
    return pixels


def test_the_example(page: Page, gateway: str, serving: Serving) -> None:
    page.goto(gateway)
    expect(page.get_by_text("ready", exact=True)).to_be_visible()
    page.get_by_role("button", name="astronaut").click()
    expect(page.get_by_role("img")).to_be_visible()
    facts = page.locator("#facts")
    expect(facts).to_contain_text("512 × 512 pixels")
    expect(facts).to_contain_text(re.compile(r"[\d.]+ s, of which [\d.]+ s in Triton"))
    expect(facts).to_contain_text("(1, 1024, 64)")
    expect(page.locator("#server-facts")).to_contain_text("megapixels")
    latents, height, width = read_latents(DEFAULT_LATENTS)
    [picture] = pixels(page)
    assert_same_pixels(picture[None], expected(serving, latents, height=height, width=width), exact=serving.exact)


def test_live_metrics(page: Page, gateway: str) -> None:
    page.goto(gateway)
    tile = page.locator("#tiles > div", has_text=re.compile(r"^decodes|decodes$")).locator("dd")
    expect(tile).to_have_text(re.compile(r"^[\d,]+$"))
    before = int(tile.inner_text().replace(",", ""))
    page.get_by_role("button", name="chelsea").click()
    expect(page.get_by_role("img")).to_be_visible()
    expect(tile).not_to_have_text(f"{before:,}")
    assert int(tile.inner_text().replace(",", "")) > before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_that_says_its_size(
    page: Page, gateway: str, serving: Serving, tmp_path: Path, dtype: torch.dtype
) -> None:
    latents = torch.randn(2, 6, 64).to(dtype)
    save_file({"latents": latents}, tmp_path / "mine.safetensors", {"height": "32", "width": "48"})
    page.goto(gateway)
    choose(page, tmp_path / "mine.safetensors")
    expect(page.locator("figcaption a")).to_have_count(2)
    expect(page.locator("#facts")).to_contain_text("32 × 48 pixels")
    made = np.stack(pixels(page))
    assert_same_pixels(made, expected(serving, latents, height=32, width=48), exact=serving.exact)


def test_a_file_that_does_not_say_its_size(page: Page, gateway: str, serving: Serving, tmp_path: Path) -> None:
    latents = torch.randn(1, 8, 64)
    save_file({"something": latents}, tmp_path / "mine.safetensors")
    page.goto(gateway)
    choose(page, tmp_path / "mine.safetensors")
    expect(page.get_by_label("Height, pixels")).to_be_focused()
    expect(page.locator("#size-note")).to_contain_text("does not say its size")
    page.keyboard.type("64")
    page.keyboard.press("Tab")
    page.keyboard.type("48")
    page.keyboard.press("Enter")
    assert "a grid of 4 x 3 = 12 patches of 16 pixels, but the latents hold 8" in error(page)
    page.get_by_label("Width, pixels").fill("32")
    page.keyboard.press("Enter")
    expect(page.get_by_role("img")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()
    assert_same_pixels(np.stack(pixels(page)), expected(serving, latents, height=64, width=32), exact=serving.exact)


def test_unpacked_latents_of_an_odd_size(page: Page, gateway: str, serving: Serving, tmp_path: Path) -> None:
    latents = torch.randn(1, 16, 5, 7)
    save_file({"latents": latents}, tmp_path / "odd.safetensors")
    page.goto(gateway)
    choose(page, tmp_path / "odd.safetensors")
    expect(page.locator("#facts")).to_contain_text("40 × 56 pixels")
    assert_same_pixels(np.stack(pixels(page)), expected(serving, latents), exact=serving.exact)


@pytest.mark.parametrize("size", [(5, 7), (4, 64)], ids=["by its channels", "by its size"])
def test_one_image_without_its_batch(
    page: Page, gateway: str, serving: Serving, tmp_path: Path, size: tuple[int, int]
) -> None:
    """Latents (16, 4, 64) may also be 16 packed images. The size in the file tells, or the page asks for the size."""
    latents = torch.randn(16, *size, generator=torch.Generator().manual_seed(0))
    pixel_size = {"height": 8 * size[0], "width": 8 * size[1]}
    told = {name: str(side) for name, side in pixel_size.items()}
    page.goto(gateway)
    for number, (metadata, tensor) in enumerate(((told, latents), ({}, latents), ({}, latents[:, None]))):
        path = tmp_path / f"{number}.safetensors"
        save_file({"latents": tensor.contiguous()}, path, metadata)
        choose(page, path)
        if tensor.ndim == 3 and size[1] == 64 and not metadata:
            expect(page.locator("#size-note")).to_contain_text("16 packed images or one image without its batch")
            for side, value in told.items():
                page.get_by_label(f"{side.capitalize()}, pixels").fill(value)
            page.keyboard.press("Enter")
        expect(page.locator("figcaption a")).to_have_count(1)
        expect(page.locator("#facts")).to_contain_text(f"{told['height']} × {told['width']} pixels")
        expect(page.locator("figcaption a")).to_have_text(f"Save {number}.png")
        assert_same_pixels(np.stack(pixels(page)), expected(serving, latents, **pixel_size), exact=serving.exact)


def test_files_that_are_no_latents(page: Page, gateway: str, tmp_path: Path) -> None:
    page.goto(gateway)
    good = tmp_path / "good.safetensors"
    save_file({"latents": torch.zeros(1, 4, 64)}, good, {"height": "32", "width": "32"})
    header = {"latents": {"dtype": "F32", "shape": [1, 4, 64], "data_offsets": [0, 1024]}}
    for content, told in (
        (b"", "no safetensors"),
        (b"PK\x03\x04 an archive of some sort", "no safetensors"),
        (len(b"{not json}").to_bytes(8, "little") + b"{not json}", "no safetensors"),
        (good.read_bytes()[:-1], "cut short"),
        (saved({"latents": torch.zeros(64)}, tmp_path), "got shape (64)"),
        (saved({"latents": torch.zeros(1, 4, 64, dtype=torch.int32)}, tmp_path), "got I32 values"),
        (saved({"a": torch.zeros(1, 4, 64), "b": torch.zeros(1)}, tmp_path), 'holds "a", "b"'),
        (with_header({**header, "latents": {**header["latents"], "data_offsets": [0, 99]}}), "cut short"),
        (with_header({"latents": {"dtype": "F32", "shape": [1, 4, 64]}}), "cut short"),
    ):
        path = tmp_path / "bad.safetensors"
        path.write_bytes(content)
        choose(page, path)
        expect(page.get_by_role("alert")).to_contain_text(told)
        expect(page.locator("#form")).to_be_hidden()
    choose(page, good)
    expect(page.get_by_role("img")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def saved(tensors: dict[str, torch.Tensor], folder: Path) -> bytes:
    save_file(tensors, folder / "any.safetensors")
    return (folder / "any.safetensors").read_bytes()


def with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(1024)


def test_the_servers_words_reach_the_page(page: Page, gateway: str, tmp_path: Path) -> None:
    latents = torch.zeros(1, 4, 64)
    latents[0, 1, 2] = torch.nan
    save_file({"latents": latents}, tmp_path / "nan.safetensors", {"height": "32", "width": "32"})
    page.goto(gateway)
    choose(page, tmp_path / "nan.safetensors")
    assert "NaN" in error(page)
    assert page.get_by_role("img").count() == 0


def test_dropping_a_file(page: Page, gateway: str, tmp_path: Path) -> None:
    save_file({"latents": torch.zeros(1, 4, 64)}, tmp_path / "good.safetensors", {"height": "32", "width": "32"})
    page.goto(gateway)
    content = list((tmp_path / "good.safetensors").read_bytes())
    transfer = page.evaluate_handle(
        """(content) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(content)], "dropped.safetensors"));
            return transfer;
        }""",
        content,
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(page.get_by_role("img")).to_be_visible()
    expect(page.locator("#file-name")).to_have_text("dropped.safetensors")


def test_by_keyboard_alone(page: Page, gateway: str) -> None:
    page.goto(gateway)
    button = page.get_by_role("button", name="coffee")
    expect(button).to_be_visible()
    for _ in range(12):
        page.keyboard.press("Tab")
        if button.evaluate("(it) => it === document.activeElement"):
            break
    expect(button).to_be_focused()
    assert button.evaluate("(it) => getComputedStyle(it).outlineStyle") == "solid", "the focus can be seen"
    page.keyboard.press("Enter")
    expect(page.locator("#facts")).to_contain_text("400 × 592 pixels")


def test_cancel(page: Page, gateway: str, tmp_path: Path) -> None:
    save_file(
        {"latents": torch.zeros(1, 128 * 128, 64)}, tmp_path / "large.safetensors", {"height": "2048", "width": "2048"}
    )
    page.goto(gateway)
    choose(page, tmp_path / "large.safetensors")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(page.get_by_role("alert")).to_be_hidden()
    assert page.get_by_role("img").count() == 0
    page.get_by_role("button", name="chelsea").click()
    expect(page.get_by_role("img")).to_be_visible()


def test_the_server_is_out_of_reach(page: Page, gateways: Gateways) -> None:
    page.goto(gateways.start(triton_grpc_url="127.0.0.1:1", triton_metrics_url=None))
    expect(page.locator("#state")).to_contain_text("not ready")
    assert "Triton cannot take this request now" in error(page)
    expect(page.locator("#metrics-note")).to_contain_text("out of reach")


def test_the_token(page: Page, gateways: Gateways) -> None:
    url = gateways.start(token=TOKEN)
    page.goto(url)
    expect(page.get_by_text("This server asks for a token")).to_be_visible()
    for wrong in ("wrong", "nicht möglich"):
        page.get_by_label("Token").fill(wrong)
        page.keyboard.press("Enter")
        assert "not the token" in error(page)
    page.get_by_label("Token").fill(TOKEN)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="coffee").click()
    expect(page.get_by_role("img")).to_be_visible()
    for link, text in (("API", "POST /decode"), ("metrics", "fluxvae_gateway_requests_total")):
        with page.expect_popup() as popup:
            page.get_by_role("link", name=link).click()
        expect(popup.value.get_by_text(text).first).to_be_visible()
    page.reload()
    expect(page.get_by_role("button", name="coffee")).to_be_visible()
    assert TOKEN not in page.url


def test_the_description_of_the_api(page: Page, gateway: str) -> None:
    page.goto(gateway)
    page.get_by_role("link", name="API").click()
    expect(page.get_by_role("heading", name="POST /decode")).to_be_visible()
    expect(page.get_by_text("partial_postprocess").first).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out(page: Page, gateway: str, width: int, scheme: str) -> None:
    """The page does not scroll sideways, and its text has a contrast of 4.5 to 1 at least, as WCAG's level AA asks."""
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(gateway)
    page.get_by_role("button", name="coffee").click()
    expect(page.get_by_role("img")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate(
        """() => Object.fromEntries(["ground", "card", "ink", "quiet", "accent", "accent-ink", "bad", "bad-soft"].map(
            (name) => [name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()]))"""
    )
    pairs = [("ink", "card"), ("ink", "ground"), ("quiet", "card"), ("quiet", "ground"), ("accent-ink", "accent")]
    for front, back in [*pairs, ("bad", "bad-soft"), ("accent", "ground")]:
        assert contrast(colours[front], colours[back]) >= 4.5, (front, back)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
