"""The exact encoder against diffusers in float64, and against itself under other limits, batches and threads.

FLUX's full width is covered by ``-m slow`` and benchmarks/encode.py. What decoding and encoding share (retries, out of
memory, spilling to a GPU's host) is covered by the decoder's tests.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine_models import Shape, needs_vector_code, one_thread, rms, shapes, true_encode
from fluxvae import devices
from fluxvae.engine.exact import ExactEncoder, PrecisionRetryWarning
from fluxvae.engine.memory.pool import ArenaPool
from fluxvae.engine.runner import Runner
from fluxvae.errors import DecodeCancelled, InvalidOptionError, MemoryLimitError, NonFiniteOutputError
from fluxvae.verify.tolerances import (
    ENCODER_ERROR_RATIO,
    ENGINE_FLOAT64_ERROR,
    WINOGRAD_ENCODER_RATIO,
)
from leftovers import nothing_left_behind

pytestmark = pytest.mark.usefixtures("one_thread")

__all__ = ["one_thread"]  # a fixture, found by its name

direct = partial(ExactEncoder, kernels="torch")
BLOCKS = st.sampled_from([1, 300, 2000, 1 << 20])
"""Values per block: from one row, or two, at a time to the whole map."""
MORE = st.tuples(st.integers(0, 7), st.integers(0, 7))
"""Rows and columns beyond whole latents: their maps have odd sizes, which are halved and rounded down."""


def network(shape: Shape, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    return shape.vae(dtype, encoder=True)


@given(shape=shapes(), blocks=BLOCKS, more=MORE)
@example(shape=Shape(height=1, width=1), blocks=1, more=(0, 0))
@example(shape=Shape(widths=(8,), attention=False, height=1, width=9), blocks=300, more=(0, 0))
@example(shape=Shape(widths=(8, 16, 24, 24), post_quant=True, height=3, width=2), blocks=300, more=(7, 1))
@example(shape=Shape(widths=(16, 32, 32), height=4, width=4), blocks=1, more=(1, 3))
def test_in_float64_it_is_the_same_function(shape: Shape, blocks: int, more: tuple[int, int]) -> None:
    vae, pixels = network(shape, torch.float64), shape.pixels(torch.float64, more)
    ours = direct(vae, block_values=blocks).encode(pixels)
    truth = true_encode(vae, pixels)
    assert ours.shape == truth.shape
    assert float((ours - truth).abs().max()) <= ENGINE_FLOAT64_ERROR.bound * max(float(truth.abs().max()), 1.0)


CASES = [
    Shape(height=8, width=8),
    Shape(widths=(32, 64, 64, 64), groups=32, layers_per_block=2, latent_channels=16, height=5, width=7),
    Shape(widths=(16, 16), height=1, width=24),
    Shape(widths=(16, 32, 32), attention=False, post_quant=True, height=24, width=1),
    Shape(widths=(16, 48), height=3, width=16),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_is_no_larger_than_that_of_diffusers(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of mean and log variance, over architectures and sizes; each kind alone may lie a little above by chance."""
    monkeypatch.setattr(devices, "computes_directly", lambda dtype, device: True)
    torch_dtype = getattr(torch, dtype)
    # Where diffusers' maps become a pixel wide, oneDNN's bfloat16 convolution writes garbage (`padded_width`).
    cases = [case for case in CASES if case.width > 1 or dtype == "float32"]
    squared = {"mean": [0.0, 0.0], "log variance": [0.0, 0.0]}
    for case in cases:
        for seed in range(3):
            shape = replace(case, seed=seed)
            vae, pixels = network(shape, torch_dtype), shape.pixels(torch_dtype, (seed, 0))
            truth = true_encode(vae, pixels)
            with torch.no_grad():
                theirs = vae.encode(pixels).latent_dist.parameters
            ours = direct(vae, block_values=2000).encode(pixels)
            for part, name in enumerate(squared):
                true = truth.chunk(2, 1)[part]
                for which, moments in enumerate((ours, theirs)):
                    squared[name][which] += (rms(moments.chunk(2, 1)[part].double() - true) / rms(true)) ** 2
    for name, (mine, its) in squared.items():
        ratio = (mine / its) ** 0.5
        assert ratio <= ENCODER_ERROR_RATIO[dtype].bound, (name, ratio)


