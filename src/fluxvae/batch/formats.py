"""Files of latents: safetensors, npy, npz, pt. What they hold, read from their headers where they have one, and rows.

In every one of them the latents are a tensor ``(B, N, 4C)`` or ``(B, C, lh, lw)`` (or one image without its batch axis
where that is unambiguous: ``(N, 4C)``), named ``latents`` where things have names, or the only one there. Beside it are
``height``, ``width`` and ``raw`` (FLUX.2: nothing is to be rescaled), one for all rows or one for each, and, also of
FLUX.2, ``latent_ids`` ``(N, 4)`` or ``(B, N, 4)``. Nothing here runs code that a file brings along.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fluxvae.batch.items import Entry, Latents
from fluxvae.errors import InvalidLatentsError

__all__ = ["FILE_SUFFIXES", "Source", "open_file", "unreadable"]

# What libraries raise for files that are damaged or of another kind.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, RuntimeError, SafetensorError, zipfile.BadZipFile)


class Source(Protocol):
    """One open file of latents."""

    def entries(self) -> list[Entry]:
        """What it holds, row by row.

        Raises:
            InvalidLatentsError: not what its suffix says, or without latents.
        """

    def load(self, row: int) -> Latents:
        """One row."""


class TensorSource:
    """A file that is one tensor with, perhaps, its size and ids."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with open(path, "rb"):
                pass  # safetensors calls every file that it may not read missing
        except OSError as error:
            raise InvalidLatentsError(unreadable(path.name, error)) from error
        try:
            self._held = _READERS[path.suffix.lower()](path)
        except pickle.UnpicklingError as error:
            raise InvalidLatentsError(
                f"{path.name}: refused, for it holds a pickle of more than tensors, which could run code when it is "
                f"read ({_first_line(error)}); save the latents alone: torch.save({{'latents': tensor, 'height': 1024, "
                "'width': 1024}, path), or as safetensors"
            ) from error
        except InvalidLatentsError:
            raise
        except _DAMAGE as error:
            raise InvalidLatentsError(
                f"{path.name}: cannot be read as {path.suffix[1:]}: {_first_line(error)}; it is damaged, truncated or "
                "another kind of file: make it again"
            ) from error

    def entries(self) -> list[Entry]:
        """Rows of the tensor, with their size where the file tells it."""
        held = self._held
        shape, dtype = held.tensor.shape, held.tensor.dtype
        if len(shape) == 2:
            shape = (1, *shape)
        if len(shape) not in (3, 4) or not shape[0]:
            raise InvalidLatentsError(
                f"{self._path.name}: latents: got shape {tuple(held.tensor.shape)}, expected (batch, patches, "
                "features) or (batch, channels, height/8, width/8)"
            )
        rows = shape[0]
        heights, widths = _per_row("height", held.height, rows), _per_row("width", held.width, rows)
        raws = _per_row("raw", held.raw, rows)
        if held.ids is not None and (len(held.ids.shape) not in (2, 3) or held.ids.shape[:-2] not in ((), (rows,))):
            raise InvalidLatentsError(
                f"{self._path.name}: latent_ids: got shape {held.ids.shape} for {rows} latents; expected (patches, 4), "
                f"or ({rows}, patches, 4)"
            )
        sized = [heights[row] is not None and widths[row] is not None for row in range(rows)]
        ids = [None if held.ids is None or sized[row] else held.ids.row(row) for row in range(rows)]
        one = (1, *shape[1:])
        return [Entry(row, one, dtype, heights[row], widths[row], raw=raws[row], ids=ids[row]) for row in range(rows)]

    def load(self, row: int) -> Latents:
        """One row; from safetensors and npy without reading the others."""
        try:
            ids = None if self._held.ids is None else self._held.ids.row(row)
            return Latents(self._held.tensor.row(row), ids)
        except _DAMAGE as error:
            raise InvalidLatentsError(f"{self._path.name}: row {row} cannot be read: {_first_line(error)}") from error


def unreadable(name: str, error: OSError) -> str:
    """The words for a file that the system does not give."""
    return f"{name}: cannot be read: {error.strerror or error}; see that it is there and may be read"


def open_file(path: Path) -> Source:
    """Open a local file by its suffix, one of `FILE_SUFFIXES`.

    Raises:
        InvalidLatentsError: damaged, refused, or without latents.
    """
    return TensorSource(path)


