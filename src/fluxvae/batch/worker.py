"""One decoder that works on the items of a job, in this process or in an actor of Ray."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from fluxvae.batch.items import Item, Result
from fluxvae.batch.outputs import metadata_of, output_type_of, to_bytes
from fluxvae.batch.pipeline import Timing, run_pipeline
from fluxvae.batch.settings import Job
from fluxvae.batch.sources import Library
from fluxvae.batch.store import Store
from fluxvae.checkpoints import weights_files
from fluxvae.decoder import Decoder
from fluxvae.errors import FluxVAEError

__all__ = ["OutputError", "Worker", "checkpoint_sha256"]


class OutputError(FluxVAEError):
    """An output could not be written."""


class Worker:
    """Decodes items of one job and writes their images.

    Args:
        decoder: the decoder of the job's checkpoint.
        store: where the images are written to.
        record: the job's record (`folder.record_of`), which is embedded in every image.
    """

    def __init__(self, job: Job, decoder: Decoder, store: Store, record: dict[str, Any]) -> None:
        self._job, self._decoder, self._store, self._record = job, decoder, store, record
        self._library = Library(job.expected(decoder.format))
        self.timing = Timing()

    def run(self, items: Sequence[Item], stop: threading.Event) -> Iterator[Result]:
        """Decode and write, and yield what became of each item, until all are done or ``stop`` is set."""
        return run_pipeline(
            items,
            self._decoder,
            self._library,
            self._write,
            output_type=output_type_of(self._job.format),
            batch=self._job.batch,
            stop=stop,
            timing=self.timing,
        )

    def _write(self, item: Item, image: Any) -> None:
        name = f"{item.name}{self._job.suffix}"
        data = to_bytes(image, self._job.format, self._job.quality, metadata_of(item, self._record))
        try:
            self._store.write(name, data)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "make room there, then run again with --resume" if full else "see to the output folder"
            raise OutputError(
                f"out: {name} ({len(data)} bytes) cannot be written to {self._store.root}: "
                f"{error.strerror or error}; {advice}"
            ) from error


def checkpoint_sha256(job: Job) -> str:
    """Return the hash of the weights' files one after another, as ``cat FILES | sha256sum`` prints it."""
    digest = hashlib.sha256()
    for path in weights_files(job.checkpoint, revision=job.revision, variant=job.variant):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
