"""Every error that fluxvae raises on purpose, with the HTTP status, Triton code and exit status it turns into.

    FluxVAEError
    ├── InvalidLatentsError (ValueError)   the latents, or the size given with them
    ├── InvalidImagesError (ValueError)    pictures that cannot be encoded as they are
    ├── InvalidOptionError (ValueError)    an option: output_type, engine, dtype, format, ...
    ├── CheckpointError                    weights that are missing, damaged, foreign or out of reach
    ├── MemoryLimitError                   the limit is below the smallest that works, or the disk to spill to is full
    ├── NonFiniteOutputError               the result holds NaN or Inf; it never becomes a picture, or latents
    ├── DecodeCancelled                    the caller's cancel() said so
    ├── UnavailableError                   a server, or the machine's memory, cannot take it now: try again later
    ├── DeadlineExceededError (TimeoutError)   a server's answer did not come in time
    ├── ForkedProcessError (RuntimeError)  the process was forked, and PyTorch would wait for ever in it
    └── MissingExtraError (ImportError)    a package that only one of fluxvae's extras brings is not installed

A message names the field, what came, what was expected and what to do.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "CheckpointError",
    "DeadlineExceededError",
    "DecodeCancelled",
    "FluxVAEError",
    "ForkedProcessError",
    "InvalidImagesError",
    "InvalidLatentsError",
    "InvalidOptionError",
    "MemoryLimitError",
    "MissingExtraError",
    "NonFiniteOutputError",
    "Status",
    "UnavailableError",
    "first_line",
    "status_of",
]


class FluxVAEError(Exception):
    """The root of the tree: ``except FluxVAEError`` catches every error that fluxvae raises on purpose."""


class InvalidLatentsError(FluxVAEError, ValueError):
    """The latents, or the height and width that were given with them, cannot be decoded as asked."""


class InvalidImagesError(FluxVAEError, ValueError):
    """Pictures cannot be encoded as they are: their class, mode, dtype, values or size."""


class InvalidOptionError(FluxVAEError, ValueError):
    """An option has a value that is unknown, or that this engine or device cannot honour."""


class CheckpointError(FluxVAEError):
    """The weights are missing, truncated, of another model, or cannot be reached."""


class MemoryLimitError(FluxVAEError):
    """The memory limit is below the smallest that works for this size, or the disk for spilled maps filled up."""


class NonFiniteOutputError(FluxVAEError):
    """The decoded pixels, or the encoded latents, hold NaN or Inf."""


class DecodeCancelled(FluxVAEError):
    """The decode, or the encode, stopped because its caller asked it to."""


class UnavailableError(FluxVAEError):
    """A server, or the memory of its machine, cannot take the request now; the same one may work later."""


class DeadlineExceededError(FluxVAEError, TimeoutError):
    """The answer of a server did not come within the time its caller gave."""


class ForkedProcessError(FluxVAEError, RuntimeError):
    """The process was forked after PyTorch computed with several threads, and would hang with its next operation."""


class MissingExtraError(FluxVAEError, ImportError):
    """A part of fluxvae was used without the packages that its extra brings: ``pip install 'fluxvae[serve]'``."""


class Status(NamedTuple):
    """What one class of error turns into at each of the ways out of the process."""

    http: int
    """The HTTP status, which is also the one that Triton's HTTP endpoint gives for the code in ``triton``."""
    triton: str
    """The name of a ``pb_utils.TritonError`` code. gRPC uses the same name."""
    exit_code: int
    """The exit status of the command line."""


_STATUS: dict[type[Exception], Status] = {
    FluxVAEError: Status(500, "INTERNAL", 1),
    InvalidLatentsError: Status(400, "INVALID_ARG", 2),
    InvalidImagesError: Status(400, "INVALID_ARG", 2),
    InvalidOptionError: Status(400, "INVALID_ARG", 2),
    MemoryLimitError: Status(400, "INVALID_ARG", 3),
    CheckpointError: Status(500, "INTERNAL", 4),
    NonFiniteOutputError: Status(500, "INTERNAL", 5),
    DecodeCancelled: Status(400, "CANCELLED", 130),
    UnavailableError: Status(503, "UNAVAILABLE", 75),
    DeadlineExceededError: Status(504, "CANCELLED", 124),
    ForkedProcessError: Status(500, "INTERNAL", 71),  # EX_OSERR of sysexits.h
    MissingExtraError: Status(500, "INTERNAL", 69),  # EX_UNAVAILABLE
}


def status_of(error: BaseException) -> Status:
    """Return the row of the error table for ``error``: that of its own class, or of the nearest ancestor that has one.

    An error that is not fluxvae's gets the row of internal errors.
    """
    for cls in type(error).__mro__:
        if cls in _STATUS:
            return _STATUS[cls]
    return _STATUS[FluxVAEError]


def first_line(error: BaseException | None) -> str:
    """Return the first line of another library's error, without its full stop, to be quoted in a message of ours.

    It is cut at 200 characters.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
