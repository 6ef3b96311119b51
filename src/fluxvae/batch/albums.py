"""Finds the pictures that a job's inputs name: files, tars as WebDataset has them, and Parquet.

They are listed by their headers. Of files on this machine only those are read; a tar's members, pictures elsewhere and
Parquet's row groups are read whole for it, and once more when their turn comes to be encoded.
"""

from __future__ import annotations

import io
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from fsspec.implementations.local import LocalFileSystem

from fluxvae.batch.names import stem
from fluxvae.batch.sources import filesystem_of
from fluxvae.claims import MAX_ROWS, is_special, most_unpacked
from fluxvae.errors import FluxVAEError, InvalidImagesError, first_line
from fluxvae.extras import needs
from fluxvae.photographs import SUFFIXES

__all__ = ["INPUT_SUFFIXES", "Album", "Albums", "Member", "open_album"]

INPUT_SUFFIXES = (*SUFFIXES, ".tar", ".parquet")
_COLUMNS = ("image", "jpg", "png", "jpeg", "webp", "img")
"""The columns of Parquet that are looked for, in this order: Hugging Face's, then WebDataset's names."""
_OPEN = 4


@dataclass(frozen=True)
class Member:
    """One picture of an album."""

    row: int
    name: str
    """Its own name within the file, without a suffix; empty where the file's own name serves."""


class Album(Protocol):
    """A file that holds one picture or many. Several threads may read it."""

    def members(self) -> Iterator[Member]:
        """List the pictures."""

    def read(self, row: int) -> IO[bytes]:
        """The bytes of one picture as a file."""


class Albums:
    """Opens albums and keeps the last few open, since what a tar or Parquet lists is read once."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Album] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, url: str) -> Album:
        """Open one file, unless it is still open.

        Raises:
            InvalidImagesError: it cannot be read, is damaged, or holds no pictures.
        """
        with self._lock:
            if url in self._open:
                self._open.move_to_end(url)
                return self._open[url]
        made = open_album(url)
        with self._lock:
            self._open[url] = made
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return made


def open_album(url: str) -> Album:
    """Open the file at a path or URL: a picture, a tar of pictures, or Parquet.

    Raises:
        InvalidImagesError: as `Albums.open`.
    """
    filesystem, path = filesystem_of(url)
    name = path.rpartition("/")[2]
    try:
        if isinstance(filesystem, LocalFileSystem) and is_special(Path(path)):
            raise InvalidImagesError(f"{name}: is a pipe, a device or a folder; expected a file of pictures")
        if path.lower().endswith(".tar"):
            return Tar(name, filesystem, path)
        if path.lower().endswith(".parquet"):
            return Parquet(name, filesystem, path)
        return Single(filesystem, path)
    except FluxVAEError:
        raise
    except Exception as error:  # each of fsspec's filesystems, and pyarrow, raise errors of their own
        raise InvalidImagesError(f"{name}: cannot be read: {first_line(error)}") from error


class Single:
    """A file that is one picture."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path

    def members(self) -> Iterator[Member]:
        yield Member(0, "")

    def read(self, row: int) -> IO[bytes]:
        if isinstance(self._filesystem, LocalFileSystem):
            return open(self._path, "rb")
        return io.BytesIO(self._filesystem.cat_file(self._path))


