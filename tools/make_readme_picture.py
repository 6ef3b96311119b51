"""Makes the pictures of the README and of the documentation with the demo checkpoint.

`demo.png` shows the two held-out photographs, each as the original and decoded from packed latents.
`seams.png` shows one crop of a 2048x2048 decode, untiled and with diffusers' tiling, and the difference of the two.
`encode.png` shows a 1024x1024 photograph that was encoded exactly and in diffusers' tiles of 512 pixels, both decoded
untiled, and the difference of the two.
Tiling gives every tile its own GroupNorm statistics and its own attention, so colours shift and seams show.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont

from demo_pictures import HELD_OUT, held_out, open_picture, psnr
from make_demo_latents import ASSETS, decode, encode

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
MARGIN, CAPTION = 8, 26
ENCODE_PICTURE, ENCODE_SIZE, ENCODE_TILE = HELD_OUT[0], 1024, 512
SEAMS_PICTURE, SEAMS_SIZE, SEAMS_CROP = "retina.jpg", 2048, (512, 768, 640)  # (left, top, side)


def strip(panels: list[tuple[str, np.ndarray]], size: int) -> Image.Image:
    """Put pictures side by side, each with its words underneath."""
    font = ImageFont.load_default(15)
    width = len(panels) * (size + MARGIN) + MARGIN
    canvas = Image.new("RGB", (width, size + MARGIN + CAPTION), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (words, pixels) in enumerate(panels):
        left = MARGIN + index * (size + MARGIN)
        picture = Image.fromarray(pixels)
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.LANCZOS)
        canvas.paste(picture, (left, MARGIN))
        draw.text((left + size / 2, size + MARGIN + 4), words, fill="black", font=font, anchor="ma")
    return canvas


def write(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    picture.save(temporary, optimize=True)
    os.replace(temporary, path)
    print(f"{path.name}: {picture.width}x{picture.height}, {path.stat().st_size:,} bytes")


def demo_strip(vae: AutoencoderKL) -> Image.Image:
    panels = []
    for name in HELD_OUT:
        original = held_out(name)
        decoded = decode(vae, encode(vae, original), *original.shape[:2])
        panels += [("original", original), (f"decoded, {psnr(original, decoded):.1f} dB", decoded)]
    return strip(panels, 256)


def seams_strip(vae: AutoencoderKL) -> Image.Image:
    """Show the same crop of a 2048x2048 decode by diffusers, untiled and tiled, and the difference of the two."""
    picture = open_picture(SEAMS_PICTURE).resize((SEAMS_SIZE, SEAMS_SIZE), Image.Resampling.LANCZOS)
    packed = encode(vae, np.asarray(picture))
    untiled = decode(vae, packed, SEAMS_SIZE, SEAMS_SIZE)
    vae.enable_tiling()
    tiled = decode(vae, packed, SEAMS_SIZE, SEAMS_SIZE)
    vae.disable_tiling()
    difference = np.abs(untiled.astype(int) - tiled.astype(int))
    print(f"tiled against untiled at {SEAMS_SIZE}: {psnr(untiled, tiled):.1f} dB, ", end="")
    print(f"largest difference {difference.max()}, {(difference > 0).mean():.0%} of values differ")
    left, top, side = SEAMS_CROP
    window = (slice(top, top + side), slice(left, left + side))
    amplified = np.clip(difference * 8, 0, 255).astype(np.uint8)
    return strip(
        [
            ("untiled", untiled[window]),
            (f"diffusers' tiling, {psnr(untiled, tiled):.1f} dB", tiled[window]),
            ("difference, 8 times", amplified[window]),
        ],
        320,
    )


def encode_strip(vae: AutoencoderKL) -> Image.Image:
    """Encode one picture exactly and in tiles, decode both untiled, and show both and their difference."""
    picture = Image.fromarray(held_out(ENCODE_PICTURE)).resize((ENCODE_SIZE, ENCODE_SIZE), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    exact = encode(vae, pixels)
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = ENCODE_TILE, ENCODE_TILE // 8
    tiled = encode(vae, pixels)
    vae.disable_tiling()
    apart = float((tiled.float() - exact.float()).square().mean().sqrt() / exact.float().square().mean().sqrt())
    one, other = (decode(vae, packed, ENCODE_SIZE, ENCODE_SIZE) for packed in (exact, tiled))
    difference = np.abs(one.astype(int) - other.astype(int))
    print(f"encoded in tiles of {ENCODE_TILE} at {ENCODE_SIZE}: latents {apart:.1%} apart (rms), ", end="")
    print(f"largest difference {difference.max()}, {(difference > 0).mean():.1%} of values differ")
    return strip(
        [
            (f"encoded exactly, {psnr(pixels, one):.1f} dB", one),
            (f"in {ENCODE_TILE}-pixel tiles, {psnr(pixels, other):.1f} dB", other),
            ("difference, 8 times", np.clip(difference * 8, 0, 255).astype(np.uint8)),
        ],
        320,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=ASSETS / "demo",
        help="the checkpoint that decodes (default: the one that ships)",
    )
    parser.add_argument(
        "--output", type=Path, default=IMAGES, help="the folder that the pictures are written to (default: docs/images)"
    )
    makers = {"demo": demo_strip, "seams": seams_strip, "encode": encode_strip}
    parser.add_argument("--only", choices=makers, help="make one of the pictures only (default: all)")
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.checkpoint, torch_dtype=torch.float32).eval()
    for name, make in makers.items():
        if args.only in (None, name):
            write(make(vae), args.output / f"{name}.png")


if __name__ == "__main__":
    main()
