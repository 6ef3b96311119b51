"""The memory of a GPU without a GPU: PyTorch's own caching allocator on a card that is not there.

`fake_cuda_runtime.c` says what stands for the card, `pipeline_on_a_card` what is done with it. What follows from
PyTorch's version, its allocators and CUDA graphs is tested beside it, with PyTorch's answers replaced.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_models import Shape
from fluxvae.engine.memory.free import available_memory
from fluxvae.engine.memory.pool import FIRST_WITH_POOLS, ArenaPool
from fluxvae.engine.network import read_network
from fluxvae.engine.planner import make_planner

HERE = Path(__file__).parent
GPU = torch.device("cuda", 0)
COMPILER = shutil.which("cc") or shutil.which("gcc")
CARD, CONTEXT = 12 << 30, 450_000_000
POOLS = tuple(map(int, torch.__version__.split(".")[:2])) >= FIRST_WITH_POOLS

on_a_card = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux" or platform.machine() != "x86_64" or torch.version.cuda is None,
    reason="needs a C compiler, and PyTorch's build for CUDA on Linux",
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of single calls, of a pipeline, and of the same one with the arena in PyTorch's cache."""
    assert COMPILER is not None
    library = tmp_path_factory.mktemp("card") / "libcuda.so.1"
    source = str(HERE / "fake_cuda_runtime.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-w", "-o", str(library), source, "-lpthread"], check=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")},
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": os.pathsep.join([str(library.parent), os.environ.get("LD_LIBRARY_PATH", "")]),
        "FAKE_CARD_BYTES": str(CARD),
        "FAKE_CARD_CONTEXT": str(CONTEXT),
    }
    jobs = [{}, *({"side": 2048, "images": 6, "own_pool": own_pool} for own_pool in (True, False))]
    command = [sys.executable, str(HERE / "pipeline_on_a_card.py"), *map(json.dumps, jobs)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert child.returncode == 0, child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()]


@on_a_card
def test_a_pipeline_gets_its_memory_back_between_images(reports: list[dict[str, Any]]) -> None:
    """A transformer of 10 GB on a card of 12 GB; every image of 2048 x 2048 pixels is kept on the card."""
    _, report, _ = reports
    assert report["failed"] is None
    assert [image["told"] for image in report["images"]] == [[]] * 6
    kept = 0
    for image in report["images"]:
        before, after = image["before"], image["after"]
        assert after["reserved"] < before["reserved"], "the arena is gone, and what was emptied for it"
        assert after["available"] == after["driver"], "all that is free is the card's"
        kept += before["active"] - report["start"]["active"] - kept
        # What images and embeddings lie in is less than three of PyTorch's large segments more than they are.
        assert report["start"]["available"] - after["available"] < kept + (25 << 20) + (120 << 20)
        assert image["peak"] <= before["available"] * 9 // 10


@on_a_card
def test_without_a_pool_the_next_arena_does_not_fit(reports: list[dict[str, Any]]) -> None:
    """What the pool is for; should this fail, PyTorch's cache has become better, and the pool may go."""
    *_, report = reports
    first, *later = report["images"]
    assert first["told"] == []
    assert any("ran out of memory with a plan for" in told for told in later[0]["told"])
    assert later[0]["before"]["inactive_split"] > 1.8e9, "the first arena, cut up"
    assert report["failed"].startswith("CUDA out of memory"), "the transformer finds no room either, in the end"
    assert len(report["images"]) < 6


@on_a_card
def test_a_batch_takes_one_block_from_the_card_and_gives_it_back(reports: list[dict[str, Any]]) -> None:
    batch = reports[0]["batch"]
    (mallocs, frees), (mallocs_after, frees_after) = batch["counts"]
    # The arena and the image, and of these the arena. Without pools the workspace was given back before, and is now.
    assert (mallocs_after - mallocs, frees_after - frees) == ((2, 1) if POOLS else (3, 2))
    assert batch["after"]["active"] - batch["before"]["active"] == batch["image"]


