"""The planner: predicted peaks against measured ones, what it chooses as the limit falls, limits and spill folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_models import Shape, one_thread
from engine_peaks import Measure, measure, measuring
from fluxvae.engine import planner
from fluxvae.engine.calls import Geometry
from fluxvae.engine.exact import ExactDecoder
from fluxvae.engine.memory import heap, spill
from fluxvae.engine.plan import Plan, parse_memory_limit
from fluxvae.errors import InvalidOptionError, MemoryLimitError
from fluxvae.verify.tolerances import PEAK_PREDICTION
from leftovers import nothing_left_behind

__all__ = ["one_thread"]  # a fixture, found by its name

direct = partial(ExactDecoder, kernels="torch")
"""The engine with direct kernels, whatever the machine could do; `test_winograd` has the others."""

HERE = Path(__file__).parent
WIDE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 32, 32],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX = WIDE | {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}


def assert_predicted(rows: list[dict[str, float]], output: int = 0) -> None:
    """Never more than planned; nor much less, but for the allowance that the runtime may not need.

    ``output``: bytes of an image that is large beside a tight limit; its pages are touched by the last layer only.
    """
    for row in rows:
        print({**row, "ratio": round(row["measured"] / row["predicted"], 3)})
        assert row["measured"] <= row["predicted"], row
        assert row["measured"] + output + row["runtime"] >= (1 - PEAK_PREDICTION.bound) * row["predicted"], row
        if row["limit"] is not None:
            assert row["measured"] <= row["limit"], row


@pytest.fixture(scope="module")
def together() -> Iterator[Measure]:
    """Measures small jobs in one process. Those at full widths, which are marked slow, have one each."""
    with measuring() as there:
        yield there


def test_measured_peak_is_what_was_predicted(together: Measure) -> None:
    cases = [
        {"size": [160, 150]},
        {"size": [150, 160], "fraction": 0.5},
    ]
    assert_predicted(together({"vae": WIDE, "kernels": "torch", "threads": 2, "cases": cases}))


@pytest.mark.parametrize("kernels", ["torch", "winograd"])
def test_measured_peak_of_an_encode_is_what_was_predicted(together: Measure, kernels: str) -> None:
    cases = [{"size": [640, 600]}, {"size": [601, 643], "fraction": 0.5}, {"size": [640, 640], "fraction": 0.0}]
    assert_predicted(together({"encode": True, "vae": WIDE, "kernels": kernels, "threads": 2, "cases": cases}))


@pytest.mark.parametrize(
    ("kernels", "encode"), [("winograd", False), pytest.param("torch", True, marks=pytest.mark.slow)]
)
def test_measured_peak_of_a_causal_network_is_what_was_predicted(together: Measure, kernels: str, encode: bool) -> None:
    """Maps that are never stored, and the rings and blocks that stand for them."""
    vae = {"base_dim": 48, "num_res_blocks": 1}
    scale = 8 if encode else 1
    sizes = [(scale * 80, scale * 75), (scale * 75, scale * 80), (scale * 80, scale * 80)]
    cases = [{"size": size, "fraction": part} for size, part in zip(sizes, (1.0, 0.5, 0.0), strict=True)]
    job = {"causal": True, "encode": encode, "vae": vae, "kernels": kernels, "threads": 2, "cases": cases}
    assert_predicted(together(job))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kernels", "dtype"), [("torch", "float32"), ("winograd", "float32"), ("winograd", "bfloat16")]
)
def test_measured_peak_of_encodes_of_the_full_architecture(kernels: str, dtype: str) -> None:
    cases = [{"size": [512, 384], "fraction": part} for part in (0.0, 0.3, 1.0)]
    cases += [{"size": [333, 517], "batch": 2, "fraction": 0.5}]
    assert_predicted(measure({"encode": True, "vae": FLUX, "kernels": kernels, "dtype": dtype, "cases": cases}))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [("torch", "float32"), ("torch", "bfloat16"), ("winograd", "float32"), ("winograd", "bfloat16")],
)
def test_measured_peak_over_random_cases_of_the_full_architecture(kernels: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(7)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))  # noqa: E731
    # Direct half-precision maps are half as large, and what oneDNN generates for them is not: the smallest decodes stay
    # further below their plan, by up to 10 MB.
    half = kernels == "torch" and dtype == "bfloat16"
    low, high = (40, 80) if half else (16, 64)
    cases = [
        {"size": [draw(low, high), draw(low, high)], "batch": draw(1, 2), "fraction": draw(0, 10) / 10}
        for _ in range(10)
    ]
    rows = measure({"vae": FLUX, "kernels": kernels, "dtype": dtype, "cases": cases})
    assert_predicted(rows)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kernels", ["torch", "winograd"])
def test_measured_peak_where_attention_has_many_blocks(kernels: str) -> None:
    """Within the least memory the peak is attention's: what every block left behind would lie above it."""
    rows = measure({"vae": FLUX, "kernels": kernels, "cases": [{"size": [160, 160], "fraction": 0.0}]})
    assert_predicted(rows, output=3 * 1280 * 1280 * 4)


