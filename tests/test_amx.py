"""Products by AMX: parts that add up exactly, sums against float64, and the same bits however the work is cut."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numpy.typing import NDArray

from fluxvae import system
from fluxvae.engine.kernels.cpu.amx import CHUNK, CHUNK_BYTES, ROWS, split_rows, split_weights
from fluxvae.engine.kernels.cpu.multiply import _tiles_at_once, multiply, pack_panel, panel_bytes, split_bytes
from fluxvae.engine.kernels.cpu.products import NR, THIRD
from fluxvae.engine.kernels.cpu.vector_code import AMX, LANES
from fluxvae.verify.tolerances import AMX_PRODUCTS, PRODUCTS

needs_amx = pytest.mark.skipif(not AMX, reason="this processor has no AMX, or the system does not let us use it")
Floats = NDArray[np.float32]


@njit
def call_split_rows(src: int, group: int, row: int, block: int, rows: int, blocks: int, dst: int) -> None:
    split_rows(src, group, row, block, rows, blocks, dst)


@njit
def call_split_weights(src: int, row: int, rows: int, dst: int) -> None:
    split_weights(src, row, rows, dst)


def lines(nbytes: int) -> NDArray[np.uint8]:
    """Memory that begins at a cache line."""
    memory = np.full(nbytes + 64, 0xAB, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + nbytes]


def values(seed: int, *shape: int) -> Floats:
    """Normally distributed values of very different sizes."""
    random = np.random.default_rng(seed)
    made = random.standard_normal(shape) * 2.0 ** random.integers(-60, 60, shape)
    return made.astype(np.float32)


def grouped(tiles: Floats) -> Floats:
    """(n, cin) as groups of THIRD tiles, each of them one (THIRD, LANES) matrix after the other."""
    padded = np.zeros((-(-len(tiles) // THIRD) * THIRD, tiles.shape[1]), np.float32)
    padded[: len(tiles)] = tiles
    return np.ascontiguousarray(padded.reshape(-1, THIRD, tiles.shape[1] // LANES, LANES).swapaxes(1, 2))


def whole(parts: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Parts (..., 3, rows, 64 bytes) added up: (..., rows, pair, first or second)."""
    pairs = np.ascontiguousarray(parts).view(np.uint16).astype(np.uint32) << 16
    exact = pairs.view(np.float32).astype(np.float64)
    return exact.sum(-3).reshape(*exact.shape[:-3], exact.shape[-2], LANES, 2)


def run(tiles: Floats, weights: Floats) -> Floats:
    """(n, cin) times (cin, cout) by `multiply`; cout is a multiple of NR. What follows the result stays as it is."""
    count, cin = tiles.shape
    panels = weights.shape[1] // NR
    packed = lines(panels * panel_bytes(cin))
    for panel in range(panels):
        one = np.ascontiguousarray(weights[:, panel * NR : (panel + 1) * NR])
        pack_panel(one.ctypes.data, cin, packed[panel * panel_bytes(cin) :].ctypes.data)
    left, split = grouped(tiles), lines(split_bytes(count, cin))
    rounded = len(left) * THIRD
    out = np.full((panels * rounded * NR + 64,), 7.0, np.float32)
    multiply(
        left.ctypes.data, count, packed.ctypes.data, panel_bytes(cin), panels, cin, out.ctypes.data, rounded * NR * 4,
        split.ctypes.data,
    )  # fmt: skip
    assert (out[-64:] == 7.0).all()
    return out[:-64].reshape(panels, rounded, NR)[:, :count].transpose(1, 0, 2).reshape(count, -1)


