"""Runs a job from its beginning to its end, with one decoder in this process."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from fluxvae.batch.folder import FAILURES, FailureLog, left_to_do, lock, record_of, write_record
from fluxvae.batch.items import Failure, Item, Result
from fluxvae.batch.settings import Job
from fluxvae.batch.sources import find, scan
from fluxvae.batch.store import Store, open_store
from fluxvae.batch.worker import Worker, checkpoint_sha256
from fluxvae.decoder import Decoder
from fluxvae.errors import FluxVAEError, InvalidOptionError
from fluxvae.latents.checks import check_options

__all__ = ["Outlook", "Report", "Watcher", "decode_files", "finish", "look"]


@dataclass(frozen=True)
class Outlook:
    """What a job will do, as far as it is known before the first decode."""

    items: tuple[Item, ...]
    """The images that are still to be decoded."""
    present: int
    """How many images are there already and will be left alone."""
    failures: tuple[Failure, ...]
    """The files and images that cannot be decoded, as the inputs' metadata already show."""
    floored: int
    """How many images have a height or width that was floored to a multiple of 16."""
    approximate: bool
    """Whether the checkpoint is a preview's, so that the images will not be those of the full VAE."""
    skipped: int = 0
    """How many files are known to hold no latents, such as a text encoder's cache."""

    @property
    def pixels(self) -> int:
        """The number of pixels that are still to be decoded."""
        return sum(item.pixels for item in self.items)

    def sizes(self) -> dict[tuple[int, int], int]:
        """Return how many of the images have each (height, width) in pixels, the most frequent size first."""
        counts: dict[tuple[int, int], int] = {}
        for item in self.items:
            counts[item.size] = counts.get(item.size, 0) + 1
        return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


