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

from __future__ import annotations  # so that help() names types shortly

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from sxe import _normalizer as nz
from sxe import _options
from sxe._axes import (
    AxisName,
    axis_names,
    check_axis_name,
    check_mapped,
    check_splits,
    is_explicit,
    mapped_as,
    mapped_axes,
    place,
    psum,
    sharding,
    vary,
    varying,
    whole,
)
from sxe._layout import layout_of
from sxe._options import Arrays, Projection, Static
from sxe._projection import (
    gather_rows,
    product_bwd,
    product_fwd,
    product_precision,
    transform,
    zeros_as,
)
from sxe._reduction import Best, best, denominator, first_of, metrics, specs, sums, weighted
from sxe._softmax_cross_entropy import (
    RULES,
    check_jet,
    holds_shares,
    merge_shares,
    rows_bwd,
    rows_fwd,
    share,
)
from sxe._targets import Dense, Rows, Targets, keep, make_rows
from sxe._tiles import over_chunks, over_rows, tiling


class _Shared(NamedTuple):
    """What all rows share. None: the option is off or, of gradients, not wanted."""

    kernel: Any  # [D, K]
    bias: Array | None  # [K]
    logit_scale: Array | None
    softcap: Array | None
    dense: Dense | None  # t is [1, K] or [1, 1]: what label smoothing adds to each row's targets
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
    precision: Any  # of that product, and of those for the gradients
    axis_name: AxisName
    weighted: bool  # whether a row may weigh 0 that has no loss
    metrics: bool


class _Wanted(NamedTuple):
    """True for each input that is differentiated: no other's gradient is computed."""

    shared: Any
    batch: Any


# One chunk.


def _narrow(program: _Program, shared: _Shared, rows: _Batch) -> tuple[_Shared, _Batch]:
    """Hidden states and kernel in the dtype of their product.

    They come in float32, so that their gradients leave in it.
    """
    kernel, hidden = shared.kernel.astype(program.dtype), rows.hidden.astype(program.dtype)
    return shared._replace(kernel=kernel), rows._replace(hidden=hidden)


def _targets(shared: _Shared, chunk: _Batch) -> Targets:
    return chunk.targets if shared.dense is None else chunk.targets._replace(dense=shared.dense)


class _Logits(NamedTuple):
    """The logits of rows, and which of these rows count.

    ``bwd`` takes their gradient to those of u, bias, logit_scale and softcap.
    """

    x: Array
    bwd: Callable[[Array], Any]
    counts: Array | None
    best: Best | None


def _have_loss(program: _Program, rows: _Batch, m: Array) -> Array | None:
    """The rows that count and whose largest logit m is finite, unless they weigh something.

    Hidden states that are finite may still have logits that are not.
    """
    if not program.weighted:
        return rows.counts
    have = (rows.weight != 0) | jnp.isfinite(m)
    return have if rows.counts is None else rows.counts & have


def _logits(program: _Program, shared: _Shared, u: Array, rows: _Batch) -> _Logits:
    """Where a row does not count u is taken as 0, so that nothing there or in the kernel is NaN."""
    parameters = (shared.bias, shared.logit_scale, shared.softcap)
    counts = rows.counts
    if program.weighted:
        m = jnp.max(lax.stop_gradient(transform(u, *parameters)), axis=-1)
        m = m if program.axis_name is None else lax.pmax(m, program.axis_name)
        counts = _have_loss(program, rows, m)
    x, bwd = jax.vjp(transform, keep(counts, u), *parameters)
    largest = None
    if program.metrics:
        largest = best(x if counts is None else transform(u, *parameters))
    return _Logits(x, bwd, counts, largest)


def _add(a: Any, b: Any) -> Any:
    """a + b, and None where the sum is not wanted."""
    return jax.tree.map(
        lambda a, b: None if a is None else a + b, a, b, is_leaf=lambda x: x is None
    )


def _rows_bwd(
    program: _Program,
    shared: _Shared,
    transform_bwd: Callable[[Array], Any],
    res: tuple[Array, Targets, nz.Normalizer],
    gs: tuple[Array, Array | None],
    shares: bool,
    d_shared: _Shared,
) -> tuple[_Shared, Array, Targets]:
    """d_shared with the gradients of rows added where it is not None; d u; and d targets."""
    d_x, d_targets = rows_bwd(program.axis_name, res, gs, shares)  # D7
    d_u, d_bias, d_scale, d_softcap = transform_bwd(d_x)
    d_shared = d_shared._replace(
        bias=_add(d_shared.bias, d_bias),
        logit_scale=_add(d_shared.logit_scale, d_scale),
        softcap=_add(d_shared.softcap, d_softcap),
        dense=_add(d_shared.dense, d_targets.dense),
    )
    return d_shared, d_u, d_targets if shared.dense is None else d_targets._replace(dense=None)


