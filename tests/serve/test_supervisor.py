"""`fluxvae serve` with the real Triton and the real gateway: ready means it decodes, and what dies comes back."""

from __future__ import annotations

import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from diffusers.utils.remote_utils import remote_decode
from PIL import Image
from tritonclient.utils import InferenceServerException

from fluxvae import Decoder
from fluxvae.latents.format import LatentFormat
from serve.client import Request, Serving, random_latents
from serve.supervised import Supervised, a_request
from serve.waiting import wait_for

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
FLUX = LatentFormat()
NOTICED_S = 1.5  # how soon a death must be noticed; 0.05 s were measured
BACK_IN_S = 15.0  # how much longer than loading it may take until the server is back


@pytest.fixture(scope="module")
def repository(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline as the hub has it, of which only the VAE has weights, as Hugging Face's endpoints mount it."""
    folder = tmp_path_factory.mktemp("mounted") / "repository"
    shutil.copytree(tiny_checkpoint, folder / "vae")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    parts = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    (folder / "README.md").write_text("# A model")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text")
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)
    return folder


@pytest.fixture(scope="module")
def server(tritonserver: None, repository: Path) -> Iterator[Supervised]:
    """It is started as an endpoint of Hugging Face's starts it, but for the ports and the address it listens on."""
    supervised = Supervised.start(None, ["--max-pixels", "4194304"], {"FLUXVAE_CHECKPOINT": str(repository)})
    try:
        yield supervised.ready()
    finally:
        supervised.end()


def start(checkpoint: Path | str, request: pytest.FixtureRequest, *arguments: str, **env: str) -> Supervised:
    request.getfixturevalue("tritonserver")
    supervised = Supervised.start(checkpoint, arguments, env)
    request.addfinalizer(supervised.end)
    return supervised


def client(server: Supervised, library: Decoder) -> Serving:
    where = SimpleNamespace(http_url=server.address("Triton HTTP"), grpc_url=server.address("Triton gRPC"))
    return Serving(where, library)  # type: ignore[arg-type]


def through_gateway(server: Supervised, request: Request) -> np.ndarray:
    """Decode to uint8 by diffusers' protocol. The factors are sent, because without them latents count as raw."""
    latents = request.latents
    shape = "&".join(f"shape={size}" for size in latents.shape)
    query = f"{shape}&dtype=float32&height={request.height}&width={request.width}&output_type=pil&image_format=png"
    query += f"&scaling_factor={FLUX.scaling_factor}&shift_factor={FLUX.shift_factor}"
    call = urllib.request.Request(
        f"http://{server.address('gateway')}/?{query}",
        latents.tobytes(),
        {"Content-Type": "tensor/binary", "Accept": "image/png"},
    )
    with DIRECT.open(call, timeout=500) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())))


