"""Ten thousand mixed requests to ``fluxvae serve`` while its processes are killed, each twice, on the way.

Sizes, outputs, models, doors and forms of bodies are mixed; a tenth of the requests is bad, a tenth is given up, a
tenth sends slowly. Every answer is the library's image or a clean error, and an error of a good request is of a time in
which something had been killed. Afterwards all is as it was: memory, descriptors, threads, shared memory.

Run it with ``pytest -m slow tests/serve/test_soak.py -s``: it prints what it saw, and ends with a line of JSON.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from family_models import flux2_vae, tiny_vae
from fluxvae import Decoder, InvalidLatentsError, UnavailableError
from fluxvae.client import Client
from fluxvae.errors import DeadlineExceededError
from models import random_vae
from serve.supervised import Supervised
from serve.waiting import wait_for

REQUESTS = int(os.environ.get("FLUXVAE_SOAK_REQUESTS", "10000"))
WARM_UP = 600
CLIENTS = 12
SETTLE_S = 3.0
"""For how many seconds after the recovery from a kill requests may still end in errors."""
DECODERS = ["vae_decoder", "vae_decoder_flux2", "vae_preview"]
FEATURES = dict(zip(DECODERS, (64, 128, 128), strict=True))
SIZES = [(32, 32), (32, 48), (48, 32), (64, 64), (16, 96), (128, 128)]
OUTPUTS = ("pt", "uint8", "png")
GATEWAY_QUERY = {"pt": "pt", "uint8": "pt&partial_postprocess=True", "png": "pil&image_format=png"}


@dataclass(frozen=True)
class Case:
    """Latents of one model, and what they decode to."""

    model: str
    latents: torch.Tensor
    height: int
    width: int
    raw: np.ndarray
    pixels: np.ndarray

    def query(self, output: str) -> str:
        shape = "&".join(f"shape={length}" for length in self.latents.shape)
        size = f"dtype=float32&height={self.height}&width={self.width}"
        return f"/models/{self.model}/decode?{shape}&{size}&output_type={GATEWAY_QUERY[output]}&do_scaling=True"

    def is_right(self, output: str, body: bytes) -> bool:
        if output == "png":
            return body.startswith(b"\x89PNG") and np.array_equal(_pixels(body), self.pixels[0])
        return body == (self.raw if output == "pt" else self.pixels).tobytes()


def _pixels(file: bytes) -> np.ndarray:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(file)))


@dataclass
class Disturbances:
    """The spans of time in which something had been killed and was not back."""

    spans: list[list[float]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        with self.lock:
            self.spans.append([time.monotonic(), float("inf")])

    def end(self) -> None:
        with self.lock:
            self.spans[-1][1] = time.monotonic() + SETTLE_S

    def touches(self, start: float, end: float) -> bool:
        with self.lock:
            return any(start <= last and end >= first for first, last in self.spans)


class Wrong(Exception):
    """A request ended in a way in which none may."""


@dataclass
class Soak:
    """The load on the server: what it sends, and what came back."""

    server: Supervised
    cases: list[Case]
    disturbances: Disturbances = field(default_factory=Disturbances)
    ends: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: int = 0

    def __post_init__(self) -> None:
        self.gateway = self.server.address("gateway")
        options: dict[str, Any] = {"retries": 0, "timeout_s": 60}
        self.clients = {
            (protocol, model): Client(self.server.address(name), protocol=protocol, model=model, **options)
            for protocol, name in (("grpc", "Triton gRPC"), ("http", "Triton HTTP"))
            for model in DECODERS
        }

    def run(self, first: int, count: int) -> None:
        with ThreadPoolExecutor(CLIENTS) as threads:
            for _ in threads.map(self.one, range(first, first + count)):
                pass

    def one(self, number: int) -> None:
        draw = random.Random(number)
        kind = {0: "bad", 1: "given up", 2: "slow"}.get(number % 10, "good")
        case, output = draw.choice(self.cases), draw.choice(OUTPUTS)
        door = draw.choice(["gateway"] * 5 + ["json"] * 2 + ["grpc"] * 2 + ["http"])
        if kind in ("given up", "slow"):
            door = "gateway"
        start, why = time.monotonic(), ""
        try:
            end = getattr(self, f"_{door}")(case, output, kind, draw)
        except (OSError, http.client.HTTPException, UnavailableError, DeadlineExceededError) as error:
            end, why = type(error).__name__, str(error)
        except InvalidLatentsError:
            end = "refused"
        over = time.monotonic()
        expected = {"bad": "refused", "given up": "given up"}.get(kind, "right")
        disturbed = self.disturbances.touches(start, over)
        if end != expected and not disturbed:
            what = f"request {number} ({kind}, {door}, {case.model}, {output})"
            raise Wrong(f"{what}: {end} after {over - start:.1f} s: {why}")
        with self.lock:
            self.ends[f"{kind}: {end}"] += 1
            self.done += 1
        if end != expected:
            time.sleep(1.0)  # what a client does that is told to try again

    def _gateway(self, case: Case, output: str, kind: str, draw: random.Random) -> str:
        body = case.latents.numpy().tobytes()
        headers = {"Content-Type": "tensor/binary", "Content-Length": str(len(body))}
        path = case.query(output)
        if kind == "bad":
            path, headers, body = self._spoilt(case, path, headers, body, draw)
        return self._post(path, headers, body, kind, draw, lambda answer: case.is_right(output, answer))

    def _json(self, case: Case, output: str, kind: str, draw: random.Random) -> str:
        told = {"inputs": base64.b64encode(case.latents.numpy().tobytes()).decode()}
        body = json.dumps(told).encode()
        if kind == "bad":
            body = draw.choice([body[: len(body) // 2], body[:-40] + b'!!!"}', b"[]"])
        headers = {"Content-Type": "tensor/base64", "Content-Length": str(len(body)), "Accept": "tensor/base64"}

        def right(answer: bytes) -> bool:
            if output == "png":  # a client that accepts tensors only gets one with output_type=pil too
                tensor = np.frombuffer(base64.b64decode(json.loads(answer)["inputs"]), np.float32)
                return bool(np.array_equal(tensor, (case.raw / 2 + 0.5).clip(0, 1).ravel()))
            return case.is_right(output, base64.b64decode(json.loads(answer)["inputs"]))

        return self._post(case.query(output), headers, body, kind, draw, right)

    def _grpc(self, case: Case, output: str, kind: str, draw: random.Random, protocol: str = "grpc") -> str:
        latents = case.latents.clone()
        if kind == "bad":
            latents[0, 0, 0] = float("nan")
        size = {"height": case.height, "width": case.width}
        answer = self.clients[protocol, case.model].decode(latents, **size, output_type="uint8")
        if not np.array_equal(answer, case.pixels):
            raise Wrong(f"another image by {protocol}, of {case.model}")
        return "right"

    def _http(self, case: Case, output: str, kind: str, draw: random.Random) -> str:
        return self._grpc(case, output, kind, draw, "http")

    @staticmethod
    def _spoilt(
        case: Case, path: str, headers: dict[str, str], body: bytes, draw: random.Random
    ) -> tuple[str, dict[str, str], bytes]:
        how = draw.randrange(5)
        if how == 0:
            body = np.full(case.latents.shape, np.inf, np.float32).tobytes()
        elif how == 1:
            headers = {**headers, "Content-Type": "text/plain"}
        elif how == 2:
            path += "&unknown=1"
        elif how == 3:
            path = path.replace("height=", "height=9")
        else:
            body = body[:-4]
            headers = {**headers, "Content-Length": str(len(body))}
        return path, headers, body

    def _post(self, path: str, headers: dict[str, str], body: bytes, kind: str, draw: random.Random, right: Any) -> str:
        connection = http.client.HTTPConnection(self.gateway, timeout=120)
        try:
            connection.putrequest("POST", path)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            pieces = 5 if kind == "slow" else 1
            for piece in range(pieces):
                connection.send(body[len(body) * piece // pieces : len(body) * (piece + 1) // pieces])
                if kind == "slow":
                    time.sleep(draw.uniform(0, 0.2))
            if kind == "given up":
                time.sleep(draw.uniform(0, 0.05))
                return "given up"
            answer = connection.getresponse()
            came = answer.read()
        finally:
            connection.close()
        if answer.status == 200:
            if not right(came):
                raise Wrong(f"another image at {path}")
            return "right"
        told = json.loads(came)
        if told.keys() != {"error", "kind", "request_id"} or not told["error"]:
            raise Wrong(f"an error that says nothing: {came[:200]!r}")
        if answer.status in (400, 413, 415):
            return "refused"
        if answer.status in (503, 504):
            raise {503: UnavailableError, 504: DeadlineExceededError}[answer.status](told["error"])
        raise Wrong(f"HTTP {answer.status}: {told['error']}")


def state(server: Supervised) -> dict[str, dict[str, float]]:
    """The memory in MB, the descriptors and the threads of each process, and the shared memory."""
    found: dict[str, dict[str, float]] = {}
    for process in [psutil.Process(server.process.pid), *server.children()]:
        words = " ".join(process.cmdline())
        name = next(
            (name for name in ("tritonserver", "gateway", "guardian") if f"{name}" in words and "stub" not in words), ""
        )
        if "triton_python_backend_stub" in words:
            name = next(model for model in DECODERS if f"/{model}/" in words)
        with process.oneshot():
            found[name or "supervisor"] = {
                "mb": process.memory_info().rss / 1e6,
                "descriptors": process.num_fds(),
                "threads": process.num_threads(),
            }
    sizes = [os.stat(f"/dev/shm/{region}").st_size for region in server.regions()]
    found["shared memory"] = {"mb": sum(sizes) / 1e6, "regions": len(sizes)}
    return found


def model_process(server: Supervised, model: str) -> psutil.Process:
    lines = {child: " ".join(child.cmdline()) for child in server.children()}
    [found] = [child for child, line in lines.items() if "backend_stub" in line and f"/{model}/" in line]
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in DECODERS}
    for folder, vae in zip(folders.values(), (random_vae(), flux2_vae(), tiny_vae(32)), strict=True):
        vae.save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def cases(checkpoints: dict[str, Path]) -> list[Case]:
    made = []
    for seed, (model, folder) in enumerate(checkpoints.items()):
        library = Decoder.from_pretrained(folder, device="cpu")
        for height, width in SIZES:
            generator = torch.Generator().manual_seed(100 * seed + height + width)
            latents = torch.randn(1, height * width // 256, FEATURES[model], generator=generator)
            raw = library.decode_raw(latents, height=height, width=width).numpy()
            pixels = library.decode(latents, height=height, width=width, output_type="uint8")
            made.append(Case(model, latents, height, width, raw, pixels))
    return made


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:decode. approximate preview:UserWarning")
@pytest.mark.usefixtures("tritonserver")
def test_ten_thousand_requests(checkpoints: dict[str, Path], cases: list[Case]) -> None:
    flux1, *others = DECODERS
    models = [word for name in others for word in ("--model", f"{name}={checkpoints[name]}")]
    server = Supervised.start(checkpoints[flux1], models)
    try:
        server.ready()
        start = time.monotonic()
        soak = Soak(server, cases)
        soak.run(0, WARM_UP)
        assert not soak.disturbances.spans
        assert all(end.endswith((": right", "bad: refused", ": given up")) for end in soak.ends), soak.ends
        wait_for(lambda: idle(server), "the warm-up's connections to end")
        before = state(server)
        kills: list[str] = []
        killer = threading.Thread(target=kill_each_twice, args=(soak, kills), daemon=True)
        killer.start()
        soak.run(WARM_UP, REQUESTS - WARM_UP)
        killer.join(600)
        assert not killer.is_alive()
        assert Counter(kills) == dict.fromkeys((*DECODERS, "tritonserver", "gateway", "guardian"), 2), kills
        soak.run(REQUESTS, WARM_UP)  # so that the new processes have done everything that the old ones had
        for client in soak.clients.values():
            client.close()
        wait_for(lambda: idle(server), "the connections to end")
        after = state(server)
        report(soak, before, after, time.monotonic() - start)
        assert server.process.poll() is None
        assert before.keys() == after.keys()
        for name, was in before.items():
            for what, value in was.items():
                room = {"mb": 0.15 * value + 8, "descriptors": 6, "threads": 3, "regions": 0}[what]
                assert after[name][what] <= value + room, (name, what, value, after[name][what])
        assert server.signal_and_wait(15) == 0
        assert server.regions() == []
    finally:
        print(server.output[-3000:])
        server.end()


def idle(server: Supervised) -> bool:
    """Whether the gateway has no connections but its own to Triton."""
    port = int(server.address("gateway").rpartition(":")[2])
    connections = server.gateway.net_connections("tcp")
    return not any(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port for one in connections)


def kill_each_twice(soak: Soak, kills: list[str]) -> None:
    server = soak.server
    finders = {model: lambda model=model: model_process(server, model) for model in DECODERS}
    finders |= {
        "tritonserver": lambda: server.triton,
        "gateway": lambda: server.gateway,
        "guardian": lambda: server.guardian,
    }
    every = (REQUESTS - WARM_UP) // (2 * len(finders) + 1)
    for number, name in enumerate([*finders, *finders]):
        wait_for(lambda number=number: soak.done >= WARM_UP + every * number, "enough requests", 1200)
        part = {"gateway": "gateway: back", "guardian": "guardian: ended"}.get(name, "Triton: back")
        told = server.told(part)
        soak.disturbances.begin()
        finders[name]().kill()
        wait_for(lambda part=part, told=told: server.told(part) > told, f"the return of {name}", 300)
        wait_for(lambda: ready(server), "readiness", 120)
        soak.disturbances.end()
        kills.append(name)


def ready(server: Supervised) -> bool:
    connection = http.client.HTTPConnection(server.address("gateway"), timeout=30)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def report(soak: Soak, before: Any, after: Any, seconds: float) -> None:
    print()
    for end, count in sorted(soak.ends.items()):
        print(f"{count:6d}  {end}")
    for name, was in before.items():
        print(f"{name:<20}", ", ".join(f"{what} {value:.0f} -> {after[name][what]:.0f}" for what, value in was.items()))
    disturbed = sum(last - first for first, last in soak.disturbances.spans)
    figures = {"requests": soak.done, "seconds": round(seconds), "disturbed_s": round(disturbed), "ends": soak.ends}
    print(json.dumps({"soak": figures, "before": before, "after": after}, default=float))
