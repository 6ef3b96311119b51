"""The supervisor's parts, each alone: the rule of health, settings, checks, the guardian, restarts with back-off."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fluxvae.cli import app
from fluxvae.errors import CheckpointError, FluxVAEError, InvalidOptionError
from fluxvae.serve.model.startup import Settings
from fluxvae.serve.models import read_memory_limits, read_models
from fluxvae.serve.supervisor import checks, command, services, supervisor, triton_service
from fluxvae.serve.supervisor import keeper as keeper_module
from fluxvae.serve.supervisor.command import read_token
from fluxvae.serve.supervisor.health import Answer, Outcome, Probe, Watch, ask_tiny, get
from fluxvae.serve.supervisor.keeper import Keeper
from fluxvae.serve.supervisor.services import GatewayService
from fluxvae.serve.supervisor.settings import ServeSettings
from fluxvae.serve.triton import guardian
from fluxvae.serve.triton.installation import Installation, TritonServerError
from fluxvae.serve.triton.ports import PortTakenError
from fluxvae.serve.triton.processes import Deaths, cpu_seconds, exited, how_it_ended, in_group, is_running, listens
from fluxvae.serve.triton.repository import model_folder, write_repository
from serve.waiting import wait_for

WHEEL = Installation(Path("bin/tritonserver"), Path("pytriton/tritonserver"))
CONTAINER = Installation(Path("/opt/tritonserver/bin/tritonserver"), None)

# -- the rule ------------------------------------------------------------------------------------------------------

OK, BUSY = Outcome(Answer.OK), Outcome(Answer.BUSY, "HTTP 503: queue full")
FAILED = Outcome(Answer.FAILED, "HTTP 500: what")
DEAD = Outcome(Answer.FAILED, "HTTP 500: Stub process 'x' is not healthy.", final=True)

DECODERS = ["vae_decoder", "vae_decoder_flux2", "vae_preview"]


def verdict(*seen: tuple[float, Outcome | None, float]) -> str | None:
    """What a watch says last that is told (second, outcome, processor seconds). Before, it must have said nothing."""
    watch = Watch(now=0.0, patience_s=10, busy_limit_s=100)
    verdicts = [watch.judge(*one) for one in seen]
    assert not any(verdicts[:-1]), verdicts
    return verdicts[-1]


@pytest.mark.parametrize(
    "seen",
    [
        [(t, OK, 0.0) for t in range(0, 500, 5)],
        [(t, None, t / 10) for t in range(99)],  # a long decode that gets a tenth of a core
        [(t, BUSY, t / 10) for t in range(99)],  # the queue is full
        [(1, FAILED, 0.0), (3, OK, 0.0), (5, FAILED, 0.0), (7, OK, 0.0)],
        [(1, None, 50.0), (9, None, 50.0)],  # it does nothing, but not for long
    ],
    ids=["answers", "busy", "queue full", "one failure is forgiven", "patience"],
)
def test_alive(seen: list[tuple[float, Outcome | None, float]]) -> None:
    assert verdict(*seen) is None


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        ([(1, DEAD, 0.0)], "is not healthy"),
        ([(1, FAILED, 0.0), (3, None, 0.0), (5, FAILED, 0.0)], "HTTP 500: what"),
        ([(1, OK, 5.0), (11.5, None, 5.1)], "hung: it neither answered nor computed for 10 s"),
        ([(1, OK, 5.0), (11.5, BUSY, 5.1)], "hung"),
        ([*((t, None, t / 10) for t in range(100)), (101, None, 10.1)], "no request was answered for 100 s, although"),
    ],
    ids=["dead stub", "two failures", "hung", "a full queue of a hung one", "busy for ever"],
)
def test_not_alive(seen: list[tuple[float, Outcome | None, float]], reason: str) -> None:
    assert reason in str(verdict(*seen))


# -- questions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def answers() -> Iterator[tuple[str, dict[str, Any]]]:
    """An HTTP server that answers everything with what the test puts here."""
    given: dict[str, Any] = {"status": 200, "body": b"", "hold": None}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if given["hold"]:
                given["hold"].wait(60)
            self.send_response(given["status"])
            self.end_headers()
            self.wfile.write(given["body"])

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of an asker who did not wait
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", given
        server.shutdown()


def test_what_an_answer_means(answers: tuple[str, dict[str, Any]]) -> None:
    address, given = answers
    image = {"outputs": [{"name": "images", "shape": [1, 16, 16, 3], "data": []}]}
    given["body"] = json.dumps(image).encode()
    assert ask_tiny(address, "vae_decoder", 30) == Outcome(Answer.OK)
    image["outputs"][0]["shape"] = [1, 16, 16, 4]
    given["body"] = json.dumps(image).encode()
    assert ask_tiny(address, "vae_decoder", 30) == Outcome(Answer.OK), "RGBA"
    image["outputs"][0]["shape"] = [1, 8, 8, 3]
    given["body"] = json.dumps(image).encode()
    assert "shape [1, 8, 8, 3], expected" in ask_tiny(address, "vae_decoder", 30).reason
    given["body"] = b"{}"
    assert ask_tiny(address, "vae_decoder", 30).answer is Answer.FAILED
    tokens = {"outputs": [{"name": "latents", "shape": [1, 1, 64], "data": []}]}
    given["body"] = json.dumps(tokens).encode()
    assert ask_tiny(address, "vae_encoder", 30) == Outcome(Answer.OK)
    tokens["outputs"][0]["shape"] = [1, 4, 64]
    given["body"] = json.dumps(tokens).encode()
    assert "shape [1, 4, 64], expected [1, 1, 64]" in ask_tiny(address, "vae_encoder", 30).reason
    given.update(status=503, body=b"Exceeds maximum queue size")
    assert ask_tiny(address, "vae_decoder", 30).answer is Answer.BUSY
    given.update(status=500, body=b"Stub process 'vae_decoder_0_0' is not healthy.")
    assert ask_tiny(address, "vae_decoder", 30).final
    given["hold"] = hold = threading.Event()
    assert get(address, "/", 0.1).reason == "no answer within 0.1 s"
    hold.set()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        assert "refused" in get(f"127.0.0.1:{nobody.getsockname()[1]}", "/", 30).reason


def test_questions_do_not_pile_up(answers: tuple[str, dict[str, Any]]) -> None:
    address, given = answers
    given["hold"] = hold = threading.Event()
    asked = []
    probe = Probe(lambda: (asked.append(1), get(address, "/", 60))[1])
    for _ in range(5):
        probe.start()
    assert probe.take() is None
    hold.set()
    taken: list[Outcome] = []
    wait_for(lambda: taken or taken.extend(filter(None, [probe.take()])), "the answer")
    assert taken == [Outcome(Answer.OK)]
    assert len(asked) == 1
    probe.start()
    wait_for(lambda: len(asked) == 2, "a second question")


# -- settings and the model folder ---------------------------------------------------------------------------------


def test_settings_reach_the_model(tmp_path: Path) -> None:
    odd = tmp_path / 'a "quoted" \\ folder'
    odd.mkdir()
    models = {"vae_decoder": str(odd)}
    given = ServeSettings(models=models, device="cuda:3", memory_limit="2GiB", max_pixels=12345, threads=2)
    parameters_of = {"vae_decoder": given.model_parameters("vae_decoder")}
    repository = write_repository(tmp_path / "models", parameters_of, device=given.device)
    config = (repository / "vae_decoder" / "config.pbtxt").read_text()
    pairs = re.findall(r'key: "(\w+)" value: \{ string_value: "((?:[^"\\]|\\.)*)"', config)
    parameters = {key: {"string_value": re.sub(r"\\(.)", r"\1", value)} for key, value in pairs}
    settings = Settings.read(parameters, {}, kind="GPU", device_id="3")
    assert settings == Settings(
        checkpoint=str(odd.resolve()),
        vae_class="AutoencoderKL",
        device="cuda:3",
        memory_limit="2GiB",
        max_pixels=12345,
        threads=2,
    )
    assert "KIND_GPU gpus: [ 3 ]" in config
    assert (repository / "vae_decoder" / "1" / "model.py").is_file()
    assert (model_folder("vae_decoder") / "config.pbtxt").read_text() != config


def test_models_on_one_device_share_its_memory_limit() -> None:
    limit = 3 * 2**30 + 1
    models = dict.fromkeys(DECODERS, "owner/name")
    for count, share in ((1, str(limit)), (2, str(limit // 2)), (3, str(2**30))):
        given = ServeSettings(models=dict(list(models.items())[:count]), memory_limit=str(limit), engine="exact")
        assert [given.model_parameters(name)["memory_limit"] for name in given.models] == [share] * count
        assert count * int(share) <= limit
        assert given.check_memory() == []
    assert [given.model_parameters(name)["engine"] for name in DECODERS] == ["exact", "exact", ""], (
        "a preview has its own"
    )
    own = {"vae_preview": "1GiB", "vae_decoder": "2"}
    given = ServeSettings(models=models, memory_limit=str(limit), model_memory_limits=own)
    parts = [given.model_parameters(name)["memory_limit"] for name in DECODERS]
    assert parts == ["2", str(limit - 2 - 2**30), "1GiB"]
    given = ServeSettings(models=models, model_memory_limits=own)
    assert [given.model_parameters(name)["memory_limit"] for name in DECODERS] == ["2", "", "1GiB"]
    [warning] = given.check_memory()
    assert "no limit for vae_decoder_flux2:" in warning
    given = ServeSettings(models=models, model_memory_limits=dict.fromkeys(DECODERS, "1GiB"))
    assert given.check_memory() == []
    assert given.gateway_command(1, "a", "b")[-6:] == [word for name in DECODERS for word in ("--model", name)]
    [warning] = ServeSettings(models=models).check_memory()
    assert "3 models, and no limit for vae_decoder, vae_decoder_flux2, vae_preview:" in warning
    assert ServeSettings().check_memory() == []


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"vae_preview": "1GiB"}, "got vae_preview=1GiB, but vae_preview is not served; expected one of vae_decoder, "),
        ({"vae_decoder": "some"}, "vae_decoder: memory_limit: got 'some'"),
        ({"vae_decoder": "2GiB"}, "got vae_decoder=2GiB of --memory-limit 2GiB, which leaves nothing for vae_decoder_"),
        (
            {"vae_decoder": "1GiB", "vae_decoder_flux2": "1.1GiB"},
            "got vae_decoder=1GiB and vae_decoder_flux2=1.1GiB of .* which is more; ",
        ),
    ],
)
def test_memory_limits_that_cannot_be(limits: dict[str, str], message: str) -> None:
    models = dict.fromkeys(["vae_decoder", "vae_decoder_flux2"], "owner/name")
    with pytest.raises(InvalidOptionError, match=f"--model-memory-limit: {message}"):
        ServeSettings(models=models, memory_limit="2GiB", model_memory_limits=limits)


@pytest.mark.parametrize(
    ("given", "message"), [(["vae_decoder"], "got 'vae_decoder', expected NAME=SIZE"), (["a=1", "a=2"], "got a twice")]
)
def test_memory_limits_that_cannot_be_read(given: list[str], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"--model-memory-limit: {message}"):
        read_memory_limits(given)


@pytest.mark.parametrize(
    ("given", "checkpoint", "expected"),
    [
        ([], None, {"vae_decoder": "demo"}),
        ([], "a", {"vae_decoder": "a"}),
        (["vae_preview=p", "vae_decoder=a=b"], None, {"vae_preview": "p", "vae_decoder": "a=b"}),
        (["vae_decoder_flux2=f"], "a", {"vae_decoder": "a", "vae_decoder_flux2": "f"}),
    ],
)
def test_which_models(given: list[str], checkpoint: str | None, expected: dict[str, str]) -> None:
    assert list(read_models(given, checkpoint).items()) == list(expected.items())


@pytest.mark.parametrize(
    ("given", "checkpoint", "message"),
    [
        (["other=a"], None, "--model: got 'other=a', expected NAME=CHECKPOINT, where NAME is one of vae_decoder, "),
        (["vae_decoder"], None, "--model: got 'vae_decoder', expected NAME=CHECKPOINT"),
        (["vae_decoder=b"], "a", "--model: got vae_decoder twice, with a and with b; --checkpoint counts as"),
    ],
)
def test_models_that_cannot_be(given: list[str], checkpoint: str | None, message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        read_models(given, checkpoint)


def test_model_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServeSettings] = []
    monkeypatch.setattr(command, "run", lambda settings, follow_logs: seen.append(settings) or 0)
    monkeypatch.setenv("FLUXVAE_CHECKPOINT", "from/environment")
    for arguments, models in (
        ([], {"vae_decoder": "from/environment"}),
        (["--model", "vae_preview=a/b"], {"vae_preview": "a/b"}),
        (["--checkpoint", "c/d", "--model", "vae_preview=a/b"], {"vae_decoder": "c/d", "vae_preview": "a/b"}),
    ):
        result = CliRunner().invoke(app, ["serve", *arguments])
        assert result.exit_code == 0, result.output
        assert seen[-1].models == models


def test_in_service_once_every_model_decodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton is out of service again when one of its models fails, although the other answers."""
    answers = {"one": Outcome(Answer.OK), "two": Outcome(Answer.BUSY, "HTTP 503: not yet")}
    monkeypatch.setattr(triton_service, "ask_tiny", lambda address, model, timeout_s: answers[model])
    monkeypatch.setattr(triton_service, "ASK_EVERY_S", 0.0)
    process = in_group(os.getpgid(0))[:1]
    monkeypatch.setattr(triton_service, "in_group", lambda group: process)
    server: Any = type(
        "Server", (), {"running": True, "pid": -1, "http_url": "", "launch": int, "ready": lambda _: True}
    )
    triton = triton_service.TritonService(server(), ["one", "two"], tmp_path / "log", patience_s=100, busy_limit_s=100)
    triton.launch()
    seen: list[bool] = []
    wait_for(lambda: len(seen) > 20 or seen.append(triton.started()), "some looks")
    assert not any(seen)
    answers["two"] = Outcome(Answer.OK)
    wait_for(triton.started, "both")
    assert triton.trouble() is None
    answers["two"] = Outcome(Answer.FAILED, "HTTP 500: why")
    reasons: list[str] = []
    wait_for(lambda: reasons or reasons.extend(filter(None, [triton.trouble()])), "trouble")
    assert reasons == ["two: HTTP 500: why"]


