"""What a client and our Triton models say to each other, whatever carries it and whichever way: requests and errors.

`decoding` and `encoding` make requests, `transports` sends them. PyTorch is imported only where there are tensors: a
client of NumPy arrays and pictures starts in a fraction of a second and stays small.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluxvae.errors import (
    DeadlineExceededError,
    DecodeCancelled,
    FluxVAEError,
    InvalidOptionError,
    MemoryLimitError,
    NonFiniteOutputError,
    UnavailableError,
)
from fluxvae.latents.reading import FACTORS, Reading, check_feature_order, finite_number
from fluxvae.serve.models import MODELS
from fluxvae.serve.triton_words import passing_trouble

if TYPE_CHECKING:
    import torch

__all__ = [
    "SCALE",
    "Request",
    "Unsent",
    "as_float32",
    "envelope",
    "error_of",
    "refused_before_work",
    "rescaling",
]

SCALE = 8
"""How many pixels there are for each latent, in each direction, with every VAE that our models serve."""
_OPTIONS = frozenset(
    {
        "background",
        "batch_norm_eps",
        "feature_order",
        "format",
        "layout",
        "metadata",
        "output_type",
        "parameter",
        "probe",
        "quality",
        "raw",
        "resize",
        "sample",
        "scaling_factor",
        "seed",
        "shift_factor",
    }
)
"""Words with which errors about options begin."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One request to a model as it is sent, and how its answer is read."""

    model: str
    """The model's name."""
    inputs: dict[str, NDArray[Any]]
    """The tensors that are sent, by name, in C order."""
    output: str
    """The name of the model's output that is asked for."""
    answer_dtype: np.dtype[Any]
    """The dtype of that output."""
    answer_bytes: int
    """How many bytes the output takes at most."""
    read: Callable[[NDArray[Any]], Any]
    """Makes of the output what the caller gets, who owns it: the array may be a view of memory that is used again."""
    refusal: type[FluxVAEError]
    """The class of the errors about what is sent: `InvalidLatentsError` or `InvalidImagesError`."""
    parameters: dict[str, Any]
    priority: int
    """0 stands for the model's default."""
    id: str
    """Names the request in the server's log."""


class Unsent(UnavailableError):
    """No connection came about, so the request was not sent and is safe to repeat."""


def envelope(priority: object, request_id: str | None) -> dict[str, Any]:
    """Return what a caller says about a request as a whole, as arguments of `Request`.

    Raises:
        InvalidOptionError: the priority is neither None, which is the model's default, nor a whole number from 1.
    """
    if priority is not None and (isinstance(priority, bool) or not isinstance(priority, int) or priority < 1):
        raise InvalidOptionError(f"priority: got {priority!r}, expected a whole number from 1, the first to be served")
    return {"priority": priority or 0, "id": request_id or uuid.uuid4().hex}


def rescaling(reading: Reading) -> dict[str, Any]:
    """Return what is said about rescaling as a request's parameters.

    Raises:
        InvalidOptionError: a factor is no finite number, or the feature order is unknown. Whether they fit the
            checkpoint, the server checks.
    """
    check_feature_order(reading.feature_order)
    for name in FACTORS:
        if (value := getattr(reading, name)) is not None:
            finite_number(name, value)
    return reading.parameters()


def as_float32(values: torch.Tensor | NDArray[Any]) -> NDArray[np.float32]:
    """Return a tensor or an array as a float32 array in C order, which is a copy only where it has to be."""
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values, np.float32)
    array: NDArray[np.float32] = values.detach().to("cpu").float().contiguous().numpy()
    return array


_FULL = "Exceeds maximum queue size"
_LATE = "Request timeout expired"


def refused_before_work(error: BaseException) -> bool:
    """Return whether a request can be repeated without anything being done twice.

    That is so where it was not sent, and where the server's queue was full.
    """
    return isinstance(error, Unsent) or (isinstance(error, UnavailableError) and _FULL in str(error))


def _in_words(seconds: float) -> str:
    """A timeout as the caller knows it, from what was left of it when the request was ready: milliseconds less."""
    return f"{math.ceil(100 * seconds) / 100:g}"


def error_of(status: str, message: str, request: Request, *, timeout_s: float) -> FluxVAEError:
    """Return the error that the library would have raised, or the one that is nearest to it.

    Args:
        status: gRPC's name of what happened, such as ``"INVALID_ARGUMENT"``.
        message: the words of the server or of gRPC.
    """
    where = f"(request {request.id})"
    if status == "INVALID_ARGUMENT":
        field_name = re.match(r"[\w ]+?(?=:| ')", message)
        name = field_name[0] if field_name else ""
        if name == "memory_limit":
            return MemoryLimitError(message)
        return InvalidOptionError(message) if name in _OPTIONS else request.refusal(message)
    if status == "DEADLINE_EXCEEDED" or (status == "UNAVAILABLE" and _LATE in message):
        return DeadlineExceededError(
            f"timeout_s: no answer within {_in_words(timeout_s)} s {where}, so it is no longer waited for; allow more, "
            "or send less"
        )
    if status == "CANCELLED":
        return DecodeCancelled(f"{message} {where}")
    if status == "UNAVAILABLE":
        if "failed to connect" in message:
            return Unsent(f"no connection to the server: {message} {where}; is it running, and at this address?")
        return UnavailableError(f"the server cannot take it now: {message} {where}; try again later")
    if status == "INTERNAL" and (trouble := passing_trouble(message)):
        return UnavailableError(f"{trouble}: {message} {where}; try again later")
    if status == "NOT_FOUND":
        start = f"; fluxvae serve --model {request.model}=CHECKPOINT serves it" if request.model in MODELS else ""
        return InvalidOptionError(f"model: got {request.model!r}, which this server does not have: {message}{start}")
    if "NaN or Inf" in message or "out of range" in message:
        return NonFiniteOutputError(message)
    return FluxVAEError(f"the server failed with {status}: {message} {where}")