@pytest.mark.parametrize("size", [(16, 16), (128, 128), (512, 512), (37, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ladder_of_the_full_architecture(size: tuple[int, int], dtype: torch.dtype) -> None:
    """No weights are needed to plan, so the full widths are planned on the meta device's stand-in: empty tensors."""
    engine = _flux_engine(dtype)
    free = engine.plan(*size)
    low = engine.smallest_limit(*size)
    assert free.work_ratio == 1.0
    assert set(free.rungs) <= {"memory", "memory/memory"}
    before: Plan | None = None
    for step in range(11):
        engine.memory_limit = low + (free.peak_bytes - low) * step // 10
        plan = engine.plan(*size)
        assert plan.peak_bytes <= engine.memory_limit
        assert plan.work_ratio >= 1.0
        if before is not None:
            assert plan.seconds <= before.seconds * 1.0001, "more memory never costs time"
        before = plan
    assert plan.rungs == free.rungs


@pytest.mark.parametrize("kernels", ["torch", "winograd"])
def test_the_bars_of_the_full_architecture_are_planned(kernels: str) -> None:
    """Predicted only: ``-m slow`` and benchmarks/memory.py measure."""
    engine = _flux_engine(torch.float32, kernels)
    assert engine.plan(128, 128).peak_bytes <= 1.7e9
    engine.memory_limit = 700_000_000
    assert engine.plan(128, 128).work_ratio <= 1.35
    assert engine.smallest_limit(256, 256) <= 1e9
    assert engine.smallest_limit(512, 512) <= 2e9


def _flux_engine(dtype: torch.dtype, kernels: str = "torch") -> ExactDecoder:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**FLUX)
    vae.encoder = None
    torch.nn.Module.to(vae, dtype)
    vae.decoder.to_empty(device="cpu")  # never touched: planning reads shapes
    engine = ExactDecoder(vae, kernels=kernels)
    engine.memory_limit = 1 << 60
    return engine


def test_a_plan_explains_itself() -> None:
    engine = direct(Shape().vae(), memory_limit=100_000_000)
    plan = engine.plan(6, 5, 2)
    text = str(plan)
    assert "2 x 20x24" in text
    assert "100.00 MB (memory_limit)" in text
    assert "up_blocks.0.resnets.0" in text
    assert plan.kernels == "torch"
    assert "free memory" in str(direct(Shape().vae()).plan(6, 5))


@given(amount=st.integers(1, 10**6), unit=st.sampled_from(["", "B", "kB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_memory_limits_in_words(amount: int, unit: str) -> None:
    factor = {"": 1, "B": 1, "kB": 1000, "MB": 10**6, "GB": 10**9, "KiB": 1024, "MiB": 2**20, "GiB": 2**30}[unit]
    assert parse_memory_limit(f"{amount}{unit}") == amount * factor
    assert parse_memory_limit(f" {amount} {unit.lower()} ") == amount * factor
    assert parse_memory_limit(amount) == amount


@pytest.mark.parametrize("value", ["", "GB", "-1GB", "1.2.3GB", "1XB", "nan", 0, -5, True, None, 1.5, "0", "0.1"])
def test_memory_limits_that_are_none(value: object) -> None:
    with pytest.raises(InvalidOptionError, match="memory_limit: got .*'2GiB'"):
        parse_memory_limit(value)  # type: ignore[arg-type]


def test_half_a_gigabyte() -> None:
    assert parse_memory_limit("0.7GB") == 700_000_000
    assert parse_memory_limit("2GiB") == 2 << 30


# -- spilling --------------------------------------------------------------------------------------------------------


def test_a_spill_folder_in_memory_is_refused() -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm here")
    with pytest.raises(InvalidOptionError, match=r"spill_dir: got '/dev/shm', which is a tmpfs"):
        direct(Shape().vae(), spill_dir="/dev/shm")


def test_the_automatic_spill_folder_is_not_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/dev/shm")
    folder = spill.Spill(torch.device("cpu"), None).folder
    assert folder != Path("/dev/shm")


def test_a_missing_spill_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="spill_dir: got .*existing folder"):
        direct(Shape().vae(), spill_dir=tmp_path / "none")


def test_without_room_to_spill_the_smallest_limit_is_larger_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = direct(Shape(height=16, width=16).vae(), block_values=3000)
    with_disk = engine.smallest_limit(16, 16)
    monkeypatch.setattr(spill.Spill, "free", lambda self: None)
    without = engine.smallest_limit(16, 16)
    assert without > with_disk
    engine.memory_limit = with_disk
    with pytest.raises(MemoryLimitError, match=f"at least {without} bytes.*{with_disk} bytes would do"):
        engine.plan(16, 16)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "unlinked"])
def test_spilled_maps_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool) -> None:
    if not unnamed:
        monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False)
    shape = Shape(height=12, width=10)
    vae, raw = shape.vae(), shape.latents()
    limit = direct(vae, block_values=3000).smallest_limit(12, 10)
    engine = direct(vae, block_values=3000, memory_limit=limit, spill_dir=tmp_path)
    assert engine.plan(12, 10).spill_bytes > 0
    during: set[str] = set()
    image = engine.decode(raw, progress=lambda *_: during.update(os.listdir(tmp_path)))
    assert torch.equal(image, direct(vae, block_values=3000).decode(raw))
    assert not during, "not even while it runs"


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from engine_models import Shape
from fluxvae.engine.exact import ExactDecoder
torch.set_num_threads(1)
shape = Shape(height=20, width=20)
engine = ExactDecoder(shape.vae(), kernels="torch", block_values=3000, spill_dir=sys.argv[2])
engine.memory_limit = engine.smallest_limit(20, 20)
spilled = {s.kind for s in engine.plan(20, 20).steps if s.spilled}
assert spilled
def progress(done, total):
    if done > total * 0.6:
        print("spilling", flush=True)
        sys.stdin.read()  # until it is killed
