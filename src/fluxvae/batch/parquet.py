"""Parquet: one row is one image, columns ``latents``, ``height``, ``width`` and, if there are any,
``name``, ``raw`` (true or false) and ``latent_ids`` (lists of four whole numbers, one for each token).

``latents`` is one of

- nested lists, (N, 4C) packed or (C, lh, lw) unpacked, or Arrow's fixed-shape tensors of that shape;
- a flat list, or bytes, with a column ``shape``; bytes also with ``dtype`` unless they are float32.

Columns of sizes and names are read to know a job; latents are read a row group at a time when their turn comes.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fluxvae.batch.formats import unreadable
from fluxvae.batch.items import Entry, Latents
from fluxvae.errors import InvalidLatentsError

__all__ = ["ParquetSource"]

_BYTES_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DAMAGE = (OSError, ValueError, KeyError, pa.ArrowException)


class ParquetSource:
    """One Parquet file.

    Args:
        name: for messages.
        path: of the file, in ``filesystem``.
        filesystem: any of fsspec's; only the row groups and columns asked for are read from it.
    """

    def __init__(self, name: str, path: str, filesystem: Any) -> None:
        self._name = name
        try:
            self._file = pq.ParquetFile(path, filesystem=filesystem)
        except (PermissionError, FileNotFoundError) as error:
            raise InvalidLatentsError(unreadable(name, error)) from error
        except _DAMAGE as error:
            raise InvalidLatentsError(
                f"{name}: cannot be read as parquet: {_first_line(error)}; it is damaged, truncated or another kind of "
                "file: make it again"
            ) from error
        self._columns = set(self._file.schema_arrow.names)
        if "latents" not in self._columns:
            raise InvalidLatentsError(
                f"{name}: has the columns {', '.join(sorted(self._columns)[:8])}; expected one named 'latents'"
            )
        self._type = self._file.schema_arrow.field("latents").type
        self._lock = threading.Lock()  # one row group at a time, whoever asks
        self._group: tuple[int, pa.Table] | None = None
        ends = np.cumsum([self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)])
        self._ends: list[int] = ends.tolist()

    def entries(self) -> list[Entry]:
        """Every row, from its small columns."""
        small = ("height", "width", "name", "shape", "dtype", "raw")
        wanted = [name for name in small if name in self._columns]
        if "latent_ids" in self._columns and not {"height", "width"} <= self._columns:
            wanted.append("latent_ids")  # only they tell the size
        rows = self._file.read(columns=wanted).to_pylist() if wanted else [{}] * self._file.metadata.num_rows
        fixed = tuple(self._type.shape) if isinstance(self._type, pa.FixedShapeTensorType) else None
        entries = []
        for index, row in enumerate(rows):
            shape = row.get("shape") if fixed is None else fixed
            entries.append(
                Entry(
                    index,
                    None if shape is None else (1, *shape),
                    row.get("dtype") or "float32",
                    row.get("height"),
                    row.get("width"),
                    row.get("name"),
                    row.get("raw"),
                    _ids(row.get("latent_ids")),
                )
            )
        return entries

    def load(self, row: int) -> Latents:
        """One row."""
        group = next(i for i, end in enumerate(self._ends) if row < end)
        first = self._ends[group - 1] if group else 0
        try:
            with self._lock:
                if self._group is None or self._group[0] != group:
                    columns = [name for name in ("latents", "shape", "dtype", "latent_ids") if name in self._columns]
                    self._group = (group, self._file.read_row_group(group, columns=columns))
                table = self._group[1]
            ids = table["latent_ids"][row - first].as_py() if "latent_ids" in self._columns else None
            return Latents(self._tensor(table, row - first).unsqueeze(0), _ids(ids))
        except _DAMAGE as error:
            raise InvalidLatentsError(f"{self._name}: row {row} cannot be read: {_first_line(error)}") from error

    def _tensor(self, table: pa.Table, index: int) -> torch.Tensor:
        scalar = table["latents"][index]
        if not scalar.is_valid:
            raise InvalidLatentsError(f"{self._name}: latents: got null, expected values")
        if isinstance(self._type, pa.FixedShapeTensorType):
            return torch.from_numpy(np.array(scalar.to_numpy()))
        shape = table["shape"][index].as_py() if "shape" in self._columns else None
        if pa.types.is_binary(self._type) or pa.types.is_large_binary(self._type):
            return self._from_bytes(scalar.as_py(), shape, table, index)
        values = _unnest(scalar.values)
        if values.ndim == 1:
            values = values.reshape(self._shape(shape, values.size))
        return torch.from_numpy(np.array(values))

    def _from_bytes(self, data: bytes, shape: Any, table: pa.Table, index: int) -> torch.Tensor:
        name = (table["dtype"][index].as_py() if "dtype" in self._columns else None) or "float32"
        if name not in _BYTES_DTYPES:
            raise InvalidLatentsError(f"dtype: got {name!r}, expected {', '.join(_BYTES_DTYPES)}")
        dtype = _BYTES_DTYPES[name]
        if len(data) % dtype.itemsize or not data:
            raise InvalidLatentsError(
                f"latents: got {len(data)} bytes, expected a positive multiple of {dtype.itemsize}"
            )
        flat = torch.frombuffer(bytearray(data), dtype=dtype)
        return flat.reshape(self._shape(shape, flat.numel()))

    def _shape(self, shape: Any, values: int) -> tuple[int, ...]:
        if not shape or math.prod(shape) != values or min(shape) < 1:
            raise InvalidLatentsError(
                f"shape: got {shape} for {values} values; expected (patches, features) or (channels, height/8, "
                "width/8) in a column 'shape'"
            )
        return tuple(shape)


def _ids(value: Any) -> torch.Tensor | None:
    """(1, N, 4), or as it comes, for the check to name; None: row by row."""
    if value is None:
        return None
    try:
        ids = torch.tensor(value, dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise InvalidLatentsError("latent_ids: expected lists of four whole numbers, of equal lengths") from error
    return ids.unsqueeze(0)


def _unnest(array: pa.Array) -> np.ndarray[Any, Any]:
    """Lists within lists, of equal lengths, as one array."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(array.type) for is_kind in kinds):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    inner = _unnest(array.flatten())
    lengths = {len(one) for one in array}
    if len(lengths) != 1:
        raise InvalidLatentsError(f"latents: got lists of {len(lengths)} different lengths, expected equal ones")
    return inner.reshape(len(array), lengths.pop(), *inner.shape[1:])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
