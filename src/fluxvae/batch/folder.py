"""What a job keeps in its output folder besides its results: its record, its failures, and the lock against other jobs.

From the record and the results that are there, `left_to_do` finds what a resumed job still has to do.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fluxvae import __version__
from fluxvae.batch.encode_settings import EncodeJob
from fluxvae.batch.items import Failure, Item
from fluxvae.batch.outlook import FAILURES
from fluxvae.batch.outputs import read_record
from fluxvae.batch.settings import Job
from fluxvae.batch.store import LocalStore, Store
from fluxvae.decoder import Decoder
from fluxvae.encoder import Encoder
from fluxvae.errors import InvalidOptionError
from fluxvae.system import hold

__all__ = ["RECORD", "FailureLog", "left_to_do", "lock", "record_of", "write_record"]

RECORD = "job.json"
_LOCK = ".fluxvae-lock"
_BY_JOB = {
    Job: ("raw", "feature_order", "format", "quality"),
    EncodeJob: ("sizes", "bucket", "bucket_area", "background", "packed", "seed", "format"),
}
"""The options of a job that decide what its results are like."""
_BY_CHECKPOINT = ("checkpoint_sha256", "raw_latents", "engine", "dtype")
"""The other entries of the record that do. A job is resumed only where all of them are as before."""
_FLUSH_S = 5.0
"""How many seconds pass at least before failures.jsonl is written again."""


def record_of(
    job: Job | EncodeJob, checkpoint_sha256: str, half: Decoder | Encoder, dtype: str | None = None
) -> dict[str, Any]:
    """Describe what all results of a job have in common: ``job.json``, and a part of every file's metadata.

    Args:
        job: the job.
        checkpoint_sha256: the SHA-256 of the checkpoint's weights, in hexadecimal digits.
        half: a decoder, or an encoder, of the job's checkpoint.
        dtype: the dtype of those that will do the work, such as ``"bfloat16"``, where it is not that of ``half``.
    """
    return {
        "fluxvae": __version__,
        "job": half.way.name,
        "checkpoint": job.checkpoint,
        "checkpoint_sha256": checkpoint_sha256,
        "raw_latents": str(half.format),
        "engine": half.engine.name,
        "approximate": half.approximate,
        "dtype": dtype or str(half.dtype).removeprefix("torch."),
        **{name: getattr(job, name) for name in _BY_JOB[type(job)]},
    }


def left_to_do(items: Sequence[Item], store: Store, job: Job | EncodeJob, record: dict[str, Any]) -> list[Item]:
    """Return the items that the job has to do: those without a result, or all where it is told to overwrite.

    Raises:
        InvalidOptionError: there are results already, and the job was not told what to do with them; or it is to
            resume, and they were made with other weights or options.
    """
    if job.existing == "overwrite":
        return list(items)
    there = {store.key(name) for name in store.existing()}
    left = [item for item in items if store.key(f"{item.name}{job.suffix}") not in there]
    done = len(items) - len(left)
    if job.existing == "refuse":
        if done:
            thing, verb = ("images", "decodes") if isinstance(job, Job) else ("latents", "encodes")
            raise InvalidOptionError(
                f"out: {store.root} already holds {done} of the {len(items)} {thing}; --resume {verb} only what is "
                f"missing, --overwrite {verb} all again"
            )
        return left
    before = read_record(store.read(RECORD))
    for key in (*_BY_CHECKPOINT, *_BY_JOB[type(job)]) if before is not None and done else ():
        assert before is not None
        if before.get(key) != record[key]:
            raise InvalidOptionError(
                f"--resume: {store.root} was begun with {key} {before.get(key)}, and this is {record[key]}; use the "
                "same, another folder, or --overwrite"
            )
    return left


def write_record(store: Store, record: dict[str, Any]) -> None:
    """Write the record of the job, from `record_of`, to ``job.json``, which must be there before the first image."""
    store.write(RECORD, (json.dumps(record, indent=2) + "\n").encode())


@contextlib.contextmanager
def lock(store: Store) -> Iterator[None]:
    """Lock a local output folder, so that no other job on this machine writes to it. Remote folders are not locked.

    The lock ends with the process, however that ends. A folder that had to be made for the lock file is removed again
    if nothing was written to it, as happens after a refusal.

    Raises:
        InvalidOptionError: another job is writing to the folder, or this process may not.
    """
    if not isinstance(store, LocalStore):
        yield
        return
    path = Path(store.root) / _LOCK
    made = [folder for folder in path.parents if not folder.exists()]
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.callback(_remove_empty, made)
            held.enter_context(hold(path))
        except BlockingIOError:
            raise InvalidOptionError(
                f"out: another job is writing to {store.root} now; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            raise InvalidOptionError(f"out: {store.root} cannot be written: {error}") from error
        yield


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # a folder that is not empty stays
        for folder in folders:
            folder.rmdir()


class FailureLog:
    """Collects the failures of this run and writes them to ``failures.jsonl``, one line for each.

    The file is always written as a whole, every few seconds and at the end. Where it cannot be written, for instance to
    a full disk, no failure is lost: they stay in `failures`, and are written as soon as that succeeds.

    Args:
        store: the output folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.failures: list[Failure] = []
        """All failures of this run, in the order in which they became known."""
        self._written, self._next = 0, 0.0
        self.problem: str | None = None
        """Why the last attempt to write the file failed; None where it succeeded."""

    def add(self, failure: Failure) -> None:
        """Record one failure, and write the file if that was last done some seconds ago."""
        self.failures.append(failure)
        if time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Write the file if it lacks failures. Without any failure, remove the file that an earlier run left."""
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
