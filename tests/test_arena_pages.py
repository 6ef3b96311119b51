"""The pages of an arena: made by many at once, for what is handed out and for nothing beyond."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxvae.engine.calls import ALIGN
from fluxvae.engine.memory import arena, pages
from fluxvae.engine.memory.arena import Arena

PAGE = mmap.PAGESIZE
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages are there")


def resident(block: mmap.mmap) -> list[bool]:
    """Which of a block's pages are there."""
    found = (ctypes.c_ubyte * (len(block) // PAGE))()
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(block)), found) == 0
    return [bool(page & 1) for page in found]


@on_linux
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("start", "nbytes"), [(0, 24 << 20), (1, 9 << 20), (5 * PAGE + 7, PAGE + 100), (100, 200)])
def test_whole_pages_are_made_and_no_others(start: int, nbytes: int, threads: int) -> None:
    block = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_NOHUGEPAGE)
    block[start] = 7
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    pages.make_pages(address + start, nbytes, threads)
    first, last = -(-start // PAGE), (start + nbytes) // PAGE
    expected = {start // PAGE, *range(first, last)}
    assert {index for index, there in enumerate(resident(block)) if there} == expected
    assert block[start] == 7
    array = np.frombuffer(block, np.uint8)
    assert int(array.sum(dtype=np.int64)) == 7, "new pages are zeros, and old ones as they were"


def test_a_system_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (None, lambda address, nbytes, advice: -1):
        monkeypatch.setattr(pages, "_madvise", lambda one=one: one)
        pages.make_pages(0, 1 << 30, 2)


@given(data=st.data(), size=st.integers(20, 60))
def test_each_byte_is_asked_for_once_when_it_is_handed_out(data: st.DataObject, size: int) -> None:
    """As `plan.peak_of` counts them: how far both ends have reached so far."""
    block = torch.zeros((size + 1) * ALIGN, dtype=torch.uint8)
    made: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "make_pages", lambda address, nbytes, threads: made.append((address, nbytes)))
        one = Arena(size * ALIGN, block)
        base, reached = one._flat.data_ptr(), [0, 0]
        for _ in range(data.draw(st.integers(1, 8))):
            maps = [data.draw(st.integers(0, size // 3)) for _ in range(2)]
            scratch = data.draw(st.integers(0, size // 3))
            for side, rows in enumerate(maps):
                one.release(side)
                if rows:
                    one.map(side, (rows, 1, ALIGN), torch.uint8)
            one.new_sweep()
            if scratch:
                one.scratch((scratch * ALIGN,), torch.uint8)
            reached = [max(reached[0], maps[0] + scratch), max(reached[1], maps[1])]
            total = sum(nbytes for _, nbytes in made)
            assert total == min(size, sum(reached)) * ALIGN
            starts = sorted((address - base, address - base + nbytes) for address, nbytes in made)
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(starts))
            assert all(0 <= start < stop <= size * ALIGN for start, stop in starts)


def test_a_card_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*told: Any) -> None:
        raise AssertionError(told)

    monkeypatch.setattr(arena, "make_pages", refuse)
    Arena(4 * ALIGN, torch.empty(5 * ALIGN, dtype=torch.uint8, device="meta")).map(0, (4, 1, ALIGN), torch.uint8)
