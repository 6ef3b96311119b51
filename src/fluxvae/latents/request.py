"""`LatentRequest`: latents together with everything that says how they are to be read, checked against a checkpoint.

Every door that holds tensors (the library, the Triton model, files, Ray's actors) makes one and hands it on whole to
`Decoder.decode_request`. Everything that a caller can get wrong is refused while it is made, before any other work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fluxvae.errors import InvalidLatentsError
from fluxvae.latents.checks import check_options, check_shape
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.layout import in_shape
from fluxvae.latents.packing import sort_tokens, unpack_rows
from fluxvae.latents.reading import Reading
from fluxvae.latents.values import check_finite, plain_latents

__all__ = ["LatentRequest"]


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentRequest:
    """Latents that can be decoded. `read` makes one of what a caller gave."""

    format: LatentFormat
    """The format of the checkpoint that they were checked against."""
    latents: torch.Tensor
    """With their batch and without frames: packed (B, N, 4*C), unpacked (B, C, lh, lw), or in FLUX.2's patches
    (B, 4*C, gh, gw)."""
    reading: Reading
    """What was said about them, without the ids, which became `places`."""
    height: int
    """The height of the image in pixels; that of packed latents is already floored to the grid."""
    width: int
    places: torch.Tensor | None
    """(B, N) int64: where each token of packed latents belongs, row by row. None: the tokens are in that order."""

    @classmethod
    def read(cls, format: LatentFormat, latents: object, reading: Reading) -> LatentRequest:
        """Check latents and what is said about them.

        Args:
            format: the checkpoint's.
            latents: a tensor as for `Decoder.decode`. On the ``meta`` device there are no values to look at, and the
                rest is checked.
            reading: as for `checks.check_options` and `checks.check_shape`.

        Raises:
            InvalidLatentsError: the class, rank, features, number of patches, size, ids, dtype or a value is wrong.
            InvalidOptionError: something is said about rescaling that this checkpoint has no place for.
        """
        check_options(format, reading)
        values = plain_latents(format, latents)
        shape, height, width, places = check_shape(format, tuple(values.shape), reading)
        check_finite(values)
        return cls(
            format=format,
            latents=in_shape(values, shape),
            reading=replace(reading, latent_ids=None),
            height=height,
            width=width,
            places=places,
        )

    @classmethod
    def together(cls, requests: Sequence[LatentRequest]) -> LatentRequest:
        """Join requests that have the same `key` into one, whose batch is theirs one after the other."""
        if len(requests) == 1:
            return requests[0]
        places = [request.places for request in requests if request.places is not None]  # of all of them, or of none
        return replace(
            requests[0],
            latents=torch.cat([request.latents for request in requests]),
            places=torch.cat(places) if places else None,
        )

    @property
    def key(self) -> tuple[object, ...]:
        """What requests to one checkpoint must have in common to be decoded together.

        The number of patches is not enough: 512x1024 and 1024x512 have the same.
        """
        shape, dtype = tuple(self.latents.shape[1:]), self.latents.dtype
        return (self.height, self.width, shape, dtype, self.places is None, *self.reading.rescaling)

    @property
    def batch(self) -> int:
        """The number of images."""
        return self.latents.shape[0]

    @property
    def pixels(self) -> int:
        """The pixels of all images together."""
        return self.batch * self.height * self.width

    def raw_latents(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Unpack the latents and undo the model's scaling.

        Args:
            device, dtype: where and in which dtype that is computed. The latents are cast first, because a pipeline's
                latents are in such a dtype when it rescales them.

        Returns:
            Raw latents (B, C, lh, lw), what the VAE decodes.

        Raises:
            InvalidLatentsError: the latents are on the ``meta`` device and have no values.
        """
        if self.latents.is_meta:
            raise InvalidLatentsError(
                f"latents: got shape {tuple(self.latents.shape)} on the meta device, which holds no values; expected "
                "the latents themselves"
            )
        latents = self.latents.to(device=device, dtype=dtype)
        if self.places is not None:
            latents = sort_tokens(latents, self.places)
        if latents.ndim == 3:
            multiple = self.format.packed_multiple
            grid = (self.height // multiple, self.width // multiple)
            latents = unpack_rows(latents, *grid, feature_order=self.reading.feature_order)
        return self.format.to_raw(latents, self.reading)
