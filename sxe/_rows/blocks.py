"""Loops over blocks of rows, for CPUs: the temporaries of one block fit in the cache.

XLA's CPU backend writes to memory what it doesn't fuse, such as terms that two sums share.
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
    """The size of the parts of an axis of length ``size``: at most ``most`` elements.

    If possible it divides ``size``, because a remainder is a second program to compile.
    """
    most = min(size, most)
    return next((n for n in range(most, most // 2, -1) if size % n == 0), most)


def rows_per_block(shape: tuple[int, ...], backend: Backend) -> int:
    """The number of rows in each block of an array [N, K]."""
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
    """Computes sums, tiles, outputs = body(sums, tiles, rows), one block of rows at a time.

    Tiles are [C, K]. The body returns a new part for each tile, which replaces the old part in
    place, or None to keep the old part. Accelerators and small tiles use a single block.
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

        # Without the barrier, XLA's CPU backend copies the whole tile to read the old part after it
        # has been replaced.
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
    """The tiles, each replaced with its new array if there is one."""
    return tuple(t if part is None else part for t, part in zip(tiles, new, strict=True))
