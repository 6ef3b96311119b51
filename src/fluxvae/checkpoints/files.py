"""The tensors of one file, or of several shards, whatever kind of file it is: their names and shapes, and their values.

The kind of a file is told by its first bytes, because suffixes are often wrong. Only headers are read until a tensor
is asked for, so a checkpoint that also holds a transformer costs no more than its VAE does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxvae.checkpoints.entries import Entry
from fluxvae.checkpoints.safetensors_file import SafetensorsFile
from fluxvae.checkpoints.torch_file import TorchFile
from fluxvae.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["SUFFIXES", "Weights", "is_safetensors", "open_weights"]

SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")
"""The suffixes of files that may hold weights. They only help to find files; what a file is, its content decides."""


@dataclass(frozen=True)
class Weights:
    """The tensors of one file, or of all shards of one checkpoint. Their values are read only when asked for."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    """Text that the writers of safetensors files added to the headers; empty for files of ``torch.save``."""
    _files: tuple[SafetensorsFile | TorchFile, ...]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read the tensors of these names one after another.

        Returns:
            Pairs of a name and its tensor, on the CPU, in the shape and dtype that the file has. A tensor shares no
            memory with the file, so that what is written to the file later changes nothing.

        Raises:
            CheckpointError: the file has become shorter, or holds a dtype that this PyTorch does not know.
        """
        wanted = set(names)
        for file in self._files:
            yield from file.read(
                [name for name in file.entries if name in wanted and self.entries[name].path == file.path]
            )


def open_weights(paths: Iterable[Path]) -> Weights:
    """Read the headers of these files: what they hold, without the tensors' values.

    Raises:
        CheckpointError: a file cannot be read, is truncated or damaged, or is of a kind that is not read here; the
            message names the file and its kind. Also where two of the files hold a tensor of the same name.
    """
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    files: list[SafetensorsFile | TorchFile] = []
    for path in paths:
        file = SafetensorsFile(path) if _kind(path) == "safetensors" else TorchFile(path)
        for name, entry in file.entries.items():
            if name in entries:
                raise CheckpointError(
                    f"checkpoint: {path} and {entries[name].path} both hold {name}, so they are not shards of one "
                    "checkpoint; download them again, or keep one of them there"
                )
            entries[name] = entry
        metadata |= file.metadata
        files.append(file)
    return Weights(entries, metadata, tuple(files))


def is_safetensors(path: Path) -> bool:
    """Return whether the file starts as a safetensors file does: the JSON header begins after 8 bytes of length."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _kind(path: Path) -> str:
    """Return ``"safetensors"`` or ``"torch"``, told by the file's first bytes, or refuse any other kind by its name."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {error.strerror or error}") from error
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = None
    if not start:
        found = "is empty (0 bytes)"
    elif start.startswith(b"GGUF"):
        raise CheckpointError(
            f"checkpoint: {path} is a GGUF file, which is not read here; expected safetensors, or weights written by "
            "torch.save: use the VAE's safetensors file, such as ae.safetensors"
        )
    elif start.startswith(b"version https://git-lfs"):
        found = "is a Git LFS pointer: the text that stands for the file, not the file; run `git lfs pull` there, or"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        found = "is a web page, which a browser or a download tool saved in the place of the file"
    if found is not None:
        raise CheckpointError(f"checkpoint: {path} {found}; download it again".replace("or; ", "or "))
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in b"\x01\x02\x03\x04\x05"):
        return "torch"
    if start[8:9] == b"{" or path.suffix in (".safetensors", ".sft"):
        return "safetensors"
    raise CheckpointError(
        f"checkpoint: {path} is neither a safetensors file nor one written by torch.save: it starts with "
        f"{start[:16]!r}; expected a VAE's weights: download it again, or convert it to safetensors"
    )