def test_a_config_that_was_edited(tmp_path: Path) -> None:
    with pytest.raises(FluxVAEError, match="found 0 times parameter 'colour', expected it once"):
        write_repository(tmp_path, {"vae_decoder": {"colour": "red"}})
    with pytest.raises(InvalidOptionError, match="device: got 'tpu'"):
        write_repository(tmp_path, {"vae_decoder": {}}, device="tpu")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"drain_s": 0}, InvalidOptionError, "drain_s: got 0, expected a number above 0"),
        ({"busy_limit_s": float("nan")}, InvalidOptionError, "busy_limit_s: got nan"),
        ({"patience_s": 3}, InvalidOptionError, "patience_s: got 3, expected at least 5"),
        ({"memory_limit": "much"}, InvalidOptionError, "memory_limit"),
        (
            {"models": {"vae_decoder": "a/b", "vae_decoder_flux2": "c/d"}, "revision": "v1"},
            InvalidOptionError,
            "--revision: got 'v1' for the checkpoints of 2 models, vae_decoder and vae_decoder_flux2",
        ),
        ({"token": " "}, InvalidOptionError, "token: got an empty one"),
        ({"models": {"vae_decoder": "missing.safetensors"}}, CheckpointError, "nothing at missing.safetensors"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ServeSettings(**wrong)


def test_who_can_reach_it() -> None:
    assert ServeSettings().check_exposure(WHEEL) == []
    [warning] = ServeSettings(host="0.0.0.0").check_exposure(WHEEL)
    assert "asks for no token" in warning
    assert ServeSettings(host="0.0.0.0", token="secret").check_exposure(WHEEL) == []
    with pytest.raises(TritonServerError, match="known security holes"):
        ServeSettings(triton_host="0.0.0.0").check_exposure(WHEEL)
    [warning] = ServeSettings(triton_host="::").check_exposure(CONTAINER)
    assert "ask for no token" in warning


def test_the_token_is_on_no_command_line_and_in_no_text() -> None:
    settings = ServeSettings(token="secret")
    assert "secret" not in repr(settings)
    assert "secret" not in " ".join(settings.gateway_command(1, "a", "b"))
    assert settings.without_our_variables()["FLUXVAE_TOKEN"] == ""


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("from the file\n")
    monkeypatch.delenv("FLUXVAE_TOKEN", raising=False)
    assert read_token(None) is None
    assert read_token(file) == "from the file"
    with pytest.raises(InvalidOptionError, match="cannot be read"):
        read_token(tmp_path / "nothing")
    monkeypatch.setenv("FLUXVAE_TOKEN", "from the environment")
    assert read_token(None) == "from the environment"
    with pytest.raises(InvalidOptionError, match="give one of them"):
        read_token(file)


# -- checks --------------------------------------------------------------------------------------------------------


def test_numpy_2_is_refused_with_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "1.26.4")
    checks.check_numpy(WHEEL)
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "2.3.1")
    checks.check_numpy(CONTAINER)
    with pytest.raises(TritonServerError, match=r"NumPy 2\.3\.1 .* install 'numpy<2'"):
        checks.check_numpy(WHEEL)


