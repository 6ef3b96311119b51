"""Which requests one decode answers, and who gets which answer: the Triton model's logic without Triton.

Requests are decoded together when they agree on everything that changes how latents become pixels. Each gets exactly
one answer, as soon as its own group is decoded; one that fails takes no other down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from fluxvae.engine.memory.free import is_out_of_memory
from fluxvae.errors import DecodeCancelled, status_of
from fluxvae.serve.model.requests import Job

__all__ = ["Decode", "answer", "code_of", "group"]

Decode = Callable[[Sequence[Job], Callable[[], bool]], torch.Tensor]
"""Jobs of one group, and ``cancel``, to (rows of all jobs, 3, H, W) in about [-1, 1]."""


def group(jobs: Iterable[Job], fits: Callable[[Sequence[Job]], bool]) -> list[list[Job]]:
    """Put jobs that can be decoded together into groups, in order of arrival.

    Every job is in exactly one group; one that does not fit by itself is alone in its group.

    Args:
        jobs: valid requests.
        fits: whether these jobs, all of one key, may share a decode.
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
    """Decode all jobs, group by group, and deliver each exactly once: its pixels, or what went wrong.

    A group that fails is decoded again job by job, so that one job cannot take its neighbours down.

    Args:
        decode: decodes a group.
        jobs: valid requests.
        deliver: takes a job with (B, 3, H, W) in about [-1, 1], or with an error. Must not raise.
        fits: whether jobs of one key may share a decode.
        cancelled: whether nobody waits for a job any more; asked before, during and after its decode.
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
    except Exception as error:  # delivered to those it concerns
        outcome = error
    if isinstance(outcome, torch.Tensor):
        row = 0
        for job in jobs:
            image = outcome[row : row + job.request.batch]
            row += job.request.batch
            gone = len(jobs) > 1 and cancelled(job)  # the others kept the decode going
            deliver(job, DecodeCancelled("the request was cancelled during its decode") if gone else image)
    elif len(jobs) == 1 or isinstance(outcome, DecodeCancelled):
        for job in jobs:
            deliver(job, outcome)
    else:
        del outcome  # its traceback holds what the failed decode had allocated
        for job in jobs:
            _answer_group(decode, [job], deliver, cancelled)


def code_of(error: BaseException) -> str:
    """The name of the ``TritonError`` code for ``error``; memory that ran out may be free again on a retry."""
    return "UNAVAILABLE" if is_out_of_memory(error) else status_of(error).triton
