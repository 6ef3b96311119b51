"""The gateway and the client do without PyTorch, whose import takes seconds and half a gigabyte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from serve.client import Serving
from serve.gateways import ask, wait_until
from serve.test_gateway_floods import Process

AT_REST = 120 * 10**6
"""How many bytes of memory a gateway may take. 69 MB were measured; with PyTorch it took 540 MB."""
HEAVY = ("torch", "diffusers", "transformers", "numba", "scipy", "pandas")


def run(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.mark.parametrize("module", ["fluxvae.serve.gateway.command", "fluxvae.client"])
def test_importing_it_is_light(module: str) -> None:
    assert run(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_a_client_of_arrays_needs_none(serving: Serving, tmp_path: Path) -> None:
    """A client imports PyTorch only where a tensor is asked for, and not for pictures and arrays."""
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "latents.npy", latents.numpy())
    out = run(f"""
import sys
import numpy as np
from fluxvae.client import Client
latents = np.load({str(tmp_path / "latents.npy")!r})
for protocol, url in (("grpc", {serving.server.grpc_url!r}), ("http", {serving.server.http_url!r})):
    with Client(url, protocol=protocol) as client:
        np.save({str(tmp_path)!r} + f"/{{protocol}}.npy", client.decode(latents, output_type="uint8"))
        client.decode(latents.astype(np.float16), output_type="np")
        client.decode(latents[0], output_type="pil")
print([name for name in {HEAVY} if name in sys.modules])
""")
    assert out == "[]"
    expected = serving.library.decode(latents, output_type="uint8")
    for protocol in ("grpc", "http"):
        assert np.array_equal(np.load(tmp_path / f"{protocol}.npy"), expected)


def test_a_gateway_stays_small(serving: Serving) -> None:
    process = Process(serving.server.grpc_url, serving.server.config_key)
    try:
        wait_until(lambda: ask(process.url, path="/readyz").status == 200, "the gateway was not ready")
        body = np.zeros((1, 64 * 64, 64), np.float32).tobytes()
        query = "/?shape=1&shape=4096&shape=64&dtype=float32&height=1024&width=1024&output_type=pt"
        answer = ask(process.url, "POST", query, headers={"Content-Type": "tensor/binary"}, body=body)
        assert answer.status == 200, answer.body
        assert len(answer.body) == 12 * 1024 * 1024
        wait_until(lambda: process.memory < AT_REST, "the gateway kept what it needed for a decode")
        maps = Path(f"/proc/{process.process.pid}/maps").read_text()
        assert "libtorch" not in maps
    finally:
        process.process.terminate()
        process.process.wait(60)
