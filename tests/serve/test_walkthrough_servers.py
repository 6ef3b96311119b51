"""The walkthroughs that need a server are run as they are printed, on the shared one, which has a tiny checkpoint.

What ``fluxvae serve`` does as a command is tested in test_supervisor.py. Here it is what the pages say that it prints.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils.remote_utils import remote_decode, remote_encode
from rich.console import Console

from documents import blocks, commands
from fluxvae import Encoder, FluxVAEError
from fluxvae.client import Client
from fluxvae.serve.supervisor.command import _announce
from serve.client import Serving
from serve.gateways import Gateways, ask
from walkthroughs import Walkthrough, same_picture


def announced(models: dict[str, str], *, host: str, token: str | None) -> str:
    """What ``fluxvae serve`` prints once it serves at its usual ports."""
    server = SimpleNamespace(
        grpc_url="127.0.0.1:8001", http_url="127.0.0.1:8000", metrics_url="http://127.0.0.1:8002/metrics"
    )
    settings = SimpleNamespace(models=models, host=host, token=token)
    supervisor: Any = SimpleNamespace(server=server, settings=settings, url="http://127.0.0.1:8080", port=8080)
    out = io.StringIO()
    _announce(supervisor, Console(file=out, highlight=False, soft_wrap=True))
    return out.getvalue()


def test_denoise_here_decode_there(serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "127.0.0.1:8001"
    servers = ("uv run fluxvae serve", "ssh ")
    page = Walkthrough(
        "denoise-here-decode-there", tmp_path, monkeypatch, servers, {f'"{address}"': f'"{serving.server.grpc_url}"'}
    )
    assert announced({"vae_decoder": "demo"}, host="127.0.0.1", token=None) in page.text
    names = page.follow()
    latents = names["latents"]
    [expected] = serving.library.decode(latents, height=400, width=592, output_type="uint8")
    assert np.array_equal(np.asarray(names["image"]), expected), "the first way; the page compares the second with it"
    same_picture(tmp_path / "images" / "0001.png", "walk-coffee.png")

    with Client(serving.server.grpc_url) as client:
        for size in ({}, {"height": 400, "width": 1024}):
            with pytest.raises(FluxVAEError) as refused:
                client.decode(latents, **size)
            page.tells(refused.value)
    with Client("127.0.0.1:1") as client, pytest.raises(FluxVAEError) as unavailable:
        client.decode(latents, height=400, width=592)
    page.tells(str(unavailable.value).replace("127.0.0.1:1:", f"{address}:"))
    with pytest.raises(AttributeError) as without_vae:
        names["pipe"](**names["prompt"])
    page.tells(without_vae.value)


def test_a_server_for_a_team(
    gateways: Gateways, serving: Serving, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    address, token_file = "127.0.0.1:8080", tmp_path / "token"
    page = Walkthrough("team-server", tmp_path, monkeypatch, ("(umask", "uv run fluxvae serve", "curl "))
    make_token, serve, *asked = commands(page.path)
    subprocess.run(["sh", "-c", make_token], cwd=tmp_path, check=True)
    assert token_file.stat().st_mode & 0o077 == 0, "nobody else can read it"
    token = token_file.read_text().strip()
    models = dict(re.findall(r"--model (\w+)=(\w+)", serve))
    assert announced(models, host="0.0.0.0", token=token) in page.text

    url = gateways.start(models=tuple(models), token=token)
    page.instead = {address: url.removeprefix("http://")}
    names = page.follow()
    [expected] = serving.library.decode(names["latents"], height=512, width=512, output_type="uint8")
    assert np.array_equal(np.asarray(names["cat"]), expected)
    assert torch.equal(names["again"], encoder.encode(names["cat"], packed=False))

    watched = blocks(page.path, "text")[2]
    for line in asked:
        *options, target = shlex.split(line.replace("$(cat token)", token))[1:]
        headers = dict(option.split(": ") for option in options if option != "-H")
        answer = ask(url, path=target.removeprefix(f"http://{address}"), headers=headers)
        assert answer.status == 200
        body = answer.body.decode()
        if not headers:
            assert body in watched.splitlines()
    for metric in re.findall(r"^(fluxvae_\w+)\{", watched, flags=re.MULTILINE):
        assert f"# TYPE {metric}" in body, "the last answer, which is of /metrics"

    latents, factors = names["latents"], names["FLUX"]
    with pytest.raises(RuntimeError) as no_token:
        remote_decode(f"{url}/", latents, height=512, width=512, **factors)
    page.tells(no_token.value)
    with pytest.raises(RuntimeError) as no_multiple:
        remote_encode(f"{names['SERVER']}/encode", names["cat"].resize((500, 500)), **factors)
    page.tells(no_multiple.value)
    with pytest.raises(ValueError, match="required") as no_size:
        remote_decode(f"{names['SERVER']}/", latents, **factors)
    page.tells(no_size.value)