engine.decode(shape.latents(), progress=progress)
"""


def test_killed_in_mid_spill_leaves_no_file(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(HERE), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "spilling"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL, "it was still decoding"
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("one_thread")
def test_fifty_decodes_do_not_grow() -> None:
    shape = Shape(height=24, width=24, batch=1)
    vae, raw = shape.vae(), shape.latents()
    engine = direct(vae)

    def resident() -> int:
        heap.trim_heap()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(10):
        engine.decode(raw)
    before, start = resident(), time.perf_counter()
    with nothing_left_behind():
        for _ in range(50):
            engine.decode(raw)
    assert resident() - before < 2 << 20, f"after {time.perf_counter() - start:.1f} s"


def test_a_planner_is_made_once_for_a_size_and_a_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one takes as long as a small decode; plans must not depend on which came before."""
    made: list[tuple[int, int]] = []

    class Counted(planner.Planner):
        def __init__(self, network: Any, geometry: Geometry, *args: Any, **options: Any) -> None:
            made.append((geometry.height, geometry.width))
            super().__init__(network, geometry, *args, **options)

    engine = _flux_engine(torch.float32)
    first = str(engine.plan(16, 24)), str(engine.plan(24, 16))
    engine = _flux_engine(torch.float32)
    monkeypatch.setattr(planner, "Planner", Counted)
    assert (str(engine.plan(16, 24)), str(engine.plan(24, 16)), str(engine.plan(16, 24))) == (*first, first[0])
    assert made == [(16, 24), (24, 16)]
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        engine.plan(16, 24)
    finally:
        torch.set_num_threads(before)
    assert made == [(16, 24), (24, 16), (16, 24)]
    for height in range(1, 100):
        engine.plan(height, 1)
    engine.plan(16, 24)
    assert len(made) == 3 + 99 + 1, "the planners of sizes long gone are not kept"
