"""The softmax cross-entropy loss on logits, with its gradient in closed form.

    loss_i = sum_k t_ik (lse(x_i) - x_ik) + z lse(x_i)^2            line D0, and the z-loss
    d loss_i/dx_il = T_i q_il - t_il + 2 z lse(x_i) q_il            line D7

The rule for rows below has two results, the loss without its z-loss, and lse; everything after it
is plain JAX on arrays of a number a row. It is attached in three ways, chosen by ``rule``.
"""

from __future__ import annotations  # so that help() names types shortly

import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import jet
from jax.typing import ArrayLike

from sxe import _normalizer as nz
from sxe import _options
from sxe._axes import (
    AxisName,
    axis_names,
    batched_as,
    check_axis_name,
    check_mapped,
    check_splits,
    class_axes,
    classes_back,
    classes_last,
    is_tracked,
    mapped_as,
    mapped_axes,
    psum,
    reshard,
    shard_of,
    sharding,
    vary,
    vary_like,
    varying,
    whole,
)
from sxe._options import Arrays, Static
from sxe._reduction import (
    Metrics,
    Sums,
    best,
    denominator,
    first_of,
    metrics,
    specs,
    sums,
    weighted,
)
from sxe._targets import (
    Rows,
    Targets,
    any_class,
    is_label,
    keep,
    make_rows,
    take_label,
    target_cost,
    target_derivatives,
    target_gaps,
    target_sum,
    target_tile,
)

# The rule for rows: logits [..., K] and targets to the row loss and lse, both [...].


class Share(NamedTuple):
    """What the classes of one tile contribute to their rows, [...]: all of it, or a shard's part.

    The state (m, r) of their logits; sum_k t_k (m - x_k); and sum_k t_k, which only a shard needs.
    """

    state: nz.Normalizer
    cost: Array
    target: Array | None


def share(x: Array, targets: Targets, axis_name: AxisName) -> Share:
    state = nz.normalize(x)
    if axis_name is None:
        return Share(state, target_cost(targets, x, state.m, state.log1p_r), None)
    empty = state.m == -jnp.inf  # of a shard, where other shards may hold finite logits
    m, log1p_r = (jnp.where(empty, 0, a) for a in (state.m, state.log1p_r))
    return Share(state, target_cost(targets, x, m, log1p_r), target_sum(targets, x))


def merge_shares(
    share: Share, total: Array, axis_name: AxisName
) -> tuple[tuple[Array, Array], nz.Normalizer]:
    """The row loss and lse, and their state, from the shares of all shards."""
    state = nz.merge_over(share.state, axis_name)
    cost = share.cost
    if share.target is not None:
        # A shard measures costs from its own maximum, so that none of these terms is negative.
        own = jnp.where(share.state.m == -jnp.inf, 0, share.state.m)
        cost = psum(cost + share.target * (state.m - own), axis_name)
    loss = nz.row_loss(state, cost, total)
    return (loss, batched_as(loss, state.lse)), state


def _row_loss(
    x: Array, targets: Targets, axis_name: AxisName
) -> tuple[tuple[Array, Array], nz.Normalizer]:
    return merge_shares(share(x, targets, axis_name), targets.total, axis_name)


def _row_gradient(
    x: Array, targets: Targets, state: nz.Normalizer, g: Array, g_lse: Array | None
) -> Array:
    targets, state, g, g_lse = vary_like((targets, state, g, g_lse), x)
    label, label_target, dense, total = targets
    if label is None or label_target is None or dense is not None:
        return nz.row_gradient(x, target_tile(targets, x.shape[-1]), state, g, g_lse)
    # The label's class apart, so that all others have less to compute.
    t, total = label_target[..., None], total[..., None]
    others = nz.row_gradient(x, (None, total), state, g, g_lse)
    found, inside = take_label(x, label)
    x = jnp.where(inside, nz.wide(found), state.m)[..., None]  # elsewhere of no use, but finite
    at = nz.row_gradient(x, (t, total - t), state, g, g_lse)  # a total of one target: exactly 0
    return jnp.where(is_label(label, others.shape[-1]), at, others)


def _rows(x: Array, targets: Targets, axis_name: AxisName) -> tuple[Array, Array]:
    return _row_loss(x, targets, axis_name)[0]


_rows_vjp = jax.custom_vjp(_rows, nondiff_argnums=(2,))


