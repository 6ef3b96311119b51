"""Reads files of latents: safetensors (also those that end in ``.latent``), npy, npz and pt.

A file's header tells which images the file holds. The latents of one image, called a row, are read only when they are
asked for.

In fluxvae's own layout the latents are a tensor of shape ``(B, N, 4C)`` or ``(B, C, lh, lw)``, or those of one image
without its batch axis (see `readings`). Where the format gives tensors names, this one is called ``latents``, or it is
the only one. Beside it there may be ``height`` and ``width`` in pixels and ``raw`` (the latents are raw already, so
nothing is rescaled), each with one value for all rows or one for each row. FLUX.2's packed latents may also have
``latent_ids`` of shape ``(N, 4)`` or ``(B, N, 4)``. Files of other programs are recognised by the names that those
programs use (see `caches`).

`headers` reads the four kinds of file. Here their tensors become images.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import torch

from fluxvae.batch.caches import Contents, Picture, pictures_of
from fluxvae.batch.headers import DAMAGE, READERS
from fluxvae.batch.items import Entry, Latents
from fluxvae.batch.readings import Expected, Images, read_shape
from fluxvae.batch.tensors import Lazy
from fluxvae.claims import check_packing, check_rows, is_special
from fluxvae.errors import InvalidLatentsError, first_line
from fluxvae.latents.reading import Reading

__all__ = ["Source", "TensorSource", "unreadable"]


class Source(Protocol):
    """One open file of latents."""

    def entries(self) -> list[Entry]:
        """List the images that the file holds, as its header tells them.

        The list is empty where the file is known to hold something else, such as what a text encoder gave.

        Raises:
            InvalidLatentsError: what stands beside the latents does not fit them, or claims more than it may.
        """

    def load(self, row: int) -> Latents:
        """Read the latents of one image.

        Args:
            row: the image's number in this file, as `Entry.row` has it.

        Raises:
            InvalidLatentsError: they cannot be read.
        """


class TensorSource:
    """A file of tensors, some of which are latents; the images' sizes and their tokens' ids may stand beside them.

    Args:
        path: the file, on this machine.
        expected: how the job reads its inputs.

    Raises:
        InvalidLatentsError: the file cannot be read, is not what its suffix says, holds no latents, or claims more
            than it may.
    """

    def __init__(self, path: Path, expected: Expected) -> None:
        self._name = path.name
        try:
            if is_special(path):
                raise InvalidLatentsError(f"{path.name}: is a pipe, a device or a folder; expected a file of latents")
            with open(path, "rb"):
                pass  # opened only for the system's reason, because safetensors calls every unreadable file missing
        except OSError as error:
            raise InvalidLatentsError(unreadable(path.name, error)) from error
        try:
            held = READERS[path.suffix.lower()](path)
            found = pictures_of(held, expected)
            self._pictures = [_plain(held)] if found is None else found
        except InvalidLatentsError:
            raise
        except DAMAGE as error:
            raise InvalidLatentsError(
                f"{path.name}: cannot be read as {path.suffix[1:]}: {first_line(error)}; it is damaged, truncated or "
                "another kind of file: make it again"
            ) from error
        self._images = [self._read(picture, expected, path.stat().st_size) for picture in self._pictures]
        check_rows(path.name, sum(images.rows for images in self._images))

    def _read(self, picture: Picture, expected: Expected, stored: int) -> Images:
        """Return how a picture's tensor is divided into images; refuse it if it claims far more than is stored."""
        tensor = picture.tensor
        itemsize = getattr(getattr(torch, tensor.dtype, None), "itemsize", 1)
        check_packing(self._name, math.prod(tensor.shape) * itemsize, stored)
        said, ids = expected.reading, picture.ids is not None
        height, width = (
            picture.height if said.height is None else said.height,
            picture.width if said.width is None else said.width,
        )
        return read_shape(expected.format, tensor.shape, height, width, ids=ids, one=picture.one)

    def entries(self) -> list[Entry]:
        """List the images of all pictures in the file, each with its size where the file tells it."""
        found: list[Entry] = []
        for picture, images in zip(self._pictures, self._images, strict=True):
            found += self._entries(picture, images, len(found))
        return found

    def _entries(self, picture: Picture, images: Images, first: int) -> list[Entry]:
        rows = images.rows
        heights, widths = _per_row("height", picture.height, rows), _per_row("width", picture.width, rows)
        raws = _per_row("raw", picture.raw, rows)
        orders = _per_row("feature_order", picture.feature_order, rows)
        if picture.ids is not None:
            _check_ids(self._name, picture.ids.shape, images)
        sized = [heights[row] is not None and widths[row] is not None for row in range(rows)]
        ids = [None if picture.ids is None or sized[row] else _ids_of(picture.ids, row) for row in range(rows)]
        return [
            Entry(
                first + row,
                images.shape,
                picture.tensor.dtype,
                Reading(
                    height=heights[row],
                    width=widths[row],
                    latent_ids=ids[row],
                    raw=raws[row],
                    feature_order=orders[row],
                ),
                label=picture.label,
                ask=picture.ask,
            )
            for row in range(rows)
        ]

    def load(self, row: int) -> Latents:
        """Read one row, and where the format allows it nothing else."""
        try:
            for picture, images in zip(self._pictures, self._images, strict=True):
                if row < images.rows:
                    ids = None if picture.ids is None else _ids_of(picture.ids, row)
                    return Latents(images.row(picture.tensor, row), ids)
                row -= images.rows
            raise IndexError("it is not there")
        except (*DAMAGE, IndexError) as error:
            raise InvalidLatentsError(f"{self._name}: row {row} cannot be read: {first_line(error)}") from error