def page(server: Supervised, path: str) -> int:
    try:
        with DIRECT.open(f"http://{server.address('gateway')}{path}", timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def assert_serves(server: Supervised, library: Decoder, seed: int) -> None:
    request = a_request(seed)
    triton = client(server, library)
    triton.assert_same_pixels(triton.infer("grpc", request)["images"], request)
    triton.assert_same_pixels(through_gateway(server, request)[None], request)


def test_ready_means_that_it_decodes(server: Supervised, library: Decoder) -> None:
    assert_serves(server, library, 0)
    assert page(server, "/healthz") == page(server, "/readyz") == 200
    assert "the nvidia-pytriton wheel: for tests and local use, not for production" in server.output
    assert "Only this machine can reach it" in server.output
    assert "The gateway asks for no token." in server.output
    for process in (server.triton, server.gateway):
        listening = {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert psutil.Process(server.process.pid).memory_info().rss < 80e6, "no PyTorch in the supervisor"


def test_an_endpoint_from_a_mounted_repository(
    server: Supervised, repository: Path, library: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' unmodified client decodes by it, and nothing is written into the repository, which is read-only.

    Root may write there all the same, as whom the tests may run, so the folder is looked through.
    """
    monkeypatch.setenv("NO_PROXY", "*")
    latents = torch.from_numpy(random_latents(7, 64, 96))
    picture = remote_decode(
        endpoint=f"http://{server.address('gateway')}/",
        tensor=latents,
        height=64,
        width=96,
        scaling_factor=FLUX.scaling_factor,
        shift_factor=FLUX.shift_factor,
        image_format="png",
    )
    [expected] = library.decode(latents, height=64, width=96, output_type="uint8")
    assert np.array_equal(np.asarray(picture), expected)
    files = {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}
    weights = "vae/diffusion_pytorch_model.safetensors"
    others = {"README.md", ".gitattributes", "model_index.json", "transformer/config.json", "vae/config.json"}
    assert files == {weights, *others}


def test_an_idle_server_does_not_decode(server: Supervised) -> None:
    """It is asked every two seconds. With FLUX's full VAE each decode would take a quarter of a second of a core."""

    def count(name: str) -> float:
        with DIRECT.open(f"http://{server.address('metrics')}/metrics", timeout=30) as answer:
            found = re.search(rf"^{name}{{.*}} ([\d.e+]+)$", answer.read().decode(), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    asked, decoded = count("nv_inference_request_success"), count("fluxvae_decodes_total")
    wait_for(lambda: count("nv_inference_request_success") >= asked + 2, "two questions")
    assert count("fluxvae_decodes_total") == decoded


@pytest.mark.parametrize("part", ["stub", "triton"])
def test_what_is_killed_comes_back(server: Supervised, library: Decoder, part: str) -> None:
    """Readiness ends at once, although a decode was answered just before, and the server that comes back is another."""
    before, triton, stub = server.told("Triton: back in service"), server.triton, server.stub
    assert_serves(server, library, 1)
    assert page(server, "/readyz") == 200
    getattr(server, part).kill()
    began = time.monotonic()
    wait_for(lambda: page(server, "/readyz") == 503, "readiness to end", NOTICED_S)
    wait_for(lambda: server.told("Triton: back in service") == before + 1, "service after the death", 120)
    took = time.monotonic() - began
    load_time = float(re.findall(r"back in service after ([\d.]+) s", server.output)[-1])
    assert took - load_time < BACK_IN_S
    if part == "stub":
        assert "Triton: its Python process died; restarting" in server.output
    wait_for(lambda: page(server, "/readyz") == 200, "readiness")
    assert_serves(server, library, 2)
    assert not triton.is_running()
    new = {server.triton.pid, server.stub.pid}
    assert not new & {triton.pid, stub.pid}
    server.everything |= new


def test_a_clean_stop_leaves_nothing(server: Supervised) -> None:
    assert server.regions()
    assert server.signal_and_wait(signal.SIGTERM) == 0, server.output
    assert "SIGTERM: finishing what is under way, for 30 s at most" in server.output
    server.assert_nothing_left()


def test_a_taken_port_is_named(tiny_checkpoint: Path, request: pytest.FixtureRequest) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for option in ("--port", "--metrics-port"):
            refused = start(tiny_checkpoint, request, option, str(port))
            assert refused.process.wait(60) == 1
            wait_for(lambda refused=refused: "choose another, or 0" in refused.output, "the message")
            assert f"{option}: port {port} on 127.0.0.1: Address already in use" in refused.output
            assert "Traceback" not in refused.output


class Everything(BaseHTTPRequestHandler):
    """Answers every question with yes: that a server is ready, and that an image was decoded."""

    def do_GET(self) -> None:
        if self.command == "POST":
            self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"outputs": [{"shape": [1, 16, 16, 3]}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["triton", "gateway"])
def test_a_port_that_is_taken_in_mid_service(tiny_checkpoint: Path, request: pytest.FixtureRequest, part: str) -> None:
    """A program has the port, and even answers as ours would. It is named, and waited for as long as for a start."""
    supervised = start(tiny_checkpoint, request, "--ready-timeout", "40").ready()
    name = "Triton HTTP" if part == "triton" else "gateway"
    host, _, port = supervised.address(name).partition(":")

    def take() -> ThreadingHTTPServer:
        process = getattr(supervised, part)
        process.kill()
        deadline = time.monotonic() + 30
        while True:
            try:
                taken = ThreadingHTTPServer((host, int(port)), Everything)
                break
            except OSError:
                assert time.monotonic() < deadline, f"port {port} was not to be had"
                time.sleep(0.001)
        threading.Thread(target=taken.serve_forever, daemon=True).start()
        return taken

    other = take()
    wait_for(lambda: f"port {port} on {host}: Address already in use" in supervised.output, "the message", 60)
    assert supervised.told("back in service") == 0
    other.shutdown()
    other.server_close()
    wait_for(lambda: supervised.told("back in service") == 1, "its return", 60)
    other = take()
    assert supervised.process.wait(120) == 1
    other.shutdown()
    other.server_close()
    wait_for(lambda: "it was waited for as long as --ready-timeout allows" in supervised.output, "the last words")
    assert f"TritonServerError: port {port} on {host}: Address already in use" in supervised.output
    assert supervised.told("back in service") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", ["triton", "stub", "gateway"])
def test_what_dies_in_mid_load_comes_back(
    victim: str, number: signal.Signals, tiny_checkpoint: Path, library: Decoder, request: pytest.FixtureRequest
) -> None:
    server = start(tiny_checkpoint, request, "--patience", "8").ready()
    triton, stop = client(server, library), threading.Event()
    answers: list[object] = []

    def load(seed: int) -> None:
        while not stop.is_set():
            asked = a_request(seed, 64 + 16 * (seed % 3))
            try:
                images = triton.infer("grpc", asked)["images"] if seed % 2 else through_gateway(server, asked)[None]
                triton.assert_same_pixels(images, asked)
                answers.append("ok")
            except (InferenceServerException, OSError, http.client.HTTPException, AssertionError) as error:
                answers.append(error)
                stop.wait(0.2)  # while the server is down, it is not asked in a tight loop

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answers) > 20, "the load")
    getattr(server, victim).send_signal(number)
    name = "gateway" if victim == "gateway" else "Triton"
    began = time.monotonic()
    wait_for(lambda: server.told(f"{name}: back in service") == 1, f"service after the {victim}'s death", 200)
    took = time.monotonic() - began
    load_time = float(re.search(r"back in service after ([\d.]+) s", server.output)[1])  # type: ignore[index]
    patience = 0 if number == signal.SIGKILL else 25  # how long it takes until the server counts as hung
    assert took - load_time < BACK_IN_S + patience, server.output
    count = len(answers)
    wait_for(lambda: len(answers) > count + 20, "answers after it")
    stop.set()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a request without an answer"
    assert_serves(server, library, 5)
    failed = [answer for answer in answers if answer != "ok"]
    assert [error for error in failed if isinstance(error, AssertionError)] == [], "a wrong image"
    statuses = {error.status() for error in failed if isinstance(error, InferenceServerException)}
    assert statuses <= {"StatusCode.UNAVAILABLE", "StatusCode.INTERNAL", "StatusCode.CANCELLED"}, failed
    statuses = {error.code for error in failed if isinstance(error, urllib.error.HTTPError)}
    assert statuses <= {500, 503, 504}, failed
    server.everything |= {child.pid for child in server.children()}
    assert server.signal_and_wait(signal.SIGTERM) == 0
    server.assert_nothing_left()


@pytest.mark.slow
def test_a_killed_supervisor_takes_all_with_it(tiny_checkpoint: Path, request: pytest.FixtureRequest) -> None:
    server = start(tiny_checkpoint, request).ready()
    assert server.regions()
    server.guardian.kill()  # the supervisor must start a new one
    wait_for(lambda: "guardian: ended; restarting" in server.output, "a new guardian")
    server.everything |= {server.guardian.pid}
    server.signal_and_wait(signal.SIGKILL)
    server.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_under_way_is_finished_and_a_busy_server_is_left_alone(
    request: pytest.FixtureRequest,
) -> None:
    """A decode through the gateway takes several times the patience, with the demo checkpoint. Then SIGTERM comes."""
    server = start("demo", request, "--patience", "6", "--drain", "500", "--request-timeout", "500").ready()
    asked = Request(random_latents(0, 4096, 2048), 4096, 2048)
    started = time.monotonic()
    answer: list[object] = []
    thread = threading.Thread(target=lambda: answer.append(through_gateway(server, asked)))
    thread.start()
    wait_for(lambda: time.monotonic() - started > 14, "more than two patiences")
    assert answer == [], "too quick to be a test of this"
    assert "restarting" not in server.output
    assert server.signal_and_wait(signal.SIGTERM, 500) == 0, server.output
    thread.join(10)
    [picture] = answer
    assert np.asarray(picture).shape == (4096, 2048, 3)
    server.assert_nothing_left()


@pytest.mark.slow
def test_a_second_signal_does_not_wait(request: pytest.FixtureRequest) -> None:
    server = start("demo", request).ready()
    asked = Request(random_latents(0, 2048, 2048), 2048, 2048)
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            through_gateway(server, asked)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: server.stub.cpu_percent(0.2) > 20, "the decode")
    server.process.send_signal(signal.SIGINT)
    wait_for(lambda: "SIGINT: finishing" in server.output, "the first")
    started = time.monotonic()
    assert server.signal_and_wait(signal.SIGINT) == 0
    assert time.monotonic() - started < 10
    thread.join(10)
    assert failures, "the client was told"
    server.assert_nothing_left()


@pytest.mark.usefixtures("tritonserver")
def test_a_bad_checkpoint_ends_with_its_own_error(tmp_path: Path) -> None:
    """What is plain is found before anything is started, and the model finds the rest."""
    command = [sys.executable, "-m", "fluxvae.cli", "serve", "--port", "0", "--grpc-port", "0", "--http-port", "0"]
    command += ["--metrics-port", "0", "--checkpoint"]
    missing = subprocess.run([*command, "./nothing"], capture_output=True, text=True, timeout=60)
    assert missing.returncode == 4
    assert "CheckpointError: checkpoint: nothing at ./nothing; expected 'demo'" in missing.stderr
    (tmp_path / "config.json").write_text('{"_class_name": "UNet"}')
    foreign = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert foreign.returncode == 4, foreign.stderr
    assert "describes UNet, expected AutoencoderKL" in foreign.stderr
    assert "Traceback" not in foreign.stderr
