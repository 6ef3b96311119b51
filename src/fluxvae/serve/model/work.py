"""The interface of what a model does with its requests: `decoding` turns latents into pictures, `encoding` the reverse.

Everything else that a model does, from loading to the last answer, is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from fluxvae.decoder import Decoder
from fluxvae.encoder import Encoder
from fluxvae.serve.model.jobs import AnyJob

__all__ = ["Work"]


class Work(Protocol):
    """What one model does with its requests, with one half of a VAE."""

    @property
    def inputs(self) -> Sequence[str]:
        """The names of the tensors that a request may bring."""

    @property
    def max_pixels(self) -> int:
        """The most pixels that one request may have, its whole batch counted, and that are computed together."""

    @property
    def half(self) -> Decoder | Encoder:
        """The half of a VAE that the model has."""

    @property
    def note(self) -> str | None:
        """What goes with every result, such as that it is approximate; None where there is nothing to say."""

    def read(self, index: int, given: Mapping[str, NDArray[Any]], parameters: str, outputs: Set[str]) -> AnyJob:
        """Read and check one request.

        Args:
            index: its place in the ``execute``.
            given: the tensors that it brought, by their names.
            parameters: ``request.parameters()``.
            outputs: ``request.requested_output_names()``.

        Raises:
            FluxVAEError: says what is wrong with the request, for the client to read.
        """

    def compute(self, jobs: Sequence[Any], cancel: Callable[[], bool]) -> torch.Tensor:
        """Decode or encode jobs of one key together.

        Returns:
            A tensor whose rows are the results of all jobs' images, one after the other.
        """

    def make_outputs(self, job: Any, result: torch.Tensor) -> dict[str, Any]:
        """Make the outputs that a job asked for, of its rows of the result: C-contiguous arrays by their names."""

    def sizes(self, job: Any) -> list[int]:
        """Return how many bytes each output of a job will have, as far as that is known before it is computed."""

    def output_bytes(self, job: Any) -> int:
        """Return how many bytes `make_outputs` takes at most, its results included."""

    def held_bytes(self, height: int, width: int) -> int:
        """Return how many bytes are held for one image, as long as its group is computed: pixels, and the result."""

    def tiny(self) -> AnyJob:
        """Return a job as small as one can be whose every output is asked for, to try the model with."""
