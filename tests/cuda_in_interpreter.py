"""Tests of the CUDA kernels in the Triton language's interpreter, on the CPU. `test_cuda_kernels` runs them in a child.

The interpreter replaces the language for a whole process, and must be asked for before anything imports the language.
That is why these tests are not collected beside the others. F.conv2d stands in for cuDNN here. When it rounds to
bfloat16 the interpreter drops the low bits, where the hardware rounds to nearest, so bfloat16 is held to twice the
tolerance.
"""

from __future__ import annotations

import copy
import os
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_models import Shape, rms, true_decode
from family_models import qwen_image_vae
from fluxvae.engine import planned
from fluxvae.engine.exact import ExactDecoder
from fluxvae.engine.kernels import Refill
from fluxvae.engine.kernels.cuda import attention, folding, passes, self_test
from fluxvae.engine.kernels.cuda import kernels as kernels_module
from fluxvae.engine.kernels.cuda.kernels import CudaKernels
from fluxvae.engine.kernels.cuda.moments import KEPT_BLOCKS, CardMoments
from fluxvae.engine.kernels.direct import subpixel
from fluxvae.engine.kernels.direct.kernels import TorchKernels
from fluxvae.engine.memory.stores import MemoryMap
from fluxvae.engine.records import Norm
from fluxvae.engine.statistics import Affine, FiniteChecks, Moments, NonFiniteMap, Partial, PixelScale
from fluxvae.engine.sweep.windows import StoredRows
from fluxvae.errors import NonFiniteOutputError
from fluxvae.verify.tolerances import CUDA_ATTENTION, CUDA_PASS, CUDA_STATISTICS, ENGINE_ERROR_RATIO

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/test_cuda_kernels.py"

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")

dtypes = st.sampled_from(DTYPES)
maps = st.tuples(
    st.one_of(st.just(1), st.integers(1, 12)),
    st.integers(1, 40),
    st.one_of(st.sampled_from([16, 96, 128, 130, 256]), st.integers(1, 50)),
)
"""(rows, width, channels): also single rows and columns, and channels that are no power of two or no multiple of 8."""


