"""A pipeline that makes images on a small card and keeps them, in a process of its own, where the card is a fake.

The allocator is PyTorch's own, beneath it is `fake_cuda_runtime.c`. The engine plans, takes its arenas and tries again
as it always does; only the layers compute nothing. Each argument is the JSON of keywords for `pipeline`, or of nothing
for `calls`. Each prints a line of JSON and leaves the card empty.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import warnings
import weakref
from typing import Any

import torch
from diffusers import AutoencoderKL

from fluxvae.engine import bounded, runner
from fluxvae.engine.exact import ExactDecoder, OutOfMemoryWarning
from fluxvae.engine.memory.free import available_memory
from fluxvae.engine.memory.pool import ArenaPool
from fluxvae.system import FreeMemory

CUDA = torch.device("cuda", 0)
WEIGHTS = 10 * 10**9
ROW = 3072 * 2
"""Bytes of one token in FLUX's transformer, in bfloat16."""
ACTIVATIONS = (1, 1, 3, 1, 4, 7)
"""Tensors that one of its blocks holds at once, in tokens."""


def bytes_of(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=CUDA)


def take_the_arena(self: runner.Runner, given: torch.Tensor, made: torch.Tensor) -> None:
    """What a run allocates, without what it computes: the arena, and a workspace of cuDNN's for every layer."""
    self._maps.begin()
    for _ in self._plan.layers:
        bytes_of(22 << 20)


def as_it_was(device: torch.device) -> FreeMemory:
    """All that is cached counts as free."""
    free = torch.cuda.mem_get_info(device)[0]
    return FreeMemory(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), "free memory")


def without_a_pool() -> None:
    """The arena as it was: from PyTorch's cache, and left there."""
    ArenaPool.take = ArenaPool._empty  # type: ignore[method-assign]
    ArenaPool.close = lambda self: None  # type: ignore[method-assign]
    bounded.available_memory = as_it_was  # type: ignore[assignment]


def counts() -> list[int]:
    into = (ctypes.c_int * 2)()
    ctypes.CDLL(None).fake_counts(into)
    return list(into)


def state() -> dict[str, float]:
    stats, (free, _) = torch.cuda.memory_stats(), torch.cuda.mem_get_info()
    names = ("reserved", "active", "inactive_split")
    return {
        "available": available_memory("cuda").nbytes,
        "driver": free,
        **{name: stats[f"{name}_bytes.all.current"] for name in names},
    }


def denoised(side: int) -> list[torch.Tensor]:
    """What a pipeline holds after denoising: embeddings of the prompt that it keeps, and latents."""
    tokens = (side // 16) ** 2 + 512
    activations = [bytes_of(tokens * ROW * share) for share in ACTIVATIONS]
    kept = [bytes_of((2 << 20) - 512), torch.empty(1, 16, side // 8, side // 8, dtype=torch.bfloat16, device=CUDA)]
    del activations
    return kept


def engine(**options: Any) -> ExactDecoder:
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        vae.encoder = None
        torch.nn.Module.to(vae, torch.bfloat16)
    return ExactDecoder(torch.nn.Module.to_empty(vae, device=CUDA).requires_grad_(False), kernels="torch", **options)


def pipeline(side: int, images: int, own_pool: bool) -> dict[str, Any]:
    """Make images one after another and keep them all."""
    if not own_pool:
        without_a_pool()
    decoder = engine()
    weights = [bytes_of(WEIGHTS // 100) for _ in range(100)]
    kept: list[torch.Tensor] = []
    report: dict[str, Any] = {"start": state(), "images": [], "failed": None, "weights": len(weights)}
    for _ in range(images):
        try:
            embeddings, latents = denoised(side)
        except torch.OutOfMemoryError as error:
            report["failed"] = str(error)
            break
        plan, before = decoder.plan(side // 8, side // 8), state()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kept += [embeddings, decoder.decode(latents)]
        told = [str(warning.message) for warning in caught if warning.category is OutOfMemoryWarning]
        report["images"].append(
            {"peak": plan.peak_bytes, "work": plan.work_ratio, "told": told, "before": before, "after": state()}
        )
    return report


def calls() -> dict[str, Any]:
    """What single calls leave behind."""
    decoder, report = engine(memory_limit=2 * 10**9), {}
    one = torch.zeros(1, 16, 128, 128, dtype=torch.bfloat16, device=CUDA)
    decoder.decode(one)
    before, counted = state(), counts()
    image = decoder.decode(one.expand(3, -1, -1, -1))
    report["batch"] = {"before": before, "after": state(), "counts": [counted, counts()], "image": image.nbytes}
    report["all"] = everything()
    torch.cuda.set_per_process_memory_fraction(0.5)
    report["half"] = everything()
    torch.cuda.set_per_process_memory_fraction(1.0)
    # An error that is held does not hold the pool.
    room = ArenaPool(CUDA)
    try:
        room.take(20 << 30)
    except torch.OutOfMemoryError as error:
        held = error
    pool = None if room._pool is None else weakref.ref(room._pool)
    room.close()
    report["pool"] = (type(held).__name__, pool is None or pool() is None)
    del held
    # Others take memory after the plan was made.
    torch.cuda.empty_cache()
    taken = torch.cuda.mem_get_info()[0] - (850 << 20)
    others(taken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoder.decode(one)
    report["less"] = [str(warning.message) for warning in caught if warning.category is OutOfMemoryWarning]
    others(-taken)
    return report


def others(nbytes: int) -> None:
    """Another process takes so much of the card."""
    ctypes.CDLL(None).fake_others(ctypes.c_ssize_t(nbytes))


def everything() -> dict[str, Any]:
    """What is told to be free beside a cache, some of which is in a segment with something in it; is it there?"""
    cached = [bytes_of(size << 20) for size in (700, 500, 300)]
    del cached
    pinned = bytes_of(100 << 20)
    told = state()
    outcomes = []
    for more in (0, 4 << 20):
        room = ArenaPool(CUDA)
        try:
            room.take(told["available"] // (2 << 20) * (2 << 20) + more)
            outcomes.append("fits")
        except torch.OutOfMemoryError:
            outcomes.append("does not")
        room.close()
    torch.cuda.empty_cache()
    return {"told": told, "outcomes": outcomes, "pinned": pinned.nbytes}


if __name__ == "__main__":
    runner.Runner.run = take_the_arena  # type: ignore[method-assign]
    gc.disable()  # what is freed is freed at once, not when a circle of references is found
    for job in map(json.loads, sys.argv[1:]):
        print(json.dumps(pipeline(**job) if job else calls()), flush=True)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0