def _chunk_bwd(
    program: _Program,
    of_rows: Callable[[Any, Array, Any], tuple[Any, Array, tuple[Array | None, Any]]],
    wanted: _Wanted,
    shared: _Shared,
    carry: tuple[Any, Array | None],
    chunk: _Batch,
    rows: Any,
) -> tuple[tuple[Any, Array | None], tuple[Array | None, Any]]:
    """From a chunk's hidden states to u, over ``of_rows`` to d u, and back to hidden and kernel.

    ``of_rows`` gives d u, which rows count, and what else is to come out.
    """
    carry, d_kernel = carry
    u = product_fwd(chunk.hidden, shared.kernel, program.precision)
    carry, d_u, (counts, outputs) = over_rows(of_rows, carry, u, rows)
    hidden = keep(counts, chunk.hidden)  # a NaN there times a d u of 0 is a NaN
    d_hidden, d_kernel = product_bwd(
        d_u, hidden, shared.kernel, d_kernel, wanted.batch.hidden, program.precision
    )
    d_hidden = None if d_hidden is None else keep(counts, d_hidden)
    return (carry, d_kernel), (d_hidden, outputs)


# All chunks.


class _Results(NamedTuple):
    """Of the rows, or of the sum of their losses."""

    loss: Array
    lse: Array
    best: Best | None  # without gradient, of this shard's classes


def _rows_by(rule: str, program: _Program, shared: _Shared, batch: _Batch) -> _Results:
    """The rows, by one of the rules for logits, differentiated by JAX."""

    def body(carry: None, chunk: _Batch) -> tuple[None, _Results]:
        # In float32, which holds the operands' products: or JAX would round the kernel's gradient
        # to the operands' dtype in every chunk.
        hidden = keep(chunk.counts, chunk.hidden)  # a NaN there times a d u of 0 is a NaN
        u = product_fwd(hidden, shared.kernel, program.precision)
        x, _, counts, largest = _logits(program, shared, u, chunk)
        if program.metrics and chunk.counts is not None:
            u = product_fwd(*lax.stop_gradient((chunk.hidden, shared.kernel)), program.precision)
            largest = _logits(program, lax.stop_gradient(shared), u, chunk).best
        loss, lse = RULES[rule](x, _targets(shared, chunk), program.axis_name)
        return carry, _Results(keep(counts, loss), keep(counts, lse), largest)

    return over_chunks(body, None, batch, program.chunks)[1]


def _rows_and_state(
    program: _Program, shared: _Shared, batch: _Batch
) -> tuple[_Results, nz.Normalizer, Array | None]:
    """The rows, the state that a backward pass starts from, and which of them count.

    Shards of the classes meet behind the loop, once for all rows.
    """
    unweighted = program._replace(weighted=False)

    def of_rows(carry: None, u: Array, rows: _Batch) -> tuple[None, None, Any]:
        x, _, _, largest = _logits(unweighted, shared, u, rows)
        return carry, None, (share(x, _targets(shared, rows), program.axis_name), largest)

    def body(carry: None, chunk: _Batch) -> tuple[None, Any]:
        u = product_fwd(chunk.hidden, shared.kernel, program.precision)
        _, _, outputs = over_rows(of_rows, carry, u, chunk._replace(hidden=None))
        return carry, outputs

    _, (shares, largest) = over_chunks(body, None, batch, program.chunks)
    (loss, lse), state = merge_shares(shares, batch.targets.total, program.axis_name)
    counts = _have_loss(program, batch, state.m)
    loss, lse, state = jax.tree.map(functools.partial(keep, counts), (loss, lse, state))
    return _Results(loss, lse, largest), state, counts


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


# JAX may take the structure of the residuals from another call of the same function, in which other
# inputs were differentiated. So there is one structure, and empty arrays for what is not wanted.