@pytest.mark.parametrize(("free_mb", "outcome"), [(1000, None), (300, "float32"), (64, "docker run --shm-size=2g")])
def test_shared_memory(free_mb: int, outcome: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.statvfs_result((4096, 10**6, 10**6, 10**6, free_mb, 0, 0, 0, 0, 0))
    monkeypatch.setattr(checks.os, "statvfs", lambda folder: stat)
    if free_mb == 64:
        with pytest.raises(TritonServerError, match=str(outcome)):
            checks.check_shared_memory(4096 * 4096)
    elif free_mb == 300:
        with pytest.raises(TritonServerError, match="requests of 16777216 pixels to 3 models need 403 MB"):
            checks.check_shared_memory(4096 * 4096, models=3)
        assert str(outcome) in str(checks.check_shared_memory(4096 * 4096))
    else:
        assert (outcome or "None") in str(checks.check_shared_memory(4096 * 4096))


def test_ports() -> None:
    chosen, found = checks.choose_ports(("127.0.0.1", 0), "127.0.0.1", {"--http-port": 0, "--grpc-port": 0})
    assert len({chosen, *found.values()}) == 3
    assert 0 not in (chosen, *found.values())
    with pytest.raises(TritonServerError, match="--port and --grpc-port: both 4711"):
        checks.choose_ports(("127.0.0.1", 4711), "127.0.0.1", {"--http-port": 0, "--grpc-port": 4711})
    with pytest.raises(TritonServerError, match=r"--port: port 4711 on 192\.0\.2\.1: .*; choose another, or 0"):
        checks.choose_ports(("192.0.2.1", 4711), "127.0.0.1", {})


def test_the_models_own_error_is_found_in_the_log() -> None:
    log = "E1 x.cc:1] failed: TritonModelException: CheckpointError: checkpoint: nothing at x; do y\n\nAt:\n  model.py"
    error = checks.model_error(log)
    assert type(error) is CheckpointError
    assert str(error) == "checkpoint: nothing at x; do y"
    assert checks.model_error("TritonModelException: KeyError: 'x'") is None
    assert checks.model_error("") is None


# -- processes -----------------------------------------------------------------------------------------------------


def test_processes() -> None:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        [process] = in_group(child.pid)
        assert process.pid == child.pid
        assert is_running(process)
        assert exited(child.pid) is None
        wait_for(lambda: cpu_seconds(process) > process.cpu_s + 0.05, "work")
        assert not is_running(process._replace(started=process.started - 1)), "another with the same id"
    finally:
        child.kill()
    wait_for(lambda: exited(child.pid) is not None, "its end")
    assert how_it_ended(exited(child.pid)) == "was ended by SIGKILL"
    assert not is_running(process)
    assert in_group(child.pid) == []
    child.wait()
    assert how_it_ended(3) == "ended with exit status 3"


def test_deaths_are_told_at_once() -> None:
    """Deaths are announced of children and of their children, which other processes may wait for."""
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '1000']); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code + "; sys.stdin.read()"], stdin=-1, stdout=-1, text=True)
    assert parent.stdout is not None
    grandchild = int(parent.stdout.readline())
    deaths, other = Deaths([parent.pid, grandchild]), Deaths([parent.pid])
    try:
        assert not deaths.wait(0)
        os.kill(grandchild, signal.SIGKILL)
        assert deaths.wait(5)
        assert not other.wait(0)
    finally:
        parent.communicate()
    assert other.wait(5)
    for each in (deaths, other):
        each.close()
        assert each.wait(0), "nothing is known"
    assert Deaths([2**22]).wait(0), "gone already"
    assert not Deaths([]).wait(0)