@needs_amx
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 37), st.integers(1, 5), st.booleans(), st.integers(0, 1000))
def test_rows_are_the_sum_of_their_parts(rows: int, blocks: int, as_groups: bool, seed: int) -> None:
    given = values(seed, rows, blocks * LANES)
    chunks, sixteens, row = -(-blocks // 2), -(-rows // ROWS), blocks * LANES * 4
    dst = lines(sixteens * chunks * CHUNK_BYTES)
    if as_groups:
        src, strides = grouped(given), (THIRD * row, LANES * 4, THIRD * LANES * 4)
    else:
        src, strides = given, (THIRD * row, row, LANES * 4)
    call_split_rows(src.ctypes.data, *strides, rows, blocks, dst.ctypes.data)
    kept = dst.reshape(sixteens, chunks, 3, ROWS, 64)
    got = whole(kept).transpose(0, 2, 1, 4, 3).reshape(-1, chunks * CHUNK)
    np.testing.assert_array_equal(got[:rows, : blocks * LANES], given.astype(np.float64))
    assert not got[:rows, blocks * LANES :].any()
    assert (kept.transpose(0, 3, 1, 2, 4).reshape(sixteens * ROWS, -1)[rows:] == 0xAB).all()


@needs_amx
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(0, 2), st.integers(0, 1000))
def test_weights_are_the_sum_of_their_parts(rows: int, apart: int, seed: int) -> None:
    weights = values(seed, rows, NR + apart * LANES)
    chunks = -(-rows // CHUNK)
    dst = lines(chunks * 2 * CHUNK_BYTES)
    call_split_weights(weights.ctypes.data, weights.shape[1] * 4, rows, dst.ctypes.data)
    got = whole(dst.reshape(chunks, 2, 3, ROWS, 64)).transpose(0, 4, 2, 1, 3).reshape(chunks * CHUNK, NR)
    np.testing.assert_array_equal(got[:rows], weights[:, :NR].astype(np.float64))
    assert not got[rows:].any()


@pytest.mark.parametrize("cin", [16, 32, 48, 128, 512])
def test_products_are_as_exact_as_float32(cin: int) -> None:
    random = np.random.default_rng(cin)
    tiles = random.standard_normal((77, cin)).astype(np.float32)
    weights = random.standard_normal((cin, 3 * NR)).astype(np.float32)
    exact = tiles.astype(np.float64) @ weights.astype(np.float64)
    error = np.sqrt(np.mean((run(tiles, weights) - exact) ** 2) / np.mean(exact**2))
    assert error <= (AMX_PRODUCTS if AMX else PRODUCTS).bound


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 75), st.sampled_from([16, 32, 80]), st.integers(0, 1000))
def test_a_tiles_products_depend_on_no_other_tile(count: int, cin: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    tiles = random.standard_normal((75, cin)).astype(np.float32)
    weights = random.standard_normal((cin, 2 * NR)).astype(np.float32)
    all_of_them = run(tiles, weights)
    np.testing.assert_array_equal(run(tiles[75 - count :], weights), all_of_them[75 - count :])


@needs_amx
def test_more_tiles_than_are_split_at_once() -> None:
    cin = 512
    random = np.random.default_rng(0)
    tiles = random.standard_normal((_tiles_at_once(cin) + 21, cin)).astype(np.float32)
    weights = random.standard_normal((cin, NR)).astype(np.float32)
    np.testing.assert_array_equal(run(tiles, weights)[-21:], run(tiles[-21:], weights))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["tiles", "weights"])
def test_what_is_not_finite_stays_so(bad: float, where: str) -> None:
    given = {"tiles": np.ones((5, 32), np.float32), "weights": np.ones((32, NR), np.float32)}
    given[where][3, 2] = bad
    got = run(given["tiles"], given["weights"])
    expected = np.isfinite(given["tiles"].astype(np.float64) @ given["weights"].astype(np.float64))
    np.testing.assert_array_equal(np.isfinite(got), expected)


def test_the_largest_and_smallest_values() -> None:
    # 2**-126 is the smallest normal float32; what is smaller counts as zero in AMX, and so do the low parts of what is
    # smaller than 2**-110.
    tiles, weights = np.zeros((1, 16), np.float32), np.zeros((16, NR), np.float32)
    tiles[0, 0], weights[0, :3] = 1.0, [3.0e38, 1.1754944e-38, 1.2345678e-30]
    np.testing.assert_array_equal(run(tiles, weights)[0, :3], weights[0, :3])


def test_a_system_that_does_not_let_us() -> None:
    code = (
        "from fluxvae import system; system.may_use_amx = lambda: False\n"
        "from fluxvae.engine.kernels.cpu import vector_code, multiply\n"
        "assert not vector_code.AMX and multiply.split_bytes(5, 32) == 0\n"
        "print(multiply.pack_panel.py_func.__qualname__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    # Numba must not take what it keeps for a process that may.
    assert out.strip() == ("pack_panel_without_amx" if AMX else "pack_panel")


@pytest.mark.parametrize(("answer", "may"), [(0, True), (-1, False), (None, False)])
def test_linux_is_asked(answer: int | None, may: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def syscall(*words: int) -> int | None:
        asked.append(words)
        return answer

    library = SimpleNamespace() if answer is None else SimpleNamespace(syscall=syscall)  # a C library without it
    monkeypatch.setattr(system.ctypes, "CDLL", lambda name: library)
    assert system.may_use_amx.__wrapped__() is may
    assert asked == ([] if answer is None else [(158, 0x1023, 18)])


@pytest.mark.slow
@pytest.mark.skipif(not AMX, reason="the other tests test these kernels here")
def test_the_other_kernels_still_work_where_amx_would_serve(tmp_path: Path) -> None:
    tests = [str(Path(__file__).parent / name) for name in ("test_winograd.py", "test_amx.py", "test_cpu_attention.py")]
    own = {"NUMBA_CPU_FEATURES": "-amx-bf16", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
    result = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:]
