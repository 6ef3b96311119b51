"""Decides which requests are decoded together, and delivers to each its answer.

This is the logic of the Triton model, but without Triton. Requests are decoded together if they agree on everything
that changes how latents become pixels. Each gets exactly one answer, as soon as its group is decoded. A request that
fails does not make others fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from fluxvae.engine.memory.free import is_out_of_memory
from fluxvae.errors import DecodeCancelled, status_of
from fluxvae.serve.model.requests import Job

__all__ = ["Decode", "answer", "code_of", "group"]

Decode = Callable[[Sequence[Job], Callable[[], bool]], torch.Tensor]
"""Decodes the jobs of one group to images (rows of all jobs, 3, H, W) in about [-1, 1]. The second argument is asked
meanwhile; once it returns true, the decode is cancelled."""


def group(jobs: Iterable[Job], fits: Callable[[Sequence[Job]], bool]) -> list[list[Job]]:
    """Divide jobs into groups that can be decoded together, in order of arrival.

    Every job is in exactly one group. One that does not even fit alone is in a group of its own.

    Args:
        jobs: the jobs, which are valid requests.
        fits: returns whether these jobs, which all have the same key, may share a decode.
    """
    open_groups: dict[object, list[Job]] = {}
    groups: list[list[Job]] = []
    for job in jobs:
        key = job.request.key
        current = open_groups.get(key)
        if current is None or not fits([*current, job]):
            current = open_groups[key] = []
            groups.append(current)
        current.append(job)
    return groups


def answer(
    decode: Decode,
    jobs: Iterable[Job],
    deliver: Callable[[Job, torch.Tensor | Exception], None],
    *,
    fits: Callable[[Sequence[Job]], bool],
    cancelled: Callable[[Job], bool],
) -> None:
    """Decode all jobs, group by group, and deliver to each exactly once its images or the error.

    If a group fails, its jobs are decoded again one by one, so that a job that fails does not make others fail.

    Args:
        decode: decodes a group.
        jobs: the jobs, which are valid requests.
        deliver: is called with a job and its images (B, 3, H, W) in about [-1, 1], or its error. It must not raise.
        fits: returns whether jobs of the same key may share a decode.
        cancelled: returns whether nobody waits for a job any more. It is asked before, during and after its decode.
    """
    for members in group(jobs, fits):
        _answer_group(decode, members, deliver, cancelled)


def _answer_group(
    decode: Decode,
    members: list[Job],
    deliver: Callable[[Job, torch.Tensor | Exception], None],
    cancelled: Callable[[Job], bool],
) -> None:
    jobs = []
    for job in members:
        if cancelled(job):
            deliver(job, DecodeCancelled("the request was cancelled before its decode began"))
        else:
            jobs.append(job)
    if not jobs:
        return
    outcome: torch.Tensor | Exception
    try:
        outcome = decode(jobs, lambda: all(cancelled(job) for job in jobs))
    except Exception as error:  # delivered below to the jobs that it concerns
        outcome = error
    if isinstance(outcome, torch.Tensor):
        row = 0
        for job in jobs:
            image = outcome[row : row + job.request.batch]
            row += job.request.batch
            gone = len(jobs) > 1 and cancelled(job)  # the decode went on for the other jobs
            deliver(job, DecodeCancelled("the request was cancelled during its decode") if gone else image)
    elif len(jobs) == 1 or isinstance(outcome, DecodeCancelled):
        for job in jobs:
            deliver(job, outcome)
    else:
        del outcome  # its traceback keeps alive what the failed decode had allocated
        for job in jobs:
            _answer_group(decode, [job], deliver, cancelled)


def code_of(error: BaseException) -> str:
    """Return the name of the ``TritonError`` code for an error.

    Out of memory is UNAVAILABLE, because there may be enough when the client tries again.
    """
    return "UNAVAILABLE" if is_out_of_memory(error) else status_of(error).triton