def test_who_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True);"
    child = subprocess.Popen([sys.executable, "-c", f"{code} sys.stdin.read()"], stdin=-1, stdout=-1, text=True)
    assert child.stdout is not None
    try:
        port = int(child.stdout.readline())
        with socket.create_connection(("127.0.0.1", port)) as ours:
            assert listens(child.pid, port)
            assert not listens(os.getpid(), port), "a connection to it is not it"
            assert not listens(child.pid, ours.getsockname()[1])
        assert not listens(2**22, port)
        with monkeypatch.context() as unseen:
            unseen.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(PermissionError(path)))
            assert listens(child.pid, port), "what cannot be told is not held against it"
    finally:
        child.communicate()


def ignores(pid: int, number: signal.Signals) -> bool:
    found = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


def test_the_guardian_takes_away_what_is_left(tmp_path: Path) -> None:
    """Grandchildren in sessions of their own are ended too, and nothing that is not marked."""
    tag, folder = uuid.uuid4().hex, tmp_path / "folder"
    folder.mkdir()
    region = Path(f"/dev/shm/fluxvae_test_{tag}_1")
    region.write_bytes(b"x")
    nested = "import subprocess, sys; p = [sys.executable, '-c', 'import time; time.sleep(600)'];"
    nested += "subprocess.Popen(p, start_new_session=True); subprocess.run(p)"
    marked = subprocess.Popen([sys.executable, "-c", nested], env={**os.environ, guardian.RUN_VARIABLE: tag})
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, guardian.RUN_VARIABLE: tag[:-1]}
    )
    watching = subprocess.Popen(
        [sys.executable, "-I", "-S", guardian.__file__, tag, f"fluxvae_test_{tag}_", str(folder)], stdin=subprocess.PIPE
    )
    try:
        wait_for(lambda: len(guardian._marked(f"{guardian.RUN_VARIABLE}={tag}".encode())) == 3, "three processes")
        wait_for(lambda: ignores(watching.pid, signal.SIGTERM), "a guardian that has started")
        watching.send_signal(signal.SIGTERM)
        watching.send_signal(signal.SIGINT)
        assert watching.poll() is None
        assert watching.stdin is not None
        watching.stdin.close()
        assert watching.wait(30) == 0
        assert marked.wait(10) == -signal.SIGKILL
        assert guardian._marked(f"{guardian.RUN_VARIABLE}={tag}".encode()) == []
        assert not region.exists()
        assert not folder.exists()
        assert other.poll() is None
    finally:
        region.unlink(missing_ok=True)
        for pid in guardian._marked(f"{guardian.RUN_VARIABLE}={tag}".encode()):
            os.kill(pid, signal.SIGKILL)
        for process in (marked, other, watching):
            process.kill()
            process.wait()


