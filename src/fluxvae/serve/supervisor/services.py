"""What the supervisor keeps alive, each started, asked and stopped in the same few words: the words, and the gateway.

Triton is in `fluxvae.serve.supervisor.triton_service`.
"""

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
from fluxvae.serve.supervisor.health import ASK_EVERY_S, Answer, Probe, Watch, get
from fluxvae.serve.triton.ports import free_ports, url_host
from fluxvae.serve.triton.processes import Deaths, exited, how_it_ended, in_group, listens, until

__all__ = ["GatewayService", "Service"]

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
            self._ask_at = now + ASK_EVERY_S
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
