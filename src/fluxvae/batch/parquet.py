"""Reads latents from Parquet files, in which every row is one image.

The columns are ``latents``, ``height`` and ``width`` and, where they are needed, ``name`` (the output's), ``raw`` (true
or false), ``feature_order`` and ``latent_ids`` (a list of four whole numbers for each token). The column ``latents``
holds either

- nested lists of shape (N, 4C), which are packed latents, or (C, lh, lw) or (C, 1, lh, lw), which are unpacked ones; or
  Arrow's fixed-shape tensors of such a shape;
- or a flat list or bytes, with the shape in a column ``shape`` and, for bytes that are not float32, a column ``dtype``.

To list the images only the small columns are read. Latents are read one row group at a time, when their turn comes. A
row group is refused before it is read if by the file's metadata it claims far more bytes than are stored of it.
"""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fluxvae.batch.formats import unreadable
from fluxvae.batch.items import Entry, Latents
from fluxvae.batch.readings import Expected, read_shape
from fluxvae.claims import check_packing, check_rows
from fluxvae.errors import InvalidLatentsError, first_line
from fluxvae.latents.reading import Reading

__all__ = ["ParquetSource"]

_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8, "FIXED_LEN_BYTE_ARRAY": 2}
"""How many bytes a value of each physical type takes in memory at least."""
_BYTES_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DAMAGE = (OSError, ValueError, KeyError, pa.ArrowException)


