"""Shared fixtures: Hypothesis profiles, small models, the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, settings

from fluxvae import Decoder
from models import random_vae

# The models are tiny: a second thread would only wait for the first, for long where other work wants the cores.
torch.set_num_threads(1)

settings.register_profile(
    "default",
    deadline=None,  # a shared machine: time is no property of the code
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    print_blob=True,
)
settings.load_profile("default")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the default suite, whose tests compute with one thread and often wait; else this process.

    What is marked slow measures time and memory at full widths, so that it must have the machine to itself, and a few
    files are done sooner than two processes have imported PyTorch.
    """
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and config.getoption("markexpr") == "not slow"
    return 2 if whole else 0


@pytest.fixture
def threads_kept() -> Iterator[None]:
    """The number of threads is as it was, whatever the test sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vae() -> AutoencoderKL:
    return random_vae()


@pytest.fixture(scope="session")
def decoder(vae: AutoencoderKL) -> Decoder:
    return Decoder(vae, engine="diffusers")
