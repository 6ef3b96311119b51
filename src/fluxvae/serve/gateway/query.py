"""Reads the query strings of both protocols by tables of parameters, which also make the OpenAPI document.

`fluxvae.serve.gateway.remote_decode` and `fluxvae.serve.gateway.remote_encode` have the tables, and say what the values
mean together. Nothing here knows HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fluxvae.errors import InvalidOptionError
from fluxvae.latents.reading import Reading
from fluxvae.serve.families import has_factors, read_raw

__all__ = ["FLAG", "NUMBER", "WHOLE", "Limits", "Parameter", "Query", "whole"]

_LARGEST_SCALING = 1e6  # beyond it, or below its inverse, nothing is left of the latents in float32
_DIGITS = 12

FLAG: dict[str, Any] = {"enum": ["True", "False"], "default": "False"}
NUMBER: dict[str, Any] = {"type": "number"}
WHOLE: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 10**_DIGITS - 1}


class Parameter(NamedTuple):
    """One parameter of a query string, as the parser's messages and OpenAPI need it."""

    schema: dict[str, Any]
    description: str
    required: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_request_bytes: int
    """The most bytes of latents."""
    max_picture_bytes: int
    """The most bytes of pictures that are to be encoded."""
    max_pixels: int
    """The most pixels that all images of a request may have together."""


@dataclass(frozen=True)
class Query:
    """The parameters of one query string, all of them known and none given twice. `read` makes one."""

    table: Mapping[str, Parameter]
    """The parameters that there are."""
    given: dict[str, str] = field(default_factory=dict)
    """Those that were given."""
    shape: list[str] = field(default_factory=list)
    """The values of ``shape``, which alone may be repeated."""

    @classmethod
    def read(cls, pairs: Iterable[tuple[str, str]], table: Mapping[str, Parameter]) -> Query:
        """Sort the names and values of a query string, which are decoded and in their order.

        Raises:
            InvalidOptionError: a parameter is unknown, or is there twice.
        """
        query = cls(table)
        for name, value in pairs:
            if name not in table:
                raise InvalidOptionError(
                    f"parameter {name[:80]!r}: unknown, expected one of {', '.join(table)}, in the query string"
                )
            if name == "shape":
                query.shape.append(value)
            elif name in query.given:
                raise InvalidOptionError(f"{name}: got it twice; only shape is repeated")
            else:
                query.given[name] = value
        return query

    def __contains__(self, name: str) -> bool:
        return name in self.given

    def __getitem__(self, name: str) -> str:
        return self.given[name]

    def choice(self, name: str, also: Iterable[str] = ()) -> str:
        """Return one of the values that the table has for this parameter, or of ``also``; else the table's default.

        Raises:
            InvalidOptionError: it is another value, or is missing and has no default.
        """
        parameter = self.table[name]
        choices: list[str] = parameter.schema["enum"]
        if name not in self.given:
            if "default" not in parameter.schema:
                raise InvalidOptionError(f"{name}: missing, expected one of {', '.join(choices)}")
            return str(parameter.schema["default"])
        if self.given[name] not in choices and self.given[name] not in also:
            raise InvalidOptionError(f"{name}: got {self.given[name][:80]!r}, expected one of {', '.join(choices)}")
        return self.given[name]

    def flag(self, name: str) -> bool:
        """Return whether this parameter is true.

        Raises:
            InvalidOptionError: it has none of the values that the table has for it.
        """
        return self.choice(name).lower() == "true"

    def number(self, name: str) -> float | None:
        """Return a number that comes as text, which is not all that Python's float() takes; None where it is left out.

        Raises:
            InvalidOptionError: it is not a finite number.
        """
        if name not in self.given:
            return None
        text = self.given[name]
        try:
            value = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InvalidOptionError(f"{name}: got {text[:80]!r}, expected a finite number")
        return value

    def rescaling(self, vae_class: str, done: str) -> Reading:
        """Return what the query says about rescaling, in the model's terms.

        The client leaves out what is not to be applied, and says ``do_scaling=True`` where the server's own is wanted.

        Args:
            vae_class: the class of the VAE that the model serves.
            done: what is done with the latents and the scaling factor, for messages.

        Raises:
            InvalidOptionError: a value is wrong, two contradict each other, or the model has no such factors.
        """
        if not has_factors(vae_class):
            self.flag("do_scaling")  # only to refuse a wrong value
            return Reading(raw=read_raw(self.given, vae_class))
        scaling, shift = self.number("scaling_factor"), self.number("shift_factor")
        if scaling is not None and not 1 / _LARGEST_SCALING <= abs(scaling) <= _LARGEST_SCALING:
            raise InvalidOptionError(
                f"scaling_factor: got {scaling:g}, expected a magnitude from {1 / _LARGEST_SCALING:g} to "
                f"{_LARGEST_SCALING:g}: latents are {done} by it (FLUX.1: 0.3611)"
            )
        if self.flag("do_scaling"):
            return Reading(scaling_factor=scaling, shift_factor=shift)
        if "do_scaling" in self and (scaling is not None or shift is not None):
            raise InvalidOptionError(
                "do_scaling: got False together with scaling_factor or shift_factor, which contradict it; send one or "
                "the other"
            )
        return Reading(scaling_factor=1.0 if scaling is None else scaling, shift_factor=0.0 if shift is None else shift)


def whole(name: str, text: str, error: type[Exception]) -> int:
    """Return a whole number from 1 that comes as text; raise ``error`` where it is none."""
    if not (text.isascii() and text.isdecimal()) or len(text) > _DIGITS or int(text) == 0:
        raise error(f"{name}: got {text[:80]!r}, expected a whole number from 1, in digits")
    return int(text)
