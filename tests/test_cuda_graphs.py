"""CUDA graphs without a GPU: the engine records and replays as it would there, on the CPU's tensors.

`Recorder` stands in for a graph. It keeps every operation with the very tensors that it was given and made, and a
replay writes to them again. So whatever in a run does not depend on fixed addresses and operations alone shows, as it
would in a graph: a decision by a value, memory that is somewhere else, a number that was read. `test_gpu` has the real
ones.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from engine_models import Shape
from fluxvae import Decoder, devices
from fluxvae.engine import graphs
from fluxvae.engine.exact import ExactDecoder, ExactEncoder, OutOfMemoryWarning, PrecisionRetryWarning
from fluxvae.engine.graphs import Graph
from fluxvae.engine.memory.free import available_memory
from fluxvae.errors import DecodeCancelled, InvalidOptionError, NonFiniteOutputError

CPU = torch.device("cpu")
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
"""Operations whose answer a program waits for, which a graph refuses to record."""


class Recorder(TorchDispatchMode):
    """Records operations; called, it does them again."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in READS:
            raise RuntimeError(f"{name} while a graph is recorded")
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not name.startswith("empty"):
            self._done.append((func, args, kwargs or {}, result))
        return result

    def __call__(self) -> None:
        for func, args, kwargs, result in self._done:
            for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, values)
    return found


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The recorders that stood in for graphs, one for each recording."""
    made: list[Recorder] = []

    def record(launch: Callable[[], None]) -> Recorder:
        recorder = Recorder()
        with recorder:
            launch()
        made.append(recorder)
        return recorder

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("fluxvae.engine.planned.check_device", lambda device: None)
    return made


SHAPE = Shape(height=6, width=5)


def engine(shape: Shape = SHAPE, dtype: torch.dtype = torch.float32, **options: Any) -> ExactDecoder:
    return ExactDecoder(shape.vae(dtype), kernels="torch", cuda_graphs=True, block_values=2000, **options)


def latents(seed: int, shape: Shape = SHAPE, batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, shape.latent_channels, shape.height, shape.width, generator=generator).to(dtype)


def plain(decoder: ExactDecoder, raw: torch.Tensor) -> torch.Tensor:
    return ExactDecoder(decoder._vae, kernels="torch", block_values=2000).decode(raw)


def test_the_same_bits_as_without(recorded: list[Recorder]) -> None:
    decoder = engine()
    for seed in range(3):
        raw = latents(seed, batch=2)
        assert torch.equal(decoder.decode(raw), plain(decoder, raw))
    assert len(recorded) == 1
    assert torch.equal(decoder.decode(latents(7)), plain(decoder, latents(7))), "the same graph for another batch"
    assert len(recorded) == 1


def test_an_encode_too(recorded: list[Recorder]) -> None:
    vae = SHAPE.vae(encoder=True)
    pixels = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder = ExactEncoder(vae, kernels="torch", cuda_graphs=True, block_values=2000)
    true = ExactEncoder(vae, kernels="torch", block_values=2000)
    for given in (pixels, pixels.flip(0)):
        assert torch.equal(encoder.encode(given), true.encode(given))
    assert len(recorded) == 1


def test_one_for_each_size_and_plan_and_a_size_comes_back(recorded: list[Recorder]) -> None:
    decoder, other = engine(), Shape(height=4, width=7)
    for shape in (SHAPE, other, SHAPE, other):
        raw = latents(1, shape)
        assert torch.equal(decoder.decode(raw), plain(decoder, raw))
    assert len(recorded) == 2
    decoder.memory_limit = decoder.smallest_limit(6, 5)
    assert decoder.plan(6, 5).rungs != ExactDecoder(decoder._vae, kernels="torch", block_values=2000).plan(6, 5).rungs


def test_what_the_plan_says(recorded: list[Recorder]) -> None:
    decoder = engine()
    plan, without = decoder.plan(6, 5, 3), ExactDecoder(decoder._vae, kernels="torch", block_values=2000).plan(6, 5, 3)
    latent, one_image = SHAPE.latent_channels * 30 * 4, 3 * 30 * decoder.network.scale**2 * 4
    assert without.graph_bytes is None
    assert plan.peak_bytes == without.peak_bytes + one_image + latent
    assert plan.graph_bytes == plan.peak_bytes - 3 * one_image
    assert "CUDA graph: holds" in str(plan)
    assert "CUDA graph" not in str(without)
    decoder.decode(latents(0, batch=3))
    assert decoder._graphs.held_bytes == plan.graph_bytes


def test_plans_that_spill_have_no_graph_and_say_so(recorded: list[Recorder]) -> None:
    shape = Shape(height=24, width=20)
    decoder = engine(shape)
    decoder.memory_limit = decoder.smallest_limit(24, 20)
    plan = decoder.plan(24, 20)
    assert plan.spill_bytes
    assert plan.graph_bytes == 0
    assert "CUDA graph: none, because maps are spilled" in str(plan)
    raw = latents(0, shape)
    assert torch.equal(decoder.decode(raw), plain(decoder, raw))
    assert recorded == []


def test_the_least_recently_used_goes_first_where_the_limit_has_no_room() -> None:
    sizes = [Shape(height=6, width=5 + index) for index in range(3)]
    decoder = engine()
    most = max(decoder.plan(6, shape.width).peak_bytes for shape in sizes)
    held = [decoder.plan(6, shape.width).graph_bytes or 0 for shape in sizes]
    decoder.memory_limit = most + held[0] + held[1] // 2  # room for one graph beside the one that is being made

    def widths() -> list[int]:
        return [graph._given.shape[2] for graph in decoder._graphs._graphs.values()]

    seen = []
    for index in (0, 1, 0, 2):
        decoder.decode(latents(0, sizes[index]))
        seen.append(widths())
        assert decoder._graphs.held_bytes <= decoder.memory_limit
    assert seen == [[5], [5, 6], [6, 5], [5, 7]]


def test_preparing_keeps_none_of_its_own_and_all_others(recorded: list[Recorder]) -> None:
    decoder = engine()
    decoder.prepare()
    assert len(recorded) == 1
    assert decoder._graphs.held_bytes == 0
    decoder, raw = engine(), latents(0)
    decoder.decode(raw)
    decoder.prepare()
    decoder.decode(raw)
    assert len(recorded) == 2


def test_no_more_than_eight_are_kept() -> None:
    decoder = engine()
    for width in range(1, 11):
        decoder.decode(latents(0, Shape(height=1, width=width)))
    assert [graph._given.shape[2] for graph in decoder._graphs._graphs.values()] == list(range(3, 11))


def test_what_is_held_counts_as_free_where_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a size that was planned without its graph would get a smaller plan with it, and be recorded again."""
    decoder = engine()
    decoder.decode(latents(0))
    held = decoder._graphs.held_bytes
    monkeypatch.setattr(
        "fluxvae.engine.planned.available_memory", lambda device: available_memory(CPU)._replace(nbytes=1000)
    )
    assert decoder.limit()[0] == (1000 + held) * 9 // 10