@on_a_card
@pytest.mark.parametrize("allowed", ["all", "half"])
def test_what_is_told_to_be_free_can_be_had_in_one_piece_and_no_more(
    reports: list[dict[str, Any]], allowed: str
) -> None:
    """``half``: with `torch.cuda.set_per_process_memory_fraction`."""
    report = reports[0][allowed]
    assert report["told"]["inactive_split"] > 100 << 20
    assert report["told"]["reserved"] > report["told"]["active"] + report["told"]["inactive_split"]
    assert report["outcomes"] == ["fits", "does not"]


@on_a_card
def test_memory_that_others_took_is_a_smaller_plan(reports: list[dict[str, Any]]) -> None:
    [told] = reports[0]["less"]
    assert re.match(r"decode: cuda:0 ran out of memory with a plan for 1\.\d\d GB; decoding again within \d+", told)


@on_a_card
def test_an_error_that_is_held_holds_no_pool(reports: list[dict[str, Any]]) -> None:
    assert reports[0]["pool"] == ["OutOfMemoryError", True]


# -- what PyTorch answers --------------------------------------------------------------------------------------------


class Cuda:
    """`torch.cuda` as far as it is asked here, and what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: str = "2.13.0+cu130", **answers: Any) -> None:
        self.asked: list[str] = []
        self.answers = {"backend": "native", "capturing": False, "free": 1 << 40, **answers}
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(ArenaPool, "_empty", self.empty)
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)
        replaced = {
            "get_allocator_backend": lambda: self.answers["backend"],
            "is_current_stream_capturing": lambda: self.answers["capturing"],
            "mem_get_info": lambda device: (self.answers["free"], 1 << 40),
            "device": lambda device: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "MemPool": lambda: SimpleNamespace(),
            "use_mem_pool": self.use_mem_pool,
            "empty_cache": self.empty_cache,
            "memory_stats": self.memory_stats,
            "get_per_process_memory_fraction": lambda device: 1.0,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def use_mem_pool(self, pool: object, device: torch.device) -> Iterator[None]:
        self.asked.append("pool")
        yield
        self.asked.append("left")

    def empty(self, nbytes: int) -> torch.Tensor:
        self.asked.append("block")
        return torch.empty(nbytes, dtype=torch.uint8)

    def empty_cache(self) -> None:
        self.asked.append("emptied")
        if self.answers["capturing"] == "another thread":
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def memory_stats(self, device: int) -> dict[str, int]:
        assert self.answers["backend"] != "pluggable", "it has none"
        amounts = {"reserved": 1000, "active": 300, "inactive_split": 200}
        return {f"{name}_bytes.all.current": amount for name, amount in amounts.items()}


def taken(cuda: Cuda) -> list[str]:
    """What is asked of PyTorch for two images, and after them."""
    room = ArenaPool(GPU)
    for _ in range(2):
        assert len(room.take(10)) == 10
    room.close()
    assert room._pool is None
    return cuda.asked


def test_only_the_block_is_allocated_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(Cuda(monkeypatch)) == ["pool", "block", "left"] * 2


def test_the_cache_is_given_back_first_where_the_card_has_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(Cuda(monkeypatch, free=5)) == ["emptied", *["pool", "block", "left"] * 2]


@pytest.mark.parametrize("setting", ["expandable_segments:True", "max_split_size_mb:512, expandable_segments: true"])
def test_pages_need_no_pool(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    cuda = Cuda(monkeypatch)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", setting)
    assert taken(cuda) == ["block"] * 2


@pytest.mark.parametrize("answers", [{"backend": "cudaMallocAsync"}, {"backend": "pluggable"}, {"capturing": True}])
@pytest.mark.parametrize("version", ["2.13.0+cu130", "2.6.0"])
def test_where_a_pool_is_not_possible_nothing_else_is_done(
    monkeypatch: pytest.MonkeyPatch, version: str, answers: dict[str, Any]
) -> None:
    """Other allocators have none, and while a CUDA graph is captured all comes from the graph's."""
    assert taken(Cuda(monkeypatch, version, **answers)) == ["block"] * 2