# -- a gateway that is none ----------------------------------------------------------------------------------------

STAND_IN = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): ...
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def stand_in(tmp_path: Path, code: str) -> GatewayService:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", code, str(port)]
    return GatewayService(command, host="127.0.0.1", port=port, env=dict(os.environ), log_path=tmp_path / "gateway.log")


def test_a_gateway_that_dies_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_GATEWAY_PATIENCE_S", 0.2)
    monkeypatch.setattr(services, "ASK_EVERY_S", 0.1)
    service = stand_in(tmp_path, STAND_IN)
    for number, reason in ((signal.SIGKILL, "was ended by SIGKILL"), (signal.SIGSTOP, "no answer within 0.2 s")):
        service.launch()
        wait_for(service.started, "the stand-in")
        assert service.trouble() is None
        group = service.pid
        assert group is not None
        os.kill(group, number)
        found: list[str] = []
        wait_for(lambda found=found: found.extend(filter(None, [service.trouble()])) or found, "the trouble")
        assert found == [reason]
        service.stop(lambda: True)
        assert in_group(group) == []
        assert service.pid is None


def test_a_gateway_that_cannot_start(tmp_path: Path) -> None:
    service = stand_in(tmp_path, "print('before'); raise SystemExit('the reason')")
    service.launch()
    with pytest.raises(FluxVAEError, match=r"ended with exit status 1 before it was ready(.|\n)*the reason"):
        wait_for(service.started, "an error")
    service.stop(lambda: False)


