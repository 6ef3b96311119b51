"""Hub ids: from a hub on loopback, from the cache without a network, and a quick answer where there is neither."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from checkpoints.test_folders import cached, same
from fluxvae import CheckpointError
from fluxvae.checkpoints import load_vae, open_checkpoint
from models import random_vae

COMMIT = "c" * 40
AT_MOST_S = 5.0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that nobody answers for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    return tmp_path / "hub"


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture(params=["offline", "closed port", "black hole", "no such host", "names that hang"])
def no_hub(request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every way in which there is no hub."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and never answers
        port = server.getsockname()[1]
        if request.param == "offline":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        elif request.param == "closed port":
            server.close()
            point_at(f"http://127.0.0.1:{port}", monkeypatch)
        elif request.param == "black hole":
            point_at(f"http://127.0.0.1:{port}", monkeypatch)
        elif request.param == "no such host":
            point_at("http://no-such-host.invalid", monkeypatch)
        else:
            monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: done.wait(60))
            point_at("http://no-such-host.invalid", monkeypatch)
        yield
        done.set()


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_the_answer_comes_in_seconds(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"nobody/nothing is not in the hub's cache and the hub cannot be reached"
    ):
        load_vae("nobody/nothing")
    assert time.monotonic() - start < AT_MOST_S
    monkeypatch.setattr("fluxvae.checkpoints.hub._PATIENCE_S", 0.2)  # the same waits again would show nothing more
    vae = random_vae()
    vae.save_pretrained(tmp_path / "folder", variant="fp16", max_shard_size="300KB")
    repository = cached(cache, tmp_path / "folder")
    found = open_checkpoint("someone/flux")
    assert (found.variant, len(found.files) > 2) == ("fp16", True)
    same(found.load(), vae)
    for path in sorted((repository / "blobs").glob("*fp16-00002*")):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"not in the hub's cache as a whole \(.*lacks 1 of the .* shards"):
        load_vae("someone/flux")


class Hub(ThreadingHTTPServer):
    """What the hub's library asks of a hub: the list of a repository's files, and files."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[str] = []
        self.gated = False


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        headers, data, status = {"X-Repo-Commit": COMMIT}, b"", 200
        known = path.startswith(("/api/models/someone/flux", "/someone/flux/"))
        if not known:
            status, headers["X-Error-Code"] = 404, "RepoNotFound"
        elif path.startswith("/api/") and path.endswith("/revision/v9"):
            status, headers["X-Error-Code"] = 404, "RevisionNotFound"
        elif path.startswith("/api/"):
            files = sorted(p for p in self.server.folder.rglob("*") if p.is_file())
            names = [{"rfilename": str(p.relative_to(self.server.folder))} for p in files]
            data = json.dumps({"id": "someone/flux", "sha": COMMIT, "siblings": names}).encode()
            headers["Content-Type"] = "application/json"
        elif self.server.gated:
            status, headers["X-Error-Code"] = 403, "GatedRepo"
        else:
            data = (self.server.folder / path.split("/", 5)[5]).read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    folder.mkdir()
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_what_is_needed_is_downloaded_and_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, other = random_vae(seed=1), random_vae(seed=2)
    vae.save_pretrained(hub.folder / "vae", max_shard_size="300KB")
    other.save_pretrained(hub.folder / "vae", variant="fp16", safe_serialization=False)
    (hub.folder / "transformer").mkdir()
    (hub.folder / "transformer" / "model.safetensors").write_bytes(b"not to be read")
    (hub.folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    same(load_vae("someone/flux"), vae)
    asked = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert not any(name.endswith(".bin") or name == "model.safetensors" for name in asked)
    same(load_vae("someone/flux", variant="fp16"), other)
    with pytest.raises(CheckpointError, match=r"no weights of the variant 'bf16'; it has the variants: fp16"):
        load_vae("someone/flux", variant="bf16")
    same(load_vae("someone/flux", subfolder="vae"), vae)
    before = len(hub.asked)
    same(load_vae("someone/flux", revision=COMMIT), vae)  # a commit never changes: the hub is not asked
    assert len(hub.asked) == before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    same(load_vae("someone/flux"), vae)


def test_what_the_hub_refuses(hub: Hub) -> None:
    random_vae().save_pretrained(hub.folder / "vae")
    for source, options, message in (
        ("someone/else", {}, "someone/else is no repository of the hub, or it is private"),
        ("someone/flux", {"revision": "v9"}, "someone/flux@v9 has no such revision"),
        ("someone/flux", {"subfolder": "decoder"}, r"holds no VAE: no config.json with .* in its decoder/; name the"),
        ("someone/fl--ux", {}, "someone/fl--ux is no hub id"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_vae(source, **options)
    hub.gated = True
    with pytest.raises(CheckpointError, match="someone/flux is gated; accept its licence"):
        load_vae("someone/flux")


def test_a_repository_with_single_files_only(hub: Hub) -> None:
    (hub.folder / "ae.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"in it or in its vae/; .*it has ae.safetensors: download the VAE"):
        load_vae("someone/flux")
