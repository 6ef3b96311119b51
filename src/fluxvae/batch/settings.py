"""What a job is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from fluxvae.batch.readings import Expected
from fluxvae.claims import MAX_PIXELS
from fluxvae.engine.plan import parse_memory_limit
from fluxvae.errors import InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.reading import Reading
from fluxvae.pictures import FORMATS, check_format

__all__ = ["OUTPUT_FORMATS", "Existing", "Job"]

Existing = Literal["refuse", "resume", "overwrite"]
OUTPUT_FORMATS = (*FORMATS, "npy", "safetensors")
_SUFFIXES = {"jpeg": ".jpg"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Latents to decode and how.

    Raises:
        InvalidOptionError: an option that cannot be honoured.
    """

    inputs: tuple[str, ...]
    """Files, folders or globs: paths, or URLs that fsspec knows."""
    out: str
    """Folder or URL."""
    checkpoint: str = "demo"
    revision: str | None = None
    """Of a hub id."""
    variant: str | None = None
    """Of a folder's or repository's weights, such as fp16."""
    family: str | None = None
    """Whose VAE a single file holds, as for `Decoder.from_pretrained`."""
    device: str = "auto"
    dtype: str = "auto"
    memory_limit: int | str | None = None
    """What a decode may add above the weights; what waits to be decoded or written comes on top (docs/batch.md)."""
    format: str = "png"
    quality: int | None = None
    """Of jpeg and webp."""
    height: int | None = None
    """Pixels, instead of the files' own."""
    width: int | None = None
    raw: bool | None = None
    """Instead of the files' own: the latents are raw, or are not, as for `Decoder.decode`."""
    max_pixels: int = MAX_PIXELS
    """Of one image: a file that claims a larger one is refused by its header."""
    batch: int = 4
    """Images of one size in one decode, at most; fewer where the memory limit has no room."""
    existing: Existing = "refuse"
    """What becomes of outputs that are there: refuse to start, decode only what is missing, or decode all again."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InvalidOptionError("inputs: got none, expected files, folders or globs of latents")
        if self.format not in OUTPUT_FORMATS:
            raise InvalidOptionError(f"format: got {self.format!r}, expected one of {', '.join(OUTPUT_FORMATS)}")
        if self.format in FORMATS:
            check_format(self.format, self.quality)
        elif self.quality is not None:
            raise InvalidOptionError(f"quality: got {self.quality!r} with format {self.format}, which is lossless")
        if self.existing not in get_args(Existing):
            raise InvalidOptionError(f"existing: got {self.existing!r}, expected {', '.join(get_args(Existing))}")
        for name in ("height", "width", "max_pixels", "batch"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidOptionError(f"{name}: got {value!r}, expected a whole number above 0")
        if self.raw is not None and not isinstance(self.raw, bool):
            raise InvalidOptionError(f"raw: got {self.raw!r}, expected True, False or None")
        if self.memory_limit is not None:
            parse_memory_limit(self.memory_limit)

    @property
    def suffix(self) -> str:
        """Of the outputs, with its dot."""
        return _SUFFIXES.get(self.format, f".{self.format}")

    def expected(self, format: LatentFormat) -> Expected:
        """Return what the job takes its inputs for, with a checkpoint of this format."""
        reading = Reading(height=self.height, width=self.width, raw=self.raw)
        return Expected(format=format, reading=reading, max_pixels=self.max_pixels)

    def decoder_options(self) -> dict[str, Any]:
        """For ``Decoder.from_pretrained``, the source beside."""
        return {
            "revision": self.revision,
            "variant": self.variant,
            "family": self.family,
            "device": self.device,
            "dtype": self.dtype,
            "memory_limit": self.memory_limit,
        }
