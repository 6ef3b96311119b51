"""Streams of rows: how one sweep reads a map strip by strip, whether the map is stored or computed on the way.

Every operation walks its input from top to bottom in blocks cut by absolute position. A block's input stands in a
`Window`: the block's rows and one halo row on either side, in scratch laid out the same way every time. The last two
rows of a window are the first two of the next, so no row is read, normalised or computed twice within a sweep, and
whatever a sweep has read may be overwritten: that is what makes working in place safe. Kernels that pad and normalise
on the way need no window where the map stays as it is (`MapRows`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from fluxvae.engine.kernels import Kernels, Padded, Raw, Refill, Stream
from fluxvae.engine.memory.stores import MemoryMap, Store
from fluxvae.engine.statistics import Scaling

__all__ = ["Behind", "ComputedRows", "Copy", "MapRows", "Ring", "StoredRows", "Window"]

Copy: TypeAlias = Callable[[torch.Tensor, torch.Tensor], None]
"""Copies the first rows to the second, which have the same shape."""


class StoredRows:
    """The rows of a map that is stored."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._at = 0
        self.views = isinstance(store, MemoryMap)

    @property
    def rows(self) -> torch.Tensor:
        """All rows of a map in memory, where they are."""
        assert isinstance(self._store, MemoryMap), "the map is not in memory: the plan was wrong"
        return self._store.rows

    def take(self, into: torch.Tensor) -> torch.Tensor:
        """Give the next rows, as `Stream.take` says."""
        start, self._at = self._at, self._at + len(into)
        return self._store.read(start, self._at, into)

    def pour(self, into: torch.Tensor, put: Copy) -> None:
        """Bring the next rows there, as `Stream.pour` says."""
        put(self.take(into), into)


class Window:
    """The padded input of a 3x3 convolution, moving down one block at a time."""

    def __init__(
        self,
        kernels: Kernels,
        source: Stream,
        norm: Scaling | None,
        buffer: torch.Tensor,
        height: int,
        stored: int,
        work: torch.Tensor,
    ) -> None:
        """Make a window over a map. It starts above the map's first row.

        Args:
            source: the map's rows.
            norm: what rows go through on their way in, with SiLU after it; None lets them in as they are.
            buffer: scratch of (rows + 2, width, channels), for blocks of so many rows.
            height: how many rows the blocks have together.
            stored: the height of the map, which may have a row more than that.
            work: the kernels' scratch.
        """
        self._kernels, self._source, self._norm, self._work = kernels, source, norm, work
        self._buffer, self._rows, self._height, self._stored = buffer, len(buffer) - 2, height, stored
        self._next = 0
        self._have = 0
        self.span = (0, 0)

    def advance(self) -> Padded | None:
        """The next block (n + 2, width, channels), whose rows `span` then says as (start, stop); None at the end."""
        start, stop = self._next, min(self._next + self._rows, self._height)
        if start == stop:
            return None
        need = max(min(stop + 1, self._stored), self._have)
        fresh = (1 + self._have - start, 1 + need - start)
        bottom = stop - start + 1 if stop == self._stored else None
        self._kernels.refill(Refill(self._buffer, start == 0, fresh, bottom, self._source, self._norm, self._work))
        self._next, self._have = stop, need
        self.span = (start, stop)
        return Padded(self._buffer[: stop - start + 2])


