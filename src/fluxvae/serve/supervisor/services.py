"""What the supervisor keeps alive: Triton and the gateway, each started, asked, and stopped in the same few words."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fluxvae.errors import FluxVAEError
from fluxvae.serve.supervisor.checks import model_error
from fluxvae.serve.supervisor.health import Answer, Outcome, Probe, Watch, decode_tiny, get
from fluxvae.serve.supervisor.notices import Notices
from fluxvae.serve.triton.ports import free_ports, url_host
from fluxvae.serve.triton.processes import (
    Deaths,
    Process,
    command_line,
    cpu_seconds,
    exited,
    how_it_ended,
    in_group,
    is_running,
    listens,
    until,
)
from fluxvae.serve.triton.server import PORT_TAKEN, TritonServer, TritonServerError

__all__ = ["GatewayService", "Service", "TritonService"]

_ASK_EVERY_S = 2.0
_GATEWAY_PATIENCE_S = 10.0


class Service(Protocol):
    """One child of the supervisor. Nothing here blocks for more than seconds."""

    name: str

    def launch(self) -> None:
        """Start it, without waiting; `stop` is owed from here on, also after an error."""

    def started(self) -> bool:
        """Whether it serves by now.

        Raises:
            FluxVAEError: it never will.
        """

    def wait_for_end(self, timeout_s: float) -> bool:
        """Once it has started: wait until a process of it may have ended, or the time is up."""

    def trouble(self) -> str | None:
        """Once it has started: what is wrong with it."""

    def notice(self) -> str | None:
        """Once it has started: what people should hear of, though it goes on."""

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Let it finish what it does, until ``hurry``; then nothing of it is left."""


class TritonService:
    """A Triton server whose every model is asked for tiny decodes.

    Args:
        server: not yet started, with fixed ports.
        models: the names of those it serves.
        log: where it and its models write.
        patience_s, busy_limit_s: of `fluxvae.serve.supervisor.health.Watch`.
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
        """Start it on its ports."""
        self._processes = []
        self._deaths = Deaths([])
        self._notices = Notices(self._log)
        self._models = [
            _Model(name, self.server, patience_s=self._patience_s, busy_limit_s=self._busy_limit_s)
            for name in self._names
        ]
        self.server.launch()

    def started(self) -> bool:
        """Whether every model has answered a decode."""
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
        answered = [model.started(now, self._processes) for model in self._models]  # all are asked at once
        return all(answered)

    def wait_for_end(self, timeout_s: float) -> bool:
        """Of Triton, or of one of its models' processes."""
        return self._deaths.wait(timeout_s)

    def trouble(self) -> str | None:
        """The rule of `fluxvae.serve.supervisor.health`, and what is plain to see."""
        if not self.server.running:
            return self._end()
        if self._dead_model():
            return "its Python process died"
        now = time.monotonic()
        return next(filter(None, [model.trouble(now) for model in self._models]), None)

    def notice(self) -> str | None:
        """That answers find no room in shared memory."""
        return self._notices.take(time.monotonic())

    def stop(self, hurry: Callable[[], bool]) -> None:
        """SIGTERM: no new requests, those under way are answered."""
        self._deaths.close()
        self.server.stop(hurry)

    def _check_ports(self) -> None:
        """Say which port it was, where one is why it ended."""
        if PORT_TAKEN.search(self.server.log()):
            free_ports(self.server.host, self.server.ports)

    def _dead_model(self) -> bool:
        return not all(map(is_running, self._processes))

    def _end(self) -> str:
        assert self.server.pid is not None
        return how_it_ended(exited(self.server.pid))


