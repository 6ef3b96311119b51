"""What a request asks for, and which requests one decode answers: the Triton model's logic without Triton.

A request carries latents (B, N, 64), one height and one width for each of its B rows, and parameters. Requests are
decoded together when they agree on everything that changes how latents become pixels: size and factors. The number of
patches is not enough: 512x1024 and 1024x512 have the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fluxvae.errors import DecodeCancelled, InvalidLatentsError, InvalidOptionError, status_of
from fluxvae.images import check_format

__all__ = ["Job", "Parameters", "answer", "code_of", "group", "read_job", "read_parameters"]

# Triton's own (its docs, protocol/extension_parameters.md); some versions hand them on to the model.
_RESERVED = frozenset(
    {
        "binary_data",
        "binary_data_output",
        "classification",
        "headers",
        "priority",
        "sequence_end",
        "sequence_id",
        "sequence_start",
        "timeout",
    }
)


class _Decoder(Protocol):
    """The part of `fluxvae.Decoder` that requests need."""

    def check(self, latents: torch.Tensor, *, height: int, width: int) -> tuple[int, int]: ...

    def decode_raw(
        self,
        latents: torch.Tensor,
        *,
        height: int,
        width: int,
        scaling_factor: float | None,
        shift_factor: float | None,
        cancel: Callable[[], bool],
    ) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """A request's own parameters; None is the default."""

    format: str = "png"
    quality: int | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One valid request."""

    index: int
    """Its place among the requests of one ``execute``."""
    latents: torch.Tensor
    """Packed, (B, N, 64)."""
    height: int
    """Pixels that will be decoded: already floored to the grid."""
    width: int
    parameters: Parameters

    @property
    def key(self) -> tuple[int, int, float | None, float | None]:
        """What requests must share to be decoded together."""
        return (self.height, self.width, self.parameters.scaling_factor, self.parameters.shift_factor)

    @property
    def pixels(self) -> int:
        """Pixels of all its images."""
        return self.latents.shape[0] * self.height * self.width


def read_parameters(text: str) -> Parameters:
    """Parse ``request.parameters()``: a JSON object.

    Raises:
        InvalidOptionError: an unknown parameter, or a value of the wrong type or range.
    """
    given: dict[str, Any] = json.loads(text or "{}") or {}
    own = {k: v for k, v in given.items() if k not in _RESERVED and not k.startswith("triton_")}
    if unknown := sorted(own.keys() - Parameters.__dataclass_fields__.keys()):
        raise InvalidOptionError(
            f"parameter {unknown[0]!r}: unknown, expected one of {', '.join(Parameters.__dataclass_fields__)}"
        )
    for name in ("scaling_factor", "shift_factor"):
        if name in own:
            own[name] = _number(name, own[name])
    if own.get("scaling_factor") == 0:
        raise InvalidOptionError("scaling_factor: got 0, expected a number other than 0: latents are divided by it")
    parameters = Parameters(**own)
    check_format(parameters.format, parameters.quality)
    return parameters


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise InvalidOptionError(f"{name}: got {value!r}, expected a finite number")
    return float(value)


def read_job(
    index: int,
    latents: NDArray[np.float32],
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    parameters: str,
    *,
    decoder: _Decoder,
    max_pixels: int,
) -> Job:
    """Validate one request.

    Args:
        index: its place in the ``execute``.
        latents: (B, N, 64).
        heights, widths: (B, 1), all rows the same.
        parameters: ``request.parameters()``.
        decoder: checks latents and size.
        max_pixels: the most a request may ask for, its whole batch counted.

    Raises:
        InvalidLatentsError, InvalidOptionError: what is wrong with it, for the client to read.
    """
    asked = read_parameters(parameters)
    batch = latents.shape[0]
    height, width = _same("height", heights), _same("width", widths)
    if batch * max(height, 0) * max(width, 0) > max_pixels:
        raise InvalidLatentsError(
            f"height and width: got {batch} x {height}x{width} (batch x height x width) = {batch * height * width} "
            f"pixels, more than the {max_pixels} this server allows in one request; send fewer rows in a request, or "
            "raise max_pixels in the model's config.pbtxt"
        )
    tensor = torch.from_numpy(latents)
    height, width = decoder.check(tensor, height=height, width=width)
    return Job(index=index, latents=tensor, height=height, width=width, parameters=asked)


def _same(name: str, values: NDArray[np.int32]) -> int:
    different = np.unique(values).tolist()
    if len(different) != 1:
        raise InvalidLatentsError(
            f"{name}: got {different} in one request; the rows of a request share one size: send each size as a "
            "request of its own, the server batches them"
        )
    return int(different[0])


def group(jobs: Iterable[Job], max_pixels: int) -> list[list[Job]]:
    """Put jobs that can be decoded together into groups of at most ``max_pixels`` pixels, in order of arrival.

    Every job is in exactly one group; one that is larger by itself is alone in its group.
    """
    open_groups: dict[object, list[Job]] = {}
    groups: list[list[Job]] = []
    for job in jobs:
        current = open_groups.get(job.key)
        if current is None or sum(member.pixels for member in current) + job.pixels > max_pixels:
            current = open_groups[job.key] = []
            groups.append(current)
        current.append(job)
    return groups


def answer(
    decoder: _Decoder,
    jobs: Iterable[Job],
    deliver: Callable[[Job, torch.Tensor | Exception], None],
    *,
    max_pixels: int,
    cancelled: Callable[[Job], bool],
) -> None:
    """Decode all jobs, group by group, and deliver each exactly once: its pixels, or what went wrong.

    A group that fails is decoded again job by job, so that one job cannot take its neighbours down.

    Args:
        decoder: decodes.
        jobs: valid requests.
        deliver: takes a job with (B, 3, H, W) in about [-1, 1], or with an error. Must not raise.
        max_pixels: the most pixels given to one decode.
        cancelled: whether nobody waits for a job any more; asked before and during its decode.
    """
    for members in group(jobs, max_pixels):
        waiting = []
        for job in members:
            if cancelled(job):
                deliver(job, DecodeCancelled("the request was cancelled before its decode began"))
            else:
                waiting.append(job)
        if waiting:
            _answer_group(decoder, waiting, deliver, cancelled)


def _answer_group(
    decoder: _Decoder,
    jobs: list[Job],
    deliver: Callable[[Job, torch.Tensor | Exception], None],
    cancelled: Callable[[Job], bool],
) -> None:
    outcome = _decode(decoder, jobs, cancelled)
    if isinstance(outcome, torch.Tensor):
        row = 0
        for job in jobs:
            rows = job.latents.shape[0]
            deliver(job, outcome[row : row + rows])
            row += rows
    elif len(jobs) == 1:
        deliver(jobs[0], outcome)
    else:
        del outcome  # its traceback holds what the failed decode had allocated
        for job in jobs:
            _answer_group(decoder, [job], deliver, cancelled)


def _decode(decoder: _Decoder, jobs: list[Job], cancelled: Callable[[Job], bool]) -> torch.Tensor | Exception:
    first = jobs[0]
    try:
        return decoder.decode_raw(
            first.latents if len(jobs) == 1 else torch.cat([job.latents for job in jobs]),
            height=first.height,
            width=first.width,
            scaling_factor=first.parameters.scaling_factor,
            shift_factor=first.parameters.shift_factor,
            cancel=lambda: all(cancelled(job) for job in jobs),
        )
    except Exception as error:  # handed to the caller, which answers and logs it
        return error


def code_of(error: BaseException) -> str:
    """The name of the ``TritonError`` code for ``error``; memory that ran out may be free again on a retry."""
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
    return "UNAVAILABLE" if out_of_memory else status_of(error).triton
