"""The options of a job of encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fluxvae.batch.fitting import Buckets, bucket_sizes
from fluxvae.batch.job import JobOptions, check_whole_numbers
from fluxvae.batch.trainers import CACHES, Cache
from fluxvae.claims import MAX_PICTURE_PIXELS
from fluxvae.errors import InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.photographs import check_background

__all__ = ["ENCODE_FORMATS", "EncodeJob", "Sizes"]

Sizes = Literal["refuse", "resize", "crop", "buckets"]
ENCODE_FORMATS = ("safetensors", *CACHES)
BUCKET_AREA = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class EncodeJob(JobOptions):
    """The pictures that a job encodes, and how it encodes them.

    Raises:
        InvalidOptionError: an option has a value that cannot be honoured.
    """

    sizes: Sizes = "refuse"
    """What becomes of pictures whose height or width is no multiple of 16 (of 8 where nothing is packed): they are
    refused, resized to the multiples below, cropped to them, or sorted into buckets as trainers do."""
    bucket: int = 64
    """Of how many pixels the sides of buckets are multiples."""
    bucket_area: int = BUCKET_AREA
    """The most pixels of a bucket."""
    background: str | None = None
    """The colour that shows through transparent pixels. None: a picture that has any is refused."""
    packed: bool = True
    """Whether latents are written as tokens, as FLUX's transformers take them."""
    seed: int | None = None
    """Draws a sample for every picture, by this number and the picture's name. None: the mode is written."""
    max_pixels: int = MAX_PICTURE_PIXELS
    """The most pixels one picture may have, `MAX_PICTURE_PIXELS` or fewer. One that claims more is refused by its
    header."""
    format: str = "safetensors"
    """What is written, one of `ENCODE_FORMATS`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("format", ENCODE_FORMATS), ("sizes", get_args(Sizes))):
            if getattr(self, name) not in values:
                raise InvalidOptionError(f"{name}: got {getattr(self, name)!r}, expected {', '.join(values)}")
        check_whole_numbers(bucket=self.bucket, bucket_area=self.bucket_area)
        if self.max_pixels > MAX_PICTURE_PIXELS:
            raise InvalidOptionError(
                f"max_pixels: got {self.max_pixels}, expected at most {MAX_PICTURE_PIXELS}, which Pillow opens"
            )
        if self.sizes == "buckets" and not bucket_sizes(Buckets(self.bucket, self.bucket_area)):
            raise InvalidOptionError(
                f"bucket: got steps of {self.bucket} pixels and at most {self.bucket_area} pixels, which no size fits"
            )
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise InvalidOptionError(f"seed: got {self.seed!r}, expected a whole number from 0 on")
        if self.cache is not None and not self.packed:
            raise InvalidOptionError(f"packed: got False with format {self.format}, which never packs; leave it out")
        check_background(self.background)

    @property
    def cache(self) -> Cache | None:
        """The trainer's cache that is written; None where it is safetensors of our own."""
        return CACHES.get(self.format)

    @property
    def suffix(self) -> str:
        """The suffix of the outputs, with its dot."""
        return ".safetensors" if self.cache is None else self.cache.suffix

    def multiple(self, format: LatentFormat) -> int:
        """Of how many pixels height and width must be multiples, with a checkpoint of this format."""
        return format.multiple(packed=self.packed and self.cache is None)

    def check(self, format: LatentFormat) -> None:
        """Refuse what a checkpoint of this format cannot make.

        Raises:
            InvalidOptionError: its latents are not those that the output's format is for, buckets are no multiples of
                its latents, or a sample is drawn of a preview.
        """
        if self.cache is not None:
            self.cache.check(self.format, format)
        if self.sizes == "buckets" and self.bucket % self.multiple(format):
            raise InvalidOptionError(
                f"buckets: got steps of {self.bucket} pixels, expected a multiple of {self.multiple(format)}, of which "
                "this checkpoint's sizes are"
            )
        if self.seed is not None and format.preview:
            raise InvalidOptionError("seed: got one for an AutoencoderTiny, which gives latents and no distribution")
