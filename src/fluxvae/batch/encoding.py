"""What a job of encoding does: which pictures its inputs hold, and how each is read, encoded and written."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from fluxvae.batch.albums import INPUT_SUFFIXES, Albums, Member, open_album
from fluxvae.batch.encode_settings import EncodeJob
from fluxvae.batch.fitting import Buckets, Fit, fit, fitted
from fluxvae.batch.folder import left_to_do
from fluxvae.batch.items import Failure, Item
from fluxvae.batch.names import output_name, with_row
from fluxvae.batch.outlook import Outlook
from fluxvae.batch.outputs import write_output
from fluxvae.batch.sources import Found, find
from fluxvae.batch.store import Store
from fluxvae.encoder import Encoder
from fluxvae.engine.preview import ApproximateWarning
from fluxvae.errors import (
    DecodeCancelled,
    FluxVAEError,
    InvalidImagesError,
    InvalidLatentsError,
    first_line,
)
from fluxvae.latents.format import PREVIEW_LATENTS_NOTE
from fluxvae.latents.reading import Reading
from fluxvae.photographs import picture_of, size_of

__all__ = ["METADATA_KEYS", "Encoding", "look"]

METADATA_KEYS = ("checkpoint", "checkpoint_sha256", "engine", "dtype", "seed", "fluxvae")
_SCANNERS = 8


class Encoding:
    """The steps of a job of encoding: see `fluxvae.batch.pipeline.Steps`.

    Args:
        encoder: the encoder of the job's checkpoint.
        store: where the latents are written to.
        record: the job's record (`folder.record_of`), part of which is in the metadata of every file.
    """

    def __init__(self, job: EncodeJob, encoder: Encoder, store: Store, record: dict[str, Any]) -> None:
        self._job, self._encoder, self._store, self._record = job, encoder, store, record
        self._albums = Albums()

    def batch(self, height: int, width: int) -> int:
        """One: pictures are encoded one by one anyway, and a CPU is no faster with more."""
        return 1

    def read(self, item: Item) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
        """Read the pixels of one picture, made to fit, and its own size."""
        album, name = self._albums.open(item.source), item.name
        with album.read(item.row) as data:
            size = size_of(name, data, self._job.max_pixels, turned=self._job.cache is None)
            wanted = _fit(self._job, size, self._job.multiple(self._encoder.format))
            if wanted.size != item.size:
                raise InvalidImagesError(f"{name}: has changed since the job began")
            data.seek(0)
            picture = picture_of(
                name,
                data,
                self._job.max_pixels,
                channels=self._encoder.picture_channels,
                background=self._job.background,
            )
            return fitted(picture, wanted), size

    def compute(self, group: list[tuple[Item, Any]], stop: threading.Event) -> list[tuple[Item, Any]] | None:
        """Encode one picture: its latents with a batch axis of 1, on the CPU, and the picture's own size."""
        made: list[tuple[Item, Any]] = []
        cache = self._job.cache
        for item, (pixels, size) in group:
            sample = None if self._job.seed is None else _generator(self._job.seed, item.name)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ApproximateWarning)  # it is told once, and in every file
                    latents = self._encoder.encode(
                        pixels,
                        packed=self._job.packed and cache is None,
                        raw=cache is not None and cache.raw,
                        sample=sample,
                        cancel=stop.is_set,
                    )
            except DecodeCancelled:
                return None
            except (FluxVAEError, MemoryError, torch.OutOfMemoryError) as error:
                made.append((item, Failure.of(error, item.source, item.row, item.name)))
            else:
                made.append((item, (latents.cpu(), size)))
        return made

    def write(self, item: Item, made: tuple[torch.Tensor, tuple[int, int]]) -> None:
        latents, size = made
        cache = self._job.cache
        content = self._safetensors(item, latents, size) if cache is None else cache.write(latents, item.size, size)
        write_output(self._store, f"{item.name}{self._job.suffix}", content)

    def _safetensors(self, item: Item, latents: torch.Tensor, size: tuple[int, int]) -> bytes:
        height, width = item.size
        metadata = {
            "height": str(height), "width": str(width), "raw": "false", "source": item.source, "row": str(item.row),
            "picture_height": str(size[0]), "picture_width": str(size[1]), "sizes": self._job.sizes,
        }  # fmt: skip
        metadata |= {key: str(self._record[key]) for key in METADATA_KEYS if self._record[key] is not None}
        if self._record["approximate"]:
            metadata["approximate"] = PREVIEW_LATENTS_NOTE
        return bytes(save({"latents": latents.contiguous()}, metadata))


