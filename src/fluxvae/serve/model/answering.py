"""Decides which requests are computed together, and delivers to each its answer.

This is the logic of the Triton model, but without Triton. Requests are decoded together if they agree on everything
that changes how latents become pixels, and encoded together if their pictures have one size. Each gets exactly one
answer, as soon as its group is done. A request that fails does not make others fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from fluxvae.engine.memory.free import is_out_of_memory
from fluxvae.errors import DecodeCancelled, status_of
from fluxvae.serve.model.jobs import AnyJob

__all__ = ["Compute", "answer", "code_of", "group"]

Compute = Callable[[Sequence[AnyJob], Callable[[], bool]], torch.Tensor]
"""Computes the jobs of one group, to the rows of all of them. The second argument is asked meanwhile; once it returns
true, the work is cancelled."""


def group(jobs: Iterable[AnyJob], fits: Callable[[Sequence[AnyJob]], bool]) -> list[list[AnyJob]]:
    """Divide jobs into groups that can be computed together, in order of arrival.

    Every job is in exactly one group. One that does not even fit alone is in a group of its own.

    Args:
        jobs: the jobs, which are valid requests.
        fits: returns whether these jobs, which all have the same key, may be computed together.
    """
    open_groups: dict[object, list[AnyJob]] = {}
    groups: list[list[AnyJob]] = []
    for job in jobs:
        key = job.request.key
        current = open_groups.get(key)
        if current is None or not fits([*current, job]):
            current = open_groups[key] = []
            groups.append(current)
        current.append(job)
    return groups


def answer(
    compute: Compute,
    jobs: Iterable[AnyJob],
    deliver: Callable[[AnyJob, torch.Tensor | Exception], None],
    *,
    fits: Callable[[Sequence[AnyJob]], bool],
    cancelled: Callable[[AnyJob], bool],
) -> None:
    """Compute all jobs, group by group, and deliver to each exactly once its rows or the error.

    If a group fails, its jobs are computed again one by one, so that a job that fails does not make others fail.

    Args:
        compute: computes a group.
        jobs: the jobs, which are valid requests.
        deliver: is called with a job and its rows of the result, or its error. It must not raise.
        fits: returns whether jobs of the same key may be computed together.
        cancelled: returns whether nobody waits for a job any more. It is asked before, during and after its
            work.
    """
    for members in group(jobs, fits):
        _answer_group(compute, members, deliver, cancelled)


def _answer_group(
    compute: Compute,
    members: list[AnyJob],
    deliver: Callable[[AnyJob, torch.Tensor | Exception], None],
    cancelled: Callable[[AnyJob], bool],
) -> None:
    jobs = []
    for job in members:
        if cancelled(job):
            deliver(job, DecodeCancelled("the request was cancelled before its turn"))
        else:
            jobs.append(job)
    if not jobs:
        return
    outcome: torch.Tensor | Exception
    try:
        outcome = compute(jobs, lambda: all(cancelled(job) for job in jobs))
    except Exception as error:  # delivered below to the jobs that it concerns
        outcome = error
    if isinstance(outcome, torch.Tensor):
        row = 0
        for job in jobs:
            rows = outcome[row : row + job.request.batch]
            row += job.request.batch
            gone = len(jobs) > 1 and cancelled(job)  # the work went on for the other jobs
            deliver(job, DecodeCancelled("the request was cancelled during its work") if gone else rows)
    elif len(jobs) == 1 or isinstance(outcome, DecodeCancelled):
        for job in jobs:
            deliver(job, outcome)
    else:
        del outcome  # its traceback keeps alive what the failed work had allocated
        for job in jobs:
            _answer_group(compute, [job], deliver, cancelled)


def code_of(error: BaseException) -> str:
    """Return the name of the ``TritonError`` code for an error.

    Out of memory is UNAVAILABLE, because there may be enough when the client tries again.
    """
    return "UNAVAILABLE" if is_out_of_memory(error) else status_of(error).triton
