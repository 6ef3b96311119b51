"""Reads what a file of latents holds, as far as its header tells: safetensors, npy, npz and pt.

A file may come from anybody. So code that a file brings along is never run, and a header that claims far more than the
file can hold is refused before memory is allocated for it.
"""

from __future__ import annotations

import io
import mmap
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from fluxvae.batch.caches import Contents
from fluxvae.batch.tensors import Lazy, Npz, open_npy, unzipped
from fluxvae.claims import check_member
from fluxvae.errors import InvalidLatentsError

__all__ = ["DAMAGE", "READERS"]

DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    RuntimeError,
    MemoryError,
    SafetensorError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)
"""The errors by which the libraries report a file that is damaged or of another kind."""

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_LARGEST_PICKLE = 64 * 2**20
"""The most bytes that a pickle in a zip archive may have. It holds only names and shapes; tensors lie beside it."""
_LARGEST_OLD = 4 * 2**30
"""The most bytes that a file in PyTorch's format before 1.6 may have. Names and tensors follow one another in it, so
all of it has to be searched for what is not allowed before it is loaded."""


def _safetensors(path: Path) -> Contents:
    file: Any = safe_open(path, framework="pt")

    def lazy(key: str) -> Lazy:
        taken = file.get_slice(key)
        dtype = _SAFETENSORS_DTYPES.get(taken.get_dtype(), taken.get_dtype())
        # safetensors refuses to slice a scalar. That is no loss: in its files the sizes stand in the metadata.
        return Lazy(tuple(taken.get_shape()), dtype, taken.__getitem__)

    return Contents(path.name, {key: lazy(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118


def _npy(path: Path) -> Contents:
    return Contents(path.name, {"": open_npy(path)}, {})


def _npz(path: Path) -> Contents:
    return Contents(path.name, Npz(path), {})


def _pt(path: Path) -> Contents:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"  # gzip, which SimpleTuner writes if it is told to compress its cache
        held = _unpickle(path.name, unzipped(path) if packed else file)
    if isinstance(held, torch.Tensor):
        held = {"": held}
    if isinstance(held, (list, tuple)) and held and all(isinstance(part, Mapping) for part in held):
        return Contents(path.name, {}, {}, tuple(held))
    if not isinstance(held, Mapping):
        raise InvalidLatentsError(f"{path.name}: latents: got {type(held).__name__}, expected a tensor")
    tensors: dict[str, Lazy] = {}
    values: dict[str, Any] = {}
    for key, value in held.items():
        lazy = Lazy.of(value)
        if lazy is not None:
            tensors[str(key)] = lazy
        elif isinstance(value, torch.Tensor):
            raise InvalidLatentsError(
                f"{path.name}: {key}: got a tensor that is sparse or has no values: save it dense"
            )
        else:
            values[str(key)] = value
    return Contents(path.name, tensors, values)


def _unpickle(name: str, source: IO[bytes]) -> Any:
    """Load tensors and plain values with ``torch.load``, and refuse everything else.

    From a zip archive on disk the tensors are mapped, so their values are read only when they are used.
    """
    source.seek(0)
    archive = source.read(4) == b"PK\x03\x04"
    pickles = _pickles(name, source) if archive else [_bytes_of(source)]
    if any(data.find(b"\nbytearray\n") >= 0 for data in pickles):
        # Of what PyTorch allows in a pickle, only a bytearray takes as much memory as a mere number in it says.
        raise InvalidLatentsError(f"{name}: refused, for it holds a bytearray; save the latents alone, as tensors")
    source.seek(0)
    mapped = archive and isinstance(source, io.BufferedReader)
    try:
        return torch.load(source.name if mapped else source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        told = str(error.__context__ or error)
        if "Unsupported operand" in told:  # the pickle is of a later protocol than torch.save writes
            told = "it is a pickle of Python's own, which torch.save did not write"
        if "GLOBAL" not in told and "class" not in told.lower():
            raise ValueError(told) from error
        named = told.split("GLOBAL ")[-1].split(" ")[0] if "GLOBAL " in told else "one of a class of its own"
        raise InvalidLatentsError(
            f"{name}: refused, for it holds a pickle of more than tensors ({named}), which could run code when it is "
            "read; save the latents alone: torch.save({'latents': tensor, 'height': 1024, 'width': 1024}, path), or "
            "as safetensors"
        ) from error


def _pickles(name: str, source: IO[bytes]) -> list[bytes]:
    """Return the pickles in a zip archive, after checking that no file in it claims more bytes than it can have."""
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            check_member(name, member)
        members = [member for member in archive.infolist() if member.filename.endswith(".pkl")]
        for member in members:
            if member.file_size > _LARGEST_PICKLE:
                raise InvalidLatentsError(
                    f"{name}: {member.filename} claims {member.file_size} bytes besides the tensors, more than the "
                    f"{_LARGEST_PICKLE} that names and shapes may take; save the latents alone"
                )
        return [archive.read(member) for member in members]


def _bytes_of(source: IO[bytes]) -> bytes | mmap.mmap:
    """Return all bytes of a file in memory or on disk; one on disk is mapped rather than read."""
    if isinstance(source, io.BytesIO):
        return source.getvalue()
    size = source.seek(0, io.SEEK_END)
    if not size:
        return b""
    if size > _LARGEST_OLD:
        raise InvalidLatentsError(
            f"{Path(source.name).name}: got {size} bytes in the format that torch.save had before PyTorch 1.6, "
            f"expected at most {_LARGEST_OLD}: save it again with a newer one, or as safetensors"
        )
    return mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)


READERS: dict[str, Callable[[Path], Contents]] = {
    ".safetensors": _safetensors,
    ".latent": _safetensors,
    ".npy": _npy,
    ".npz": _npz,
    ".pt": _pt,
    ".pth": _pt,
}
"""What reads a file, by its suffix. The values of tensors are read later, as `Lazy` says."""
