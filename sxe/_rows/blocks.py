"""Blocks of rows, for a CPU: what is computed of one of them stays in a cache.

XLA's CPU backend writes out what it doesn't fuse, such as terms that two sums share.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from sxe._arrays import are_known
from sxe._backend import Backend

Sums = TypeVar("Sums")
Tiles = tuple[Array, ...]


def part_of(size: int, most: int) -> int:
    """How long the parts of an axis are that may have so many elements at most.

    If possible it divides the axis: a remainder is a second program to compile.
    """
    most = min(size, most)
    return next((n for n in range(most, most // 2, -1) if size % n == 0), most)


def rows_per_block(shape: tuple[int, ...], backend: Backend) -> int:
    """How many rows of an array [N, K] are taken at a time."""
    rows, classes = shape
    if not backend.loops_over_rows or not are_known(rows, classes):
        return rows
    return part_of(rows, max(1, backend.row_block_bytes // (4 * classes)))


def in_row_blocks(
    body: Callable[[Sums, Tiles, Any], tuple[Sums, Any, Any]],
    sums: Sums,
    tiles: Tiles,
    rows: Any,
    *,
    backend: Backend,
) -> tuple[Sums, Tiles, Any]:
    """sums, tiles, outputs = body(sums, tiles, rows), a block of rows of tiles [C, K] at a time.

    A part of a tile that comes back replaces the one that went in, in place; None leaves it. On an
    accelerator, and for a small tile, there is one block.
    """
    count = tiles[0].shape[0]
    size = rows_per_block((count, sum(tile.shape[1] for tile in tiles)), backend)
    if size == count:
        sums, parts, outputs = body(sums, tiles, rows)
        return sums, _replaced(tiles, parts), outputs
    blocks, left = divmod(count, size)

    def block(first: Array | int, size: int, sums: Sums, tiles: Tiles) -> tuple[Sums, Tiles, Any]:
        def take(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, first, size)

        # Without the barrier XLA's CPU backend reads the part after it was replaced, from a copy of
        # all of the tile.
        parts = lax.optimization_barrier(tuple(map(take, tiles)))
        sums, new, outputs = body(sums, parts, jax.tree.map(take, rows))
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        new = (part if part is None else put(t, part) for t, part in zip(tiles, new, strict=True))
        return sums, _replaced(tiles, tuple(new)), outputs

    def step(state: tuple[Sums, Tiles], i: Array) -> tuple[tuple[Sums, Tiles], Any]:
        sums, tiles, outputs = block(i * size, size, *state)
        return (sums, tiles), outputs

    (sums, tiles), outputs = lax.scan(step, (sums, tiles), jnp.arange(blocks))
    outputs = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outputs)
    if left:
        sums, tiles, last = block(blocks * size, left, sums, tiles)
        outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)
    return sums, tiles, outputs


def _replaced(tiles: Tiles, new: tuple[Array | None, ...]) -> Tiles:
    """Each tile, or what replaces it."""
    return tuple(t if part is None else part for t, part in zip(tiles, new, strict=True))
