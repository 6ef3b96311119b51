"""What one request to a model that decodes asks for, read and checked before any work.

A request carries latents, one height and one width for each of its B rows, parameters, and for FLUX.2 perhaps position
ids. Its latents are packed, (B, N, 64) for FLUX.1 and (B, N, 128) for FLUX.2. With the parameter ``layout="unpacked"``
they are latent images whose last two dimensions are flattened, (B, 16, lh * lw). So one input can carry both, and only
unpacked ones can have odd lh and lw. The first dimension is always the batch here: each of its rows has a height and a
width.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.reading import FACTORS, UNSAID, Reading, check_feature_order
from fluxvae.latents.request import LatentRequest
from fluxvae.pictures import check_format
from fluxvae.serve.families import refuse_layers
from fluxvae.serve.model.jobs import Job, read_factors, read_own, within_pixels

__all__ = ["LAYOUTS", "Parameters", "read_job", "read_parameters"]

LAYOUTS = ("packed", "unpacked")

_NAMES = ("format", "quality", *FACTORS, "raw", "feature_order", "layout", "probe")
"""The parameters that a request to the model may have."""


class _Decoder(Protocol):
    """The part of `fluxvae.Decoder` that reading a request needs."""

    @property
    def format(self) -> LatentFormat: ...

    picture_channels: int

    def request(self, latents: object, reading: Reading) -> LatentRequest: ...


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The parameters of a request, with the model's defaults for those that it leaves out."""

    format: str = "png"
    quality: int | None = None
    reading: Reading = UNSAID
    """What the parameters say about the latents. The height and the width are not among them: they are tensors."""
    layout: str = "packed"
    probe: bool = False
    """Whether zeros in the model's own format are to be decoded, whatever the latents are. Health checks ask for it,
    because they do not know the format."""


def read_parameters(text: str) -> Parameters:
    """Parse ``request.parameters()``: a JSON object.

    Raises:
        InvalidOptionError: a parameter is unknown, or its value has the wrong type or is out of range.
    """
    own = read_own(text, _NAMES, ("raw", "probe"))
    check_feature_order(order := own.pop("feature_order", None))
    reading = Reading(**read_factors(own, "latents are divided by it"), feature_order=order)
    parameters = Parameters(reading=reading, **own)
    if parameters.layout not in LAYOUTS:
        raise InvalidOptionError(f"layout: got {parameters.layout!r}, expected one of {', '.join(LAYOUTS)}")
    check_format(parameters.format, parameters.quality)
    return parameters


def read_job(
    index: int,
    latents: NDArray[np.float32],
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    parameters: str,
    outputs: Set[str] = frozenset({"images"}),
    *,
    latent_ids: NDArray[np.int64] | None = None,
    decoder: _Decoder,
    max_pixels: int,
) -> Job[LatentRequest, Parameters]:
    """Read and check one request.

    Args:
        index: its place in the ``execute``.
        latents: (B, N, 64), or (B, 16, lh * lw) where the parameters say ``"layout": "unpacked"``.
        heights, widths: (B, 1), the same in all rows.
        parameters: ``request.parameters()``.
        outputs: ``request.requested_output_names()``.
        latent_ids: (B, N, 4), for FLUX.2's packed latents that do not come row by row.
        decoder: checks the latents and what is said about them, and knows whether its pictures have alpha.
        max_pixels: the most pixels that a request may ask for, its whole batch counted.

    Raises:
        InvalidLatentsError, InvalidOptionError: say what is wrong with the request, for the client to read.
    """
    asked = read_parameters(parameters)
    check_format(asked.format, asked.quality, channels=decoder.picture_channels)
    batch = latents.shape[0]
    height, width = _same("height", heights), _same("width", widths)
    if (problem := within_pixels(batch, height, width, max_pixels)) is not None:
        raise InvalidLatentsError(f"height and width: {problem}")
    form = decoder.format
    tensor = torch.from_numpy(latents)
    ids = None if latent_ids is None else torch.from_numpy(latent_ids)
    if asked.probe:
        tensor = torch.zeros((*latents.shape[:2], form.packed_features), dtype=torch.float32, device="cpu")
    elif asked.layout == "unpacked":
        in_patches = form.flux2 and latents.shape[1] == 4 * form.channels
        tensor = _unflatten(tensor, height, width, form.packed_multiple if in_patches else form.vae_scale_factor)
    request = decoder.request(tensor, replace(asked.reading, height=height, width=width, latent_ids=ids))
    read = request.latents.shape
    if len(read) == 3:
        refuse_layers(tuple(tensor.shape), read[0] // batch)
    if read != tensor.shape:
        raise InvalidLatentsError(
            f"latents: got shape {tuple(latents.shape)} with layout {asked.layout} and "
            f"{request.height}x{request.width} (height x width), which are those of one image {tuple(read)}; expected "
            "the batch as the first dimension: "
            f"send it as (1, {read[1]}, {read[2] * read[3]}) with layout unpacked"
        )
    return Job(index=index, request=request, parameters=asked, outputs=outputs)


def _unflatten(latents: torch.Tensor, height: int, width: int, scale: int) -> torch.Tensor:
    """Turn (B, C, rows * columns) into (B, C, rows, columns). Sizes are not floored, as each can be said exactly."""
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % scale:
            raise InvalidLatentsError(
                f"{name}: got {value} with layout unpacked, expected a positive multiple of {scale}: {scale} pixels "
                "for each row and column of the latents"
            )
    values = latents.shape[2]
    lh, lw = height // scale, width // scale
    if values != lh * lw:
        raise InvalidLatentsError(
            f"latents: got {values} values per channel, shape {tuple(latents.shape)}, with layout unpacked; expected "
            f"{lh} x {lw} = {lh * lw} for {height}x{width} (height x width): flatten the last two dimensions of "
            f"(batch, channels, height/{scale}, width/{scale})"
        )
    return latents.reshape(*latents.shape[:2], lh, lw)


def _same(name: str, values: NDArray[np.int32]) -> int:
    different = np.unique(values).tolist()
    if len(different) != 1:
        raise InvalidLatentsError(
            f"{name}: got {different} in one request; the rows of a request share one size: send each size as a "
            "request of its own, the server batches them"
        )
    return int(different[0])