def _marked(wanted: Any, gradients: Any) -> Any:
    """The gradients that are wanted, and an empty array for all others."""
    return jax.tree.map(
        lambda w, d: d if w else jnp.zeros((0,)), wanted, gradients, is_leaf=lambda x: x is None
    )


def _unmarked(gradients: Any) -> Any:
    """The same with None again."""
    return jax.tree.map(lambda d: None if d.shape == (0,) else d, gradients)


def _instantiate(g: Any) -> Array:
    return jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g


# Sums of rows: the gradient in the forward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(program: _Program, shared: _Shared, batch: _Batch) -> _Results:
    """sum_i w_i (loss_i + z lse_i^2), and without gradient lse."""
    shared, batch = _narrow(program, shared, batch)
    rows, _, _ = _rows_and_state(program, shared, batch)
    loss = weighted(rows.loss, rows.lse, batch.weight, shared.z_loss)
    return rows._replace(loss=jnp.sum(loss))


def _weighted_sum_fwd(
    program: _Program, shared_primals: _Shared, batch_primals: _Batch
) -> tuple[_Results, tuple[_Shared, _Batch]]:
    (shared, batch), flags = _primals((shared_primals, batch_primals))
    wanted = _Wanted(*flags)
    shared, batch = _narrow(program, shared, batch)

    def of_rows(carry: tuple[Array, _Shared], u: Array, rows: _Batch) -> tuple[Any, Array, Any]:
        total, d_shared = carry
        x, transform_bwd, counts, largest = _logits(program, shared, u, rows)
        (loss, lse), res = rows_fwd(x, _targets(shared, rows), program.axis_name)
        loss, lse = keep(counts, loss), keep(counts, lse)
        value, weighted_bwd = jax.vjp(weighted, loss, lse, rows.weight, shared.z_loss)
        g, g_lse, d_weight, d_z = weighted_bwd(jnp.ones_like(value))
        gs = (g, None if shared.z_loss is None else g_lse)
        d_shared, d_u, d_targets = _rows_bwd(
            program, shared, transform_bwd, res, gs, False, d_shared
        )
        d_shared = d_shared._replace(z_loss=_add(d_shared.z_loss, d_z))
        d_rows = _only(wanted.batch, _Batch(None, d_targets, d_weight, None))
        return (total + jnp.sum(value), d_shared), d_u, (counts, (lse, largest, d_rows))

    def body(carry: Any, chunk: _Batch) -> tuple[Any, Any]:
        rows = chunk._replace(hidden=None)
        return _chunk_bwd(program, of_rows, wanted, shared, carry, chunk, rows)

    total = zeros_as(batch.weight, ())
    zeros = _only(wanted.shared, jax.tree.map(lambda x: zeros_as(x, x.shape), shared))
    carry = ((total, zeros._replace(kernel=None)), zeros.kernel)
    carry, (d_hidden, outputs) = over_chunks(body, carry, batch, program.chunks)
    (total, d_shared), d_kernel = carry
    lse, largest, d_batch = outputs
    gradients = (d_shared._replace(kernel=d_kernel), d_batch._replace(hidden=d_hidden))
    return _Results(total, lse, largest), _marked(tuple(wanted), gradients)


def _weighted_sum_bwd(
    program: _Program, res: tuple[_Shared, _Batch], gs: _Results
) -> tuple[_Shared, _Batch]:
    d_shared, d_batch = _unmarked(res)
    g = _instantiate(gs.loss)
    g_all = psum(g, program.axis_name) if holds_shares(program.axis_name) else g

    def times(g: Array, d: Any) -> Any:
        return jax.tree.map(lambda d: g * d, d)

    d_targets = times(g, d_batch.targets)._replace(dense=times(g_all, d_batch.targets.dense))
    d_z = d_shared.z_loss  # a sum of lse^2, which may be infinite where the loss is finite
    d_z = None if d_z is None else jnp.where(g == 0, 0, g * d_z)
    return (
        times(g_all, d_shared)._replace(z_loss=d_z),
        times(g, d_batch)._replace(hidden=times(g_all, d_batch.hidden), targets=d_targets),
    )


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)


# Single rows: the logits again in the backward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(program: _Program, shared: _Shared, batch: _Batch) -> _Results:
    return _rows_and_state(program, *_narrow(program, shared, batch))[0]


