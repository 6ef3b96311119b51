"""What cuDNN would do with the convolutions of a decode, on cards that are not here: see `described_cudnn`."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.knobs") is None:
    pytest.skip("the described card is one for triton 3.4 and later", allow_module_level=True)
pytest.importorskip("nvidia.cudnn", reason="this PyTorch is one without cuDNN")

from described_cudnn import OLDEST, ask, convolutions, version
from fake_card import CARDS, MODELS, Card, Convolution
from fluxvae.engine.kernels.direct.costs import workspace_bound

if version() < OLDEST:
    pytest.skip(f"cuDNN {version()} plans for the card that is there alone", allow_module_level=True)

WIDE = 64
"""Channels from which on a convolution in half precision must be on tensor cores. An A100 takes another engine for the
first one of a decode of 512, which has 16."""

cards = pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: f"sm_{card.capability}")


@pytest.fixture(scope="module")
def of_flux1() -> set[Convolution]:
    return set(convolutions([torch.bfloat16, torch.float32], ["FLUX.1"], [512], encode=False))


def check(card: Card, convolutions: set[Convolution]) -> None:
    """There is an engine; it is deterministic, does not round what it is given, and its workspace was planned."""
    wrong = []
    for one in convolutions:
        found = ask(card, one)
        if found.engine < 0:
            wrong.append(f"no engine for {one}")
        if found.notes & {"not deterministic", "converts down"}:
            wrong.append(f"{found} for {one}")
        on_tensor_cores = "tensor cores" in found.notes
        if one.dtype == torch.float32 and on_tensor_cores:
            wrong.append(f"{found} for {one}: that would be TF32")
        if one.dtype != torch.float32 and not on_tensor_cores and min(one.cin, one.cout) >= WIDE:
            wrong.append(f"{found} for {one}: not on tensor cores")
        bound = workspace_bound((one.rows, one.width, one.cin), (one.cout, *one.kernel), one.dtype.itemsize)
        if found.workspace > bound:
            wrong.append(f"{found} for {one}: planned were {bound} bytes")
    assert not wrong, "\n".join(wrong)


@cards
def test_of_a_decode_of_512(card: Card, of_flux1: set[Convolution]) -> None:
    check(card, of_flux1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("model", MODELS)
def test_of_every_model_with_its_encoder(model: str, dtype: torch.dtype) -> None:
    every = set(convolutions([dtype], [model], [512, 1024], encode=True))
    for card in CARDS.values():
        check(card, every)
