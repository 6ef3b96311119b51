"""Runs Triton and the gateway as one service: starts, watches and restarts them, and stops them without a trace.

    supervisor = Supervisor(ServeSettings(models={"vae_decoder": "demo"}), report=print)
    supervisor.launch()
    supervisor.wait_ready(lambda: False)
    ...
    supervisor.stop(hurry=lambda: False)

Each of the two children has a thread (`keeper`) that launches it, waits until it serves, and watches it. When anything
goes wrong with a child that served, this is reported, the child is killed (what it was doing fails at once, and its
clients get UNAVAILABLE), and it is started again after a delay that grows. If the supervisor itself is killed, what it
leaves behind is taken away by `fluxvae.serve.triton.guardian`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fluxvae.errors import InvalidOptionError
from fluxvae.serve.supervisor.checks import check_numpy, check_shared_memory, choose_ports
from fluxvae.serve.supervisor.health import Answer, get
from fluxvae.serve.supervisor.keeper import Keeper
from fluxvae.serve.supervisor.services import GatewayService
from fluxvae.serve.supervisor.settings import ServeSettings
from fluxvae.serve.supervisor.triton_service import TritonService
from fluxvae.serve.triton import guardian
from fluxvae.serve.triton.controls import CONFIG_KEY_VARIABLE
from fluxvae.serve.triton.installation import find_tritonserver
from fluxvae.serve.triton.ports import url_host
from fluxvae.serve.triton.repository import write_repository
from fluxvae.serve.triton.server import TritonServer

__all__ = ["ServeSettings", "Supervisor"]

_TICK_S = 0.1


class Supervisor:
    """One Triton server and one gateway, kept running until `stop`.

    Args:
        settings: what to serve, and how.
        report: is called with lines for people to read, such as warnings and restarts; also from other threads.
    """

    def __init__(self, settings: ServeSettings, *, report: Callable[[str], None]) -> None:
        self.settings = settings
        self.installation = find_tritonserver()
        self._report = report
        self._stop = threading.Event()
        self._keepers: list[Keeper] = []
        self._guardian: subprocess.Popen[bytes] | None = None
        self._tag = uuid.uuid4().hex
        self._folder: Path | None = None

    # Starting.

    def launch(self) -> None:
        """Check what can be checked beforehand, then start both children without waiting for them.

        `wait_ready` tells whether they could be started. From here on `stop` must be called, also after an error.

        Raises:
            FluxVAEError: a port is taken, shared memory is too small, or this installation of Triton cannot work.
        """
        check_numpy(self.installation)
        self.installation.check()
        s = self.settings
        if warning := check_shared_memory(s.max_pixels, len(s.models)):
            self._report(warning)
        wanted = {"--http-port": s.http_port, "--grpc-port": s.grpc_port, "--metrics-port": s.metrics_port}
        self.port, ports = choose_ports((s.host, s.port), s.triton_host, wanted)
        self._folder = Path(tempfile.mkdtemp(prefix="fluxvae-serve-"))
        self._start_guardian()
        log = _writable(Path(s.log_file).absolute()) if s.log_file is not None else None
        self.triton_log, self.gateway_log = log or self._folder / "triton.log", log or self._folder / "gateway.log"
        repository = self._folder / "models"
        self.server = TritonServer(
            write_repository(repository, {name: s.model_parameters(name) for name in s.models}, device=s.device),
            http_port=ports["--http-port"],
            grpc_port=ports["--grpc-port"],
            metrics_port=ports["--metrics-port"],
            host=s.triton_host,
            open_apis=["shared-memory"] if s.allow_client_shm else [],
            log_path=self.triton_log,
            env={guardian.RUN_VARIABLE: self._tag, **s.without_our_variables()},
            stop_timeout_s=s.drain_s,
            shm_prefix=self._shm_prefix,
            folder=self._folder,
        )
        self.triton = TritonService(
            self.server, list(s.models), self.triton_log, patience_s=s.patience_s, busy_limit_s=s.busy_limit_s
        )
        environment = {**os.environ, guardian.RUN_VARIABLE: self._tag, "FLUXVAE_TOKEN": s.token or ""}
        environment[CONFIG_KEY_VARIABLE] = self.server.config_key
        if s.token is None:
            del environment["FLUXVAE_TOKEN"]
        self.server.http_port, self.server.grpc_port, self.server.metrics_port = ports.values()
        self.gateway = GatewayService(
            s.gateway_command(self.port, self.server.grpc_url, self.server.metrics_url),
            host=s.host,
            port=self.port,
            env=environment,
            log_path=self.gateway_log,
        )
        for service in (self.triton, self.gateway):
            keeper = Keeper(service, self._stop, self._report, s.ready_timeout_s)
            self._keepers.append(keeper)
            keeper.start()

    @property
    def url(self) -> str:
        """The gateway's URL, as this machine reaches it."""
        return f"http://{url_host(self.settings.host)}:{self.port}"

    @property
    def serving(self) -> bool:
        """Whether both children are in service, as far as is known."""
        return all(keeper.serving.is_set() for keeper in self._keepers)

    def wait_ready(self, stopped: Callable[[], bool]) -> bool:
        """Wait until a decode has been answered, by Triton directly and through the gateway.

        Args:
            stopped: asked while waiting; the wait ends when it returns true.

        Returns:
            Whether everything is ready. It is False only where ``stopped`` ended the wait.

        Raises:
            FluxVAEError: one of the two children could not be started.
        """
        while not stopped():
            for keeper in self._keepers:
                if keeper.failure is not None:
                    raise keeper.failure
            if self.serving and get(f"{url_host(self.settings.host)}:{self.port}", "/readyz", 10).answer is Answer.OK:
                return True
            time.sleep(_TICK_S)
        return False

    def tend(self) -> None:
        """See after the watchers themselves: the threads that keep the children, and the guardian, which is restarted.

        To be called now and then while serving.

        Raises:
            Exception: a child can no longer be kept running; this is the reason.
        """
        for keeper in self._keepers:
            if keeper.failure is not None:
                raise keeper.failure
        if self._guardian is not None and self._guardian.poll() is not None:
            self._report("guardian: ended; restarting")
            self._start_guardian()

    # Stopping.

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Let both children finish what is under way, for `ServeSettings.drain_s` at most, then remove all traces.

        No process, shared memory or temporary file is left. Calling it again does no harm.

        Args:
            hurry: asked while waiting; the wait ends when it returns true.
        """
        deadline = time.monotonic() + self.settings.drain_s
        self._stop.set()
        for keeper in self._keepers:
            keeper.join()
        for keeper in reversed(self._keepers):  # the gateway goes first, because Triton decodes what it still waits for
            known_dead = not keeper.serving.is_set()
            keeper.service.stop(partial(_no_more_time, known_dead, deadline, hurry))
        self._keepers = []
        if self._guardian is not None:
            guardian.end(self._guardian)
            self._guardian = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # Its guardian.

    @property
    def _shm_prefix(self) -> str:
        return f"fluxvae_{os.getpid()}_{self._tag[:8]}_"

    def _start_guardian(self) -> None:
        self._guardian = guardian.start(self._tag, self._shm_prefix, str(self._folder))


def _writable(log: Path) -> Path:
    try:
        log.open("ab").close()
    except OSError as error:
        raise InvalidOptionError(f"--log-file: {log} cannot be written: {error.strerror}") from error
    return log


def _no_more_time(dead: bool, deadline: float, hurry: Callable[[], bool]) -> bool:
    return dead or hurry() or time.monotonic() > deadline