def unreadable(name: str, error: OSError) -> str:
    """Return the message for a file that the system does not let this process read."""
    return f"{name}: cannot be read: {error.strerror or error}; see that it is there and may be read"


# -- the layout that is fluxvae's own ----------------------------------------------------------------------------------

_BESIDE = ("height", "width", "raw", "feature_order", "latent_ids")


def _plain(held: Contents) -> Picture:
    names = [name for name in held.tensors if name not in _BESIDE]
    if "latents" not in names and len(names) != 1:
        raise InvalidLatentsError(
            f"{held.name}: holds {', '.join(sorted(names)[:5]) or 'nothing'}; expected a tensor named 'latents', or "
            "one tensor only"
        )
    return Picture(
        held.tensors["latents" if "latents" in names else names[0]],
        height=_number(_beside(held, "height")),
        width=_number(_beside(held, "width")),
        raw=_truth(_beside(held, "raw")),
        feature_order=_beside(held, "feature_order"),
        ids=held.tensors.get("latent_ids"),
    )


def _beside(held: Contents, name: str) -> Any:
    if name not in held.tensors:
        return held.values.get(name)
    tensor = held.tensors[name]
    check_rows(f"{held.name}: {name}", math.prod(tensor.shape))
    return tensor.whole().tolist()


def _number(value: Any) -> object:
    """Turn a text of digits into a number, because metadata are texts. Anything else the checks refuse."""
    return int(value) if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() else value


def _truth(value: Any) -> object:
    """Turn ``"true"`` and ``"false"`` into a bool, because metadata are texts. Anything else the checks refuse."""
    return {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value


def _per_row(name: str, value: Any, rows: int) -> list[Any]:
    """Return one value for each row, from a single value for all rows or a list with one for each.

    Raises:
        InvalidLatentsError: the list has another length.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * rows
    if len(value) != rows:
        raise InvalidLatentsError(f"{name}: got {len(value)} of them for {rows} latents; expected one, or one for each")
    return list(value)


def _check_ids(name: str, shape: tuple[int, ...], images: Images) -> None:
    rows, patches = images.rows, images.shape[1]
    if shape not in ((patches, 4), (rows, patches, 4)):
        raise InvalidLatentsError(
            f"{name}: latent_ids: got shape {shape} for {rows} latents of {patches} patches; expected "
            f"({patches}, 4), or ({rows}, {patches}, 4)"
        )


def _ids_of(ids: Lazy, row: int) -> torch.Tensor:
    """Read the position ids of one row, of shape (1, N, 4)."""
    return ids.whole().unsqueeze(0) if len(ids.shape) == 2 else ids.rows(row)