def _single_rows_fwd(program: _Program, shared_primals: _Shared, batch_primals: _Batch) -> Any:
    (shared, batch), flags = _primals((shared_primals, batch_primals))
    shared, batch = _narrow(program, shared, batch)
    results, state, counts = _rows_and_state(program, shared, batch)
    batch = batch._replace(counts=counts)
    return results, (shared, batch, state, jax.tree.map(lambda w: jnp.zeros((int(w),)), flags))


def _single_rows_bwd(program: _Program, res: Any, gs: _Results) -> tuple[_Shared, _Batch]:
    shared, batch, state, flags = res
    wanted = _Wanted(*jax.tree.map(lambda w: w.size > 0, flags))
    program = program._replace(metrics=False, weighted=False)  # counts has it
    g_lse = None if isinstance(gs.lse, SymbolicZero) else gs.lse
    shares = holds_shares(program.axis_name)

    def of_rows(d_shared: _Shared, u: Array, at_rows: Any) -> tuple[_Shared, Array, Any]:
        rows, state, g, g_lse = at_rows
        x, transform_bwd, counts, _ = _logits(program, shared, u, rows)
        res = (x, _targets(shared, rows), state)
        d_shared, d_u, d_targets = _rows_bwd(
            program, shared, transform_bwd, res, (g, g_lse), shares, d_shared
        )
        return d_shared, d_u, (counts, _only(wanted.batch, _Batch(None, d_targets, None, None)))

    def body(carry: Any, at_chunk: Any) -> tuple[Any, Any]:
        chunk, *rest = at_chunk
        rows = (chunk._replace(hidden=None), *rest)
        return _chunk_bwd(program, of_rows, wanted, shared, carry, chunk, rows)

    zeros = _only(wanted.shared, jax.tree.map(lambda x: zeros_as(x, x.shape), shared))
    rows = (batch, state, _instantiate(gs.loss), g_lse)
    carry = (zeros._replace(kernel=None), zeros.kernel)
    carry, (d_hidden, d_batch) = over_chunks(body, carry, rows, program.chunks)
    d_shared, d_kernel = carry
    return d_shared._replace(kernel=d_kernel), d_batch._replace(hidden=d_hidden)


_rows.defvjp(_single_rows_fwd, _single_rows_bwd, symbolic_zeros=True)


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

    targets = row(batch.targets)
    if targets.dense is not None:
        targets = targets._replace(dense=targets.dense._replace(t=tile(targets.dense.t)))
    return (
        tile(shared)._replace(z_loss=row(shared.z_loss)),
        row(batch)._replace(hidden=tile(batch.hidden), targets=targets),
    )


class _Inputs(NamedTuple):
    hidden: Array
    kernel: Array
    labels: Array
    projection: Projection
    arrays: Arrays


def _prepare(
    inputs: _Inputs, static: Static, chunk_size: int | None
) -> tuple[_Program, _Shared, _Batch, Rows]:
    """A call as what all rows share and what each has, padded to whole chunks; and the rows."""
    hidden, kernel, labels, projection, arrays = inputs
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
    at = place(hidden, kernel)
    chunks, _, padding = tiling(n, classes, dtype, chunk_size=chunk_size, at=at)

    def flat(x: Array) -> Array:
        x = x.reshape(n, *x.shape[len(rows_shape) :])
        return jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)) if padding else x

    targets, dense = rows.targets, None
    if targets.label is not None and targets.dense is not None:
        axes = len(rows_shape)
        dense = jax.tree.map(lambda a: a.reshape(1, *a.shape[axes:]), targets.dense)
        targets = targets._replace(dense=None)
    counts = rows.counts
    if counts is None and padding:
        counts = jnp.ones(rows_shape, jnp.bool_)

    def number(x: Array | float | None) -> Array | None:
        return None if x is None else jnp.asarray(x, wide)

    # Wide here and narrow again in the rule, so that a gradient is rounded once, after all sums.
    if static.layout is None or static.layout.fsdp is None:
        kernel = kernel.astype(wide)
    else:
        kernel = gather_rows(kernel, static.layout.fsdp, varying(hidden), wide)
    shared = _Shared(
        kernel=kernel,
        bias=None if projection.bias is None else projection.bias.astype(wide),
        logit_scale=number(projection.logit_scale),
        softcap=number(projection.softcap),
        dense=dense,
        z_loss=number(arrays.z_loss),
    )
    hidden = mapped_as(hidden.astype(wide), targets.label)
    batch = _Batch(hidden, targets, rows.weight, counts)
    batch = jax.tree.map(flat, batch)
    program = _Program(
        chunks,
        dtype,
        product_precision(dtype),
        static.axis_name,
        arrays.weights is not None,
        static.return_metrics,
    )
    return program, *_typed_alike(shared, batch, static.axis_name), rows


