"""What a model does that decodes: it reads latents, decodes them, and makes pictures of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from numpy.typing import NDArray

from fluxvae.decoder import Decoder
from fluxvae.latents.format import PREVIEW_NOTE
from fluxvae.latents.reading import Reading
from fluxvae.latents.request import LatentRequest
from fluxvae.serve.model.jobs import Job
from fluxvae.serve.model.outputs import BYTES_PER_VALUE, OUTPUTS, make_outputs, output_bytes
from fluxvae.serve.model.requests import Parameters, read_job

__all__ = ["Decoding"]

_Job = Job[LatentRequest, Parameters]


class Decoding:
    """The work of a model that decodes: see `fluxvae.serve.model.work.Work`.

    Args:
        decoder: the decoder of the model's checkpoint.
        max_pixels: the most pixels that a request may ask for, its whole batch counted.
    """

    inputs = ("latents", "height", "width", "latent_ids")

    def __init__(self, decoder: Decoder, max_pixels: int) -> None:
        self.half = decoder
        self.note = PREVIEW_NOTE if decoder.approximate else None
        self.max_pixels = max_pixels

    def read(self, index: int, given: Mapping[str, NDArray[Any]], parameters: str, outputs: Set[str]) -> _Job:
        return read_job(
            index,
            given["latents"],
            given["height"],
            given["width"],
            parameters,
            outputs,
            latent_ids=given.get("latent_ids"),
            decoder=self.half,
            max_pixels=self.max_pixels,
        )

    def compute(self, jobs: Sequence[_Job], cancel: Callable[[], bool]) -> torch.Tensor:
        """Decode jobs to images, (rows of all jobs, 3 or 4, H, W), in about [-1, 1]."""
        return self.half.decode_request(LatentRequest.together([job.request for job in jobs]), cancel=cancel)

    def make_outputs(self, job: _Job, result: torch.Tensor) -> dict[str, Any]:
        return make_outputs(job, result, comment=self.note)

    def sizes(self, job: _Job) -> list[int]:
        """Return the bytes of each output but the encoded files, whose size is known only once they are made."""
        values = self.half.picture_channels * job.request.pixels
        return [BYTES_PER_VALUE[name] * values for name in job.outputs if name in BYTES_PER_VALUE]

    def output_bytes(self, job: _Job) -> int:
        request, half = job.request, self.half
        size = (request.batch, request.height, request.width)
        return output_bytes(job.outputs, *size, half.dtype.itemsize, half.picture_channels)

    def held_bytes(self, height: int, width: int) -> int:
        return self.half.picture_channels * height * width * self.half.dtype.itemsize

    def tiny(self) -> _Job:
        tokens = 4  # 2x2 tokens make the smallest image in which each has a neighbour in both directions
        latents = torch.zeros(1, tokens, self.half.format.packed_features, dtype=torch.float32, device="cpu")
        size = 2 * self.half.format.packed_multiple
        request = self.half.request(latents, Reading(height=size, width=size))
        return Job(index=0, request=request, parameters=Parameters(), outputs=frozenset(OUTPUTS))
