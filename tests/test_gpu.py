"""What only an NVIDIA GPU can show. Run `pytest -m gpu` on a machine that has one; elsewhere these tests are skipped.

They use FLUX's widths where those matter (attention's head of 512, cuDNN's choices), but few pixels: benchmarks/gpu.py
is what measures times.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from engine_models import Shape, rms, true_decode
from fluxvae.engine.exact import ExactDecoder, OutOfMemoryWarning, PrecisionRetryWarning
from fluxvae.errors import NonFiniteOutputError, UnavailableError
from fluxvae.pictures import postprocess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0),
        reason="needs an NVIDIA GPU of compute capability 8.0 or later",
    ),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FLUX = Shape(widths=(128, 256, 512, 512), groups=32, layers_per_block=2, latent_channels=16, height=40, width=36)
LEVELS = 6
"""Limits tried between the smallest and the unlimited plan's peak."""


def on_gpu(shape: Shape, dtype: torch.dtype) -> tuple[AutoencoderKL, torch.Tensor]:
    vae = torch.nn.Module.to(shape.vae(dtype), "cuda", memory_format=torch.channels_last)
    return vae, shape.latents(dtype).cuda()


def test_every_kernel_is_used() -> None:
    vae, _ = on_gpu(FLUX, torch.bfloat16)
    engine = ExactDecoder(vae)
    engine.prepare()
    plan = engine.plan(40, 36)
    assert (plan.kernels, plan.kernels_note) == ("cuda", "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", ["cuda", "torch"])
def test_error_is_no_larger_than_that_of_diffusers(dtype: torch.dtype, kernels: str) -> None:
    """diffusers' own decode without TF32, which ours never uses."""
    vae, raw = on_gpu(FLUX, dtype)
    truth = true_decode(vae, raw)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        theirs = rms(vae.decode(raw).sample.double() - truth)
    ours = rms(ExactDecoder(vae, kernels=kernels).decode(raw).double() - truth)
    print(f"{dtype} {kernels}: ours {ours:.3e}, diffusers {theirs:.3e}")
    assert ours <= theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_values", [None, 1 << 20])
