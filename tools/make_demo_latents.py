"""Encodes the demo pictures with the demo checkpoint into packed latents, as FLUX's transformer would hand them over.

Each file `<picture>_<height>x<width>.safetensors` holds a float16 tensor `latents` (1, height/16 * width/16, 64), and
the strings `height`, `width`, `picture` and `checkpoint` (the sha256 of the weights) in its metadata. Run this again
whenever the checkpoint changes, because latents of other weights decode to nonsense.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from demo_pictures import held_out, open_picture, psnr, to_pixels, to_tensor
from fluxvae import pack_latents, unpack_latents

ASSETS = Path(__file__).resolve().parent.parent / "src" / "fluxvae" / "assets"


def centre(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """Return the centred part of a picture, height x width pixels."""
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height)))


def pictures() -> dict[str, np.ndarray]:
    """Return the two test pictures, an oblong one, and one that is large enough for diffusers to tile it."""
    return {
        "astronaut": held_out("astronaut"),
        "chelsea": held_out("chelsea"),
        "coffee": centre(open_picture("coffee.png"), 400, 592),
        "retina": centre(open_picture("retina.jpg"), 1024, 1024),
    }


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: np.ndarray) -> torch.Tensor:
    """Encode an (H, W, 3) uint8 picture to packed latents, as FLUX's image-to-image pipelines do it."""
    raw = vae.encode(to_tensor(pixels)).latent_dist.mode()
    return pack_latents((raw - vae.config.shift_factor) * vae.config.scaling_factor)


@torch.no_grad()
def decode(vae: AutoencoderKL, packed: torch.Tensor, height: int, width: int) -> np.ndarray:
    """Decode packed latents to an (H, W, 3) uint8 picture with diffusers."""
    latents = unpack_latents(packed.float(), height, width)
    return to_pixels(vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=ASSETS / "demo",
        help="the checkpoint that encodes (default: the one that ships)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ASSETS / "latents",
        help="the folder that the latents are written to (default: the package's)",
    )
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.checkpoint, torch_dtype=torch.float32).eval()
    weights = args.checkpoint / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, pixels in pictures().items():
        height, width = pixels.shape[:2]
        packed = encode(vae, pixels).half().contiguous()
        metadata = {"height": str(height), "width": str(width), "picture": name, "checkpoint": digest}
        path = args.output / f"{name}_{height}x{width}.safetensors"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({"latents": packed}, temporary, metadata)
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(temporary, path)
        quality = psnr(pixels, decode(vae, packed, height, width))
        statistics = f"mean {packed.float().mean():.3f}, standard deviation {packed.float().std():.3f}"
        print(f"{path.name}: {quality:.2f} dB, latents {statistics}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
