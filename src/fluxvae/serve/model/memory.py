"""Decides by the memory plan which images may share a decode, and refuses what does not fit beside its outputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from fluxvae.engine.bounded import ExactEngine
from fluxvae.engine.plan import Plan
from fluxvae.engine.preview import PreviewEngine
from fluxvae.errors import MemoryLimitError, UnavailableError
from fluxvae.serve.model.jobs import AnyJob
from fluxvae.serve.model.work import Work

__all__ = ["MemoryBudget", "compute"]

_PLANS = 256


class MemoryBudget:
    """Says what the memory limit of a model's decoder or encoder allows, or free memory where it has no limit.

    Args:
        work: what the model does. diffusers' engine plans nothing and keeps no limit, so that with it only pixels
            count.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._half = work.half
        self._plans: OrderedDict[tuple[int, int, int], Plan] = OrderedDict()

    def plan(self, height: int, width: int, rows: int) -> Plan | None:
        """Return how this many images of this size would be computed now; None where the engine does not plan.

        Raises:
            MemoryLimitError: no plan fits the limit.
        """
        if not isinstance(self._half.engine, (ExactEngine, PreviewEngine)):
            return None
        # To plan takes longer than to decode the smallest images, so plans are kept. One that was cut to what was free
        # at its time is not: there may be more now, or less.
        key = (height, width, rows)
        kept = self._plans.get(key)
        if kept is not None and (self._half.memory_limit is not None or kept.peak_bytes <= self._limit()):
            self._plans.move_to_end(key)
            return kept
        plan = self._half.plan(height, width, rows)
        if self._half.memory_limit is not None or (plan.work_ratio <= 1 and not plan.spill_bytes):
            self._plans[key] = plan
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        return plan

    def fits(self, jobs: Sequence[AnyJob]) -> bool:
        """Return whether jobs of one key may share a decode: whether it is as cheap as for the first of them alone."""
        requests = [job.request for job in jobs]
        first = requests[0]
        if sum(request.pixels for request in requests) > self._work.max_pixels:
            return False
        try:
            plan = self.plan(first.height, first.width, first.batch)
        except MemoryLimitError:
            return False  # not even the first alone fits, so it is decoded, and refused, alone
        if plan is None:
            return True
        # Where the limit has no room for one more image on the same plan, all of them would get a slower plan.
        image = self._work.held_bytes(first.height, first.width)
        added = sum(request.batch for request in requests[1:]) * image
        held = sum(request.batch for request in requests) * image
        answered = max(self._work.output_bytes(job) for job in jobs)
        return max(plan.peak_bytes + added, held + answered) <= self._limit()

    def check(self, job: AnyJob) -> None:
        """Refuse a job, before any work, whose image and outputs cannot be held within the limit.

        Raises:
            MemoryLimitError: it cannot; the message says how many bytes they take.
        """
        limit = self._half.memory_limit
        if limit is None:
            return
        request = job.request
        rows, height, width = request.batch, request.height, request.width
        needed = rows * self._work.held_bytes(height, width) + self._work.output_bytes(job)
        if needed > limit:
            raise MemoryLimitError(
                f"memory_limit: got {limit} bytes in the model's settings; {rows} x {height}x{width} "
                f"(batch x height x width) as {', '.join(sorted(job.outputs))} take {needed} bytes by themselves; send "
                "fewer rows in a request, ask for one output only, or raise the limit"
            )

    def _limit(self) -> int:
        if self._half.memory_limit is not None:
            return self._half.memory_limit
        engine = self._half.engine
        assert isinstance(engine, (ExactEngine, PreviewEngine))  # or there is no plan to compare with
        return engine.limit()[0]


def compute(work: Work, jobs: Sequence[AnyJob], cancel: Callable[[], bool]) -> torch.Tensor:
    """Decode or encode jobs of one key together.

    Returns:
        The rows of all jobs, as `Work.compute` returns them.

    Raises:
        UnavailableError: no plan fits what is free now, or memory ran out with the smallest plan as well.
        FluxVAEError: as for `Work.compute`. Whatever else that raises, out of memory included, is passed on.
    """
    try:
        return work.compute(jobs, cancel)
    except MemoryLimitError as error:
        if work.half.memory_limit is not None:
            raise
        raise UnavailableError(f"{error}. Memory may be free again soon: try again") from error
