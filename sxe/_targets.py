"""Integer labels and dense targets in one form, and which rows count.

Every option about targets ends here, as a target t_k for each class and a weight for each row:

    integer label y     t_k = c_k ((1 - a) [k = y] + a / K)
    dense targets p     t_k = c_k ((1 - a) p_k + a / K)

with class weights c and label smoothing a. The row rule sees nothing but t.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import checkify

from sxe._axes import AxisName, psum


class Targets(NamedTuple):
    """t_k = label_target [k = label] + dense_k, which all classes together sum to total.

    ``label`` [...] counts from the first class of the tile and may lie outside of it. ``dense`` has
    the rank of the logits and is broadcast along its axes of size 1. Either part may be None. A
    total of NaN marks a label that is no class: it makes the row's loss and gradient NaN.
    """

    label: Array | None
    label_target: Array | None
    dense: Array | None
    total: Array


class Rows(NamedTuple):
    """Logits and targets of rows, and what each row weighs.

    A row that does not count has its logits and targets replaced by zeros and weighs 0. ``weight``
    multiplies the row's loss; ``norm`` is its share of the denominator of the mean.
    """

    logits: Array
    targets: Targets
    counts: Array | None
    weight: Array
    norm: Array


def any_class(x: Array, axis_name: AxisName) -> Array:
    """Whether x holds for any class of the row, on any shard: [..., K] to [...]."""
    found = jnp.any(x, axis=-1)
    return found if axis_name is None else lax.pmax(found.astype(jnp.int32), axis_name) > 0


def _both(a: Array | None, b: Array) -> Array:
    return b if a is None else a & b


def _at_label(x: Array, label: Array) -> Array:
    """x_label, [..., K] and [...] to [...], and 0 where the tile does not hold the label."""
    if jax.typeof(x).sharding.spec[-1] is not None:
        # On an explicit mesh a gather has no rule for a sharded class axis; a comparison has.
        k = lax.broadcasted_iota(jnp.int32, (1,) * label.ndim + x.shape[-1:], label.ndim)
        return jnp.sum(jnp.where(k == label[..., None], x, 0), axis=-1)
    inside = (label >= 0) & (label < x.shape[-1])
    index = jnp.where(inside, label, 0)[..., None]
    found = jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")
    return jnp.where(inside, found[..., 0], 0)


def target_tile(targets: Targets, classes: int) -> Array:
    """The targets t of a tile of so many classes: [..., K], or broadcastable to it."""
    label, label_target, dense, _ = targets
    if label is None or label_target is None:
        assert dense is not None
        return dense
    k = lax.broadcasted_iota(jnp.int32, (1,) * label.ndim + (classes,), label.ndim)
    t = jnp.where(k == label[..., None], label_target[..., None], 0)
    return t if dense is None else t + dense


def target_gaps(
    targets: Targets, x: Array, m: Array, axis_name: AxisName = None
) -> tuple[Array | None, Array | None]:
    """m - x at the label [...], over all shards, and at the dense targets [..., K] of this tile.

    A class with t = 0 and x = -inf has a gap of 0, not of infinity, so that 0 log 0 = 0 and that no
    derivative meets 0 * inf.
    """

    def gap(x: Array, m: Array, t: Array) -> Array:
        return jnp.where((t == 0) & (x == -jnp.inf), 0, m - x)

    label, label_target, dense, _ = targets
    at_label = at_dense = None
    if label is not None and label_target is not None:
        inside = (label >= 0) & (label < x.shape[-1])
        at_label = jnp.where(inside, gap(_at_label(x, label), m, label_target), 0)
        at_label = psum(at_label, axis_name)
    if dense is not None:
        at_dense = gap(x, m[..., None], dense)
    return at_label, at_dense


def target_cost(targets: Targets, x: Array, m: Array, axis_name: AxisName = None) -> Array:
    """sum_k t_k (m - x_k), [..., K] to [...], over the classes of this tile or of all shards."""
    at_label, at_dense = target_gaps(targets, x, m, axis_name)
    cost = jnp.zeros((), m.dtype)
    if at_label is not None:
        cost = targets.label_target * at_label
    if at_dense is not None:
        cost = cost + psum(jnp.sum(targets.dense * at_dense, axis=-1), axis_name)
    return cost


def _class_weight_of(label: Array, class_weights: Array, offset: Array | int) -> Array:
    """c_label, and 0 where this shard of the class weights does not hold the label."""
    label = label - offset
    inside = (label >= 0) & (label < class_weights.size)
    index = jnp.where(inside, label, 0)
    spec = jax.typeof(index).sharding.spec
    # On an explicit mesh the rows of the result are sharded as the labels are.
    out = spec if any(axis is not None for axis in spec) else None
    return jnp.where(inside, class_weights.at[index].get(out_sharding=out), 0)


def _check_labels(bad: Array, labels: Array, classes: int) -> None:
    """Under ``checkify``, an error that names the first bad label; otherwise nothing."""
    # Reductions of indices, axis by axis, because a flattened array has no sharding in general.
    row = jnp.zeros(bad.shape, jnp.int32)
    for axis in range(bad.ndim):
        row = row * bad.shape[axis] + lax.broadcasted_iota(jnp.int32, bad.shape, axis)
    rows = min(math.prod(bad.shape), jnp.iinfo(jnp.int32).max)
    first = jnp.min(jnp.where(bad, row, rows), initial=rows)
    label = jnp.sum(jnp.where(row == first, labels, 0), dtype=labels.dtype)
    position = jnp.unravel_index(first, bad.shape) if bad.ndim else ()
    checkify.debug_check(
        ~jnp.any(bad),
        "labels: expected class indices in [0, {classes}), got {label} at position {position}",
        classes=jnp.asarray(classes),
        label=label,
        position=jnp.stack(position) if position else jnp.zeros((0,), jnp.int32),
    )


def make_rows(
    logits: Array,
    labels: Array,
    *,
    where: Array | None,
    weights: Array | None,
    class_weights: Array | None,
    label_smoothing: Array | None,
    ignore_index: int | None,
    axis_name: AxisName,
) -> Rows:
    """Every option about targets and rows, ended: logits [..., K] and labels to ``Rows``.

    With ``axis_name``, logits, dense targets and class weights are this device's classes of all.
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    rows, local = logits.shape[:-1], logits.shape[-1]
    offset: Array | int = 0
    classes = local
    if axis_name is not None:
        offset = lax.axis_index(axis_name) * local
        classes = local * lax.axis_size(axis_name)
    sparse = jnp.issubdtype(labels.dtype, jnp.integer)
    c = None if class_weights is None else class_weights.astype(dtype)

    counts, in_range = where, None
    if sparse:
        # Narrow integers hold neither K nor, unsigned, a negative ignore_index: compare wide ones.
        if jnp.iinfo(labels.dtype).bits < 32:
            labels = labels.astype(jnp.int32)
        info = jnp.iinfo(labels.dtype)
        if ignore_index is not None and info.min <= ignore_index <= info.max:
            counts = _both(counts, labels != ignore_index)
        in_range = (labels >= 0) & (labels < classes)

    w = jnp.ones(rows, dtype) if weights is None else weights.astype(dtype)
    if weights is not None:
        # A row of weight 0 must not leak a NaN, but its loss is the derivative of the weight.
        m = jnp.max(lax.stop_gradient(logits), axis=-1)
        finite = jnp.isfinite(m if axis_name is None else lax.pmax(m, axis_name))
        counts = _both(counts, (w != 0) | (finite if in_range is None else finite & in_range))

    def keep(x: Array) -> Array:
        return x if counts is None else jnp.where(counts, x, jnp.zeros((), x.dtype))

    def keep_classes(x: Array) -> Array:
        return x if counts is None else jnp.where(counts[..., None], x, jnp.zeros((), x.dtype))

    logits = keep_classes(logits)
    w = norm = keep(w)

    if in_range is None:
        dense = keep_classes(labels.astype(dtype))
        if label_smoothing is not None:
            dense = (1 - label_smoothing) * dense + label_smoothing / classes
        if c is not None:
            dense = dense * c
        targets = Targets(None, None, dense, psum(jnp.sum(dense, axis=-1), axis_name))
        return Rows(logits, targets, counts, w, norm)

    bad = ~in_range if counts is None else counts & ~in_range
    _check_labels(bad, labels, classes)
    label = jnp.where(in_range, labels, -1).astype(jnp.int32)
    target = jnp.ones(rows, dtype)
    if c is not None:
        target = psum(_class_weight_of(label, c, offset), axis_name)
        norm = norm * target
    total, dense = target, None
    if label_smoothing is not None:
        target = (1 - label_smoothing) * target
        dense = label_smoothing / classes * (jnp.ones((1,), dtype) if c is None else c)
        mean_weight = 1 if c is None else psum(jnp.sum(c), axis_name) / classes
        total = target + label_smoothing * mean_weight
        dense = dense.reshape((1,) * len(rows) + dense.shape)
    total = jnp.where(bad, jnp.nan, total)
    return Rows(logits, Targets(label - offset, target, dense, total), counts, w, norm)