@pytest.fixture(autouse=True)
def cuda_kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make_kernels` refuses them here, so the engine gets them in its place; small heads go to our attention too."""
    monkeypatch.setattr(planned, "make_kernels", lambda name, device: CudaKernels(device))
    monkeypatch.setattr(attention, "PYTORCH_HEAD", 0)


engine = partial(ExactDecoder, block_values=3000)


def draw(seed: int, dtype: torch.dtype, *shape: int, shift: float = 0.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift).to(dtype)


def units(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error in units of the last place of the larger of 1 and the value itself."""
    scale = torch.finfo(found.dtype).eps * expected.abs().clamp(min=1)
    return float(((found.double() - expected).abs() / scale).max()) / (2 if found.dtype == torch.bfloat16 else 1)


def gathering(channels: int, blocks: int, pixels: int, phases: int = 1) -> CardMoments:
    """Statistics whose scratch holds NaN, which would show if it were read before it is written."""
    room = torch.full((CardMoments.scratch_bytes(channels, blocks, pixels, phases),), 255, dtype=torch.uint8)
    return CardMoments(channels, blocks, pixels, phases, room)


def assert_moments(found: CardMoments, *blocks: torch.Tensor) -> None:
    assert found.counts == [block.numel() // block.shape[-1] for block in blocks]
    for block, mean, m2 in zip(blocks, *found.stacked(), strict=True):
        flat = block.double().view(-1, block.shape[-1])
        true_mean = flat.mean(0)
        true_m2 = (flat - true_mean).square().sum(0)
        largest = flat.abs().amax(0).clamp(min=1)
        assert float(((mean - true_mean).abs() / largest).max()) <= CUDA_STATISTICS.bound
        assert float(((m2 - true_m2).abs() / (true_m2 + 1e-3 * len(flat))).max()) <= CUDA_STATISTICS.bound


@settings(max_examples=15)
@given(
    shape=maps,
    dtype=dtypes,
    by_pixel=st.booleans(),
    silu=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_prologue(
    shape: tuple[int, int, int], dtype: torch.dtype, by_pixel: bool, silu: bool, in_place: bool, seed: int
) -> None:
    """``by_pixel``: through a norm of each pixel, one of which is zero."""
    rows = draw(seed, dtype, *shape)
    rows[0, 0] = 0
    scale, shift = draw(seed + 1, torch.float32, 2, shape[2])
    expected = (F.normalize(rows.double(), dim=-1) if by_pixel else rows.double()) * scale + shift
    expected = F.silu(expected) if silu else expected
    out = rows if in_place else torch.empty_like(rows)
    passes.prologue(rows, scale, shift, silu, out, 1e-12 if by_pixel else None)
    assert units(out, expected) <= CUDA_PASS.bound


def test_prologue_of_large_values_is_what_silu_is() -> None:
    rows = torch.tensor([-1e30, -200.0, -90.0, 90.0, 200.0, 1e30])[:, None]
    out = torch.empty_like(rows)
    passes.prologue(rows, torch.ones(1), torch.zeros(1), True, out)
    assert torch.equal(out, F.silu(rows))


@settings(max_examples=15)
@given(
    shape=maps,
    dtype=dtypes,
    residual=st.sampled_from(["none", "own", "in place"]),
    factor=st.sampled_from([1.0, 2.0**0.5]),
    shift=st.sampled_from([0.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_finish(
    shape: tuple[int, int, int], dtype: torch.dtype, residual: str, factor: float, shift: float, seed: int
) -> None:
    result, bias = draw(seed, dtype, *shape, shift=shift), draw(seed + 1, dtype, shape[2])
    added = None if residual == "none" else draw(seed + 2, dtype, *shape)
    expected = (result.double() + bias.double() + (0 if added is None else added.double())) / factor
    out = added if added is not None and residual == "in place" else torch.empty_like(result)
    pixels = shape[0] * shape[1]
    found = gathering(shape[2], 1, pixels)
    passes.finish(result, bias, added, factor, out, found.place())
    found.placed(pixels)
    assert units(out, expected) <= CUDA_PASS.bound
    assert_moments(found, out)


def test_statistics_of_many_programs() -> None:
    """More than one round of `_combine`, the last program's part not full."""
    result = draw(0, torch.float32, 1, 66 * passes.parts_pixels(64) - 5, 64, shift=5.0)
    out, pixels = torch.empty_like(result), result.shape[1]
    found = gathering(64, 1, pixels)
    passes.finish(result, torch.zeros(64), None, 1.0, out, found.place())
    found.placed(pixels)
    assert_moments(found, out)


@pytest.mark.parametrize("blocks", [1, KEPT_BLOCKS, KEPT_BLOCKS + 3])
def test_statistics_of_many_blocks(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block is smaller; one launch combines sixteen, and the rest when the last one is there."""
    launched = []
    combine = CardMoments._combine
    monkeypatch.setattr(CardMoments, "_combine", lambda self: (launched.append(len(self._pixels)), combine(self)))
    each = passes.parts_pixels(128)
    sizes = [each + 30] * (blocks - 1) + [each + 7]  # two programs each
    made = [draw(index, torch.float32, size, 1, 128, shift=2.0) for index, size in enumerate(sizes)]
    found = gathering(128, blocks, each + 30)
    for block in made:
        passes.finish(block, torch.zeros(128), None, 1.0, block, found.place())
        found.placed(len(block))
    assert_moments(found, *made)
    assert launched == [KEPT_BLOCKS] * (blocks // KEPT_BLOCKS) + [blocks % KEPT_BLOCKS] * (blocks % KEPT_BLOCKS > 0)


@given(shape=maps, dtype=dtypes, seed=st.integers(0, 99))
@settings(max_examples=12)
def test_interleave(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    n, width, channels = shape
    bias, out = draw(seed, dtype, channels), torch.full((2 * n, 2 * width, channels), torch.nan, dtype=dtype)
    expected = torch.empty(n, 2, width, 2, channels, dtype=torch.float64)
    pixels = 2 * n * width
    found = gathering(channels, 1, pixels, 2)
    for phase in range(2):
        result = draw(seed + 1 + phase, dtype, n, width + 1, 2 * channels)
        passes.interleave(result, bias, phase, out, found.place())
        expected[:, phase, :, 0] = result[:, :width, :channels].double() + bias.double()
        expected[:, phase, :, 1] = result[:, 1:, channels:].double() + bias.double()
    found.placed(pixels)
    assert units(out, expected.view(out.shape)) <= CUDA_PASS.bound
    assert_moments(found, out)


@given(
    rows=st.integers(2, 6),
    width=st.integers(1, 40),
    channels=st.one_of(st.sampled_from([96, 128, 130, 256]), st.integers(1, 50)),
    dtype=dtypes,
    first=st.booleans(),
    norm=st.sampled_from([None, "of the map", "of each pixel"]),
    data=st.data(),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
def test_refill(
    rows: int, width: int, channels: int, dtype: torch.dtype, first: bool, norm: str | None, data: st.DataObject,
    seed: int,
) -> None:  # fmt: skip
    """As `TorchKernels.refill`, from which copies and zeros must not differ by a bit: blocks in the middle and at the
    end of a map, also where the last one has no fresh rows."""
    begin = 1 if first else 2
    stop = data.draw(st.integers(begin, rows + 2))
    bottom = data.draw(st.sampled_from([None, stop])) if stop < rows + 2 else None
    before, fresh = draw(seed, dtype, rows + 2, width, channels), draw(seed + 1, dtype, stop - begin, width, channels)
    through: Affine | PixelScale | None = None
    if norm is not None:
        scale, shift = draw(seed + 2, torch.float32, 2, channels)
        through = Affine(scale, shift) if norm == "of the map" else PixelScale(scale, shift, 1e-12)
    windows = before.clone(), before.clone()
    work = torch.empty(12 * before.numel() + 256, dtype=torch.uint8)
    # Unseen, or kernels that their self-test finds wrong would be compared with those that serve instead.
    for kernels, window in zip((CudaKernels(CPU, unseen=True), TorchKernels(CPU)), windows, strict=True):
        source = StoredRows(MemoryMap(fresh))
        kernels.refill(Refill(window, first, (begin, stop), bottom, source, through, work))
    ours, theirs = windows
    prologue = slice(begin, stop)
    if stop > begin:
        assert units(ours[prologue], theirs[prologue].double()) <= (2 * CUDA_PASS.bound if norm else 0)
    ours[prologue] = theirs[prologue] = 0
    assert torch.equal(ours, theirs)


@given(
    cout=st.integers(1, 6),
    cin=st.sampled_from([1, 7, 128, 130]),
    stored=dtypes,
    dtype=dtypes,
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=15)
def test_fold(cout: int, cin: int, stored: torch.dtype, dtype: torch.dtype, channels_last: bool, seed: int) -> None:
    weight = draw(seed, stored, cout, cin, 3, 3)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    kernels = [torch.empty(2 * cout, 2, 2, cin, dtype=dtype).permute(0, 3, 1, 2) for _ in range(2)]
    expected = [torch.empty_like(kernel) for kernel in kernels]
    subpixel.sum_kernels(weight, expected, 16)
    for phase, (kernel, true) in enumerate(zip(kernels, expected, strict=True)):
        folding.fold(weight, phase, kernel)
        if dtype == torch.bfloat16:  # which the interpreter rounds in another way
            assert units(kernel, true.double()) <= 1
        else:
            assert torch.equal(kernel, true)


@given(
    blocks=st.integers(1, 40),
    width=st.integers(1, 9),
    groups=st.sampled_from([1, 2, 5]),
    each=st.integers(1, 50),
    data=st.data(),
    seed=st.integers(0, 99),
)
@settings(max_examples=15)
def test_affine(blocks: int, width: int, groups: int, each: int, data: st.DataObject, seed: int) -> None:
    """As `Moments.affine`, which the exact engine's own tests hold to diffusers."""
    channels, last = groups * width, data.draw(st.integers(1, each))
    means, m2s = draw(seed, torch.float64, 2, blocks, channels, shift=3.0).abs()
    module = torch.nn.GroupNorm(groups, channels)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    plain, ours = Moments(), gathering(channels, blocks, each)
    for n, mean, m2 in zip([each] * (blocks - 1) + [last], means, m2s, strict=True):
        plain.add(Partial(n, mean, m2))
        ours.add(Partial(n, mean, m2))
    norm = Norm("", channels, groups, 1e-6, True, module)
    expected = plain.affine(norm, torch.float64, FiniteChecks(CPU))
    found = CudaKernels(CPU).affine(ours, norm, torch.float32, FiniteChecks(CPU))
    assert units(found.scale, expected.scale) <= 1
    assert units(found.shift, expected.shift) <= 1


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_affine_of_statistics_that_are_not_finite(value: float) -> None:
    found, norm = gathering(8, 1, 10), Norm("its name", 8, 2, 1e-6, True, torch.nn.GroupNorm(2, 8))
    m2 = torch.ones(8, dtype=torch.float64)
    m2[5] = value
    found.add(Partial(10, torch.ones(8), m2))
    with pytest.raises(NonFiniteMap, match="its name"):
        CudaKernels(CPU).affine(found, norm, torch.float32, FiniteChecks(CPU))


@given(
    queries=st.integers(1, 20),
    tokens=st.integers(1, 40),
    dim=st.sampled_from([8, 24, 40]),
    dtype=dtypes,
    spread=st.sampled_from([1.0, 8.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_attention(queries: int, tokens: int, dim: int, dtype: torch.dtype, spread: float, seed: int) -> None:
    """``spread``: also weights so unequal that the running maximum and the rescaling matter."""
    q, kv = (spread * draw(seed, torch.float32, queries, dim)).to(dtype), draw(seed + 1, dtype, tokens, dim)
    out = torch.full_like(q, torch.nan)
    attention.attention(q, kv, dim**-0.5, out, attention.SMALLEST)
    expected = (q.double() @ kv.double().T * dim**-0.5).softmax(1) @ kv.double()
    assert units(out, expected) <= CUDA_ATTENTION[str(dtype)[6:]].bound


@pytest.mark.parametrize("cut", attention.CUTS)
def test_every_way_to_cut_attention(cut: attention.Cut) -> None:
    q, kv = draw(0, torch.float16, 70, 40), draw(1, torch.float16, 150, 40)
    out = torch.full_like(q, torch.nan)
    attention.attention(q, kv, 40**-0.5, out, cut)
    expected = (q.double() @ kv.double().T * 40**-0.5).softmax(1) @ kv.double()
    assert units(out, expected) <= CUDA_ATTENTION["float16"].bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_whole_decode(dtype: torch.dtype) -> None:
    """Channels of whole vectors and not; a shortcut; attention; the last rows of a map in a smaller block."""
    shape = Shape(widths=(16, 20), groups=4, post_quant=True, height=5, width=3, batch=2)
    vae, raw = shape.vae(dtype), shape.latents(dtype)
    free = engine(vae)
    image, truth = free.decode(raw), true_decode(vae, raw)
    with torch.no_grad():
        theirs = rms(vae.decode(raw).sample.double() - truth)
    allowed = 1.5 * (2 if dtype == torch.bfloat16 else 1) * ENGINE_ERROR_RATIO[str(dtype)[6:]].bound
    assert rms(image.double() - truth) <= allowed * theirs
    tight = engine(vae, memory_limit=free.smallest_limit(5, 3))
    assert tight.plan(5, 3).kernels == "cuda"
    if dtype == torch.float32:
        assert set(tight.plan(5, 3).rungs) != set(free.plan(5, 3).rungs)
    assert torch.equal(tight.decode(raw[1:])[0], image[1]), "the same bits for any limit and batch"


def test_a_whole_decode_of_a_causal_network() -> None:
    """Norms of each pixel, last taps, projections that are parts of one module, and an odd number of channels."""
    vae = qwen_image_vae(base_dim=12, dim_mult=(1, 2), dtype=torch.float16)
    raw = draw(0, torch.float16, 2, 16, 5, 3)
    free = engine(vae)
    image, wide = free.decode(raw), torch.nn.Module.to(copy.deepcopy(vae), torch.float32)
    with torch.no_grad():
        truth = wide.decode(raw.float().unsqueeze(2)).sample.squeeze(2)
        theirs = rms(vae.decode(raw.unsqueeze(2)).sample.squeeze(2).float() - truth)
    assert rms(image.float() - truth) <= 1.5 * ENGINE_ERROR_RATIO["float16"].bound * theirs
    tight = engine(vae, memory_limit=free.smallest_limit(5, 3))
    assert tight.plan(5, 3).kernels == "cuda"
    assert torch.equal(tight.decode(raw[1:])[0], image[1]), "the same bits for any limit and batch"


def test_a_float64_decode_is_left_to_pytorch() -> None:
    shape = Shape(widths=(8, 8), groups=4, height=2, width=2)
    vae, raw = shape.vae(torch.float64), shape.latents(torch.float64)
    truth = true_decode(vae, raw)
    assert rms(engine(vae).decode(raw) - truth) <= 1e-12 * rms(truth)


def test_nan_in_the_weights_is_an_error() -> None:
    shape = Shape(widths=(16, 16), height=2, width=2)
    vae = shape.vae()
    with torch.no_grad():
        vae.decoder.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteOutputError, match="mid_block.resnets.0.norm2"):
        engine(vae).decode(shape.latents())


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not tried the kernels yet, with a smaller map than they are tried on elsewhere.

    What fails and what is wrong is so on any map, and the interpreter takes half the time.
    """
    monkeypatch.setattr(self_test, "_faults", {})
    monkeypatch.setattr(self_test, "_ROWS", 5)
    monkeypatch.setattr(self_test, "_WIDTH", 5)


def _fails(*_: object, **__: object) -> None:
    raise RuntimeError("PTX was not understood\nand more")


def test_the_kernels_pass_their_self_test() -> None:
    """Whichever test of this process needs the kernels first has them tried; the result holds for all."""
    for itemsize in (2, 4):
        assert self_test.fault(CPU, itemsize, lambda: CudaKernels(CPU, unseen=True)) == ""
    assert self_test.note(CPU) == ""


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("module", "broken"),
    [
        (kernels_module, "scale_and_shift"),
        (CardMoments, "_combine"),
        (folding, "fold"),
        *((passes, name) for name in ("prologue", "refill", "finish", "interleave")),
        (attention, "attention"),
    ],
)
def test_kernels_that_fail_are_not_used_and_the_plan_says_so(
    module: ModuleType, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken != "scale_and_shift":  # the interpreter takes seconds for the norms, which the self-test begins with
        monkeypatch.setattr(CudaKernels, "affine", TorchKernels.affine)
    monkeypatch.setattr(module, broken, _fails)
    dtype = torch.float16 if broken == "attention" else torch.float32
    shape = Shape(widths=(16, 16), height=2, width=2)
    vae, raw = shape.vae(dtype), shape.latents(dtype)
    plan = engine(vae).plan(2, 2)
    name = "bfloat16 and float16" if broken == "attention" else "float32"
    assert plan.kernels_note == f"PyTorch's own operations serve in {name}: RuntimeError: PTX was not understood"
    assert plan.kernels_note in str(plan)
    truth = true_decode(vae, raw)
    assert rms(engine(vae).decode(raw).double() - truth) <= (0.01 if broken == "attention" else 1e-5) * rms(truth)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("which", ["value", "mean", "deviation"])
def test_kernels_that_are_wrong_are_not_used(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = passes.finish
    monkeypatch.setattr(CudaKernels, "affine", TorchKernels.affine)  # which takes the interpreter seconds

    def wrong(*given: torch.Tensor) -> None:
        right(*given)  # type: ignore[arg-type]
        if which == "value":
            given[4][-1, -1, -1] += 0.01
        else:
            given[5][0 if which == "mean" else -1] += 1.0

    monkeypatch.setattr(passes, "finish", wrong)
    found = self_test.fault(CPU, 4, lambda: CudaKernels(CPU, unseen=True))
    assert found.startswith("ArithmeticError: ")
    assert "'conv3' in float32 is off by" in found
    assert found in self_test.note(CPU)
