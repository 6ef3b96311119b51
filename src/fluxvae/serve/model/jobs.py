"""What requests have in common, whether they decode or encode: one job each, and how their parameters are read."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from fluxvae.errors import InvalidOptionError
from fluxvae.latents.reading import FACTORS, finite_number

__all__ = ["AnyJob", "Job", "Parameters", "Payload", "read_factors", "read_own", "within_pixels"]

# These are Triton's own (its docs, protocol/extension_parameters.md). Some versions hand them on to the model.
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


class Payload(Protocol):
    """What is decoded or encoded: a `fluxvae.latents.request.LatentRequest` or `fluxvae.pixels.Images`."""

    @property
    def key(self) -> tuple[object, ...]:
        """What jobs must have in common to be computed together."""

    @property
    def height(self) -> int:
        """The height of the images in pixels."""

    @property
    def width(self) -> int:
        """The width of the images in pixels."""

    @property
    def batch(self) -> int:
        """The number of images."""

    @property
    def pixels(self) -> int:
        """The pixels of all images together."""


class Parameters(Protocol):
    """The parameters of a request."""

    @property
    def probe(self) -> bool:
        """Whether a health check asks, so that an earlier result may answer it."""


P = TypeVar("P", bound=Payload, covariant=True)
Q = TypeVar("Q", bound=Parameters, covariant=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Job(Generic[P, Q]):
    """One valid request."""

    index: int
    """Its place among the requests of one ``execute``."""
    request: P
    """What is to be decoded or encoded, checked."""
    parameters: Q
    outputs: Set[str]
    """The names of the outputs that were asked for."""


AnyJob = Job[Payload, Parameters]


def read_own(text: str, names: Sequence[str], flags: Sequence[str]) -> dict[str, Any]:
    """Parse ``request.parameters()``, a JSON object, and return the model's own parameters.

    Args:
        names: the parameters that a request may have.
        flags: those that are true or false.

    Raises:
        InvalidOptionError: a parameter is unknown, or a flag is not true or false.
    """
    given: dict[str, Any] = json.loads(text or "{}") or {}
    own = {k: v for k, v in given.items() if k not in _RESERVED and not k.startswith("triton_")}
    if unknown := sorted(own.keys() - set(names)):
        raise InvalidOptionError(f"parameter {unknown[0]!r}: unknown, expected one of {', '.join(names)}")
    for name in flags:
        if not isinstance(own.get(name, False), bool):
            raise InvalidOptionError(f"{name}: got {own[name]!r}, expected true or false")
    return own


def read_factors(own: dict[str, Any], why_not_0: str) -> dict[str, Any]:
    """Take what is said about rescaling out of the parameters: the factors and ``raw``, as a `Reading` has them.

    Args:
        own: the parameters, from which they are removed.
        why_not_0: why the scaling factor cannot be 0, for the message.

    Raises:
        InvalidOptionError: a factor is no finite number, or the scaling factor is 0.
    """
    said: dict[str, Any] = {name: finite_number(name, own.pop(name)) for name in FACTORS if name in own}
    if said.get("scaling_factor") == 0:
        raise InvalidOptionError(f"scaling_factor: got 0, expected a number other than 0: {why_not_0}")
    return {**said, "raw": own.pop("raw", None)}


def within_pixels(batch: int, height: int, width: int, max_pixels: int) -> str | None:
    """Return in words why a request has more pixels than the model takes; None where it has not."""
    pixels = batch * max(height, 0) * max(width, 0)
    if pixels <= max_pixels:
        return None
    return (
        f"got {batch} x {height}x{width} (batch x height x width) = {pixels} pixels, more than the {max_pixels} this "
        "server allows in one request; send fewer rows in a request, or raise max_pixels in the model's config.pbtxt"
    )
