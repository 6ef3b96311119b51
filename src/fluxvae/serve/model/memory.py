"""What the memory plan allows a server: images that share a decode, outputs that fit, and what to do without memory."""

from __future__ import annotations

import gc
import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fluxvae.decoder import Decoder
from fluxvae.engine.exact import ExactEngine
from fluxvae.engine.plan import Plan
from fluxvae.engine.preview import PreviewEngine
from fluxvae.engine.storage import available_memory
from fluxvae.errors import MemoryLimitError, UnavailableError
from fluxvae.serve.model.answering import is_out_of_memory
from fluxvae.serve.model.outputs import output_bytes
from fluxvae.serve.model.requests import Job

__all__ = ["MemoryBudget", "decode_jobs"]

_log = logging.getLogger(__name__)
_PLANS = 256


class MemoryBudget:
    """What a decoder's memory limit, or free memory where it has none, allows.

    Args:
        decoder: whose limit it is. diffusers' engine plans nothing and keeps no limit: then only pixels count.
        max_pixels: the most pixels of one decode.
    """

    def __init__(self, decoder: Decoder, max_pixels: int) -> None:
        self._decoder = decoder
        self._max_pixels = max_pixels
        self._plans: OrderedDict[tuple[int, int, int], Plan] = OrderedDict()

    def plan(self, height: int, width: int, rows: int) -> Plan | None:
        """How this many images of this size would be decoded now; None: the engine does not plan.

        Raises:
            MemoryLimitError: no plan fits.
        """
        if not isinstance(self._decoder.engine, (ExactEngine, PreviewEngine)):
            return None
        # To plan takes longer than to decode the smallest images, so plans are kept. One that was cut to what was free
        # at its time is not: there may be more now, or less.
        key = (height, width, rows)
        kept = self._plans.get(key)
        if kept is not None and (self._decoder.memory_limit is not None or kept.peak_bytes <= self._limit()):
            self._plans.move_to_end(key)
            return kept
        plan = self._decoder.plan(height, width, rows)
        if self._decoder.memory_limit is not None or (plan.work_ratio <= 1 and not plan.spill_bytes):
            self._plans[key] = plan
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        return plan

    def fits(self, jobs: Sequence[Job]) -> bool:
        """Whether jobs of one key may share a decode: it stays as cheap as for the first of them alone."""
        first = jobs[0]
        if sum(job.pixels for job in jobs) > self._max_pixels:
            return False
        try:
            plan = self.plan(first.height, first.width, first.rows)
        except MemoryLimitError:
            return False  # the first alone does not fit: it is refused alone
        if plan is None:
            return True
        # A limit that leaves no room for one more image on the same plan would buy it with a slower one.
        itemsize = self._decoder.dtype.itemsize
        image = 3 * first.height * first.width * itemsize
        added = sum(job.rows for job in jobs[1:]) * image
        decoded = sum(job.rows for job in jobs) * image
        answered = max(output_bytes(job.outputs, job.rows, job.height, job.width, itemsize) for job in jobs)
        return max(plan.peak_bytes + added, decoded + answered) <= self._limit()

    def check(self, job: Job) -> None:
        """Refuse a job whose image and outputs cannot be held within the limit, before any work.

        Raises:
            MemoryLimitError: with the bytes they take.
        """
        limit = self._decoder.memory_limit
        if limit is None:
            return
        itemsize = self._decoder.dtype.itemsize
        needed = 3 * job.pixels * itemsize + output_bytes(job.outputs, job.rows, job.height, job.width, itemsize)
        if needed > limit:
            raise MemoryLimitError(
                f"memory_limit: got {limit} bytes in the model's settings; {job.rows} x {job.height}x{job.width} "
                f"(batch x height x width) as {', '.join(sorted(job.outputs))} take {needed} bytes by themselves; send "
                "fewer rows in a request, ask for 'images' only, or raise the limit"
            )

    def _limit(self) -> int:
        if self._decoder.memory_limit is not None:
            return self._decoder.memory_limit
        return available_memory(self._decoder.device) * 9 // 10  # as the engine counts


def decode_jobs(decoder: Decoder, jobs: Sequence[Job], cancel: Callable[[], bool]) -> torch.Tensor:
    """Decode jobs of one key together; out of memory, one job alone is tried again on smaller plans.

    The pixels do not depend on the plan, so a second attempt gives the same image, later.

    Returns:
        (rows of all jobs, 3, H, W), about [-1, 1].

    Raises:
        UnavailableError: no plan fits what is free now.
        FluxVAEError: as ``decode_raw``. Whatever else it raises, out of memory included, is passed on.
    """
    first = jobs[0]
    asked = first.parameters

    def attempt() -> torch.Tensor:
        ids = [job.latent_ids for job in jobs if job.latent_ids is not None]  # of all or of none: they share a key
        return decoder.decode_raw(
            first.latents if len(jobs) == 1 else torch.cat([job.latents for job in jobs]),
            height=first.height,
            width=first.width,
            latent_ids=torch.cat(ids) if ids else None,
            scaling_factor=asked.scaling_factor,
            shift_factor=asked.shift_factor,
            batch_norm_eps=asked.batch_norm_eps,
            raw=asked.raw,
            cancel=cancel,
        )

    try:
        return attempt()
    except MemoryLimitError as error:
        if decoder.memory_limit is not None:
            raise
        raise UnavailableError(f"{error}. Memory may be free again soon: try again") from error
    except Exception as error:
        if len(jobs) > 1 or not is_out_of_memory(error) or not isinstance(decoder.engine, ExactEngine):
            raise  # several are decoded one by one first
        lack = error
    _let_go(lack)
    for limit in _smaller_limits(decoder, first):
        _log.warning("out of memory: decoding %dx%d again within %d bytes", first.height, first.width, limit)
        try:
            with _lowered(decoder.engine, limit):
                return attempt()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            lack = error
            _let_go(lack)
    raise lack


def _smaller_limits(decoder: Decoder, job: Job) -> Iterator[int]:
    """Half of what the failed plan took, then the least that works."""
    assert isinstance(decoder.engine, ExactEngine)
    scale = decoder.format.vae_scale_factor
    least = decoder.engine.smallest_limit(job.height // scale, job.width // scale, job.rows)
    half = decoder.plan(job.height, job.width, job.rows).peak_bytes // 2
    if half > least:
        yield half
    yield least


@contextmanager
def _lowered(engine: ExactEngine, limit: int) -> Iterator[None]:
    before = engine.memory_limit
    engine.memory_limit = limit
    try:
        yield
    finally:
        engine.memory_limit = before


def _let_go(error: BaseException) -> None:
    """Free what a failed decode had allocated: the frames of its traceback hold it."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