def look(job: EncodeJob, encoder: Encoder, record: dict[str, Any], store: Store) -> Outlook:
    """Find out what a job has to encode: what the headers of its pictures tell, and which latents are there already.

    Raises:
        InvalidOptionError: an input names nothing, the checkpoint cannot make what is asked for, or the output folder
            holds latents that the job may not add to.
    """
    job.check(encoder.format)
    items: list[Item] = []
    failures: list[Failure] = []
    taken: dict[str, str] = {}
    multiple = job.multiple(encoder.format)
    found = find(job.inputs, INPUT_SUFFIXES, "pictures")
    with ThreadPoolExecutor(_SCANNERS) as threads:
        for one, entries in zip(found, threads.map(lambda one: list(_entries(job, one, multiple)), found), strict=True):
            for member, size, own, problem in entries:
                name = None
                try:
                    if problem is not None:
                        raise problem
                    assert size is not None
                    assert own is not None
                    name = _name(job, one, member, len(entries), own, store)
                    key = store.key(name)
                    if key in taken:
                        raise InvalidImagesError(
                            f"name: {name}{job.suffix} is also the output of {taken[key]}; rename one of them, or "
                            "encode them into folders of their own"
                        )
                except FluxVAEError as error:
                    failures.append(Failure.of(error, one.url, None if member is None else member.row, name))
                    continue
                taken[key] = one.url
                assert member is not None
                items.append(Item(one.url, member.row, name, Reading(height=size[0], width=size[1])))
    left = left_to_do(items, store, job, record)
    return Outlook(tuple(left), len(items) - len(left), tuple(failures), 0, encoder.approximate)


_Entry = tuple["Member | None", "tuple[int, int] | None", "tuple[int, int] | None", "FluxVAEError | None"]
"""A picture, the size that it is encoded at, its own size, and what is wrong with it."""


def _entries(job: EncodeJob, found: Found, multiple: int) -> Iterator[_Entry]:
    """Look at every picture of one file."""
    try:
        album = open_album(found.url)
        members = album.members()
    except FluxVAEError as error:
        yield None, None, None, error
        return
    try:
        for member in members:
            try:
                with album.read(member.row) as data:
                    own = size_of(member.name or found.name, data, job.max_pixels, turned=job.cache is None)
                yield member, _fit(job, own, multiple).size, own, None
            except FluxVAEError as error:
                yield member, None, None, error
            except Exception as error:  # whatever a library raises for a bad picture, the others are still encoded
                yield member, None, None, _unreadable(found.name, error)
    except Exception as error:
        yield None, None, None, _unreadable(found.name, error)


def _unreadable(name: str, error: Exception) -> InvalidImagesError:
    return InvalidImagesError(f"{name}: cannot be read: {type(error).__name__}: {first_line(error)}")


def _name(job: EncodeJob, found: Found, member: Member | None, count: int, own: tuple[int, int], store: Store) -> str:
    """The name of a picture's output: its own within its file, else the file's."""
    assert member is not None
    name = member.name or with_row(found.name, member.row, count)
    if job.cache is not None:
        name = job.cache.stem(name, own)
    try:
        name = output_name(name, job.suffix)
        store.check(name)
        return name
    except InvalidLatentsError as error:  # names of latents and of pictures are checked alike
        raise InvalidImagesError(str(error)) from error


def _fit(job: EncodeJob, size: tuple[int, int], multiple: int) -> Fit:
    return fit(size, multiple, job.sizes, Buckets(job.bucket, job.bucket_area))


def _generator(seed: int, name: str) -> torch.Generator:
    """The generator for one picture: on the CPU, so that it draws the same whenever and wherever that is encoded."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