def rows_fwd(
    x: Array, targets: Targets, axis_name: AxisName
) -> tuple[tuple[Array, Array], tuple[Array, Targets, nz.Normalizer]]:
    results, state = _row_loss(x, targets, axis_name)
    return results, (x, targets, state)


def rows_bwd(
    axis_name: AxisName,
    res: tuple[Array, Targets, nz.Normalizer],
    gs: tuple[Array, Array | None],
    shares: bool = False,
) -> tuple[Array, Targets]:
    """The gradients for logits, not yet rounded to their dtype, and for targets.

    ``shares``: each device holds a share of the cotangents of results that all devices have.
    """
    x, targets, state = res
    g, g_lse = gs
    at_label, at_dense = target_derivatives(targets, x, state, axis_name)
    d_label_target = None if targets.label_target is None else g * at_label
    if shares:
        g, g_lse = psum((g, g_lse), axis_name)
    d_x = _row_gradient(x, targets, state, g, g_lse)  # D7
    zeros = jax.tree.map(lambda a: vary_like(jnp.zeros_like(a), a), targets)
    d_dense = None
    if targets.dense is not None:
        d_t = vary_like(g, x)[..., None] * at_dense
        ones = tuple(i for i, n in enumerate(targets.dense.t.shape) if n == 1)
        d_dense = zeros.dense._replace(t=jnp.sum(d_t, axis=ones, keepdims=True))
    return d_x, Targets(None, d_label_target, d_dense, zeros.total)


def holds_shares(axis_name: AxisName) -> bool:
    """Whether cotangents come in shares, as for lax.psum: in shard_map without varying types."""
    return axis_name is not None and not is_tracked(axis_name)


def _rows_bwd(
    axis_name: AxisName,
    res: tuple[Array, Targets, nz.Normalizer],
    gs: tuple[Array, Array],
) -> tuple[Array, Targets]:
    d_x, d_targets = rows_bwd(axis_name, res, gs, holds_shares(axis_name))
    return d_x.astype(res[0].dtype), d_targets


_rows_vjp.defvjp(rows_fwd, _rows_bwd)

_rows_jvp = jax.custom_jvp(_rows, nondiff_argnums=(2,))


