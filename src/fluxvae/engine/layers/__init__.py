"""One file for each kind of layer: what it may do with its maps, what that costs, and how it runs, side by side.

`Layer` is what the planner and the runner know of a layer; neither knows any kind by name. A new kind is a file in
here, its kernel call, and its reading in `fluxvae.engine.network`. Nothing here imports PyTorch, because plans are made
without it; what runs is handed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fluxvae.engine.calls import Costs, Geometry, LayerPlan
from fluxvae.engine.sweep.carving import State

if TYPE_CHECKING:
    from fluxvae.engine.sweep.sweep import Current, Run

__all__ = ["Layer", "Wanted"]


@dataclass(frozen=True)
class Wanted:
    """What the next layer wants of a layer's result, or can do without."""

    statistics: bool
    """It begins with a norm of the whole map, so it wants the statistics."""
    stored: bool
    """It reads the map as a whole, or more than once, and so wants it stored."""


class Layer(Protocol):
    """One layer of a network: a frozen dataclass that is made of `records`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """The name of the module that the layer was read from."""

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        """The height and width of its result, by those of the map it starts from."""

    @property
    def wants_statistics(self) -> bool:
        """Whether it begins with a norm of the whole map, of which the layer before must gather the statistics."""

    @property
    def takes_recomputed(self) -> bool:
        """Whether it can start from a map that is not stored, and is computed on the way."""

    def choices(
        self, geometry: Geometry, costs: Costs, size: tuple[int, int], state: State, *, wanted: Wanted
    ) -> Iterator[tuple[LayerPlan, State]]:
        """What it may do with its maps, and where the current map is afterwards.

        Args:
            size: height and width of the map it starts from.
            state: where that map is.
            wanted: what the layer behind it wants of its result.
        """

    def run(self, run: Run, current: Current, planned: LayerPlan, *, statistics: bool) -> Current:
        """Compute it as planned.

        Args:
            current: the map it starts from, which is its to drop or to overwrite.
            statistics: whether those of the result are wanted.

        Returns:
            The map that the next layer starts from.
        """
