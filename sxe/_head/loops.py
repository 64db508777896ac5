"""How the head divides its work, N rows by K classes: the sizes of the parts, and loops over them.

chunks of rows      the logits of one chunk exist at a time; one matrix product in the forward pass
                    and two in the backward pass
blocks of rows      within a chunk, on a CPU, for the row functions
blocks of classes   within a chunk, on a CPU, for the matrix products
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import max_dim, min_dim
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike

from sxe._arrays import are_known, jvp_of_moved, zeros_like
from sxe._backend import Backend, bits_of
from sxe._rows.blocks import part_of

T = TypeVar("T")
Shared = TypeVar("Shared")
Carry = TypeVar("Carry")
Rows = TypeVar("Rows")


class Tiling(NamedTuple):
    """How rows are divided into chunks: number of chunks, rows per chunk, and rows of padding.

    In a program that ``jax.export`` lowers for any number of rows, all three may be symbolic
    expressions of that number.
    """

    chunks: int
    size: int
    padding: int


def tiling(
    rows: int, classes: int, *, chunk_size: int | None, dtype: DTypeLike, backend: Backend
) -> Tiling:
    """Divide rows into chunks of at most ``chunk_size`` rows. None is the default size."""
    most = chunk_size or _rows_per_chunk(rows, classes, dtype, backend)
    chunks = _number_of_chunks(rows, most, backend)
    size = max_dim(1, -(-rows // chunks))
    return Tiling(chunks, size, size * chunks - rows)


def _rows_per_chunk(rows: int, classes: int, dtype: DTypeLike, backend: Backend) -> int:
    """The default of ``chunk_size``.

    A fixed number of bytes for a chunk's logits makes the memory independent of the number of rows.
    With many classes, the rows that fit may be too few for an efficient matmul. A chunk then has as
    many rows as the matmul needs, but at most a fixed share of all rows: an eighth, or a sixteenth
    on a CPU.
    """
    itemsize = 8 if dtype == jnp.float64 else 4
    limits = backend.chunk_limits(dtype)
    wanted = min_dim(limits.wanted_rows, rows // limits.fewest_chunks)
    return max_dim(max_dim(limits.logits_bytes // (itemsize * classes), wanted), 1)


def _number_of_chunks(rows: int, chunk_size: int, backend: Backend) -> int:
    """The number of equal chunks of at most chunk_size rows. The last one is padded if necessary.

    Padding copies the hidden states and, if the rows are sharded, moves them between devices. A
    number of chunks that divides the rows needs no padding. It is used if it is at most 1.5 times
    the necessary number, or twice the necessary number on several devices.
    """
    fewest = max_dim(1, -(-rows // chunk_size))
    if not are_known(fewest):
        return fewest
    most = fewest * 3 // 2 if backend.is_local else fewest * 2
    return next((n for n in range(fewest, most + 1) if rows and rows % n == 0), fewest)


# The type of ``body`` in ``over_chunks``: from (shared, carry, rows, all_run) to (carry, outputs).
Body = Callable[[Shared, Carry, Rows, bool], tuple[Carry, Any]]


def rows_of_part(chunk_size: int) -> int:
    """The number of rows in a part of a chunk. Parts run the rows that do not fill a whole chunk.

    Without parts, a single row that is left would take as long as a whole chunk. A chunk of 128
    rows or more has 4, 5, 3 or 2 parts: the first of these numbers that divides its rows. Other
    chunks have one part.
    """
    if chunk_size < 128:
        return chunk_size
    return chunk_size // next(parts for parts in (4, 5, 3, 2, 1) if chunk_size % parts == 0)


class Steps(NamedTuple):
    """The number of whole chunks to run, of parts of a chunk to run after them, and of all rows."""

    chunks: int
    parts: int
    rows: int


def steps_of(rows: int, chunk_size: int) -> Steps:
    """The steps that run this number of rows."""
    part = rows_of_part(chunk_size)
    chunks, left = divmod(rows, chunk_size)
    parts = -(-left // part)
    return Steps(chunks, parts, chunks * chunk_size + parts * part)


def over_chunks(
    body: Body[Shared, Carry, Rows],
    arrays: tuple[Shared, Carry, Rows],
    chunks: int,
    *,
    runs: Array | None = None,
) -> tuple[Carry, Any]:
    """carry, outputs = body(shared, carry, rows, all_run) for each chunk of rows [N, ...], in turn.

    The outputs of all chunks become arrays [N, ...]. With n chunks, chunk i has the rows i, i + n,
    i + 2n and so on. So if the rows are sharded, every device has some rows of each chunk.

    ``runs``, bool [N], says which rows to run; None means all. If there are several chunks, the
    rows to run are gathered into chunks, and no other chunks are run. The outputs of rows in no
    chunk are 0. ``all_run`` is True for a chunk that has only rows to run: the body needs no mask.
    """
    if chunks == 1:
        return body(*arrays, False)
    if runs is not None:
        return _over_chunks_that_run(body, chunks, arrays, runs)
    shared, carry, rows = arrays

    # If JAX differentiates the loop, recompute each chunk instead of keeping arrays of its size.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry: Carry, i: Array) -> tuple[Carry, Any]:
        def take(x: Array) -> Array:
            # For a symbolic number of rows, JAX infers the quotient. It can't with an axis of 0.
            size = x.shape[0] // chunks if are_known(x.shape[0]) else -1
            x = x.reshape(size, chunks, *x.shape[1:])
            return lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)

        return body(shared, carry, jax.tree.map(take, rows), False)

    carry, outputs = lax.scan(step, carry, jnp.arange(chunks))
    outputs = jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), outputs)
    return carry, jax.tree.map(lambda y: lax.collapse(y, 0, 2), outputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _over_chunks_that_run(
    body: Body[Shared, Carry, Rows],
    chunks: int,
    arrays: tuple[Shared, Carry, Rows],
    runs: Array,
) -> tuple[Carry, Any]:
    """Move the rows to run to the front, and run them in whole chunks and then in parts of one."""
    shared, carry, rows = arrays
    running = jnp.cumsum(runs, dtype=jnp.int32)  # the number of rows to run, up to each row
    number, index = running[-1], jnp.arange(runs.shape[0], dtype=jnp.int32)
    position = jnp.where(runs, running - 1, number + index - running)
    order = jnp.zeros_like(index).at[position].set(index, unique_indices=True)

    def run(first: Array | int, size: int, times: Array, state: Any, *, all_run: bool) -> Any:
        """Take ``times`` steps of ``size`` rows each, starting at position ``first`` of order."""

        def step(i: Array, state: Any) -> Any:
            carry, outputs = state
            start = first + i * size
            carry, new = body(shared, carry, take(start, size), all_run)
            put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
            return carry, jax.tree.map(put, outputs, new)

        return lax.fori_loop(0, times, step, state)

    def take(start: Array | int, size: int) -> Any:
        return _rows_at(lax.dynamic_slice_in_dim(order, start, size), rows)

    size = runs.shape[0] // chunks
    part = rows_of_part(size)
    _, some = jax.eval_shape(lambda rows: body(shared, carry, rows, False), take(0, size))
    outputs = jax.tree.map(lambda y: zeros_like(y, (runs.shape[0], *y.shape[1:]), y.dtype), some)
    full = _least(number // size)
    state = run(0, size, full, (carry, outputs), all_run=True)
    left = number - full * size
    parts = _most((left + (part - 1)) // part)
    carry, outputs = run(full * size, part, parts, state, all_run=False)
    return carry, _rows_at(position, outputs)


def _over_chunks_that_run_jvp(
    body: Body[Shared, Carry, Rows],
    chunks: int,
    primals: tuple[Any, Any],
    tangents: tuple[Any, Any],
) -> tuple[Any, Any]:
    # Run all chunks, because JAX has no reverse mode for a loop with an unknown number of steps.
    (arrays, _), (arrays_dot, _) = primals, tangents
    return jvp_of_moved(lambda *arrays: over_chunks(body, arrays, chunks), arrays, arrays_dot)


_over_chunks_that_run.defjvp(_over_chunks_that_run_jvp, symbolic_zeros=True)


def _rows_at(at: Array, rows: T) -> T:
    return jax.tree.map(lambda x: x.at[at].get(mode="promise_in_bounds"), rows)


# If the number of steps differed between the examples of a vmap, each step would select between the
# old and the new carry, and copy the whole carry. So all examples take the same number of steps.


@custom_vmap
def _least(steps: Array) -> Array:
    """steps. Under a vmap, the smallest number of steps of all examples."""
    return steps


@_least.def_vmap
def _least_of_examples(size: int, mapped: Any, steps: Array) -> tuple[Array, bool]:
    return _least(jnp.min(steps, axis=0)), False


@custom_vmap
def _most(steps: Array) -> Array:
    """steps. Under a vmap, the largest number of steps of all examples."""
    return steps


@_most.def_vmap
def _most_of_examples(size: int, mapped: Any, steps: Array) -> tuple[Array, bool]:
    return _most(jnp.max(steps, axis=0)), False


class Columns(NamedTuple):
    """Columns of arrays [..., K]: ``size`` of them from ``first`` on, or all if size is None."""

    first: Array | int
    size: int | None
    backend: Backend

    def take(self, x: Array) -> Array:
        """These columns of x."""
        if self.size is None:
            return x
        return _columns(x, self.first, self.size, self.backend)

    def put(self, x: Array, part: Array) -> Array:
        """x with these columns replaced, in place."""
        if self.size is None:
            return part
        return lax.dynamic_update_slice_in_dim(x, part, self.first, axis=1)


def classes_per_block(hidden_size: int, classes: int, backend: Backend) -> int:
    """The number of classes of the kernel that are multiplied at a time.

    XLA's CPU backend writes a product out before adding it to the gradient of the kernel. It also
    converts operands that are narrower than float32 before multiplying them. Products of 1024
    columns take a fifth more time than products of 2048, and wider products are not faster. If
    sizes are symbolic, a block has all classes.
    """
    if not backend.loops_over_rows or not are_known(hidden_size, classes):
        return classes
    columns = backend.class_block_bytes // (4 * max(1, hidden_size)) // 64 * 64
    return part_of(classes, min(2048, max(256, columns)))


def over_class_blocks(
    body: Callable[[Carry, Columns], Carry], carry: Carry, kernel: Array, backend: Backend
) -> Carry:
    """carry = body(carry, columns) for blocks of the columns of a kernel [D, K]."""
    hidden_size, classes = kernel.shape
    size = classes_per_block(hidden_size, classes, backend)
    if size == classes:
        return body(carry, Columns(0, None, backend))
    blocks, left = divmod(classes, size)
    carry = lax.fori_loop(
        0, blocks, lambda i, carry: body(carry, Columns(i * size, size, backend)), carry
    )
    return body(carry, Columns(blocks * size, left, backend)) if left else carry


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _columns(x: Array, first: Array | int, size: int, backend: Backend) -> Array:
    """x[:, first : first + size]."""
    bits = lax.dynamic_slice_in_dim(bits_of(x, backend), first, size, axis=1)
    return lax.bitcast_convert_type(bits, x.dtype)


@_columns.defjvp
def _columns_jvp(
    size: int, backend: Backend, primals: tuple[Array, Any], tangents: tuple[Array, Any]
) -> tuple[Array, Array]:
    (x, first), (x_dot, _) = primals, tangents
    x_dot = lax.dynamic_slice_in_dim(x_dot, first, size, axis=1)
    return _columns(x, first, size, backend), x_dot