def _rows_jvp_rule(
    axis_name: AxisName, primals: tuple[Array, Targets], tangents: tuple[Any, Any]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    x, targets = primals
    x_dot, targets_dot = tangents
    (loss, lse), state = _row_loss(x, targets, axis_name)
    ones, zeros = jnp.ones_like(state.r), jnp.zeros_like(state.r)
    at_label, at_dense = target_derivatives(targets, x, state, axis_name)
    loss_dot, lse_dot = jnp.zeros_like(loss), jnp.zeros_like(lse)

    def over_classes(d: Array, x_dot: Array) -> Array:
        return psum(jnp.sum(d * x_dot, axis=-1), axis_name)

    # A tangent that is zero must not meet an infinite gap, so zeros are symbolic.
    if not isinstance(x_dot, SymbolicZero):
        x_dot = nz.wide(x_dot)  # once, so that its transpose rounds once
        d = _row_gradient(x, targets, state, ones, None)  # D7
        q = _row_gradient(x, targets, state, zeros, ones)
        loss_dot = loss_dot + over_classes(d, x_dot)
        lse_dot = lse_dot + over_classes(q, x_dot)
    if targets.label is not None and not isinstance(targets_dot.label_target, SymbolicZero):
        loss_dot = loss_dot + targets_dot.label_target * at_label
    if targets.dense is not None and not isinstance(targets_dot.dense.t, SymbolicZero):
        loss_dot = loss_dot + over_classes(at_dense, targets_dot.dense.t)
    return (loss, lse), (loss_dot, lse_dot)


_rows_jvp.defjvp(_rows_jvp_rule, symbolic_zeros=True)


def _rows_autodiff(x: Array, targets: Targets, axis_name: AxisName) -> tuple[Array, Array]:
    """The primal, arranged so that JAX's own derivative keeps its digits.

    Differentiated as it stands, the primal's gradient at a confident label is the difference of two
    rounded ones. Here the logits are measured from the maximum where it holds over half of the
    probability: it is then a constant 0, and its gradient the sum of all others'. No part of it has
    a custom rule, or ``jax.experimental.jet`` could not differentiate it.
    """
    x = nz.wide(x)
    state = nz.merge_over(nz.normalize_constant(lax.stop_gradient(x)), axis_name)
    total = lax.stop_gradient(targets.total)
    # 0, or NaN in a row without a distribution or with a label that is no class: it is NaN then in
    # value and in every shard's derivative.
    nothing = (state.m - state.m) + (state.r - state.r) + (total - total)
    x = jnp.where(x == -jnp.inf, x, x * (1 + nothing)[..., None])
    confident = (state.r < 1) & (state.m > -jnp.inf)
    top = (x == state.m[..., None]) & confident[..., None]
    largest = psum(jnp.sum(jnp.where(top, x, 0), axis=-1), axis_name)
    origin = jnp.where(confident, largest, state.m)
    x = jnp.where(top, 0, x - vary_like(origin, x)[..., None])
    moved = nz.merge_over(nz.normalize_tile(x), axis_name)  # plain: nothing in it has a rule
    # The move rounded x. r has the value from before it, and the derivative from after it.
    moved = moved._replace(r=state.r + (moved.r - lax.stop_gradient(moved.r)))
    # sum_k t_k (lse - x_k), without the total: see target_derivatives.
    at_label, at_dense = target_gaps(targets, x, moved.lse, jnp.zeros_like(moved.r), axis_name)
    loss = nothing
    if targets.label_target is not None:
        loss = loss + targets.label_target * at_label
    if targets.dense is not None:
        loss = loss + psum(jnp.sum(targets.dense.t * at_dense, axis=-1), axis_name)
    return loss, origin + moved.lse


RULES: dict[str, Callable[[Array, Targets, AxisName], tuple[Array, Array]]] = {
    "vjp": _rows_vjp,
    "jvp": _rows_jvp,
    "autodiff": _rows_autodiff,
}


def check_jet(rule: str, inputs: Any, softcap: Any = None) -> bool:
    """Whether ``jax.experimental.jet`` differentiates this call.

    Raises where jet would fail with an error that does not say why.
    """
    if not any(isinstance(x, jet.JetTracer) for x in jax.tree.leaves(inputs)):
        return False
    reason = (
        "in a call that jax.experimental.jet differentiates, because jet can't differentiate any "
        "function that has a custom rule"
    )
    if rule != "autodiff":
        raise ValueError(
            f"rule: expected 'autodiff' {reason}, got {rule!r}; sxe.softmax_cross_entropy and "
            "sxe.linear_softmax_cross_entropy take rule='autodiff'"
        )
    if softcap is not None:
        raise ValueError(
            f"softcap: expected None {reason}, got {softcap!r}; pass capped logits to "
            "sxe.softmax_cross_entropy"
        )
    return True


# From the caller's arrays to rows, through the rule, to a result.


class _Inputs(NamedTuple):
    logits: Array
    labels: Array
    arrays: Arrays


class _Prepared(NamedTuple):
    """Rows for the rule; the logits with masked classes at -inf; and that mask of classes.

    ``x`` is the logits once more, with zeros in rows that do not count.
    """

    x: Array
    rows: Rows
    logits: Array
    class_mask: Array | None


def _typed_alike(x: Array, targets: Targets, axis_name: AxisName) -> tuple[Array, Targets]:
    """Both, typed as varying along the same mesh axes and as split in the same way.

    shard_map and explicit meshes want a cotangent in the type of its input. The rule's cotangents
    have the joint type of all inputs, so that each input is given that type.
    """
    every = frozenset().union(*(varying(a) for a in jax.tree.leaves((x, targets))))
    one_a_row = every - set(axis_names(axis_name))
    tiles = (x, targets.label, None if targets.dense is None else targets.dense.t)
    splits = [sharding(a) for a in tiles if a is not None]
    spec = [next(filter(None, at), None) for at in itertools.zip_longest(*splits)]

    def alike(a: Array) -> Array:
        return vary(reshard(a, spec[: a.ndim]), every if a.ndim == x.ndim else one_a_row)

    return alike(mapped_as(x, targets.label)), jax.tree.map(alike, targets)


def _prepare(inputs: _Inputs, static: Static) -> _Prepared:
    logits, labels, arrays = inputs
    axes = class_axes(static.axis, logits.ndim)
    where, class_mask = arrays.where, None
    if labels.shape == logits.shape:
        labels = classes_last(labels, axes)
    if where is not None and where.shape == logits.shape:
        class_mask = classes_last(where, axes)
        where = any_class(class_mask, static.axis_name)
    logits = classes_last(logits, axes)
    if class_mask is not None:
        logits = jnp.where(class_mask, logits, -jnp.inf)
    finite = None
    if arrays.weights is not None:
        m = jnp.max(lax.stop_gradient(logits), axis=-1)
        finite = jnp.isfinite(m if static.axis_name is None else lax.pmax(m, static.axis_name))
    rows = make_rows(
        labels,
        shape=logits.shape,
        finite=finite,
        where=where,
        weights=arrays.weights,
        class_weights=arrays.class_weights,
        label_smoothing=arrays.label_smoothing,
        ignore_index=static.ignore_index,
        axis_name=static.axis_name,
        dtype=jnp.dtype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32),
    )
    x, targets = _typed_alike(keep(rows.counts, logits), rows.targets, static.axis_name)
    return _Prepared(x, rows._replace(targets=targets), logits, class_mask)