def test_same_bits_for_any_limit_and_batch_and_no_peak_above_it(dtype: torch.dtype, block_values: int | None) -> None:
    """From keeping everything to spilling to host memory."""
    vae, one = on_gpu(FLUX, dtype)
    raw = torch.cat([one, one.flip(2)])
    free = ExactDecoder(vae, block_values=block_values)
    image = free.decode(raw)
    low, high = free.smallest_limit(40, 36, 2), free.plan(40, 36, 2).peak_bytes
    rungs = set()
    for step in range(LEVELS + 1):
        tight = ExactDecoder(vae, block_values=block_values, memory_limit=low + (high - low) * step // LEVELS)
        rungs |= {place for rung in tight.plan(40, 36, 2).rungs for place in rung.split("/")}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        again = tight.decode(raw)
        assert torch.cuda.max_memory_allocated() - before <= tight.memory_limit
        assert torch.equal(again, image), tight.plan(40, 36, 2)
        del again
    assert torch.equal(free.decode(raw[1:])[0], image[1])
    if block_values is not None:
        assert "spill" in rungs


def test_the_process_keeps_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are PyTorch's defaults during a decode, and what the process has set before and after it."""
    vae, raw = on_gpu(Shape(), torch.float32)
    cudnn, seen = torch.backends.cudnn, set()
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(cudnn, name, True)
    ExactDecoder(vae).decode(raw, progress=lambda *_: seen.add((cudnn.benchmark, cudnn.deterministic)))
    assert seen == {(False, False)}
    assert (cudnn.benchmark, cudnn.deterministic) == (True, True)


def test_autocast_changes_no_bit() -> None:
    vae, raw = on_gpu(Shape(), torch.float32)
    for kernels in ("cuda", "torch"):
        image = ExactDecoder(vae, kernels=kernels).decode(raw)
        with torch.autocast("cuda", torch.bfloat16):
            again = ExactDecoder(vae, kernels=kernels).decode(raw)
        assert torch.equal(again, image)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_cudnn_the_image_is_right_and_the_peak_as_planned(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, raw = on_gpu(FLUX, dtype)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    engine = ExactDecoder(vae)
    plan = engine.plan(40, 36)
    assert plan.kernels == "torch"
    assert "cuDNN is switched off" in plan.kernels_note
    engine.memory_limit = plan.peak_bytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    image = engine.decode(raw)
    assert torch.cuda.max_memory_allocated() - before <= plan.peak_bytes
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    truth = true_decode(vae, raw)
    assert rms(image.double() - truth) <= 2 * rms(ExactDecoder(vae, kernels="torch").decode(raw).double() - truth)


def test_nan_and_overflow_are_never_a_picture() -> None:
    vae, raw = on_gpu(Shape(widths=(32, 32)), torch.float16)
    with torch.no_grad():
        vae.decoder.up_blocks[0].upsamplers[0].conv.weight.mul_(2e4)
    truth = true_decode(vae, raw)
    with pytest.warns(PrecisionRetryWarning):
        image = ExactDecoder(vae).decode(raw)
    assert rms(image.double() - truth) <= 0.01 * rms(truth)
    with torch.no_grad():
        vae.decoder.conv_in.weight[0, 0, 0, 0] = torch.nan
    with warnings.catch_warnings(), pytest.raises(NonFiniteOutputError):  # noqa: PT012
        warnings.simplefilter("ignore")
        ExactDecoder(vae).decode(raw)


def test_a_full_card_is_a_smaller_plan() -> None:
    """PyTorch's own cap on this process stands for other processes."""
    shape = replace(FLUX, height=80, width=72)  # so large that 20 MB, which PyTorch may round up, decide nothing
    vae, raw = on_gpu(shape, torch.bfloat16)
    engine = ExactDecoder(vae, block_values=1 << 20)
    image, first = engine.decode(raw), engine.plan(80, 72)
    engine.memory_limit = first.peak_bytes * 3 // 4
    second, least = engine.plan(80, 72), engine.smallest_limit(80, 72)
    enough = second.arena_bytes + max(step.overhead for step in second.steps)
    assert enough + (40 << 20) < first.arena_bytes
    engine.memory_limit = first.peak_bytes
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        room = torch.cuda.memory_reserved() + (enough + first.arena_bytes) // 2
        torch.cuda.set_per_process_memory_fraction(room / total)
        with pytest.warns(OutOfMemoryWarning):
            assert torch.equal(engine.decode(raw), image)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + least // 8) / total)
        words = r"ran out with the smallest plan .* \(the last error was OutOfMemoryError: "
        with warnings.catch_warnings(), pytest.raises(UnavailableError, match=words):  # noqa: PT012
            warnings.simplefilter("ignore")
            engine.decode(raw)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_arena_goes_back_to_the_card() -> None:
    """Also where the caller keeps the image."""
    vae, raw = on_gpu(FLUX, torch.bfloat16)
    engine = ExactDecoder(vae)
    engine.decode(raw)
    torch.cuda.empty_cache()
    before, arena = torch.cuda.memory_reserved(), engine.plan(40, 36).arena_bytes
    kept = [engine.decode(raw) for _ in range(3)]
    assert torch.cuda.memory_reserved() - before < arena
    del kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_those_of_the_same_values_on_a_cpu(dtype: torch.dtype) -> None:
    image = torch.randn(2, 3, 65, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert np.array_equal(postprocess(image.cuda(), "uint8"), postprocess(image, "uint8"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_has_the_same_bits_and_holds_what_its_plan_says(dtype: torch.dtype) -> None:
    vae, one = on_gpu(FLUX, dtype)
    raws = [one, one.flip(2), torch.cat([one.flip(3), one])]
    expected = [ExactDecoder(vae).decode(raw) for raw in raws]
    decoder = ExactDecoder(vae, cuda_graphs=True)
    decoder.prepare()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        for raw, image in zip(raws, expected, strict=True):
            assert torch.equal(decoder.decode(raw), image)
    assert len(decoder._graphs._graphs) == 1
    torch.cuda.empty_cache()
    held = decoder.plan(40, 36).graph_bytes
    assert held
    assert torch.cuda.memory_reserved() - before <= held
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1.5)
    assert torch.equal(decoder.decode(one), ExactDecoder(vae).decode(one)), "weights are read anew"
    with pytest.raises(NonFiniteOutputError):
        decoder.decode(one * torch.nan)
    assert torch.equal(decoder.decode(one), ExactDecoder(vae).decode(one))


def test_a_graph_is_recorded_beside_other_threads() -> None:
    """They allocate, compute and wait for the card meanwhile, which a recording in another mode would not survive."""
    vae, raw = on_gpu(FLUX, torch.bfloat16)
    expected, stop, failed = ExactDecoder(vae).decode(raw), threading.Event(), []

    def busy() -> None:
        try:
            while not stop.is_set():
                float(torch.ones(1 << 20, device="cuda").sum())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(3):
            decoder = ExactDecoder(vae, cuda_graphs=True)
            assert torch.equal(decoder.decode(raw), expected)
            assert torch.equal(decoder.decode(raw), expected)
    finally:
        stop.set()
        thread.join()
    assert not failed
