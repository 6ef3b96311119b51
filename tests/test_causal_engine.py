"""The exact engine computes one frame of networks that are written for video: Qwen-Image's and Wan 2.1's VAE.

The oracle is diffusers in float64, which computes the frame in three dimensions. The full widths are covered by
``-m slow`` only.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_models import needs_vector_code, one_thread, rms
from family_models import qwen_image_vae, wan_vae
from fluxvae import InvalidOptionError, MemoryLimitError, NonFiniteOutputError
from fluxvae.engine.exact import ExactDecoder, ExactEncoder
from fluxvae.engine.kernels.choose import make_kernels
from fluxvae.engine.memory.pool import ArenaPool
from fluxvae.engine.runner import Runner
from fluxvae.engine.statistics import PixelScale
from fluxvae.verify.oracle import level_difference
from fluxvae.verify.tolerances import (
    CAUSAL_ERROR_RATIO,
    ENGINE_FLOAT64_ERROR,
    WINOGRAD_CHANGED,
    WINOGRAD_ENCODER_RATIO,
    WINOGRAD_LEVELS,
    WINOGRAD_SILU,
)

pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["one_thread"]  # a fixture, found by its name

KERNELS = ["torch", pytest.param("winograd", marks=needs_vector_code)]
every_kernel = pytest.mark.parametrize("kernels", KERNELS)
BOTH = pytest.mark.parametrize("make", [qwen_image_vae, wan_vae], ids=["Qwen-Image", "Wan"])


@dataclass(frozen=True)
class Frame:
    """A network and the size of one frame, in latents."""

    wan: bool = False
    channels: int = 3
    base_dim: int = 8
    dim_mult: tuple[int, ...] = (1, 2, 2)
    num_res_blocks: int = 1
    height: int = 6
    width: int = 5
    batch: int = 1
    seed: int = 0

    def vae(self, dtype: torch.dtype = torch.float32) -> Any:
        make = wan_vae if self.wan else qwen_image_vae
        return make(
            self.seed, channels=self.channels, base_dim=self.base_dim, dim_mult=self.dim_mult,
            num_res_blocks=self.num_res_blocks, dtype=dtype,
        )  # fmt: skip

    def latents(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        shape = (self.batch, 16, self.height, self.width)
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + 1)).to(dtype)

    def pixels(self, dtype: torch.dtype = torch.float32, more: tuple[int, int] = (0, 0)) -> torch.Tensor:
        scale = 2 ** (len(self.dim_mult) - 1)
        size = (scale * self.height + more[0], scale * self.width + more[1])
        generator = torch.Generator().manual_seed(self.seed + 2)
        return (2 * torch.rand((self.batch, self.channels, *size), generator=generator) - 1).to(dtype)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    levels = draw(st.integers(2, 4))
    return Frame(
        wan=draw(st.booleans()),
        channels=draw(st.sampled_from([3, 4])),
        base_dim=draw(st.sampled_from([2, 6, 8])),
        dim_mult=tuple(draw(st.sampled_from([1, 2, 4])) for _ in range(levels)),
        num_res_blocks=draw(st.integers(1, 2)),
        height=draw(st.integers(1, 7)),
        width=draw(st.integers(1, 7)),
        batch=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 99)),
    )


def theirs(vae: Any, raw: torch.Tensor) -> torch.Tensor:
    """diffusers' decode of latents (B, C, lh, lw) as one frame."""
    with torch.no_grad():
        return vae.decode(raw.unsqueeze(2)).sample.squeeze(2)