def _metrics(total: Sums, lse: Array, prepared: _Prepared, static: Static) -> Metrics:
    predictions = first_of(best(prepared.logits), prepared.logits.shape[-1], static.axis_name)
    return metrics(total, lse, prepared.rows, predictions)


def _whole(inputs: _Inputs, static: Static) -> tuple[_Inputs, Static]:
    """The same with all classes at hand, if each example of a ``jax.vmap`` holds a shard of them.

    Where JAX runs the backward pass of a ``jax.custom_vjp``, that axis has no name any more, and
    cotangents are shares in some calls but not in others. So no rule may have a lax.psum over it.
    """
    names = mapped_axes(static.axis_name)
    if not names:
        return inputs, static
    logits, labels, arrays = inputs
    axis = class_axes(static.axis, logits.ndim)[0]
    where, class_weights = arrays.where, whole(arrays.class_weights, names, 0)
    if labels.shape == logits.shape:
        labels = whole(labels, names, axis)
    if where is not None and where.shape == logits.shape:
        where = whole(where, names, axis)
    arrays = arrays._replace(where=where, class_weights=class_weights)
    return _Inputs(whole(logits, names, axis), labels, arrays), static._replace(axis_name=None)


def _result(inputs: _Inputs, static: Static) -> Any:
    prepared = _prepare(inputs, static)
    rows, z_loss = prepared.rows, inputs.arrays.z_loss
    loss, lse = RULES[static.rule](prepared.x, rows.targets, static.axis_name)
    z = None if z_loss is None else jnp.asarray(z_loss, loss.dtype)
    loss = weighted(loss, lse, rows.weight, z)
    total = sums(jnp.sum(loss), rows, inputs.arrays, static.batch_axis_name)
    none = static.reduction == "none"
    value = loss if none else total.loss / denominator(total, static.reduction)
    return (value, _metrics(total, lse, prepared, static)) if static.return_metrics else value


def _result_with_gradient(inputs: _Inputs, static: Static) -> Any:
    prepared = _prepare(inputs, static)
    rows, z_loss = prepared.rows, inputs.arrays.z_loss
    x = prepared.x
    (loss, lse), state = _row_loss(x, rows.targets, static.axis_name)
    z = None if z_loss is None else jnp.asarray(z_loss, loss.dtype)
    loss = weighted(loss, lse, rows.weight, z)
    total = sums(jnp.sum(loss), rows, inputs.arrays, static.batch_axis_name)
    g = rows.weight / denominator(total, static.reduction)
    g_lse = None if z is None else 2 * z * lse * g
    gradient = _row_gradient(x, rows.targets, state, g, g_lse)  # D7
    if prepared.class_mask is not None:
        gradient = jnp.where(prepared.class_mask, gradient, 0)
    logits = inputs.logits
    axes = class_axes(static.axis, logits.ndim)
    gradient = classes_back(gradient.astype(logits.dtype), axes, logits.shape)
    value = total.loss / denominator(total, static.reduction)
    if static.return_metrics:
        return (value, _metrics(total, lse, prepared, static)), gradient
    return value, gradient