def _whole(inputs: _Inputs, static: Static) -> tuple[_Inputs, Static]:
    """The same with all classes, as ``_softmax_cross_entropy`` explains."""
    names = mapped_axes(static.axis_name)
    if not names:
        return inputs, static
    hidden, kernel, labels, projection, arrays = inputs
    if labels.ndim == hidden.ndim:
        labels = whole(labels, names, labels.ndim - 1)
    class_weights = whole(arrays.class_weights, names, 0)
    inputs = _Inputs(
        hidden,
        whole(kernel, names, 1),
        labels,
        projection._replace(bias=whole(projection.bias, names, 0)),
        arrays._replace(class_weights=class_weights),
    )
    return inputs, static._replace(axis_name=None)


def _result(inputs: _Inputs, static: Static, chunk_size: int | None) -> Any:
    program, shared, batch, rows = _prepare(inputs, static, chunk_size)
    loss = None
    if static.rule == "vjp" and static.reduction != "none":
        loss_sum, lse, largest = _weighted_sum(program, shared, batch)
    else:
        run = _rows if static.rule == "vjp" else functools.partial(_rows_by, static.rule)
        loss, lse, largest = run(program, shared, batch)
        loss = weighted(loss, lse, batch.weight, shared.z_loss)
        loss_sum = jnp.sum(loss)

    def rows_of(x: Any) -> Array:  # an array, unless it is not returned
        return x[: rows.weight.size].reshape(rows.weight.shape)

    # Divided after the sum: before it, what is left of a confident row's loss or gradient would be
    # below float32's normal numbers, and 0.
    total = sums(loss_sum, rows, inputs.arrays, static.batch_axis_name)
    value = total.loss / denominator(total, static.reduction)
    if static.reduction == "none":
        value = rows_of(loss)
    if largest is None:
        return value
    predictions = first_of(largest, inputs.kernel.shape[1], static.axis_name)
    return value, metrics(total, rows_of(lse), rows, rows_of(predictions))


