"""Runs a job from its beginning to its end, with one decoder or encoder in this process."""

from __future__ import annotations

import secrets
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from fluxvae.batch.encode_settings import EncodeJob
from fluxvae.batch.folder import FailureLog, lock, record_of, write_record
from fluxvae.batch.items import Result
from fluxvae.batch.outlook import Outlook, Report, Watcher
from fluxvae.batch.settings import Job
from fluxvae.batch.store import Store, open_store
from fluxvae.batch.worker import Worker, checkpoint_sha256, load, look
from fluxvae.decoder import Decoder
from fluxvae.encoder import Encoder
from fluxvae.engine.way import DECODE, ENCODE
from fluxvae.errors import FluxVAEError
from fluxvae.photographs import ignore_warnings

__all__ = ["decode_files", "encode_files", "finish"]


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
    return _run(job, decoder, watcher, stop)


def encode_files(
    job: EncodeJob,
    *,
    encoder: Encoder | None = None,
    watcher: Watcher | None = None,
    stop: threading.Event | None = None,
) -> Report:
    """Encode every picture of a job whose latents are not there yet. Otherwise as `decode_files`."""
    with warnings.catch_warnings():  # in this thread, whose filters those that read pictures for it go by
        ignore_warnings()
        return _run(job, encoder, watcher, stop)


def _run(
    job: Job | EncodeJob, half: Decoder | Encoder | None, watcher: Watcher | None, stop: threading.Event | None
) -> Report:
    half = half or load(job)
    record = record_of(job, checkpoint_sha256(job), half)
    store = open_store(job.out, secrets.token_hex(4))
    worker = Worker(job, half, store, record)
    stop = stop or threading.Event()

    def work(outlook: Outlook, result: Callable[[Result], None]) -> None:
        half.prepare()
        for one in worker.run(outlook.items, stop):
            result(one)

    report = finish(job, store, record, lambda: look(job, half, record, store), work, watcher)
    report.idle_share = worker.timing.idle_share if report.done else None
    return report


def finish(
    job: Job | EncodeJob,
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
        work: does the items of an outlook, and calls its second argument with what became of each.
        watcher: is told how the job goes on.
    """
    with lock(store):
        outlook = looked()
        store.clean()
        way = DECODE if isinstance(job, Job) else ENCODE
        report = Report(
            store.root, way, present=outlook.present, skipped=outlook.skipped, approximate=outlook.approximate
        )
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
                report.done += 1
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
