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
from fluxvae.serve.supervisor.health import Answer, Probe, Watch, decode_tiny, get
from fluxvae.serve.triton.processes import Process, cpu_seconds, exited, how_it_ended, in_group, is_running, until
from fluxvae.serve.triton.server import TritonServer, TritonServerError

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

    def trouble(self) -> str | None:
        """Once it has started: what is wrong with it."""

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Let it finish what it does, until ``hurry``; then nothing of it is left."""


class TritonService:
    """A Triton server that is asked for tiny decodes.

    Args:
        server: not yet started, with fixed ports.
        patience_s, busy_limit_s: of `fluxvae.serve.supervisor.health.Watch`.
    """

    name = "Triton"

    def __init__(self, server: TritonServer, *, patience_s: float, busy_limit_s: float) -> None:
        self.server = server
        self._patience_s = patience_s
        self._busy_limit_s = busy_limit_s
        self._models: list[Process] = []

    def launch(self) -> None:
        """Start it on its ports."""
        self._models = []
        self._ask_at = 0.0
        self._probe = Probe(lambda: decode_tiny(self.server.http_url, self._busy_limit_s))
        self.server.launch()

    def started(self) -> bool:
        """Whether a decode has answered."""
        if not self.server.running:
            raise model_error(self.server.log()) or TritonServerError(
                f"Triton {self._end()} before it was ready. {self.server.log_tail()}"
            )
        if not self._models:
            if not self.server.ready():
                return False
            assert self.server.pid is not None
            self._models = [process for process in in_group(self.server.pid) if process.pid != self.server.pid]
        if self._dead_model():
            raise TritonServerError(f"the model's Python process died before it was ready. {self.server.log_tail()}")
        now = time.monotonic()
        if now >= self._ask_at:
            self._probe.start()
        outcome = self._probe.take()
        if outcome is not None and outcome.answer is Answer.OK:
            self._watch = Watch(now=now, patience_s=self._patience_s, busy_limit_s=self._busy_limit_s)
            self._ask_at = now + _ASK_EVERY_S
            return True
        if outcome is not None:
            self._ask_at = now + _ASK_EVERY_S
            if outcome.final:
                raise TritonServerError(f"Triton is ready, but does not decode: {outcome.reason}")
        return False

    def trouble(self) -> str | None:
        """The rule of `fluxvae.serve.supervisor.health`, and what is plain to see."""
        if not self.server.running:
            return self._end()
        if self._dead_model():
            return "its Python process died"
        now = time.monotonic()
        outcome = self._probe.take()
        if outcome is not None:
            self._ask_at = now + _ASK_EVERY_S
        elif now >= self._ask_at:
            self._probe.start()
        return self._watch.judge(now, outcome, sum(map(cpu_seconds, self._models)))

    def stop(self, hurry: Callable[[], bool]) -> None:
        """SIGTERM: no new requests, those under way are answered."""
        self.server.stop(hurry)

    def _dead_model(self) -> bool:
        return not all(map(is_running, self._models))

    def _end(self) -> str:
        assert self.server.pid is not None
        return how_it_ended(exited(self.server.pid))


class GatewayService:
    """An HTTP server of ours in a process of its own, which answers GET /healthz with 200.

    Args:
        command: its command line.
        address: ``host:port`` as this machine reaches it.
        env: its whole environment.
        log_path: its output is appended to this file.
    """

    name = "gateway"

    def __init__(self, command: Sequence[str], *, address: str, env: Mapping[str, str], log_path: Path) -> None:
        self._command = list(command)
        self._address = address
        self._env = dict(env)
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, also its process group's; None where it is not running."""
        return self._process.pid if self._process else None

    def launch(self) -> None:
        """Start it."""
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

    def started(self) -> bool:
        """Whether it answers."""
        assert self._process is not None
        if (status := exited(self._process.pid)) is not None:
            with self._log_path.open("rb") as log:
                log.seek(self._log_start)
                lines = log.read().decode(errors="replace").splitlines()[-20:]
            raise FluxVAEError(
                f"the gateway {how_it_ended(status)} before it was ready. The end of its log:\n  " + "\n  ".join(lines)
            )
        return get(self._address, "/healthz", _GATEWAY_PATIENCE_S).answer is Answer.OK

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

    def stop(self, hurry: Callable[[], bool]) -> None:
        """SIGTERM: no new requests, those under way are answered."""
        if self._process is None:
            return
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
