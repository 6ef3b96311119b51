"""What a model does that encodes: it reads pictures, encodes them, and makes latents of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fluxvae.encoder import Encoder
from fluxvae.pixels import Images, check_images
from fluxvae.serve.model.jobs import Job
from fluxvae.serve.model.picture_requests import INPUTS, PictureParameters, read_pictures

__all__ = ["LATENT_OUTPUTS", "Encoding"]

LATENT_OUTPUTS = ("latents", "latents_unpacked", "moments")
"""The names of the outputs, all float32: packed latents (B, gh*gw, 4*C); latents (B, C, lh, lw), or FLUX.2's in patches
(B, 4*C, gh, gw); and the moments of the raw latents, (B, 2*C, lh, lw)."""
_FLOAT32 = 4

_Job = Job[Images, PictureParameters]


class Encoding:
    """The work of a model that encodes: see `fluxvae.serve.model.work.Work`.

    Args:
        encoder: the encoder of the model's checkpoint.
        max_pixels: the most pixels that the pictures of a request may have together.
    """

    inputs = INPUTS
    note = None

    def __init__(self, encoder: Encoder, max_pixels: int) -> None:
        self.half = encoder
        self.max_pixels = max_pixels

    def read(self, index: int, given: Mapping[str, NDArray[Any]], parameters: str, outputs: Set[str]) -> _Job:
        return read_pictures(index, given, parameters, outputs, encoder=self.half, max_pixels=self.max_pixels)

    def compute(self, jobs: Sequence[_Job], cancel: Callable[[], bool]) -> torch.Tensor:
        """Encode jobs to moments, (rows of all jobs, 2*C, lh, lw)."""
        return self.half.encode_images(Images.together([job.request for job in jobs]), cancel=cancel)

    def make_outputs(self, job: _Job, result: torch.Tensor) -> dict[str, Any]:
        """Make the outputs that a job asked for of its moments. All latents of a job are of one draw."""
        made: dict[str, torch.Tensor] = {}
        for name, packed in (("latents", True), ("latents_unpacked", False)):
            if name in job.outputs:
                seed = job.parameters.seed
                sample = None if seed is None else torch.Generator(device="cpu").manual_seed(seed)
                made[name] = self.half.latents_of(result, job.parameters.reading, packed=packed, sample=sample)
        if "moments" in job.outputs:
            made["moments"] = result
        # NumPy has no bfloat16, so floats are always sent as float32.
        return {name: np.ascontiguousarray(values.float().cpu().numpy()) for name, values in made.items()}

    def sizes(self, job: _Job) -> list[int]:
        values = self._values(job.request)
        return [_FLOAT32 * values * (2 if name == "moments" else 1) for name in job.outputs]

    def output_bytes(self, job: _Job) -> int:
        """Return an upper bound: besides the outputs, the draw, and the steps from raw latents to packed ones."""
        steps = 4 * self._values(job.request) * self.half.dtype.itemsize
        return sum(self.sizes(job)) + steps

    def held_bytes(self, height: int, width: int) -> int:
        """Return the bytes of the pixels and of the moments."""
        scale, channels = self.half.format.vae_scale_factor, self.half.format.channels
        moments = 2 * channels * (height // scale) * (width // scale)
        return (self.half.picture_channels * height * width + moments) * self.half.dtype.itemsize

    def tiny(self) -> _Job:
        size = 2 * self.half.format.packed_multiple
        channels = self.half.picture_channels
        grey = np.full((1, size, size, channels), 128, np.uint8)
        images = check_images(grey, self.half.format.packed_multiple, channels)
        return Job(index=0, request=images, parameters=PictureParameters(), outputs=frozenset(LATENT_OUTPUTS))

    def _values(self, images: Images) -> int:
        """How many values the latents of these images have."""
        format = self.half.format
        return images.batch * format.channels * math.prod(n // format.vae_scale_factor for n in _size(images))


def _size(images: Images) -> tuple[int, int]:
    return images.height, images.width