class Tar:
    """A tar of pictures, as WebDataset writes them: members of one sample share a name up to its first dot."""

    def __init__(self, name: str, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._members: list[tuple[str, int, int]] = []
        try:
            with filesystem.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isfile() and not member.issparse() and member.name.lower().endswith(SUFFIXES):
                        self._members.append((member.name, member.offset_data, member.size))
        except tarfile.TarError as error:
            raise InvalidImagesError(
                f"{name}: cannot be read as a tar: {first_line(error)}; it is damaged, truncated or compressed: unpack "
                "what is compressed, pictures hardly pack"
            ) from error
        if not self._members:
            raise InvalidImagesError(f"{name}: holds no pictures; expected members that end in {', '.join(SUFFIXES)}")

    def members(self) -> Iterator[Member]:
        for row, (name, _, _) in enumerate(self._members):
            yield Member(row, stem(name.removeprefix("./")))

    def read(self, row: int) -> IO[bytes]:
        _, start, size = self._members[row]
        data = self._filesystem.cat_file(self._path, start=start, end=start + size)
        if len(data) != size:
            raise InvalidImagesError(f"got {len(data)} of {size} bytes; the tar is truncated")
        return io.BytesIO(data)


class Parquet:
    """Parquet with a column of pictures: bytes, or a struct with ``bytes`` (and ``path``) as Hugging Face has it."""

    def __init__(self, name: str, filesystem: Any, path: str) -> None:
        with needs("batch", f"input: {name}: Parquet"):
            import pyarrow as pa
            import pyarrow.parquet as pq
        self._name, self._lock = name, threading.Lock()
        self._file = pq.ParquetFile(path, filesystem=filesystem)
        schema = self._file.schema_arrow
        self._column = next((column for column in _COLUMNS if column in schema.names), "")
        if not self._column:
            raise InvalidImagesError(
                f"{name}: has the columns {', '.join(schema.names[:8])}; expected one of {', '.join(_COLUMNS)}"
            )
        type = schema.field(self._column).type
        self._struct = pa.types.is_struct(type)
        if not (self._struct or pa.types.is_binary(type) or pa.types.is_large_binary(type)):
            raise InvalidImagesError(f"{name}: column {self._column!r} holds {type}, expected the bytes of pictures")
        self._named = next((column for column in ("name", "__key__", "key", "file_name") if column in schema.names), "")
        sizes = [self._file.metadata.row_group(index).num_rows for index in range(self._file.num_row_groups)]
        if sum(sizes) > MAX_ROWS:
            raise InvalidImagesError(f"{name}: claims {sum(sizes)} pictures, more than {MAX_ROWS}; split it")
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self._sizes = sizes
        for index in range(self._file.num_row_groups):
            group = self._file.metadata.row_group(index)
            for at in range(group.num_columns):
                column = group.column(at)
                if column.path_in_schema.partition(".")[0] == self._column:
                    claimed, stored = column.total_uncompressed_size, column.total_compressed_size
                    if claimed > most_unpacked(stored):
                        raise InvalidImagesError(
                            f"{name}: row group {index}: claims {claimed} bytes, but {stored} are stored: no pictures "
                            "pack so well, and it was not unpacked"
                        )
        # The same bytes in many rows are in memory once. Otherwise a small file could take memory for each row.
        bytes_column = f"{self._column}.bytes" if self._struct else self._column
        self._file.close()
        self._file = pq.ParquetFile(path, filesystem=filesystem, read_dictionary=[bytes_column])
        self._group: tuple[int, Any] | None = None

    def members(self) -> Iterator[Member]:
        for group, start in enumerate(self._starts):
            for index in range(self._sizes[group]):
                value = self._value(group, index)
                path = value.get("path") if isinstance(value, dict) else None
                said = str(self._value(group, index, self._named)) if self._named else stem(path) if path else ""
                yield Member(start + index, said)

    def read(self, row: int) -> IO[bytes]:
        group = max(index for index, start in enumerate(self._starts) if start <= row)
        value = self._value(group, row - self._starts[group])
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise InvalidImagesError(f"{self._name}: row {row} of column {self._column!r} holds no bytes")
        return io.BytesIO(data)

    def _value(self, group: int, index: int, column: str = "") -> Any:
        """One value of a row group, of which the last one stays in memory."""
        with self._lock:
            if self._group is None or self._group[0] != group:
                self._group = None
                columns = [self._column, *([self._named] if self._named else [])]
                self._group = (group, self._file.read_row_group(group, columns=columns))
            table = self._group[1]
        return table.column(column or self._column)[index].as_py()
