"""Runs a job on many machines: a Ray Data pipeline whose only stage is an actor with a decoder or an encoder.

    items (names and sizes only) --> actors: read, compute, write --> results (names and failures)

Latents and images never travel between machines. An actor reads and writes by itself, so its reading, computing and
writing overlap as they do in one process, and Ray only moves rows of text. Ray Data hands out the items as a stream and
keeps its queues bounded. It starts an actor again that was lost, and gives it the same items; the images that the lost
one had finished exist, and are left alone.

Ray is an optional package, so it is imported only when a job is run with it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fluxvae.batch.encode_settings import EncodeJob
from fluxvae.batch.folder import record_of
from fluxvae.batch.items import Failure, Item, Result
from fluxvae.batch.outlook import Outlook, Report, Watcher
from fluxvae.batch.run import finish
from fluxvae.batch.settings import Job
from fluxvae.batch.store import open_store
from fluxvae.batch.worker import Worker, checkpoint_sha256, load, look
from fluxvae.errors import InvalidOptionError, UnavailableError
from fluxvae.extras import needs
from fluxvae.options import name_of_usual_dtype
from fluxvae.photographs import ignore_warnings

__all__ = ["decode_files_on_ray", "encode_files_on_ray"]

_MOST_PER_CALL = 64
"""The most items that an actor is given in one call."""
_CALLS_PER_WORKER = 8
"""How many calls of equal size the items make for each actor at least, if there are enough of them."""


@dataclass(frozen=True)
class _Shape:
    """How many actors there are, and what each of them gets."""

    workers: int
    threads: int
    gpu: bool


def decode_files_on_ray(
    job: Job,
    *,
    address: str = "local",
    workers: int | None = None,
    threads: int | None = None,
    watcher: Watcher | None = None,
    stop: threading.Event | None = None,
) -> Report:
    """Do what `decode_files` does, on a Ray cluster.

    Every node must see the inputs, the checkpoint and the output folder under the same names.

    Args:
        job: what to decode, and how.
        address: ``"local"`` starts a cluster in processes of this machine, for this job; ``"auto"`` finds the one this
            machine belongs to; ``"host:port"`` or ``"ray://host:port"`` is another. In a process that is connected to
            Ray already, that connection is used.
        workers: how many actors decode. None: one for each GPU, or as many as the cluster's cores allow.
        threads: how many cores each actor gets. None: 1 beside a GPU; on CPUs 4, or all that the smallest node has.
        watcher: is told how the job goes on.
        stop: the event that stops the job.

    Returns:
        What became of the job, as `decode_files` returns it.

    Raises:
        MissingExtraError: Ray is not installed.
        InvalidOptionError: the cluster is too small for the actors that were asked for.
        UnavailableError: there is no cluster at this address, or the pipeline ended before the job did.
        FluxVAEError: the job as a whole cannot be done, as in `decode_files`.
    """
    return _run(job, address, workers, threads, watcher, stop)


def encode_files_on_ray(
    job: EncodeJob,
    *,
    address: str = "local",
    workers: int | None = None,
    threads: int | None = None,
    watcher: Watcher | None = None,
    stop: threading.Event | None = None,
) -> Report:
    """Do what `encode_files` does, on a Ray cluster. Arguments and errors are those of `decode_files_on_ray`."""
    with warnings.catch_warnings():  # as in `encode_files`
        ignore_warnings()
        return _run(job, address, workers, threads, watcher, stop)


def _run(
    job: Job | EncodeJob,
    address: str,
    workers: int | None,
    threads: int | None,
    watcher: Watcher | None,
    stop: threading.Event | None,
) -> Report:
    ray = _import_ray()
    stop = stop or threading.Event()
    connected = ray.is_initialized()
    if not connected:
        _connect(ray, address)
    try:
        shape = _shape(ray, job, workers, threads)
        here = load(job, device="cpu", dtype="float32")
        device = "cuda" if shape.gpu else "cpu"
        dtype = job.dtype if job.dtype != "auto" else _usual_dtype(ray, device)
        job_id = secrets.token_hex(4)
        store = open_store(job.out, job_id)
        record = record_of(job, checkpoint_sha256(job), here, dtype)
        make = {"job": job, "device": device, "dtype": dtype, "record": record, "job_id": job_id, "shape": shape}

        def work(outlook: Outlook, result: Callable[[Result], None]) -> None:
            for one in _stream(outlook, make, shape, stop):
                result(one)

        try:
            return finish(job, store, record, lambda: look(job, here, record, store), work, watcher)
        finally:
            if not connected:
                ray.shutdown()  # ends the actors, so that no file is being written while the temporary ones are removed
                store.clean()
    finally:
        if not connected:
            ray.shutdown()


def _usual_dtype(ray: Any, device: str) -> str:
    """Return what ``dtype="auto"`` is where the job's items will be done, which one of the cluster's nodes is asked.

    All actors are told the same, so that one job has one dtype, also where its GPUs are of several kinds.
    """
    if device == "cpu":
        return name_of_usual_dtype(device)
    return str(ray.get(ray.remote(num_gpus=1)(name_of_usual_dtype).remote(device)))


def _import_ray() -> Any:
    # Both are read when Ray is imported. Workers shall run in this Python environment, not in one that uv makes for
    # them, and Ray shall send no reports of its usage.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with needs("batch", "--ray"):
        import ray
        import ray.data
    return ray


def _connect(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would log its progress between the lines of the job's
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UnavailableError(
            f"--ray: no cluster at {address!r}: {str(error).strip().splitlines()[0]}; run `ray start --head`, "
            "or leave the address out to use this machine"
        ) from error


def _shape(ray: Any, job: Job | EncodeJob, workers: int | None, threads: int | None) -> _Shape:
    """Return how many actors the cluster has room for, or the number that was asked for if it has room for so many."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    gpu = job.device.startswith("cuda") or (job.device == "auto" and gpus > 0)
    each = threads or (1 if gpu else min(4, *cores, 4) if cores else 1)
    room = min(gpus, sum(n // each for n in cores)) if gpu else sum(n // each for n in cores)
    if room < (workers or 1):
        has = f"{sum(cores)} cores and {gpus} GPUs"
        raise InvalidOptionError(
            f"--workers: got {workers or 'auto'} with {each} cores{' and a GPU' if gpu else ''} each, but the cluster "
            f"has {has}, room for {room}; ask for fewer, or give them fewer --threads"
        )
    return _Shape(workers or room, each, gpu)


def _stream(outlook: Outlook, make: dict[str, Any], shape: _Shape, stop: threading.Event) -> Iterator[Result]:
    """Do an outlook's items on the actors, and yield what became of each, in the order in which they are done.

    Args:
        outlook: what the job has to do.
        make: the arguments that each actor is made with.
        shape: how many actors there are, and what each of them gets.
        stop: the event that stops the job.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the job shows its own progress
    items = outlook.items
    # A call is small enough that all actors end at about the same time, and large enough that reading and writing
    # overlap with decoding.
    per_call = max(1, min(_MOST_PER_CALL, len(items) // (shape.workers * _CALLS_PER_WORKER)))
    rows = [{"index": index, "item": item.as_dict()} for index, item in enumerate(items)]
    calls = [{"index": [r["index"] for r in part], "items": [r["item"] for r in part]}
             for part in (rows[at : at + per_call] for at in range(0, len(rows), per_call))]  # fmt: skip
    data = ray.data.from_items([_pack(call) for call in calls], override_num_blocks=len(calls)).flat_map(
        _Actor,
        fn_constructor_kwargs=make,
        compute=ray.data.ActorPoolStrategy(size=shape.workers),
        num_cpus=shape.threads,
        num_gpus=1 if shape.gpu else None,
    )  # by default Ray Data starts a lost actor again and repeats its calls, as often as it takes
    seen: set[int] = set()
    for row in _rows(data, stop):
        index = int(row["index"])
        if index in seen:
            continue
        seen.add(index)
        failure = None if row["error"] is None else Failure(
            items[index].source, items[index].row, items[index].name, row["error"], row["message"]
        )  # fmt: skip
        yield Result(items[index], failure)


def _rows(data: Any, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """Yield the pipeline's rows as they come.

    They are followed in a thread of their own, so that a stop is noticed even while no row comes.

    Raises:
        UnavailableError: the pipeline ended with an error.
    """
    came: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def follow() -> None:
        try:
            for row in data.iter_rows():
                came.put(row)
                if stop.is_set():
                    break
            came.put(None)
        except BaseException as error:
            came.put(error)

    threading.Thread(target=follow, daemon=True).start()
    while not stop.is_set():
        try:
            row = came.get(timeout=0.2)
        except queue.Empty:
            continue
        if row is None:
            return
        if isinstance(row, BaseException):
            raise UnavailableError(f"--ray: the pipeline ended: {str(row).strip().splitlines()[0]}; run it again with "
                                   "--resume for what is left") from row  # fmt: skip
        yield row


def _pack(call: dict[str, Any]) -> dict[str, Any]:
    """Make one row of a call. It is JSON, because Arrow would turn the values into types of its own."""
    return {"call": json.dumps(call)}


class _Actor:
    """A decoder or encoder on one machine of the cluster. It is given some items, and returns what became of each."""

    def __init__(
        self, job: Job | EncodeJob, device: str, dtype: str, record: dict[str, Any], job_id: str, shape: _Shape
    ) -> None:  # fmt: skip
        torch.set_num_threads(shape.threads)
        ignore_warnings()  # this process does nothing else
        half = load(job, device=device, dtype=dtype)
        half.prepare()
        self._job, self._store = job, open_store(job.out, job_id)
        self._worker = Worker(job, half, self._store, record)

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        call = json.loads(row["call"])
        items = [Item.from_dict(item) for item in call["items"]]
        index = {item.name: at for item, at in zip(items, call["index"], strict=True)}
        return [
            {
                "index": index[result.item.name],
                "error": result.failure.error if result.failure else None,
                "message": result.failure.message if result.failure else None,
            }
            for result in self._run(items)
        ]

    def _run(self, items: list[Item]) -> Iterator[Result]:
        """Do the items of one call, but those whose results a lost actor finished before this one got its call."""
        left = []
        for item in items:
            if self._job.existing != "overwrite" and self._store.exists(f"{item.name}{self._job.suffix}"):
                yield Result(item)
            else:
                left.append(item)
        yield from self._worker.run(left, threading.Event())
