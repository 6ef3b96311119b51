"""The interface of what the supervisor keeps alive (`Service`), and the gateway as such a service.

Triton as a service is in `fluxvae.serve.supervisor.triton_service`.
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
    """One child of the supervisor: started, asked how it is, and stopped. No method but `stop` blocks for long.

    `wait_for_end`, `trouble` and `notice` are for a child that has started: `started` has returned true.
    """

    name: str
    """What messages call the child."""

    def launch(self) -> None:
        """Start the child without waiting for it. From here on `stop` must be called, also after an error."""

    def started(self) -> bool:
        """Return whether the child serves by now.

        Raises:
            FluxVAEError: the child has failed and never will serve.
        """

    def wait_for_end(self, timeout_s: float) -> bool:
        """Wait until one of the child's processes may have ended (true), or the time is up (false)."""

    def trouble(self) -> str | None:
        """Return in words what is wrong with the child, so that it must be restarted; None where nothing is."""

    def notice(self) -> str | None:
        """Return what people should hear of although the child goes on; None where there is nothing."""

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Let the child finish what it does, then end all its processes.

        Args:
            hurry: asked while waiting; as soon as it returns true the child is killed.
        """


class GatewayService:
    """The gateway as a service: an HTTP server in a process of its own, which answers GET /healthz with 200.

    Args:
        command: the command line that starts it.
        host, port: where it listens.
        env: its whole environment; nothing of this process's is added.
        log_path: the file to which its output is appended.
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
        """The id of its process, which is also the id of its process group; None where it was not launched."""
        return self._process.pid if self._process else None

    def launch(self) -> None:
        """Start the gateway, as `Service.launch` says.

        Raises:
            PortTakenError: another program has its port.
        """
        free_ports(self._host, [self._port])
        self._probe = Probe(lambda: get(self._address, "/healthz", _GATEWAY_PATIENCE_S))
        # No limits of time are needed: the gateway does not decode, so it is never busy for long, and two failures in a
        # row are enough to judge it by.
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
        """Return whether the gateway answers; raise an error with the end of its log where it has ended."""
        assert self._process is not None
        if (status := exited(self._process.pid)) is not None:
            free_ports(self._host, [self._port])  # raises an error of its own if a taken port is why it ended
            with self._log_path.open("rb") as log:
                log.seek(self._log_start)
                lines = log.read().decode(errors="replace").splitlines()[-20:]
            raise FluxVAEError(
                f"the gateway {how_it_ended(status)} before it was ready. The end of its log:\n  " + "\n  ".join(lines)
            )
        if not listens(self._process.pid, self._port):  # otherwise another program on this port might answer instead
            return False
        return get(self._address, "/healthz", _GATEWAY_PATIENCE_S).answer is Answer.OK

    def wait_for_end(self, timeout_s: float) -> bool:
        """Wait for the end of its process, as `Service.wait_for_end` says."""
        return self._deaths.wait(timeout_s)

    def trouble(self) -> str | None:
        """Say that the process has ended, or that two questions in a row failed."""
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
        """Return None: there is nothing in the gateway's log that people must hear of at once."""
        return None

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Stop it by SIGTERM, on which it takes no new requests and answers those that are under way."""
        if self._process is None:
            return
        self._deaths.close()
        group = self._process.pid
        if not hurry():
            with contextlib.suppress(ProcessLookupError):
                os.kill(group, signal.SIGTERM)
            while exited(group) is None and not hurry():
                time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)  # the process is not reaped yet, so no other group can have this id
        self._process.wait()
        for _ in until(10.0):
            if not in_group(group):
                break
        self._process = None
