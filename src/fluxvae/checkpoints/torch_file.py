"""Reads a file that ``torch.save`` wrote by ``torch.load(weights_only=True)``, which runs no code from the file."""

from __future__ import annotations

import mmap
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvae.checkpoints.entries import Entry
from fluxvae.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch

__all__ = ["TorchFile"]

_CONVERT = (
    "fluxvae runs no code from a checkpoint. If you trust the file, convert it where you trust it: load it with "
    "torch.load(path, weights_only=False) and write the VAE's tensors with safetensors.torch.save_file"
)


class TorchFile:
    """The tensors of a file that ``torch.save`` wrote.

    Nested dictionaries are flattened into one: the tensor in ``{"state_dict": {"a.b": ...}}`` is ``state_dict.a.b``.
    Files in the format of PyTorch 1.6 and later are mapped rather than read, so that a tensor takes memory only once it
    is asked for.

    Raises:
        CheckpointError: the file is truncated, damaged, of another kind, or holds anything that could run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._tensors = dict(_flatten(self._load()))
        for name, tensor in self._tensors.items():
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise CheckpointError(
                    f"checkpoint: {path} stores {name} as {tuple(tensor.shape)} values, of which the file holds "
                    f"{tensor.untyped_storage().nbytes()} bytes only; expected whole tensors: save it with "
                    "tensor.contiguous(), as safetensors"
                )
        self.entries = {
            name: Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), path)
            for name, tensor in self._tensors.items()
        }

    def _load(self) -> Any:
        import torch

        zipped = self._check_zip()
        try:
            with warnings.catch_warnings():  # PyTorch warns of what it then refuses, and our error says it better
                warnings.simplefilter("ignore")
                # torch.load goes by this suffix, which is wrong here: given an open file, it looks at the content.
                if self.path.suffix == ".safetensors":
                    with self.path.open("rb") as file:
                        return torch.load(file, map_location="cpu", weights_only=True)
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            if "truncated" in str(error):
                raise self._truncated(first_line(error)) from error
            raise CheckpointError(
                f"checkpoint: {self.path} holds more than tensors, and PyTorch's safe reading refuses it "
                f"({_reason(error)}). {_CONVERT}"
            ) from error
        except (EOFError, struct.error) as error:
            raise self._truncated("it ends within the list of its tensors") from error
        except Exception as error:  # damaged bytes are read as instructions, which may fail in any way there is
            if str(error) == "index out of range":  # this is how it fails where the bytes end too early
                raise self._truncated("it ends within the list of its tensors") from error
            if "unexpected EOF" in str(error):
                raise self._truncated(first_line(error)) from error
            raise CheckpointError(
                f"checkpoint: {self.path} cannot be read by torch.load: {first_line(error)}; it is damaged or another "
                "kind of file: download it again, or convert it to safetensors"
            ) from error

    def _check_zip(self) -> bool:
        """Return whether the file is a zip archive, as torch.save writes them since PyTorch 1.6.

        An archive that torch.save would not have written is refused before anything in it is unpacked.
        """
        with self.path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._check_pickles([data])
                return False
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
                pickles = [one for one in members if one.filename.endswith(".pkl")]
                if all(one.compress_type == zipfile.ZIP_STORED for one in pickles):
                    self._check_pickles(archive.read(one) for one in pickles)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise self._truncated(f"{first_line(error)}: the table at the end of it is missing") from error
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise CheckpointError(
                f"checkpoint: {self.path} is a TorchScript archive, a program rather than weights. {_CONVERT}"
            )
        if not any(member.filename.endswith("data.pkl") for member in members):
            raise CheckpointError(
                f"checkpoint: {self.path} is a zip archive that torch.save did not write; expected safetensors, or "
                "weights written by torch.save: unpack it first"
            )
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(
                f"checkpoint: {self.path} is a compressed archive, as torch.save writes none; it could unpack to any "
                "size and is not read: convert it to safetensors"
            )
        return True

    def _check_pickles(self, pickles: Iterable[bytes | mmap.mmap]) -> None:
        """Refuse a bytearray: of all that PyTorch allows in a pickle, only it can take any memory by a number alone."""
        if any(data.find(b"\nbytearray\n") >= 0 for data in pickles):
            raise CheckpointError(f"checkpoint: {self.path} is refused, for it holds a bytearray. {_CONVERT}")

    def _truncated(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint: {self.path} is not a whole file of torch.save: it is truncated: {what}; download it again"
        )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Copy these tensors one after another into memory of their own, on the CPU, as `files.Weights.read` says."""
        for name in names:
            yield name, self._tensors[name].detach().clone()


def _flatten(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided and not value.is_quantized:
            yield path, value
    elif isinstance(value, Mapping) and depth < 8:
        for key, item in value.items():
            yield from _flatten(item, f"{path}.{key}" if path else str(key), depth + 1)


def _reason(error: BaseException) -> str:
    """Return the line of PyTorch's message that names what was refused, at most 160 characters of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "GLOBAL" in line or "nsupported" in line), lines[0] if lines else "no reason"
    )[:160]
