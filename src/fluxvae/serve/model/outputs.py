"""Makes the outputs of a model that decodes from an image, and says how much memory that takes."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import torch

from fluxvae.latents.request import LatentRequest
from fluxvae.pictures import OutputType, encode, postprocess, postprocess_bytes
from fluxvae.serve.model.jobs import Job
from fluxvae.serve.model.requests import Parameters

__all__ = ["BYTES_PER_VALUE", "OUTPUTS", "make_outputs", "output_bytes"]

OUTPUTS = ("images", "images_np", "images_pt", "images_encoded", "images_raw")
"""The names of the outputs: uint8 pixels (B, H, W, C); float32 in [0, 1] as (B, H, W, C) and as (B, C, H, W); encoded
files (B, 1); and float32 (B, C, H, W) as the VAE gives it, nominally in [-1, 1]. C is 3 for RGB and 4 for RGBA."""
BYTES_PER_VALUE = {"images": 1, "images_np": 4, "images_pt": 4, "images_raw": 4}
"""How many bytes a value has of those outputs whose size is known before they are made: all but encoded files."""
_TYPES: dict[str, OutputType] = {"images": "uint8", "images_np": "np", "images_pt": "pt"}


def make_outputs(
    job: Job[LatentRequest, Parameters], image: torch.Tensor, *, comment: str | None = None
) -> dict[str, Any]:
    """Make the outputs that a job asked for.

    Args:
        job: the job.
        image: its images (B, C, H, W), about [-1, 1], on any device.
        comment: a text for the metadata of encoded files, such as that the picture is approximate.

    Returns:
        C-contiguous arrays by the outputs' names.
    """
    names = job.outputs
    arrays: dict[str, Any] = {}
    if names & {"images", "images_encoded"}:
        pixels = postprocess(image, "uint8")
        if "images" in names:
            arrays["images"] = pixels
        if "images_encoded" in names:
            asked = job.parameters
            metadata = {"Comment": comment} if comment else None
            files = [[encode(one, asked.format, asked.quality, metadata)] for one in pixels]
            arrays["images_encoded"] = np.array(files, dtype=np.object_)
    if "images_np" in names:
        arrays["images_np"] = postprocess(image, "np")
    # NumPy has no bfloat16, so floats are always sent as float32.
    if "images_pt" in names:
        arrays["images_pt"] = postprocess(image, "pt").float().cpu().numpy()
    if "images_raw" in names:
        arrays["images_raw"] = image.float().cpu().numpy()
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def output_bytes(names: Set[str], batch: int, height: int, width: int, itemsize: int, channels: int) -> int:
    """Return how many bytes `make_outputs` takes at most at its peak, besides the image that it is given.

    Its results are counted. It is an upper bound, because the temporary bands of all outputs are counted as if they
    were in memory at the same time. On CUDA most of these bytes are in host memory, to which the memory limit does not
    apply; counting them errs on the safe side.

    Args:
        names: the outputs that are made.
        batch, height, width: how many images there are, and their size in pixels.
        itemsize: how many bytes a value of the VAE's dtype has.
        channels: those of the images, 3 or 4.
    """
    values = batch * channels * height * width
    needed = sum(
        postprocess_bytes(kind, batch, height, width, itemsize, channels)
        for name, kind in _TYPES.items()
        if name in names
    )
    if "images_encoded" in names:
        if "images" not in names:
            needed += postprocess_bytes("uint8", batch, height, width, itemsize, channels)
        # A file of noise is a little larger than its pixels. Pillow holds one picture, its file and a copy of the file.
        needed += values + values // 8 + channels * 4 * height * width
    if itemsize != 4:
        needed += 4 * values * len(names & {"images_pt", "images_raw"})
    return needed
