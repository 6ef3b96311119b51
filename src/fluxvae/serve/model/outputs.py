"""The model's outputs: what each is, what it takes in memory, and the arrays for those that were asked for."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import torch

from fluxvae.pictures import OutputType, encode, postprocess, postprocess_bytes
from fluxvae.serve.model.requests import Job

__all__ = ["OUTPUTS", "make_outputs", "output_bytes"]

OUTPUTS = ("images", "images_np", "images_pt", "images_encoded", "images_raw")
_TYPES: dict[str, OutputType] = {"images": "uint8", "images_np": "np", "images_pt": "pt"}


def make_outputs(job: Job, image: torch.Tensor, *, comment: str | None = None) -> dict[str, Any]:
    """The arrays that ``job`` asked for, C-contiguous, by the output's name.

    Args:
        job: whose image it is.
        image: (B, 3, H, W), about [-1, 1], on any device.
        comment: for the metadata of encoded files: that the picture is approximate.
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
    # Triton's NumPy has no bfloat16.
    if "images_pt" in names:
        arrays["images_pt"] = postprocess(image, "pt").float().cpu().numpy()
    if "images_raw" in names:
        arrays["images_raw"] = image.float().cpu().numpy()
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def output_bytes(names: Set[str], batch: int, height: int, width: int, itemsize: int) -> int:
    """What `make_outputs` adds to memory at its peak, its results included; ``itemsize`` is that of the VAE's dtype.

    A bound, not exact: the bands of each output are counted as if they lived together. On CUDA most of it is in host
    memory, which the limit does not speak of; counting it errs on the safe side.
    """
    values = batch * 3 * height * width
    needed = sum(
        postprocess_bytes(kind, batch, height, width, itemsize) for name, kind in _TYPES.items() if name in names
    )
    if "images_encoded" in names:
        if "images" not in names:
            needed += postprocess_bytes("uint8", batch, height, width, itemsize)
        # Files of noise are a little larger than its pixels; Pillow holds one picture, its file and a copy of it.
        needed += values + values // 8 + 3 * 4 * height * width
    if itemsize != 4:
        needed += 4 * values * len(names & {"images_pt", "images_raw"})
    return needed