@needs_vector_code
@settings(max_examples=20)
@given(
    widths=st.lists(st.sampled_from([16, 32, 48, 64, 96]), min_size=1, max_size=4),
    layers=st.integers(1, 2),
    quant=st.booleans(),
    attention=st.booleans(),
    size=st.tuples(st.integers(32, 120), st.integers(32, 120)),
    seed=st.integers(0, 99),
)
@example(widths=[96, 48, 48, 48], layers=2, quant=True, attention=True, size=(88, 128), seed=0)
@example(widths=[16, 32, 64, 64], layers=2, quant=False, attention=True, size=(131, 115), seed=0)
@example(widths=[64], layers=2, quant=False, attention=True, size=(80, 72), seed=0)
def test_winograd_errors_are_few_times_those_of_diffusers(
    widths: list[int], layers: int, quant: bool, attention: bool, size: tuple[int, int], seed: int
) -> None:
    """Pictures so small that nothing goes by Winograd are not among them."""
    scale = 2 ** (len(widths) - 1)
    shape = Shape(tuple(widths), 8, layers, 16, quant, attention, size[0] // scale, size[1] // scale, seed=seed)
    vae, pixels = network(shape), shape.pixels(more=(size[0] % scale, size[1] % scale))
    truth = true_encode(vae, pixels)
    with torch.no_grad():
        theirs = vae.encode(pixels).latent_dist.parameters
    ours = ExactEncoder(vae, kernels="winograd").encode(pixels)
    for part in (0, 1):
        ours_off, theirs_off = (rms(one.chunk(2, 1)[part] - truth.chunk(2, 1)[part]) for one in (ours, theirs))
        assert ours_off <= WINOGRAD_ENCODER_RATIO.bound * theirs_off


@given(
    shape=shapes(),
    blocks=st.sampled_from([300, 2000]),
    more=MORE,
    fraction=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=25)
def test_same_bits_for_any_limit_batch_and_position(
    shape: Shape, blocks: int, more: tuple[int, int], fraction: float, dtype: torch.dtype
) -> None:
    vae, pixels = network(shape, dtype), shape.pixels(dtype, more)
    size = (*pixels.shape[2:], shape.batch)
    free = direct(vae, block_values=blocks)
    whole = free.encode(pixels)
    low, high = free.smallest_limit(*size), free.plan(*size).peak_bytes
    tight = direct(vae, block_values=blocks, memory_limit=int(low + fraction * (high - low)))
    assert torch.equal(tight.encode(pixels), whole)
    for i in range(shape.batch):
        assert torch.equal(tight.encode(pixels[i : i + 1])[0], whole[i]), "alone or in a batch"


@needs_vector_code
@pytest.mark.parametrize("quant", [False, True])
def test_winograds_bits_for_any_limit_batch_and_number_of_threads(quant: bool) -> None:
    shape = Shape(widths=(16, 32, 48), groups=8, layers_per_block=2, post_quant=quant, height=20, width=24, batch=2)
    vae, pixels = network(shape), shape.pixels(more=(3, 1))
    size = (*pixels.shape[2:], 2)
    torch.set_num_threads(3)  # every thread needs scratch
    free = ExactEncoder(vae, kernels="winograd", block_values=6000)
    whole = free.encode(pixels)
    low, high = free.smallest_limit(*size), free.plan(*size).peak_bytes
    for step in range(6):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            tight = ExactEncoder(
                vae, kernels="winograd", block_values=6000, memory_limit=low + (high - low) * step // 5
            )
            assert torch.equal(tight.encode(pixels), whole)
            assert torch.equal(tight.encode(pixels[1:]), whole[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_that_become_a_pixel_wide(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "computes_directly", lambda dtype, device: True)
    shape = Shape(widths=(16, 32, 32), height=30, width=1)
    vae, pixels = network(shape, dtype), shape.pixels(dtype)
    truth = true_encode(vae, pixels)
    assert rms(direct(vae).encode(pixels).double() - truth) <= 0.03 * rms(truth)


@pytest.mark.parametrize("quant", [False, True])
def test_same_bits_for_one_thread_and_two(quant: bool) -> None:
    shape = Shape(widths=(16, 32, 32), post_quant=quant, height=12, width=10)
    vae, pixels, made = network(shape), shape.pixels(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append(direct(vae, block_values=4000).encode(pixels))
    assert torch.equal(*made)


@settings(max_examples=40)
@given(data=st.data(), blocks=st.sampled_from([300, 3000]), more=MORE)
def test_same_bits_for_any_plan_at_all(data: st.DataObject, blocks: int, more: tuple[int, int]) -> None:
    """Any choice of places for any map: so a halved map takes its input's place at either end of the arena."""
    shape = Shape(widths=(16, 32, 32), height=5, width=4)
    vae, pixels = network(shape), shape.pixels(more=more)
    engine = direct(vae, block_values=blocks)
    planner, spill = engine._planner_for(*pixels.shape[2:], 1)
    (state,), layers = planner._states[0], []
    for index in range(len(engine.network.layers)):
        choices = planner._choices(index, state)
        layer, state = choices[data.draw(st.integers(0, len(choices) - 1))]
        layers.append(layer)
    plan = planner._make(tuple(layers), fastest=tuple(layers), limit=None, source="", spill_dir=None)
    moments = torch.empty(8, 5 + more[0] // 4, 4 + more[1] // 4)
    room, kernels = ArenaPool(pixels.device), engine._kernels(pixels.device)
    runner = Runner(engine.network, plan, kernels, room, spill, pixels.device, pixels.dtype, int)
    with torch.no_grad():
        runner.run(pixels[0], moments)
    runner.close()
    assert torch.equal(moments, engine.encode(pixels)[0])


def test_the_walk_down_the_ladder() -> None:
    """From the fastest plan to the smallest: nothing costs less time with less memory, and everything is tried."""
    shape = Shape(widths=(16, 32, 32), layers_per_block=2, height=24, width=20)
    vae, pixels = network(shape), shape.pixels()
    size = (*pixels.shape[2:], 1)
    free = direct(vae, block_values=3000)
    truth = free.encode(pixels)
    low, high = free.smallest_limit(*size), free.plan(*size).peak_bytes
    places, before = set(), 0.0
    for step in range(40, -1, -1):
        engine = direct(vae, block_values=3000, memory_limit=low + (high - low) * step // 40)
        plan = engine.plan(*size)
        assert plan.seconds >= before * 0.9999
        before = plan.seconds
        places |= {place for rung in plan.rungs for place in rung.split("/")}
    assert places == {"memory", "spill", "recompute"}
    assert torch.equal(engine.encode(pixels), truth)


def test_a_cancelled_encode_leaves_nothing_behind() -> None:
    shape = Shape(batch=2)
    vae, pixels = network(shape), shape.pixels()
    size = (*pixels.shape[2:], 2)
    limit = direct(vae, block_values=500).smallest_limit(*size)
    engine = direct(vae, block_values=500, memory_limit=limit)
    expected, total = engine.encode(pixels), engine.plan(*size).total_blocks
    seen: list[tuple[int, int]] = []
    with nothing_left_behind(), pytest.raises(DecodeCancelled, match="encode: cancelled after"):
        engine.encode(pixels, progress=lambda *at: seen.append(at), cancel=lambda: len(seen) > total // 2)
    assert seen[0] == (0, total)
    assert torch.equal(engine.encode(pixels), expected), "the engine is as good as new"


def test_a_limit_below_the_smallest_is_refused_and_the_smallest_named_works() -> None:
    shape = Shape(batch=2)
    vae, pixels = network(shape), shape.pixels()
    smallest = direct(vae).smallest_limit(*pixels.shape[2:], 2)
    with pytest.raises(MemoryLimitError, match=f"encoding 2 x 20x24 needs at least {smallest} bytes"):
        direct(vae, memory_limit=smallest - 1).encode(pixels)
    assert direct(vae, memory_limit=smallest).encode(pixels).shape == (2, 8, 6, 5)


def test_overflow_in_half_precision_is_encoded_again_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "computes_directly", lambda dtype, device: True)
    shape = Shape(height=3, width=3)
    vae = network(shape)
    with torch.no_grad():  # too large for half precision; the norm behind it scales it back
        for part in (vae.encoder.conv_in.weight, vae.encoder.conv_in.bias):
            part.mul_(1e5)
    torch.nn.Module.to(vae, torch.float16)
    if not torch.isfinite(vae.encoder.conv_in.weight).all():
        vae.encoder.conv_in.weight.clamp_(-6e4, 6e4)
        vae.encoder.conv_in.bias.clamp_(-6e4, 6e4)
    pixels = shape.pixels(torch.float16)
    with pytest.warns(PrecisionRetryWarning, match="encode: .*encoding again in float32"):
        moments = direct(vae).encode(pixels)
    truth = true_encode(vae, pixels)
    assert rms(moments.double() - truth) <= 0.02 * rms(truth)


@pytest.mark.parametrize("where", ["pixels", "weights", "output", "quant_conv"])
def test_non_finite_float32_is_an_error_never_latents(where: str) -> None:
    shape = Shape(post_quant=True)
    vae, pixels = network(shape), shape.pixels()
    with torch.no_grad():
        if where == "pixels":
            pixels[0, 1, 2, 3] = torch.nan
        elif where == "weights":
            vae.encoder.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = torch.inf
        elif where == "output":
            vae.encoder.conv_out.bias[1] = torch.nan
        else:
            vae.quant_conv.bias[1] = torch.inf
    with pytest.raises(NonFiniteOutputError, match="images" if where == "pixels" else "encode: .*float32"):
        direct(vae).encode(pixels)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda vae: setattr(vae.encoder.conv_in, "padding_mode", "circular"), "encoder.conv_in"),
        (lambda vae: setattr(vae.encoder.down_blocks[0].downsamplers[0], "padding", 1), "downsamplers.0"),
        (lambda vae: setattr(vae.encoder.down_blocks[0].downsamplers[0].conv, "stride", (1, 1)), "downsamplers.0"),
        (lambda vae: setattr(vae.encoder, "conv_act", torch.nn.ReLU()), "encoder.conv_act"),
        (lambda vae: setattr(vae.encoder.mid_block.attentions[0], "heads", 2), "attentions.0"),
        (
            lambda vae: vae.encoder.conv_out.register_forward_hook(lambda *_: None),
            "encoder.conv_out has a forward hook",
        ),
        (lambda vae: setattr(vae, "_encode", lambda x: x), "_encode has been replaced"),
        (lambda vae: setattr(vae, "encoder", None), "an encoder"),
    ],
)
def test_what_it_cannot_read_is_refused_by_name(change: object, named: str) -> None:
    vae = network(Shape())
    change(vae)  # type: ignore[operator]
    with pytest.raises(InvalidOptionError, match=named):
        direct(vae)


def test_wrong_input_is_refused() -> None:
    engine = direct(network(Shape()))
    for pixels in (
        torch.zeros(1, 4, 8, 8),
        torch.zeros(3, 8, 8),
        torch.zeros(1, 3, 3, 8),
        torch.zeros(1, 3, 8, 8).half(),
    ):
        with pytest.raises(InvalidOptionError, match="images: got"):
            engine.encode(pixels)
    with pytest.raises(InvalidOptionError, match="sizes from 4 on"):
        engine.plan(3, 8)


FLUX = Shape(widths=(128, 256, 512, 512), groups=32, layers_per_block=2, latent_channels=16, height=20, width=20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_flux_error_is_no_larger_than_that_of_diffusers(dtype: str) -> None:
    torch.set_num_threads(2)
    vae, pixels = network(FLUX, getattr(torch, dtype)), FLUX.pixels(getattr(torch, dtype))
    truth = true_encode(vae, pixels)
    with torch.no_grad():
        theirs = rms(vae.encode(pixels).latent_dist.parameters.double() - truth)
    ours = rms(direct(vae).encode(pixels).double() - truth)
    print(f"{dtype}: ours {ours:.3e}, diffusers {theirs:.3e}, ratio {ours / theirs:.3f}")
    assert ours <= 1.02 * theirs
    if dtype == "float32":
        winograd = rms(ExactEncoder(vae, kernels="winograd").encode(pixels).double() - truth)
        print(f"winograd ratio {winograd / theirs:.3f}")
        assert winograd <= WINOGRAD_ENCODER_RATIO.bound * theirs
