"""The dry run of a job: what it would do, and about how long that would take."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from fluxvae.batch.decoding import batch_size, look
from fluxvae.batch.folder import record_of
from fluxvae.batch.outlook import Outlook
from fluxvae.batch.settings import Job
from fluxvae.batch.store import open_store
from fluxvae.batch.worker import checkpoint_sha256
from fluxvae.decoder import Decoder
from fluxvae.engine.plan import Plan
from fluxvae.engine.preview import ApproximateWarning
from fluxvae.errors import MemoryLimitError

__all__ = ["Estimate", "SizeEstimate", "estimate"]

_SAMPLE = 32
"""The height and width, in latents, of the image that is decoded to measure the rate. For FLUX it has 256x256
pixels."""


@dataclass(frozen=True)
class SizeEstimate:
    """What decoding the images of one size would take."""

    height: int
    """The images' height in pixels."""
    width: int
    """The images' width in pixels."""
    images: int
    """How many images of this size the job has to decode."""
    batch: int
    """How many of them one decode would take together."""
    peak_bytes: int
    """How many bytes such a decode would take above the weights at its peak; 0 where there is a problem."""
    seconds: float
    """About how long all of them would take on this machine; 0 where there is a problem."""
    problem: str | None
    """Why they cannot be decoded within the memory limit; None where they can."""


@dataclass(frozen=True)
class Estimate:
    """What a job would do, and what it would take."""

    outlook: Outlook
    """What the job would do."""
    sizes: tuple[SizeEstimate, ...]
    """What the images of each size would take, the most frequent size first."""
    out: str
    """The path or URL of the output folder."""
    checkpoint: str
    """The job's checkpoint, as it was given."""
    device: str
    """The device that would decode, such as ``"cuda:0"``."""
    dtype: str
    """The dtype that it would decode in, such as ``"bfloat16"``."""

    @property
    def seconds(self) -> float:
        """How long all decodes would take, one after the other on this machine and as fast as one small decode was."""
        return sum(size.seconds for size in self.sizes)

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON."""
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
    """Estimate a job: read its inputs' metadata, plan a decode of every size, and time one small decode.

    Nothing is written.

    Raises:
        FluxVAEError: the job could not start, and for the same reason.
    """
    decoder = Decoder.from_pretrained(job.checkpoint, **job.load_options())
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
    """Measure how many multiply-adds a second this decoder does, on this machine and as busy as it is now."""
    decoder.prepare()
    format = decoder.format
    latents = torch.zeros(1, format.channels, _SAMPLE, _SAMPLE, dtype=torch.float32, device="cpu")
    side = _SAMPLE * format.vae_scale_factor
    plan: Plan = decoder.plan(side, side)
    raw = not decoder.approximate  # a preview does not take raw latents
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximateWarning)
        decoder.decode_raw(latents, raw=raw)
        start = time.perf_counter()
        decoder.decode_raw(latents, raw=raw)
    if decoder.device.type == "cuda":
        torch.cuda.synchronize(decoder.device)
    return plan.macs / (time.perf_counter() - start)
