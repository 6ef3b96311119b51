"""What one request to the Triton model asks for, read and checked before any work.

A request carries latents, one height and one width for each of its B rows, parameters, and for FLUX.2 perhaps position
ids. Latents are packed, (B, N, 64) for FLUX.1 and (B, N, 128) for FLUX.2, or with the parameter ``layout="unpacked"``
latent images whose last two dimensions are flattened, (B, 16, lh * lw): the same input can carry both, and odd lh and
lw exist only unpacked. The first dimension is always the batch here: it has one height and width for each row.
"""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.pictures import check_format

__all__ = ["LAYOUTS", "Job", "Parameters", "read_job", "read_parameters"]

LAYOUTS = ("packed", "unpacked")

# Triton's own (its docs, protocol/extension_parameters.md); some versions hand them on to the model.
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


class _Decoder(Protocol):
    """The part of `fluxvae.Decoder` that reading a request needs."""

    @property
    def format(self) -> LatentFormat: ...

    def check(
        self, latents: torch.Tensor, *, height: int, width: int, latent_ids: torch.Tensor | None, raw: bool | None
    ) -> tuple[int, int]: ...


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """A request's own parameters; None is the default."""

    format: str = "png"
    quality: int | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    batch_norm_eps: float | None = None
    raw: bool | None = None
    layout: str = "packed"
    probe: bool = False
    """Decode zeros in the model's own format, whatever the latents are: for health checks that know no format."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One valid request."""

    index: int
    """Its place among the requests of one ``execute``."""
    latents: torch.Tensor
    """Packed (B, N, 4*C), or unpacked (B, C, lh, lw), or FLUX.2's patches (B, 4*C, gh, gw)."""
    height: int
    """Pixels that will be decoded: already floored to the grid."""
    width: int
    parameters: Parameters
    outputs: Set[str] = frozenset({"images"})
    """The names of the outputs that were asked for."""
    latent_ids: torch.Tensor | None = None
    """(B, N, 4), of FLUX.2's packed latents: where each token belongs; None: row by row."""

    @property
    def key(self) -> tuple[object, ...]:
        """What requests must share to be decoded together.

        The number of patches is not enough: 512x1024 and 1024x512 have the same.
        """
        asked = self.parameters
        with_ids = self.latent_ids is not None  # each row brings its own, or none does
        factors = (asked.scaling_factor, asked.shift_factor, asked.batch_norm_eps, asked.raw)
        return (self.height, self.width, tuple(self.latents.shape[1:]), with_ids, *factors)

    @property
    def rows(self) -> int:
        """Its images."""
        return self.latents.shape[0]

    @property
    def pixels(self) -> int:
        """Pixels of all its images."""
        return self.rows * self.height * self.width


def read_parameters(text: str) -> Parameters:
    """Parse ``request.parameters()``: a JSON object.

    Raises:
        InvalidOptionError: an unknown parameter, or a value of the wrong type or range.
    """
    given: dict[str, Any] = json.loads(text or "{}") or {}
    own = {k: v for k, v in given.items() if k not in _RESERVED and not k.startswith("triton_")}
    if unknown := sorted(own.keys() - Parameters.__dataclass_fields__.keys()):
        raise InvalidOptionError(
            f"parameter {unknown[0]!r}: unknown, expected one of {', '.join(Parameters.__dataclass_fields__)}"
        )
    for name in ("scaling_factor", "shift_factor", "batch_norm_eps"):
        if name in own:
            own[name] = _number(name, own[name])
    for name in ("raw", "probe"):
        if not isinstance(own.get(name, False), bool):
            raise InvalidOptionError(f"{name}: got {own[name]!r}, expected true or false")
    if own.get("scaling_factor") == 0:
        raise InvalidOptionError("scaling_factor: got 0, expected a number other than 0: latents are divided by it")
    parameters = Parameters(**own)
    if parameters.layout not in LAYOUTS:
        raise InvalidOptionError(f"layout: got {parameters.layout!r}, expected one of {', '.join(LAYOUTS)}")
    check_format(parameters.format, parameters.quality)
    return parameters


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise InvalidOptionError(f"{name}: got {value!r}, expected a finite number")
    return float(value)


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
) -> Job:
    """Validate one request.

    Args:
        index: its place in the ``execute``.
        latents: (B, N, 64), or (B, 16, lh * lw) where the parameters say ``"layout": "unpacked"``.
        heights, widths: (B, 1), all rows the same.
        parameters: ``request.parameters()``.
        outputs: ``request.requested_output_names()``.
        decoder: checks latents and size.
        max_pixels: the most a request may ask for, its whole batch counted.

    Raises:
        InvalidLatentsError, InvalidOptionError: what is wrong with it, for the client to read.
    """
    asked = read_parameters(parameters)
    batch = latents.shape[0]
    height, width = _same("height", heights), _same("width", widths)
    if batch * max(height, 0) * max(width, 0) > max_pixels:
        raise InvalidLatentsError(
            f"height and width: got {batch} x {height}x{width} (batch x height x width) = {batch * height * width} "
            f"pixels, more than the {max_pixels} this server allows in one request; send fewer rows in a request, or "
            "raise max_pixels in the model's config.pbtxt"
        )
    form = decoder.format
    tensor = torch.from_numpy(latents)
    ids = None if latent_ids is None else torch.from_numpy(latent_ids)
    if asked.probe:
        tensor = torch.zeros((*latents.shape[:2], form.packed_features), dtype=torch.float32, device="cpu")
    elif asked.layout == "unpacked":
        in_patches = form.flux2 and latents.shape[1] == 4 * form.channels
        tensor = _unflatten(tensor, height, width, form.packed_multiple if in_patches else form.vae_scale_factor)
    height, width = decoder.check(tensor, height=height, width=width, latent_ids=ids, raw=asked.raw)
    read, _ = form.with_batch(tensor, height, width, ids)
    if read.shape != tensor.shape:
        raise InvalidLatentsError(
            f"latents: got shape {tuple(latents.shape)} with layout {asked.layout} and {height}x{width} (height x "
            f"width), which are those of one image {tuple(read.shape)}; expected the batch as the first dimension: "
            f"send it as (1, {read.shape[1]}, {read.shape[2] * read.shape[3]}) with layout unpacked"
        )
    form.check_options(asked.scaling_factor, asked.shift_factor, asked.batch_norm_eps, asked.raw)
    return Job(
        index=index, latents=tensor, height=height, width=width, parameters=asked, outputs=outputs, latent_ids=ids
    )


def _unflatten(latents: torch.Tensor, height: int, width: int, scale: int) -> torch.Tensor:
    """(B, C, rows * columns) to (B, C, rows, columns); nothing is floored: every unpacked size can be said exactly."""
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
