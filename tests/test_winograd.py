"""The Winograd kernels: exact matrices, convolutions against float64, and the same bits however the work is cut."""

from __future__ import annotations

import hashlib
import platform
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import ir
from numba.core.compiler import run_frontend
from numba.core.postproc import PostProcessor
from safetensors import safe_open

from engine_models import needs_vector_code, rms
from fluxvae import Decoder, unpack_latents
from fluxvae.checkpoints import ASSETS
from fluxvae.engine import thread_count
from fluxvae.engine.calls import Call
from fluxvae.engine.exact import ExactDecoder
from fluxvae.engine.kernels import ConvBlock
from fluxvae.engine.kernels.choose import make_kernels, no_winograd
from fluxvae.engine.kernels.cpu import (
    amx,
    attention,
    attention_amx,
    attention_loops,
    counters,
    few_outputs,
    multiply,
    pixel_loops,
    products,
    row_tasks,
    vector_code,
    winograd_cut,
    winograd_job,
    winograd_loops,
    winograd_matrices,
    winograd_tasks,
    winograd_weights,
)
from fluxvae.engine.kernels.cpu.kernels import WinogradKernels
from fluxvae.engine.kernels.cpu.winograd_matrices import POINTS, halving, matmul, toom_cook
from fluxvae.engine.records import Conv
from fluxvae.engine.statistics import Affine, Moments, Partial
from fluxvae.errors import NonFiniteOutputError
from fluxvae.verify.oracle import level_difference
from fluxvae.verify.tolerances import (
    WINOGRAD_CHANGED,
    WINOGRAD_CONV,
    WINOGRAD_LAST,
    WINOGRAD_LEVELS,
    WINOGRAD_PRECISE,
    WINOGRAD_SILU,
    WINOGRAD_STATISTICS,
)
from models import random_vae

CPU = torch.device("cpu")
KERNELS = WinogradKernels(CPU)
THREADS = (1, 2, 3)
pytestmark = [needs_vector_code, pytest.mark.usefixtures("threads_kept")]


def conv_layer(cin: int, cout: int, seed: int = 0, *, precise: bool = False) -> Conv:
    torch.manual_seed(seed)
    module = torch.nn.Conv2d(cin, cout, 3, padding=1).requires_grad_(False)
    return Conv("test", cin, cout, 3, module, precise)


def load(conv: Conv, kind: str) -> Any:
    call = Call(kind, conv.cin, conv.cout, 2, 2, 4, False, precise=conv.precise)  # type: ignore[arg-type]
    return KERNELS.load(conv, kind, torch.float32, torch.empty(KERNELS.loaded(call), dtype=torch.uint8))


def workspace(conv: Conv, kind: str, rows: int, width: int) -> torch.Tensor:
    call = Call(kind, conv.cin, conv.cout, rows, width, 4, False, precise=conv.precise)  # type: ignore[arg-type]
    # 0xFF bytes are NaN: scratch that is read before it is written would show.
    return torch.full((KERNELS.workspace(call),), 255, dtype=torch.uint8)


def pad(rows: torch.Tensor) -> torch.Tensor:
    return F.pad(rows, (0, 0, 0, 0, 1, 1))


def only(moments: Moments) -> Partial:
    """The statistics of the one block that there was."""
    (means, m2s), (count,) = moments.stacked(), moments.counts
    return Partial(count, means[0], m2s[0])


def run_conv(
    conv: Conv, padded: torch.Tensor, residual: torch.Tensor | None = None, scale: float = 1.0
) -> tuple[torch.Tensor, Partial]:
    rows, width = padded.shape[0] - 2, padded.shape[1]
    out = torch.full((rows, width, conv.cout), torch.nan) if residual is None else residual.clone()
    work = workspace(conv, "conv3", rows, width)
    added = None if residual is None else out
    moments = Moments()
    KERNELS.convolve(ConvBlock("conv3", padded, load(conv, "conv3"), out, work, added, scale, moments))
    return out, only(moments)


def run_up(conv: Conv, padded: torch.Tensor) -> tuple[torch.Tensor, Partial]:
    rows, width = padded.shape[0] - 2, padded.shape[1]
    out = torch.full((2 * rows, 2 * width, conv.cout), torch.nan)
    work = workspace(conv, "up", rows, width)
    moments = Moments()
    KERNELS.convolve(ConvBlock("up", padded, load(conv, "up"), out, work, statistics=moments))
    return out, only(moments)