class ParquetSource:
    """One Parquet file of latents.

    Args:
        name: what messages call the file.
        path: its path in ``filesystem``.
        filesystem: one of fsspec's filesystems. Only the row groups and columns that are asked for are read from it.
        expected: how the job reads its inputs.

    Raises:
        InvalidLatentsError: the file cannot be read, is damaged, or has no column ``latents``.
    """

    def __init__(self, name: str, path: str, filesystem: Any, expected: Expected) -> None:
        self._name, self._expected = name, expected
        try:
            self._file = _open(path, filesystem)
        except (PermissionError, FileNotFoundError) as error:
            raise InvalidLatentsError(unreadable(name, error)) from error
        except _DAMAGE as error:
            raise InvalidLatentsError(
                f"{name}: cannot be read as parquet: {first_line(error)}; it is damaged, truncated or another kind of "
                "file: make it again"
            ) from error
        self._columns = set(self._file.schema_arrow.names)
        if "latents" not in self._columns:
            raise InvalidLatentsError(
                f"{name}: has the columns {', '.join(sorted(self._columns)[:8])}; expected one named 'latents'"
            )
        check_rows(name, self._file.metadata.num_rows)
        type = self._file.schema_arrow.field("latents").type
        self._type = type.value_type if pa.types.is_dictionary(type) else type
        self._lock = threading.Lock()  # so that threads read one row group after the other, and only one is in memory
        self._group: tuple[int, pa.Table] | None = None
        rows = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._ends = list(itertools.accumulate(rows))

    def entries(self) -> list[Entry]:
        """List the images, one for each row, from the small columns alone.

        Raises:
            InvalidLatentsError: a shape or ids that no latents have, or a column that claims more than is stored.
        """
        small = ("height", "width", "name", "shape", "dtype", "raw", "feature_order")
        wanted = [name for name in small if name in self._columns]
        if "latent_ids" in self._columns and not {"height", "width"} <= self._columns:
            wanted.append("latent_ids")  # without both sides in columns, the ids are what tells the size
        self._check(range(self._file.num_row_groups), wanted)
        count = self._file.metadata.num_rows
        columns = {name: _listed(column) for name, column in zip(wanted, self._file.read(columns=wanted), strict=True)}
        rows = [{name: column[index] for name, column in columns.items()} for index in range(count)]
        fixed = tuple(self._type.shape) if isinstance(self._type, pa.FixedShapeTensorType) else None
        return [
            Entry(
                index,
                self._image(row.get("shape") if fixed is None else fixed),
                row.get("dtype") or "float32",
                Reading(
                    height=row.get("height"),
                    width=row.get("width"),
                    latent_ids=_ids(row.get("latent_ids")),
                    raw=row.get("raw"),
                    feature_order=row.get("feature_order"),
                ),
                row.get("name"),
            )
            for index, row in enumerate(rows)
        ]

    def _image(self, shape: Any) -> tuple[int, ...] | None:
        """Return the shape of a row's latents with a batch axis of 1, from their own shape without one.

        Returns:
            None where ``shape`` is not known: then only the values tell it.
        """
        if not shape or not all(isinstance(side, int) for side in shape):
            return None
        return read_shape(self._expected.format, tuple(shape), one=True).shape

    def _check(self, groups: range, columns: list[str]) -> None:
        """Refuse to read these columns of these row groups together if they claim far more bytes than are stored.

        Raises:
            InvalidLatentsError: a column does.
        """
        sums: dict[str, tuple[int, int]] = {}
        for group in groups:
            stored = self._file.metadata.row_group(group)
            for index in range(stored.num_columns):
                column = stored.column(index)
                path = column.path_in_schema
                if path.partition(".")[0] in columns:
                    width = _WIDTHS.get(column.physical_type, 0)
                    claimed, packed = sums.get(path, (0, 0))
                    claimed += max(column.total_uncompressed_size, column.num_values * width)
                    sums[path] = claimed, packed + column.total_compressed_size
        where = f"row group {groups[0]}" if len(groups) == 1 else "all row groups"
        for path, (claimed, packed) in sums.items():
            check_packing(f"{self._name}: {where} of {path}", claimed, packed)

    def load(self, row: int) -> Latents:
        """Read one row. Its row group is read as a whole and kept, because the next rows are mostly in it too.

        Raises:
            InvalidLatentsError: the row cannot be read, or what it holds are no latents.
        """
        group = next(i for i, end in enumerate(self._ends) if row < end)
        first = self._ends[group - 1] if group else 0
        try:
            with self._lock:
                if self._group is None or self._group[0] != group:
                    columns = [name for name in ("latents", "shape", "dtype", "latent_ids") if name in self._columns]
                    self._check(range(group, group + 1), columns)
                    self._group = (group, self._file.read_row_group(group, columns=columns))
                table = self._group[1]
            ids = table["latent_ids"][row - first].as_py() if "latent_ids" in self._columns else None
            tensor = self._tensor(table, row - first)
            return Latents(tensor.reshape(self._image(tuple(tensor.shape)) or tensor.shape), _ids(ids))
        except _DAMAGE as error:
            raise InvalidLatentsError(f"{self._name}: row {row} cannot be read: {first_line(error)}") from error

    def _tensor(self, table: pa.Table, index: int) -> torch.Tensor:
        scalar = table["latents"][index]
        if not scalar.is_valid:
            raise InvalidLatentsError(f"{self._name}: latents: got null, expected values")
        if isinstance(self._type, pa.FixedShapeTensorType):
            return torch.from_numpy(np.array(scalar.to_numpy()))
        shape = table["shape"][index].as_py() if "shape" in self._columns else None
        if pa.types.is_binary(self._type) or pa.types.is_large_binary(self._type):
            held = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
            return self._from_bytes(held.as_buffer(), shape, table, index)
        values = _unnest(scalar.values)
        if values.ndim == 1:
            values = values.reshape(self._shape(shape, values.size))
        return torch.from_numpy(np.array(values))

    def _from_bytes(self, data: pa.Buffer, shape: Any, table: pa.Table, index: int) -> torch.Tensor:
        """Make a tensor of a row's bytes, which are checked before they are copied.

        A small file can hold the same large bytes in every row, and those must not take memory before they are known to
        be latents.
        """
        name = (table["dtype"][index].as_py() if "dtype" in self._columns else None) or "float32"
        if name not in _BYTES_DTYPES:
            raise InvalidLatentsError(f"dtype: got {name!r}, expected {', '.join(_BYTES_DTYPES)}")
        dtype = _BYTES_DTYPES[name]
        if data.size % dtype.itemsize or not data.size:
            raise InvalidLatentsError(
                f"latents: got {data.size} bytes, expected a positive multiple of {dtype.itemsize}"
            )
        sides = self._shape(shape, data.size // dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(sides)

    def _shape(self, shape: Any, values: int) -> tuple[int, ...]:
        """Return the shape in a row's column ``shape``, after checking that it fits the number of values."""
        if not shape or math.prod(shape) != values or min(shape) < 1:
            raise InvalidLatentsError(
                f"shape: got {shape} for {values} values; expected (patches, features) or (channels, height/8, "
                "width/8) in a column 'shape'"
            )
        return tuple(shape)


def _open(path: str, filesystem: Any) -> pq.ParquetFile:
    """Open a Parquet file so that bytes or texts that are the same in many rows are in memory once.

    Otherwise a small file could take memory for them once for each row.
    """
    file = pq.ParquetFile(path, filesystem=filesystem)
    schema = file.schema
    texts = [
        column.path
        for column in (schema.column(index) for index in range(len(schema)))
        if column.physical_type == "BYTE_ARRAY" and column.path in ("latents", "name", "dtype")
    ]
    if not texts:
        return file
    file.close()
    return pq.ParquetFile(path, filesystem=filesystem, read_dictionary=texts)


def _listed(column: pa.ChunkedArray) -> list[Any]:
    """Return a column's values. Rows with the same entry of a dictionary share one object."""
    if not pa.types.is_dictionary(column.type):
        return list(column.to_pylist())
    found: list[Any] = []
    for chunk in column.chunks:
        values = chunk.dictionary.to_pylist()
        found += [None if index is None else values[index] for index in chunk.indices.to_pylist()]
    return found


def _ids(value: Any) -> torch.Tensor | None:
    """Make a tensor of a row's position ids, (1, N, 4) if they are right; what is wrong with others the checks say.

    Returns:
        None where there are none, and the tokens are in order, row by row.
    """
    if value is None:
        return None
    try:
        ids = torch.tensor(value, dtype=torch.int64, device="cpu")
    except (TypeError, ValueError) as error:
        raise InvalidLatentsError("latent_ids: expected lists of four whole numbers, of equal lengths") from error
    return ids.unsqueeze(0)


def _unnest(array: pa.Array) -> np.ndarray[Any, Any]:
    """Make one array of lists within lists, which must have equal lengths at each level."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(array.type) for is_kind in kinds):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    inner = _unnest(array.flatten())
    lengths = {len(one) for one in array}
    if len(lengths) != 1:
        raise InvalidLatentsError(f"latents: got lists of {len(lengths)} different lengths, expected equal ones")
    return inner.reshape(len(array), lengths.pop(), *inner.shape[1:])
