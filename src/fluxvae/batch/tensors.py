"""Tensors in files: their shapes are read at once, from the header, and their values only when they are needed.

Where the format allows it, a single row can be read without the others.
"""

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
"""An array in an npz of at most so many bytes is unpacked as a whole, so that its checksum is compared; of a larger one
only the row that is asked for."""
_NEAR = 2**16
"""So many bytes are cheap to read: the longest header, the longest stretch that is skipped by reading it, and a
block."""


@dataclass(frozen=True)
class Lazy:
    """One tensor in a file, whose values are read when they are asked for."""

    shape: tuple[int, ...]
    dtype: str
    """The dtype's name in torch, such as ``"float32"``. One that latents cannot have may go by its format's own
    name."""
    take: Callable[[Any], Any]
    """Reads the entries of the first dimension that a slice selects, as a tensor or an array. Where the format allows
    it, nothing else is read."""

    def rows(self, first: int, count: int = 1) -> torch.Tensor:
        """Read ``count`` entries of the first dimension from ``first`` on, into memory of their own."""
        return _owned(self.take(slice(first, first + count)))

    def whole(self) -> torch.Tensor:
        """Read the whole tensor, into memory of its own."""
        return _owned(self.take(slice(None) if self.shape else ...))

    @classmethod
    def of(cls, value: Any) -> Lazy | None:
        """Wrap a tensor or array that is in memory already, or mapped.

        Returns:
            None where ``value`` is neither, or has no values that a row could be taken of: a sparse tensor, one on the
            ``meta`` device, or an array of anything but numbers.
        """
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta:
            return cls(tuple(value.shape), str(value.dtype).removeprefix("torch."), value.detach().__getitem__)
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            return cls(value.shape, value.dtype.name, value.__getitem__)
        return None


def _owned(value: Any) -> torch.Tensor:
    """Copy a tensor or array into a contiguous tensor with this machine's byte order."""
    if isinstance(value, torch.Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))


def open_npy(path: Path) -> Lazy:
    """Map the array of an ``.npy`` file, of which only the header is read now.

    Raises:
        InvalidLatentsError: it is an array of Python objects, or of anything else but numbers.
        ValueError, OSError: the file is damaged, truncated, or no ``.npy``.
    """
    with open(path, "rb") as file:
        _, _, dtype = _header(file)
    _check_dtype(path.name, dtype)
    found = Lazy.of(npy.open_memmap(path, mode="r"))  # type: ignore[no-untyped-call]
    assert found is not None  # because _check_dtype accepted its dtype
    return found


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an array in NumPy's format: its shape, whether it is in Fortran's order, and its dtype."""
    start = file.read(12)
    file.seek(0)
    # NumPy reads the whole header before it refuses one that is too long, so a long one is refused here.
    if start[6:7] == b"\x02" and int.from_bytes(start[8:12], "little") > _NEAR:
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
    """The arrays of an ``.npz`` by their names. An array is unpacked only when it is asked for.

    Of each array no more is unpacked than it claims to have, and one that claims too much is refused.

    Raises:
        zipfile.BadZipFile, OSError: the file is damaged, truncated, or no zip archive.
        ValueError: two arrays in it have the same name.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        # The file is opened here and stays open as long as this object, even if the file's name is removed meanwhile.
        self._zip = zipfile.ZipFile(open(path, "rb"))  # noqa: SIM115
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
        """Return one array, of which only the header is read now.

        Raises:
            KeyError: there is no such array.
            InvalidLatentsError: it claims more than it stores, or more than could be packed into that; it is not an
                array of numbers; or it is large and in Fortran's order, in which no row can be read alone.
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
        """Unpack ``size`` bytes from ``start`` on. Where nothing follows them, the checksum is compared."""
        with self._lock, self._zip.open(info) as file:
            if start < _NEAR:
                file.read(start)  # read rather than skipped, because zipfile compares no checksum after a seek
            else:
                file.seek(start)
            data = file.read(size)
            if len(data) != size or (start + size == info.file_size and file.read(1)):
                raise ValueError(f"{info.filename} does not hold what the archive's directory says")
        return data


def unzipped(path: Path) -> io.BytesIO:
    """Unpack a file that gzip packed, into memory.

    It is unpacked twice. The first pass only counts the bytes, so that a file of more than `most_unpacked` allows never
    gets into memory.

    Raises:
        InvalidLatentsError: the file would unpack to more.
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
