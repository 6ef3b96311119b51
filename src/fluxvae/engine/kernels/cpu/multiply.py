"""The product of many tiles and a layer's weights, by the inner loops that this processor has.

`amx` where it has AMX, else `products`. Everything that differs between the two is here: how weights lie, what scratch
is needed, and the order of the blocks. Compiled by Numba, without the GIL. Addresses and strides are in bytes.
"""

from __future__ import annotations

from fluxvae.engine.kernels.cpu.amx import (
    CHUNK,
    CHUNK_BYTES,
    ROWS,
    multiply_16,
    multiply_32,
    release_registers,
    shape_registers,
    split_rows,
    split_weights,
)
from fluxvae.engine.kernels.cpu.pixel_loops import copy
from fluxvae.engine.kernels.cpu.products import GROUP_BYTES, NR, THIRD, TILES, products_1, products_2, products_3
from fluxvae.engine.kernels.cpu.vector_code import AMX, LANES, LINE, VECTOR_BYTES, compiled

__all__ = ["multiply", "multiply_parts", "pack_panel", "panel_bytes", "split_bytes"]

VECTOR_CODE = "92c1fcf797b3d95c"
"""The digest of the files that this one calls, for the reason that `winograd_tasks.VECTOR_CODE` gives."""
SPLIT_BYTES = 1100 << 10
"""The bytes of tiles' parts that are multiplied by all weights before the next ones: half of the L2 cache of the
processors that have AMX, so that one panel's weights have room beside them."""


def panel_bytes(cin: int) -> int:
    """Bytes that the weights of NR output channels take, as `multiply` reads them."""
    return -(-cin // CHUNK) * 2 * CHUNK_BYTES if AMX else cin * NR * 4


def split_bytes(tiles: int, cin: int) -> int:
    """Bytes of scratch that `multiply` needs for so many tiles."""
    if not AMX:
        return 0
    return -(-min(tiles, _tiles_at_once(cin)) // ROWS) * -(-cin // CHUNK) * CHUNK_BYTES


def _tiles_at_once(cin: int) -> int:
    half = -(-cin // CHUNK) * CHUNK_BYTES
    return max(SPLIT_BYTES // (2 * half), 1) * 2 * ROWS


_tiles_at_once_compiled = compiled(_tiles_at_once)


@compiled
def multiply_parts(parts: int, tiles: int, weights: int, chunks: int, out: int, ahead: int, lines: int) -> None:
    """Multiply tiles by one panel's weights, both of them in parts, by AMX; see `amx` for the arguments."""
    half, whole, rest = chunks * CHUNK_BYTES, tiles // (2 * ROWS), tiles % (2 * ROWS)
    if whole:
        shape_registers(ROWS, ROWS)
    for _ in range(whole):
        multiply_32(parts, half, weights, chunks, out, ahead, lines)
        parts, out, ahead = parts + 2 * half, out + 2 * ROWS * NR * 4, ahead + lines * chunks * LINE
    if rest > ROWS:
        shape_registers(ROWS, rest - ROWS)
        multiply_32(parts, half, weights, chunks, out, ahead, lines)
    elif rest > 0:
        shape_registers(rest, rest)
        multiply_16(parts, half, weights, chunks, out, ahead, lines)


@compiled
def multiply(
    left: int, tiles: int, weights: int, panel_weights: int, panels: int, cin: int, out: int, panel_out: int, split: int
) -> None:
    """Multiply ``tiles`` tiles of cin channels by the weights of all panels.

    Args:
        left: the tiles, in groups of THIRD as `products` has them, one after the other.
        weights: those of all panels, `panel_bytes` or ``panel_weights`` each; what follows the last panel is fetched
            into the caches, because it is needed next as a rule.
        out: (tiles, NR) float32 of every panel, ``panel_out`` bytes apart.
        split: scratch of `split_bytes`.
    """
    blocks, group = cin // LANES, THIRD * cin * 4
    if AMX:
        chunks, most = -(-cin // CHUNK), _tiles_at_once_compiled(cin)
        done = 0
        while done < tiles:
            count = min(most, tiles - done)
            split_rows(left + done // THIRD * group, group, VECTOR_BYTES, GROUP_BYTES, count, blocks, split)
            lines = 2 * CHUNK_BYTES // LINE // -(-count // (2 * ROWS)) + 1
            for panel in range(panels):
                right, target = weights + panel * panel_weights, out + panel * panel_out + done * NR * 4
                multiply_parts(split, count, right, chunks, target, right + panel_weights, lines)
            done += count
        release_registers()
        return
    pace = NR * 4 // (-(-tiles // TILES)) + 1
    for panel in range(panels):
        right = weights + panel * panel_weights
        done = 0
        while done < tiles:
            begin, target = left + done // THIRD * group, out + panel * panel_out + done * NR * 4
            ahead = right + panel_weights + done // TILES * pace * cin
            rest = tiles - done
            if rest > 2 * THIRD:
                products_3(begin, group, right, blocks, target, ahead, pace)
            elif rest > THIRD:
                products_2(begin, group, right, blocks, target, ahead, pace)
            else:
                products_1(begin, group, right, blocks, target, ahead, pace)
            done += TILES


@compiled
def pack_panel(src: int, cin: int, dst: int) -> None:
    """Lay out the weights of NR output channels, (cin, NR) float32, as `multiply` reads them."""
    if AMX:
        split_weights(src, NR * 4, cin, dst)
    else:
        copy(src, dst, cin * NR // LANES)
