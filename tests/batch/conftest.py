"""The decoder that every job is compared with."""

from __future__ import annotations

import pytest

from fluxvae import Decoder


@pytest.fixture(scope="session")
def demo() -> Decoder:
    return Decoder.from_pretrained("demo", device="cpu")
