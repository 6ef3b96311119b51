"""Attention on a CPU: its error against float64, and that a query gets the same bits in every cut of the work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_models import needs_vector_code, rms
from fluxvae.engine.calls import Call
from fluxvae.engine.kernels import AttentionBlock
from fluxvae.engine.kernels.cpu.attention import PANELS, attention, attention_bytes, padded_queries
from fluxvae.engine.kernels.cpu.attention_loops import KEYS
from fluxvae.engine.kernels.cpu.kernels import WinogradKernels
from fluxvae.engine.kernels.cpu.products import NR, TILES
from fluxvae.engine.kernels.cpu.vector_code import AMX, LANES
from fluxvae.engine.layers.attention import Attention
from fluxvae.engine.network import read_network
from fluxvae.engine.statistics import Moments
from fluxvae.verify.tolerances import WINOGRAD_ATTENTION
from models import random_vae

pytestmark = [needs_vector_code, pytest.mark.usefixtures("threads_kept")]


def run(queries: torch.Tensor, tokens: torch.Tensor, scale: float) -> torch.Tensor:
    """As `WinogradKernels.attend` calls it; of the padding, nothing must reach the result."""
    count, channels = queries.shape
    padded = torch.full((padded_queries(count), channels), float("nan"))
    padded[:count] = queries
    out = torch.full_like(padded, float("nan"))
    work = torch.full((attention_bytes(count, channels),), 255, dtype=torch.uint8)  # as float32: not a number
    attention(padded, tokens, scale, out, work)
    return out[:count]


def expected(queries: torch.Tensor, tokens: torch.Tensor, scale: float) -> torch.Tensor:
    scores = queries.double() @ tokens.double().t() * scale
    return scores.softmax(1) @ tokens.double()


def values(count: int, tokens: int, channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    queries = 2 * torch.randn(count, channels, generator=generator)
    return queries, torch.randn(tokens, channels, generator=generator), channels**-0.5


COUNTS = st.integers(1, 2 * PANELS * NR + 1)
TOKENS = st.one_of(st.integers(1, 3 * TILES), st.integers(KEYS - 2, KEYS + 2), st.integers(1, 3 * KEYS))


@settings(max_examples=60, deadline=None)
@given(COUNTS, TOKENS, st.integers(1, 9), st.integers(0, 100))
def test_attention(count: int, tokens: int, vectors: int, seed: int) -> None:
    queries, keys, scale = values(count, tokens, vectors * LANES, seed)
    error = float((run(queries, keys, scale) - expected(queries, keys, scale)).abs().max())
    assert error <= WINOGRAD_ATTENTION.bound * float(keys.abs().max())


@pytest.mark.parametrize("tokens", [1024, 16384])
def test_it_is_more_accurate_than_pytorchs(tokens: int) -> None:
    queries, keys, scale = values(64, tokens, 512)
    right = expected(queries, keys, scale)
    theirs = F.scaled_dot_product_attention(queries[None, None], keys[None, None], keys[None, None], scale=scale)
    assert rms(run(queries, keys, scale) - right) <= rms(theirs[0, 0] - right)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_querys_bits_depend_on_no_other(data: st.DataObject) -> None:
    queries, keys, scale = values(150, 500, 3 * LANES)
    whole = run(queries, keys, scale)
    start = data.draw(st.integers(0, 149))
    stop = data.draw(st.integers(start + 1, 150))
    assert torch.equal(run(queries[start:stop], keys, scale), whole[start:stop])


def test_threads_change_nothing() -> None:
    queries, keys, scale = values(5 * PANELS * NR - 3, 1000, 2 * LANES)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(queries, keys, scale))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("step", [300.0, -300.0])
def test_scores_beyond_the_exponentials_range(step: float) -> None:
    # Ascending scores: each block of keys has a new maximum, what came before must vanish; descending: the reverse.
    keys = torch.ones(2 * KEYS + 5, LANES)
    keys[:, 1] = torch.arange(len(keys)) / 7
    queries = torch.zeros(3, LANES)
    queries[:, 0] = torch.tensor([0.0, 1e4, -1e4])
    queries[:, 1] = step
    right = keys[-1] if step > 0 else keys[0]
    torch.testing.assert_close(run(queries, keys, 1.0), right.expand(3, -1))


def test_equal_scores_are_an_average() -> None:
    _, keys, scale = values(1, 3 * KEYS, 2 * LANES)
    torch.testing.assert_close(run(torch.zeros(2, 2 * LANES), keys, scale), keys.mean(0).expand(2, -1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, KEYS + 1])
def test_what_is_not_finite_shows(bad: float, where: int) -> None:
    queries, keys, scale = values(5, KEYS + 3, LANES)
    keys[where, 3] = bad
    assert not torch.isfinite(run(queries.abs(), keys, scale)[:, 3]).any()


def test_a_query_that_is_not_finite_harms_no_other() -> None:
    queries, keys, scale = values(NR + 3, 40, LANES)
    right = run(queries, keys, scale)
    queries[1, 2] = float("nan")
    found = run(queries, keys, scale)
    assert found[1].isnan().all()
    others = torch.arange(len(queries)) != 1
    assert torch.equal(found[others], right[others])


def test_more_threads_than_were_planned_for_share_the_work() -> None:
    queries, keys, scale = values(4 * PANELS * NR, 50, LANES)
    torch.set_num_threads(1)
    work, out = torch.empty(attention_bytes(len(queries), LANES), dtype=torch.uint8), torch.empty_like(queries)
    right = run(queries, keys, scale)
    torch.set_num_threads(3)
    attention(queries, keys, scale, out, work)
    assert torch.equal(out, right)


def test_no_workspace_is_an_error() -> None:
    queries, keys, scale = values(NR, 5, LANES)
    with pytest.raises(RuntimeError, match="the plan was wrong"):
        attention(queries, keys, scale, torch.empty_like(queries), torch.empty(100, dtype=torch.uint8))


def test_its_results_lie_in_the_workspace() -> None:
    # What a block allocates comes to lie beside what the last one did: at 4096 pixels that was 127 MB in no plan.
    vae = random_vae()
    (layer,) = (layer for layer in read_network(vae).layers if isinstance(layer, Attention))
    rows, channels = 16, layer.projections.q.cin
    call = Call("attend", channels, channels, rows, 64, 4, False, tokens=2048)
    kernels = WinogradKernels(torch.device("cpu"))
    assert kernels.overhead(call) == 0
    weights = kernels.load_attention(
        layer.projections, torch.float32, torch.empty(kernels.loaded(call), dtype=torch.uint8)
    )
    normed, out = torch.randn(2048, channels), torch.randn(rows, 64, channels)
    work = torch.empty(kernels.workspace(call), dtype=torch.uint8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        queries = normed[: rows * 64].view_as(out)
        kernels.attend(AttentionBlock(layer.projections, weights, queries, normed, out, work, Moments()))
    most = max(event.cpu_memory_usage for event in profile.key_averages())
    assert 0 < most < out.nbytes / 8


def test_its_workspace_grows_with_the_threads_that_find_work_and_with_nothing_else() -> None:
    needed = {}
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        needed[threads] = [attention_bytes(count, 512) for count in (1, 2 * PANELS * NR, 2048)]
    one = needed[1][0]
    assert one < (2.6e6 if AMX else 0.7e6)
    assert needed == {1: [one] * 3, 2: [one, 2 * one, 2 * one], 8: [one, 2 * one, 8 * one]}
