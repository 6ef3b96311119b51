"""The options of a job of decoding; `encode_settings` has those of encoding."""

from __future__ import annotations

from dataclasses import dataclass

from fluxvae.batch.job import JobOptions, check_whole_numbers
from fluxvae.batch.readings import Expected
from fluxvae.errors import InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.reading import Reading, check_feature_order
from fluxvae.pictures import FORMATS, check_format

__all__ = ["OUTPUT_FORMATS", "Job"]

OUTPUT_FORMATS = (*FORMATS, "npy", "safetensors")
_SUFFIXES = {"jpeg": ".jpg"}


@dataclass(frozen=True, kw_only=True)
class Job(JobOptions):
    """The latents that a job decodes, and how it decodes them.

    Raises:
        InvalidOptionError: an option has a value that cannot be honoured. Whether the checkpoint has a place for it is
            known only when the job runs.
    """

    format: str = "png"
    """The format of the outputs, one of `OUTPUT_FORMATS`."""
    quality: int | None = None
    """The quality of jpeg and webp, from 1 to 100. None: the default of `fluxvae.pictures.encode`."""
    height: int | None = None
    """The height of all images in pixels, instead of what the files say. None: what they say."""
    width: int | None = None
    """The width of all images in pixels, likewise."""
    raw: bool | None = None
    """Whether all latents are raw, as for `Decoder.decode`, instead of what the files say. None: what they say."""
    feature_order: str | None = None
    """In which order the features of FLUX.2's patches are, as for `Decoder.decode`, instead of what the files say.
    None: what they say."""
    batch: int = 4
    """The largest number of images in one decode, which all have the same size. Fewer are decoded together where the
    memory limit has no room for so many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in OUTPUT_FORMATS:
            raise InvalidOptionError(f"format: got {self.format!r}, expected one of {', '.join(OUTPUT_FORMATS)}")
        if self.format in FORMATS:
            check_format(self.format, self.quality)
        elif self.quality is not None:
            raise InvalidOptionError(f"quality: got {self.quality!r} with format {self.format}, which is lossless")
        given = {name: value for name in ("height", "width") if (value := getattr(self, name)) is not None}
        check_whole_numbers(**given, batch=self.batch)
        if self.raw is not None and not isinstance(self.raw, bool):
            raise InvalidOptionError(f"raw: got {self.raw!r}, expected True, False or None")
        check_feature_order(self.feature_order)

    @property
    def suffix(self) -> str:
        """The suffix of the outputs, with its dot, such as ``".png"``."""
        return _SUFFIXES.get(self.format, f".{self.format}")

    def expected(self, format: LatentFormat) -> Expected:
        """Return how the job reads its inputs, if its checkpoint has this latent format."""
        reading = Reading(height=self.height, width=self.width, raw=self.raw, feature_order=self.feature_order)
        return Expected(format=format, reading=reading, max_pixels=self.max_pixels)
