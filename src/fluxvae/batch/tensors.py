"""Tensors of a file: their shapes now, from its header; their values later, a row at a time where the format allows."""

from __future__ import annotations

import gzip
import io
import math
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy

from fluxvae.claims import check_member, most_unpacked
from fluxvae.errors import InvalidLatentsError

__all__ = ["Lazy", "Npz", "open_npy", "unzipped"]

_WHOLE = 256 * 2**20
"""Bytes of an array in an npz that are unpacked at once and kept to its checksum; of larger ones, a row at a time."""
_NEAR = 2**16


@dataclass(frozen=True)
class Lazy:
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: str
    """As torch names it: ``"float32"``."""
    take: Callable[[Any], Any]
    """Entries of the first dimension, as a tensor or an array; only they are read, where the format allows it."""

    def rows(self, first: int, count: int = 1) -> torch.Tensor:
        """``count`` entries of the first dimension, in memory of their own."""
        return _owned(self.take(slice(first, first + count)))

    def whole(self) -> torch.Tensor:
        """All of it, in memory of its own."""
        return _owned(self.take(slice(None) if self.shape else ...))

    @classmethod
    def of(cls, value: Any) -> Lazy | None:
        """A tensor or an array that is there already, or mapped; None: it is neither, or has no values in one place."""
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta:
            return cls(tuple(value.shape), str(value.dtype).removeprefix("torch."), value.detach().__getitem__)
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            return cls(value.shape, value.dtype.name, value.__getitem__)
        return None


def _owned(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))


def open_npy(path: Path) -> Lazy:
    """The array of an ``.npy``, mapped: nothing is read but its header.

    Raises:
        InvalidLatentsError: an array of Python objects, or of anything but numbers.
        ValueError, OSError: damaged, truncated, or no ``.npy``.
    """
    with open(path, "rb") as file:
        _, _, dtype = _header(file)
    _check_dtype(path.name, dtype)
    found = Lazy.of(npy.open_memmap(path, mode="r"))  # type: ignore[no-untyped-call]
    assert found is not None  # its dtype says so
    return found


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, in Fortran's order, dtype) of an array in NumPy's format."""
    start = file.read(12)
    file.seek(0)
    if start[6:7] == b"\x02" and int.from_bytes(start[8:12], "little") > _NEAR:  # NumPy reads it before it judges it
        raise ValueError(f"it claims a header of {int.from_bytes(start[8:12], 'little')} bytes")
    version = npy.read_magic(file)  # type: ignore[no-untyped-call]
    if version == (1, 0):
        return npy.read_array_header_1_0(file)  # type: ignore[no-untyped-call, no-any-return]
    if version == (2, 0):
        return npy.read_array_header_2_0(file)  # type: ignore[no-untyped-call, no-any-return]
    raise ValueError(f"version {version} of NumPy's format, which is for arrays of records")


def _check_dtype(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "fiub":
        what = "Python objects" if dtype.hasobject else f"dtype {dtype}"
        raise InvalidLatentsError(
            f"{name}: got an array of {what}, expected numbers: float32, float16 or float64; save latents with "
            "np.save(path, latents.float().numpy())"
        )


class Npz(Mapping[str, Lazy]):
    """The arrays of an ``.npz`` by their names, of which only those that are asked for are unpacked.

    No more of them is unpacked than they claim, and what claims too much is refused.

    Raises:
        zipfile.BadZipFile, OSError: damaged, truncated, or no zip archive.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._zip = zipfile.ZipFile(open(path, "rb"))  # noqa: SIM115 (open as long as this is, also if its name goes)
        self._lock = threading.Lock()
        arrays = [info for info in self._zip.infolist() if info.filename.endswith(".npy")]
        self._members = {info.filename.removesuffix(".npy"): info for info in arrays}
        if len(self._members) != len(arrays):
            raise ValueError("it holds two arrays of one name")

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> Lazy:
        """One array, by its header.

        Raises:
            InvalidLatentsError: it claims more than can be stored of it, or is not of numbers.
        """
        info = self._members[name]
        label = f"{self._name}: {name}"
        check_member(self._name, info)
        with self._lock, self._zip.open(info) as file:
            shape, fortran, dtype = _header(file)
            start = file.tell()
        _check_dtype(label, dtype)
        size = math.prod(shape) * dtype.itemsize
        if size != info.file_size - start:
            raise InvalidLatentsError(
                f"{label}: claims shape {shape} of {dtype}, {size} bytes, but holds {info.file_size - start}; it is "
                "damaged: make it again"
            )
        if fortran and size > _WHOLE:
            raise InvalidLatentsError(
                f"{label}: got {size} bytes in Fortran's order, of which no row can be read by itself; save it with "
                "np.ascontiguousarray(latents)"
            )

        def take(rows: Any) -> Any:
            if size <= _WHOLE:
                flat = np.frombuffer(self._read(info, start, size), dtype)
                return flat.reshape(shape, order="F" if fortran else "C")[rows]
            first, stop, _ = rows.indices(shape[0])
            row = size // shape[0]
            part = self._read(info, start + first * row, (stop - first) * row)
            return np.frombuffer(part, dtype).reshape(stop - first, *shape[1:])

        return Lazy(tuple(shape), dtype.name, take)

    def _read(self, info: zipfile.ZipInfo, start: int, size: int) -> bytes:
        """So many bytes and no more; where they are the rest of it, its checksum is compared."""
        with self._lock, self._zip.open(info) as file:
            if start < _NEAR:
                file.read(start)  # a seek would give up the checksum
            else:
                file.seek(start)
            data = file.read(size)
            if len(data) != size or (start + size == info.file_size and file.read(1)):
                raise ValueError(f"{info.filename} does not hold what the archive's directory says")
        return data


def unzipped(path: Path) -> io.BytesIO:
    """All that a file packed by gzip holds; what would unpack to more than `most_unpacked` is counted, not kept.

    Raises:
        InvalidLatentsError: there is more.
    """
    most, count = most_unpacked(path.stat().st_size), 0
    with gzip.open(path) as data:
        while block := data.read(_NEAR):
            count += len(block)
            if count > most:
                raise InvalidLatentsError(
                    f"{path.name}: unpacks to more than {most} bytes from {path.stat().st_size}: no latents pack so "
                    "well, and it was read no further; if they are real, save them without compression"
                )
    with gzip.open(path) as data:
        return io.BytesIO(data.read(count))
