"""Triton as a service of the supervisor.

Every model is asked for tiny decodes, Triton's processes are watched for their end, and its log is read for notices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fluxvae.serve.supervisor.checks import model_error
from fluxvae.serve.supervisor.health import ASK_EVERY_S, Answer, Outcome, Probe, Watch, ask_tiny
from fluxvae.serve.supervisor.notices import Notices
from fluxvae.serve.triton.ports import free_ports
from fluxvae.serve.triton.processes import (
    Deaths,
    Process,
    command_line,
    cpu_seconds,
    exited,
    how_it_ended,
    in_group,
    is_running,
)
from fluxvae.serve.triton.server import PORT_TAKEN, TritonServer, TritonServerError

__all__ = ["TritonService"]


class TritonService:
    """A Triton server whose models are all asked for tiny decodes.

    Args:
        server: the server, not yet started, with fixed ports.
        models: the names of the models that it serves.
        log: the file that Triton and its models write to.
        patience_s, busy_limit_s: as for `fluxvae.serve.supervisor.health.Watch`.
    """

    name = "Triton"

    def __init__(
        self, server: TritonServer, models: Sequence[str], log: Path, *, patience_s: float, busy_limit_s: float
    ) -> None:
        self.server = server
        self._log = log
        self._names = list(models)
        self._patience_s = patience_s
        self._busy_limit_s = busy_limit_s
        self._processes: list[Process] = []

    def launch(self) -> None:
        """Start Triton, as `Service.launch` says."""
        self._processes = []
        self._deaths = Deaths([])
        self._notices = Notices(self._log)
        self._models = [
            _Model(name, self.server, patience_s=self._patience_s, busy_limit_s=self._busy_limit_s)
            for name in self._names
        ]
        self.server.launch()

    def started(self) -> bool:
        """Return whether every model has answered a decode or an encode.

        Raises:
            FluxVAEError: Triton or the Python process of a model has ended, or a model does not answer. Where a model
                refused to load with an error of fluxvae's, it is that error.
        """
        if not self.server.running:
            self._check_ports()
            raise model_error(self.server.log()) or TritonServerError(
                f"Triton {self._end()} before it was ready. {self.server.log_tail()}"
            )
        if not self._processes:
            if not self.server.ready():
                return False
            assert self.server.pid is not None
            self._processes = [process for process in in_group(self.server.pid) if process.pid != self.server.pid]
            self._deaths = Deaths([self.server.pid, *(process.pid for process in self._processes)])
        if self._dead_model():
            raise TritonServerError(f"the model's Python process died before it was ready. {self.server.log_tail()}")
        now = time.monotonic()
        # A list, not a generator given to all(): every model is to be asked now, not only up to the first that waits.
        answered = [model.started(now, self._processes) for model in self._models]
        return all(answered)

    def wait_for_end(self, timeout_s: float) -> bool:
        """Wait for the end of Triton or of one of its models' processes, as `Service.wait_for_end` says."""
        return self._deaths.wait(timeout_s)

    def trouble(self) -> str | None:
        """Say that a process has ended, or what is wrong by the rule of `fluxvae.serve.supervisor.health`."""
        if not self.server.running:
            return self._end()
        if self._dead_model():
            return "its Python process died"
        now = time.monotonic()
        return next(filter(None, [model.trouble(now) for model in self._models]), None)

    def notice(self) -> str | None:
        """Say that answers find no room in shared memory, where the log tells so."""
        return self._notices.take(time.monotonic())

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Stop it by SIGTERM, on which it takes no new requests and answers those that are under way."""
        self._deaths.close()
        self.server.stop(hurry)

    def _check_ports(self) -> None:
        """Raise an error that names the port, if Triton ended because a port was taken."""
        if PORT_TAKEN.search(self.server.log()):
            free_ports(self.server.host, self.server.ports)

    def _dead_model(self) -> bool:
        return not all(map(is_running, self._processes))

    def _end(self) -> str:
        assert self.server.pid is not None
        return how_it_ended(exited(self.server.pid))


class _Model:
    """One model of a running Triton, judged by tiny decodes and by the processor time of its own processes."""

    def __init__(self, name: str, server: TritonServer, *, patience_s: float, busy_limit_s: float) -> None:
        self._name = name
        self._limits = {"patience_s": patience_s, "busy_limit_s": busy_limit_s}
        self._probe = Probe(lambda: ask_tiny(server.http_url, name, busy_limit_s))
        self._ask_at = 0.0
        self._watch: Watch | None = None
        self._processes: list[Process] = []

    def started(self, now: float, processes: Sequence[Process]) -> bool:
        """Return whether the model has answered a decode or an encode.

        Args:
            now: the time, in seconds.
            processes: the Python processes of all models; the model's own are picked out by their command lines.

        Raises:
            TritonServerError: Triton says that the model's Python process is not healthy.
        """
        if self._watch is not None:
            return True
        outcome = self._ask(now)
        if outcome is not None and outcome.answer is Answer.OK:
            mine = [process for process in processes if f"/{self._name}/1/model.py" in command_line(process.pid)]
            # Where Triton starts its processes in another way, none is known to be this model's. Then the work of all
            # of them counts.
            self._processes = mine or list(processes)
            self._watch = Watch(now=now, **self._limits)
        elif outcome is not None and outcome.final:
            raise TritonServerError(f"Triton is ready, but {self._name} does not answer: {outcome.reason}")
        return self._watch is not None

    def trouble(self, now: float) -> str | None:
        """Return in words what is wrong with the model, once it has started; None where nothing is."""
        assert self._watch is not None
        reason = self._watch.judge(now, self._ask(now), sum(map(cpu_seconds, self._processes)))
        return None if reason is None else f"{self._name}: {reason}"

    def _ask(self, now: float) -> Outcome | None:
        """Return the answer to the last question, if there is a new one; ask the next question when it is time."""
        outcome = self._probe.take()
        if outcome is not None:
            self._ask_at = now + ASK_EVERY_S
        elif now >= self._ask_at:
            self._probe.start()
        return outcome
