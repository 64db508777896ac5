"""How the head divides its work, N rows by K classes: the sizes of the parts, and loops over them.

chunks of rows      their logits exist at a time: one matmul forward, two backward
blocks of rows      of a chunk, on a CPU: for the row rule, whose temporaries stay in its cache
blocks of classes   of a chunk, on a CPU: for the backward's matmuls, likewise
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import max_dim, min_dim
from jax.export import is_symbolic_dim
from jax.typing import DTypeLike

from sxe._axes import LOCAL_CPU, Place, place
from sxe._normalizer import part_of

BLOCK_BYTES = 4 * 2**20


class Chunk(NamedTuple):
    """The default size of chunks.

    Attributes:
      bytes: of their logits. With what else is as large, chunks of that size need below 64 MiB.
      rows: that a matmul wants, which has to read the whole kernel for them.
      share: a chunk that gets more rows for that has at most one of so many parts of all rows.
    """

    bytes: int
    rows: int
    share: int


def chunk_for(platform: str, dtype: DTypeLike) -> Chunk:
    if platform != "cpu":
        # Each chunk reads the kernel twice, and reads and writes its gradient, in float32. By their
        # data sheets an H100 (3.35 TB/s, 989 TFLOP/s) does the three products of 590 rows in that
        # time in bfloat16, a TPU v6e (1.64 TB/s, 918 TFLOP/s) of 1,120; reading and writing logits
        # comes on top. In float32 it is 390 rows at most, in TF32.
        return Chunk(32 * 2**20, 2048 if jnp.dtype(dtype).itemsize == 2 else 512, 8)
    if jax.__version_info__ < (0, 11):
        return Chunk(24 * 2**20, 128, 16)  # a copy that XLA makes, for some options
    return Chunk(48 * 2**20, 128, 16)


def rows_per_chunk(rows: int, classes: int, dtype: DTypeLike, platform: str) -> int:
    """The default of ``chunk_size``.

    Logits of a fixed number of bytes need the same memory whatever the number of rows. Where so
    many classes leave fewer rows than a matmul wants, a chunk has as many as it wants, but at most
    a share of all rows: on a CPU, chunks then need a tenth of the memory that all logits would.
    """
    itemsize = 8 if dtype == jnp.float64 else 4
    most_bytes, wanted, share = chunk_for(platform, dtype)
    in_bytes = most_bytes // (itemsize * classes)
    return max_dim(max_dim(in_bytes, min_dim(wanted, rows // share)), 1)


def number_of_chunks(rows: int, chunk_size: int, is_local: bool) -> int:
    """How many chunks of one size, which is at most chunk_size, the last one padded if need be.

    Padding copies the hidden states and, where devices split the rows, moves them. Half as many
    chunks more than necessary are better, or there twice as many, if they divide the rows.
    """
    fewest = max_dim(1, -(-rows // chunk_size))
    if not _is_known(fewest):
        return fewest
    most = fewest * 3 // 2 if is_local else fewest * 2
    return next((n for n in range(fewest, most + 1) if rows and rows % n == 0), fewest)


class Tiling(NamedTuple):
    """How rows are divided into chunks: their number, the rows of each, and those that are added.

    In a program that ``jax.export`` lowers for any number of rows, all three may be expressions of
    that number.
    """

    chunks: int
    size: int
    padding: int


def tiling(
    rows: int, classes: int, dtype: DTypeLike, *, chunk_size: int | None, at: Place
) -> Tiling:
    """``chunk_size`` is the most rows that a chunk may have, None for the default."""
    most = chunk_size or rows_per_chunk(rows, classes, dtype, at.platform)
    chunks = number_of_chunks(rows, most, at.is_local)
    size = max_dim(1, -(-rows // chunks))
    return Tiling(chunks, size, size * chunks - rows)


def _is_known(*sizes: int) -> bool:
    """Whether these are numbers, and none is a symbol of a program that is exported."""
    return not any(is_symbolic_dim(size) for size in sizes)


def rows_per_block(rows: int, classes: int, at: Place) -> int:
    """How many rows of a chunk go through the row rule at a time: all, where sizes are symbols."""
    if at != LOCAL_CPU or not _is_known(rows, classes):
        return rows
    return part_of(rows, max(1, BLOCK_BYTES // (4 * classes)))


def classes_per_block(hidden_size: int, classes: int, at: Place) -> int:
    """How many classes of the kernel are multiplied at a time in the backward pass.

    XLA's CPU backend writes a product out before it adds it to the kernel's gradient, and widens
    operands that are narrower than float32 before it multiplies them. Products of 1024 columns take
    a fifth more time than those of 2048, and wider ones take no less. Where sizes are symbols, a
    block has all classes.
    """
    if at != LOCAL_CPU or not _is_known(hidden_size, classes):
        return classes
    most = min(2048, max(256, 2 * BLOCK_BYTES // (4 * max(1, hidden_size)) // 64 * 64))
    return part_of(classes, most)


def over_chunks(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any, n: int) -> Any:
    """``lax.scan`` of body over n chunks of arrays [N, ...], and of its outputs to [N, ...].

    A chunk takes every n-th row, so that where devices split the rows, each has some of them. If
    JAX differentiates the loop, it computes a chunk again and keeps nothing of the size of it.
    """
    if n == 1:
        return body(carry, rows)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry: Any, i: Array) -> tuple[Any, Any]:
        def take(x: Array) -> Array:
            x = x.reshape(-1, n, *x.shape[1:])
            return lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)

        return body(carry, jax.tree.map(take, rows))

    carry, outputs = lax.scan(step, carry, jnp.arange(n))
    return carry, jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:]), outputs)


def over_rows(
    body: Callable[[Any, Array, Any], tuple[Any, Array | None, Any]],
    carry: Any,
    tile: Array,
    rows: Any,
) -> tuple[Any, Array, Any]:
    """carry, part, outputs = body(carry, part, rows) for blocks of the rows of a tile [C, K].

    The part that comes back replaces that of the tile, in place; None leaves it.
    """
    rows_of_tile, classes = tile.shape
    size = rows_per_block(rows_of_tile, classes, place(tile))
    if size == rows_of_tile:
        carry, new, outputs = body(carry, tile, rows)
        return carry, tile if new is None else new, outputs
    blocks, left = divmod(rows_of_tile, size)

    def at(first: Array | int, n: int, carry: Any, tile: Array) -> tuple[Any, Array, Any]:
        def take(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, first, n)

        # Without the barrier XLA's CPU backend reads the part after it was replaced, from a copy of
        # all of the tile.
        part = lax.optimization_barrier(take(tile))
        carry, new, outputs = body(carry, part, jax.tree.map(take, rows))
        if new is not None:
            tile = lax.dynamic_update_slice_in_dim(tile, new, first, axis=0)
        return carry, tile, outputs

    def step(state: tuple[Any, Array], i: Array) -> tuple[tuple[Any, Array], Any]:
        carry, tile, outputs = at(i * size, size, *state)
        return (carry, tile), outputs

    (carry, tile), outputs = lax.scan(step, (carry, tile), jnp.arange(blocks))
    outputs = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outputs)
    if left:
        carry, tile, last = at(blocks * size, left, carry, tile)
        outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)
    return carry, tile, outputs


def over_classes(body: Callable[..., Any], carry: Any, classes: int, size: int) -> Any:
    """carry = body(carry, take, put) for blocks of so many classes.

    take(x) is the block of x [..., K], and put(x, part) is x with that block replaced, in place.
    """
    if size == classes:
        return body(carry, lambda x: x, lambda x, part: part)

    def at(first: Array | int, size: int, carry: Any) -> Any:
        def put(x: Array, part: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(x, part, first, axis=1)

        return body(carry, lambda x: _columns(x, first, size), put)

    blocks, left = divmod(classes, size)
    carry = lax.fori_loop(0, blocks, lambda i, carry: at(i * size, size, carry), carry)
    return at(blocks * size, left, carry) if left else carry


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _columns(x: Array, first: Array | int, size: int) -> Array:
    """x[:, first : first + size]."""
    bits = x
    if x.dtype.itemsize == 2 and jax.__version_info__ < (0, 11):
        # XLA would widen all of x once, instead of each block. Integers it can't.
        bits = lax.bitcast_convert_type(x, jnp.uint16)
    bits = lax.dynamic_slice_in_dim(bits, first, size, axis=1)
    return lax.bitcast_convert_type(bits, x.dtype)


@_columns.defjvp
def _columns_jvp(size: int, primals: tuple[Array, Any], tangents: tuple[Array, Any]) -> Any:
    (x, first), (x_dot, _) = primals, tangents
    return _columns(x, first, size), lax.dynamic_slice_in_dim(x_dot, first, size, axis=1)
