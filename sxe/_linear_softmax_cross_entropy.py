"""The softmax cross-entropy loss of hidden states and a kernel, without the logits.

    u = hidden @ kernel      z = logit_scale u + bias      x = softcap tanh(z / softcap)

Rows are taken in chunks. The logits x of one chunk exist at a time, and go through the row rule of
``_softmax_cross_entropy`` as any others do. It gives d x, line D7, and from there

    d u = logit_scale (1 - (x / softcap)^2) d x
    d hidden = d u kernel^T                         d kernel = hidden^T d u

in one of two ways:

    sums of rows    What each row weighs is known. Where the loss is differentiated, the forward
                    pass goes on from a chunk's logits to the gradients, and the backward pass only
                    scales them: 6 N D K FLOPs.
    single rows     The cotangents are known in the backward pass, which computes the logits of each
                    chunk again: 8 N D K FLOPs.

Rules other than "vjp" leave all of this to JAX, which differentiates the same chunks one by one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from sxe import _normalizer as nz
from sxe import _options
from sxe._axes import (
    AxisName,
    axis_names,
    check_axis_name,
    is_explicit,
    is_local,
    psum,
    sharding,
    vary,
    varying,
)
from sxe._options import Arrays, Projection, Static
from sxe._reduction import Metrics, denominator, metrics, predict, sums, weighted
from sxe._softmax_cross_entropy import RULES, holds_shares, rows_bwd, rows_fwd
from sxe._targets import Rows, Targets, keep, make_rows


class _Shared(NamedTuple):
    """What all rows share. None: the option is off or, of gradients, not wanted."""

    kernel: Any  # [D, K]
    bias: Array | None  # [K]
    logit_scale: Array | None
    softcap: Array | None
    dense: Array | None  # [1, K] or [1, 1]: what label smoothing adds to the targets of each row
    z_loss: Array | None


class _Batch(NamedTuple):
    """What each row has, [N, ...]."""

    hidden: Any  # [N, D]
    targets: Targets
    weight: Any
    counts: Array | None


class _Program(NamedTuple):
    """How the rows are gone through."""

    chunks: int
    dtype: DTypeLike  # of the product of hidden states and kernel
    axis_name: AxisName
    metrics: bool


class _PerRow(NamedTuple):
    """Results [N]. No gradient passes through the predictions, which are None if unwanted."""

    loss: Array
    lse: Array
    predictions: Array | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """True for each input that is differentiated: no other's gradient is computed."""

    shared: _Shared
    batch: _Batch


# How large the parts are that a call is divided into.

CHUNK_BYTES = 32 * 2**20  # of a chunk's logits
FEWEST_ROWS = {"cpu": 128}  # of a chunk: with fewer, a matmul waits for the kernel to be read
FEWEST_ROWS_ELSEWHERE = 1024
BLOCK_BYTES = 4 * 2**20  # of a block of the kernel's gradient


