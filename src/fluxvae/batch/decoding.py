"""What a job of decoding does: which images its inputs hold, and how each is read, decoded and written."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from typing import Any

import torch

from fluxvae.batch.folder import left_to_do
from fluxvae.batch.items import Failure, Item
from fluxvae.batch.outlook import Outlook
from fluxvae.batch.outputs import metadata_of, output_type_of, to_bytes, write_output
from fluxvae.batch.settings import Job
from fluxvae.batch.sources import Library, find, scan
from fluxvae.batch.store import Store
from fluxvae.decoder import Decoder
from fluxvae.engine.preview import ApproximateWarning
from fluxvae.errors import (
    DecodeCancelled,
    FluxVAEError,
    InvalidLatentsError,
    InvalidOptionError,
    MemoryLimitError,
    NonFiniteOutputError,
)
from fluxvae.latents.checks import check_options
from fluxvae.latents.request import LatentRequest
from fluxvae.pictures import FORMATS, OutputType, check_format, postprocess

__all__ = ["Decoding", "batch_size", "look"]


class Decoding:
    """The steps of a job of decoding: see `fluxvae.batch.pipeline.Steps`.

    Args:
        decoder: the decoder of the job's checkpoint.
        store: where the images are written to.
        record: the job's record (`folder.record_of`), which is embedded in every image.
    """

    def __init__(self, job: Job, decoder: Decoder, store: Store, record: dict[str, Any]) -> None:
        self._job, self._decoder, self._store, self._record = job, decoder, store, record
        self._library = Library(job.expected(decoder.format))

    def batch(self, height: int, width: int) -> int:
        return batch_size(self._decoder, height, width, self._job.batch)

    def read(self, item: Item) -> LatentRequest:
        """Read the latents of one item, and check them."""
        row = self._library.open(item.source).load(item.row)
        latents = row.tensor.float() if row.tensor.dtype == torch.float64 else row.tensor  # no decoder takes float64
        request = self._decoder.request(latents, replace(item.reading, latent_ids=row.ids))
        if (request.height, request.width) != item.size:
            raise InvalidLatentsError(
                f"height and width: got {item.size[0]}x{item.size[1]} (height x width), but the latents decode to "
                f"{request.height}x{request.width}"
            )
        if request.batch != 1:
            raise InvalidLatentsError(
                f"latents: got {request.batch} layers of {request.height}x{request.width} in packed latents of shape "
                f"{tuple(latents.shape)}; a job makes one picture of each row: keep each layer's tokens as a row"
            )
        return request

    def compute(self, group: list[tuple[Item, LatentRequest]], stop: threading.Event) -> list[tuple[Item, Any]] | None:
        """Decode one batch: the images as `output_type_of` the job's format, without a batch axis."""
        return _decode(group, self._decoder, output_type_of(self._job.format), stop)

    def write(self, item: Item, made: Any) -> None:
        data = to_bytes(made, self._job.format, self._job.quality, metadata_of(item, self._record))
        write_output(self._store, f"{item.name}{self._job.suffix}", data)


def look(job: Job, decoder: Decoder, record: dict[str, Any], store: Store) -> Outlook:
    """Find out what a job has to decode: what its inputs' metadata tell, and which of its images are there already.

    Args:
        job: the job.
        decoder: a decoder of its checkpoint.
        record: the job's record, from `record_of`.
        store: its output folder.

    Raises:
        InvalidOptionError: an input names nothing, the format has no place for the alpha of the images, an image would
            be written over latents, or the output folder holds images that the job may not add to.
    """
    expected = job.expected(decoder.format)
    check_options(decoder.format, expected.reading)
    if job.format in FORMATS:
        check_format(job.format, job.quality, channels=decoder.picture_channels)
    found = find(job.inputs)
    scanned = scan(found, job.suffix, expected, store)
    sources = {store.key(one.url) for one in found}
    for item in scanned.items:
        if store.key(store.url_of(f"{item.name}{job.suffix}")) in sources:
            raise InvalidOptionError(
                f"out: the image of {item.source} would be written over latents: choose a folder of its own for outputs"
            )
    left = left_to_do(scanned.items, store, job, record)
    return Outlook(
        tuple(left),
        len(scanned.items) - len(left),
        tuple(scanned.failures),
        scanned.floored,
        decoder.approximate,
        scanned.skipped,
    )


def batch_size(decoder: Decoder, height: int, width: int, most: int) -> int:
    """The most images of a size that one decode takes without more work per image than one alone; at least 1."""
    try:
        least = decoder.plan(height, width, 1).work_ratio
    except MemoryLimitError:
        return 1  # the decode itself will refuse it and say why
    for batch in range(most, 1, -1):
        try:
            plan = decoder.plan(height, width, batch)
        except MemoryLimitError:
            continue
        if plan.work_ratio <= least and not plan.spill_bytes:
            return batch
    return 1


def _decode(
    group: list[tuple[Item, LatentRequest]], decoder: Decoder, output_type: OutputType, stop: threading.Event
) -> list[tuple[Item, Any]] | None:
    """Decode one batch. Return the image or the failure of each item, or None where the job was stopped."""
    result: list[tuple[Item, Any]] = []
    # Packed and unpacked latents, with ids and without, raw and not, or of two dtypes may share a size.
    kinds: dict[Any, list[tuple[Item, LatentRequest]]] = {}
    for item, found in group:
        kinds.setdefault(found.key, []).append((item, found))
    for pairs in kinds.values():
        try:
            result += _decode_same(pairs, decoder, output_type, stop)
        except DecodeCancelled:
            return None
    return result


def _decode_same(
    pairs: list[tuple[Item, LatentRequest]], decoder: Decoder, output_type: OutputType, stop: threading.Event
) -> list[tuple[Item, Any]]:
    first = pairs[0][0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ApproximateWarning)  # it is told once, and in every file
            together = LatentRequest.together([request for _, request in pairs])
            raw = decoder.decode_request(together, cancel=stop.is_set)
    except DecodeCancelled:
        raise
    except NonFiniteOutputError as error:
        if len(pairs) == 1:
            return [(first, Failure.of(error, first.source, first.row, first.name))]
        # One of them caused it. Decoded alone, the others give the same bits as in a batch.
        return [done for pair in pairs for done in _decode_same([pair], decoder, output_type, stop)]
    except (FluxVAEError, MemoryError, torch.OutOfMemoryError) as error:
        return [(item, Failure.of(error, item.source, item.row, item.name)) for item, _ in pairs]
    images = postprocess(raw, output_type)
    return [(item, image) for (item, _), image in zip(pairs, images, strict=True)]
