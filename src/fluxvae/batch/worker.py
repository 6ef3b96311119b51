"""One decoder or encoder that works on the items of a job, in this process or in an actor of Ray."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from fluxvae.batch import decoding, encoding
from fluxvae.batch.encode_settings import EncodeJob
from fluxvae.batch.items import Item, Result
from fluxvae.batch.outlook import Outlook
from fluxvae.batch.pipeline import Steps, Timing, run_pipeline
from fluxvae.batch.settings import Job
from fluxvae.batch.store import Store
from fluxvae.checkpoints import weights_files
from fluxvae.decoder import Decoder
from fluxvae.encoder import Encoder

__all__ = ["Worker", "checkpoint_sha256", "load", "look"]


class Worker:
    """Does items of one job and writes their results.

    Args:
        half: the decoder or the encoder of the job's checkpoint.
        store: where the results are written to.
        record: the job's record (`folder.record_of`), which is embedded in every result.
    """

    def __init__(self, job: Job | EncodeJob, half: Decoder | Encoder, store: Store, record: dict[str, Any]) -> None:
        self._steps: Steps
        if isinstance(job, Job):
            assert isinstance(half, Decoder)
            self._steps = decoding.Decoding(job, half, store, record)
        else:
            assert isinstance(half, Encoder)
            self._steps = encoding.Encoding(job, half, store, record)
        self.timing = Timing()

    def run(self, items: Sequence[Item], stop: threading.Event) -> Iterator[Result]:
        """Do and write, and yield what became of each item, until all are done or ``stop`` is set."""
        return run_pipeline(items, self._steps, stop=stop, timing=self.timing)


def load(job: Job | EncodeJob, **options: Any) -> Decoder | Encoder:
    """Load the half of the job's checkpoint that the job needs; ``options`` win over the job's own."""
    half: type[Decoder] | type[Encoder] = Decoder if isinstance(job, Job) else Encoder
    return half.from_pretrained(job.checkpoint, **job.load_options() | options)


def look(job: Job | EncodeJob, half: Decoder | Encoder, record: dict[str, Any], store: Store) -> Outlook:
    """Find out what a job has to do, without doing any of it: see `decoding.look` and `encoding.look`."""
    if isinstance(job, Job):
        assert isinstance(half, Decoder)
        return decoding.look(job, half, record, store)
    assert isinstance(half, Encoder)
    return encoding.look(job, half, record, store)


def checkpoint_sha256(job: Job | EncodeJob) -> str:
    """Return the hash of the weights' files one after another, as ``cat FILES | sha256sum`` prints it."""
    digest = hashlib.sha256()
    for path in weights_files(job.checkpoint, revision=job.revision, variant=job.variant):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
