"""A job from its beginning to its end, with one decoder in this process."""

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
    """What a job will do, known before the first decode."""

    items: tuple[Item, ...]
    """Still to be decoded."""
    present: int
    """Images that are there already and will be left alone."""
    failures: tuple[Failure, ...]
    """What the inputs' metadata already rule out."""
    floored: int
    """Images whose size was floored to a multiple of 16."""
    approximate: bool
    """The checkpoint is a preview's: what it makes is not the full VAE's image."""
    skipped: int = 0
    """Files that are known to hold no latents, such as a text encoder's cache."""

    @property
    def pixels(self) -> int:
        """Still to be decoded."""
        return sum(item.pixels for item in self.items)

    def sizes(self) -> dict[tuple[int, int], int]:
        """How many images of each (height, width), the most frequent first."""
        counts: dict[tuple[int, int], int] = {}
        for item in self.items:
            counts[item.size] = counts.get(item.size, 0) + 1
        return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


@dataclass
class Report:
    """What became of a job."""

    out: str
    decoded: int = 0
    present: int = 0
    failures: list[Failure] = field(default_factory=list)
    skipped: int = 0
    """As `Outlook.skipped`."""
    left: int = 0
    """Not begun, for the job was stopped."""
    pixels: int = 0
    seconds: float = 0.0
    idle_share: float | None = None
    """Of the decoder's time, what it waited for reading and writing. None: not measured (under Ray)."""
    approximate: bool = False
    """As `Outlook.approximate`."""
    log_problem: str | None = None
    """Why failures.jsonl could not be written."""

    @property
    def stopped(self) -> bool:
        """It did not come to its end."""
        return self.left > 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
    """Follows a job."""

    def begin(self, outlook: Outlook) -> None:
        """Called once, before the first decode."""

    def result(self, result: Result) -> None:
        """Called for every item."""


def look(job: Job, decoder: Decoder, record: dict[str, Any], store: Store) -> Outlook:
    """Read what the inputs' metadata tell, and what of it is done.

    Raises:
        InvalidOptionError: inputs that name nothing, or an output folder that is not as the job expects it.
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
        decoder: of the job's checkpoint, if it is in memory already.
        watcher: follows the job.
        stop: set it to stop after what is under way; ``Report.left`` says what was not done.

    Returns:
        What became of it. Bad items are in ``Report.failures`` and in ``failures.jsonl``, and did not stop the others.

    Raises:
        FluxVAEError: the job as a whole cannot be done: its options, its checkpoint, its folder.
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
    """What every job does around its work: the lock, the record, the count, failures, temporary files."""
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
