"""Serves with a /dev/shm of its own that becomes full; prints what came of it as JSON. Run by test_full_shm.py.

unshare -rm sh -c 'mount -t tmpfs -o size=... tmpfs /dev/shm && exec python full_shm_child.py FOLDER'
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

from fluxvae.serve.supervisor.settings import ServeSettings
from fluxvae.serve.supervisor.supervisor import Supervisor
from fluxvae.serve.triton.server import TritonServer

SHM = Path("/dev/shm")
MIB = 2**20
CONFIG = """
name: "big"
backend: "python"
input [{name: "SIZE" data_type: TYPE_INT32 dims: [1]}]
output [{name: "OUT" data_type: TYPE_UINT8 dims: [-1]}]
instance_group [{kind: KIND_CPU count: 1}]
"""
MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        sizes = [int(pb_utils.get_input_tensor_by_name(request, "SIZE").as_numpy()[0]) for request in requests]
        senders = [request.get_response_sender() for request in requests]  # made, but not used, as in our model
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.full(size, 7, np.uint8))]) for size in sizes]
"""


def post(url: str, size: int, rows: int = 1, output_type: str = "pt") -> dict[str, Any]:
    tokens = (size // 16) ** 2
    latents = np.random.default_rng(size).standard_normal((rows, tokens, 64), dtype=np.float32)
    query = f"/?shape={rows}&shape={tokens}&shape=64&dtype=float32&height={size}&width={size}&output_type={output_type}"
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    start = time.monotonic()
    connection.request("POST", query, latents.tobytes(), {"Content-Type": "tensor/binary"})
    answer = connection.getresponse()
    body = answer.read()
    told = json.loads(body) if answer.status != 200 else {}
    connection.close()
    return {"status": answer.status, "bytes": len(body), "seconds": time.monotonic() - start, **told}


@contextmanager
def full(left: int) -> Iterator[None]:
    """Let a file take all shared memory but ``left`` bytes for a while."""
    stat = os.statvfs(SHM)
    filler = SHM / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - left)
    try:
        yield
    finally:
        filler.unlink()


def served(checkpoint: str) -> dict[str, Any]:
    """Ask the gateway of a ``fluxvae serve`` before, while and after shared memory is full, and return its answers."""
    told: list[str] = []
    supervisor = Supervisor(
        ServeSettings(
            models={"vae_decoder": checkpoint},
            port=0,
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            max_pixels=8 * MIB,
        ),
        report=told.append,
    )
    try:
        supervisor.launch()
        supervisor.wait_ready(lambda: False)
        url = supervisor.url
        found: dict[str, Any] = {"before": post(url, 256)}
        with full(left=2 * MIB):
            found["large"] = post(url, 1024)
            found["small"] = post(url, 256)
            found["latents"] = post(url, 1024, rows=8)
            deadline = time.monotonic() + 30
            while not any("shared memory is full" in line for line in told) and time.monotonic() < deadline:
                supervisor.tend()
                time.sleep(0.1)
        found["after"] = post(url, 1024)
    finally:
        supervisor.stop(lambda: True)
    return {**found, "told": told}


def handed_over(folder: Path) -> dict[str, Any]:
    """Return what Triton itself tells a client whose answer is returned by ``execute`` and finds no room."""
    (folder / "big/1").mkdir(parents=True)
    (folder / "big/config.pbtxt").write_text(CONFIG)
    (folder / "big/1/model.py").write_text(MODEL)
    found: dict[str, Any] = {}
    with TritonServer(folder) as server:
        for name, kind, url in (
            ("grpc", tritonclient.grpc, server.grpc_url),
            ("http", tritonclient.http, server.http_url),
        ):
            client = kind.InferenceServerClient(url)

            def ask(size: int, kind: Any = kind, client: Any = client) -> Any:
                given = kind.InferInput("SIZE", [1], "INT32")
                given.set_data_from_numpy(np.array([size], np.int32))
                start = time.monotonic()
                try:
                    answer: Any = len(client.infer("big", [given]).as_numpy("OUT"))
                except Exception as error:
                    answer = str(error)
                return answer, time.monotonic() - start

            found[name] = [ask(1000)]
            with full(left=2 * MIB):
                found[name] += [ask(24 * MIB), ask(1000)]
            found[name] += [ask(4 * MIB)]
            client.close()
        # Triton counts an answer that found no room as one that is still on its way, and would wait for it for 20 s.
        server.stop(hurry=lambda: True)
    return found


if __name__ == "__main__":
    print(json.dumps({"served": served(sys.argv[1]), "handed_over": handed_over(Path(sys.argv[2]))}))