def test_weights_that_change_in_place_are_used_and_replaced_ones_are_recorded_anew(recorded: list[Recorder]) -> None:
    decoder, raw = engine(), latents(0)
    before = decoder.decode(raw)
    with torch.no_grad():
        decoder._vae.decoder.conv_in.weight.mul_(1.5)
    changed = decoder.decode(raw)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, plain(decoder, raw))
    assert len(recorded) == 1
    conv = decoder._vae.decoder.conv_in
    conv.weight = torch.nn.Parameter(conv.weight.detach() * 0.5, requires_grad=False)
    assert torch.equal(decoder.decode(raw), plain(decoder, raw))
    assert len(recorded) == 2


def test_another_network_drops_them() -> None:
    decoder = engine()
    decoder.decode(latents(0))
    old = weakref.ref(next(iter(decoder._graphs._graphs.values())))
    decoder._vae.decoder.conv_norm_out.eps = 1e-3
    raw = latents(1)
    assert torch.equal(decoder.decode(raw), plain(decoder, raw))
    gc.collect()
    assert old() is None


def test_nan_is_an_error_and_the_graph_serves_on(recorded: list[Recorder]) -> None:
    decoder, raw = engine(), latents(0)
    decoder.decode(raw)
    bad = raw.clone()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteOutputError, match="got NaN or Inf"):
        decoder.decode(bad)
    assert torch.equal(decoder.decode(raw), plain(decoder, raw))
    assert len(recorded) == 1


def test_overflow_in_half_precision_is_decoded_again_in_float32(
    recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "computes_directly", lambda dtype, device: True)  # whatever the processor
    vae = SHAPE.vae(torch.float16)
    decoder = ExactDecoder(vae, kernels="torch", cuda_graphs=True)
    calm = latents(0, dtype=torch.float16)
    decoder.decode(calm)
    assert len(recorded) == 1
    with torch.no_grad():
        vae.decoder.up_blocks[-2].upsamplers[0].conv.weight.mul_(4e3)
        vae.decoder.up_blocks[-1].resnets[0].conv_shortcut.weight.mul_(4e3)
    for _ in range(2):
        with pytest.warns(PrecisionRetryWarning):
            decoder.decode(calm)
    assert len(recorded) == 1, "what is done again is not recorded"


def test_progress_and_cancelling(recorded: list[Recorder]) -> None:
    decoder, raw = engine(), latents(0, batch=2)
    total = decoder.plan(6, 5, 2).total_blocks
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        seen.clear()
        decoder.decode(raw, progress=lambda *now: seen.append(now))
        assert seen[0] == (0, total)
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)
    assert [done for done, _ in seen] == [0, total // 2, total], "image by image where a graph computes them"
    asked = []
    with pytest.raises(DecodeCancelled):
        decoder.decode(raw, cancel=lambda: asked.append(1) or len(asked) > 1)
    assert len(asked) == 2


def test_memory_that_runs_out_drops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, other = engine(), Shape(height=4, width=7)
    decoder.decode(latents(0))
    run, failed = Graph.__init__, []

    def fail_once(self: Graph, *arguments: Any) -> None:
        if not failed:
            failed.append(decoder._graphs.held_bytes)
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert decoder._graphs.held_bytes == 0
        run(self, *arguments)

    monkeypatch.setattr(Graph, "__init__", fail_once)
    raw = latents(0, other)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = decoder.decode(raw)
    assert failed[0] > 0
    assert any(issubclass(warning.category, OutOfMemoryWarning) for warning in caught)
    assert torch.equal(image, plain(decoder, raw))


def test_nothing_is_read_while_a_graph_is_recorded() -> None:
    with pytest.raises(RuntimeError, match="while a graph is recorded"), Recorder():
        bool(torch.ones(1).all())


def test_where_there_is_no_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxvae.engine.planned.check_device", graphs.check_device)
    decoder = engine()  # a GPU is there, and the model may still move to it
    with pytest.raises(InvalidOptionError, match="cuda_graphs: got True with a model on cpu"):
        decoder.decode(latents(0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidOptionError, match="PyTorch sees no GPU"):
        engine()
    with pytest.raises(InvalidOptionError, match="cuda_graphs: got True with engine='diffusers'"):
        Decoder(SHAPE.vae(), engine="diffusers", cuda_graphs=True)
