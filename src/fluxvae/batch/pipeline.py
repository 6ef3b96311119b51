"""Reading, decoding and writing at the same time, on one decoder.

    reader threads --(a few batches ahead)--> this thread decodes --(bounded)--> writer threads

Everything else happens in the calling thread: it hands out work and takes results, so nothing here needs a lock. What
waits in either direction is bounded, and `Timing` says how long the decoder waited for either side.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import torch

from fluxvae.batch.items import Failure, Item, Result
from fluxvae.batch.sources import Library
from fluxvae.decoder import Decoder
from fluxvae.engine.preview import ApproximateWarning
from fluxvae.errors import DecodeCancelled, FluxVAEError, InvalidLatentsError, MemoryLimitError, NonFiniteOutputError
from fluxvae.latents.request import LatentRequest
from fluxvae.pictures import OutputType, postprocess

__all__ = ["Timing", "batch_size", "batches", "run_pipeline"]

T = TypeVar("T")

READERS = 4
BATCHES_AHEAD = 3
WINDOW = 256
"""Items within which those of one size are gathered: far fewer than a job, so that sources are read in order."""


@dataclass
class Timing:
    """The seconds that the decoder spent decoding and waiting."""

    decoding: float = 0.0
    waiting: float = 0.0
    """The seconds it waited for latents to be read or images to be written, once the first latents had come."""
    first: float = 0.0
    """The seconds it waited until the first latents had been read."""

    @property
    def idle_share(self) -> float:
        """The part of the decoder's time in which it waited."""
        return self.waiting / (self.waiting + self.decoding) if self.decoding else 0.0


def batches(items: Iterable[Item], size: Callable[[int, int], int]) -> Iterator[list[Item]]:
    """Group items of one size, ``size(height, width)`` of them at most, near the order in which they came."""
    stream = iter(items)
    while window := list(islice(stream, WINDOW)):
        window.sort(key=lambda item: item.size)  # it is a stable sort, so sources stay in order
        start = 0
        while start < len(window):
            same = window[start].size
            end = start + 1
            while end < len(window) and window[end].size == same:
                end += 1
            step = size(*same)
            yield from (window[i : min(i + step, end)] for i in range(start, end, step))
            start = end


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


def run_pipeline(
    items: Sequence[Item],
    decoder: Decoder,
    library: Library,
    write: Callable[[Item, Any], None],
    *,
    output_type: OutputType,
    batch: int,
    stop: threading.Event,
    timing: Timing,
    writers: int | None = None,
) -> Iterator[Result]:
    """Decode items, and yield what became of each as soon as it is known, until all are done or ``stop`` is set.

    Args:
        write: called in threads with an item and its image (``output_type``, no batch axis). What it raises becomes
            the item's failure.
        batch: images in one decode, at most.
        timing: counted up as it goes on.
        writers: threads; None: one for each core, eight at most.
    """
    sizes: dict[tuple[int, int], int] = {}

    def size(height: int, width: int) -> int:
        if (height, width) not in sizes:
            sizes[height, width] = batch_size(decoder, height, width, batch)
        return sizes[height, width]

    writers = writers or min(8, os.cpu_count() or 1)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(READERS, "read") as reading, ThreadPoolExecutor(writers, "write") as writing:
        read = _ahead(reading, lambda group: [_read(library, decoder, item) for item in group], batches(items, size))
        start = time.perf_counter()
        try:
            for index, group in enumerate(read):
                waited = time.perf_counter() - start
                if index:
                    timing.waiting += waited
                else:
                    timing.first += waited
                if stop.is_set():
                    break
                start = time.perf_counter()
                decoded = _decode(group, decoder, output_type, stop)
                if decoded is None:
                    break
                timing.decoding += time.perf_counter() - start
                start = time.perf_counter()
                for item, image in decoded:
                    if isinstance(image, Failure):
                        yield Result(item, image)
                        continue
                    while len(waiting) >= 2 * writers:
                        yield waiting.popleft().result()
                    waiting.append(writing.submit(_write, write, item, image))
                while waiting and waiting[0].done():
                    yield waiting.popleft().result()
        finally:
            read.close()
            reading.shutdown(wait=False, cancel_futures=True)
        while waiting:
            yield waiting.popleft().result()


Read = tuple[Item, "LatentRequest | Failure"]


def _ahead(threads: ThreadPoolExecutor, call: Callable[[list[Item]], list[Read]], groups: Iterable[list[Item]]):  # type: ignore[no-untyped-def]
    """Yield ``call`` of each group in order. Some groups ahead of the one that is asked for are called already."""
    stream = iter(groups)
    pending = deque(threads.submit(call, group) for group in islice(stream, BATCHES_AHEAD))
    while pending:
        done = pending.popleft().result()
        for group in islice(stream, 1):
            pending.append(threads.submit(call, group))
        yield done


def _read(library: Library, decoder: Decoder, item: Item) -> Read:
    """Read the latents of one item, and check them."""
    try:
        row = library.open(item.source).load(item.row)
        latents = row.tensor.float() if row.tensor.dtype == torch.float64 else row.tensor  # no decoder takes float64
        request = decoder.request(latents, replace(item.reading, latent_ids=row.ids))
        if (request.height, request.width) != item.size:
            raise InvalidLatentsError(
                f"height and width: got {item.size[0]}x{item.size[1]} (height x width), but the latents decode to "
                f"{request.height}x{request.width}"
            )
    except Exception as error:  # whatever a file makes a library raise, the others go on
        return item, Failure.of(error, item.source, item.row, item.name)
    return item, request


def _decode(
    group: list[Read], decoder: Decoder, output_type: OutputType, stop: threading.Event
) -> list[tuple[Item, Any]] | None:
    """Decode one batch. Return the image or the failure of each item, or None where the job was stopped."""
    result: list[tuple[Item, Any]] = []
    # Packed and unpacked latents, with ids and without, raw and not, or of two dtypes may share a size.
    kinds: dict[Any, list[tuple[Item, LatentRequest]]] = {}
    for item, found in group:
        if isinstance(found, Failure):
            result.append((item, found))
        else:
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


def _write(write: Callable[[Item, Any], None], item: Item, image: Any) -> Result:
    try:
        write(item, image)
    except Exception as error:  # a full disk fails this image; the next may be smaller, or find room again
        return Result(item, Failure.of(error, item.source, item.row, item.name))
    return Result(item)
