"""The spilled maps of a GPU. They lie in pinned host memory and are copied while the GPU computes.

The next rows are on their way to the device while it computes with the last ones, and rows that were computed leave it
while it computes the next block. All copies go through one queue in order, so rows that were written are there when
they are read again. The two calls of `Copies` order the device's own work against that queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from fluxvae.engine.calls import STAGES

__all__ = ["Copies", "HostMap", "SideStream", "pinned_cache"]

_CHUNK_BYTES = 256 << 20
"""The size of a piece of host memory. PyTorch rounds pinned memory up to a power of two; pinning is slow, and PyTorch
keeps what it has pinned. Pieces of this size waste little and fit the next map too."""


class Copies(Protocol):
    """A queue of copies between host and device, run in order beside the device's work."""

    def start(self, copy: Callable[[], None]) -> Any:
        """Queue a copy, to run after what the device has been asked to do so far. Returns the mark of its end."""

    def wait(self, mark: Any) -> None:
        """Let what the device is asked to do from now on come after that copy. The caller itself does not wait."""


class SideStream:
    """Copies (see `Copies`) on a CUDA stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, copy: Callable[[], None]) -> torch.cuda.Event:
        """See `Copies`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
            mark: torch.cuda.Event = self._stream.record_event()
        return mark

    def wait(self, mark: torch.cuda.Event) -> None:
        """See `Copies`."""
        torch.cuda.current_stream(self._device).wait_event(mark)


class HostMap:
    """A map (height, width, channels) in host memory: a `Store` whose rows are best read in blocks and in order."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, copies: Copies) -> None:
        self._shape, self._dtype, self._device, self._copies = shape, dtype, device, copies
        height, row_bytes = shape[0], shape[1] * shape[2] * dtype.itemsize
        self._chunk = max(1, _CHUNK_BYTES // row_bytes)
        self._chunks = [
            torch.empty(
                (min(self._chunk, height - at), *shape[1:]),
                dtype=dtype,
                device="cpu",
                pin_memory=device.type == "cuda",
            )
            for at in range(0, height, self._chunk)
        ]
        self._ahead = [_Stage() for _ in range(STAGES - 1)]
        self._out = _Stage()

    def read(self, start: int, stop: int, into: torch.Tensor) -> torch.Tensor:
        """The rows, which are on the device already if they follow the last ones; as many more are fetched ahead."""
        found = next((stage for stage in self._ahead if stage.start == start and stage.stop >= stop), None)
        if found is None:
            self._copies.wait(self._copies.start(lambda: self._move(start, into, to_host=False)))
            # A reader that begins takes a stage that no other reader uses or, if there is none, the one filled first.
            found = min(self._ahead, key=lambda stage: (stage.start >= 0, stage.age))
        else:
            self._copies.wait(found.mark)
            into.copy_(found.rows(len(into)))
        self._fetch(found, stop, min(stop + len(into), self._shape[0]))
        return into

    def target(self, start: int, stop: int) -> torch.Tensor | None:
        """None, as the map's rows are not on the device."""
        return None

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Copy the rows to the host by way of a stage of their own, so that ``rows`` may be overwritten at once."""
        for stage in self._ahead:
            if stage.start < start + len(rows) and start < stage.stop:
                stage.start = stage.stop = -1  # what was fetched is no longer what the map holds
        out = self._out
        self._settle(out, len(rows))
        staged = out.rows(len(rows))
        staged.copy_(rows)
        out.mark = self._copies.start(lambda: self._move(start, staged, to_host=True))

    def close(self) -> None:
        """Give the memory back, the device's once its copies are done. PyTorch keeps pinned memory for later maps."""
        for stage in (*self._ahead, self._out):
            if stage.mark is not None:
                self._copies.wait(stage.mark)
        self._ahead, self._out, self._chunks = [], _Stage(), []

    def _fetch(self, stage: _Stage, start: int, stop: int) -> None:
        stage.age = 1 + max(other.age for other in self._ahead)
        stage.start = stage.stop = -1
        if start < stop:
            self._settle(stage, stop - start)
            rows = stage.rows(stop - start)
            stage.mark = self._copies.start(lambda: self._move(start, rows, to_host=False))
            stage.start, stage.stop = start, stop

    def _settle(self, stage: _Stage, count: int) -> None:
        """Make ``stage`` ready for so many rows: wait for its last copy, and enlarge its buffer if needed."""
        if stage.mark is not None:
            self._copies.wait(stage.mark)
        if stage.buffer is None or len(stage.buffer) < count:
            stage.buffer = None
            stage.buffer = torch.empty((count, *self._shape[1:]), dtype=self._dtype, device=self._device)

    def _move(self, start: int, rows: torch.Tensor, *, to_host: bool) -> None:
        """Copy rows between host and device, across the borders of the map's chunks."""
        done = 0
        while done < len(rows):
            chunk, at = divmod(start + done, self._chunk)
            host = self._chunks[chunk][at : at + len(rows) - done]
            part = rows[done : done + len(host)]
            (host if to_host else part).copy_(part if to_host else host, non_blocking=True)
            done += len(host)


class _Stage:
    """A buffer on the device, what is in it or on its way there, and when that copy ends."""

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None
        self.start = self.stop = -1
        self.mark: Any = None
        self.age = 0

    def rows(self, count: int) -> torch.Tensor:
        """The first rows of the buffer."""
        assert self.buffer is not None
        return self.buffer[:count]


def pinned_cache() -> int:
    """Bytes of pinned host memory that PyTorch holds for the next map."""
    if not hasattr(torch.cuda, "host_memory_stats") or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    stats = torch.cuda.host_memory_stats()
    return max(0, int(stats.get("allocated_bytes.current", 0)) - int(stats.get("active_bytes.current", 0)))
