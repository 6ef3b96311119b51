"""The deploy files agree with each other, with the pages, and with what a real server shows. `tools/check_deploy.py`
has each of them checked by a tool that is not ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from diffusers.utils.remote_utils import remote_decode, remote_encode

from documents import blocks, parse
from serve.gateways import Gateways, ask

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PAGE = ROOT / "docs" / "deploying.md"
ON_A_GPU_ONLY = {"nv_gpu_memory_used_bytes"}


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kubernetes" / name).read_text(encoding="utf-8"))


def watched() -> dict[str, list[str]]:
    """The PromQL of the rules, the dashboard and the autoscalers, by file."""
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text(encoding="utf-8"))
    panels = json.loads((DEPLOY / "grafana/fluxvae.json").read_text(encoding="utf-8"))["panels"]
    return {
        "rules": [rule["expr"] for group in rules["groups"] for rule in group["rules"]],
        "dashboard": [target["expr"] for panel in panels for target in panel["targets"]],
        "scaled object": [manifest("autoscaling/scaled-object.yaml")["spec"]["triggers"][0]["metadata"]["query"]],
        "page": re.findall(r"`((?:sum|avg)\(.*?\))`", PAGE.read_text(encoding="utf-8")),
    }


def test_what_is_watched_is_what_a_server_shows(gateways: Gateways, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric or label that there is not would make an alert that never fires, and an empty panel."""
    monkeypatch.setenv("NO_PROXY", "*")
    url = gateways.start(models=("vae_decoder", "vae_encoder"))
    picture = remote_decode(f"{url}/", torch.zeros(1, 16, 4, 4), do_scaling=False)
    remote_encode(f"{url}/encode", picture)
    shown: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", ask(url, path="/metrics").body.decode(), re.MULTILINE):
        shown.setdefault(name, set()).update(re.findall(r"(\w+)=", labels))
    ours = {"job", "instance"}  # Prometheus adds these
    for where, expressions in watched().items():
        assert expressions, where
        for text in expressions:
            metrics = re.findall(r"\b((?:fluxvae|nv)_\w+)(?:\{(.*?)\})?", text)
            assert metrics or text.startswith(("up{", "sum(up{")), (where, text)
            for name, selector in metrics:
                if name not in ON_A_GPU_ONLY:
                    assert name in shown, f"{where}: {name} is not on a server's page"
                    used = set(re.findall(r"(\w+)[=!]", selector)) - ours
                    assert used <= shown[name], f"{where}: {name} has no labels {used - shown[name]}"
                    by = {label.strip() for group in re.findall(r"by \((.*?)\)", text) for label in group.split(",")}
                    assert by <= shown[name] | ours, f"{where}: {name} has no labels {by - shown[name]}"
    page = ask(url, path="/metrics").body.decode()
    [kinds] = [found for text in watched()["rules"] for found in re.findall(r'kind=~"(.*?)"', text)]
    for kind in kinds.split("|"):
        for model in ("vae_decoder", "vae_encoder"):
            assert f'fluxvae_errors_total{{kind="{kind}",model="{model}"}}' in page, "there from the start"


def test_kserve_runs_the_pod_of_the_base() -> None:
    """KServe wants a whole pod in a kind of its own, so that it stands in two files."""
    base = manifest("base/deployment.yaml")["spec"]["template"]["spec"]
    predictor = manifest("kserve/inference-service.yaml")["spec"]["predictor"]
    scaled = manifest("autoscaling/scaled-object.yaml")["spec"]
    [trigger], [metric] = scaled["triggers"], predictor["autoScaling"]["metrics"]
    assert metric["external"]["metric"]["query"] == trigger["metadata"]["query"]
    assert metric["external"]["target"] == {"type": "Value", "value": trigger["metadata"]["threshold"]}
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (
        scaled["minReplicaCount"],
        scaled["maxReplicaCount"],
    )
    [ours], [theirs] = base.pop("containers"), predictor.pop("containers")
    for name in ("autoScaling", "minReplicas", "maxReplicas", "labels"):
        del predictor[name]
    assert predictor == base
    ours["name"], ours["image"] = "kserve-container", theirs["image"]
    del ours["lifecycle"]  # KServe's route takes a pod out by itself
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        ours[probe]["httpGet"]["port"] = 8080
    ours["ports"][0]["protocol"] = "TCP"
    assert theirs == ours


def test_all_start_what_the_image_starts() -> None:
    """Each way of running it passes options and variables that `fluxvae serve` knows, and the port is one."""
    image = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    entry = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", image, re.MULTILINE)[1])  # type: ignore[index]
    parse(" ".join(entry))
    patches = yaml.safe_load(manifest("cpu/kustomization.yaml")["patches"][0]["patch"])
    [options] = [patch["value"] for patch in patches if patch["path"].endswith("/args")]
    parse(" ".join([*entry, *options]))
    unit = (DEPLOY / "fluxvae.service").read_text(encoding="utf-8")
    start = re.search(r"^ExecStart=/opt/fluxvae/bin/(.*)$", unit, re.MULTILINE)
    assert start
    parse(start[1])
    variables = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    container = manifest("base/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["fluxvae"]
    for name in [*(each["name"] for each in container["env"]), *compose["environment"]]:
        assert f"`{name}`" in variables
    assert container["ports"] == [{"name": "http", "containerPort": 8080}]
    assert "EXPOSE 8080" in image
    assert compose["ports"] == ["8080:8080"]


class Hub(BaseHTTPRequestHandler):
    """Stands for Hugging Face's API, as far as making an endpoint goes, and keeps what it was sent."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        state = {"state": "pending", "createdAt": "2026-11-30T00:00:00Z", "updatedAt": "2026-11-30T00:00:00Z"}
        answer = json.dumps({**body, "status": state, "healthRoute": "/readyz"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "*")
    address = f"http://127.0.0.1:{server.server_port}/v2"
    monkeypatch.setattr(huggingface_hub.constants, "INFERENCE_ENDPOINTS_ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it forbids loopback too
    yield Hub
    server.shutdown()
    server.server_close()


def test_the_endpoint_of_the_page_is_what_the_hubs_client_sends(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's call is made with the unmodified client, to a server on loopback. The hub itself is not asked."""
    monkeypatch.setenv("FLUXVAE_TOKEN", "a-secret")
    [call] = [block for block in blocks(PAGE, "python") if "create_inference_endpoint" in block]
    exec(call, {})
    [(path, sent)] = hub.asked
    assert path == "/v2/endpoint/example"
    model = sent["model"]
    image = model["image"]["custom"]
    assert (image["port"], image["healthRoute"]) == (8080, "/readyz")
    assert model["env"] == {"FLUXVAE_CHECKPOINT": "/repository"}
    assert model["secrets"] == {"FLUXVAE_TOKEN": "a-secret"}
    parse(" ".join(["fluxvae serve", *model["args"]]))
    assert sent["type"] == "public"
    assert sent["compute"]["scaling"]["measure"] == {"pendingRequests": 3}