def run_down(conv: Conv, padded: torch.Tensor) -> tuple[torch.Tensor, Partial]:
    rows, width = padded.shape[0] - 2, padded.shape[1]
    out = torch.full((rows // 2, width // 2, conv.cout), torch.nan)
    work = workspace(conv, "down", rows, width)
    moments = Moments()
    KERNELS.convolve(ConvBlock("down", padded, load(conv, "down"), out, work, statistics=moments))
    return out, only(moments)


def direct(conv: Conv, rows: torch.Tensor, enlarge: bool = False, halve: bool = False) -> torch.Tensor:
    """In float64 by PyTorch: (n, W, cin) to (n, W, cout)."""
    image = rows.permute(2, 0, 1)[None].double()
    module = conv.module
    if halve:
        image = F.pad(image, (0, 1, 0, 1))
        return F.conv2d(image, module.weight.double(), module.bias.double(), stride=2)[0].permute(1, 2, 0)
    if enlarge:
        image = F.interpolate(image, scale_factor=2, mode="nearest")
    return F.conv2d(image, module.weight.double(), module.bias.double(), padding=1)[0].permute(1, 2, 0)


def check(out: torch.Tensor, partial: Partial, expected: torch.Tensor, bound: float = WINOGRAD_CONV.bound) -> None:
    assert (out - expected).abs().max() <= bound
    flat = out.reshape(-1, out.shape[-1]).double()
    deviations = (flat - flat.mean(0)).square().sum(0)
    assert partial.count == len(flat)
    assert (partial.mean - flat.mean(0)).abs().max() <= WINOGRAD_STATISTICS.bound
    assert ((partial.m2 - deviations).abs() <= WINOGRAD_STATISTICS.bound * (deviations + 1e-3)).all()


# -- the matrices --------------------------------------------------------------------------------------------------

small = st.integers(-50, 50).map(Fraction)


@given(st.data(), st.sampled_from([(6, 3), (7, 2), (5, 4)]))
def test_transforms_are_exact(data: st.DataObject, size: tuple[int, int]) -> None:
    outputs, taps = size
    t = toom_cook(outputs, taps)
    d = data.draw(st.lists(small, min_size=8, max_size=8))
    g = data.draw(st.lists(small, min_size=taps, max_size=taps))
    products = [x[0] * y[0] for x, y in zip(matmul(t.g, [[v] for v in g]), matmul(t.bt, [[v] for v in d]), strict=True)]
    y = [row[0] for row in matmul(t.at, [[p] for p in products])]
    assert y == [sum(g[k] * d[i + k] for k in range(taps)) for i in range(outputs)]


@given(st.data(), st.integers(1, 7))
def test_halving_is_exact(data: st.DataObject, outputs: int) -> None:
    t = halving(outputs)
    d = data.draw(st.lists(small, min_size=2 * outputs + 1, max_size=2 * outputs + 1))
    g = data.draw(st.lists(small, min_size=3, max_size=3))
    products = [x[0] * y[0] for x, y in zip(matmul(t.g, [[v] for v in g]), matmul(t.bt, [[v] for v in d]), strict=True)]
    y = [row[0] for row in matmul(t.at, [[p] for p in products])]
    assert len(products) == 2 * outputs + 1
    assert y == [sum(g[k] * d[2 * i + k] for k in range(3)) for i in range(outputs)]


def test_a_wrong_number_of_points_is_refused() -> None:
    with pytest.raises(ValueError, match="7 distinct points"):
        toom_cook(6, 3, POINTS[:-1])


# -- convolutions --------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from([16, 48]), st.sampled_from([16, 32, 80]))


@settings(max_examples=40, deadline=None)
@given(shapes, st.booleans(), st.sampled_from([1.0, 1.7]), st.integers(0, 100))
def test_convolution(shape: tuple[int, int, int, int], residual: bool, scale: float, seed: int) -> None:
    rows, width, cin, cout = shape
    conv = conv_layer(cin, cout, seed)
    x, base = torch.randn(rows, width, cin), torch.randn(rows, width, cout) if residual else None
    out, partial = run_conv(conv, pad(x), base, scale)
    expected = direct(conv, x)
    check(out, partial, (expected if base is None else expected + base) / scale)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 100))
