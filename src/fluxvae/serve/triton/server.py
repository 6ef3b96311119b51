"""Launches a real Triton Inference Server on a model folder, and takes it down without a trace.

    with TritonServer("triton_models", models=["vae_decoder"]) as server:
        client = tritonclient.http.InferenceServerClient(server.http_url)

If the process that launched the server ends without stopping it, in whatever way, a guardian ends the server
(`fluxvae.serve.triton.guardian`).

The server is the ``tritonserver`` on the PATH, which NVIDIA's container has. If there is none, it is the one inside the
``nvidia-pytriton`` wheel, which is meant for tests and local use: see docs/triton.md.

This module does not restart what died and puts no gateway in front of the server (`fluxvae.serve.supervisor` does
both), and it does not do TLS. It works on Linux only, as Triton does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from fluxvae.errors import InvalidOptionError
from fluxvae.serve.triton import guardian
from fluxvae.serve.triton.controls import APIS, restrictions
from fluxvae.serve.triton.installation import Installation, TritonServerError, find_tritonserver
from fluxvae.serve.triton.ports import free_ports, url_host
from fluxvae.serve.triton.processes import exited, in_group, listens, until

__all__ = ["APIS", "PORT_TAKEN", "Installation", "TritonServer", "TritonServerError", "find_tritonserver"]

_log = logging.getLogger(__name__)
_SHM = Path("/dev/shm")
_LAUNCHES = 3  # another program may take a free port between our look and Triton's bind; then a new one is picked
PORT_TAKEN = re.compile("failed to start (HTTP|GRPC|Metrics) service")
"""What Triton's log says when Triton cannot listen on a port, for whatever reason."""
# The lines of the log that an error message leaves out: tables, and what Triton's core says at level I or W. Errors are
# kept, and so is whatever a model says.
_CHATTER = re.compile(r"[+|]|[IW]\d{4} \S+ \d+ (?!pb_stub)\w+\.cc:")
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # opens URLs directly, never through a proxy


