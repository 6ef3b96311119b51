"""Every kernel that a decode or an encode launches, compiled for six kinds of cards: it fits and does not spill.

By default for FLUX.1 in bfloat16, with the passes on two of the cards; for all models, precisions and cards with
``-m slow``. benchmarks/compiled.py prints the table.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("PyTorch brings the Triton language on Linux only", allow_module_level=True)
if importlib.util.find_spec("triton.knobs") is None:
    pytest.skip("the described card is one for triton 3.4 and later", allow_module_level=True)

from compiled_kernels import Resources, resources, wanted
from fake_card import CARDS, MODELS, Card, Wanted
from fluxvae.engine.kernels.cuda import attention

SPILLED = {80: 128, 90: 124, 120: 12}
"""Bytes of a thread that attention may spill, by compute capability; on other cards it spills none. Its sums of
64 x 512 values take 128 registers of each of 256 threads, and a thread has 255. Seen with triton 3.7 and 3.9: 128 and
100 on an A100, 4 and 124 on an H100, 12 and 8 on an RTX 50."""
ONE_REGISTER = 4
"""Bytes. Triton 3.9 stores one register of two passes on sm_90 and sm_100, where a program has more to spare."""

CUT = {80: 0, 86: 2, 89: 2, 90: 0, 100: 1, 120: 2}
"""Which of `attention.CUTS` a card gets. A decode's attention takes the first that fits."""

WHOLE = (86, 90)
"""The cards for which the default run compiles the passes too, which takes three seconds for each."""

TENSOR_MEMORY = 512
"""Columns that a data-centre Blackwell's multiprocessor has."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(kernels: Iterable[Wanted]) -> dict[str, Resources]:
    """Compile them, and say of all at once what is wrong."""
    found = {kernel.label: resources(kernel) for kernel in kernels}
    wrong = []
    for kernel in found.values():
        capability, is_attention = kernel.card.capability, kernel.kernel.startswith("_attention")
        if kernel.shared > kernel.card.shared_memory_per_block_optin:
            wrong.append(f"{kernel} has not so much shared memory")
        if kernel.spilled > (SPILLED.get(capability, 0) if is_attention else ONE_REGISTER):
            wrong.append(f"{kernel} spills")
        if kernel.tensor_memory > TENSOR_MEMORY:
            wrong.append(f"{kernel} has not so much tensor memory")
        if is_attention:
            needed = {9: "wgmma", 10: "tcgen05"}.get(capability // 10, "mma.sync")
            if needed not in kernel.instructions:
                wrong.append(f"{kernel} does not use the tensor cores by {needed}")
        if kernel.kernel.startswith(("_attention", "_finish", "_prologue")):
            wrong.extend(
                f"{kernel} lacks {wide}" for wide in ("ld.global.v4", "st.global.v4") if wide not in kernel.instructions
            )
        if kernel.kernel.startswith(("_combine", "_affine")) and "rn.f64" not in kernel.instructions:
            wrong.append(f"{kernel} does not compute in float64")
    assert not wrong, "\n".join(wrong)
    return found


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: f"sm_{card.capability}")
def test_flux1_in_bfloat16(card: Card) -> None:
    """Attention in the cut that each card gets, and on two of the cards every pass."""
    kernels = wanted(card.capability, [torch.bfloat16], ["FLUX.1"])
    assert {kernel.name for kernel in kernels} >= {"_attention", "_finish", "_prologue", "_affine"}
    (ours,) = (kernel for kernel in kernels if kernel.name == "_attention")
    assert cut_of(ours) == list(attention.CUTS)[CUT[card.capability]]
    check(kernels if card.capability in WHOLE else [ours])


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: f"sm_{card.capability}")
def test_every_model_in_every_precision(card: Card) -> None:
    check(wanted(card.capability, [torch.bfloat16, torch.float16, torch.float32], MODELS))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_cuts_take_the_shared_memory_that_they_are_said_to(capability: int) -> None:
    """`attention.CUTS` holds numbers of the compiler, by which the cut of a card is chosen without compiling."""
    (ours,) = (k for k in wanted(capability, [torch.bfloat16], ["FLUX.1"]) if k.name == "_attention")
    family = attention.family_of(capability // 10)
    for cut, told in attention.CUTS.items():
        constants = {"QUERIES": cut.queries, "TOKENS": cut.tokens}
        kernel = ours.changed(constants, num_warps=cut.warps, num_stages=cut.stages)
        assert kernel.compiled().metadata.shared == told[family], cut


def cut_of(kernel: Wanted) -> attention.Cut:
    constants, options = kernel.constants, kernel.options
    return attention.Cut(constants["QUERIES"], constants["TOKENS"], options["num_warps"], options["num_stages"])
