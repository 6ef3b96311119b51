"""`fluxvae serve` as a person runs it: a process of its own, read by what it prints."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from serve.client import Request, random_latents
from serve.waiting import wait_for

LOOPBACK = "127.0.0.1"
START_S = 200.0  # generous, because the machine may do other things too


@dataclass
class Supervised:
    """A running ``fluxvae serve`` on free ports."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @classmethod
    def start(
        cls, checkpoint: Path | str | None, arguments: Sequence[str] = (), env: dict[str, str] | None = None
    ) -> Supervised:
        command = [sys.executable, "-m", "fluxvae.cli", "serve", "--threads", "1"]
        command += [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
        for port in ("--port", "--grpc-port", "--http-port", "--metrics-port"):
            command += [port, "0"]
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(env or {})},
        )
        self = cls(process)
        assert process.stdout is not None
        threading.Thread(target=self.lines.extend, args=(process.stdout,), daemon=True).start()
        return self

    def ready(self) -> Supervised:
        wait_for(lambda: "Ctrl-C stops it." in self.output or self.process.poll() is not None, "ready", START_S)
        assert self.process.poll() is None, self.output
        self.everything = {self.process.pid, *(child.pid for child in self.children())}
        self.shm_prefix = f"fluxvae_{self.process.pid}_"
        self.folder = Path(re.search(r"^logs?: (\S+)/triton.log", self.output, re.MULTILINE)[1])  # type: ignore[index]
        return self

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def address(self, name: str) -> str:
        """``host:port`` of what was announced under this name."""
        found = re.search(rf"^  {name} +(?:http://)?([\d.]+:\d+)", self.output, re.MULTILINE)
        assert found, self.output
        return found[1]

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, part: str) -> psutil.Process:
        """The only child process whose command line holds this."""
        [found] = [child for child in self.children() if part in " ".join(child.cmdline()[:3])]
        return found

    @property
    def stub(self) -> psutil.Process:
        return self.child("triton_python_backend_stub")

    @property
    def triton(self) -> psutil.Process:
        return self.child("bin/tritonserver")

    @property
    def gateway(self) -> psutil.Process:
        return self.child("fluxvae.serve.gateway")

    @property
    def guardian(self) -> psutil.Process:
        [found] = [child for child in self.children() if "guardian.py" in " ".join(child.cmdline())]
        return found

    def regions(self) -> list[str]:
        return [name for name in os.listdir("/dev/shm") if name.startswith(self.shm_prefix)]

    def told(self, text: str) -> int:
        return self.output.count(text)

    def signal_and_wait(self, number: int, timeout_s: float = 90.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """End everything that was started, however the test went."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def assert_nothing_left(self) -> None:
        def left() -> list[int]:
            return [pid for pid in self.everything if _runs(pid)]

        wait_for(lambda: not left(), f"the end of {left()}", 10)
        assert self.regions() == []
        assert not self.folder.exists()
        for name in ("gateway", "Triton gRPC", "Triton HTTP", "metrics"):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                host, _, port = self.address(name).partition(":")
                probe.bind((host, int(port)))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # process 1 may reap it late
    except psutil.NoSuchProcess:
        return False


def a_request(seed: int = 0, height: int = 64, width: int = 96) -> Request:
    return Request(random_latents(seed, height, width), height, width)
