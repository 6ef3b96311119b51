"""Reads a safetensors file: its header, and the values of single tensors.

The safetensors package is not used for this, for two reasons. An error must tell a file that ends early from a damaged
one, and both from another kind of file, so the header is read and checked here. And the package's tensors are a memory
map of the file, so that writing to the file later would change weights that are already loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvae.checkpoints.entries import DTYPES, Entry
from fluxvae.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch

__all__ = ["SafetensorsFile"]

_LONGEST_HEADER = 100_000_000
"""The longest header, in bytes, that the safetensors format itself allows."""


class SafetensorsFile:
    """A safetensors file: 8 bytes with the header's length, the header in JSON, then the bytes of all tensors.

    Raises:
        CheckpointError: the file is truncated, damaged, or of another kind; the tensors must fill it without a gap.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._offsets: dict[str, tuple[int, int]] = {}
        header, start, size = self._read_header()
        metadata = header.pop("__metadata__", {})
        if isinstance(metadata, dict):
            self.metadata = {str(name): str(value) for name, value in metadata.items()}
        for name, fields in header.items():
            self._add(name, fields, start)
        end = start
        for name in sorted(self._offsets, key=self._offsets.__getitem__):
            begin, stop = self._offsets[name]
            if begin != end:
                raise self._damaged(f"{name} is said to begin at byte {begin - start}, expected {end - start}")
            end = stop
        if end > size:
            raise self._truncated(f"its header lists tensors up to byte {end}, and the file has {size} bytes")
        if end < size:
            raise self._damaged(f"its header lists tensors up to byte {end}, and the file has {size} bytes")

    def _read_header(self) -> tuple[dict[str, Any], int, int]:
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 9:
                raise self._truncated(f"it has {size} bytes")
            if length > _LONGEST_HEADER:
                raise self._damaged(f"it claims a header of {length} bytes; the format allows {_LONGEST_HEADER}")
            if file.read(1) != b"{":
                raise self._damaged("no header follows its first 8 bytes")
            if 8 + length > size:
                raise self._truncated(f"its header is of {length} bytes, and the file has {size} bytes")
            file.seek(8)
            text = file.read(length)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is not JSON: {first_line(error)}") from error
        return header, 8 + length, size

    def _add(self, name: str, fields: object, start: int) -> None:
        match fields:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
                0 <= begin <= end and all(type(length) is int and length >= 0 for length in shape)
            ):
                pass
            case _:
                raise self._damaged(f"its header says of {name}: {str(fields)[:80]}")
        torch_name, itemsize = DTYPES.get(dtype, (dtype, None))
        if itemsize is not None and math.prod(shape) * itemsize != end - begin:
            raise self._damaged(f"{name}, {dtype} {shape}, has {end - begin} bytes by its header")
        self.entries[name] = Entry(tuple(shape), torch_name, self.path)
        self._offsets[name] = (start + begin, start + end)

    def _truncated(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint: {self.path} is not a whole safetensors file: it is truncated: {what}; download it again"
        )

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint: {self.path} is not a whole safetensors file: {what}; it is damaged or another kind of file: "
            "download it again"
        )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read these tensors one after another into memory of their own, on the CPU, as `files.Weights.read` says."""
        import torch

        with self.path.open("rb", buffering=0) as file:
            for name in names:
                entry, (begin, end) = self.entries[name], self._offsets[name]
                dtype = getattr(torch, entry.dtype, None)
                if not isinstance(dtype, torch.dtype):
                    raise CheckpointError(
                        f"checkpoint: {self.path} stores {name} as {entry.dtype}, which this PyTorch does not know; "
                        "convert it to float32, bfloat16 or float16"
                    )
                data = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
                room = memoryview(data.numpy())  # type: ignore[arg-type]
                file.seek(begin)
                while room:
                    count = file.readinto(room)
                    if not count:
                        raise self._truncated(f"it ended within {name} while it was read")
                    room = room[count:]
                yield name, data.view(dtype).reshape(entry.shape)
