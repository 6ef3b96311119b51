"""Launch a real Triton Inference Server on a model folder, and take it down without a trace.

    with TritonServer("triton_models", models=["vae_decoder"]) as server:
        client = tritonclient.http.InferenceServerClient(server.http_url)

The server is the ``tritonserver`` on the PATH (NVIDIA's container has one), else the one inside the
``nvidia-pytriton`` wheel, which is meant for tests and local use: see docs/triton.md.

Not covered here: restarting what died, a gateway in front (both: `fluxvae.serve.supervisor`), TLS. Linux only, as
Triton is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
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

from fluxvae.serve.triton.installation import Installation, TritonServerError, find_tritonserver
from fluxvae.serve.triton.ports import free_ports, url_host
from fluxvae.serve.triton.processes import exited, in_group, until

__all__ = ["Installation", "TritonServer", "TritonServerError", "find_tritonserver"]

_log = logging.getLogger(__name__)
_SHM = Path("/dev/shm")
_LAUNCHES = 3  # a free port may be taken between our look and Triton's bind; then we look again
_PORT_TAKEN = (
    "failed to start HTTP service",
    "failed to start GRPC service",
    "failed to start Metrics service",
)
# Tables, and what Triton's core says at level I or W; errors, and whatever a model says, are kept.
_CHATTER = re.compile(r"[+|]|[IW]\d{4} \S+ \d+ (?!pb_stub)\w+\.cc:")
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


class TritonServer:
    """A Triton server on one model folder: started by ``with`` or ``start()``, ready when that returns.

    Args:
        model_repository: the folder that holds one folder per model.
        models: the folders to load; none named: all.
        http_port, grpc_port, metrics_port: 0 picks a free one.
        host: the address all three bind to.
        log_path: append the server's log to this file; by default it goes when the server stops.
        env: variables for the server and its models, over this process's own.
        arguments: further command-line arguments for ``tritonserver``.
        ready_timeout_s: how long loading all models may take.
        stop_timeout_s: how long in-flight requests get to finish; after it and a short grace, SIGKILL.
        shm_prefix: of the names of its shared-memory regions; by default one of its own.
        folder: where its temporary folder is made; by default the system's place.

    Raises (from ``start``):
        TritonServerError: with the last lines of the log, and what to do.
    """

    def __init__(
        self,
        model_repository: str | os.PathLike[str],
        *,
        models: Sequence[str] = (),
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
        self._parent = folder
        self._folder: Path | None = None
        self._log_start = 0
        self._last_log = ""

    # Where it listens, in the form tritonclient takes.

    @property
    def http_url(self) -> str:
        """``host:port`` of the HTTP endpoint."""
        return self._url(self.http_port)

    @property
    def grpc_url(self) -> str:
        """``host:port`` of the gRPC endpoint."""
        return self._url(self.grpc_port)

    @property
    def metrics_url(self) -> str:
        """The whole address of the Prometheus page."""
        return f"http://{self._url(self.metrics_port)}/metrics"

    def _model_control(self) -> list[str]:
        if not self._models:
            return ["--model-control-mode=none"]
        return ["--model-control-mode=explicit", *(f"--load-model={name}" for name in self._models)]

    def _url(self, port: int) -> str:
        return f"{url_host(self.host)}:{port}"

    # What it is doing.

    @property
    def pid(self) -> int | None:
        """The server's process id, also its process group's; None before ``start`` and after ``stop``."""
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        """Whether the server process is there. A dead Python stub does not end it: only a decode tells."""
        # WNOWAIT leaves the ended process in place, so that its id, and its group's, cannot be reused before stop().
        return self._process is not None and exited(self._process.pid) is None

    def ready(self) -> bool:
        """Whether the server says that it and all its models are ready."""
        try:
            with _LOOPBACK.open(f"http://{self.http_url}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def log(self) -> str:
        """What this launch logged, its models included; the last of it once stopped."""
        path = self._current_log()
        if path is not None and path.is_file():
            with path.open("rb") as file:
                file.seek(self._log_start)
                return file.read().decode("utf-8", errors="replace")
        return self._last_log

    def shm_regions(self) -> list[Path]:
        """The shared-memory regions of this server's Python models that exist now."""
        return sorted(_SHM.glob(f"{self.shm_prefix}*"))

    # Starting.

    def start(self) -> None:
        """Launch, and return when every model is ready."""
        self._check_not_started()
        for launch in range(1, _LAUNCHES + 1):
            try:
                self.launch()
                self._wait_until_ready()
                return
            except TritonServerError as error:
                self.stop()
                raced = any(line in str(error) for line in _PORT_TAKEN) and 0 in self._wanted_ports
                if not raced or launch == _LAUNCHES:
                    raise
            except BaseException:  # also Ctrl-C while loading: leave nothing behind
                self.stop()
                raise

    def launch(self) -> None:
        """Launch, and return at once: `running` and `ready` tell the rest, `stop` is owed."""
        self._check_not_started()
        if self.installation.wheel is not None:
            _log.info("using %s", self.installation)
        self.http_port, self.grpc_port, self.metrics_port = free_ports(self.host, self._wanted_ports)
        self._folder = Path(tempfile.mkdtemp(prefix="fluxvae-triton-", dir=self._parent))
        command = [
            str(self.installation.binary),
            f"--model-repository={self.model_repository}",
            *self._model_control(),
            "--disable-auto-complete-config",  # it would run the model in an interpreter without our packages
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
        command += self.installation.prepare(self._folder, environment)
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
                cwd=self._folder,  # Triton drops what it writes here
                start_new_session=True,  # a group of its own: the stubs are in it, and Ctrl-C reaches only us
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
        """SIGTERM, then SIGKILL after the deadline; no process, region or file of it is left. Safe to call again.

        Args:
            hurry: asked while waiting; true ends the wait. What is already known to be dead or hung is not worth one.
        """
        if self._process is not None:
            group = self._process.pid
            if not hurry():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(group, signal.SIGTERM)
            for _ in until(self._stop_timeout_s + 10):  # Triton counts its own seconds, and unloads after them
                if exited(group) is not None or hurry():
                    break
            else:
                _log.warning("Triton (process %d) did not stop in time: killed", group)
            # The ended server still holds its id, so the group is ours: this ends stubs that outlived it.
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
        """The end of the log without Triton's chatter, for an error message."""
        kept = [line for line in self.log().splitlines() if line.strip() and not _CHATTER.match(line)]
        return "The end of its log:\n  " + "\n  ".join(kept[-lines:] or ["(empty)"])
