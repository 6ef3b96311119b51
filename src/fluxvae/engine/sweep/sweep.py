"""Runs one sweep: carves its scratch from the arena as its description says, and convolves block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from fluxvae.engine.calls import Call, Geometry
from fluxvae.engine.kernels import ConvBlock, Kernels, Padded, Stream
from fluxvae.engine.memory.maps import Maps
from fluxvae.engine.memory.stores import Given, MemoryMap, Store, Target
from fluxvae.engine.records import AnyNorm, Conv, PixelNorm
from fluxvae.engine.statistics import FiniteChecks, Moments, Scaling, pixel_scale
from fluxvae.engine.sweep.carving import Link, Stage, State, Sweep
from fluxvae.engine.sweep.windows import Behind, ComputedRows, Copy, MapRows, Ring, StoredRows, Window

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
class _Scratch:
    """What all convolutions of a sweep share."""

    norms: Mapping[AnyNorm, Scaling]
    work: torch.Tensor
    """The kernels' scratch."""


_Close: TypeAlias = Callable[[Padded, torch.Tensor, "Moments | None"], None]
"""Computes a block of a link's result: of a padded block of rows, to where it is told, with statistics if wanted."""


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
        *,
        norms: Mapping[AnyNorm, Scaling] | None = None,
        inner: Store | None = None,
        statistics: bool = True,
    ) -> Moments | None:
        """Convolve a whole map as ``sweep`` describes it.

        Args:
            store: the rows that the sweep starts from.
            out: where the result goes; None: nowhere, only its statistics are wanted. It may be ``store`` itself.
            norms: what every norm of a whole map in the sweep does (`norm`).
            inner: the map that is convolved, where the sweep starts from another one that is added (`Sweep.inner`).
            statistics: whether those of the result are wanted.

        Returns:
            The statistics of the result, if they are wanted.
        """
        self.maps.new_sweep()
        calls = [stage.call for stage in sweep.all_stages()]
        work = self.maps.workspace(max(map(self.kernels.workspace, calls)))  # the sweep's calls take turns with it
        scratch = _Scratch(norms or {}, work)
        rows: Stream | None = None  # the map's as far as it is computed on the way; None: it is stored
        for position, link in enumerate(sweep.chain):
            rows = self._linked(sweep, position, link, store, rows, scratch)
        position = len(sweep.chain)
        if sweep.inner:
            assert inner is not None
            main: Stream = StoredRows(inner)
            side: Stream | None = StoredRows(store) if rows is None else rows
        else:
            main, side = self._readers(sweep, position, store, rows, scratch)
        window, close = self._closing(sweep, position, main, side, scratch)
        moments = self.moments(sweep.stage.call, sweep.stage.blocks) if statistics else None
        buffer = None if sweep.buffer is None else self.maps.scratch(sweep.buffer)
        call = sweep.stage.call
        while (padded := window.advance()) is not None:
            start, stop = map(call.out, window.span)
            made = out.target(start, stop) if out is not None and buffer is None else None
            if made is None:
                assert buffer is not None
                made = buffer[: stop - start]
            close(padded, made, moments)
            if out is not None and buffer is not None:
                out.write(start, made)
            for _ in range(1 if padded.raw is None else padded.raw.blocks):
                self.tick()
        return moments

    def _readers(
        self, sweep: Sweep, position: int, store: Store, rows: Stream | None, scratch: _Scratch
    ) -> tuple[Stream, Stream | None]:
        """A link's map, once for its convolutions and once, if it is added to their result, for that."""
        residual = (*sweep.chain, sweep.link)[position].residual
        if rows is None:
            return StoredRows(store), StoredRows(store) if residual else None
        ringed = sweep.ringed(position)
        if ringed is None:
            return rows, None
        ring = Ring(rows, self.maps.scratch(ringed), self._copier(scratch.work))
        return ring, Behind(ring)

    def _closing(
        self, sweep: Sweep, position: int, main: Stream, side: Stream | None, scratch: _Scratch
    ) -> tuple[Window | MapRows, _Close]:
        """The window of a link's last convolution, and what computes a block of its result."""
        link, work = (*sweep.chain, sweep.link)[position], scratch.work
        in_place = position == len(sweep.chain) and sweep.reads_in_place(self.kernels)
        for stage in link.stages[:-1]:
            main, in_place = self._computed(stage, main, scratch, in_place), False
        last = link.stages[-1]
        at_once = sweep.blocks_at_once(self.kernels) if in_place else 1
        window, weights = self._window(last, main, scratch, in_place, at_once), self._load(last)
        projection = None if link.shortcut is None else self._projection(link.shortcut, work)
        staged = sweep.staged(position)
        staging = None if staged is None else self.maps.scratch(staged)

        def close(padded: Padded, made: torch.Tensor, moments: Moments | None) -> None:
            residual = None
            if side is not None:
                # Without staging, only the number of rows matters, since the stream answers with a view.
                residual = side.take(made if staging is None else staging[: len(made)])
                if projection is not None:
                    assert staging is not None
                    residual = projection(residual, staging[: len(made)])
            rows, raw = padded
            self.kernels.convolve(
                ConvBlock(last.call.kind, rows, weights, made, work, residual, link.scale, moments, raw)
            )

        return window, close

    def _linked(
        self, sweep: Sweep, position: int, link: Link, store: Store, rows: Stream | None, scratch: _Scratch
    ) -> Stream:
        """The rows of the result of a link whose result is not stored."""
        main, side = self._readers(sweep, position, store, rows, scratch)
        window, close = self._closing(sweep, position, main, side, scratch)
        call, block = link.stages[-1].call, self.maps.scratch(link.stages[-1].output)

        def compute(padded: Padded) -> torch.Tensor:
            start, stop = window.span
            made = block[: call.out(stop - start)]
            close(padded, made, None)
            return made

        return ComputedRows(window, compute, self._copier(scratch.work))

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

    def _computed(self, stage: Stage, source: Stream, scratch: _Scratch, in_place: bool) -> Stream:
        """The rows of a convolution whose result is not stored."""
        window = self._window(stage, source, scratch, in_place)
        weights, block = self._load(stage), self.maps.scratch(stage.output)

        def compute(padded: Padded) -> torch.Tensor:
            start, stop = window.span
            made = block[: stage.call.out(stop - start)]
            self.kernels.convolve(ConvBlock(stage.call.kind, padded.rows, weights, made, scratch.work, raw=padded.raw))
            return made

        return ComputedRows(window, compute, self._copier(scratch.work))

    def _window(
        self, stage: Stage, source: Stream, scratch: _Scratch, in_place: bool, at_once: int = 1
    ) -> Window | MapRows:
        norm = None if stage.norm is None else scratch.norms.get(stage.norm) or self.norm(stage.norm, None)
        if in_place:
            assert isinstance(source, StoredRows)
            return MapRows(source.rows, norm, stage.call.rows, stage.height, at_once)
        buffer = self.maps.scratch(stage.input)
        return Window(self.kernels, source, norm, buffer, stage.height, stage.stored, scratch.work)

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