@functools.partial(jax.jit, static_argnames=("static", "chunk_size"), inline=True)
def _loss(inputs: _Inputs, static: Static, chunk_size: int | None) -> Any:
    hidden, kernel, labels, projection, arrays = inputs
    _options.check_projection(hidden, kernel, projection)
    shape, axes = (*hidden.shape[:-1], kernel.shape[1]), (hidden.ndim - 1,)
    _options.check_rows(labels, arrays, static, shape, axes, projection)
    if static.layout is None:
        check_axis_name("axis_name", static.axis_name, "the kernel", kernel)
        check_axis_name("batch_axis_name", static.batch_axis_name, "the hidden states", hidden)
        inputs, static = _whole(inputs, static)
        hidden, kernel, labels, projection, arrays = inputs
    if static.layout is None and is_explicit(hidden, kernel):
        # Types say how the inputs are split, but cannot say how chunks of split rows are.
        others = {
            "labels": labels,
            "where": arrays.where,
            "weights": arrays.weights,
            "class_weights": arrays.class_weights,
        }
        check_mapped(hidden=hidden, kernel=kernel, bias=projection.bias, **others)
        static = static._replace(layout=layout_of(hidden, kernel))
        split = (*sharding(hidden)[:-1], sharding(kernel)[1])
        check_splits("hidden and kernel", split, axes, **others)
    result = functools.partial(_result, chunk_size=chunk_size)
    layout = static.layout
    if layout is None:
        return result(inputs, static)
    return layout.run(result, inputs, static, len(shape), axes, specs(static, layout.of_rows()))


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
      bias: float [K]. Without softcap, a class with a bias of -inf cannot occur. With softcap it
        can: its logit is -softcap.
      logit_scale: a number or a scalar array, for example 1 / temperature.
      softcap: a number above 0 or a scalar array, a bound on the logits' magnitude, bias included.
        None is off.
      chunk_size: the most rows that a chunk may have. By default as many as have logits of 48 MiB
        on a CPU, 32 MiB elsewhere, so that memory does not grow with the rows; more where that is
        less than 128 rows on a CPU, up to a sixteenth of all, or on an accelerator less than 2048
        (512 of float32), up to an eighth.
      where: bool [...], the rows that count. The head has no mask of classes. To leave a class out,
        give it a bias of -inf or, with softcap, leave it out of kernel and bias.
      axis_name: inside ``jax.shard_map``, the mesh axis (or axes) along which the classes are
        split: kernel, bias, dense targets and class weights are this device's, labels are indices
        of all classes. With ``check_vma=False`` one that splits nothing goes unnoticed. For
        ``jax.pmap`` and ``jax.vmap``, and gradients taken inside, see ``softmax_cross_entropy``.
      weights, class_weights, label_smoothing, z_loss, ignore_index, reduction, return_metrics,
        batch_axis_name: as for ``softmax_cross_entropy``.
      rule: "vjp": gradients as above, for reverse mode. "jvp": the closed form for logits as
        ``jax.custom_jvp``, for forward mode too; "autodiff": no closed form. For these two JAX
        differentiates one chunk after the other, and matmuls are in float32.
        ``jax.experimental.jet`` needs "autodiff", no softcap, and one chunk.

    ``chunk_size``, ``ignore_index``, ``reduction``, ``return_metrics``, the axis names and ``rule``
    are Python values, static under ``jax.jit``: see ``softmax_cross_entropy``.

    Returns:
      The loss, float32 (float64 if hidden or kernel is), or ``(loss, sxe.Metrics)``. Gradients
      exist for hidden, kernel, bias, logit_scale, softcap, and all that ``softmax_cross_entropy``
      has them for, each in the dtype of its input, rounded once. One that is not asked for is not
      computed.

    Logits are accumulated in float32 whatever the operands are, and so are d hidden in its chunk
    and d kernel over all chunks. The gradient of the logits stays in float32 for its products on a
    CPU; on an accelerator it is rounded to bfloat16 where the operands are bfloat16.

    float32 is multiplied as float32, also where JAX's default for matmuls is TF32, on a GPU, or
    bfloat16, on a TPU. For those, which are several times as fast, ask JAX:
    ``jax.default_matmul_precision("tensorfloat32")`` or ``"bfloat16"``, around the call or as the
    option ``jax_default_matmul_precision``, applies to all products of the head, both ways.

    Rows that do not count contribute nothing to value or gradient, whatever stands in them.
    Infinite logits and bad labels do what they do in ``softmax_cross_entropy``.

    Raises:
      TypeError: for a dtype that is none of the above, or an option of a wrong type.
      ValueError: for a shape that does not fit, a ``where`` that masks classes, a ``chunk_size``
        below 1, ``jax.experimental.jet`` of a softcap, and as for ``softmax_cross_entropy``.

    Source: D0 and D7 of ``sxe.derivation``, and the chain rule at the top of this module.

    Example:
      >>> import jax, jax.numpy as jnp, sxe
      >>> hidden, kernel = jnp.array([[4.0, 0.0], [0.0, 2.0]]), jnp.array([[5.0, 0, 0], [0, 0, 1]])
      >>> labels = jnp.array([0, 2])
      >>> sxe.linear_softmax_cross_entropy(hidden, kernel, labels, reduction="none")
      Array([4.12231e-09, 2.39545e-01], dtype=float32)
      >>> jax.grad(sxe.linear_softmax_cross_entropy)(hidden, kernel, labels)
      Array([[-1.03058e-08,  1.03058e-09],
             [ 2.66267e-01, -1.06507e-01]], dtype=float32)
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
    inputs = _Inputs(
        _options.array("hidden", hidden),
        _options.array("kernel", kernel),
        _options.array("labels", labels, static.ignore_index),
        projection,
        arrays,
    )
    jet_traces = check_jet(static.rule, inputs, projection.softcap)
    size = _options.parse_chunk_size(chunk_size)
    try:
        return _loss(inputs, static=static, chunk_size=size)
    except KeyError as error:  # from jet, of a primitive for which it has no rule
        if not jet_traces or str(error) not in ("scan", "while"):
            raise
        raise ValueError(
            "hidden: expected as many rows as one chunk has in a call that jax.experimental.jet "
            f"differentiates, because jet can't differentiate a loop, got {inputs.hidden.shape}; "
            "raise chunk_size to the number of rows, or pass logits to sxe.softmax_cross_entropy"
        ) from error
