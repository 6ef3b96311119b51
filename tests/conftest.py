"""What all tests share: a Hypothesis profile, small models as fixtures, and the number of threads and processes."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Each of the tests' many processes would compile PyTorch and diffusers again where bytecode is not kept, for ten
# seconds. Where the environment says that none is to be written beside the code, it goes into the folder of builds.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(__file__).parents[1] / "build/bytecode"))

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from fluxvae import Decoder
from fluxvae.engine.kernels.choose import make_kernels
from fluxvae.serve.supervisor.checks import check_numpy
from fluxvae.serve.triton.installation import TritonServerError, find_tritonserver
from fluxvae.serve.triton.server import TritonServer
from models import random_vae
from shared_servers import killed_in_the_end

# The models are tiny, so a second thread would only wait for the first, and for long where other work wants the cores.
torch.set_num_threads(1)
# Processes that tests start, xdist's too, may use more. OpenMP's threads would spin while they wait for one whose core
# another test has: a measurement of peaks took 40 s of CPU time beside other work, and takes 19 s this way.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile(
    "default",
    deadline=None,  # the machine may be shared, so how long an example takes says nothing about the code
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    print_blob=True,
)
settings.load_profile("default")


collect_ignore = []
if not hasattr(diffusers, "Flux3AutoBlocks"):
    collect_ignore = [
        "test_diffusers_blocks.py",
        "test_encode_pipelines.py",
        "test_family_pipelines.py",
        "test_frame_pipelines.py",
        "serve/test_family.py",
        "serve/test_frames.py",
    ]
"""What is about modules that diffusers has from 0.42 on, which is not for Python 3.10."""


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [f"diffusers {diffusers.__version__}: left out are {', '.join(collect_ignore)}"] if collect_ignore else []


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the default suite in two processes, and any choice of tests in this one.

    Most tests of the default suite compute with one thread or wait for a server, so two processes are faster. Tests
    that are marked slow measure time and memory at full widths and must have the machine to themselves; and a few files
    are done sooner than two processes have imported PyTorch.
    """
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and config.getoption("markexpr") == "not slow"
    return 2 if whole else 0


TOGETHER = ("tests/serve/", "tests/test_docs.py")
"""Where tests share Triton servers, so that one process should run them all: each server is started once then."""
LONG = (
    "tests/test_cuda_kernels.py",
    "tests/test_gpu_benchmark.py",
    "tests/test_plan.py",
    "tests/batch/test_kill.py",
    "tests/test_family_engine.py",
    "tests/test_encoder_engine.py",
    "tests/test_engine_exact.py",
    "tests/test_comfyui.py",
    "tests/test_causal_engine.py",
    "tests/test_flux_pipeline.py",
    "tests/test_systems.py",
    "tests/test_settings.py",
    "tests/checkpoints/test_files.py",
    "tests/batch/test_claims.py",
    "tests/test_quiet.py",
    "tests/test_fork.py",
    "tests/test_demo.py",
)
"""Other files that take more than twenty seconds. They begin before the rest, so that none is waited for at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that share servers first, then the long files, then the others."""
    first = (*TOGETHER, *LONG)

    def place(item: pytest.Item) -> int:
        return next((index for index, name in enumerate(first) if item.nodeid.startswith(name)), len(first))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Set aside what the imports made, so that no later search for garbage goes through it again.

    Each takes half a second with PyTorch's and diffusers' modules in it, and ComfyUI's memory manager asks for one
    before every call. What tests make is searched as ever.
    """
    gc.collect()
    gc.freeze()


class _ByFileAndServer(LoadFileScheduling):
    """xdist's way to give whole files to processes, with all files that share servers as if they were one."""

    def _split_scope(self, nodeid: str) -> str:
        return TOGETHER[0] if nodeid.startswith(TOGETHER) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    return _ByFileAndServer(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture
def threads_kept() -> Iterator[None]:
    """Set PyTorch's number of threads back after the test, whatever the test has set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vae() -> AutoencoderKL:
    return random_vae()


@pytest.fixture(scope="session")
def decoder(vae: AutoencoderKL) -> Decoder:
    return Decoder(vae, engine="diffusers")


@pytest.fixture(scope="session")
def tritonserver() -> None:
    """A test that starts a Triton server asks for this. It is skipped where none can run, as on Python 3.13.

    The kernels are compiled here first, which takes twenty seconds on a machine that has not done so yet: the models of
    a server load at the same time in processes of their own, each of which would compile all of them.

    Raises:
        TritonServerError: none can run, though FLUXVAE_REQUIRE_TRITON says that one must, as it does in CI.
    """
    try:
        installation = find_tritonserver()
        installation.check()
        check_numpy(installation)
    except TritonServerError as error:
        if os.environ.get("FLUXVAE_REQUIRE_TRITON"):
            raise
        pytest.skip(f"no Triton server: {error}")
    make_kernels("auto", torch.device("cpu")).prepare()


@pytest.fixture(scope="session")
def demo_server(tritonserver: None) -> Iterator[TritonServer]:
    """The shipped folder as it is, with nothing set, which is what a user's first server is."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CHECKPOINT", "DEVICE", "MEMORY_LIMIT"):
            patch.delenv(f"FLUXVAE_{name}", raising=False)
        folder = Path(__file__).parents[1] / "triton_models"
        demo = TritonServer(folder, models=["vae_decoder"], env={"OMP_NUM_THREADS": "1"})
        with killed_in_the_end(demo) as server:
            yield server
