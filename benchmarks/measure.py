"""What every benchmark needs: full networks with seeded weights, the peak memory of a call, and the machine's name."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage

from fluxvae import unpack_latents
from fluxvae.checkpoints import ASSETS
from fluxvae.engine.frames import has_frames
from fluxvae.engine.way import DECODE, ENCODE, Way

T = TypeVar("T")

MODELS = {
    "flux": "FLUX decoder",
    "flux2": "FLUX.2 decoder",
    "flux2-small": "FLUX.2-small-decoder",
    "qwen-image": "Qwen-Image's VAE",
}
"""The VAEs of full width, with seeded random weights, and what each is called in tables."""


class Measured(NamedTuple):
    """What was measured of one call."""

    result: Any
    """What the call returned."""
    seconds: float
    """Its wall time."""
    peak_bytes: int
    """The memory that it added at its peak."""
    file_bytes: int = 0
    """By how much the mapped pages of files (mostly code) grew meanwhile. They are part of the peak, but are not the
    decode's memory."""


def flux_vae(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> AutoencoderKL:
    """Make FLUX.1's decoder in its full architecture, 49.5 M parameters, with seeded random weights, channels-last."""
    vae: AutoencoderKL = full_vae("flux", dtype, device, seed)
    return vae


def full_vae(
    model: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, way: Way = DECODE
) -> Any:
    """Make one half of one of `MODELS`, with seeded random weights, channels-last.

    Qwen-Image's is made whole, since diffusers computes neither half without the other, and has no such memory format.
    """
    torch.manual_seed(seed)
    if model == "qwen-image":
        return AutoencoderKLQwenImage().to(device=device, dtype=dtype).eval().requires_grad_(False)
    widths = {"decoder_block_out_channels": (96, 192, 384, 384)} if model == "flux2-small" else {}
    if model == "flux":
        vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(ASSETS / "flux1"))
    else:
        vae = AutoencoderKLFlux2(**widths)
    for part in (ENCODE if way == DECODE else DECODE).parts:
        setattr(vae, part, None)
    return vae.to(device=device, dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


def set_tiles(vae: Any, tile: int) -> None:
    """Make diffusers decode and encode in tiles of so many pixels each way, three quarters of a tile apart."""
    vae.enable_tiling()
    if has_frames(vae):
        vae.tile_sample_min_height = vae.tile_sample_min_width = tile
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = tile * 3 // 4
    else:
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // 8


def diffusers_decode(vae: Any, raw: torch.Tensor) -> torch.Tensor:
    """Decode raw latents (B, C, lh, lw) by diffusers itself, where it wants frames as one frame."""
    image: torch.Tensor = vae.decode(raw.unsqueeze(2)).sample.squeeze(2) if has_frames(vae) else vae.decode(raw).sample
    return image


def diffusers_encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels (B, 3, H, W) by diffusers itself: mean and log variance (B, 2 * C, lh, lw)."""
    if has_frames(vae):
        moments: torch.Tensor = vae.encode(pixels.unsqueeze(2)).latent_dist.parameters.squeeze(2)
        return moments
    return vae.encode(pixels).latent_dist.parameters


def raw_latents(model: str, size: int) -> torch.Tensor:
    """Make raw latents (1, 16 or 32, size / 8, size / 8) of seeded noise.

    Real latents are smoother than noise, so this is the harder case for tiles. FLUX.1's noise is scaled and shifted as
    its latents are; that of the others has unit variance, which is close to what FLUX.2's statistics say.
    """
    if model.startswith("flux2") or model == "qwen-image":
        channels = 32 if model.startswith("flux2") else 16
        return torch.randn(1, channels, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    return unpack_latents(packed_latents(size, size), size, size) / 0.3611 + 0.1159


def packed_latents(height: int, width: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Make packed latents (batch, patches, 64) in float32, of unit variance as FLUX's latents are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, (height // 16) * (width // 16), 64, generator=generator)


def measure(call: Callable[[], Any], device: str = "cpu") -> Measured:
    """Run ``call`` once and measure it.

    On a CPU the peak is that of resident memory (VmHWM, which is reset before), on CUDA that of allocated memory.
    """
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before, files = _status("VmRSS"), _status("RssFile")
    start = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if cuda else _status("VmHWM")
    return Measured(result, seconds, peak - before, 0 if cuda else _status("RssFile") - files)


def machine() -> dict[str, Any]:
    """Describe the machine that a number was measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def earlier_rows(files: list[Path]) -> list[dict[str, Any]]:
    """Return the rows of earlier runs. Each file holds what a benchmark printed, and its last line is the JSON."""
    return [row for file in files for row in json.loads(file.read_text().splitlines()[-1])["rows"]]


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