def test_upsample(shape: tuple[int, int, int, int], seed: int) -> None:
    rows, width, cin, cout = shape
    conv = conv_layer(cin, cout, seed)
    x = torch.randn(rows, width, cin)
    check(*run_up(conv, pad(x)), direct(conv, x, enlarge=True))


@settings(max_examples=40, deadline=None)
@given(shapes, st.booleans(), st.sampled_from([1.0, 1.7]), st.integers(0, 100))
def test_precise_convolution(shape: tuple[int, int, int, int], residual: bool, scale: float, seed: int) -> None:
    rows, width, cin, cout = shape
    conv = conv_layer(cin, cout, seed, precise=True)
    x, base = torch.randn(rows, width, cin), torch.randn(rows, width, cout) if residual else None
    out, partial = run_conv(conv, pad(x), base, scale)
    expected = direct(conv, x)
    check(out, partial, (expected if base is None else expected + base) / scale, WINOGRAD_PRECISE.bound)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 100))
def test_downsample(shape: tuple[int, int, int, int], seed: int) -> None:
    """A block has an even number of rows; what it is given above them, stride 2 does not look at."""
    rows, width, cin, cout = shape[0] + shape[0] % 2, shape[1] + 1, *shape[2:]
    conv = conv_layer(cin, cout, seed)
    x = torch.randn(rows, width, cin)
    padded = pad(x)
    padded[0] = torch.nan
    check(*run_down(conv, padded), direct(conv, x, halve=True), WINOGRAD_PRECISE.bound)


def test_how_much_smaller_precise_errors_are() -> None:
    x, errors = torch.randn(24, 24, 128), {}
    for precise in (False, True):
        conv = conv_layer(128, 32, precise=precise)
        errors[precise] = rms(run_conv(conv, pad(x))[0] - direct(conv, x))
    assert errors[True] < 0.45 * errors[False]


def test_a_residual_elsewhere() -> None:
    conv = conv_layer(32, 32)
    x, base, out = torch.randn(9, 7, 32), torch.randn(9, 7, 32), torch.empty(9, 7, 32)
    work = workspace(conv, "conv3", 9, 7)
    KERNELS.convolve(ConvBlock("conv3", pad(x), load(conv, "conv3"), out, work, base))
    assert torch.equal(out, run_conv(conv, pad(x), base)[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 130), st.sampled_from([16, 48]), st.sampled_from([16, 32, 80]))
def test_linear(rows: int, cin: int, cout: int) -> None:
    torch.manual_seed(rows)
    conv = Conv("test", cin, cout, 1, torch.nn.Conv2d(cin, cout, 1).requires_grad_(False))
    into = torch.full((KERNELS.loaded(Call("linear", cin, cout, 1, rows, 4, False)),), 255, dtype=torch.uint8)
    weights = KERNELS.load(conv, "linear", torch.float32, into)
    x, outs = torch.randn(1, rows, cin), []
    for number in THREADS:
        torch.set_num_threads(number)
        outs.append(torch.full((1, rows, cout), torch.nan))
        KERNELS.convolve(ConvBlock("linear", x, weights, outs[-1], into[:0]))
    expected = F.linear(x.double(), conv.module.weight.double()[:, :, 0, 0], conv.module.bias.double())
    assert torch.allclose(outs[0].double(), expected, rtol=0, atol=2e-6)
    assert all(torch.equal(out, outs[0]) for out in outs)


LAST = conv_layer(48, 3)


def run_last(padded: torch.Tensor, conv: Conv = LAST) -> torch.Tensor:
    out = torch.full((padded.shape[0] - 2, padded.shape[1], conv.cout), torch.nan)
    work = workspace(conv, "conv3", *out.shape[:2])
    KERNELS.convolve(ConvBlock("conv3", padded, load(conv, "conv3"), out, work))
    return out


