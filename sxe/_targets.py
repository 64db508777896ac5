"""Integer labels and dense targets in one form, and which rows count.

Every option about targets ends here, as a target t_k for each class and a weight for each row:

    integer label y     t_k = c_k ((1 - a) [k = y] + a / K)
    dense targets p     t_k = c_k ((1 - a) p_k + a / K)

with class weights c and label smoothing a. The row rule sees nothing but t.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from sxe._axes import (
    LOCAL_CPU,
    AxisName,
    is_mapped_split,
    place,
    psum,
    reshard,
    sharding,
    vary_like,
)
from sxe._label_check import checked
from sxe._normalizer import Normalizer, apart


class Dense(NamedTuple):
    """A target for each class, and the sum of all in two parts: a large one does not hide others.

    The targets of all classes but k sum to rest + (largest - t_k), where nothing cancels, whichever
    class holds most.

    Attributes:
      t: [..., K] or, if all classes have the same, [..., 1].
      largest: the largest of all classes, [...], without derivative.
      rest: the sum over all classes with one largest left out, [...], with the sum's derivative.
    """

    t: Array
    largest: Array
    rest: Array


class Targets(NamedTuple):
    """t_k = label_target [k = label] + dense.t_k, which all classes together sum to total.

    ``label`` [...] counts from the first class of the tile and may lie outside of it. ``dense`` has
    the rank of the logits and is broadcast along its axes of size 1. Either part may be None. A
    total of NaN marks a label that is no class: it makes the row's loss and gradient NaN.
    """

    label: Array | None
    label_target: Array | None
    dense: Dense | None
    total: Array


class Rows(NamedTuple):
    """The targets of rows, and what each row weighs.

    A row that does not count has targets of zero and weighs 0, and its logits go through ``keep``.
    ``weight`` multiplies the row's loss; ``norm`` is its share of the denominator of the mean;
    ``counts`` is None where all of them do.
    """

    targets: Targets
    weight: Array
    norm: Array
    counts: Array | None


def any_class(x: Array, axis_name: AxisName) -> Array:
    """Whether x holds for any class of the row, on any shard: [..., K] to [...]."""
    found = jnp.max(x.astype(jnp.int32), axis=-1)  # of jnp.any, jax.experimental.jet has no rule
    return (found if axis_name is None else lax.pmax(found, axis_name)) > 0


def _both(a: Array | None, b: Array) -> Array:
    return b if a is None else a & b


def is_label(label: Array, classes: int) -> Array:
    """[k = label] for a tile of so many classes, [...] to [..., K]."""
    k = lax.broadcasted_iota(jnp.int32, (1,) * label.ndim + (classes,), label.ndim)
    return k == label[..., None]


def take_label(x: Array, label: Array) -> tuple[Array, Array]:
    """x_label, [..., K] and [...] to [...], and whether the tile holds the label: if not, any x."""
    inside = (label >= 0) & (label < x.shape[-1])
    if sharding(x)[-1] is not None:
        # On an explicit mesh a gather has no rule for a sharded class axis; a comparison has.
        return jnp.sum(jnp.where(is_label(label, x.shape[-1]), x, 0), axis=-1), inside
    index = jnp.where(inside, label, 0)[..., None]
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")[..., 0], inside


def keep(counts: Array | None, x: Array) -> Array:
    """x [...] or [..., F], with zeros in rows that do not count, whatever stands in them."""
    if counts is None:
        return x
    return jnp.where(counts if x.ndim == counts.ndim else counts[..., None], x, 0)


def target_tile(targets: Targets, classes: int) -> tuple[Array, Array]:
    """Of a tile of so many classes, t and T - t: [..., K], or broadcastable to it."""
    label, label_target, dense, total = targets
    assert dense is not None  # a label alone has its class apart: see the gradient of rows
    t, others = dense.t, dense.rest[..., None] + (dense.largest[..., None] - dense.t)
    if label is None or label_target is None:
        return t, others
    here, at_label = is_label(label, classes), label_target[..., None]
    nothing = 0 * total[..., None]  # or NaN, where the label is no class
    return t + jnp.where(here, at_label, 0), (others + nothing) + jnp.where(here, 0, at_label)


def _gap(t: Array, x: Array, m: Array, log1p_r: Array) -> Array:
    """m - x, but where t = 0 meets x = -inf."""
    return jnp.where((t == 0) & (x == -jnp.inf), -log1p_r, m - x.astype(m.dtype))


def target_gaps(
    targets: Targets, x: Array, m: Array, log1p_r: Array, axis_name: AxisName = None
) -> tuple[Array, Array]:
    """m - x at the label [...], over all shards, and at the dense targets [..., K] of this tile.

    Either is 0 where that part of the targets is None. Where t = 0 meets x = -inf the gap is not
    infinite but -log1p(r), so that the class costs (m - x) + log1p(r) = 0: 0 log 0 = 0, and no
    derivative meets 0 * inf.
    """
    label, label_target, dense, _ = targets
    at_label, at_dense = jnp.zeros_like(m), jnp.zeros_like(m)[..., None]
    if label is not None and label_target is not None:
        found, inside = take_label(x, label)
        at_label = jnp.where(inside, _gap(label_target, found, m, log1p_r), 0)
        at_label = psum(at_label, axis_name)
    if dense is not None:
        m, log1p_r = vary_like((m, log1p_r), x)
        at_dense = _gap(dense.t, x, m[..., None], log1p_r[..., None])
    return at_label, at_dense


def target_derivatives(
    targets: Targets, x: Array, state: Normalizer, axis_name: AxisName = None
) -> tuple[Array, Array]:
    """-log q at the label [...] and at the dense targets [..., K]: D0 differentiated in each t_k.

    It counts t_k's share of the total, so that the total itself has the derivative 0. Apart, the
    two parts of 0 log 0 would each meet a cotangent and be rounded before they cancel.
    """
    at_label, at_dense = target_gaps(targets, x, state.m, state.log1p_r, axis_name)
    return at_label + state.log1p_r, at_dense + vary_like(state.log1p_r, x)[..., None]


def target_cost(
    targets: Targets, x: Array, m: Array, log1p_r: Array, axis_name: AxisName = None
) -> Array:
    """sum_k t_k (m - x_k), [..., K] to [...], over the classes of this tile or of all shards."""
    at_label, _ = target_gaps(targets._replace(dense=None), x, m, log1p_r, axis_name)
    cost = jnp.zeros_like(m)
    if targets.label_target is not None:
        cost = targets.label_target * at_label
    if targets.dense is not None:
        m, log1p_r = vary_like((m, log1p_r), x)
        cost = cost + psum(_dense_cost(targets.dense.t, x, m, log1p_r), axis_name)
    return cost


@jax.custom_jvp
def _dense_cost(t: Array, x: Array, m: Array, log1p_r: Array) -> Array:
    """sum_k t_k (m - x_k), [..., K] to [...]: inf where t > 0 meets x = -inf, and 0 log 0 = 0.

    Without comparison or clamp, for which XLA's CPU backend would write out an array as large as x.
    """
    x, most = x.astype(m.dtype), jnp.finfo(m.dtype).max
    impossible = jnp.minimum(jnp.maximum(x, -most) - x, most)  # where x = -inf, and else 0
    half = jnp.minimum((m / 2)[..., None] - x / 2, most)  # m - x may overflow
    return 2 * jnp.sum(t * half * (1 + impossible), axis=-1)


def _dense_cost_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    # No tangent that is zero may meet an infinite gap.
    moved = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

    def by_gaps(*some: Array) -> Array:
        t, x, m, log1p_r = (dict(enumerate(primals)) | dict(zip(moved, some, strict=True))).values()
        return jnp.sum(t * _gap(t, x, m[..., None], log1p_r[..., None]), axis=-1)

    _, cost_dot = jax.jvp(by_gaps, [primals[i] for i in moved], [tangents[i] for i in moved])
    return _dense_cost(*primals), cost_dot


_dense_cost.defjvp(_dense_cost_jvp, symbolic_zeros=True)


def target_sum(targets: Targets, x: Array) -> Array:
    """sum_k t_k over the classes of this tile, [...]."""
    label, label_target, dense, _ = targets
    t = jnp.zeros(x.shape[:-1], targets.total.dtype)
    if label is not None and label_target is not None:
        t = jnp.where((label >= 0) & (label < x.shape[-1]), label_target, 0)
    if dense is not None:
        t = t + jnp.sum(dense.t, axis=-1) * (x.shape[-1] // dense.t.shape[-1])
    return t


class _Classes(NamedTuple):
    """The classes at hand among all: the number of all, and the index of the first at hand."""

    number: int
    first: Array | int
    axis_name: AxisName


def _classes_of(local: int, axis_name: AxisName) -> _Classes:
    if axis_name is None:
        return _Classes(local, 0, None)
    first = lax.axis_index(axis_name) * local
    return _Classes(local * lax.axis_size(axis_name), first, axis_name)


def _weight_of(label: Array, c: Array, classes: _Classes) -> Array:
    """The class weight of each label, [...], and 0 for a label that is no class."""
    index = label - classes.first
    inside = (index >= 0) & (index < c.size)
    index = jnp.where(inside, index, 0)
    # On an explicit mesh a gather is from a whole table, and its result split as the labels are.
    # Where a vmap maps a split axis of the labels, their type can't name it, and a sum is taken.
    c, split = reshard(c, (None,)), sharding(index)
    if is_mapped_split(index):
        c = _on_class_axis(c, index.ndim + 1)
        found = jnp.sum(jnp.where(is_label(index, c.shape[-1]), c, 0), axis=-1)
    else:
        found = c.at[index].get(out_sharding=PartitionSpec(*split) if any(split) else None)
    return psum(jnp.where(inside, found, 0), classes.axis_name)


def _on_class_axis(c: Array, ndim: int) -> Array:
    return c.reshape((1,) * (ndim - 1) + c.shape)


def _all_but_one(t: Array, largest: Array, total: Array) -> Array:
    """sum_k t_k of one tile with one largest target left out, [..., K] to [...].

    Only its value: the derivative is that of the whole sum, and ``_dense`` adds it.
    """
    largest_apart = apart(largest, total)[..., None]

    def apart_from_it() -> Array:
        # If the largest is more than twice the others' sum, each of them is below half of it. Then
        # the minimum is 0 for the largest and t for the others, and takes no comparison, as in
        # _dense_cost. The sum is one of magnitudes because targets may be negative.
        outweighs = jnp.sum(jnp.abs(t), axis=-1) < 1.5 * largest
        others = jnp.sum(jnp.minimum(t, largest_apart - t), axis=-1)
        return jnp.where(outweighs, others, total - largest)

    if place(t) != LOCAL_CPU:
        return apart_from_it()
    # On a CPU two more sums take time. Where no row needs them, the difference is as exact.
    needed = jnp.any(total < 1.5 * largest)
    return lax.cond(needed, apart_from_it, lambda: total - largest)


def _dense(t: Array, axis_name: AxisName) -> Dense:
    """The targets of all classes, or of a shard of them, with the parts of the sum over all."""
    largest, total = lax.stop_gradient(jnp.max(t, axis=-1)), jnp.sum(t, axis=-1)
    rest = _all_but_one(*lax.stop_gradient((t, largest, total)))
    if axis_name is not None:
        shard_largest, largest = largest, lax.pmax(largest, axis_name)
        # A shard without the largest of all adds its own again. Of shards that tie for it, all but
        # one do.
        top = shard_largest == largest
        rest = jnp.where(top, rest, rest + shard_largest)
        total, rest, tops = lax.psum((total, rest, top.astype(t.dtype)), axis_name)
        rest = lax.stop_gradient(rest + (tops - 1) * largest)
    return Dense(t, largest, rest + (total - lax.stop_gradient(total)))


def _dense_targets(p: Array, a: Array | None, c: Array | None, classes: _Classes) -> Targets:
    t = p if a is None else (1 - a) * p + a / classes.number
    t = t if c is None else t * _on_class_axis(c, t.ndim)
    dense = _dense(t, classes.axis_name)
    return Targets(None, None, dense, dense.largest + dense.rest)


def _label_targets(
    label: Array, weight: Array, a: Array | None, c: Array | None, classes: _Classes
) -> Targets:
    index = label - classes.first
    if a is None:
        return Targets(index, weight, None, weight)
    share = jnp.reshape(a / classes.number, (1,) * (label.ndim + 1))
    if c is None:
        one = share[..., 0]
        dense = Dense(share, one, one * (classes.number - 1))
    else:
        dense = _dense(share * _on_class_axis(c, label.ndim + 1), classes.axis_name)
    target = (1 - a) * weight
    return Targets(index, target, dense, target + (dense.largest + dense.rest))


def make_rows(
    labels: Array,
    *,
    shape: tuple[int, ...],
    finite: Array | None,
    where: Array | None,
    weights: Array | None,
    class_weights: Array | None,
    label_smoothing: Array | float | None,
    ignore_index: int | None,
    axis_name: AxisName,
    dtype: jnp.dtype,
) -> Rows:
    """Every option about targets and rows, ended: labels for logits of that shape to ``Rows``.

    Where a mesh axis splits the classes, logits, dense targets and class weights are this device's.
    ``finite`` says which rows have a loss if their label is good, None that all have. Targets and
    weights come out in ``dtype``.
    """
    classes = _classes_of(shape[-1], axis_name)
    a = None if label_smoothing is None else jnp.asarray(label_smoothing, dtype)
    c = None if class_weights is None else class_weights.astype(dtype)
    sparse = jnp.issubdtype(labels.dtype, jnp.integer)
    counts = where
    if sparse:
        # Narrow integers hold neither K nor, unsigned, a negative ignore_index: compare wide ones.
        if jnp.iinfo(labels.dtype).bits < 32:
            labels = labels.astype(jnp.int32)
        info = jnp.iinfo(labels.dtype)
        if ignore_index is not None and info.min <= ignore_index <= info.max:
            counts = _both(counts, labels != np.array(ignore_index, labels.dtype))
        good = (labels >= 0) & (labels < classes.number)
    else:
        labels = labels.astype(dtype)
        good = jnp.isfinite(psum(jnp.sum(labels, axis=-1), axis_name))

    w = jnp.ones(shape[:-1], dtype)
    if weights is not None:
        w = weights.astype(dtype)
        # A row of weight 0 leaks no NaN, but where it has a loss, that is its weight's derivative.
        counts = _both(counts, (w != 0) | _both(finite, good))
    w = norm = keep(counts, w)
    if not sparse:
        targets = _dense_targets(keep(counts, labels), a, c, classes)
        return Rows(targets, w, norm, counts)

    bad = ~good if counts is None else counts & ~good
    labels = checked(labels, bad, classes.number, ignore_index)
    label = jnp.where(good, labels, -1).astype(jnp.int32)
    label_weight = jnp.ones_like(w) if c is None else _weight_of(label, c, classes)
    norm = norm if c is None else norm * label_weight
    targets = _label_targets(label, label_weight, a, c, classes)
    # 0 / 0 and not a constant NaN, which would trip debug_nans where no label is bad.
    total = jnp.where(bad, 0, targets.total) / jnp.where(bad, 0, jnp.ones_like(w))
    targets = targets._replace(total=total)
    return Rows(targets, w, norm, counts)
