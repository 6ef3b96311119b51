"""The peers: diffusers compiled and tiled, and SGLang's decoder path, on FLUX.1's network and on FLUX.2's."""

from __future__ import annotations

import copy

import torch

from gpu_run import sglang_path
from gpu_run.bench import Bench, Decode
from gpu_run.decodes import diffusers_decode

__all__ = ["compiled", "flux2", "sglang", "tiled"]


def compiled(bench: Bench, mode: str, size: int) -> None:
    """diffusers' decoder through `torch.compile`. The row's ``first_ms`` is the compilation.

    Args:
        mode: torch.compile's. ``"max-autotune"`` replays CUDA graphs, whose output the next replay overwrites, so it is
            copied, as whoever keeps an image has to.
    """
    vae = bench.vae()
    decoder = torch.compile(vae.decoder, mode=mode, dynamic=False)

    def decode(raw: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = decoder(raw)
        return image.clone() if mode == "max-autotune" else image

    try:
        bench.measure(f"diffusers compiled ({mode})", decode, size=size)
    finally:
        torch.compiler.reset()


def sglang(bench: Bench, model: str, size: int) -> None:
    """SGLang's path at its quality ``"high"``, on a copy of the network, since it changes modules in place."""
    bench.measure(
        "sglang", sglang_decode(bench, model), model=model, size=size, version=sglang_path.version(bench.sglang)
    )


def sglang_decode(bench: Bench, model: str) -> Decode:
    """A decode by SGLang's path of the same weights. See `sglang_path`."""
    path = sglang_path.load(bench.sglang)
    vae = copy.deepcopy(bench.vae(model))
    parts = path.install(vae)
    bench.row(kind="sglang", model=model, **parts)
    return lambda raw: path.decode(vae, raw)


def flux2(bench: Bench) -> None:
    """FLUX.2's decoder at 1024: diffusers, SGLang, ours; and the two of them at 2048."""
    bench.measure(
        "diffusers", diffusers_decode(bench.vae("flux2", layout=torch.contiguous_format)), model="flux2", size=1024
    )
    engine = bench.ours("flux2")
    bench.measure("fluxvae", engine.decode, model="flux2", size=1024, limit_name="none")
    sglang(bench, "flux2", 1024)
    if bench.has_time("FLUX.2 at 2048", 10):
        bench.measure("fluxvae", engine.decode, model="flux2", size=2048, limit_name="none")
        sglang(bench, "flux2", 2048)


def tiled(bench: Bench) -> None:
    """diffusers in tiles, its own way to save memory. Its image is another one."""
    for size in (1024, 2048):
        vae = bench.vae()
        before = vae.tile_sample_min_size, vae.tile_latent_min_size
        tile = max(bench.side(size) // 2, 4)
        vae.tile_sample_min_size, vae.tile_latent_min_size = 8 * tile, tile
        try:
            bench.measure("diffusers tiled", diffusers_decode(vae, tiled=True), size=size)
        finally:
            vae.tile_sample_min_size, vae.tile_latent_min_size = before
