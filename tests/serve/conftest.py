"""Two real Triton servers for this folder: of FLUX.1, and of every model that ships, with tiny random weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect

from family_models import flux2_vae, qwen_image_vae, tiny_vae, wan_vae
from fluxvae import Decoder, Encoder
from fluxvae.serve.models import MODELS
from fluxvae.serve.triton.repository import write_repository
from fluxvae.serve.triton.server import TritonServer
from models import random_vae
from serve.chromium import LOCAL, chromium
from serve.client import GATHER, GATHER_ENCODES, Serving
from serve.families import DECODERS, ENCODERS, Family
from serve.gateways import Gateways
from shared_servers import killed_in_the_end

TRITON_MODELS = Path(__file__).parents[2] / "triton_models"


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread, because on tiny images threads that wait for each other take many times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with FLUX's topology, only 32 channels wide, and random weights from a fixed seed."""
    folder = tmp_path_factory.mktemp("tiny")
    random_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def library(tiny_checkpoint: Path) -> Decoder:
    """The library with the server's weights, with whose pixels the server's are compared."""
    return Decoder.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def encoder(tiny_checkpoint: Path) -> Encoder:
    """The library's encoder with the server's weights, with whose latents the server's are compared."""
    return Encoder.from_pretrained(tiny_checkpoint, device="cpu")


def copy_model(repository: Path, name: str, shipped: str = "vae_decoder", **edits: str) -> Path:
    """Copy a shipped model under another name. ``edits`` replace texts of its config, each of which must be there."""
    folder = repository / name
    shutil.copytree(TRITON_MODELS / shipped, folder, ignore=shutil.ignore_patterns("__pycache__"))
    config = folder / "config.pbtxt"
    text = config.read_text()
    for old, new in {f'name: "{shipped}"': f'name: "{name}"', **edits}.items():
        assert text.count(old) == 1, (old, text.count(old))
        text = text.replace(old, new)
    config.write_text(text)
    return folder


@pytest.fixture(scope="session")
def serving(
    tritonserver: None, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, library: Decoder
) -> Iterator[Serving]:
    """A server of the shipped models for FLUX.1, and of copies that wait until an ``execute`` is full with 8 rows."""
    repository = tmp_path_factory.mktemp("repository")
    patient = {"max_queue_delay_microseconds: 2000": "max_queue_delay_microseconds: 120000000"}
    for shipped, copy in (("vae_decoder", GATHER), ("vae_encoder", GATHER_ENCODES)):
        (repository / shipped).symlink_to(TRITON_MODELS / shipped)
        copy_model(repository, copy, shipped, **patient)
    log = tmp_path_factory.mktemp("log") / "triton.log"
    of_flux1 = TritonServer(
        repository,
        open_apis=["shared-memory", "statistics"],
        env={"FLUXVAE_CHECKPOINT": str(tiny_checkpoint), "OMP_NUM_THREADS": "1"},
        log_path=log,
    )
    with killed_in_the_end(of_flux1) as server:
        yield Serving(server, library)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoint folders of tiny random VAEs, by the model that serves them."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, served in MODELS.items():
        vae = {
            "AutoencoderKL": random_vae,
            "AutoencoderKLFlux2": flux2_vae,
            "AutoencoderTiny": lambda: tiny_vae(32),
            # Both classes that its models serve; their weights are the same.
            "AutoencoderKLQwenImage": wan_vae if served.encodes else qwen_image_vae,
        }
        vae[served.vae_class]().save_pretrained(folders[name])
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def family(
    tritonserver: None, checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    """A server of every model that ships. FLUX.1's encoder has little memory, which small pictures do not need."""
    settings = {name: {"checkpoint": checkpoint, "threads": "1"} for name, checkpoint in checkpoints.items()}
    settings["vae_encoder"]["memory_limit"] = "9MB"
    repository = write_repository(tmp_path_factory.mktemp("family") / "models", settings, device="cpu")
    library = {name: Decoder.from_pretrained(checkpoints[name], device="cpu") for name in DECODERS}
    encoders = {name: Encoder.from_pretrained(checkpoints[name], device="cpu") for name in ENCODERS}
    of_all = TritonServer(repository, open_apis=["shared-memory"], env={"OMP_NUM_THREADS": "1"})
    with killed_in_the_end(of_all) as server:
        yield Family(server, library, encoders)


@pytest.fixture(scope="session")
def gateways(serving: Serving) -> Iterator[Gateways]:
    """Starts gateways in front of the shared server."""
    started = Gateways(serving.server.grpc_url, serving.server.metrics_url, serving.server.config_key)
    yield started
    started.stop()


@pytest.fixture(scope="session")
def gateway(gateways: Gateways) -> str:
    """The address of a gateway with the usual settings and no token."""
    return gateways.start()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium of the module's own."""
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page, which has 20 s to meet each expectation. Errors inside it fail the test, and so do requests to
    any address but the gateway's."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    wrong: list[str] = []
    opened.on("pageerror", lambda failure: wrong.append(str(failure)))
    opened.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    opened.on("request", lambda sent: wrong.append(sent.url) if not sent.url.startswith(LOCAL) else None)
    yield opened
    context.close()
    assert not wrong