@given(
    rows=st.integers(1, 9), width=st.integers(1, 30), cin=st.integers(1, 9).map(lambda n: n * 16),
    seed=st.integers(0, 2**20),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_the_last_layer(rows: int, width: int, cin: int, seed: int) -> None:
    conv = conv_layer(cin, 3, seed)
    source = torch.randn(rows, width, cin)
    out = run_last(pad(source), conv)
    assert (out - direct(conv, source)).abs().max() <= WINOGRAD_LAST.bound


@pytest.mark.parametrize("cin", [32, 96, 128])
def test_the_last_layer_is_more_accurate_than_pytorchs(cin: int) -> None:
    conv = conv_layer(cin, 3)
    source = torch.randn(12, 40, cin)
    expected = direct(conv, source)
    theirs = F.conv2d(source.permute(2, 0, 1)[None], conv.module.weight, conv.module.bias, padding=1)
    error = rms(run_last(pad(source), conv) - expected)
    assert error <= rms(theirs[0].permute(1, 2, 0) - expected), error


def test_the_last_layer_alone_is_computed_so() -> None:
    """What `few_outputs` cannot do goes to PyTorch, and what no last layer has is refused."""
    for cin, cout in ((18, 3), (48, 4)):
        conv = conv_layer(cin, cout)
        source = torch.randn(4, 9, cin)
        assert (run_last(pad(source), conv) - direct(conv, source)).abs().max() <= WINOGRAD_LAST.bound
        assert isinstance(load(conv, "conv3"), tuple)
        assert not hasattr(load(conv, "conv3"), "laid")
    assert hasattr(load(LAST, "conv3"), "laid")
    with pytest.raises(RuntimeError, match="which no last layer has"):
        run_conv(LAST, pad(torch.randn(4, 9, 48)))


def test_the_last_layers_bits_depend_on_no_thread_and_no_cut() -> None:
    padded = pad(torch.randn(13, 29, 48))
    torch.set_num_threads(1)
    whole = run_last(padded)
    for number in THREADS:
        torch.set_num_threads(number)
        assert torch.equal(run_last(padded), whole)
    for start, stop in ((0, 1), (1, 6), (6, 13)):
        assert torch.equal(run_last(padded[start : stop + 2].contiguous()), whole[start:stop])


def test_what_is_not_finite_shows_in_the_last_layer() -> None:
    padded = pad(torch.randn(5, 20, 48))
    padded[3, 7, 11] = torch.nan
    out = run_last(padded)
    assert not torch.isfinite(out[1:4, 6:9]).any()
    assert torch.isfinite(out[:, 9:]).all()


@pytest.mark.parametrize(("cin", "cout"), [(4, 32), (32, 4), (20, 20)])
def test_other_widths_are_computed_directly(cin: int, cout: int) -> None:
    conv = conv_layer(cin, cout)
    x = torch.randn(8, 9, cin)
    check(*run_conv(conv, pad(x)), direct(conv, x))


def test_float64_is_computed_directly() -> None:
    conv = conv_layer(32, 32)
    conv.module.double()
    x = torch.randn(8, 9, 32, dtype=torch.float64)
    call = Call("conv3", 32, 32, 8, 9, 8, False)
    weights = KERNELS.load(conv, "conv3", x.dtype, torch.empty(KERNELS.loaded(call), dtype=torch.uint8))
    work, out = torch.empty(KERNELS.workspace(call), dtype=torch.uint8), torch.empty_like(x)
    KERNELS.convolve(ConvBlock("conv3", pad(x), weights, out, work))
    assert torch.allclose(out, direct(conv, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [32, 24])
def test_prologue(channels: int) -> None:
    rows = torch.cat([torch.linspace(-120, 120, 4001), torch.logspace(-30, 1, 499)])[: 4500 // channels * channels]
    rows = rows.repeat(channels).reshape(-1, 1, channels)
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    out, work = torch.empty_like(rows), torch.empty(2 * rows.nbytes, dtype=torch.uint8)
    KERNELS.prologue(rows, Affine(ones, zeros), True, out, work)
    exact = F.silu(rows.double())
    # Below -87 exp(-x) leaves float32's range, and the result is a denormal or nearly one.
    assert ((out - exact).abs() <= WINOGRAD_SILU.bound * exact.abs() * 2**-24 + 1e-35).all()
    KERNELS.prologue(rows, Affine(2 * ones, zeros + 3), False, out, work)
    assert torch.allclose(out, rows * 2 + 3)


def test_statistics_survive_a_large_mean() -> None:
    conv = conv_layer(16, 16)
    conv.module.bias.fill_(1000.0)
    x = torch.randn(30, 30, 16)
    out, partial = run_conv(conv, pad(x))
    flat = out.double().reshape(-1, 16)
    assert torch.allclose(partial.m2, (flat - flat.mean(0)).square().sum(0), rtol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_statistics(bad: float) -> None:
    conv = conv_layer(16, 16)
    x = torch.randn(13, 13, 16)
    x[12, 12, 5] = bad
    precise = conv_layer(16, 16, precise=True)
    partials = [run_conv(conv, pad(x))[1], run_conv(precise, pad(x))[1], run_up(conv, pad(x))[1]]
    partials.append(run_down(conv, pad(x[1:]))[1])
    assert all(not torch.isfinite(partial.m2).any() for partial in partials)


def test_memory_that_begins_within_a_cache_line_is_refused_where_whole_lines_are_stored() -> None:
    conv, padded = conv_layer(16, 16), pad(torch.randn(6, 5, 16))
    memory = torch.empty(6 * 5 * 16 + 8)
    out = memory[8:].view(6, 5, 16)
    block = ConvBlock("conv3", padded, load(conv, "conv3"), out, workspace(conv, "conv3", 6, 5))
    if vector_code.VECTOR_BYTES == vector_code.LINE:
        with pytest.raises(RuntimeError, match="begin at a cache line"):
            KERNELS.convolve(block)
    else:
        KERNELS.convolve(block)
        assert torch.equal(out, run_conv(conv, padded)[0])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([32, 128, 256, 512]), st.sampled_from([32, 96, 512]), st.integers(1, 60), st.integers(1, 300))
def test_workspace_is_enough_for_the_last_block(cin: int, cout: int, rows: int, width: int) -> None:
    for kind, precise in (("conv3", False), ("conv3", True), ("up", False), ("down", False)):
        call = Call(kind, cin, cout, rows + rows % 2, width + 1, 4, False, precise=precise)  # type: ignore[arg-type]
        work, form = KERNELS.workspace(call), winograd_cut.form_of(call.kind, precise)
        for fewer in {2, rows // 4 * 2, call.rows - 2, call.rows} - {0}:
            cut = winograd_cut.cut_tasks(form, cin, cout, fewer, call.width)
            assert cut.scratch_bytes(form, cut.workers) <= work


# -- the same bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "precise"), [(run_conv, False), (run_conv, True), (run_up, False), (run_down, False)])
def test_threads_change_nothing(run: Any, precise: bool) -> None:
    conv = conv_layer(32, 512, precise=precise)
    padded = pad(torch.randn(26, 40, 32))
    results = []
    for number in THREADS:
        torch.set_num_threads(number)
        results.append(run(conv, padded))
    for out, partial in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(partial.mean, results[0][1].mean)
        assert torch.equal(partial.m2, results[0][1].m2)


@pytest.mark.parametrize("run", [run_conv, run_up])
def test_threads_wait_for_one_another_between_the_steps(run: Any) -> None:
    """Without that, products would be made of tiles, and pixels of products, that are not there yet."""
    conv, padded = conv_layer(160, 160), pad(torch.randn(24, 64, 160))
    torch.set_num_threads(1)
    expected, _ = run(conv, padded)
    torch.set_num_threads(3)
    for _ in range(30):
        assert torch.equal(run(conv, padded)[0], expected)


@pytest.mark.parametrize(
    ("run", "step", "grown", "precise"),
    [(run_conv, 6, 1, False), (run_conv, 4, 1, True), (run_up, 3, 2, False), (run_down, 6, 0.5, False)],
)
def test_values_do_not_depend_on_where_blocks_are_cut(run: Any, step: int, grown: float, precise: bool) -> None:
    conv = conv_layer(32, 48, precise=precise)
    padded = pad(torch.randn(4 * step + 4, 11, 32))
    whole, _ = run(conv, padded)
    for cut in (step, 3 * step):
        above, below = run(conv, padded[: cut + 2])[0], run(conv, padded[cut:])[0]
        assert torch.equal(torch.cat([above, below]), whole)
        assert len(above) == grown * cut


def test_several_python_threads_at_once() -> None:
    conv = conv_layer(32, 32)
    padded = pad(torch.randn(30, 60, 32))
    expected = run_conv(conv, padded)[0]
    wrong: list[int] = []

    def work(index: int) -> None:
        torch.set_num_threads(THREADS[index % len(THREADS)])
        for _ in range(10):
            if not torch.equal(run_conv(conv, padded)[0], expected):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_alone_gives_the_threads_back() -> None:
    torch.set_num_threads(3)
    with thread_count.alone(), thread_count.alone():
        assert (thread_count.count(), torch.get_num_threads()) == (3, 1)
        with thread_count.pytorchs():
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
    assert (thread_count.count(), torch.get_num_threads()) == (3, 3)


# -- whole decodes -------------------------------------------------------------------------------------------------


def to_uint8(image: torch.Tensor) -> Any:
    return (((image / 2 + 0.5).clamp(0, 1)) * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize(("height", "width"), [(12, 20), (1, 9), (17, 1)])
def test_decodes(height: int, width: int) -> None:
    vae = random_vae(widths=(32, 64, 64, 96))
    raw = torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(3))
    engine = ExactDecoder(vae, kernels="winograd")
    assert engine.plan(height, width).kernels == "winograd"
    image = engine.decode(raw)
    with torch.no_grad():
        expected = random_vae(widths=(32, 64, 64, 96), dtype=torch.float64).decode(raw.double()).sample
    difference = level_difference(to_uint8(image), to_uint8(expected))
    assert difference.changed <= WINOGRAD_CHANGED.bound
    assert difference.largest <= WINOGRAD_LEVELS.bound
    if height * width > 64:  # MKL's own products of a few rows (attention's projections) do depend on its threads
        torch.set_num_threads(3)
        assert torch.equal(engine.decode(raw), image)
    assert torch.equal(engine.decode(raw[1:]), image[1:])
    smallest = ExactDecoder(vae, kernels="winograd", memory_limit=engine.smallest_limit(height, width))
    assert torch.equal(smallest.decode(raw[:1]), image[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_in_float32(dtype: torch.dtype) -> None:
    wide, half = random_vae(widths=(32, 64, 64, 96)), random_vae(widths=(32, 64, 64, 96), dtype=dtype)
    raw = torch.randn(2, 16, 9, 12, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.no_grad():
        for ours, theirs in zip(wide.decoder.parameters(), half.decoder.parameters(), strict=True):
            ours.copy_(theirs)  # the very same values
    engine = ExactDecoder(half, kernels="winograd")
    image = engine.decode(raw)
    assert torch.equal(image, ExactDecoder(wide, kernels="winograd").decode(raw.float()).to(dtype))
    engine.memory_limit = engine.smallest_limit(9, 12, 2)
    assert torch.equal(engine.decode(raw), image)


def test_pixels_that_do_not_fit_half_precision_are_an_error() -> None:
    vae = random_vae(dtype=torch.float16)
    with torch.no_grad():
        vae.decoder.conv_out.weight.fill_(6e4)
    with pytest.raises(NonFiniteOutputError, match="overflow float16"):
        ExactDecoder(vae, kernels="winograd").decode(torch.randn(1, 16, 4, 4).half())


def test_the_demo_checkpoints_picture() -> None:
    with safe_open(ASSETS / "latents" / "astronaut_512x512.safetensors", "pt") as file:
        latents = unpack_latents(file.get_tensor("latents").float(), 512, 512)[:, :, 4:36, 20:52]
    vae = AutoencoderKL.from_pretrained(ASSETS / "demo").eval().requires_grad_(False)
    raw = latents / vae.config.scaling_factor + vae.config.shift_factor
    image = ExactDecoder(vae, kernels="winograd").decode(raw)
    expected = vae.double().decode(raw.double()).sample
    difference = level_difference(to_uint8(image), to_uint8(expected))
    assert difference.changed <= WINOGRAD_CHANGED.bound
    assert difference.largest <= WINOGRAD_LEVELS.bound


# -- where they do not run -----------------------------------------------------------------------------------------


def test_a_processor_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_code, "supported", lambda: "this processor is too old")
    with pytest.raises(ValueError, match="too old"):
        make_kernels("winograd", CPU)
    assert no_winograd(torch.device("cuda")) is not None
    assert make_kernels("auto", CPU).name == "torch"
    plan = ExactDecoder(random_vae()).plan(4, 4)
    assert plan.kernels == "torch"
    assert "note: Winograd would be faster, but this processor is too old" in str(plan)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("DISABLE_JIT", 1, "NUMBA_DISABLE_JIT is set"), ("CPU_NAME", "generic", "NUMBA_CPU_NAME is 'generic'")],
)
def test_what_numba_was_told(variable: str, value: object, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told by the environment; without compilation the kernels are Python, of which nothing runs."""
    if platform.machine() == "aarch64" and variable == "CPU_NAME":
        pytest.skip("an Arm processor multiplies and adds in one step, whatever it is called")
    monkeypatch.setattr(numba.config, variable, value)
    plan = ExactDecoder(random_vae()).plan(4, 4)
    assert (plan.kernels, words in plan.kernels_note) == ("torch", True)


@pytest.mark.parametrize(
    ("told", "registers"),
    [("-avx512f", (8, 16)), ("+fma, -avx512f,+avx512f", (16, 32)), ("-avx512f,-avx2", (4, 32)), (None, None)],
)
def test_vectors_are_as_wide_as_numba_may_use(
    told: str | None, registers: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba compiles for what it is told, and vectors that are wider would be taken apart."""
    monkeypatch.setattr(numba.config, "CPU_FEATURES", told)
    monkeypatch.setattr(vector_code.llvm, "get_host_cpu_features", lambda: {"avx2": True, "fma": True})
    assert vector_code._registers() == (registers or (8, 16))
    if told == "-avx512f,-avx2" and platform.machine() != "aarch64":
        assert vector_code.supported() == "this processor has no AVX2 with fused multiply-add"


def test_they_are_what_a_cpu_decodes_with() -> None:
    vae = random_vae()
    plan = ExactDecoder(vae).plan(4, 4)
    assert (plan.kernels, plan.kernels_note) == ("winograd", "")
    assert "note:" not in str(plan)


def test_numbas_cache_knows_the_vector_code() -> None:
    # Numba recompiles when the file of a function changes, not when what it calls does.
    digest = hashlib.sha256()
    called = (
        vector_code, counters, products, amx, pixel_loops, winograd_loops, winograd_matrices, winograd_job,
        attention_loops, attention_amx,
    )  # fmt: skip
    for module in called:
        digest.update(Path(module.__file__).read_bytes())
    know_the_vector_code(digest.hexdigest()[:16], multiply)
    digest.update(Path(multiply.__file__).read_bytes())  # which the others call
    know_the_vector_code(digest.hexdigest()[:16], winograd_tasks, winograd_weights, row_tasks, few_outputs, attention)


def know_the_vector_code(digest: str, *modules: Any) -> None:
    for module in modules:
        assert digest == module.VECTOR_CODE, (
            f"write {digest!r} into {module.__name__}.VECTOR_CODE: caches of compiled code then expire"
        )


def addresses_taken(function: Any) -> dict[str, bool]:
    """The arrays that compiled code makes and takes the address of: whether each is held until the function returns.

    A part of another array is not made here: whoever has the whole holds its memory.
    Numba drops an array after the last use of its name, and its address is no use of it: memory that is freed while it
    is worked in belongs to whichever thread asks next.
    """
    function_ir = run_frontend(function)
    PostProcessor(function_ir).run(emit_dels=True)
    made, parts, dropped = set(), set(), {}
    for block in function_ir.blocks.values():
        for line in block.body:
            if isinstance(line, ir.Assign) and getattr(line.value, "op", "") in ("getitem", "static_getitem"):
                parts.add(line.target.name)
            if isinstance(line, ir.Assign) and isinstance(line.value, ir.Expr) and line.value.op == "getattr":
                if line.value.attr == "ctypes":
                    made.add(line.value.value.name)
            elif isinstance(line, ir.Del):
                dropped[line.value] = isinstance(block.terminator, ir.Return)
    return {name: dropped[name] for name in made - parts - set(function_ir.arg_names)}


def test_compiled_code_holds_its_arrays_while_it_works_in_them() -> None:
    def careless(job: int) -> int:
        scratch = np.empty(8, np.float32)
        at = scratch.ctypes.data
        while at > job:
            at -= job
        return at

    assert addresses_taken(careless) == {"scratch": False}, "it would notice"
    held = {}
    for module in (winograd_tasks, winograd_weights, row_tasks, few_outputs, attention):
        for name, function in vars(module).items():
            if hasattr(function, "py_func"):
                held |= {f"{name}: {array}": kept for array, kept in addresses_taken(function.py_func).items()}
    assert held.keys() >= {
        "_transform: strip", "_transform: table", "_transform_back: terms", "_transform_back: shares",
        "linear_rows: gathered", "linear_rows: multiplied",
    }  # fmt: skip
    assert all(held.values()), held


def test_preparing_compiles() -> None:
    assert Decoder(random_vae()).prepare() >= 0
    assert KERNELS.prepare() == 0, "once is enough"
    assert winograd_tasks.convolve.signatures
