"""What a job would do and about how long it would take: a dry run."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from fluxvae.batch.folder import record_of
from fluxvae.batch.pipeline import batch_size
from fluxvae.batch.run import Outlook, look
from fluxvae.batch.settings import Job
from fluxvae.batch.store import open_store
from fluxvae.batch.worker import checkpoint_sha256
from fluxvae.decoder import Decoder
from fluxvae.engine.plan import Plan
from fluxvae.engine.preview import ApproximateWarning
from fluxvae.errors import MemoryLimitError

__all__ = ["Estimate", "SizeEstimate", "estimate"]

_SAMPLE = 32
"""Latents each way of the image that the rate is measured with: 256 pixels for FLUX."""


@dataclass(frozen=True)
class SizeEstimate:
    """The images of one size."""

    height: int
    width: int
    images: int
    batch: int
    """Of them in one decode."""
    peak_bytes: int
    """Of such a decode, above the weights; 0 where there is a problem."""
    seconds: float
    problem: str | None
    """Why they cannot be decoded within the memory limit."""


@dataclass(frozen=True)
class Estimate:
    """A job that was not done."""

    outlook: Outlook
    sizes: tuple[SizeEstimate, ...]
    out: str
    checkpoint: str
    device: str
    dtype: str

    @property
    def seconds(self) -> float:
        """All decodes, one after the other on this machine, at the rate of one small decode."""
        return sum(size.seconds for size in self.sizes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "out": self.out,
            "to_decode": len(self.outlook.items),
            "present": self.outlook.present,
            "skipped": self.outlook.skipped,
            "failures": [failure.as_dict() for failure in self.outlook.failures],
            "megapixels": self.outlook.pixels / 1e6,
            "estimated_seconds": self.seconds,
            "checkpoint": self.checkpoint,
            "device": self.device,
            "dtype": self.dtype,
            "approximate": self.outlook.approximate,
            "sizes": [vars(size) for size in self.sizes],
        }


def estimate(job: Job) -> Estimate:
    """Read the inputs' metadata, plan every size, decode one small image. Nothing is written.

    Raises:
        FluxVAEError: what would keep the job from starting.
    """
    decoder = Decoder.from_pretrained(job.checkpoint, **job.decoder_options())
    dtype = str(decoder.dtype).removeprefix("torch.")
    record = record_of(job, checkpoint_sha256(job), decoder)
    store = open_store(job.out, "dry")
    outlook = look(job, decoder, record, store)
    rate = _rate(decoder) if outlook.items else 1.0
    sizes = tuple(_size(decoder, job, rate, *size, images) for size, images in outlook.sizes().items())
    return Estimate(outlook, sizes, store.root, job.checkpoint, str(decoder.device), dtype)


def _size(decoder: Decoder, job: Job, rate: float, height: int, width: int, images: int) -> SizeEstimate:
    batch = min(images, batch_size(decoder, height, width, job.batch))
    try:
        plan = decoder.plan(height, width, batch)
    except MemoryLimitError as error:
        return SizeEstimate(height, width, images, batch, 0, 0.0, str(error))
    return SizeEstimate(height, width, images, batch, plan.peak_bytes, images * plan.macs / rate, None)


def _rate(decoder: Decoder) -> float:
    """Multiply-adds per second of this decoder, on this machine as busy as it is now."""
    decoder.prepare()
    format = decoder.format
    latents = torch.zeros(1, format.channels, _SAMPLE, _SAMPLE, dtype=torch.float32, device="cpu")
    side = _SAMPLE * format.vae_scale_factor
    plan: Plan = decoder.plan(side, side)
    raw = not decoder.approximate  # a preview takes none
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximateWarning)
        decoder.decode_raw(latents, raw=raw)
        start = time.perf_counter()
        decoder.decode_raw(latents, raw=raw)
    if decoder.device.type == "cuda":
        torch.cuda.synchronize(decoder.device)
    return plan.macs / (time.perf_counter() - start)
