"""The exact engine against diffusers in float64, and against itself under other limits, batches and threads.

A GPU is not covered here, but in `test_gpu.py` and benchmarks/gpu.py. FLUX's full width is covered by ``-m slow`` only.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine_models import Shape, error_ratio, one_thread, rms, shapes, true_decode
from fluxvae import devices
from fluxvae.engine import planner
from fluxvae.engine.exact import ExactDecoder, PrecisionRetryWarning
from fluxvae.engine.kernels.direct import onednn
from fluxvae.engine.memory.pool import ArenaPool
from fluxvae.engine.records import Norm
from fluxvae.engine.runner import Runner
from fluxvae.engine.statistics import MOST_BLOCKS, FiniteChecks, Moments, block_moments
from fluxvae.errors import DecodeCancelled, InvalidOptionError, MemoryLimitError, NonFiniteOutputError
from fluxvae.verify.tolerances import ENGINE_ERROR_RATIO, ENGINE_FLOAT64_ERROR
from leftovers import nothing_left_behind

pytestmark = pytest.mark.usefixtures("one_thread")

__all__ = ["one_thread"]  # a fixture, found by its name

direct = partial(ExactDecoder, kernels="torch")
"""The engine with direct kernels, whatever the machine could do; `test_winograd` has the others."""

BLOCKS = st.sampled_from([1, 300, 2000, 1 << 20])
"""Values per block: from one row at a time to the whole map."""


@given(shape=shapes(), blocks=BLOCKS)
@example(shape=Shape(height=1, width=1), blocks=1)
@example(shape=Shape(widths=(8,), attention=False, height=1, width=9), blocks=300)
@example(shape=Shape(widths=(8, 16, 24, 24), post_quant=True, height=3, width=2), blocks=300)
def test_in_float64_it_is_the_same_function(shape: Shape, blocks: int) -> None:
    vae, raw = shape.vae(torch.float64), shape.latents(torch.float64)
    ours = direct(vae, block_values=blocks).decode(raw)
    truth = true_decode(vae, raw)
    assert ours.shape == truth.shape
    assert float((ours - truth).abs().max()) <= ENGINE_FLOAT64_ERROR.bound * max(float(truth.abs().max()), 1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.usefixtures("half_precision")
def test_error_is_no_larger_than_that_of_diffusers(dtype: str) -> None:
    """Over architectures and sizes; each kind alone may lie a little above by chance of a few hundred values."""
    torch_dtype = getattr(torch, dtype)
    cases = [
        Shape(height=8, width=8),
        Shape(widths=(32, 64, 64, 64), groups=32, layers_per_block=2, latent_channels=16, height=5, width=7),
        Shape(widths=(16, 16), height=1, width=24),
        Shape(widths=(16, 32, 32), attention=False, post_quant=True, height=24, width=1),
        Shape(widths=(16, 48), height=3, width=16),
    ]
    if dtype == "float16":  # slow on a CPU without float16 arithmetic
        cases = [replace(case, height=min(case.height, 4), width=min(case.width, 4)) for case in cases[:2]]
    ours_squared = theirs_squared = 0.0
    for case in cases:
        for seed in range(1 if dtype == "float16" else 3):
            shape = replace(case, seed=seed)
            vae, raw = shape.vae(torch_dtype), shape.latents(torch_dtype)
            truth = true_decode(vae, raw)
            scale = rms(truth)
            with torch.no_grad():
                theirs = rms(vae.decode(raw).sample.double() - truth) / scale
            ours = rms(direct(vae, block_values=2000).decode(raw).double() - truth) / scale
            assert ours <= 1.5 * theirs, shape
            ours_squared, theirs_squared = ours_squared + ours**2, theirs_squared + theirs**2
    ratio = (ours_squared / theirs_squared) ** 0.5
    assert ratio <= error_ratio(dtype), ratio


def test_error_in_maps_that_diffusers_convolves_by_the_same_library() -> None:
    """Small ones it does not, on some processors (`engine_models.error_ratio`)."""
    shape = Shape(widths=(32, 64, 64, 64), groups=32, layers_per_block=2, latent_channels=16, height=32, width=32)
    vae, raw = shape.vae(), shape.latents()
    truth = true_decode(vae, raw)
    with torch.no_grad():
        theirs = rms(vae.decode(raw).sample.double() - truth)
    assert rms(direct(vae).decode(raw).double() - truth) <= ENGINE_ERROR_RATIO["float32"].bound * theirs


@given(
    shape=shapes(),
    blocks=st.sampled_from([300, 2000]),
    fraction=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=25)
def test_same_bits_for_any_limit_batch_and_position(
    shape: Shape, blocks: int, fraction: float, dtype: torch.dtype
) -> None:
    vae, raw = shape.vae(dtype), shape.latents(dtype)
    free = direct(vae, block_values=blocks)
    whole = free.decode(raw)
    low = free.smallest_limit(shape.height, shape.width, shape.batch)
    high = free.plan(shape.height, shape.width, shape.batch).peak_bytes
    tight = direct(vae, block_values=blocks, memory_limit=int(low + fraction * (high - low)))
    assert torch.equal(tight.decode(raw), whole)
    for i in range(shape.batch):
        assert torch.equal(tight.decode(raw[i : i + 1])[0], whole[i]), "alone or in a batch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_every_rung(dtype: torch.dtype) -> None:
    """Walk the whole ladder of one network: every plan the planner can choose between smallest and unlimited."""
    shape = Shape(widths=(16, 32, 32), layers_per_block=2, height=12, width=10, batch=2)
    vae, raw = shape.vae(dtype), shape.latents(dtype)
    free = direct(vae, block_values=3000)
    truth, seen = free.decode(raw), {}
    low, high = free.smallest_limit(12, 10, 2), free.plan(12, 10, 2).peak_bytes
    for step in range(41):
        engine = direct(vae, block_values=3000, memory_limit=low + (high - low) * step // 40)
        seen.setdefault(engine.plan(12, 10, 2).rungs, engine)
    places = {place for rungs in seen for rung in rungs for place in rung.split("/")}
    assert places == {"memory", "spill", "recompute"}
    assert len(seen) >= 4
    for rungs, engine in seen.items():
        assert torch.equal(engine.decode(raw), truth), rungs


@settings(max_examples=30)
@given(data=st.data(), blocks=st.sampled_from([300, 3000]))
def test_same_bits_for_any_plan_at_all(data: st.DataObject, blocks: int) -> None:
    """Any choice of places for any map, also those that no limit would make the planner choose."""
    shape = Shape(widths=(16, 32, 32), height=5, width=4)
    vae, raw = shape.vae(), shape.latents()
    engine = direct(vae, block_values=blocks)
    planner, spill = engine._planner_for(5, 4, 1)
    (state,), layers = planner._states[0], []
    for index in range(len(engine.network.layers)):
        choices = planner._choices(index, state)
        # The last is the one that keeps least: it computes the upsampled map and the middle behind it again.
        layer, state = choices[data.draw(st.one_of(st.integers(0, len(choices) - 1), st.just(len(choices) - 1)))]
        layers.append(layer)
    plan = planner._make(tuple(layers), fastest=tuple(layers), limit=None, source="", spill_dir=None)
    image = torch.empty(3, 20, 16)
    room = ArenaPool(raw.device)
    runner = Runner(engine.network, plan, engine._kernels(raw.device), room, spill, raw.device, raw.dtype, lambda: None)
    with torch.no_grad():
        runner.run(raw[0], image)
    runner.close()
    assert torch.equal(image, engine.decode(raw)[0])


def test_same_bits_for_one_thread_and_two() -> None:
    shape = Shape(widths=(16, 32, 32), height=12, width=10)
    vae, raw, before = shape.vae(), shape.latents(), torch.get_num_threads()
    try:
        images = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            images.append(direct(vae, block_values=4000).decode(raw))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*images)


def test_a_channels_last_model_keeps_every_promise() -> None:
    """Its convolutions are other ones, as in diffusers: so are the last bits, but the same for every limit."""
    shape = Shape(widths=(32, 64, 64), groups=32, height=12, width=10)
    vae, raw = shape.vae(), shape.latents()
    torch.nn.Module.to(vae, memory_format=torch.channels_last)
    free = direct(vae, block_values=3000)
    image, truth = free.decode(raw), true_decode(vae, raw)
    assert rms(image.double() - truth) <= 1e-5 * rms(truth)
    tight = direct(vae, block_values=3000, memory_limit=free.smallest_limit(12, 10))
    assert torch.equal(tight.decode(raw), image)


def test_the_same_engine_follows_a_model_that_changes_its_dtype() -> None:
    shape = Shape()
    vae = shape.vae()
    engine = direct(vae)
    engine.decode(shape.latents())
    torch.nn.Module.to(vae, torch.bfloat16)
    assert engine.decode(shape.latents(torch.bfloat16)).dtype == torch.bfloat16


@given(fraction=st.floats(0, 1), batch=st.integers(1, 3))
@settings(max_examples=10)
def test_progress_counts_every_block_once(fraction: float, batch: int) -> None:
    shape = Shape(batch=batch)
    vae = shape.vae()
    low = direct(vae, block_values=500).smallest_limit(6, 5, batch)
    engine = direct(vae, block_values=500, memory_limit=int(low * (1 + fraction)))
    seen: list[tuple[int, int]] = []
    engine.decode(shape.latents(), progress=lambda done, total: seen.append((done, total)))
    total = engine.plan(6, 5, batch).total_blocks
    assert seen == [(i, total) for i in range(total + 1)]


@given(at=st.floats(0, 0.999))
@settings(max_examples=15)
def test_a_cancelled_decode_leaves_nothing_behind(at: float) -> None:
    shape = Shape(batch=2)
    vae, raw = shape.vae(), shape.latents()
    free = direct(vae, block_values=500)
    expected = free.decode(raw)
    engine = direct(vae, block_values=500, memory_limit=free.smallest_limit(6, 5, 2))
    stop, done = int(at * engine.plan(6, 5, 2).total_blocks), [0]

    def progress(count: int, total: int) -> None:
        done[0] = count

    with nothing_left_behind(), pytest.raises(DecodeCancelled, match=f"after {stop} of"):
        engine.decode(raw, progress=progress, cancel=lambda: done[0] >= stop)
    assert torch.equal(engine.decode(raw), expected), "the engine is as good as new"


def test_an_error_in_progress_leaves_nothing_behind() -> None:
    shape = Shape()
    vae = shape.vae()
    limit = direct(vae, block_values=500).smallest_limit(6, 5)
    engine = direct(vae, block_values=500, memory_limit=limit)

    def broken(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyError("mine")

    with nothing_left_behind(), pytest.raises(KeyError, match="mine"):
        engine.decode(shape.latents(), progress=broken)


def test_a_limit_below_the_smallest_is_refused_and_the_smallest_named_works() -> None:
    shape = Shape(batch=2)
    vae, raw = shape.vae(), shape.latents()
    smallest = direct(vae).smallest_limit(6, 5, 2)
    started: list[int] = []
    with pytest.raises(MemoryLimitError, match=f"at least {smallest} bytes") as caught:
        direct(vae, memory_limit=smallest - 1).decode(raw, progress=lambda *_: started.append(1))
    assert "memory_limit" in str(caught.value)
    assert not started
    assert direct(vae, memory_limit=smallest).decode(raw).shape == (2, 3, 24, 20)


@pytest.fixture
def half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed as such, whatever the processor."""
    monkeypatch.setattr(devices, "computes_directly", lambda dtype, device: True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cpu_without_arithmetic_for_a_dtype_computes_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "computes_directly", lambda asked, device: asked != dtype)
    shape = Shape()
    vae, raw = shape.vae(dtype), shape.latents(dtype)
    image = direct(vae).decode(raw)
    torch.nn.Module.to(vae, torch.float32)
    assert torch.equal(image, direct(vae).decode(raw.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_convolutions_find_a_trimmed_heap(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What glibc keeps differs from run to run: `-m slow` measures peaks, this sees that it is done at all."""
    trimmed: list[int] = []
    monkeypatch.setattr(onednn, "trim_heap", lambda: trimmed.append(1))
    for cin, times in ((8, 0), (256, 1)):
        weight, bias = torch.randn(cin, cin, 3, 3, dtype=dtype), torch.randn(cin, dtype=dtype)
        image = torch.randn(1, cin, 3, 4, dtype=dtype)
        out = onednn.convolve(image, weight, bias)
        assert out.shape == (1, cin, 1, 4)
        assert len(trimmed) == times


def test_attention_finds_a_trimmed_heap_for_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr("fluxvae.engine.kernels.direct.kernels.trim_heap", lambda: trimmed.append(1))
    shape = Shape(height=20, width=9)
    # A block of attention's has 2 * 9 * 32 values a row: 7 rows at once, so three blocks.
    direct(shape.vae(), block_values=2 * 9 * 32 * 7).decode(shape.latents())
    assert len(trimmed) == 3


@pytest.mark.parametrize("blocks", [1, 63, 64, 65, 400])
def test_statistics_of_many_blocks_are_combined_on_the_way(blocks: int) -> None:
    """They are in no plan, and a large map has hundreds of blocks."""
    values = torch.randn(blocks, 6, 8, generator=torch.Generator().manual_seed(0)) + 3
    moments = Moments()
    kept = 0
    for block in values:
        moments.add(block_moments(block[None], torch.empty(6 * 8 * 4, dtype=torch.uint8)))
        kept = max(kept, len(moments.counts))
    assert kept < MOST_BLOCKS
    assert sum(moments.counts) == 6 * blocks
    norm = Norm("its name", 8, 2, 1e-6, True, torch.nn.GroupNorm(2, 8))
    affine = moments.affine(norm, torch.float64, FiniteChecks(torch.device("cpu")))
    grouped = values.double().view(-1, 2, 4).transpose(0, 1).reshape(2, -1)
    scale = (grouped.var(1, correction=0) + 1e-6).rsqrt()
    assert torch.allclose(affine.scale, scale.repeat_interleave(4), rtol=1e-6, atol=0)
    assert torch.allclose(affine.shift, -(grouped.mean(1) * scale).repeat_interleave(4), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("half_precision")
def test_overflow_in_half_precision_is_decoded_again_in_float32() -> None:
    shape = Shape(height=3, width=3)
    vae = shape.vae()
    _overflow(vae, 4e3)
    torch.nn.Module.to(vae, torch.float16)
    raw = shape.latents(torch.float16)
    seen: list[tuple[int, int]] = []
    with pytest.warns(PrecisionRetryWarning, match="float32"):
        image = direct(vae).decode(raw, progress=lambda *at: seen.append(at))
    assert image.dtype == torch.float16
    assert torch.isfinite(image).all()
    truth = true_decode(vae, raw)
    assert rms(image.double() - truth) <= 0.01 * rms(truth)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.usefixtures("half_precision")
def test_what_overflows_float32_too_is_an_error_in_bfloat16() -> None:
    vae = Shape(height=3, width=3).vae()
    _overflow(vae, 1e18)
    torch.nn.Module.to(vae, torch.bfloat16)
    with pytest.warns(PrecisionRetryWarning), pytest.raises(NonFiniteOutputError, match="float32 too"):
        direct(vae).decode(Shape(height=3, width=3).latents(torch.bfloat16))


def _overflow(vae: AutoencoderKL, factor: float) -> None:
    """Make the last resnet but one too large for half precision; the norms behind it scale it back."""
    resnet = vae.decoder.up_blocks[-1].resnets[0]
    with torch.no_grad():
        for module in (vae.decoder.up_blocks[-2].upsamplers[0].conv, resnet.conv_shortcut):
            module.weight.mul_(factor)
            module.bias.mul_(factor)


@pytest.mark.usefixtures("half_precision")
def test_the_float32_retry_keeps_the_limit_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "RUNTIME_BYTES", {2: 0, 4: 0})  # a few MB, which hide so small a network's
    shape = Shape(height=16, width=16)
    vae = shape.vae()
    _overflow(vae, 4e3)
    torch.nn.Module.to(vae, torch.float16)
    engine = direct(vae)
    engine.memory_limit = engine.smallest_limit(16, 16)
    with pytest.raises(NonFiniteOutputError, match="no room for float32.*at least"):
        engine.decode(shape.latents(torch.float16))


@pytest.mark.parametrize("where", ["latents", "weights", "output"])
def test_non_finite_float32_is_an_error_never_a_picture(where: str) -> None:
    shape = Shape()
    vae, raw = shape.vae(), shape.latents()
    with torch.no_grad():
        if where == "latents":
            raw[0, 1, 2, 3] = torch.nan
        elif where == "weights":
            vae.decoder.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = torch.inf
        else:
            vae.decoder.conv_out.bias[1] = torch.nan
    with pytest.raises(NonFiniteOutputError, match="latents" if where == "latents" else "float32"):
        direct(vae).decode(raw)


def test_large_finite_offsets_lose_no_accuracy() -> None:
    """Statistics by squares alone would cancel: a channel whose mean is a thousand times its spread."""
    shape = Shape(height=8, width=8)
    vae, raw = shape.vae(), shape.latents()
    with torch.no_grad():
        vae.decoder.conv_in.bias.fill_(1000.0)
        truth = true_decode(vae, raw)
        theirs = rms(vae.decode(raw).sample.double() - truth)
    assert rms(direct(vae).decode(raw).double() - truth) <= theirs


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda vae: setattr(vae.decoder.conv_in, "padding_mode", "circular"), "decoder.conv_in"),
        (lambda vae: setattr(vae.decoder, "conv_act", torch.nn.ReLU()), "decoder.conv_act"),
        (lambda vae: setattr(vae.decoder.mid_block.resnets[1], "nonlinearity", torch.nn.Mish()), "resnets.1.nonlin"),
        (lambda vae: setattr(vae.decoder.mid_block.attentions[0], "heads", 2), "attentions.0"),
        (lambda vae: setattr(vae, "decoder", torch.nn.Identity()), "vae"),
    ],
)
def test_what_it_cannot_read_is_refused_by_name(change: object, named: str) -> None:
    vae = Shape().vae()
    change(vae)  # type: ignore[operator]
    with pytest.raises(InvalidOptionError, match=named):
        direct(vae)


def test_wrong_input_is_refused() -> None:
    engine = direct(Shape().vae())
    for raw in (torch.zeros(1, 3, 4, 4), torch.zeros(4, 4, 4), torch.zeros(1, 4, 0, 4), torch.zeros(1, 4, 4, 4).half()):
        with pytest.raises(InvalidOptionError, match="raw: got"):
            engine.decode(raw)
    with pytest.raises(InvalidOptionError, match="kernels: got 'magic'"):
        ExactDecoder(Shape().vae(), kernels="magic")
    with pytest.raises(InvalidOptionError, match="memory_limit"):
        direct(Shape().vae(), memory_limit=0)


def test_nothing_is_warned_about_in_an_ordinary_decode() -> None:
    shape = Shape()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        direct(shape.vae()).decode(shape.latents())


FLUX = Shape(widths=(128, 256, 512, 512), groups=32, layers_per_block=2, latent_channels=16, height=20, width=20)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["default", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_flux_error_is_no_larger_than_that_of_diffusers(dtype: str, layout: torch.memory_format) -> None:
    torch.set_num_threads(2)
    vae, raw = FLUX.vae(getattr(torch, dtype)), FLUX.latents(getattr(torch, dtype))
    torch.nn.Module.to(vae, memory_format=layout)
    truth = true_decode(vae, raw)
    with torch.no_grad():
        theirs = rms(vae.decode(raw).sample.double() - truth)
    ours = rms(direct(vae).decode(raw).double() - truth)
    print(f"{dtype} {layout}: ours {ours:.3e}, diffusers {theirs:.3e}, ratio {ours / theirs:.3f}")
    assert ours <= theirs