class _Model:
    """One model of a running Triton: tiny decodes, and the processor time of its own processes."""

    def __init__(self, name: str, server: TritonServer, *, patience_s: float, busy_limit_s: float) -> None:
        self._name = name
        self._limits = {"patience_s": patience_s, "busy_limit_s": busy_limit_s}
        self._probe = Probe(lambda: decode_tiny(server.http_url, name, busy_limit_s))
        self._ask_at = 0.0
        self._watch: Watch | None = None
        self._processes: list[Process] = []

    def started(self, now: float, processes: Sequence[Process]) -> bool:
        """Whether it has answered a decode.

        Args:
            processes: of all models.
        """
        if self._watch is not None:
            return True
        outcome = self._ask(now)
        if outcome is not None and outcome.answer is Answer.OK:
            mine = [process for process in processes if f"/{self._name}/1/model.py" in command_line(process.pid)]
            # A Triton that starts its processes in another way: the work of any is the work of each.
            self._processes = mine or list(processes)
            self._watch = Watch(now=now, **self._limits)
        elif outcome is not None and outcome.final:
            raise TritonServerError(f"Triton is ready, but {self._name} does not decode: {outcome.reason}")
        return self._watch is not None

    def trouble(self, now: float) -> str | None:
        """What is wrong with it, once it has started."""
        assert self._watch is not None
        reason = self._watch.judge(now, self._ask(now), sum(map(cpu_seconds, self._processes)))
        return None if reason is None else f"{self._name}: {reason}"

    def _ask(self, now: float) -> Outcome | None:
        """The answer to the last question; asks the next when it is time."""
        outcome = self._probe.take()
        if outcome is not None:
            self._ask_at = now + _ASK_EVERY_S
        elif now >= self._ask_at:
            self._probe.start()
        return outcome


class GatewayService:
    """An HTTP server of ours in a process of its own, which answers GET /healthz with 200.

    Args:
        command: its command line.
        host, port: where it listens.
        env: its whole environment.
        log_path: its output is appended to this file.
    """

    name = "gateway"

    def __init__(self, command: Sequence[str], *, host: str, port: int, env: Mapping[str, str], log_path: Path) -> None:
        self._command = list(command)
        self._host, self._port = host, port
        self._address = f"{url_host(host)}:{port}"
        self._env = dict(env)
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, also its process group's; None where it is not running."""
        return self._process.pid if self._process else None

    def launch(self) -> None:
        """Start it."""
        free_ports(self._host, [self._port])
        self._probe = Probe(lambda: get(self._address, "/healthz", _GATEWAY_PATIENCE_S))
        # Two failures in a row are enough: it is never busy for long, since it does not decode.
        self._watch = Watch(now=time.monotonic(), patience_s=math.inf, busy_limit_s=math.inf)
        self._ask_at = 0.0
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,  # so that Ctrl-C reaches only us
            )
        self._deaths = Deaths([self._process.pid])

    def started(self) -> bool:
        """Whether it answers."""
        assert self._process is not None
        if (status := exited(self._process.pid)) is not None:
            free_ports(self._host, [self._port])  # says so, if that is why
            with self._log_path.open("rb") as log:
                log.seek(self._log_start)
                lines = log.read().decode(errors="replace").splitlines()[-20:]
            raise FluxVAEError(
                f"the gateway {how_it_ended(status)} before it was ready. The end of its log:\n  " + "\n  ".join(lines)
            )
        if not listens(self._process.pid, self._port):  # another program with this port might answer
            return False
        return get(self._address, "/healthz", _GATEWAY_PATIENCE_S).answer is Answer.OK

    def wait_for_end(self, timeout_s: float) -> bool:
        """Of its process."""
        return self._deaths.wait(timeout_s)

    def trouble(self) -> str | None:
        """That it ended, or two questions in a row without an answer."""
        assert self._process is not None
        if (status := exited(self._process.pid)) is not None:
            return how_it_ended(status)
        now = time.monotonic()
        outcome = self._probe.take()
        if outcome is not None:
            self._ask_at = now + _ASK_EVERY_S
        elif now >= self._ask_at:
            self._probe.start()
        return self._watch.judge(now, outcome, 0.0)

    def notice(self) -> str | None:
        """Nothing: its log has what it says."""
        return None

    def stop(self, hurry: Callable[[], bool]) -> None:
        """SIGTERM: no new requests, those under way are answered."""
        if self._process is None:
            return
        self._deaths.close()
        group = self._process.pid
        if not hurry():
            with contextlib.suppress(ProcessLookupError):
                os.kill(group, signal.SIGTERM)
            while exited(group) is None and not hurry():
                time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)  # not reaped yet: the id is still ours
        self._process.wait()
        for _ in until(10.0):
            if not in_group(group):
                break
        self._process = None