class Everything(http.server.BaseHTTPRequestHandler):
    """A server that answers every question with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_an_answer_from_another_program_is_not_the_gateways(tmp_path: Path) -> None:
    """The program took the port after we had looked. Ours will end because of that, but not at once."""
    slow = stand_in(tmp_path, "import time; time.sleep(1000)")
    slow.launch()
    try:
        with http.server.ThreadingHTTPServer(("127.0.0.1", slow._port), Everything) as other:
            threading.Thread(target=other.serve_forever, daemon=True).start()
            assert get(f"127.0.0.1:{slow._port}", "/healthz", 10).answer is Answer.OK
            assert not slow.started()
            os.kill(slow.pid, signal.SIGKILL)  # type: ignore[arg-type]
            wait_for(lambda: exited(slow.pid) is not None, "its end")  # type: ignore[arg-type]
            with pytest.raises(PortTakenError, match=f"port {slow._port} on 127.0.0.1: Address already in use"):
                slow.started()
            slow.stop(lambda: True)
            with pytest.raises(PortTakenError, match=f"port {slow._port} on 127.0.0.1: Address already in use"):
                slow.launch()
            other.shutdown()
    finally:
        slow.stop(lambda: True)


def test_a_gateway_gets_time_to_finish(tmp_path: Path) -> None:
    slow = "import signal, time\ndef end(*_):\n  time.sleep(0.5); print('finished', flush=True); raise SystemExit\n"
    slow += f"signal.signal(signal.SIGTERM, end)\n{STAND_IN}"
    service = stand_in(tmp_path, slow)
    service.launch()
    wait_for(service.started, "the stand-in")
    service.stop(lambda: False)
    assert (tmp_path / "gateway.log").read_text() == "finished\n"


# -- restarts ------------------------------------------------------------------------------------------------------


class Fragile:
    """A service that fails as it is told: with an error at the start, or for a reason later."""

    name = "fragile"

    def __init__(self, *fates: Exception | str | None) -> None:
        self.fates = list(fates)
        self.calls: list[str] = []

    def launch(self) -> None:
        self.calls.append("launch")
        self.fate = self.fates.pop(0)

    def started(self) -> bool:
        if isinstance(self.fate, Exception):
            raise self.fate
        return True

    def wait_for_end(self, timeout_s: float) -> bool:
        time.sleep(0.001)
        return True

    def trouble(self) -> str | None:
        assert not isinstance(self.fate, Exception)
        return self.fate

    def notice(self) -> str | None:
        return None

    def stop(self, hurry: Callable[[], bool]) -> None:
        assert hurry(), "what failed gets no time"
        self.calls.append("kill")


def test_restarts_with_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "_TICK_S", 0.001)
    monkeypatch.setattr(keeper_module, "_DELAYS_S", (0.0, 0.125, 0.25))
    told: list[str] = []
    stop = threading.Event()
    fragile = Fragile("died", TritonServerError("did not load"), TritonServerError("again"), OSError("odd"), None)
    keeper = Keeper(fragile, stop, told.append, 60)
    started = time.monotonic()
    keeper.start()
    wait_for(lambda: any("back in service" in line for line in told), "service")
    assert time.monotonic() - started >= 0.125 + 0.25 + 0.25
    assert keeper.serving.is_set()
    stop.set()
    keeper.join()
    assert told[:4] == [
        "fragile: died; restarting",
        "fragile: did not load; restarting in 0.125 s",
        "fragile: again; restarting in 0.25 s",
        "fragile: odd; restarting in 0.25 s",
    ]
    assert fragile.calls == ["launch", "kill"] * 4 + ["launch"]
    assert keeper.failure is None
    assert keeper.serving.is_set(), "stopped while it served: it gets its time to finish"


def test_a_port_that_another_has_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for every start. The port is named, and waited for only as long as a start may take."""
    monkeypatch.setattr(keeper_module, "_TICK_S", 0.001)
    monkeypatch.setattr(keeper_module, "_PORT_DELAY_S", 0.01)
    monkeypatch.setattr(keeper_module, "_DELAYS_S", (0.0,))
    taken = PortTakenError("port 8080 on 127.0.0.1: Address already in use; choose another, or 0")
    told: list[str] = []
    stop = threading.Event()
    keeper = Keeper(Fragile(taken, taken, "died", taken, None), stop, told.append, 60)
    keeper.start()
    wait_for(lambda: sum("back in service" in line for line in told) == 1, "service")
    stop.set()
    keeper.join()
    assert keeper.failure is None
    assert sum("port 8080 on 127.0.0.1" in line for line in told) == 3

    started = time.monotonic()
    keeper = Keeper(Fragile(*[taken] * 1000), threading.Event(), told.append, 0.2)
    keeper.start()
    keeper.join()
    assert time.monotonic() - started >= 0.2
    assert isinstance(keeper.failure, TritonServerError)
    assert "port 8080 on 127.0.0.1: Address already in use" in str(keeper.failure)
    assert "--ready-timeout" in str(keeper.failure)


