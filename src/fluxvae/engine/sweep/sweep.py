"""Runs one sweep: carves its scratch from the arena as its description says, and convolves block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fluxvae.engine.calls import Call, Geometry
from fluxvae.engine.kernels import ConvBlock, Kernels, Stream
from fluxvae.engine.memory.maps import Maps
from fluxvae.engine.memory.stores import Given, MemoryMap, Store, Target
from fluxvae.engine.records import AnyNorm, Conv, PixelNorm
from fluxvae.engine.statistics import FiniteChecks, Moments, Scaling, pixel_scale
from fluxvae.engine.sweep.carving import Stage, State, Sweep
from fluxvae.engine.sweep.windows import Behind, ComputedRows, Copy, Ring, StoredRows, Window

__all__ = ["Current", "Run"]


@dataclass(frozen=True)
class Current:
    """The map between two layers: what a layer takes and gives back."""

    store: Store
    """The rows that are stored: those of the map itself, or of the smaller one that it is computed from."""
    side: int
    """The end of the arena at which they are, if they are in memory: 0 or 1."""
    size: tuple[int, int]
    """The height and width of the map itself."""
    state: State
    moments: Moments | None
    """The statistics of the map itself, if the layer that made it was asked for them."""


@dataclass(frozen=True)
class Run:
    """One image on its way through the network, to pixels or from them: what the layers compute with."""

    kernels: Kernels
    maps: Maps
    checks: FiniteChecks
    geometry: Geometry
    dtype: torch.dtype
    """The dtype that is computed in."""
    given: torch.Tensor
    """(C, height, width): raw latents, or pixels."""
    made: torch.Tensor
    """(C, height, width): where the pixels, or the moments of the latents, are written to."""
    tick: Callable[[], None]
    """Called after every block; it may raise to stop the run."""

    def start(self) -> Current:
        """What is given, from which the first layer starts."""
        height, width = self.given.shape[1:]
        return Current(Given(self.given), 0, (height, width), State("memory"), None)

    def projected(self, conv: Conv) -> Store:
        """What is given, through the 1x1 convolution that some decoders begin with."""
        return MemoryMap(self.kernels.pointwise(self.given.to(self.dtype), conv))

    def result(self, name: str) -> Made:
        """What is made as a map that is written by rows; ``name`` is the layer's, for the error about NaN or Inf."""
        return Made(self.made, self.checks, f"the output of {name} holds NaN or Inf")

    def project_result(self, conv: Conv) -> None:
        """Put what is made through the 1x1 convolution that some encoders end with."""
        rows = self.kernels.pointwise(self.made.to(self.dtype), conv)
        self.checks.require(rows, f"the output of {conv.name} holds NaN or Inf")
        self.made.copy_(rows.permute(2, 0, 1))

    def norm(self, norm: AnyNorm, moments: Moments | None) -> Scaling:
        """What ``norm`` does to the map with these statistics, which only a norm of the whole map needs."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        if isinstance(norm, PixelNorm):
            return pixel_scale(norm, wide)
        assert moments is not None, f"nobody asked for the statistics of the input of {norm.name}"
        return self.kernels.affine(moments, norm, wide, self.checks)

    def moments(self, call: Call, blocks: int) -> Moments:
        """What the statistics of a map are gathered in that so many calls make, in this sweep's scratch."""
        return self.kernels.moments(call, blocks, self.maps.workspace(self.kernels.statistics(call, blocks)[0]))

    def sweep(
        self,
        sweep: Sweep,
        store: Store,
        out: Target | None,
        norms: Mapping[AnyNorm, Scaling],
        *,
        residual: Store | None = None,
        scale: float = 1.0,
        statistics: bool = True,
    ) -> Moments | None:
        """Convolve a whole map as ``sweep`` describes it.

        Args:
            store: the rows that the sweep starts from.
            out: where the result goes; None: nowhere, only its statistics are wanted. It may be ``residual`` itself.
            norms: what every norm in the sweep does (`norm`).
            residual: the rows that are added, or from which that is computed what is added.
            scale: what the sum is divided by.
            statistics: whether those of the result are wanted.

        Returns:
            The statistics of the result, if they are wanted.
        """
        self.maps.new_sweep()
        calls = [stage.call for stage in sweep.all_stages()]
        work = self.maps.workspace(max(map(self.kernels.workspace, calls)))  # the sweep's calls take turns with it
        rows: Stream = StoredRows(store)
        added: Stream | None = None if residual is None else StoredRows(residual)
        for index, stage in enumerate(sweep.feeds):
            rows = self._computed(stage, rows, norms, work)
            if index == 0 and sweep.ring is not None:
                rows = ring = Ring(rows, self.maps.scratch(sweep.ring), self._copier(work))
                added = Behind(ring)
        for stage in sweep.residual_feeds:
            assert added is not None
            added = self._computed(stage, added, norms, work)
        window = self._window(sweep.stage, rows, norms, work)
        moments = self.moments(sweep.stage.call, sweep.stage.blocks) if statistics else None
        self._compute(sweep, window, out, added, scale, moments, work)
        return moments

    def _compute(
        self,
        sweep: Sweep,
        window: Window,
        out: Target | None,
        added: Stream | None,
        scale: float,
        moments: Moments | None,
        work: torch.Tensor,
    ) -> None:
        """Compute the blocks of the sweep's result one after the other, store each, and tick after it."""
        call = sweep.stage.call
        weights = self._load(sweep.stage)
        buffer = None if sweep.buffer is None else self.maps.scratch(sweep.buffer)
        projection = None if sweep.shortcut is None else self._projection(sweep.shortcut, work)
        staging = None if sweep.residual is None else self.maps.scratch(sweep.residual)
        while (padded := window.advance()) is not None:
            start, stop = map(call.out, window.span)
            rows = out.target(start, stop) if out is not None and buffer is None else None
            if rows is None:
                assert buffer is not None
                rows = buffer[: stop - start]
            residual = None
            if added is not None:
                # Without a buffer, only the number of rows matters, since the stream answers with a view.
                residual = added.take(rows if staging is None else staging[: stop - start])
                if projection is not None:
                    assert staging is not None
                    residual = projection(residual, staging[: stop - start])
            self.kernels.convolve(ConvBlock(call.kind, padded, weights, rows, work, residual, scale, moments))
            if out is not None and buffer is not None:
                out.write(start, rows)
            self.tick()

    def _projection(self, stage: Stage, work: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The residual's 1x1 convolution, as a function of its rows and of the scratch that they must stand in."""
        weights, block = self._load(stage), self.maps.scratch(stage.output)

        def project(rows: torch.Tensor, staging: torch.Tensor) -> torch.Tensor:
            if rows is not staging:
                self.kernels.prologue(rows, None, False, staging, work)
            projected = block[: len(staging)]
            self.kernels.convolve(ConvBlock(stage.call.kind, staging, weights, projected, work))
            return projected

        return project

    def _computed(self, stage: Stage, source: Stream, norms: Mapping[AnyNorm, Scaling], work: torch.Tensor) -> Stream:
        """The rows of a convolution whose result is not stored."""
        window = self._window(stage, source, norms, work)
        weights, block = self._load(stage), self.maps.scratch(stage.output)

        def compute(padded: torch.Tensor) -> torch.Tensor:
            rows = block[: stage.call.out(len(padded) - 2)]
            self.kernels.convolve(ConvBlock(stage.call.kind, padded, weights, rows, work))
            return rows

        return ComputedRows(window, compute, self._copier(work))

    def _window(self, stage: Stage, source: Stream, norms: Mapping[AnyNorm, Scaling], work: torch.Tensor) -> Window:
        norm = None if stage.norm is None else norms[stage.norm]
        return Window(self.kernels, source, norm, self.maps.scratch(stage.input), stage.height, stage.stored, work)

    def _copier(self, work: torch.Tensor) -> Copy:
        """What copies rows within the arena, by the threads that compute."""
        return lambda rows, into: self.kernels.prologue(rows, None, False, into, work)

    def _load(self, stage: Stage) -> Any:
        """A convolution's weights as the kernels want them, valid until the next sweep."""
        room = self.maps.workspace(self.kernels.loaded(stage.call))
        return self.kernels.load(stage.conv, stage.call.kind, self.dtype, room)


class Made:
    """What is made as a target. It is looked at for NaN and Inf: every block at once on a CPU, the whole on a GPU.

    A GPU would be asked four more questions for every block. Only where a block is rounded to a narrower dtype on its
    way is it looked at there too, since it may be finite before that and not after it.
    """

    def __init__(self, made: torch.Tensor, checks: FiniteChecks, otherwise: str) -> None:
        self._made, self._checks, self._otherwise = made, checks, otherwise
        self._unseen = False

    def close(self) -> None:
        """Look at what was not looked at block by block; all blocks are written."""
        if self._unseen:
            self._checks.require(self._made, self._otherwise)

    def target(self, start: int, stop: int) -> torch.Tensor | None:
        """None, as it is not laid out channels last."""
        return None

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Write rows (n, W, C) into it (C, H, W), in its dtype."""
        if self._checks.at_once or rows.dtype != self._made.dtype:
            self._checks.require(rows, self._otherwise)
        else:
            self._unseen = True
        self._made[:, start : start + len(rows)].copy_(rows.permute(2, 0, 1))
