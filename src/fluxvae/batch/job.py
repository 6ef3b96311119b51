"""The options that jobs of decoding and of encoding share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from fluxvae.claims import MAX_PIXELS
from fluxvae.engine.plan import parse_memory_limit
from fluxvae.errors import InvalidOptionError

__all__ = ["Existing", "JobOptions", "check_whole_numbers"]

Existing = Literal["refuse", "resume", "overwrite"]


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a job works on, with which checkpoint, and where."""

    inputs: tuple[str, ...]
    """The files, folders or globs, as paths or as URLs that fsspec can open."""
    out: str
    """The output folder, as a path or as a URL that fsspec can write to."""
    checkpoint: str = "demo"
    """The checkpoint: the ``source`` of `Decoder.from_pretrained` and `Encoder.from_pretrained`."""
    revision: str | None = None
    """The branch, tag or commit, where the checkpoint is a hub id."""
    variant: str | None = None
    """The variant of the weights in the checkpoint's folder or repository, such as ``"fp16"``."""
    family: str | None = None
    """Whose VAE a single file holds, such as ``"flux1"``, as for `Decoder.from_pretrained`."""
    device: str = "auto"
    """Where to compute, such as ``"cpu"`` or ``"cuda:1"``. ``"auto"`` is CUDA where there is a GPU, else the CPU."""
    dtype: str = "auto"
    """The dtype to compute in, such as ``"float32"``. ``"auto"`` is bfloat16 on NVIDIA GPUs from compute capability 8.0
    on, and float32 elsewhere."""
    memory_limit: int | str | None = None
    """How much memory the computation may add above the weights, in bytes or as text such as ``"2GiB"``. None: what is
    free when it begins, less a margin. What waits to be computed or written comes on top (docs/batch.md)."""
    max_pixels: int = MAX_PIXELS
    """The largest number of pixels one image may have. A file that claims a larger one is refused by its header."""
    existing: Existing = "refuse"
    """What to do where outputs exist already: ``"refuse"`` to start, ``"resume"`` with those that are missing, or
    ``"overwrite"`` them all."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InvalidOptionError("inputs: got none, expected files, folders or globs")
        if self.existing not in get_args(Existing):
            raise InvalidOptionError(f"existing: got {self.existing!r}, expected {', '.join(get_args(Existing))}")
        check_whole_numbers(max_pixels=self.max_pixels)
        if self.memory_limit is not None:
            parse_memory_limit(self.memory_limit)

    def load_options(self) -> dict[str, Any]:
        """Return the keyword arguments for ``from_pretrained``, to which only the checkpoint has to be added."""
        names = ("revision", "variant", "family", "device", "dtype", "memory_limit")
        return {name: getattr(self, name) for name in names}


def check_whole_numbers(**values: object) -> None:
    """Check that options are whole numbers above 0.

    Raises:
        InvalidOptionError: one is not.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidOptionError(f"{name}: got {value!r}, expected a whole number above 0")