@pytest.mark.parametrize("version", ["2.6.0+cu124", "2.12.1"])
@pytest.mark.parametrize("capturing", [False, "another thread"])
def test_older_versions_give_the_cache_back_instead(
    monkeypatch: pytest.MonkeyPatch, version: str, capturing: Any
) -> None:
    cuda = Cuda(monkeypatch, version)
    room = ArenaPool(GPU)
    room.take(10)
    cuda.answers["capturing"] = capturing
    room.close()
    assert cuda.asked == ["block", "emptied"]
    room.close()
    assert cuda.asked == ["block", "emptied"], "once"


def test_a_cpu_has_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, backend=None)
    room = ArenaPool(torch.device("cpu"))
    room.take(10)
    room.close()
    assert cuda.asked == ["block"]


@pytest.mark.parametrize(
    ("answers", "fraction", "free"),
    [
        ({}, 1.0, 5500),  # 500 of the cache are in segments that nothing lies in
        ({}, 4000 / (1 << 40), 3500),  # the cap counts what is in use and in pieces
        ({}, 100 / (1 << 40), 0),
        ({"backend": "cudaMallocAsync"}, 100 / (1 << 40), 5500),  # which knows no cap
        ({"backend": "pluggable"}, 1.0, 5000),
    ],
)
@pytest.mark.parametrize("device", ["cuda", GPU], ids=str)
def test_free_on_a_card_is_what_is_free_or_can_be_given_back(
    monkeypatch: pytest.MonkeyPatch, device: Any, answers: dict[str, Any], fraction: float, free: int
) -> None:
    Cuda(monkeypatch, free=5000, **answers)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: fraction)
    assert available_memory(device) == (free, "free memory")


# -- what docs/memory.md says ----------------------------------------------------------------------------------------


def test_the_plans_beside_a_transformer_are_those_of_the_page() -> None:
    """FLUX's widths, and the kernels of an NVIDIA GPU, which plan without one."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("PyTorch brings the Triton language on Linux only")
    from fluxvae.engine.kernels.cuda.kernels import CudaKernels

    kernels = CudaKernels(torch.device("cpu"), unseen=True)
    vae = Shape(widths=(128, 256, 512, 512), groups=32, layers_per_block=2, latent_channels=16).vae(torch.bfloat16)
    network, page = read_network(vae), (HERE.parent / "docs" / "memory.md").read_text(encoding="utf-8")
    free = {"bfloat16": 2.26e9, "float32": 2.16e9}
    rows = [line.strip("| ").split("|") for line in page.splitlines() if line.startswith(("| 1024 x", "| 2048 x"))]
    assert len(rows) == 4
    for size, dtype, unlimited, *limited in ([cell.strip() for cell in row] for row in rows):
        side, itemsize = int(size.split()[0]) // 8, {"bfloat16": 2, "float32": 4}[dtype]
        planner = make_planner(
            network, kernels, (side, side), batch=1, computed=itemsize, stored=itemsize, cast=False, on_cpu=False,
            threads=1,
        )  # fmt: skip
        assert f"{planner.plan(None).peak_bytes / 1e9:.1f} GB" == unlimited
        limited += [""] * (6 - len(limited))  # the last cells of a row, where they are empty
        for desktop, (peak, work, spilled) in ((0, limited[:3]), (5e8, limited[3:])):
            plan = planner.plan(int((free[dtype] - desktop) * 9 // 10), spill_free=32 << 30)
            told = f"{plan.peak_bytes / 1e9:.1f} GB", f"{plan.work_ratio:.2f}", f"{plan.spill_bytes / 1e9:.1f} GB"
            assert told == (peak, work, spilled or "0.0 GB"), (size, dtype)
