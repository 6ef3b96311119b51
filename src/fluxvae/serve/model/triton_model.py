"""The Triton model, which has the requests of one ``execute`` decoded, or encoded, and sends the answers.

Every folder of ``triton_models`` serves this one class; they differ in their ``config.pbtxt``. The class only joins the
other modules of this package, which have the logic.
"""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fluxvae.engine.preview import ApproximateWarning
from fluxvae.errors import FluxVAEError
from fluxvae.serve.model.answering import answer, code_of
from fluxvae.serve.model.handover import LOG_MARK, Room, find_room, sent_bytes
from fluxvae.serve.model.jobs import AnyJob, Payload
from fluxvae.serve.model.memory import MemoryBudget, compute
from fluxvae.serve.model.metrics import Metrics
from fluxvae.serve.model.proof import Proof
from fluxvae.serve.model.startup import Settings, check_tensor_exchange, make_work, warm_up
from fluxvae.serve.model.work import Work
from fluxvae.serve.triton.guardian import RUN_VARIABLE

try:
    import triton_python_backend_utils as pb_utils
except ImportError:  # the module exists only inside Triton, and the demo runs without it
    pb_utils = None

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """One instance of the model. Triton makes each instance in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint, and decode or encode once.

        Args:
            args: the model's configuration and what Triton says about this instance.

        Raises:
            TritonModelException: the model cannot serve. Triton logs why, and the model does not become ready.
        """
        try:
            check_tensor_exchange(pb_utils)
            self.settings = Settings.read(
                json.loads(args["model_config"]).get("parameters", {}),
                os.environ,
                kind=args["model_instance_kind"],
                device_id=args["model_instance_device_id"],
            )
            if self.settings.threads is not None:
                torch.set_num_threads(self.settings.threads)
            self.work = make_work(self.settings)
            warnings.simplefilter("ignore", ApproximateWarning)  # it is for the library's users; here the log says it
            start = time.perf_counter()
            warm_up(self.work)
        except FluxVAEError as error:
            raise pb_utils.TritonModelException(f"{type(error).__name__}: {error}") from None
        half, way = self.work.half, self.work.half.way.name
        self.budget = MemoryBudget(self.work)
        self.metrics = Metrics(pb_utils, args["model_name"], way)
        self.proof = Proof()
        pb_utils.Logger.log_info(
            f"fluxvae: {args['model_instance_name']} serves {self.settings.checkpoint} on {half.device} "
            f"in {half.dtype}; its first {way} took {time.perf_counter() - start:.1f} s"
            + (f"; {self.work.note}" if self.work.note else "")
        )

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Answer every request with what it asks for or with an error of its own, as soon as its group is done.

        Returns:
            None, because answers are sent; or the answer of a single request where room for it is tight (see
            `handover`).
        """
        replies = [_Reply(request, self.work, self.metrics, alone=len(requests) == 1) for request in requests]
        self.metrics.taken(len(replies))
        try:
            jobs = []
            for index, reply in enumerate(replies):
                try:
                    job = self._read(index, reply.request)
                    if (known := self.proof.answer(job, time.monotonic())) is not None:
                        reply.deliver(job, known)
                    else:
                        jobs.append(job)
                except Exception as error:  # the client gets it as its answer; an unexpected one goes to the log
                    reply.fail(error)
            answer(
                lambda members, cancel: self._compute(members, cancel, replies),
                jobs,
                lambda job, outcome: replies[job.index].deliver(job, outcome),
                fits=self.budget.fits,
                cancelled=lambda job: bool(replies[job.index].request.is_cancelled()),
            )
        except Exception as error:  # whatever went wrong, nobody is left without an answer
            for reply in replies:
                reply.fail(error)
        if any(reply.lost for reply in replies) and RUN_VARIABLE in os.environ:
            os._exit(1)  # Triton then answers the clients that wait with an error, and `fluxvae serve` starts it again
        return [reply.returned for reply in replies if reply.returned is not None] or None

    def finalize(self) -> None:
        """Free the weights, also those on the GPU."""
        self.work = None  # type: ignore[assignment]
        self.budget = None  # type: ignore[assignment]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _read(self, index: int, request: Any) -> AnyJob:
        tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.work.inputs}
        given = {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
        outputs = frozenset(request.requested_output_names())
        job = self.work.read(index, given, request.parameters(), outputs)
        self.budget.check(job)
        find_room(self.work.sizes(job))
        return job

    def _compute(self, jobs: Sequence[AnyJob], cancel: Callable[[], bool], replies: list[_Reply]) -> torch.Tensor:
        start = time.perf_counter()
        try:
            result = compute(self.work, jobs, cancel)
        except Exception as error:
            self.proof.failed(error)
            raise
        seconds = time.perf_counter() - start
        self.proof.computed(jobs, result, time.monotonic())
        first, rows = jobs[0].request, sum(job.request.batch for job in jobs)
        self.metrics.computed(rows, rows * first.height * first.width, seconds, self._plan(first, rows))
        pb_utils.Logger.log_verbose(
            f"fluxvae: requests {', '.join(replies[job.index].id for job in jobs)}: {self.work.half.way.name}d "
            f"{rows} x {first.height}x{first.width} in {seconds:.3f} s"
        )
        return result

    def _plan(self, payload: Payload, rows: int) -> Any:
        try:
            return self.budget.plan(payload.height, payload.width, rows)
        except FluxVAEError:  # no plan fits the memory that is free by now, but the work is done
            return None


class _Reply:
    """The one answer to one request."""

    def __init__(self, request: Any, work: Work, metrics: Metrics, *, alone: bool) -> None:
        self.request = request
        self.returned: Any = None
        """The answer, where ``execute`` is to return it instead of having it sent."""
        self._alone = alone
        self._work = work
        given = "".join(letter if letter.isprintable() else "?" for letter in request.request_id()[:64])
        self.id = given or uuid.uuid4().hex[:12]
        self._metrics = metrics
        self._sender = request.get_response_sender()
        self._sent = False
        self.lost = False
        """Whether Triton did not take the answer for lack of room. It takes no other then, so the client would wait for
        ever."""

    def deliver(self, job: AnyJob, outcome: torch.Tensor | Exception) -> None:
        """Answer with the outputs that the job asked for, made of its rows of the result, or with the error."""
        try:
            if isinstance(outcome, Exception):
                raise outcome
            made = self._work.make_outputs(job, outcome)
            room = find_room(sent_bytes(made.values()))
            tensors = [pb_utils.Tensor(name, array) for name, array in made.items()]
            response = pb_utils.InferenceResponse(output_tensors=tensors)
        except Exception as error:  # the client gets it as its answer; an unexpected one goes to the log
            self.fail(error)
        else:
            if self._alone and room is Room.TIGHT:
                self._settle()
                self.returned = response
            else:
                self._send(response)

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless there was an answer already.

        Clients are told only what concerns them. The details of an unexpected error go to the log, with the request's
        id.
        """
        if self._sent:
            return
        code, message = code_of(error), str(error)
        if message.startswith("shared memory:"):
            pb_utils.Logger.log_error(f"{LOG_MARK}: request {self.id}: {message}")
        elif isinstance(error, FluxVAEError):
            pb_utils.Logger.log_info(f"fluxvae: request {self.id}: {type(error).__name__}: {message}")
        else:
            trace = "".join(traceback.format_exception(error))
            pb_utils.Logger.log_error(f"fluxvae: request {self.id} failed: {trace}")
            kind = "out of memory" if code == "UNAVAILABLE" else "internal error"
            message = f"{kind}; the server's log has the details under request {self.id}"
        self._metrics.failed(error)
        told = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
        self._send(pb_utils.InferenceResponse(error=told))

    def _settle(self) -> None:
        self._sent = True
        self._metrics.answered()

    def _send(self, response: Any) -> None:
        self._settle()  # first, because Triton counts even a response that it does not take, and no other may follow it
        try:
            self._sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as unsent:  # logged and not raised, because other requests are still to be answered
            self._metrics.failed(unsent)
            self.lost = "shared memory" in str(unsent)
            mark = LOG_MARK if self.lost else "fluxvae"
            pb_utils.Logger.log_error(f"{mark}: request {self.id}: Triton did not take its answer: {unsent}")