# -- tensors whose rows are read when asked for ----------------------------------------------------------------------


class _Lazy:
    """A tensor of a file: its shape now, its rows later."""

    def __init__(self, shape: tuple[int, ...], dtype: str, take: Any) -> None:
        self.shape, self.dtype, self._take = shape, dtype, take

    def row(self, row: int) -> torch.Tensor:
        if len(self.shape) == 2:
            return self._tensor(self._take[:]).unsqueeze(0)
        return self._tensor(self._take[row : row + 1])

    @staticmethod
    def _tensor(value: Any) -> torch.Tensor:
        return value.clone() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))


def _lazy(value: Any, name: str) -> _Lazy:
    if isinstance(value, torch.Tensor):
        return _Lazy(tuple(value.shape), str(value.dtype).removeprefix("torch."), value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return _Lazy(value.shape, str(value.dtype), value)
    raise InvalidLatentsError(f"{name}: latents: got {type(value).__name__}, expected a tensor")


@dataclass(frozen=True)
class _Held:
    """What one file holds."""

    tensor: _Lazy
    height: Any = None
    width: Any = None
    raw: Any = None
    ids: _Lazy | None = None


_BESIDE = ("height", "width", "raw", "latent_ids")
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def _safetensors(path: Path) -> _Held:
    file: Any = safe_open(path, framework="pt")
    keys, metadata = list(file.keys()), file.metadata() or {}

    def lazy(key: str) -> _Lazy:
        taken = file.get_slice(key)
        return _Lazy(tuple(taken.get_shape()), _SAFETENSORS_DTYPES.get(taken.get_dtype(), taken.get_dtype()), taken)

    return _Held(
        lazy(_only("latents", [key for key in keys if key not in _BESIDE], path)),
        _number(metadata.get("height")),
        _number(metadata.get("width")),
        _truth(metadata.get("raw")),
        lazy("latent_ids") if "latent_ids" in keys else None,
    )


def _npy(path: Path) -> _Held:
    return _Held(_lazy(np.load(path, mmap_mode="r", allow_pickle=False), path.name))


def _npz(path: Path) -> _Held:
    with np.load(path, allow_pickle=False) as file:
        held = {key: file[key] for key in file.files}
    return _from_mapping(held, path)


def _pt(path: Path) -> _Held:
    held = torch.load(path, map_location="cpu", weights_only=True)
    return _from_mapping(held, path) if isinstance(held, Mapping) else _Held(_lazy(held, path.name))


def _from_mapping(held: Mapping[str, Any], path: Path) -> _Held:
    key = _only("latents", [key for key in held if key not in _BESIDE], path)
    ids = _lazy(held["latent_ids"], path.name) if held.get("latent_ids") is not None else None
    return _Held(_lazy(held[key], path.name), held.get("height"), held.get("width"), held.get("raw"), ids)


_READERS = {".safetensors": _safetensors, ".npy": _npy, ".npz": _npz, ".pt": _pt, ".pth": _pt}
FILE_SUFFIXES = tuple(_READERS)


def _only(wanted: str, keys: list[str], path: Path) -> str:
    if wanted in keys:
        return wanted
    if len(keys) == 1:
        return keys[0]
    raise InvalidLatentsError(
        f"{path.name}: holds {', '.join(map(str, sorted(keys)[:5])) or 'nothing'}; expected a tensor named {wanted!r}, "
        "or one tensor only"
    )


def _number(text: str | None) -> object:
    """A number of safetensors' metadata, which are texts; left as it is where it is none, for the check to name."""
    return int(text) if text is not None and text.strip().isascii() and text.strip().isdigit() else text


def _truth(text: str | None) -> object:
    """``true`` or ``false`` of safetensors' metadata; left as it is where it is neither, for the check to name."""
    return {"true": True, "false": False}.get(text.strip().lower(), text) if text is not None else None


def _per_row(name: str, value: Any, rows: int) -> list[Any]:
    """One value for each row, of one for all or one for each."""
    array = value.numpy() if isinstance(value, torch.Tensor) else value
    values = array.tolist() if isinstance(array, np.ndarray) else array
    if not isinstance(values, (list, tuple)):
        return [values] * rows
    if len(values) != rows:
        raise InvalidLatentsError(
            f"{name}: got {len(values)} of them for {rows} latents; expected one, or one for each"
        )
    return list(values)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