class TritonServer:
    """A Triton server on one model folder. ``with`` or ``start()`` starts it, and it is ready when that returns.

    Args:
        model_repository: the folder that holds one folder per model.
        models: the names of the models to serve; none named means all. They are settled at the start: no client can
            load another model, nor unload one.
        open_apis: the groups of Triton's controls (`fluxvae.serve.triton.controls.APIS`), such as ``"shared-memory"``,
            that any client may use besides inference, health and metadata. All other groups are closed.
        http_port, grpc_port, metrics_port: the ports of the three endpoints; 0 picks a free one.
        host: the address that all three bind to.
        log_path: the file to which the server's log is appended. By default the log goes when the server stops.
        env: variables for the server and its models, on top of this process's own. If ``FLUXVAE_RUN`` is among them,
            the caller has a guardian of its own; otherwise the server gets one.
        arguments: further command-line arguments for ``tritonserver``, but none about which models it serves.
        ready_timeout_s: how long loading all models may take.
        stop_timeout_s: how long requests under way get to finish. After it and a short grace the server is killed.
        shm_prefix: how the names of its shared-memory regions begin; by default a prefix of its own.
        folder: the folder in which its temporary folder is made; by default the system's place for such folders.

    Raises:
        TritonServerError: the repository does not exist, or lacks one of the models.
        InvalidOptionError: a group of controls is unknown, or an argument would let clients choose the models.
    """

    def __init__(
        self,
        model_repository: str | os.PathLike[str],
        *,
        models: Sequence[str] = (),
        open_apis: Sequence[str] = (),
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        host: str = "127.0.0.1",
        log_path: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        ready_timeout_s: float = 300.0,
        stop_timeout_s: float = 20.0,
        shm_prefix: str | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.installation = find_tritonserver()
        self.model_repository = Path(model_repository).resolve()
        if not self.model_repository.is_dir():
            raise TritonServerError(f"model repository {self.model_repository}: no such folder")
        self._models = list(models)
        for name in self._models:
            if "/" in name or not (self.model_repository / name).is_dir():
                has = ", ".join(sorted(path.name for path in self.model_repository.iterdir() if path.is_dir()))
                raise TritonServerError(
                    f"models: got {name!r}, but {self.model_repository} holds no such folder; it has {has or 'none'}"
                )
        for argument in arguments:
            if argument.lstrip("-").startswith(("model-control-mode", "load-model", "model-repo", "model-store")):
                raise InvalidOptionError(
                    f"arguments: got {argument!r}, but what is served is settled by model_repository and models: with "
                    "model control any client could run code of its own here"
                )
        self._open_apis = list(open_apis)
        self.config_key = secrets.token_hex(16)
        """The key that opens Triton's model configuration to whoever sends it; the gateway does."""
        self._restrictions = restrictions(self._open_apis, self.config_key)
        self.host = host
        self.http_port, self.grpc_port, self.metrics_port = http_port, grpc_port, metrics_port
        self.shm_prefix = shm_prefix or f"fluxvae_{os.getpid()}_{uuid.uuid4().hex[:8]}_"
        self._wanted_ports = (http_port, grpc_port, metrics_port)
        self._log_path = Path(log_path) if log_path is not None else None
        self._env = dict(env or {})
        self._arguments = list(arguments)
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._parent = folder
        self._folder: Path | None = None
        self._log_start = 0
        self._last_log = ""

    # Where the server listens, in the form that tritonclient takes.

    @property
    def http_url(self) -> str:
        """The ``host:port`` of the HTTP endpoint."""
        return self._url(self.http_port)

    @property
    def grpc_url(self) -> str:
        """The ``host:port`` of the gRPC endpoint."""
        return self._url(self.grpc_port)

    @property
    def metrics_url(self) -> str:
        """The whole URL of the page with Prometheus metrics."""
        return f"http://{self._url(self.metrics_port)}/metrics"

    @property
    def ports(self) -> list[int]:
        """The ports of HTTP, gRPC and metrics, in this order."""
        return [self.http_port, self.grpc_port, self.metrics_port]

    def _served(self, folder: Path) -> Path:
        """Return a repository that holds exactly the models to serve: the given one, or one of links to some of it."""
        if not self._models:
            return self.model_repository
        into = folder / "models"
        into.mkdir()
        for name in self._models:
            (into / name).symlink_to(self.model_repository / name)
        return into

    def _url(self, port: int) -> str:
        return f"{url_host(self.host)}:{port}"

    # What the server is doing.

    @property
    def pid(self) -> int | None:
        """The id of the server's process and of its process group. None before ``start`` and after ``stop``."""
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        """Whether the server's process runs. It goes on without a model's Python process: only a decode shows that."""
        # `exited` does not reap the ended process, so its id, which is its group's too, cannot be reused before stop().
        return self._process is not None and exited(self._process.pid) is None

    def ready(self) -> bool:
        """Return whether the server says that it and all its models are ready, and it is this server that says so.

        Another server on the same port might answer in its place.
        """
        try:
            with _LOOPBACK.open(f"http://{self.http_url}/v2/health/ready", timeout=5) as answer:
                if answer.status != 200:
                    return False
        except (urllib.error.URLError, OSError):
            return False
        # Any process of its group will do, because a tritonserver on the PATH may be a script that starts the real one.
        return self.pid is not None and any(listens(process.pid, self.http_port) for process in in_group(self.pid))

    def log(self) -> str:
        """Return what was logged since the last launch, by the server and its models; also after it was stopped."""
        path = self._current_log()
        if path is not None and path.is_file():
            with path.open("rb") as file:
                file.seek(self._log_start)
                return file.read().decode("utf-8", errors="replace")
        return self._last_log

    def shm_regions(self) -> list[Path]:
        """Return the shared-memory regions of this server's Python models that exist now."""
        return sorted(_SHM.glob(f"{self.shm_prefix}*"))

    # Starting.

    def start(self) -> None:
        """Launch the server, and return when every model is ready. After an error nothing of the server is left.

        Raises:
            TritonServerError: Triton ended, or was not ready in time; with the last lines of its log, and what to do.
        """
        self._check_not_started()
        for launch in range(1, _LAUNCHES + 1):
            try:
                self.launch()
                self._wait_until_ready()
                return
            except TritonServerError as error:
                self.stop()
                raced = PORT_TAKEN.search(str(error)) and 0 in self._wanted_ports
                if not raced or launch == _LAUNCHES:
                    raise
            except BaseException:  # Ctrl-C while it loads must leave nothing behind either
                self.stop()
                raise

    def launch(self) -> None:
        """Launch the server and return at once. `running` and `ready` tell how it goes; `stop` must be called later.

        Raises:
            TritonServerError: it is started already, a port is taken, or the wheel cannot run models in this Python.
        """
        self._check_not_started()
        if self.installation.wheel is not None:
            _log.info("using %s", self.installation)
        self.http_port, self.grpc_port, self.metrics_port = free_ports(self.host, self._wanted_ports)
        self._folder = Path(tempfile.mkdtemp(prefix="fluxvae-triton-", dir=self._parent))
        command = [
            str(self.installation.binary),
            f"--model-repository={self._served(self._folder)}",
            "--model-control-mode=none",  # with model control a client could send a model.py of its own to be run
            *self._restrictions,
            "--disable-auto-complete-config",  # otherwise Triton runs the model in an interpreter without our packages
            f"--http-address={self.host}",
            f"--grpc-address={self.host}",
            f"--metrics-address={self.host}",
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            f"--exit-timeout-secs={max(1, int(self._stop_timeout_s))}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
        ]
        environment = {**os.environ, **self._env}
        if guardian.RUN_VARIABLE not in self._env:
            environment[guardian.RUN_VARIABLE] = tag = uuid.uuid4().hex
            self._guardian = guardian.start(tag, self.shm_prefix, str(self._folder))
        command += self.installation.prepare(self._folder, environment)
        if "shared-memory" in self._open_apis and self.installation.needs_leave_for_shared_memory(environment):
            command.append("--allow-client-shm=true")
        log_path = self._current_log()
        assert log_path is not None
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [*command, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self._folder,  # where Triton leaves the files that it writes
                start_new_session=True,  # a group of its own, which the stubs are in too; and Ctrl-C reaches only us
            )

    def _wait_until_ready(self) -> None:
        for _ in until(self._ready_timeout_s):
            if not self.running:
                raise TritonServerError(f"Triton exited before it was ready. {self.log_tail()}")
            if self.ready():
                return
        raise TritonServerError(
            f"Triton was not ready within {self._ready_timeout_s:g} s; allow more with ready_timeout_s. "
            f"{self.log_tail()}"
        )

    def _check_not_started(self) -> None:
        if self._process is not None:
            raise TritonServerError("this server is already started; stop() it first")

    # Stopping.

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Stop the server by SIGTERM, or by SIGKILL after the deadline. Calling it again does no harm.

        No process, shared-memory region or temporary file of the server is left.

        Args:
            hurry: asked while waiting; the wait ends when it returns true. A server that is already known to be dead or
                hung need not be waited for.
        """
        if self._process is not None:
            group = self._process.pid
            if not hurry():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(group, signal.SIGTERM)
            # Triton counts the same seconds by itself, and unloads its models only after them: hence 10 more.
            for _ in until(self._stop_timeout_s + 10):
                if exited(group) is not None or hurry():
                    break
            else:
                _log.warning("Triton (process %d) did not stop in time: killed", group)
            # The ended server is not reaped, so its group's id is still ours. This ends stubs that outlived the server.
            os.killpg(group, signal.SIGKILL)
            self._process.wait()
            for _ in until(10.0):
                if not in_group(group):
                    break
            self._process = None
        for region in self.shm_regions():
            region.unlink(missing_ok=True)
        if self._folder is not None:
            self._last_log = self.log()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._guardian is not None:
            guardian.end(self._guardian)
            self._guardian = None

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _current_log(self) -> Path | None:
        if self._log_path is not None:
            return self._log_path
        return self._folder / "triton.log" if self._folder is not None else None

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of the log for an error message, without those that Triton's core logs routinely."""
        kept = [line for line in self.log().splitlines() if line.strip() and not _CHATTER.match(line)]
        return "The end of its log:\n  " + "\n  ".join(kept[-lines:] or ["(empty)"])