def test_a_first_start_that_fails_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    error = TritonServerError("did not load")
    keeper = Keeper(Fragile(error), threading.Event(), pytest.fail, 60)
    keeper.start()
    keeper.join()
    assert keeper.failure is error


@pytest.mark.usefixtures("tritonserver")
def test_a_child_that_cannot_be_kept_ends_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that dies must not leave its child unwatched."""
    fragile = Fragile("died")
    error = PermissionError("cannot be killed")
    monkeypatch.setattr(fragile, "stop", lambda hurry: (_ for _ in ()).throw(error))
    one = supervisor.Supervisor(ServeSettings(), report=lambda line: None)
    one._keepers = [Keeper(fragile, one._stop, lambda line: None, 60)]
    one._keepers[0].start()
    one._keepers[0].join()
    with pytest.raises(PermissionError, match="cannot be killed"):
        one.tend()


@pytest.mark.usefixtures("tritonserver")
def test_a_start_that_is_refused_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor.tempfile, "tempdir", str(tmp_path))
    free = dict.fromkeys(("port", "http_port", "grpc_port", "metrics_port"), 0)
    one = supervisor.Supervisor(ServeSettings(log_file=tmp_path / "no" / "log", **free), report=pytest.fail)
    with pytest.raises(InvalidOptionError, match=r"--log-file: .*/no/log cannot be written: No such file"):
        one.launch()
    assert one._guardian is not None
    watching = one._guardian
    one.stop(lambda: False)
    assert watching.poll() == 0
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_never_ends() -> None:
    fragile = Fragile(None)
    fragile.started = lambda: False  # type: ignore[method-assign]
    keeper = Keeper(fragile, threading.Event(), pytest.fail, 0.05)
    keeper.start()
    keeper.join()
    assert "was not ready within 0.05 s; allow more with --ready-timeout" in str(keeper.failure)