def their_moments(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.encode(pixels.unsqueeze(2)).latent_dist.parameters.squeeze(2)


def in_float64(vae: Any) -> Any:
    """A copy that computes all of it in float64: diffusers' enlargement would go by way of float32."""
    vae = torch.nn.Module.to(copy.deepcopy(vae), torch.float64)
    for module in vae.modules():
        if type(module).__name__.endswith("Resample") and module.mode.startswith("upsample"):
            module.resample[0] = torch.nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
    return vae


# -- the function --------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(frame=frames(), blocks=st.sampled_from([200, 100_000]))
def test_in_float64_a_decode_is_the_same_function(frame: Frame, blocks: int) -> None:
    vae, raw = frame.vae(torch.float64), frame.latents(torch.float64)
    image = ExactDecoder(vae, block_values=blocks).decode(raw)
    assert rms(image - theirs(in_float64(vae), raw)) <= ENGINE_FLOAT64_ERROR.bound
    assert image.abs().max() <= 1, "these decoders clamp what they make"


@settings(max_examples=12)
@given(frame=frames(), blocks=st.sampled_from([200, 100_000]), more=st.tuples(st.integers(0, 7), st.integers(0, 7)))
def test_in_float64_an_encode_is_the_same_function(frame: Frame, blocks: int, more: tuple[int, int]) -> None:
    vae, pixels = frame.vae(torch.float64), frame.pixels(torch.float64, more)
    found, expected = ExactEncoder(vae, block_values=blocks).encode(pixels), their_moments(vae, pixels)
    assert float((found - expected).abs().max()) <= ENGINE_FLOAT64_ERROR.bound * float(expected.abs().max())


def test_pixels_are_clamped_as_diffusers_clamps_them() -> None:
    frame = Frame()
    vae, raw = frame.vae(torch.float64), frame.latents(torch.float64)
    vae.decoder.conv_out.weight.mul_(10)
    image = ExactDecoder(vae).decode(raw)
    assert torch.equal(image.abs() == 1, theirs(in_float64(vae), raw).abs() == 1)
    assert 0.1 < float((image.abs() == 1).double().mean()) < 0.9


def test_it_is_the_first_frame_of_a_video() -> None:
    """A later frame changes nothing in the first: that is what causal means, and why one frame is an image."""
    frame = Frame()
    vae, raw = frame.vae(torch.float64), frame.latents(torch.float64)
    video = torch.stack([raw, torch.randn_like(raw)], dim=2)
    first = in_float64(vae).decode(video).sample[:, :, 0]
    assert rms(ExactDecoder(vae).decode(raw) - first) <= ENGINE_FLOAT64_ERROR.bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@BOTH
def test_error_is_no_larger_than_that_of_diffusers(make: Any, dtype: str) -> None:
    ours, reference = [], []
    for seed in range(3):
        vae = make(seed, base_dim=16, dtype=getattr(torch, dtype))
        raw = torch.randn(1, 16, 9, 7, generator=torch.Generator().manual_seed(seed)).to(vae.dtype)
        truth = theirs(in_float64(vae), raw.double())
        ours.append(rms(ExactDecoder(vae, kernels="torch").decode(raw).double() - truth))
        reference.append(rms(theirs(vae, raw).double() - truth))
    assert sum(ours) <= CAUSAL_ERROR_RATIO[dtype].bound * sum(reference)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@BOTH
def test_the_encoders_error_is_no_larger_than_that_of_diffusers(make: Any, dtype: str) -> None:
    ours, reference = [], []
    for seed in range(3):
        vae = make(seed, base_dim=16, dtype=getattr(torch, dtype))
        pixels = 2 * torch.rand(1, 3, 72, 56, generator=torch.Generator().manual_seed(seed)) - 1
        pixels = pixels.to(vae.dtype)
        truth = their_moments(in_float64(vae), pixels.double())
        ours.append(rms(ExactEncoder(vae, kernels="torch").encode(pixels).double() - truth))
        reference.append(rms(their_moments(vae, pixels).double() - truth))
    assert sum(ours) <= CAUSAL_ERROR_RATIO[dtype].bound * sum(reference)


@needs_vector_code
def test_winograd_changes_hardly_a_byte_and_hardly_the_latents() -> None:
    vae, raw = qwen_image_vae(0, base_dim=16), Frame(height=20, width=16).latents()
    assert_like(ExactDecoder(vae, kernels="winograd").decode(raw), theirs(in_float64(vae), raw.double()))
    pixels = 2 * torch.rand(1, 3, 160, 136, generator=torch.Generator().manual_seed(0)) - 1
    truth = their_moments(in_float64(vae), pixels.double())
    found = ExactEncoder(vae, kernels="winograd").encode(pixels)
    assert rms(found - truth) <= WINOGRAD_ENCODER_RATIO.bound * rms(their_moments(vae, pixels) - truth)


def assert_like(image: torch.Tensor, truth: torch.Tensor) -> None:
    """The bytes of two pictures are the same but for a few, which differ by one."""
    bytes_of = [((one.double() / 2 + 0.5) * 255).round().to(torch.uint8).numpy() for one in (image, truth)]
    found = level_difference(*bytes_of)
    assert found.largest <= WINOGRAD_LEVELS.bound
    assert found.changed <= WINOGRAD_CHANGED.bound, found


# -- the same bits -------------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("encode", [False, True], ids=["decode", "encode"])
def test_same_bits_for_any_limit_batch_and_number_of_threads(encode: bool, kernels: str) -> None:
    frame = Frame(base_dim=16, height=34, width=33, batch=2)
    vae, options = frame.vae(), {"kernels": kernels, "block_values": 20_000}
    given = frame.pixels() if encode else frame.latents()
    size = tuple(given.shape[2:])

    def make(**more: Any) -> Any:
        return (ExactEncoder if encode else ExactDecoder)(vae, **options, **more)

    def compute(engine: Any, given: torch.Tensor) -> torch.Tensor:
        return engine.encode(given) if encode else engine.decode(given)

    free = make()
    whole = compute(free, given)
    low, high = free.smallest_limit(*size, 2), free.plan(*size, 2).peak_bytes
    seen = {free.plan(*size, 2).rungs}
    for step in range(4):
        limit = low + (high - low) * step // 4
        tight = make(memory_limit=limit)
        seen.add(tight.plan(*size, 2).rungs)
        assert torch.equal(compute(tight, given), whole), limit
    assert len(seen) > 1
    with pytest.raises(MemoryLimitError, match=f"at least {low} bytes"):
        compute(make(memory_limit=low - 1), given)
    assert torch.equal(compute(free, given[1:])[0], whole[1])
    if kernels == "winograd":  # MKL picks another product of few rows for direct ones (docs/engine.md)
        torch.set_num_threads(2)  # `one_thread` gives back what was there
        assert torch.equal(compute(free, given), whole)


@every_kernel
@settings(max_examples=12)
@given(data=st.data(), blocks=st.sampled_from([300, 3000]))
def test_same_bits_for_any_plan_at_all(kernels: str, data: st.DataObject, blocks: int) -> None:
    """Any choice of places for any map: resnets in one sweep and in two, behind an upsample that is stored or not."""
    frame = Frame(height=5, width=4, base_dim=16)
    vae, raw = frame.vae(), frame.latents()
    engine = ExactDecoder(vae, kernels=kernels, block_values=blocks)
    planner, spill = engine._planner_for(5, 4, 1)
    (state,), layers = planner._states[0], []
    for index in range(len(engine.network.layers)):
        choices = planner._choices(index, state)
        layer, state = choices[data.draw(st.one_of(st.integers(0, len(choices) - 1), st.just(len(choices) - 1)))]
        layers.append(layer)
    plan = planner._make(tuple(layers), fastest=tuple(layers), limit=None, source="", spill_dir=None)
    image = torch.empty(3, 20, 16)
    chosen = engine._kernels(raw.device)
    room = ArenaPool(raw.device)
    runner = Runner(engine.network, plan, chosen, room, spill, raw.device, raw.dtype, lambda: None)
    with torch.no_grad(), chosen.session():
        runner.run(raw[0], image)
    runner.close()
    assert torch.equal(image.clamp(-1, 1), engine.decode(raw)[0])


def test_a_map_that_is_not_stored_costs_nothing() -> None:
    """No norm waits for a whole map, so even without a limit whole levels are computed in one pass."""
    frame = Frame(height=34, width=33)
    plan = ExactDecoder(frame.vae(), block_values=3000).plan(34, 33)
    assert plan.work_ratio == 1
    assert "recompute/recompute" in plan.rungs, "a resnet that the next layer's sweep computes"


# -- the norm ------------------------------------------------------------------------------------------------------


@every_kernel
@given(pixels=st.integers(1, 40), channels=st.sampled_from([16, 48, 96, 384, 5]), data=st.data())
@settings(max_examples=20)
def test_the_norm_is_normalize(kernels: str, pixels: int, channels: int, data: st.DataObject) -> None:
    """Pixels of zeros included, which are divided by the least length and not by zero."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows = torch.randn(1, pixels, channels, generator=generator)
    rows[:, data.draw(st.integers(0, pixels - 1))] = 0
    scale, shift = torch.randn(2, channels, generator=generator)
    expected = torch.nn.functional.normalize(rows.double(), dim=-1) * scale + shift
    out, work = torch.empty_like(rows), torch.empty(8 * rows.numel(), dtype=torch.uint8)
    kernel_set = make_kernels(kernels, torch.device("cpu"))
    for silu in (False, True):
        kernel_set.prologue(rows, PixelScale(scale, shift, 1e-12), silu, out, work)
        wanted = torch.nn.functional.silu(expected) if silu else expected
        room = WINOGRAD_SILU.bound * 2**-22 * (1 + wanted.abs())
        assert bool(((out - wanted).abs() <= room).all())
    assert torch.isfinite(out).all()


@every_kernel
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_an_error_never_a_picture(value: float, kernels: str) -> None:
    vae = Frame(base_dim=16).vae()
    vae.decoder.mid_block.resnets[0].conv1.bias[3] = value
    with pytest.raises(NonFiniteOutputError, match="conv_out"):
        ExactDecoder(vae, kernels=kernels).decode(Frame().latents())


# -- what is refused -----------------------------------------------------------------------------------------------


def _wan_22() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1, is_residual=True,
        temperal_downsample=[False, True], in_channels=12, out_channels=12, patch_size=2,
    ).eval()  # fmt: skip


def _changed(change: Any) -> Any:
    vae = Frame().vae()
    change(vae)
    return vae


def _set(vae: Any, path: str, name: str, value: Any) -> None:
    setattr(vae.get_submodule(path), name, value)


@pytest.mark.parametrize(
    ("vae", "named"),
    [
        (_wan_22, r"decoder\.up_blocks\.0 \(WanResidualUpBlock\)"),
        (lambda: _changed(lambda vae: _set(vae, "decoder", "nonlinearity", torch.nn.ReLU())), "decoder.nonlinearity"),
        (lambda: _changed(lambda vae: _set(vae, "decoder.conv_in", "_padding", (0,) * 6)), "decoder.conv_in"),
        (
            lambda: _changed(lambda vae: _set(vae, "decoder.up_blocks.0.upsamplers.0", "mode", "none")),
            "decoder.up_blocks.0.upsamplers.0",
        ),
        (
            lambda: _changed(lambda vae: _set(vae, "decoder.mid_block.resnets.0.norm1", "channel_first", False)),
            "decoder.mid_block.resnets.0.norm1",
        ),
    ],
    ids=["Wan 2.2", "activation", "padding", "mode", "norm"],
)
def test_what_it_cannot_read_is_refused_by_name(vae: Any, named: str) -> None:
    with pytest.raises(InvalidOptionError, match=named):
        ExactDecoder(vae())


def test_a_video_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match=r"raw: got shape \(1, 16, 2, 6, 5\)"):
        ExactDecoder(Frame().vae()).decode(torch.zeros(1, 16, 2, 6, 5))


# -- full widths ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_vector_code
def test_full_widths() -> None:
    """Errors and bits at 160 pixels, where float64 is still affordable."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage().eval().requires_grad_(False)
    raw = torch.randn(1, 16, 20, 20, generator=torch.Generator().manual_seed(1))
    truth = theirs(in_float64(vae), raw.double())
    reference = rms(theirs(vae, raw) - truth)
    assert rms(ExactDecoder(vae, kernels="torch").decode(raw) - truth) <= reference
    winograd = ExactDecoder(vae, kernels="winograd")
    image = winograd.decode(raw)
    assert_like(image, truth)
    tight = ExactDecoder(vae, kernels="winograd", memory_limit=winograd.smallest_limit(20, 20))
    assert torch.equal(tight.decode(raw), image)
    pixels = 2 * torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(2)) - 1
    truth = their_moments(in_float64(vae), pixels.double())
    found = rms(ExactEncoder(vae, kernels="winograd").encode(pixels) - truth)
    assert found <= WINOGRAD_ENCODER_RATIO.bound * rms(their_moments(vae, pixels) - truth)
