"""A short benchmark for one's own machine: decode time and peak memory at a few sizes, next to diffusers on request."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fluxvae.decoder import Decoder

__all__ = ["Row", "run"]


@dataclass(frozen=True)
class Row:
    """One size."""

    size: int
    """Pixels each way."""
    seconds: float
    """Median of the rounds."""
    slowest: float
    megapixels_per_second: float
    peak_bytes: int | None
    """Measured, above what was held before. None: this system does not tell."""
    planned_bytes: int
    diffusers_seconds: float | None
    diffusers_peak_bytes: int | None


def run(decoder: Decoder, sizes: Sequence[int], *, rounds: int, diffusers: bool) -> Iterator[Row]:
    """Measure each size in turn; the engines take turns too, after one decode each to warm up.

    Args:
        decoder: with the exact engine.
        sizes: pixels each way, multiples of 8.
        rounds: timed decodes of each.
        diffusers: measure diffusers' own decode of the same weights beside it.
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
    """Seconds of a call and the memory it added at its peak: resident on a CPU, allocated on CUDA."""
    cuda = decoder.device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.synchronize(decoder.device)
        torch.cuda.reset_peak_memory_stats(decoder.device)
        before = torch.cuda.memory_allocated(decoder.device)
    else:
        resets = Path("/proc/self/clear_refs")
        if resets.exists():
            resets.write_text("5")  # VmHWM begins again
            before = _resident("VmRSS")
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize(decoder.device)
        return time.perf_counter() - start, torch.cuda.max_memory_allocated(decoder.device) - before
    took = time.perf_counter() - start
    return took, (_resident("VmHWM") - before) if before else None


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0
