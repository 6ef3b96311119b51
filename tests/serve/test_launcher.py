"""The launcher on a real server with a model that needs nothing: it starts, it says why not, it leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http

from fluxvae.serve.triton import installation
from fluxvae.serve.triton import server as triton
from fluxvae.serve.triton.server import TritonServer, TritonServerError, find_tritonserver
from serve.waiting import wait_for

CONFIG = """
name: "echo" backend: "python" max_batch_size: 0
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""
ECHO = """
import os, sys
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def initialize(self, args):
        print("PREFIX", sys.prefix, "GREETING", os.environ.get("GREETING"))
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(r, "x").as_numpy())])
                for r in requests]
"""


def write_model(repository: Path, code: str = ECHO) -> Path:
    version = repository / "echo" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(code)
    (version.parent / "config.pbtxt").write_text(CONFIG)
    return repository


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_model(tmp_path / "repository")


def processes_of(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def folders() -> set[str]:
    return {entry for entry in os.listdir(tempfile.gettempdir()) if entry.startswith("fluxvae-triton-")}


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers make their folders in a place of this test's own, because others on this machine make folders too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


def assert_nothing_left(server: TritonServer, group: int, folders_before: set[str]) -> None:
    assert processes_of(group) == []
    assert server.shm_regions() == []
    assert not [name for name in os.listdir("/dev/shm") if server.shm_prefix in name]
    assert folders() <= folders_before
    assert not server.running
    assert server.pid is None
    for port in (server.http_port, server.grpc_port, server.metrics_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


@pytest.mark.usefixtures("tritonserver")
def test_serves_and_leaves_nothing(repository: Path, tmp_path: Path) -> None:
    log, before = tmp_path / "triton.log", folders()
    x = np.arange(5, dtype=np.float32)
    with TritonServer(repository, log_path=log, env={"GREETING": "hello"}) as server:
        group = server.pid
        assert group is not None
        assert server.running
        assert server.ready()
        assert len(processes_of(group)) >= 2, "the server and a stub"
        assert server.shm_regions()
        for module, url in ((tritonclient.http, server.http_url), (tritonclient.grpc, server.grpc_url)):
            tensor = module.InferInput("x", [5], "FP32")
            tensor.set_data_from_numpy(x)
            with module.InferenceServerClient(url) as client:
                np.testing.assert_array_equal(client.infer("echo", [tensor]).as_numpy("y"), x)
        with triton._LOOPBACK.open(server.metrics_url, timeout=30) as page:
            assert b"nv_inference_request_success" in page.read()
        listening = {c.laddr for c in psutil.Process(group).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
        with pytest.raises(TritonServerError, match="already started"):
            server.start()
    assert_nothing_left(server, group, before)
    assert f"PREFIX {os.path.realpath(sys.prefix)} GREETING hello" in log.read_text()
    assert server.log() == log.read_text()
    server.stop()  # stopping it again does no harm


@pytest.mark.parametrize("victim", ["server", "stub"])
@pytest.mark.usefixtures("tritonserver")
def test_a_killed_server_or_stub_leaves_nothing(repository: Path, victim: str) -> None:
    before = folders()
    with TritonServer(repository, stop_timeout_s=1) as server:
        group = server.pid
        assert group is not None
        stubs = [process for process in processes_of(group) if process.pid != group]
        assert stubs
        target = psutil.Process(group) if victim == "server" else stubs[0]
        target.send_signal(signal.SIGKILL)
        if victim == "server":
            wait_for(lambda: not server.running, "the server to be gone")
            assert not server.ready()
        assert server.shm_regions(), "a crash leaves its regions to us"
    assert_nothing_left(server, group, before)


@pytest.mark.usefixtures("tritonserver")
def test_a_stub_that_ignores_the_end_is_ended(tmp_path: Path) -> None:
    stubborn = ECHO.replace(
        "def initialize(self, args):",
        "def finalize(self):\n        import time; time.sleep(600)\n    def initialize(self, args):",
    )
    before = folders()
    with TritonServer(write_model(tmp_path / "repository", stubborn), stop_timeout_s=1) as server:
        group = server.pid
        assert group is not None
        started = time.monotonic()
    assert time.monotonic() - started < 60
    assert_nothing_left(server, group, before)


@pytest.mark.usefixtures("tritonserver")
def test_a_model_that_fails_to_load(tmp_path: Path) -> None:
    failing = ECHO.replace("print(", "raise RuntimeError('the reason it cannot load') if True else print(")
    before = folders()
    server = TritonServer(write_model(tmp_path / "repository", failing))
    with pytest.raises(TritonServerError, match="exited before it was ready(.|\n)*the reason it cannot load"):
        server.start()
    assert server.pid is None
    assert server.shm_regions() == []
    assert folders() <= before
    assert "the reason it cannot load" in server.log()


@pytest.mark.usefixtures("tritonserver")
def test_a_model_that_never_loads(tmp_path: Path) -> None:
    hanging = ECHO.replace("print(", "__import__('time').sleep(600) if True else print(")
    server = TritonServer(write_model(tmp_path / "repository", hanging), ready_timeout_s=2, stop_timeout_s=1)
    with pytest.raises(TritonServerError, match=r"not ready within 2 s; allow more with ready_timeout_s"):
        server.start()
    assert server.pid is None
    assert server.shm_regions() == []


@pytest.mark.usefixtures("tritonserver")
def test_a_taken_port_is_named(repository: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = TritonServer(repository, grpc_port=port)
        with pytest.raises(TritonServerError, match=f"port {port} on 127.0.0.1: Address already in use; choose"):
            server.start()
    assert server.pid is None


@pytest.mark.usefixtures("tritonserver")
def test_a_port_lost_to_another_after_we_looked(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port, real, calls = other.getsockname()[1], triton.free_ports, []

        def lose_the_first(host: str, wanted: tuple[int, ...]) -> list[int]:
            calls.append(wanted)
            http, grpc, metrics = real(host, wanted)
            return [http, port if len(calls) == 1 else grpc, metrics]

        monkeypatch.setattr(triton, "free_ports", lose_the_first)
        with TritonServer(repository) as server:
            assert server.grpc_port != port
    assert len(calls) == 2


@pytest.mark.usefixtures("tritonserver")
def test_no_such_repository(tmp_path: Path) -> None:
    with pytest.raises(TritonServerError, match=r"model repository .*nowhere: no such folder"):
        TritonServer(tmp_path / "nowhere")


@pytest.mark.usefixtures("tritonserver")
def test_the_server_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_tritonserver().wheel is not None
    assert "for tests and local use" in str(find_tritonserver())
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert find_tritonserver() == (binary, None)


@pytest.mark.parametrize(
    ("the_wheel_runs_here", "advice"),
    [
        (True, "pip install 'nvidia-pytriton==0.7.0' 'numpy<2'"),
        (False, "Python 3.10 to 3.12 on x86-64 only"),
    ],
)
def test_no_server_anywhere(the_wheel_runs_here: bool, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel is no advice where it cannot be installed."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(installation, "_WHEEL_RUNS_HERE", the_wheel_runs_here)
    with pytest.raises(TritonServerError, match=f"NVIDIA's Triton container .*{advice}"):
        find_tritonserver()


def test_a_wheel_without_a_stub_for_this_python(tmp_path: Path) -> None:
    (tmp_path / "python_backend_stubs" / "3.8").mkdir(parents=True)
    with pytest.raises(TritonServerError, match="this wheel has no stub for it, only for 3.8"):
        installation._link_backends(tmp_path, tmp_path / "into")


def test_a_python_without_its_shared_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installation.sysconfig, "get_config_var", lambda name: None)
    monkeypatch.setattr(installation.sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(installation.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(TritonServerError, match="Triton's Python stub needs it"):
        installation._libpython_folder()
