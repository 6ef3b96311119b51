"""A short benchmark for one's own machine, which ``fluxvae bench`` runs.

It measures the decode time and the peak memory at a few sizes and, on request, diffusers' own beside them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fluxvae.decoder import Decoder
from fluxvae.system import peak_of_memory

__all__ = ["Row", "run"]


@dataclass(frozen=True)
class Row:
    """What was measured at one size."""

    size: int
    """The height and the width of the image, in pixels."""
    seconds: float
    """The median time of a decode over all rounds."""
    slowest: float
    """The longest time of a decode, in seconds."""
    megapixels_per_second: float
    peak_bytes: int | None
    """The measured peak of memory above what was held before the decode. None where this system does not tell."""
    planned_bytes: int
    """The peak that the plan predicted."""
    diffusers_seconds: float | None
    diffusers_peak_bytes: int | None


def run(decoder: Decoder, sizes: Sequence[int], *, rounds: int, diffusers: bool) -> Iterator[Row]:
    """Measure one size after another, and yield a row for each.

    Each engine decodes once to warm up. Then the engines take turns, so that a slow moment of the machine hits both.

    Args:
        decoder: a decoder with the exact engine.
        sizes: the sizes of the square images in pixels, multiples of 8.
        rounds: how many decodes of each engine are timed at each size.
        diffusers: also measure diffusers' own decode with the same weights.
    """
    decoder.prepare()
    decoders = [decoder, Decoder(decoder.vae, engine="diffusers")] if diffusers else [decoder]
    generator = torch.Generator(device="cpu").manual_seed(0)
    for size in sizes:
        plan = decoder.plan(size, size)
        side = size // decoder.format.vae_scale_factor
        latents = torch.randn(
            (1, decoder.format.channels, side, side), generator=generator, dtype=torch.float32, device="cpu"
        )
        seconds: list[list[float]] = [[] for _ in decoders]
        peaks: list[list[int | None]] = [[] for _ in decoders]
        for turn in range(rounds + 1):
            for index, one in enumerate(decoders):
                took, peak = _measure(one, lambda one=one, latents=latents: one.decode_raw(latents))  # type: ignore[misc]
                if turn:
                    seconds[index].append(took)
                peaks[index].append(peak)
        median = statistics.median(seconds[0])
        yield Row(
            size=size,
            seconds=median,
            slowest=max(seconds[0]),
            megapixels_per_second=size * size / 1e6 / median,
            peak_bytes=_largest(peaks[0]),
            planned_bytes=plan.peak_bytes,
            diffusers_seconds=statistics.median(seconds[1]) if diffusers else None,
            diffusers_peak_bytes=_largest(peaks[1]) if diffusers else None,
        )


def _largest(peaks: list[int | None]) -> int | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def _measure(decoder: Decoder, call: Callable[[], Any]) -> tuple[float, int | None]:
    """Return how long a call took, in seconds, and how many bytes of memory it added at its peak.

    On a CPU this is resident memory, None where the system does not tell; on CUDA it is what PyTorch allocated.
    """
    if decoder.device.type == "cuda":
        torch.cuda.synchronize(decoder.device)
        torch.cuda.reset_peak_memory_stats(decoder.device)
        before = torch.cuda.memory_allocated(decoder.device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(decoder.device)
        return time.perf_counter() - start, torch.cuda.max_memory_allocated(decoder.device) - before
    with peak_of_memory() as peak:
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
    return took, (peak[0] if peak else None)