@dataclass
class Report:
    """What became of a job."""

    out: str
    """The path or URL of the output folder."""
    decoded: int = 0
    """How many images this run wrote."""
    present: int = 0
    """How many images were there already and were left alone."""
    failures: list[Failure] = field(default_factory=list)
    """The files and images that were not decoded because something was wrong with them, each with the reason."""
    skipped: int = 0
    """How many files are known to hold no latents, as `Outlook.skipped`."""
    left: int = 0
    """How many images are still to be made, because the job was stopped."""
    pixels: int = 0
    """The number of pixels of the images that this run wrote."""
    seconds: float = 0.0
    """How long reading, decoding and writing took together; looking through the inputs before is not counted."""
    idle_share: float | None = None
    """The share of its time, from 0 to 1, that the decoder waited for reading and writing. None: nothing was decoded,
    or it was not measured, as on a Ray cluster."""
    approximate: bool = False
    """Whether the checkpoint is a preview's, as `Outlook.approximate`."""
    log_problem: str | None = None
    """Why failures.jsonl could not be written; None where it could."""

    @property
    def stopped(self) -> bool:
        """Whether the job was stopped before its end."""
        return self.left > 0

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON. ``failures`` names the file that lists them; it is None where there is none."""
        rate = 1 / self.seconds if self.seconds else 0.0
        return {
            "out": self.out,
            "decoded": self.decoded,
            "present": self.present,
            "failed": len(self.failures),
            "skipped": self.skipped,
            "left": self.left,
            "seconds": self.seconds,
            "images_per_second": self.decoded * rate,
            "megapixels_per_second": self.pixels / 1e6 * rate,
            "idle_share": self.idle_share,
            "approximate": self.approximate,
            "failures": FAILURES if self.failures and not self.log_problem else None,
        }


class Watcher(Protocol):
    """Is told how a job goes on, for instance to show its progress."""

    def begin(self, outlook: Outlook) -> None:
        """Is called once, before the first decode, with what the job will do."""

    def result(self, result: Result) -> None:
        """Is called for every item, as soon as it is known what became of it."""


def look(job: Job, decoder: Decoder, record: dict[str, Any], store: Store) -> Outlook:
    """Find out what a job has to do: what its inputs' metadata tell, and which of its images are there already.

    Args:
        job: the job.
        decoder: a decoder of its checkpoint.
        record: the job's record, from `record_of`.
        store: its output folder.

    Raises:
        InvalidOptionError: an input names nothing, an image would be written over latents, or the output folder holds
            images that the job may not add to.
    """
    expected = job.expected(decoder.format)
    check_options(decoder.format, expected.reading)
    found = find(job.inputs)
    scanned = scan(found, job.suffix, expected)
    sources = {one.url for one in found}
    prefix = store.root.rstrip("/")
    for item in scanned.items:
        if f"{prefix}/{item.name}{job.suffix}" in sources:
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


def decode_files(
    job: Job, *, decoder: Decoder | None = None, watcher: Watcher | None = None, stop: threading.Event | None = None
) -> Report:
    """Decode every image of a job that is not there yet.

    Args:
        job: what to decode, and how.
        decoder: a decoder of the job's checkpoint, if one is in memory already. None: it is loaded.
        watcher: is told how the job goes on.
        stop: the event that stops the job. What is being decoded is given up and what is being written is finished;
            ``Report.left`` then says how many images are left.

    Returns:
        What became of the job. One bad item does not stop the others: it is in ``Report.failures`` and in
        ``failures.jsonl``.

    Raises:
        FluxVAEError: the job as a whole cannot be done, because of its options, its checkpoint or its output folder.
    """
    decoder = decoder or Decoder.from_pretrained(job.checkpoint, **job.decoder_options())
    record = record_of(job, checkpoint_sha256(job), decoder)
    store = open_store(job.out, secrets.token_hex(4))
    worker = Worker(job, decoder, store, record)
    stop = stop or threading.Event()

    def work(outlook: Outlook, result: Callable[[Result], None]) -> None:
        decoder.prepare()
        for one in worker.run(outlook.items, stop):
            result(one)

    report = finish(job, store, record, lambda: look(job, decoder, record, store), work, watcher)
    report.idle_share = worker.timing.idle_share if report.decoded else None
    return report


def finish(
    job: Job,
    store: Store,
    record: dict[str, Any],
    looked: Callable[[], Outlook],
    work: Callable[[Outlook, Callable[[Result], None]], None],
    watcher: Watcher | None,
) -> Report:
    """Do a job's work, and what every job does around it: lock, record, count, log failures, remove temporary files.

    Args:
        job: the job.
        store: its output folder.
        record: its record, from `record_of`.
        looked: returns what the job has to do; called once the folder is locked.
        work: decodes the items of an outlook, and calls its second argument with what became of each.
        watcher: is told how the job goes on.
    """
    with lock(store):
        outlook = looked()
        store.clean()
        report = Report(store.root, present=outlook.present, skipped=outlook.skipped, approximate=outlook.approximate)
        log = FailureLog(store)
        for failure in outlook.failures:
            log.add(failure)
        if watcher is not None:
            watcher.begin(outlook)
        if outlook.items:
            _record(store, record)
        start = time.perf_counter()
        finished: set[str] = set()

        def result(one: Result) -> None:
            finished.add(one.item.name)
            if one.failure is not None:
                log.add(one.failure)
            else:
                report.decoded += 1
                report.pixels += one.item.pixels
            if watcher is not None:
                watcher.result(one)

        try:
            if outlook.items:
                work(outlook, result)
        finally:
            report.seconds = time.perf_counter() - start
            log.flush()
            store.clean()
        report.failures, report.log_problem = log.failures, log.problem
        report.left = len(outlook.items) - len(finished)
        return report


def _record(store: Store, record: dict[str, Any]) -> None:
    try:
        write_record(store, record)
    except OSError as error:
        raise FluxVAEError(f"out: {store.root} cannot be written: {error.strerror or error}") from error