@functools.partial(jax.jit, static_argnames=("static", "with_gradient"), inline=True)
def _loss(inputs: _Inputs, static: Static, with_gradient: bool = False) -> Any:
    logits, labels, arrays = inputs
    _options.check_logits("logits", logits)
    axes = class_axes(static.axis, logits.ndim)
    _options.check_rows(labels, arrays, static, logits.shape, axes)
    result = _result_with_gradient if with_gradient else _result
    layout = static.layout
    if layout is None:
        check_axis_name("axis_name", static.axis_name, "the logits", logits)
        check_axis_name("batch_axis_name", static.batch_axis_name, "the logits", logits)
        inputs, static_of_whole = _whole(inputs, static)
        logits, labels, arrays = inputs
        others = {
            "labels": labels,
            "where": arrays.where,
            "weights": arrays.weights,
            "class_weights": arrays.class_weights,
        }
        check_mapped(logits=logits, **others)
        check_splits("logits", sharding(logits), axes, **others)
        found = result(inputs, static_of_whole)
        if with_gradient and static_of_whole.axis_name != static.axis_name:
            value, gradient = found
            return value, shard_of(gradient, static.axis_name, axes[0])
        return found
    out = specs(static, layout.of_rows())
    out = (out, layout.of_logits(logits.ndim, axes)) if with_gradient else out
    return layout.run(result, inputs, static, logits.ndim, axes, out)


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_index: int | None = None,
    axis: int | tuple[int, ...] = -1,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_metrics: bool = False,
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    rule: Literal["vjp", "jvp", "autodiff"] = "vjp",
) -> Any:
    """Softmax cross-entropy of logits and labels, with its gradient in closed form.

    With targets t_i (from the labels, see below), T_i = sum_k t_ik, q_i = softmax(logits_i):

        loss_i         = -sum_k t_ik log q_ik + z_loss lse(logits_i)^2
        d loss_i/d x_l = T_i q_il - t_il + 2 z_loss lse(logits_i) q_il

    The loss keeps full relative precision at every magnitude of the logits, and so do the two terms
    of the gradient, q (T - t) and t (1 - q), whichever class holds most of T. With label smoothing
    a and class weights c, an integer label y is t_k = c_k ((1 - a) [k = y] + a / K), and dense
    targets p are t_k = c_k ((1 - a) p_k + a / K). No [N, K] one-hot array is made.

    Args:
      logits: [..., K], bfloat16, float16, float32 or float64.
      labels: class indices [...] of any integer dtype, or dense targets [..., K] of a float dtype:
        any non-negative weights, which need not sum to one.
      where: bool [...], the rows that count. Or bool [..., K], the classes that can occur in each
        row: the others are as a logit of -inf, and a row with none left does not count.
      weights: float [...], a weight for each row. A row of weight 0 does not count. Negative ones,
        such as advantages, are for "sum", for "none", and for a mean whose weights do not sum to 0.
      class_weights: float [K], a weight for each class.
      label_smoothing: in [0, 1], the share of the target that is spread over all classes.
      z_loss: finite, at least 0, the weight of lse^2, which keeps logits from drifting.
      ignore_index: integer labels with this value mark rows that do not count. Off by default:
        PyTorch's -100 is then out of range, and its row NaN.
      axis: the class axis of the logits, or a tuple of axes; a label is then the flat index over
        them, in that order, and ``class_weights`` is flat as well.
      reduction: "mean", sum_i w_i loss_i / sum_i w_i over the rows that count, where w_i is the
        row's weight times, for integer labels, its label's class weight; 0 where nothing counts,
        and NaN, with its gradient, where something counts and sum_i w_i is 0. "sum", sum_i w_i
        loss_i. "none", w_i loss_i [...], 0 in rows that do not count.
      return_metrics: also return ``sxe.Metrics``, from the same pass and without gradient; for
        ``jax.value_and_grad`` with ``has_aux=True``.
      axis_name: inside ``jax.shard_map``, the mesh axis (or axes) along which the classes are
        split. Logits, dense targets, class weights and class masks are then this device's classes;
        labels are indices of all classes. An axis that splits nothing is an error. With
        ``check_vma=False`` it goes unnoticed, and the value is wrong. ``axis_name`` may also be an
        axis of ``jax.pmap`` or ``jax.vmap``, where one that splits nothing goes unnoticed as well.
        A gradient that is taken inside one of these, or inside ``jax.shard_map`` with
        ``check_vma=False``, is that of the sum of all shards' losses, as with ``lax.psum`` itself:
        of n shards, n times the right one. Of an argument that every shard has whole, such as the
        weights, each gets a part of that. A gradient that is taken outside is right.
      batch_axis_name: likewise, those along which the rows are split, so that "mean", "sum" and the
        sums in the metrics are over the global batch. The same holds for gradients taken inside.
      rule: how the closed form is attached. "vjp": as ``jax.custom_vjp``, for reverse mode, with
        the least memory; forward mode then raises JAX's "can't apply forward-mode autodiff (jvp) to
        a custom_vjp function". "jvp": as ``jax.custom_jvp``, for forward mode too. "autodiff": not
        at all, so that JAX differentiates the loss itself; ``jax.experimental.jet`` needs it.

    ``ignore_index``, ``axis``, ``reduction``, ``return_metrics``, the axis names and ``rule`` are
    Python values, static under ``jax.jit``: bind them by ``functools.partial``, or name them in
    ``static_argnames``. Logits that an Explicit mesh splits need ``jax.set_mesh(mesh)``.

    Returns:
      The loss, float32 (float64 for float64 logits), or ``(loss, sxe.Metrics)``. Gradients exist
      for logits, dense targets, weights, class weights and traced options, each in the dtype of its
      input, rounded once. For dense targets it is -log q, for the weights of a sum the row losses.

    Rows that do not count contribute nothing to value or gradient, whatever stands in them: NaN,
    infinities, labels out of range. A logit of -inf has q = 0 and gradient 0; where it is the
    label's, the loss is +inf and the gradient there -1. 0 log 0 = 0, in value and derivatives. A
    row of -inf alone, a +inf, a NaN or an index outside of [0, K) gives NaN in that row, value and
    gradient, and in no other row. Under ``checkify`` such an index raises an error that names its
    position, the label and K.

    Raises:
      TypeError: for a dtype that is none of the above, or an option of a wrong type.
      ValueError: for a shape or an axis that does not fit, K = 0, an unknown reduction or rule, an
        option out of range (of a ``jax.Array`` the value is not looked at), ``ignore_index`` with
        dense targets, a mesh axis that does not split the logits, arrays that an Explicit mesh
        splits otherwise, or ``jax.experimental.jet`` of a rule other than "autodiff".

    Source: lines D0 and D7 of ``sxe.derivation``; the arithmetic is explained in
    ``sxe._normalizer``.

    Example:
      >>> import jax, jax.numpy as jnp, sxe
      >>> logits, labels = jnp.array([[20.0, 0.0], [1e8, 1e8]]), jnp.array([0, 1])
      >>> sxe.softmax_cross_entropy(logits, labels, reduction="none")
      Array([2.06115e-09, 6.93147e-01], dtype=float32)
      >>> jax.grad(sxe.softmax_cross_entropy)(logits, labels)
      Array([[-1.03058e-09,  1.03058e-09],
             [ 2.50000e-01, -2.50000e-01]], dtype=float32)
    """
    arrays, static = _options.parse(
        where=where,
        weights=weights,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        axis=axis,
        reduction=reduction,
        return_metrics=return_metrics,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        rule=rule,
        rules=tuple(RULES),
    )
    given = _options.array("logits", logits), _options.array("labels", labels, static.ignore_index)
    inputs = _Inputs(*given, arrays)
    check_jet(static.rule, inputs)
    return _loss(inputs, static=static)


