"""What a caller says about how latents are to be read: one immutable value, which every door makes and hands on whole.

It does without PyTorch, so that the gateway and the client, which do without it too, use the value that the library
uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from fluxvae.errors import InvalidOptionError
from fluxvae.latents.packing import FEATURE_ORDERS

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["FACTORS", "FEATURE_ORDERS", "UNSAID", "Reading", "check_feature_order", "finite_number", "is_finite_number"]

FACTORS = ("scaling_factor", "shift_factor", "batch_norm_eps")
"""The numbers of a `Reading` by which latents are rescaled."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is said about latents besides their values. None means that nothing was said.

    Making one checks nothing, because what may be said depends on the checkpoint and the shape of the latents.
    `checks.check_options` and `checks.check_shape` check it, and a `request.LatentRequest` has passed both.
    """

    height: int | None = None
    """The height of the image in pixels."""
    width: int | None = None
    latent_ids: torch.Tensor | NDArray[Any] | None = None
    """(B, N, 4) or, for one image without its batch, (N, 4): where each token of FLUX.2's packed latents belongs. Only
    the client takes an array."""
    scaling_factor: float | None = None
    """What latents are divided by, instead of the checkpoint's own factor."""
    shift_factor: float | None = None
    """What is added after that, instead of the checkpoint's own shift."""
    batch_norm_eps: float | None = None
    """What is added to FLUX.2's variances, instead of the checkpoint's own eps."""
    raw: bool | None = None
    """Whether the latents are raw already, so that nothing is to be rescaled."""
    feature_order: str | None = None
    """One of `FEATURE_ORDERS`: in which order FLUX.2's class has the features of a patch, and with them its statistics.
    None is the first."""

    def over(self, other: Reading) -> Reading:
        """Return this reading, with what it leaves unsaid as ``other`` says it."""
        said = {name: value for name in self.__dataclass_fields__ if (value := getattr(self, name)) is not None}
        return replace(other, **said)

    @property
    def rescaling(self) -> tuple[object, ...]:
        """All that is said about the step from latents to raw latents, to compare: what `parameters` returns."""
        return (self.scaling_factor, self.shift_factor, self.batch_norm_eps, self.raw, self.feature_order)

    def parameters(self) -> dict[str, Any]:
        """Return what is said about rescaling as the parameters of a request to the Triton model.

        Sizes and ids are not among them: they travel as tensors.
        """
        factors = {name: float(value) for name in FACTORS if (value := getattr(self, name)) is not None}
        others = {"raw": self.raw, "feature_order": self.feature_order}
        return {**factors, **{name: value for name, value in others.items() if value is not None}}


UNSAID = Reading()
"""The reading of latents about which nothing is said: they are the checkpoint's own in every respect."""


def check_feature_order(value: object) -> None:
    """Raise `InvalidOptionError` unless ``value`` is None or one of `FEATURE_ORDERS`."""
    if value is not None and (not isinstance(value, str) or value not in FEATURE_ORDERS):
        raise InvalidOptionError(
            f"feature_order: got {value!r}, expected {' or '.join(map(repr, FEATURE_ORDERS))}, or nothing, which is "
            "the first"
        )


def is_finite_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is an int or a float that is finite. A bool is not a number here."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that is too large for a float
        return False


def finite_number(name: str, value: object) -> float:
    """Return ``value`` as a float.

    Raises:
        InvalidOptionError: it is not a finite number. ``name`` says of which option.
    """
    if not is_finite_number(value):
        raise InvalidOptionError(f"{name}: got {value!r}, expected a finite number")
    return float(value)
