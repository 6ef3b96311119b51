"""One image through the network, sweep by sweep, exactly as its plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from fluxvae.engine.kernels import Kernels, cudnn
from fluxvae.engine.layer_choices import ring_rows
from fluxvae.engine.maps import Maps
from fluxvae.engine.norm import Affine, FiniteChecks, Moments
from fluxvae.engine.plan import Call, Geometry, Place, Plan
from fluxvae.engine.records import Attention, Conv, Network, Norm, Resnet, Upsample, parameters
from fluxvae.engine.storage import MemoryMap, Spill, Store
from fluxvae.engine.strips import Behind, ComputedRows, Ring, StoredRows, Stream, Window

__all__ = ["Runner"]


class Runner:
    """Runs a plan; holds its maps until `close`."""

    def __init__(
        self,
        network: Network,
        plan: Plan,
        kernels: Kernels,
        spill: Spill,
        device: torch.device,
        dtype: torch.dtype,
        tick: Callable[[], None],
    ) -> None:
        """``tick`` is called after every block and may raise to stop."""
        self._network, self._plan, self._kernels = network, plan, kernels
        self._dtype, self._tick = dtype, tick
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._maps = Maps(plan, kernels, spill, device, dtype)
        self._geometry: Geometry = plan.geometry
        # The state between layers: the current map, or the upsample that makes it from a smaller one.
        self._store: Store | None = None
        self._side = 0
        self._pending: Upsample | None = None
        self._size = (plan.geometry.height, plan.geometry.width)
        self._moments = Moments()
        self._checks = FiniteChecks(device)

    def close(self) -> None:
        """Give everything back, whatever state the run is in."""
        self._store = None
        self._maps.close()

    def run(self, raw: torch.Tensor, image: torch.Tensor) -> None:
        """Raw latents (C, lh, lw) to ``image`` (3, H, W), which is written to; raises NonFiniteMap."""
        network, layers = self._network, self._plan.layers
        self._maps.begin()
        self._side, self._pending = 0, None
        self._size = (raw.shape[1], raw.shape[2])
        self._conv_in(raw, layers[0].out)
        for index, layer in enumerate(network.layers):
            planned = layers[index + 1]
            following = network.layers[index + 1] if index + 1 < len(network.layers) else None
            if isinstance(layer, Upsample):
                self._upsample(layer, planned.out)
            elif isinstance(layer, Attention):
                self._attention(layer, statistics=not isinstance(following, Upsample))
            else:
                assert planned.middle is not None
                self._resnet(layer, planned.middle, planned.out, statistics=not isinstance(following, Upsample))
        self._conv_out(image)
        self._maps.drop(self._store, self._side)
        self._store = None  # a view of the arena, which would outlive it into the next image
        self._checks.settle()

    # -- what a sweep is made of -------------------------------------------------------------------------------

    def _call(self, conv: Conv, kind: str, size: tuple[int, int]) -> Call:
        g = self._geometry
        rows = g.block(kind, conv.cin, conv.cout, *size)
        return Call(kind, conv.cin, conv.cout, rows, size[1], g.itemsize, g.cast, size[0] * size[1])  # type: ignore[arg-type]

    def _shortcut_call(self, shortcut: Conv, call: Call) -> Call:
        return replace(call, kind="linear", cin=shortcut.cin, cout=shortcut.cout, statistics=False)

    def _window(
        self, source: Stream, affine: Affine | None, call: Call, size: tuple[int, int], work: torch.Tensor
    ) -> Window:
        return Window(self._kernels, source, affine, (*size, call.cin), call.rows, self._maps.scratch, work)

    def _affine(self, norm: Norm) -> Affine:
        return self._kernels.affine(self._moments, norm, self._wide, self._checks)

    # -- layers ------------------------------------------------------------------------------------------------

    def _conv_in(self, raw: torch.Tensor, place: Place) -> None:
        network = self._network
        rows = self._post_quant(raw.to(self._dtype))
        self._maps.new_sweep()
        out = self._maps.new(place, self._side, (*self._size, network.conv_in.cout))
        self._maps.new_sweep()
        call = self._call(network.conv_in, "conv3", self._size)
        work = self._maps.workspace(call)
        window = self._window(StoredRows(MemoryMap(rows)), None, call, self._size, work)
        self._sweep(window, network.conv_in, call, out, work, statistics=True)
        self._store = out

    def _post_quant(self, latents: torch.Tensor) -> torch.Tensor:
        """(C, lh, lw) to rows (lh, lw, C), through the 1x1 convolution that some models have before the decoder."""
        rows = latents.permute(1, 2, 0)
        if self._network.post_quant is None:
            return rows.contiguous()
        weight, bias = parameters(self._network.post_quant.module)
        weight, bias = weight.to(self._dtype), None if bias is None else bias.to(self._dtype)
        if cudnn.available(rows.device):
            rows = cudnn.convolve(rows.contiguous(), weight)
            return (rows if bias is None else rows.add_(bias)).contiguous()
        return torch.nn.functional.conv2d(latents[None], weight, bias)[0].permute(1, 2, 0).contiguous()

    def _upsample(self, layer: Upsample, place: Place) -> None:
        small, store, side = self._size, self._store, self._side
        assert store is not None
        self._size = (2 * small[0], 2 * small[1])
        out = None if place == "recompute" else self._maps.new(place, 1 - side, (*self._size, layer.conv.cout))
        self._maps.new_sweep()
        call = self._call(layer.conv, "up", small)
        work = self._maps.workspace(call)
        window = self._window(StoredRows(store), None, call, small, work)
        weights = self._maps.load(layer.conv, call)
        block = None
        if not isinstance(out, MemoryMap):
            block = self._maps.scratch((2 * call.rows, self._size[1], layer.conv.cout))
        self._moments = Moments()
        while (padded := window.advance()) is not None:
            start, stop = 2 * window.span[0], 2 * window.span[1]
            rows = out.target(start, stop) if out is not None and block is None else None
            if rows is None:
                assert block is not None
                rows = block[: stop - start]
            partial = self._kernels.upsample(padded, weights, rows, True, work)
            assert partial is not None
            self._moments.add(partial)
            if out is not None and block is not None:
                out.write(start, rows)
            self._tick()
        if out is None:
            self._pending = layer
        else:
            self._maps.drop(store, side)
            self._store, self._side = out, 1 - side

    def _attention(self, layer: Attention, statistics: bool) -> None:
        store = self._store
        assert store is not None
        affine = self._affine(layer.norm)
        call = self._call(layer.q, "attend", self._size)
        normed = self._maps.in_memory(1 - self._side, (*self._size, layer.q.cin))
        self._maps.new_sweep()
        work = self._maps.workspace(call)
        for start, stop in self._blocks(call):
            rows = normed.rows[start:stop]
            self._kernels.prologue(store.read(start, stop, rows), affine, False, rows, work)
            self._tick()
        weights = self._maps.load_attention(layer, call)
        staging = None
        if not isinstance(store, MemoryMap):
            staging = self._maps.scratch((call.rows, self._size[1], layer.q.cin))
        self._moments = Moments()
        tokens = normed.rows.view(-1, layer.q.cin)
        for start, stop in self._blocks(call):
            out = store.read(start, stop, normed.rows[:0] if staging is None else staging[: stop - start])
            partial = self._kernels.attend(layer, weights, normed.rows[start:stop], tokens, out, statistics, work)
            if partial is not None:
                self._moments.add(partial)
            if staging is not None:
                store.write(start, out)
            self._tick()
        self._maps.drop(normed, 1 - self._side)

    def _resnet(self, layer: Resnet, middle: Place, place: Place, statistics: bool) -> None:
        store, side, pending = self._store, self._side, self._pending
        assert store is not None
        size, other = self._size, 1 - self._side
        norm1 = self._affine(layer.norm1)
        call1, call2 = self._call(layer.conv1, "conv3", size), self._call(layer.conv2, "conv3", size)

        # First sweep: the first convolution, for its statistics at least.
        inner = None if middle == "recompute" else self._maps.new(middle, other, (*self._size, layer.conv1.cout))
        self._maps.new_sweep()
        up = None if pending is None else self._call(pending.conv, "up", (size[0] // 2, size[1] // 2))
        if up is not None:
            up = replace(up, statistics=False)
        work = self._maps.workspace(call1, *([up] if up else []))
        source = self._source(store, pending, up, work)
        self._sweep(self._window(source, norm1, call1, size, work), layer.conv1, call1, inner, work, statistics=True)
        norm2 = self._affine(layer.norm2)

        # Second sweep: the second convolution, the shortcut, and what was not kept.
        in_place: Store | None = None
        if inner is not None and middle == place:
            in_place = inner
        elif pending is None and isinstance(store, MemoryMap) == (place == "memory") and layer.shortcut is None:
            in_place = store
        out = in_place if in_place is not None else self._maps.new(place, other, (*self._size, layer.conv2.cout))
        self._maps.new_sweep()
        calls = [call2, *([up] if up else []), *([replace(call1, statistics=False)] if inner is None else [])]
        if layer.shortcut is not None:
            calls.append(self._shortcut_call(layer.shortcut, call2))
        work = self._maps.workspace(*calls)
        residual: Stream
        if inner is None:
            source = self._source(store, pending, up, work)
            if pending is None:
                residual = StoredRows(store)
            else:
                rows = ring_rows(call2.rows, call1.rows)
                source = ring = Ring(source, self._maps.scratch((rows, size[1], layer.conv1.cin)))
                residual = Behind(ring)
            feed: Stream = self._convolved(source, norm1, layer.conv1, call1, work)
        else:
            residual = self._source(store, pending, up, work)
            feed = StoredRows(inner)
        self._sweep(
            self._window(feed, norm2, call2, size, work), layer.conv2, call2, out, work,
            statistics=statistics, residual=residual, direct=isinstance(store, MemoryMap) and pending is None,
            shortcut=layer.shortcut, scale=layer.scale,
        )  # fmt: skip

        # What remains is the result.
        if out is not store:
            self._maps.drop(store, side)
        if inner is not None and out is not inner:
            self._maps.drop(inner, other)
        self._store, self._pending = out, None
        self._side = side if out is store else other

    def _conv_out(self, image: torch.Tensor) -> None:
        network, store = self._network, self._store
        assert store is not None
        affine = self._affine(network.norm_out)
        self._maps.new_sweep()
        call = self._call(network.conv_out, "conv3", self._size)
        work = self._maps.workspace(call)
        window = self._window(StoredRows(store), affine, call, self._size, work)
        weights = self._maps.load(network.conv_out, call)
        block = self._maps.scratch((call.rows, self._size[1], network.conv_out.cout))
        while (padded := window.advance()) is not None:
            start, stop = window.span
            rows = block[: stop - start]
            self._kernels.conv3x3(padded, weights, affine, window.pad_rows, rows, None, 1.0, False, work)
            self._checks.require(rows, f"the output of {network.conv_out.name} holds NaN or Inf")
            image[:, start:stop].copy_(rows.permute(2, 0, 1))
            self._tick()

    # -- sweeps ------------------------------------------------------------------------------------------------

    def _source(self, store: Store, pending: Upsample | None, up: Call | None, work: torch.Tensor) -> Stream:
        """The current map's rows: read, or computed from the smaller map."""
        if pending is None or up is None:
            return StoredRows(store)
        window = self._window(StoredRows(store), None, up, (self._size[0] // 2, self._size[1] // 2), work)
        weights = self._maps.load(pending.conv, up)
        block = self._maps.scratch((2 * up.rows, self._size[1], pending.conv.cout))

        def compute(padded: torch.Tensor) -> torch.Tensor:
            rows = block[: 2 * (len(padded) - 2)]
            self._kernels.upsample(padded, weights, rows, False, work)
            return rows

        return ComputedRows(window, compute)

    def _convolved(self, source: Stream, affine: Affine, conv: Conv, call: Call, work: torch.Tensor) -> Stream:
        """The rows of a convolution that is not stored."""
        weights = self._maps.load(conv, call)
        window = self._window(source, affine, call, self._size, work)
        block = self._maps.scratch((call.rows, self._size[1], conv.cout))

        def compute(padded: torch.Tensor) -> torch.Tensor:
            rows = block[: len(padded) - 2]
            self._kernels.conv3x3(padded, weights, affine, window.pad_rows, rows, None, 1.0, False, work)
            return rows

        return ComputedRows(window, compute)

    def _sweep(
        self,
        window: Window,
        conv: Conv,
        call: Call,
        out: Store | None,
        work: torch.Tensor,
        *,
        statistics: bool,
        residual: Stream | None = None,
        direct: bool = False,
        shortcut: Conv | None = None,
        scale: float = 1.0,
    ) -> None:
        """Convolve a whole map. ``direct``: the residual's rows can be added from where they are."""
        kernels, width = self._kernels, self._size[1]
        weights = self._maps.load(conv, call)
        block = staging = projected = projection = None
        if not isinstance(out, MemoryMap):
            block = self._maps.scratch((call.rows, width, conv.cout))
        if shortcut is not None:
            projection = self._maps.load(shortcut, self._shortcut_call(shortcut, call))
            projected = self._maps.scratch((call.rows, width, shortcut.cout))
        if residual is not None and (shortcut is not None or not direct):
            staging = self._maps.scratch((call.rows, width, conv.cout if shortcut is None else shortcut.cin))
        self._moments = Moments()
        while (padded := window.advance()) is not None:
            start, stop = window.span
            rows = out.target(start, stop) if out is not None and block is None else None
            if rows is None:
                assert block is not None
                rows = block[: stop - start]
            added = None
            if residual is not None:
                # Without staging only the number of rows matters: the stream answers with a view.
                into = rows if staging is None else staging[: stop - start]
                added = residual.take(into)
                if projected is not None:
                    if added is not into:
                        into.copy_(added)
                    kernels.linear(into, projection, projected[: stop - start])
                    added = projected[: stop - start]
            partial = kernels.conv3x3(
                padded, weights, window.affine, window.pad_rows, rows, added, scale, statistics, work
            )
            if partial is not None:
                self._moments.add(partial)
            if out is not None and block is not None:
                out.write(start, rows)
            self._tick()

    def _blocks(self, call: Call) -> Iterator[tuple[int, int]]:
        for start in range(0, self._size[0], call.rows):
            yield start, min(start + call.rows, self._size[0])
