"""Convolutions that read a map's rows from where they are, through their norm: the bits of those that have a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_models import Shape, needs_vector_code
from fluxvae.engine.calls import Call, Geometry, Place
from fluxvae.engine.exact import ExactDecoder, ExactEncoder
from fluxvae.engine.kernels import ConvBlock, Raw
from fluxvae.engine.kernels.cpu.costs import WinogradCosts
from fluxvae.engine.kernels.cpu.kernels import WinogradKernels
from fluxvae.engine.kernels.direct.costs import DirectCosts
from fluxvae.engine.layers.resnet import Resnet
from fluxvae.engine.network import read_network
from fluxvae.engine.records import Conv
from fluxvae.engine.statistics import Affine, Moments
from fluxvae.engine.sweep.carving import State
from fluxvae.engine.sweep.windows import MapRows
from fluxvae.engine.way import DECODE

pytestmark = needs_vector_code
KERNELS = WinogradKernels(torch.device("cpu"))


def conv(cin: int, cout: int, precise: bool) -> Conv:
    torch.manual_seed(cin + cout)
    module = torch.nn.Conv2d(cin, cout, 3, padding=1).requires_grad_(False)
    return Conv("conv", cin, cout, 3, module, precise)


def norm(channels: int) -> Affine:
    generator = torch.Generator().manual_seed(3)
    return Affine(*(torch.randn(channels, generator=generator) for _ in range(2)))


def run(one: Conv, kind: Any, rows: torch.Tensor, count: int, raw: Raw | None) -> tuple[torch.Tensor, ...]:
    """A block of ``count`` rows, in the window that ``rows`` are or in place."""
    width = rows.shape[1]
    call = Call(kind, one.cin, one.cout, count, width, 4, False, precise=one.precise)
    into, work = (torch.empty(size(call), dtype=torch.uint8) for size in (KERNELS.loaded, KERNELS.workspace))
    weights = KERNELS.load(one, kind, torch.float32, into)
    out = torch.full((call.out(count), call.out(width), one.cout), torch.nan)
    moments = Moments()
    KERNELS.convolve(ConvBlock(kind, rows, weights, out, work, statistics=moments, raw=raw))
    return out, *moments.stacked()


@given(
    channels=st.sampled_from([(16, 16), (32, 16), (80, 48), (144, 64)]),
    kind=st.sampled_from(["conv3", "up"]),
    size=st.tuples(st.integers(1, 26), st.integers(1, 40)),
    data=st.data(),
    normed=st.booleans(),
    precise=st.booleans(),
)
def test_a_block_in_place_has_the_bits_of_one_in_a_window(
    channels: tuple[int, int], kind: Any, size: tuple[int, int], data: st.DataObject, normed: bool, precise: bool
) -> None:
    height, width = size
    cin, cout = channels
    one = conv(cin, cout, precise and kind == "conv3")
    start = data.draw(st.integers(0, height - 1))
    stop = data.draw(st.integers(start + 1, height))
    # What lies around the map is no number, so that a value which is read from there shows.
    around = torch.full((height + 4, width, cin), torch.nan)
    rows = around[2:-2].copy_(torch.randn(height, width, cin, generator=torch.Generator().manual_seed(height)))
    through = norm(cin) if normed else None

    window = torch.zeros(stop - start + 2, width, cin)
    above, below = start > 0, stop < height
    inside = rows[start - above : stop + below]
    KERNELS.prologue(inside, through, True, window[1 - above : len(window) - 1 + below], torch.empty(0))
    expected = run(one, kind, window, stop - start, None)
    found = run(one, kind, inside, stop - start, Raw(through, above, below))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@given(
    channels=st.sampled_from([(16, 16), (80, 48), (144, 64), (512, 32)]),
    kind=st.sampled_from(["conv3", "up"]),
    size=st.tuples(st.sampled_from([6, 12]), st.integers(2, 4), st.integers(1, 30)),
    around=st.tuples(st.booleans(), st.booleans()),
    residual=st.booleans(),
    workers=st.integers(1, 3),
)
def test_blocks_of_one_call_have_the_bits_that_they_have_alone(
    channels: tuple[int, int], kind: Any, size: tuple[int, int, int], around: tuple[bool, bool], residual: bool,
    workers: int,
) -> None:  # fmt: skip
    """Those of as many channels as one thread multiplies alone, and of more; with rows around them, and without."""
    height, blocks, width = size
    one, through = conv(*channels, precise=False), norm(channels[0])
    above, below = around
    generator = torch.Generator().manual_seed(height)
    rows = torch.randn(blocks * height + above + below, width, channels[0], generator=generator)
    call = Call(kind, *channels, height, width, 4, False)
    before = torch.get_num_threads()
    torch.set_num_threads(workers)
    try:
        into, work = (torch.empty(cost(call), dtype=torch.uint8) for cost in (KERNELS.loaded, KERNELS.workspace))
        weights = KERNELS.load(one, kind, torch.float32, into)
        out = torch.full((blocks * call.out(height), call.out(width), one.cout), torch.nan)
        added = torch.randn(out.shape, generator=generator) if residual and kind == "conv3" else None
        expected, alone, together = out.clone(), Moments(), Moments()
        for index in range(blocks):
            start, stop = index * height + above, (index + 1) * height + above
            raw = Raw(through, start > 0, stop < len(rows))
            part = slice(index * call.out(height), (index + 1) * call.out(height))
            KERNELS.convolve(
                ConvBlock(
                    kind, rows[start - raw.above : stop + raw.below], weights, expected[part], work,
                    None if added is None else added[part], statistics=alone, raw=raw,
                )
            )  # fmt: skip
        raw = Raw(through, above, below, blocks)
        KERNELS.convolve(ConvBlock(kind, rows, weights, out, work, added, statistics=together, raw=raw))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, expected)
    assert together.counts == alone.counts
    assert all(torch.equal(*pair) for pair in zip(together.stacked(), alone.stacked(), strict=True))


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 4))
def test_the_rows_of_a_map_block_by_block(height: int, block: int, at_once: int) -> None:
    rows = torch.arange(height, dtype=torch.float32).view(height, 1, 1)
    reader, seen, blocks = MapRows(rows, None, block, height, at_once), [], 0
    while (padded := reader.advance()) is not None:
        start, stop = reader.span
        assert padded.raw is not None
        assert 1 <= padded.raw.blocks <= at_once
        assert stop - start == padded.raw.blocks * block or (padded.raw.blocks == 1 and stop == height)
        assert padded.raw == Raw(None, start > 0, stop < height, padded.raw.blocks)
        assert padded.rows.flatten().tolist() == list(range(max(start - 1, 0), min(stop + 1, height)))
        assert padded.rows.data_ptr() == rows[max(start - 1, 0)].data_ptr()
        seen += range(start, stop)
        blocks += padded.raw.blocks
    assert seen == list(range(height))
    assert blocks == -(-height // block), "every block is counted"


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_an_image_has_the_same_bits_by_windows(monkeypatch: pytest.MonkeyPatch, part: float) -> None:
    """With every limit's mixture of maps in memory, spilled and computed again."""
    shape = Shape(widths=(16, 32, 64), height=17, width=13, layers_per_block=2, seed=5)
    vae, half = shape.vae(), shape.vae(encoder=True)
    raw, pixels = shape.latents(), shape.pixels(more=(3, 1))
    options: dict[str, Any] = {"kernels": "winograd", "block_values": 12_000}  # blocks of a few rows
    decoder, encoder = ExactDecoder(vae, **options), ExactEncoder(half, **options)
    for engine, size in ((decoder, (17, 13)), (encoder, tuple(pixels.shape[2:]))):
        low, high = engine.smallest_limit(*size), engine.plan(*size).peak_bytes
        engine.memory_limit = int(low + part * (high - low))
    found = decoder.decode(raw), encoder.encode(pixels)
    asked = []
    monkeypatch.setattr(WinogradCosts, "reads_in_place", lambda self, call: asked.append(call) and False)
    expected = ExactDecoder(vae, **options).decode(raw), ExactEncoder(half, **options).encode(pixels)
    assert asked
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_every_block_is_reported_where_one_call_has_several(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(widths=(16, 32, 64), height=17, width=13, layers_per_block=2, seed=5)
    decoder = ExactDecoder(shape.vae(), kernels="winograd", block_values=12_000)
    told: list[tuple[int, int]] = []
    blocks: list[int] = []
    advance = MapRows.advance

    def noted(self: MapRows) -> Any:
        if (padded := advance(self)) is not None:
            blocks.append(padded.raw.blocks)
        return padded

    monkeypatch.setattr(MapRows, "advance", noted)
    decoder.decode(shape.latents(), progress=lambda done, total: told.append((done, total)))
    total = decoder.plan(17, 13).total_blocks
    assert max(blocks) > 1
    assert told == [(done, total) for done in range(total + 1)]


# -- where it is done --------------------------------------------------------------------------------------------------

PLACES: tuple[Place, ...] = ("memory", "spill", "recompute")


def resnets() -> list[Resnet]:
    """One of as many channels out as in, and one with a shortcut."""
    layers = read_network(Shape(widths=(16, 32, 32)).vae(), DECODE).layers
    found = [layer for layer in layers if isinstance(layer, Resnet)]
    return [next(one for one in found if (one.shortcut is None) == plain) for plain in (True, False)]


@pytest.mark.parametrize("middle", PLACES)
@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("start", PLACES[:2])
def test_no_map_is_read_in_place_that_is_not_in_memory_or_is_written_over(
    middle: Place, place: Place, start: Place
) -> None:
    geometry = Geometry(64, 64, 4, row_multiple=6, block_values=12 * 64 * 32)
    for layer in resnets():
        sweeps = layer._sweeps(geometry, (64, 64), State(start), middle, place)
        over_itself = {
            "memory": place == "memory" and not layer._in_place(State(start), place),  # the result replaces the middle
            "recompute": layer._in_place(State(start), place),  # the first convolution reads what is written over
            "spill": True,  # the last sweep's map is not in memory
        }[middle]
        read = middle if middle != "recompute" else start
        assert sweeps[0].reads_in_place(WinogradCosts("cpu")) == (start == "memory")
        assert sweeps[-1].reads_in_place(WinogradCosts("cpu")) == (read == "memory" and not over_itself)
        assert not any(sweep.reads_in_place(DirectCosts("cpu")) for sweep in sweeps)
        for sweep in sweeps:
            made_alone = sweep.buffer is None and sweep.staged(0) is None and len(sweep.link.stages) == 1
            assert (sweep.blocks_at_once(WinogradCosts("cpu")) > 1) == (
                made_alone and sweep.reads_in_place(WinogradCosts("cpu"))
            )


def test_scratch_has_no_window_for_what_is_read_in_place() -> None:
    layer = resnets()[0]
    sweep = layer._sweeps(Geometry(64, 64, 4), (64, 64), State("memory"), "memory", "memory")[0]
    window = sweep._bytes(sweep.stage.input)
    there, not_there = WinogradCosts("cpu"), WinogradCosts("cpu")
    not_there.reads_in_place = lambda call: False  # type: ignore[method-assign]
    assert sweep.step(not_there).scratch - sweep.step(there).scratch == window


def test_a_norm_of_each_pixel_has_a_window() -> None:
    call = Call("conv3", 32, 32, 12, 64, 4, False, tokens=4096)
    costs = WinogradCosts("cpu")
    assert costs.reads_in_place(call)
    assert not costs.reads_in_place(replace(call, by_pixel=True))
    assert not costs.reads_in_place(replace(call, kind="down"))
    assert not costs.reads_in_place(replace(call, cin=33))
    assert not costs.reads_in_place(replace(call, tokens=100)), "a small map is PyTorch's"


def test_the_statistics_of_blocks_at_once_are_bounded() -> None:
    costs = WinogradCosts("cpu")
    call = Call("conv3", 128, 128, 12, 64, 4, False, tokens=4096)
    counts = [costs.blocks_at_once(replace(call, width=width)) for width in (64, 256, 1024, 4096)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 1, "one of those that have more alone"
    assert costs.blocks_at_once(replace(call, by_pixel=True)) == 1
    assert costs.blocks_at_once(replace(call, rows=11)) == 1, "its tiles would reach into the next block"
    assert DirectCosts("cpu").blocks_at_once(call) == 1
