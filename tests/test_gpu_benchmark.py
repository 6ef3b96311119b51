"""benchmarks/gpu.py without a card: its rehearsal, and what it makes of rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from gpu_run import sglang_path  # noqa: E402
from gpu_run.log import Log  # noqa: E402
from gpu_run.parts import PARTS, SANITIZE  # noqa: E402
from gpu_run.profiling import Work, convolved  # noqa: E402
from gpu_run.verdicts import verdicts  # noqa: E402


@pytest.mark.timeout(600)
def test_the_rehearsal(tmp_path: Path) -> None:
    """Every part on a CPU, and everything that may go wrong. It fails if one statement of the benchmark did not run."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--rehearse", "--out", str(tmp_path / "out")]
    command += ["--sglang", str(tmp_path), "--seconds", "900"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    report = json.loads(child.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "out" / "gpu.json").read_text())
    events = Log(tmp_path / "out" / "rows.jsonl").new()
    begun = [event["part"] for event in events if event["event"] == "begin"]
    assert {part.name for part in PARTS + SANITIZE} <= set(begun)
    assert begun[-1] == "sanitizer", "whatever failed before"
    assert [
        row for row in report["rows"] if "failed" in row and row.get("engine", "").startswith(("diffusers", "sglang"))
    ] == []
    assert "not rehearsed: " not in child.stdout.rpartition("Found:")[2]


def row(engine: str, size: int, ms: float, **more: Any) -> dict[str, Any]:
    fixed = {"event": "row", "part": "p", "kind": "decode", "model": "flux", "batch": 1, "dtype": "bfloat16"}
    return fixed | {"engine": engine, "size": size, "ms": ms, "peak_bytes": 1 << 30, "digest": f"{size}"} | more


def states(events: list[dict[str, Any]]) -> dict[str, str]:
    return {one.goal: one.state for one in verdicts(events)}


def test_what_was_not_measured_is_no_success() -> None:
    assert set(states([]).values()) == {"not measured"}
    alone = states([row("fluxvae", 1024, 9.0, limit_name="none", limit=None)])
    assert alone["1024: no slower than the fastest peer"] == "not measured", "no peer"
    failed = row("sglang", 1024, 1.0) | {"failed": "OutOfMemoryError"}
    assert states([row("fluxvae", 1024, 9.0, limit_name="none"), failed]) == alone


@pytest.mark.parametrize(("theirs", "state"), [(30.0, "reached"), (29.9, "missed")])
def test_the_fastest_peer_counts(theirs: float, state: str) -> None:
    ours = row("fluxvae", 1024, 30.0, limit_name="none", limit=None)
    events = [ours, row("diffusers compiled (default)", 1024, 40.0), row("sglang", 1024, theirs)]
    assert states(events)["1024: no slower than the fastest peer"] == state
    assert states(events)["1024: the same within a third of diffusers' memory"] == "not measured"
    tight = ours | {"limit_name": "third", "ms": 100.0}
    assert states([*events, tight])["1024: the same within a third of diffusers' memory"] == "missed"


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "other"},
        {"digest": "other", "engine": "fluxvae graphs"},
        {"digest": "other", "batch": 4},
        {"batch": 4, "alike": False},
    ],
)
def test_one_image_that_differs_is_seen(other: dict[str, Any]) -> None:
    """Among all parts and processes; but blocks of another size make another image."""
    first = row("fluxvae", 1024, 30.0, limit_name="none")
    goal = "the same bits for any limit, batch and run"
    assert (
        states([first, first | {"limit_name": "smallest"}, first | {"digest": "x", "block_values": 1}])[goal]
        == "reached"
    )
    assert states([first, first | other])[goal] == "missed"


def test_what_bounds_a_kernel() -> None:
    """By hand: a 3x3 convolution of 512 to 512 channels, 64 rows of 128 pixels, in half precision."""
    nbytes, operations = convolved([1, 512, 66, 128], [512, 512, 3, 3], [])
    assert operations == 2 * 64 * 128 * 512 * 9 * 512
    assert nbytes == 2 * (66 * 128 * 512 + 9 * 512 * 512 + 64 * 128 * 512)
    found = Work(0.1, 1, nbytes, operations).bound(tflops=800, gb_per_second=4000)
    assert found["bound"] == "multiplications"
    assert found["share_of_bound"] == pytest.approx(operations / 800e12 / 1e-4)
    assert Work(0.1, 1, nbytes).bound(800, 4000)["bound"] == "bytes"
    assert Work(0.1, 1).bound(800, 4000)["bound"] == "not known"


def test_a_line_that_is_not_whole_is_read_later(tmp_path: Path) -> None:
    log = Log(tmp_path / "rows.jsonl")
    log.write("row", "a", ms=1.0)
    with log.path.open("a") as file:
        file.write('{"event": "row", ')
    assert [event["part"] for event in log.new()] == ["a"]
    with log.path.open("a") as file:
        file.write('"part": "b"}\n')
    assert [event["part"] for event in log.new()] == ["b"]


SGLANG = ROOT / ".gpu" / "sglang"


@pytest.mark.skipif(not SGLANG.exists(), reason="benchmarks/on_a_card.sh fetch puts SGLang's files there")
def test_sglangs_path_is_the_same_function() -> None:
    """On a CPU it takes its own way out where a Triton kernel would serve; upsampling and attention are its own."""
    from gpu_run.networks import small_vae

    for model in ("flux", "flux2"):
        vae, raw = small_vae((8, 16, 16), torch.float64, groups=4, model=model), torch.randn(1, 4, 3, 5).double()
        with torch.no_grad():
            expected = vae.decode(raw, return_dict=False)[0]
            path = sglang_path.load(SGLANG)
            assert path.install(vae)["FusedUpsample2xConv2d"] == 2
            found = path.decode(vae, raw)
        # It sums kernels and folds projections in float32, whatever the network's dtype.
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert not torch.equal(found, expected), "another way to compute it"
