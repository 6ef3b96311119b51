"""What anyone who reaches Triton's ports may do there, for each way of starting a server: decode, and nothing else.

The attacks are played on real servers on loopback: a model of the attacker's own, uploaded and run; unloading; logging,
tracing and shared memory changed; a web page of another origin that tries the same from a real browser.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import psutil
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from fluxvae.client import Client
from fluxvae.errors import InvalidOptionError
from fluxvae.serve.triton import server as triton
from fluxvae.serve.triton.server import TritonServer, TritonServerError
from serve.chromium import chromium
from serve.client import random_latents
from serve.supervised import Supervised
from serve.test_launcher import CONFIG, write_model
from serve.waiting import wait_for

ROOT = Path(__file__).parents[2]
WAYS = ("library", "example", "serve")


@dataclass
class Target:
    """A running server, and the folder where the attacker's code would leave its mark."""

    http: str
    grpc: str
    model: str
    marks: Path
    pid: int


@contextlib.contextmanager
def by_example(repository: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the example as a person would, on free ports. Yields its process and what it printed."""
    command = [sys.executable, str(ROOT / "examples/triton_server.py"), "--models", str(repository), "--load", "echo"]
    command += ["--http-port", "0", "--grpc-port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "Ctrl-C stops it" in line:
                break
        assert "Ctrl-C stops it" in said, said
        yield process, said
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module", params=WAYS)
def target(
    tritonserver: None,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("exposure")
    marks = folder / "marks"
    marks.mkdir()
    if request.param == "serve":
        running = Supervised.start(tiny_checkpoint, env={})
        try:
            running.ready()
            yield Target(
                running.address("Triton HTTP"), running.address("Triton gRPC"), "vae_decoder", marks, running.triton.pid
            )
        finally:
            running.end()
        return
    repository = write_model(folder / "repository")
    # This model is in the repository but was not asked for, so nobody may load it.
    shutil.copytree(repository / "echo", repository / "other")
    (repository / "other" / "config.pbtxt").write_text(CONFIG.replace('"echo"', '"other"'))
    if request.param == "library":
        with TritonServer(repository, models=["echo"]) as server:
            assert server.pid is not None
            yield Target(server.http_url, server.grpc_url, "echo", marks, server.pid)
        return
    with by_example(repository) as (process, said):
        found = re.search(r"http://(\S+) and grpc://([\d.]+:\d+)", said)
        assert found
        yield Target(found[1], found[2], "echo", marks, process.pid)


def post(address: str, path: str, body: Any, headers: dict[str, str] | None = None) -> int:
    """The status of a POST that a page of another origin could send, as a browser does not ask before this type."""
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "text/plain", **(headers or {})})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def attackers_model(marks: Path, name: str) -> dict[str, str]:
    """Parameters of a request that uploads a model, which leaves a mark when Triton runs it."""
    code = f"open({str(marks / name)!r}, 'w').close()\nclass TritonPythonModel:\n    def execute(self, r): pass\n"
    config = {
        "name": "guest",
        "backend": "python",
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [1]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [1]}],
    }
    return {"config": json.dumps(config), "file:1/model.py": base64.b64encode(code.encode()).decode()}


def test_nobody_runs_code_over_http(target: Target) -> None:
    assert post(target.http, "/v2/repository/models/guest/load", {"parameters": attackers_model(target.marks, "h")})
    assert list(target.marks.iterdir()) == []
    assert post(target.http, "/v2/repository/models/guest/load", {}) == 403
    assert post(target.http, "/v2/repository/models/other/load", {}) == 403
    assert post(target.http, f"/v2/repository/models/{target.model}/unload", {}) == 403
    assert post(target.http, "/v2/repository/index", {}) == 403
    assert ready(target)


def ready(target: Target) -> bool:
    with tritonclient.grpc.InferenceServerClient(target.grpc) as client:
        return bool(client.is_model_ready(target.model) and client.is_server_ready())


def test_nobody_runs_code_over_grpc(target: Target) -> None:
    parameters = attackers_model(target.marks, "g")
    files = {"file:1/model.py": base64.b64decode(parameters["file:1/model.py"])}
    with tritonclient.grpc.InferenceServerClient(target.grpc) as client:
        for attack in (
            lambda: client.load_model("guest", config=parameters["config"], files=files),
            lambda: client.load_model("other"),
            lambda: client.unload_model(target.model),
            client.get_model_repository_index,
        ):
            refused_over_grpc(attack)
    assert list(target.marks.iterdir()) == []
    assert ready(target)


def refused_over_grpc(attack: Callable[[], object]) -> None:
    with pytest.raises(InferenceServerException, match="protocol is restricted"):
        attack()


@pytest.mark.usefixtures("tritonserver")
def test_the_models_cannot_be_exchanged_even_by_who_has_every_key(repository: Path, tmp_path: Path) -> None:
    """Even without the restriction of its endpoints Triton refuses, because it was started without model control."""
    marks = tmp_path / "marks"
    marks.mkdir()
    with TritonServer(repository, models=["echo"], open_apis=["model-repository"]) as server:
        body = {"parameters": attackers_model(marks, "h")}
        assert post(server.http_url, "/v2/repository/models/guest/load", body) == 503
        assert post(server.http_url, "/v2/repository/models/echo/unload", {}) == 503
        assert list(marks.iterdir()) == []
        assert server.ready()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_model(tmp_path / "repository")


def test_tritons_other_controls_are_closed(target: Target) -> None:
    for path, body in (
        ("/v2/logging", {"log_verbose_level": 1}),
        ("/v2/trace/setting", {"trace_level": ["TIMESTAMPS"]}),
        (f"/v2/models/{target.model}/trace/setting", {"trace_level": ["TIMESTAMPS"]}),
        ("/v2/systemsharedmemory/region/mine/register", {"key": "/mine", "offset": 0, "byte_size": 16}),
        ("/v2/systemsharedmemory/unregister", {}),
        ("/v2/cudasharedmemory/unregister", {}),
    ):
        assert post(target.http, path, body) == 403, path
    for path in (
        "/v2/logging",
        "/v2/trace/setting",
        "/v2/systemsharedmemory/status",
        "/v2/cudasharedmemory/status",
        f"/v2/models/{target.model}/stats",
        f"/v2/models/{target.model}/config",
    ):
        assert status_of_get(target.http, path) == 403, path
    for path in ("/v2/health/live", "/v2/health/ready", "/v2", f"/v2/models/{target.model}"):
        assert status_of_get(target.http, path) == 200, path
    with tritonclient.grpc.InferenceServerClient(target.grpc) as client:
        for attack in (
            lambda: client.update_log_settings({"log_verbose_level": 1}),
            lambda: client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}),
            lambda: client.register_system_shared_memory("mine", "/mine", 16),
            client.get_system_shared_memory_status,
            client.get_cuda_shared_memory_status,
            lambda: client.get_inference_statistics(target.model),
            lambda: client.get_model_config(target.model),
        ):
            refused_over_grpc(attack)


def status_of_get(address: str, path: str) -> int:
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def test_what_the_command_line_shows_opens_nothing_but_the_models_settings(target: Target) -> None:
    """Every user of the machine can read it in /proc. So what opens a control is not there, or cannot be sent."""
    processes = [psutil.Process(target.pid), *psutil.Process(target.pid).children(recursive=True)]
    [server] = [one for one in processes if "bin/tritonserver" in one.cmdline()[0]]
    rules = [one.partition("=")[2] for one in server.cmdline() if one.startswith("--http-restricted-api=")]
    closed = [rule for rule in rules if "logging" in rule]
    assert len(closed) == 1
    name, _, value = closed[0].partition(":")[2].partition("=")
    for attempt in (value, value.strip(), value.replace("\n", " "), value.replace("\n", "\n ")):
        with contextlib.closing(http.client.HTTPConnection(target.http, timeout=60)) as connection:
            connection.putrequest("GET", "/v2/logging")
            connection._buffer.append(f"{name}: {attempt}".encode())  # type: ignore[attr-defined]
            connection.endheaders()
            with contextlib.suppress(http.client.RemoteDisconnected):  # it is malformed, and may get no answer
                assert connection.getresponse().status in (400, 403)
    with tritonclient.grpc.InferenceServerClient(target.grpc) as client:
        for attempt in (value.strip(), value.replace("\n", " ")):
            headers = {f"triton-grpc-protocol-{name}": attempt}
            refused_over_grpc(lambda headers=headers: client.get_log_settings(headers=headers))


@pytest.mark.usefixtures("tritonserver")
def test_shared_memory_is_opened_on_request_only(repository: Path) -> None:
    with TritonServer(repository) as server:
        refused = pytest.raises(InvalidOptionError, match=r"protocol: .*shared_memory.*--allow-client-shm")
        with Client(server.grpc_url, protocol="shared_memory", model="echo") as client, refused:
            client.decode(random_latents(0, 32, 32), height=32, width=32)
    with TritonServer(repository, open_apis=["shared-memory"]) as server:
        region = SharedMemory(create=True, size=1 << 12)
        try:
            with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
                client.register_system_shared_memory(region.name, f"/{region.name}", 1 << 12)
                client.unregister_system_shared_memory(region.name)
                refused_over_grpc(client.get_log_settings)
        finally:
            region.close()
            region.unlink()


@pytest.mark.usefixtures("tritonserver")
def test_an_unknown_group_of_controls_and_an_unknown_model_are_refused(repository: Path) -> None:
    with pytest.raises(InvalidOptionError, match="open_apis: got 'shm', expected one of shared-memory, "):
        TritonServer(repository, open_apis=["shm"])
    with pytest.raises(TritonServerError, match="models: got 'nope', .* holds no such folder; it has echo"):
        TritonServer(repository, models=["nope"])
    with pytest.raises(InvalidOptionError, match="arguments: got '--model-control-mode=explicit'"):
        TritonServer(repository, arguments=["--model-control-mode=explicit"])
    assert triton.APIS


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.usefixtures("tritonserver")
def test_the_example_ends_what_it_started(repository: Path, number: int) -> None:
    """After SIGKILL, which stands for any sudden death of the parent, its guardian ends everything."""
    with by_example(repository) as (process, _):
        everything = psutil.Process(process.pid).children(recursive=True)
        assert any("tritonserver" in one.name() for one in everything)
        assert regions_of(process.pid)
        process.send_signal(number)
        wait_for(lambda: not any(map(runs, everything)), "the end of all that it started", 40)
        wait_for(lambda: not regions_of(process.pid), "the end of its shared memory", 10)
        wait_for(lambda: process.poll() is not None, "its own end", 10)
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0)


def regions_of(pid: int) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"fluxvae_{pid}_")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.usefixtures("tritonserver")
def test_a_program_that_dies_with_its_server_open_leaves_nothing(repository: Path, number: int) -> None:
    """The program handles no signals, so the end of its ``with`` block never runs."""
    code = (
        "import sys, time; from fluxvae.serve.triton.server import TritonServer\n"
        f"with TritonServer({str(repository)!r}):\n print('serving', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        everything = psutil.Process(process.pid).children(recursive=True)
        assert regions_of(process.pid)
        process.send_signal(number)
        assert process.wait(20) == -number
        wait_for(lambda: not any(map(runs, everything)), "the end of all that it started", 20)
        wait_for(lambda: not regions_of(process.pid), "the end of its shared memory", 10)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.browser
def test_a_page_of_another_origin_runs_no_code_and_reads_nothing(target: Target, tmp_path: Path) -> None:
    """In Chromium a page from another port sends all that a browser lets it send without asking first."""
    (tmp_path / "index.html").write_text("<!doctype html><title>another origin</title>")
    handler = lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        with chromium() as browser:
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{elsewhere.server_port}/index.html")
            page.evaluate(
                """([url, body]) => fetch(url, {method: "POST", mode: "no-cors", body})""",
                [
                    f"http://{target.http}/v2/repository/models/guest/load",
                    json.dumps({"parameters": attackers_model(target.marks, "browser")}),
                ],
            )
            read = page.evaluate(
                """async (url) => { try { return await (await fetch(url)).text() } catch (e) { return "no: " + e } }""",
                f"http://{target.http}/v2",
            )
            assert read.startswith("no: "), "an answer was read across origins"
        elsewhere.shutdown()
    assert list(target.marks.iterdir()) == []
