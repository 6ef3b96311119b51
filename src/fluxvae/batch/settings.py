"""The options of a job of decoding; `encode_settings` has those of encoding."""

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

__all__ = ["LOAD_OPTIONS", "OUTPUT_FORMATS", "Existing", "Job"]

LOAD_OPTIONS = ("revision", "variant", "family", "device", "dtype", "memory_limit")
"""The options of a job that its checkpoint is loaded with."""

Existing = Literal["refuse", "resume", "overwrite"]
OUTPUT_FORMATS = (*FORMATS, "npy", "safetensors")
_SUFFIXES = {"jpeg": ".jpg"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """The latents that a job decodes, and how it decodes them.

    Raises:
        InvalidOptionError: an option has a value that cannot be honoured. Whether the checkpoint has a place for it is
            known only when the job runs.
    """

    inputs: tuple[str, ...]
    """The files, folders or globs of latents, as paths or as URLs that fsspec can open."""
    out: str
    """The output folder, as a path or as a URL that fsspec can write to."""
    checkpoint: str = "demo"
    """The checkpoint that decodes: the ``source`` of `Decoder.from_pretrained`."""
    revision: str | None = None
    """The branch, tag or commit, where the checkpoint is a hub id."""
    variant: str | None = None
    """The variant of the weights in the checkpoint's folder or repository, such as ``"fp16"``."""
    family: str | None = None
    """Whose VAE a single file holds, such as ``"flux1"``, as for `Decoder.from_pretrained`."""
    device: str = "auto"
    """Where to decode, such as ``"cpu"`` or ``"cuda:1"``. ``"auto"`` is CUDA where there is a GPU, else the CPU."""
    dtype: str = "auto"
    """The dtype to decode in, such as ``"float32"``. ``"auto"`` is bfloat16 on CUDA and float32 on a CPU."""
    memory_limit: int | str | None = None
    """How much memory a decode may add above the weights, in bytes or as text such as ``"2GiB"``. None: what is free
    when it begins, less a margin. What waits to be decoded or written comes on top (docs/batch.md)."""
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
    max_pixels: int = MAX_PIXELS
    """The largest number of pixels one image may have. A file that claims a larger one is refused by its header."""
    batch: int = 4
    """The largest number of images in one decode, which all have the same size. Fewer are decoded together where the
    memory limit has no room for so many."""
    existing: Existing = "refuse"
    """What to do where outputs exist already: ``"refuse"`` to start, ``"resume"`` with those that are missing, or
    ``"overwrite"`` them all."""

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
        """The suffix of the outputs, with its dot, such as ``".png"``."""
        return _SUFFIXES.get(self.format, f".{self.format}")

    def expected(self, format: LatentFormat) -> Expected:
        """Return how the job reads its inputs, if its checkpoint has this latent format."""
        reading = Reading(height=self.height, width=self.width, raw=self.raw)
        return Expected(format=format, reading=reading, max_pixels=self.max_pixels)

    def load_options(self) -> dict[str, Any]:
        """Return the keyword arguments for `Decoder.from_pretrained`, to which only the checkpoint has to be added."""
        return {name: getattr(self, name) for name in LOAD_OPTIONS}
