"""The output folder as a job's: what is done, what it was told last time, what failed, who writes there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fluxvae import __version__
from fluxvae.batch.items import Failure, Item
from fluxvae.batch.outputs import read_record
from fluxvae.batch.settings import Job
from fluxvae.batch.store import LocalStore, Store
from fluxvae.decoder import Decoder
from fluxvae.errors import InvalidOptionError

__all__ = ["FAILURES", "RECORD", "FailureLog", "left_to_do", "lock", "record_of", "write_record"]

RECORD = "job.json"
FAILURES = "failures.jsonl"
_LOCK = ".fluxvae-lock"
_MUST_AGREE = ("checkpoint_sha256", "raw_latents", "engine", "dtype", "raw", "format", "quality")
_FLUSH_S = 5.0


def record_of(job: Job, checkpoint_sha256: str, decoder: Decoder, dtype: str | None = None) -> dict[str, Any]:
    """What all images of a job have in common: ``job.json``, and part of every image's metadata.

    Args:
        dtype: of the decoders that will make them; None: of ``decoder``.
    """
    return {
        "fluxvae": __version__,
        "checkpoint": job.checkpoint,
        "checkpoint_sha256": checkpoint_sha256,
        "raw_latents": str(decoder.format),
        "engine": decoder.engine.name,
        "approximate": decoder.approximate,
        "dtype": dtype or str(decoder.dtype).removeprefix("torch."),
        "raw": job.raw,
        "format": job.format,
        "quality": job.quality,
    }


def left_to_do(items: Sequence[Item], store: Store, job: Job, record: dict[str, Any]) -> list[Item]:
    """The items that have no image yet.

    Raises:
        InvalidOptionError: images are there and the job was not told what to do with them; or they were made with
            other weights or in another way.
    """
    if job.existing == "overwrite":
        return list(items)
    there = store.existing()
    left = [item for item in items if f"{item.name}{job.suffix}" not in there]
    done = len(items) - len(left)
    if job.existing == "refuse":
        if done:
            raise InvalidOptionError(
                f"out: {store.root} already holds {done} of the {len(items)} images; --resume decodes only what is "
                "missing, --overwrite decodes all again"
            )
        return left
    before = read_record(store.read(RECORD))
    for key in _MUST_AGREE if before is not None and done else ():
        assert before is not None
        if before.get(key) != record[key]:
            raise InvalidOptionError(
                f"--resume: {store.root} was begun with {key} {before.get(key)}, and this is {record[key]}; use the "
                "same, another folder, or --overwrite"
            )
    return left


def write_record(store: Store, record: dict[str, Any]) -> None:
    """Say what this job is, before its first image."""
    store.write(RECORD, (json.dumps(record, indent=2) + "\n").encode())


@contextlib.contextmanager
def lock(store: Store) -> Iterator[None]:
    """Hold a local output folder for one job of this machine; it goes with the process, however that ends.

    A folder that was made for this and is empty in the end, after a refusal, goes too.

    Raises:
        InvalidOptionError: another job is writing there.
    """
    if not isinstance(store, LocalStore):
        yield
        return
    path = Path(store.root) / _LOCK
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise InvalidOptionError(f"out: {store.root} cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink == 0:  # another job ended, and removed it, in between
                raise BlockingIOError
        except BlockingIOError:
            raise InvalidOptionError(
                f"out: another job is writing to {store.root} now; wait for it, or choose another folder"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held
            with contextlib.suppress(OSError):  # it is not empty
                for folder in made:
                    folder.rmdir()
    finally:
        os.close(descriptor)


class FailureLog:
    """``failures.jsonl``: one line for each failure of this run, written as a whole every few seconds and at the end.

    A disk that is full does not lose them: they are kept, written when they can be, and told in any case.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.failures: list[Failure] = []
        self._written, self._next = 0, 0.0
        self.problem: str | None = None
        """Why the file could not be written the last time it was tried."""

    def add(self, failure: Failure) -> None:
        """Record one."""
        self.failures.append(failure)
        if time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Write what is not written; without failures, what an earlier run left goes."""
        self._next = time.monotonic() + _FLUSH_S
        try:
            if not self.failures:
                self._store.remove(FAILURES)
            elif self._written < len(self.failures):
                lines = (json.dumps(failure.as_dict(), ensure_ascii=False) for failure in self.failures)
                self._store.write(FAILURES, ("\n".join(lines) + "\n").encode())
            self._written, self.problem = len(self.failures), None
        except OSError as error:
            self.problem = str(error)