def rows_per_chunk(rows: int, classes: int, dtype: DTypeLike, backend: str) -> int:
    """The default of ``chunk_size``, a power of two.

    What a chunk needs beside the gradients is to stay below 64 MiB or a tenth of all logits. A
    budget of bytes does that whatever the number of rows. Where it leaves fewer rows than a matmul
    wants, since each chunk reads the kernel twice and its gradient once, a chunk has as many as it
    wants, but at most a sixteenth of all rows.
    """
    itemsize = 8 if dtype == jnp.float64 else 4
    wanted = FEWEST_ROWS.get(backend, FEWEST_ROWS_ELSEWHERE)
    most = max(1, CHUNK_BYTES // (itemsize * classes), min(wanted, rows // 16))
    return 1 << (most.bit_length() - 1)


def number_of_chunks(rows: int, chunk_size: int) -> int:
    """How many chunks, all of one size that is at most chunk_size, the last one perhaps padded."""
    return max(1, -(-rows // chunk_size))


def classes_per_block(hidden_size: int, classes: int, backend: str) -> int:
    """How many classes of the kernel's gradient are computed at a time.

    A CPU writes a product out before adding it to what there is, and widens operands narrower than
    float32 first. Blocks of classes keep both small and in its cache.
    """
    block = max(256, BLOCK_BYTES // (4 * max(1, hidden_size)) // 64 * 64)
    return min(classes, block) if backend == "cpu" else classes


def product_dtype(dtype: DTypeLike, backend: str) -> Any:
    """The dtype in which hidden states and kernel are multiplied, exactly, for the logits.

    It is their own, except on a CPU, for which XLA widens float16.
    """
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 and backend == "cpu" else dtype)


def gradient_dtype(dtype: DTypeLike, backend: str) -> Any:
    """The dtype in which the gradient of u is multiplied with hidden states and kernel.

    An accelerator multiplies bfloat16 with bfloat16 only, so that the gradient is rounded to it. A
    CPU gains little by that, and float16 would lose every probability below 6e-8.
    """
    if dtype == jnp.bfloat16 and backend != "cpu":
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


# One chunk.


def _product(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """The matrix product over one axis of each, accumulated in float32, or float64."""
    dimensions = (((over[0],), (over[1],)), ((), ()))
    wide = jnp.float64 if a.dtype == jnp.float64 else jnp.float32
    return lax.dot_general(a, b, dimensions, preferred_element_type=wide)


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


def _over_blocks(body: Callable[..., Any], carry: Any, classes: int, block: int) -> Any:
    """carry = body(carry, take, put) for each block of classes.

    take(x) is the block of x [..., K], and put(x, part) is x with that block replaced.
    """

    def at(first: Array | int, size: int, carry: Any) -> Any:
        def put(x: Array, part: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(x, part, first, axis=1)

        return body(carry, lambda x: _columns(x, first, size), put)

    if block >= classes or not is_local():  # a slice of what devices split would be gathered
        return body(carry, lambda x: x, lambda x, part: part)
    blocks, left = divmod(classes, block)
    carry = lax.fori_loop(0, blocks, lambda i, carry: at(i * block, block, carry), carry)
    return at(blocks * block, left, carry) if left else carry


def _zeros(x: Array, shape: tuple[int, ...]) -> Array:
    """Zeros of that shape, float32 or float64 and typed as varying as x."""
    return vary(jnp.zeros(shape, nz.wide(x).dtype), varying(x))


def _product_fwd(hidden: Array, kernel: Array) -> Array:
    """u [C, K]."""
    (rows, hidden_size), classes = hidden.shape, kernel.shape[1]
    dtype = product_dtype(hidden.dtype, jax.default_backend())
    if dtype == hidden.dtype:
        return _product(hidden, kernel, (1, 0))
    hidden = hidden.astype(dtype)

    def block(u: Array, take: Callable[..., Any], put: Callable[..., Any]) -> Array:
        return put(u, _product(hidden, take(kernel).astype(dtype), (1, 0)))

    size = classes_per_block(hidden_size, classes, jax.default_backend())
    return _over_blocks(block, _zeros(hidden, (rows, classes)), classes, size)


def _product_bwd(
    d_u: Array, hidden: Array, kernel: Array, d_kernel: Array | None, want_hidden: bool
) -> tuple[Array | None, Array | None]:
    """d hidden if wanted, and d_kernel with that of a chunk added unless it is None."""
    classes, backend = kernel.shape[1], jax.default_backend()
    dtype = gradient_dtype(hidden.dtype, backend)
    wide_hidden = hidden.astype(dtype)

    def block(d: Any, take: Callable[..., Any], put: Callable[..., Any]) -> Any:
        d_hidden, d_kernel = d
        d_part = take(d_u).astype(dtype)
        if d_hidden is not None:
            d_hidden = d_hidden + _product(d_part, take(kernel).astype(dtype), (1, 1))
        if d_kernel is not None:
            d_kernel = put(d_kernel, take(d_kernel) + _product(wide_hidden, d_part, (0, 0)))
        return d_hidden, d_kernel

    size = classes_per_block(hidden.shape[1], classes, backend)
    if d_kernel is None and dtype == hidden.dtype:
        size = classes
    d_hidden = _zeros(d_u, hidden.shape) if want_hidden else None
    return _over_blocks(block, (d_hidden, d_kernel), classes, size)


def _transform(
    u: Array, bias: Array | None, logit_scale: Array | None, softcap: Array | None
) -> Array:
    """The logits, from the product of hidden states and kernel."""
    z = u if logit_scale is None else logit_scale * u
    z = z if bias is None else z + bias[None, :]
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def _narrow(program: _Program, shared: _Shared, rows: _Batch) -> tuple[_Shared, _Batch]:
    """Hidden states and kernel in the dtype of their product.

    They come in float32. The rules here narrow them before the loop over chunks; where JAX is to
    differentiate the loop it happens within, so that JAX, too, adds gradients up in float32.
    """
    kernel, hidden = shared.kernel.astype(program.dtype), rows.hidden.astype(program.dtype)
    return shared._replace(kernel=kernel), rows._replace(hidden=hidden)


def _targets(shared: _Shared, chunk: _Batch) -> Targets:
    return chunk.targets if shared.dense is None else chunk.targets._replace(dense=shared.dense)


def _logits(
    program: _Program, shared: _Shared, chunk: _Batch
) -> tuple[Array, Callable[[Array], Any], Array | None]:
    """The logits of a chunk; from their gradient those of u, bias and so on; the predictions.

    Where a row does not count u is 0, so that nothing in it or in the kernel is a NaN to come.
    """
    parameters = (shared.bias, shared.logit_scale, shared.softcap)
    shared, chunk = _narrow(program, shared, chunk)
    u = _product_fwd(chunk.hidden, shared.kernel)
    x, transform_bwd = jax.vjp(_transform, keep(chunk.counts, u), *parameters)
    predictions = None
    if program.metrics:
        everything = x if chunk.counts is None else _transform(u, *parameters)
        predictions = predict(everything, program.axis_name)
    return x, transform_bwd, predictions


def _add(a: Array | None, b: Array | None) -> Array | None:
    """a + b, and None where the sum is not wanted."""
    return None if a is None or b is None else a + b


def _chunk_bwd(
    program: _Program,
    shared: _Shared,
    chunk: _Batch,
    transform_bwd: Callable[[Array], Any],
    res: tuple[Array, Targets, nz.Normalizer],
    gs: tuple[Array, Array | None],
    shares: bool,
    wanted: "_Wanted",
    d_shared: _Shared,
) -> tuple[_Shared, _Batch]:
    """From the gradients of a chunk's row losses and lse to those of its inputs that are wanted.

    Those of what is shared are added to d_shared.
    """
    d_x, d_targets = rows_bwd(program.axis_name, res, gs, shares)  # D7
    d_u, *d_parameters = transform_bwd(d_x)
    d_hidden, d_kernel = _product_bwd(
        d_u,
        keep(chunk.counts, chunk.hidden),  # a NaN there times a d u of 0 is a NaN
        shared.kernel,
        d_shared.kernel,
        wanted.batch.hidden,
    )
    d_bias, d_scale, d_softcap = d_parameters
    d_dense = None if shared.dense is None else d_targets.dense
    d_shared = d_shared._replace(
        kernel=d_kernel,
        bias=_add(d_shared.bias, d_bias),
        logit_scale=_add(d_shared.logit_scale, d_scale),
        softcap=_add(d_shared.softcap, d_softcap),
        dense=_add(d_shared.dense, d_dense),
    )
    d_chunk = chunk._replace(
        hidden=None if d_hidden is None else keep(chunk.counts, d_hidden),
        targets=d_targets if shared.dense is None else d_targets._replace(dense=None),
        weight=None,
        counts=None,
    )
    return d_shared, _only(wanted.batch, d_chunk)


# All chunks.


def _over_chunks(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any, n: int) -> Any:
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


def _rows_by(
    rule: str, program: _Program, shared: _Shared, batch: _Batch
) -> tuple[Array, Array, Array | None]:
    """Row losses, lse and predictions, by one of the rules for logits."""
    if rule == "vjp":
        shared, batch = _narrow(program, shared, batch)

    def body(carry: None, chunk: _Batch) -> tuple[None, tuple[Array, Array, Array | None]]:
        x, _, predictions = _logits(program, shared, chunk)
        if rule != "vjp" and chunk.counts is not None:
            # JAX will multiply hidden with a d u of 0, which is to be 0 in spite of a NaN there.
            kept = chunk._replace(hidden=keep(chunk.counts, chunk.hidden))
            x, _, _ = _logits(program._replace(metrics=False), shared, kept)
        loss, lse = RULES[rule](x, _targets(shared, chunk), program.axis_name)
        return carry, (loss, lse, predictions)

    return _over_chunks(body, None, batch, program.chunks)[1]


def _primals(inputs: Any) -> tuple[Any, Any]:
    """The values, and whether each is differentiated, of what a forward rule is given."""
    leaves, tree = jax.tree.flatten(inputs, is_leaf=lambda p: isinstance(p, CustomVJPPrimal))
    values, perturbed = ([getattr(p, name) for p in leaves] for name in ("value", "perturbed"))
    return jax.tree.unflatten(tree, values), jax.tree.unflatten(tree, perturbed)


def _only(wanted: Any, gradients: Any) -> Any:
    """The gradients that are wanted, and None for all others."""
    return jax.tree.map(
        lambda w, d: d if w else None, wanted, gradients, is_leaf=lambda x: x is None
    )


def _instantiate(g: Any) -> Array:
    return jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g


# Sums of rows: the gradient in the forward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(
    program: _Program, shared: _Shared, batch: _Batch
) -> tuple[Array, Array, Array | None]:
    """sum_i w_i (loss_i + z lse_i^2), and without gradient lse and predictions."""
    loss, lse, predictions = _rows_by("vjp", program, shared, batch)
    return jnp.sum(weighted(loss, lse, batch.weight, shared.z_loss)), lse, predictions


def _weighted_sum_fwd(
    program: _Program, shared_primals: _Shared, batch_primals: _Batch
) -> tuple[tuple[Array, Array, Array | None], tuple[_Shared, _Batch]]:
    (shared, batch), flags = _primals((shared_primals, batch_primals))
    wanted = _Wanted(*flags)
    shared, batch = _narrow(program, shared, batch)

    def body(carry: tuple[Array, _Shared], chunk: _Batch) -> Any:
        total, d_shared = carry
        x, transform_bwd, predictions = _logits(program, shared, chunk)
        (loss, lse), res = rows_fwd(x, _targets(shared, chunk), program.axis_name)
        value, weighted_bwd = jax.vjp(weighted, loss, lse, chunk.weight, shared.z_loss)
        g, g_lse, d_weight, d_z = weighted_bwd(jnp.ones_like(value))
        gs = (g, None if shared.z_loss is None else g_lse)
        d_shared, d_chunk = _chunk_bwd(
            program, shared, chunk, transform_bwd, res, gs, False, wanted, d_shared
        )
        d_shared = d_shared._replace(z_loss=_add(d_shared.z_loss, d_z))
        d_chunk = d_chunk._replace(weight=d_weight if wanted.batch.weight else None)
        return (total + jnp.sum(value), d_shared), (lse, predictions, d_chunk)

    zero = jax.tree.map(lambda x: _zeros(x, x.shape), _only(wanted.shared, shared))
    total = vary(jnp.zeros((), batch.weight.dtype), varying(batch.weight))
    (total, d_shared), outputs = _over_chunks(body, (total, zero), batch, program.chunks)
    lse, predictions, d_batch = outputs
    return (total, lse, predictions), (d_shared, d_batch)


def _weighted_sum_bwd(
    program: _Program, res: tuple[_Shared, _Batch], gs: tuple[Any, Any, Any]
) -> tuple[_Shared, _Batch]:
    d_shared, d_batch = res
    g = _instantiate(gs[0])
    g_tile = psum(g, program.axis_name) if holds_shares(program.axis_name) else g
    d_shared, d_batch = jax.tree.map(lambda d: g_tile * d, (d_shared, d_batch))
    return d_shared, d_batch


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)


# Single rows: the logits again in the backward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(program: _Program, shared: _Shared, batch: _Batch) -> tuple[Array, Array, Array | None]:
    """Row losses, lse and, without gradient, predictions."""
    return _rows_by("vjp", program, shared, batch)


def _rows_fwd(program: _Program, shared_primals: _Shared, batch_primals: _Batch) -> Any:
    (shared, batch), flags = _primals((shared_primals, batch_primals))
    shared, batch = _narrow(program, shared, batch)

    def body(carry: None, chunk: _Batch) -> Any:
        x, _, predictions = _logits(program, shared, chunk)
        (loss, lse), (_, _, state) = rows_fwd(x, _targets(shared, chunk), program.axis_name)
        return carry, (loss, lse, predictions, state)

    _, (*results, state) = _over_chunks(body, None, batch, program.chunks)
    return tuple(results), (shared, batch, state, _Wanted(*flags))


def _rows_bwd(program: _Program, res: Any, gs: tuple[Any, Any, Any]) -> tuple[_Shared, _Batch]:
    shared, batch, state, wanted = res
    g_lse = None if isinstance(gs[1], SymbolicZero) else gs[1]
    shares = holds_shares(program.axis_name)

    def body(d_shared: _Shared, rows: tuple[_Batch, nz.Normalizer, Array, Array | None]) -> Any:
        chunk, state, g, g_lse = rows
        x, transform_bwd, _ = _logits(program._replace(metrics=False), shared, chunk)
        res = (x, _targets(shared, chunk), state)
        return _chunk_bwd(
            program, shared, chunk, transform_bwd, res, (g, g_lse), shares, wanted, d_shared
        )

    zero = jax.tree.map(lambda x: _zeros(x, x.shape), _only(wanted.shared, shared))
    rows = (batch, state, _instantiate(gs[0]), g_lse)
    return _over_chunks(body, zero, rows, program.chunks)


_rows.defvjp(_rows_fwd, _rows_bwd, symbolic_zeros=True)


# From the caller's arrays to rows, and through one of the above to a result.


def _typed_alike(shared: _Shared, batch: _Batch, axis_name: AxisName) -> tuple[_Shared, _Batch]:
    """The same, typed as varying along the same mesh axes, numbers a row not along the classes'.

    shard_map wants a cotangent in the type of its input. The transpose of this cast is where the
    gradients of hidden states, once, and of the kernel are summed over devices.
    """
    every = frozenset().union(*(varying(a) for a in jax.tree.leaves((shared, batch))))
    one_a_row = every - set(axis_names(axis_name))

    def tile(x: Any) -> Any:
        return jax.tree.map(lambda a: vary(a, every), x)

    def row(x: Any) -> Any:
        return jax.tree.map(lambda a: vary(a, one_a_row), x)

    targets = row(batch.targets)._replace(dense=tile(batch.targets.dense))
    return (
        tile(shared)._replace(z_loss=row(shared.z_loss)),
        row(batch)._replace(hidden=tile(batch.hidden), targets=targets),
    )


def _prepare(
    hidden: Array,
    kernel: Array,
    labels: Array,
    projection: Projection,
    arrays: Arrays,
    static: Static,
    chunk_size: int | None,
) -> tuple[_Program, _Shared, _Batch, Rows]:
    """A call as what all rows share and what each has, padded to whole chunks; and the rows."""
    rows_shape, classes = hidden.shape[:-1], kernel.shape[1]
    dtype = jnp.result_type(hidden, kernel)
    wide = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
    rows = make_rows(
        labels,
        shape=(*rows_shape, classes),
        finite=None if arrays.weights is None else jnp.all(jnp.isfinite(hidden), axis=-1),
        where=arrays.where,
        weights=arrays.weights,
        class_weights=arrays.class_weights,
        label_smoothing=arrays.label_smoothing,
        ignore_index=static.ignore_index,
        axis_name=static.axis_name,
        dtype=wide,
    )

    n = math.prod(rows_shape)
    size = chunk_size or rows_per_chunk(n, classes, dtype, jax.default_backend())
    chunks = number_of_chunks(n, size)
    padding = max(1, -(-n // chunks)) * chunks - n

    def flat(x: Array) -> Array:
        x = x.reshape(n, *x.shape[len(rows_shape) :])
        return jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)) if padding else x

    targets, dense = rows.targets, None
    if targets.label is not None and targets.dense is not None:
        dense = targets.dense.reshape(1, -1)
        targets = targets._replace(dense=None)
    counts = rows.counts
    if counts is None and padding:
        counts = jnp.ones(rows_shape, jnp.bool_)

    def number(x: Array | float | None) -> Array | None:
        return None if x is None else jnp.asarray(x, wide)

    # Wide here and narrow again in the rule, so that a gradient is rounded once, after all sums.
    shared = _Shared(
        kernel=kernel.astype(wide),
        bias=None if projection.bias is None else projection.bias.astype(wide),
        logit_scale=number(projection.logit_scale),
        softcap=number(projection.softcap),
        dense=dense,
        z_loss=number(arrays.z_loss),
    )
    batch = _Batch(hidden.astype(wide), targets, rows.weight, counts)
    batch = jax.tree.map(flat, batch)
    program = _Program(chunks, dtype, static.axis_name, static.return_metrics)
    return program, *_typed_alike(shared, batch, static.axis_name), rows


def _result(
    hidden: Array,
    kernel: Array,
    labels: Array,
    projection: Projection,
    arrays: Arrays,
    *,
    static: Static,
    chunk_size: int | None,
) -> Any:
    program, shared, batch, rows = _prepare(
        hidden, kernel, labels, projection, arrays, static, chunk_size
    )
    loss = None
    if static.rule == "vjp" and static.reduction != "none":
        loss_sum, lse, predictions = _weighted_sum(program, shared, batch)
    else:
        run = _rows if static.rule == "vjp" else functools.partial(_rows_by, static.rule)
        loss, lse, predictions = run(program, shared, batch)
        loss = weighted(loss, lse, batch.weight, shared.z_loss)
        loss_sum = jnp.sum(loss)

    def rows_of(x: Any) -> Array:  # an array, unless it is not returned
        return x[: rows.weight.size].reshape(rows.weight.shape)

    total = sums(loss_sum, rows, static.batch_axis_name)
    value = total.loss / denominator(total, static.reduction)
    if static.reduction == "none":
        value = rows_of(loss)
    if not static.return_metrics:
        return value
    return value, metrics(total, rows_of(lse), rows, rows_of(predictions))


@functools.partial(jax.jit, static_argnames=("static", "chunk_size"), inline=True)
def _loss(
    hidden: Array,
    kernel: Array,
    labels: Array,
    projection: Projection,
    arrays: Arrays,
    static: Static,
    chunk_size: int | None,
) -> Any:
    _options.check_projection(hidden, kernel, projection)
    shape = (*hidden.shape[:-1], kernel.shape[1])
    _options.check_rows(labels, arrays, static, shape, (hidden.ndim - 1,))
    if arrays.where is not None and arrays.where.ndim == hidden.ndim:
        raise ValueError(
            f"where: expected a mask of rows, of shape {shape[:-1]}, got {arrays.where.shape}; "
            "masks of classes need softmax_cross_entropy, or a bias of -inf"
        )
    check_axis_name("axis_name", static.axis_name, "the kernel", kernel)
    check_axis_name("batch_axis_name", static.batch_axis_name, "the hidden states", hidden)

    run: Callable[..., Any] = functools.partial(_result, static=static, chunk_size=chunk_size)
    if is_explicit(hidden, kernel, labels):
        # Types can't say how the chunks of a split batch are split. The compiler can, given types
        # of what goes in and comes out.
        a_row = PartitionSpec(*sharding(hidden)[:-1])
        one = PartitionSpec()
        value = a_row if static.reduction == "none" else one
        of_metrics: Any = (one, one, a_row, a_row)
        out = (value, Metrics(*of_metrics)) if static.return_metrics else value
        run = jax.sharding.auto_axes(run, out_sharding=out)
    return run(hidden, kernel, labels, projection, arrays)


def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    logit_scale: ArrayLike = 1.0,
    softcap: ArrayLike | None = None,
    chunk_size: int | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_index: int | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_metrics: bool = False,
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    rule: Literal["vjp", "jvp", "autodiff"] = "vjp",
) -> Any:
    """Softmax cross-entropy of hidden states and a kernel, without the [N, K] logits.

    The loss of these logits, of which a chunk of rows exists at a time:

        z = logit_scale hidden @ kernel + bias
        logits = softcap tanh(z / softcap)         or z, without softcap

    Value and gradients are those of ``softmax_cross_entropy`` on them, with its options and its
    precision. A "mean" or "sum" takes the gradients in the forward pass where it is differentiated,
    6 N D K FLOPs for hidden and kernel, 4 N D K if one of them is not differentiated. "none"
    computes the logits again in the backward pass, 8 N D K. ``sxe.plan`` tells what a call does.

    Args:
      hidden: [..., D], bfloat16, float16, float32 or float64.
      kernel: [D, K], likewise; a tied embedding [K, D] passes its transpose. If the dtypes differ
        they are promoted as in ``hidden @ kernel``.
      labels: class indices [...] of any integer dtype, or dense targets [..., K] of a float dtype.
      bias: float [K]. A class with a bias of -inf cannot occur.
      logit_scale: a number or a scalar array, for example 1 / temperature.
      softcap: a number above 0 or a scalar array, a bound on the logits' magnitude.
      chunk_size: the most rows that a chunk may have. By default a power of two for which a chunk's
        logits take 32 MiB, so that memory does not grow with the rows; more where that would be
        less than 128 rows on a CPU, 1024 on an accelerator, up to a sixteenth of the rows.
      where: bool [...], the rows that count. The head has no mask of classes.
      axis_name: inside ``jax.shard_map``, the mesh axis (or axes) along which the classes are
        split: kernel, bias, dense targets and class weights are this device's, labels are indices
        of all classes.
      weights, class_weights, label_smoothing, z_loss, ignore_index, reduction, return_metrics,
        batch_axis_name: as for ``softmax_cross_entropy``.
      rule: "vjp": gradients as above, for reverse mode. "jvp": the closed form for logits as
        ``jax.custom_jvp``, for forward mode too; "autodiff": no closed form. For these two JAX
        differentiates one chunk after the other.

    Returns:
      The loss, float32 (float64 if hidden or kernel is), or ``(loss, sxe.Metrics)``. Gradients
      exist for hidden, kernel, bias, logit_scale, softcap, and all that ``softmax_cross_entropy``
      has them for, each in the dtype of its input, rounded once. One that is not asked for is not
      computed.

    Logits are accumulated in float32 whatever the operands are, and so are d hidden in its chunk
    and d kernel over all chunks. The gradient of the logits stays in float32 for its products on a
    CPU; on an accelerator it is rounded to bfloat16 where the operands are bfloat16.

    Rows that do not count contribute nothing to value or gradient, whatever stands in them.
    Infinite logits and bad labels do what they do in ``softmax_cross_entropy``.

    Raises:
      TypeError: for a dtype that is none of the above, or an option of a wrong type.
      ValueError: for a shape that does not fit, a ``where`` that masks classes, a ``chunk_size``
        below 1, and for what ``softmax_cross_entropy`` does.

    Source: D0 and D7 of ``sxe.derivation``, and the chain rule at the top of this module.

    Example:
      >>> import jax, jax.numpy as jnp, sxe
      >>> hidden, kernel = jnp.array([[4.0, 0.0], [0.0, 2.0]]), jnp.array([[5.0, 0, 0], [0, 0, 1]])
      >>> labels = jnp.array([0, 2])
      >>> sxe.linear_softmax_cross_entropy(hidden, kernel, labels, reduction="none")
      Array([4.12231e-09, 2.39545e-01], dtype=float32)
      >>> jax.grad(sxe.linear_softmax_cross_entropy)(hidden, kernel, labels)
      Array([[-1.03058e-08,  2.06115e-09],
             [ 2.66252e-01, -1.06507e-01]], dtype=float32)
    """
    arrays, static = _options.parse(
        where=where,
        weights=weights,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        axis=-1,
        reduction=reduction,
        return_metrics=return_metrics,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        rule=rule,
        rules=tuple(RULES),
    )
    projection = _options.parse_projection(bias, logit_scale, softcap)
    return _loss(
        jnp.asarray(hidden),
        jnp.asarray(kernel),
        jnp.asarray(labels),
        projection,
        arrays,
        static=static,
        chunk_size=_options.parse_chunk_size(chunk_size),
    )
