"""Decides by the memory plan which images may share a decode, and refuses what does not fit beside its outputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from fluxvae.decoder import Decoder
from fluxvae.engine.exact import ExactEngine
from fluxvae.engine.memory.free import available_memory
from fluxvae.engine.plan import Plan
from fluxvae.engine.preview import PreviewEngine
from fluxvae.errors import MemoryLimitError, UnavailableError
from fluxvae.latents.request import LatentRequest
from fluxvae.serve.model.outputs import output_bytes
from fluxvae.serve.model.requests import Job

__all__ = ["MemoryBudget", "decode_jobs"]

_PLANS = 256


class MemoryBudget:
    """Says what a decoder's memory limit allows, or free memory where it has no limit.

    Args:
        decoder: the decoder. diffusers' engine plans nothing and keeps no limit, so that with it only pixels count.
        max_pixels: the most pixels that one decode may have.
    """

    def __init__(self, decoder: Decoder, max_pixels: int) -> None:
        self._decoder = decoder
        self._max_pixels = max_pixels
        self._plans: OrderedDict[tuple[int, int, int], Plan] = OrderedDict()

    def plan(self, height: int, width: int, rows: int) -> Plan | None:
        """Return how this many images of this size would be decoded now; None where the engine does not plan.

        Raises:
            MemoryLimitError: no plan fits the limit.
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
        """Return whether jobs of one key may share a decode: whether it is as cheap as for the first of them alone."""
        requests = [job.request for job in jobs]
        first = requests[0]
        if sum(request.pixels for request in requests) > self._max_pixels:
            return False
        try:
            plan = self.plan(first.height, first.width, first.batch)
        except MemoryLimitError:
            return False  # not even the first alone fits, so it is decoded, and refused, alone
        if plan is None:
            return True
        # Where the limit has no room for one more image on the same plan, all of them would get a slower plan.
        itemsize = self._decoder.dtype.itemsize
        image = 3 * first.height * first.width * itemsize
        added = sum(request.batch for request in requests[1:]) * image
        decoded = sum(request.batch for request in requests) * image
        answered = max(
            output_bytes(job.outputs, job.request.batch, first.height, first.width, itemsize) for job in jobs
        )
        return max(plan.peak_bytes + added, decoded + answered) <= self._limit()

    def check(self, job: Job) -> None:
        """Refuse a job, before any work, whose image and outputs cannot be held within the limit.

        Raises:
            MemoryLimitError: it cannot; the message says how many bytes they take.
        """
        limit = self._decoder.memory_limit
        if limit is None:
            return
        itemsize, request = self._decoder.dtype.itemsize, job.request
        rows, height, width = request.batch, request.height, request.width
        needed = 3 * request.pixels * itemsize + output_bytes(job.outputs, rows, height, width, itemsize)
        if needed > limit:
            raise MemoryLimitError(
                f"memory_limit: got {limit} bytes in the model's settings; {rows} x {height}x{width} "
                f"(batch x height x width) as {', '.join(sorted(job.outputs))} take {needed} bytes by themselves; send "
                "fewer rows in a request, ask for 'images' only, or raise the limit"
            )

    def _limit(self) -> int:
        if self._decoder.memory_limit is not None:
            return self._decoder.memory_limit
        return available_memory(self._decoder.device) * 9 // 10  # nine tenths of what is free, as in the engine


def decode_jobs(decoder: Decoder, jobs: Sequence[Job], cancel: Callable[[], bool]) -> torch.Tensor:
    """Decode jobs of one key together.

    Returns:
        The images, (rows of all jobs, 3, H, W), in about [-1, 1].

    Raises:
        UnavailableError: no plan fits what is free now, or memory ran out with the smallest plan as well.
        FluxVAEError: as for `Decoder.decode_request`. Whatever else that raises, out of memory included, is passed on.
    """
    try:
        return decoder.decode_request(LatentRequest.together([job.request for job in jobs]), cancel=cancel)
    except MemoryLimitError as error:
        if decoder.memory_limit is not None:
            raise
        raise UnavailableError(f"{error}. Memory may be free again soon: try again") from error