class MapRows:
    """The blocks of a map that stays as it is, for kernels that pad and normalise on the way: in a `Window`'s place."""

    def __init__(self, rows: torch.Tensor, norm: Scaling | None, block: int, height: int, at_once: int = 1) -> None:
        """Begin at the top of the map.

        Args:
            rows: all of the map.
            norm: what rows are still to go through, with SiLU after it; None: nothing.
            block: how many rows a block has.
            height: how many rows the blocks have together.
            at_once: how many blocks `advance` gives at most. What is left of the map for a last, lower block comes
                alone.
        """
        self._map, self._norm, self._rows, self._height, self._at_once = rows, norm, block, height, at_once
        self.span = (0, 0)

    def advance(self) -> Padded | None:
        """The next blocks and the rows above and below them that there are, as `Window.advance`."""
        start = self.span[1]
        blocks = max(1, min((self._height - start) // self._rows, self._at_once))
        stop = min(start + blocks * self._rows, self._height)
        if start == stop:
            return None
        self.span = (start, stop)
        above, below = start > 0, stop < len(self._map)
        return Padded(self._map[start - above : stop + below], Raw(self._norm, above, below, blocks))


class ComputedRows:
    """The rows of an operation's output, computed block by block when asked for."""

    views = False

    def __init__(self, window: Window | MapRows, compute: Callable[[Padded], torch.Tensor], copy: Copy) -> None:
        """``compute`` turns the window's padded block into output rows, which its next call may overwrite."""
        self._window, self._compute, self._copy = window, compute, copy
        self._block: torch.Tensor | None = None
        self._used = 0

    def take(self, into: torch.Tensor) -> torch.Tensor:
        """Give the next rows, as `Stream.take` says."""
        self.pour(into, self._copy)
        return into

    def pour(self, into: torch.Tensor, put: Copy) -> None:
        """Bring the next rows there, as `Stream.pour` says, from the blocks in which they are computed."""
        filled = 0
        while filled < len(into):
            if self._block is None or self._used == len(self._block):
                padded = self._window.advance()
                assert padded is not None
                self._block, self._used = self._compute(padded), 0
            n = min(len(into) - filled, len(self._block) - self._used)
            put(self._block[self._used : self._used + n], into[filled : filled + n])
            filled, self._used = filled + n, self._used + n


class Ring:
    """Passes a stream on and keeps its last rows, for a second reader that follows behind."""

    views = False

    def __init__(self, source: Stream, kept: torch.Tensor, copy: Copy) -> None:
        """``kept`` (rows, width, channels) must hold the distance between the two readers."""
        self._source, self._kept, self._copy = source, kept, copy
        self._at = 0
        self._behind = 0

    def take(self, into: torch.Tensor) -> torch.Tensor:
        """Give the next rows, as `Stream.take` says."""
        self.pour(into, self._copy)
        return into

    def pour(self, into: torch.Tensor, put: Copy) -> None:
        """Bring the next rows there, as `Stream.pour` says."""

        def keep_and_put(rows: torch.Tensor, part: torch.Tensor) -> None:
            for at, piece in self._pieces(self._at, len(rows)):
                self._copy(rows[piece], self._kept[at : at + piece.stop - piece.start])
            self._at += len(rows)
            put(rows, part)

        self._source.pour(into, keep_and_put)

    def again(self, into: torch.Tensor) -> torch.Tensor:
        """The next rows for the reader that follows behind: a view of where they are kept, if that is in one piece."""
        assert self._at - self._behind <= len(self._kept), "the ring was planned too small"
        pieces = self._pieces(self._behind, len(into))
        self._behind += len(into)
        if len(pieces) == 1:
            at = pieces[0][0]
            return self._kept[at : at + len(into)]
        for at, part in pieces:
            self._copy(self._kept[at : at + part.stop - part.start], into[part])
        return into

    def _pieces(self, start: int, count: int) -> list[tuple[int, slice]]:
        """Rows start..start+count of the map: where each contiguous piece stands in the ring, and its slice."""
        size, pieces, done = len(self._kept), [], 0
        while done < count:
            at = (start + done) % size
            n = min(size - at, count - done)
            pieces.append((at, slice(done, done + n)))
            done += n
        return pieces


class Behind:
    """The rows of a ring for its second reader, which follows behind."""

    views = False

    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    def take(self, into: torch.Tensor) -> torch.Tensor:
        """Give the next rows, as `Stream.take` says."""
        return self._ring.again(into)

    def pour(self, into: torch.Tensor, put: Copy) -> None:
        """Bring the next rows there, as `Stream.pour` says."""
        put(self.take(into), into)