def softmax_cross_entropy_with_gradient(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_index: int | None = None,
    axis: int | tuple[int, ...] = -1,
    reduction: Literal["mean", "sum"] = "mean",
    return_metrics: bool = False,
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Any:
    """The loss and its gradient with respect to the logits, both from the closed form in one pass.

    The gradient is line D7, (1/N) (T q - y) for a mean over N rows: what ``jax.grad`` gives for
    ``softmax_cross_entropy``, but computed without autodiff. It has the shape and dtype of the
    logits; the derivation's K x N layout is ``sxe.derivation``'s.

    Args:
      logits, labels and options: as for ``softmax_cross_entropy``, static ones too, without
        ``rule``, and with ``reduction`` "mean" or "sum".

    Returns:
      ``(loss, gradient)``, or ``((loss, sxe.Metrics), gradient)`` with ``return_metrics``. With
      ``batch_axis_name`` the gradient is that of the global loss for this device's rows.

    Infinities, bad labels and errors are as for ``softmax_cross_entropy``.

    Example:
      >>> import jax.numpy as jnp, sxe
      >>> logits, labels = jnp.zeros((1, 4)), jnp.array([2])
      >>> sxe.softmax_cross_entropy_with_gradient(logits, labels)
      (Array(1.38629, dtype=float32), Array([[ 0.25,  0.25, -0.75,  0.25]], dtype=float32))
    """
    arrays, static = _options.parse(
        where=where,
        weights=weights,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        axis=axis,
        reduction=reduction,
        reductions=("mean", "sum"),
        return_metrics=return_metrics,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        rule="vjp",
        rules=tuple(RULES),
    )
    given = _options.array("logits", logits), _options.array("labels", labels, static.ignore_index)
    inputs = _Inputs(*given, arrays)
    check_jet(static.rule, inputs)
    return _loss(inputs, static=static, with_gradient=True)
