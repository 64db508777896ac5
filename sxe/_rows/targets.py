"""The targets of rows: a label, or a target for each class, or both.

Every option about targets ends as a target t_k for each class, before any function of rows:

    integer label y               t_k = c_k ((1 - a) [k = y] + a / K)
    labels y_m of weights w_m     t_k = c_k ((1 - a) sum_m w_m [k = y_m] + a / K)
    dense targets p               t_k = c_k ((1 - a) p_k + a / K)

with class weights c and label smoothing a. The sum of all is T. What the gradient needs of the
targets of all other classes, T - t_k, is not computed as that difference: it would cancel where one
target holds nearly all of T.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sxe._arrays import AxisName, are_known, pmax, psum, sharding
from sxe._backend import Backend, apart


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


class Sparse(NamedTuple):
    """Targets of a few labels: t_k = sum_m target_m [k = label_m], over repeated ones too.

    Attributes:
      label: [..., M], counted from the first class of the tile. Each may lie outside of the tile.
        None in a gradient.
      target: [..., M].
    """

    label: Any
    target: Array

    def of_classes(self) -> tuple[Array, Array]:
        """What all labels add to each label's class, and to all other classes: [..., M]."""
        same = self.label[..., :, None] == self.label[..., None, :]
        here, elsewhere = (jnp.where(at, self.target[..., None, :], 0) for at in (same, ~same))
        return jnp.sum(here, axis=-1), jnp.sum(elsewhere, axis=-1)


class Targets(NamedTuple):
    """t_k = label_target [k = label] + sparse.t_k + dense.t_k, and all classes sum to total.

    Attributes:
      label: [...], counted from the first class of the tile. It may lie outside of the tile.
      label_target: [...].
      dense: has as many axes as the logits, and is broadcast along those of size 1.
      total: T, [...]. NaN marks a label that is no class: it makes the row's loss and gradient NaN.
      sparse: several labels of each row, in place of the one.

    A part may be None.
    """

    label: Array | None
    label_target: Array | None
    dense: Dense | None
    total: Array
    sparse: Sparse | None = None

    @property
    def labels(self) -> Sparse | None:
        """The labels of each row: several, or the one with M = 1, or None."""
        if self.label is None or self.label_target is None:
            return self.sparse
        return Sparse(self.label[..., None], self.label_target[..., None])


class Rows(NamedTuple):
    """The targets of rows, and what each row weighs, [...].

    A row that does not count has targets of zero and weighs 0, and its logits go through ``keep``.

    Attributes:
      targets: of a loss, see there. In the head, None where they are logits of hidden states.
      weight: multiplies the row's results.
      norm: the row's part of the denominator of the mean, or None where it is not needed.
      mask: bool, the rows that count, or None where all of them do.
    """

    targets: Any
    weight: Any
    norm: Any
    mask: Array | None

    def with_loss(self, has_loss: Array) -> Array:
        """Of the rows that count, those that weigh something or whose logits have a loss."""
        with_loss = (self.weight != 0) | has_loss
        return with_loss if self.mask is None else self.mask & with_loss


def is_label(label: Array, classes: int) -> Array:
    """[k = label] for a tile of so many classes, [...] to [..., K]."""
    k = lax.broadcasted_iota(jnp.int32, (1,) * label.ndim + (classes,), label.ndim)
    return k == label[..., None]


def take_labels(x: Array, label: Array) -> tuple[Array, Array]:
    """x at the labels, [..., K] to [..., M], and whether the tile holds each: if not, any x."""
    inside = (label >= 0) & (label < x.shape[-1])
    if sharding(x)[-1] is not None:
        # On an Explicit mesh a gather has no rule for a sharded class axis. A comparison has one.
        return _compare_labels(x, label), inside
    index = jnp.where(inside, label, 0)
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds"), inside


def _compare_labels(x: Array, label: Array) -> Array:
    """x at the labels, [..., K] to [..., M], and 0 where the tile does not hold one."""
    each = (is_label(label[..., m], x.shape[-1]) for m in range(label.shape[-1]))
    found = [jnp.sum(jnp.where(here, x, 0), axis=-1, keepdims=True) for here in each]
    # Something stands in front because there may be no label, and nothing to join.
    return jnp.concatenate([jnp.zeros_like(label[..., :0], x.dtype), *found], axis=-1)


def put_labels(d: Array, label: Array, at_label: Array, backend: Backend) -> Array:
    """d [..., K] with at_label [..., M] at the labels that the tile holds.

    Where a label is repeated, its values are the same.
    """
    number, classes = label.shape[-1], d.shape[-1]
    few = are_known(number) and number <= backend.most_label_comparisons
    if few or any(sharding(d)):
        for m in range(number):
            d = jnp.where(is_label(label[..., m], classes), at_label[..., m, None], d)
        return d
    rows = tuple(range(d.ndim - 1))
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=(),
        inserted_window_dims=(d.ndim - 1,),
        scatter_dims_to_operand_dims=(d.ndim - 1,),
        operand_batching_dims=rows,
        scatter_indices_batching_dims=rows,
    )
    # Unlike d.at, it drops a label below 0 too, instead of counting from the end.
    return lax.scatter(d, label[..., None], at_label, dimensions, mode="drop")


def class_tile(targets: Targets) -> tuple[Array | None, Array]:
    """Of each class that is no label's, t and T - t: [..., K] or [..., 1], and None for t = 0."""
    total = targets.total[..., None]
    if targets.dense is None:
        return None, total
    t, others = targets.dense.t, _others_of_dense(targets.dense, targets.dense.t)
    if (labels := targets.labels) is None:
        return t, others
    # 0 * total is 0 or, where a label is no class, NaN.
    return t, others + (jnp.sum(labels.target, axis=-1, keepdims=True) + 0 * total)


def label_tile(targets: Targets, labels: Sparse) -> tuple[Array, Array]:
    """Of each label's class, t and T - t: [..., M]."""
    t, others = labels.of_classes()
    others = others + 0 * targets.total[..., None]
    if targets.dense is None:
        return t, others
    dense_t = targets.dense.t
    if dense_t.shape[-1] != 1 and jax.typeof(labels.label).sharding.mesh.explicit_axes:
        # On an Explicit mesh rows that are split, or mapped, can't gather from what they share.
        dense_t = _compare_labels(dense_t, labels.label)
    elif dense_t.shape[-1] != 1:
        dense_t, _ = take_labels(dense_t, labels.label)
    return t + dense_t, others + _others_of_dense(targets.dense, dense_t)


def _others_of_dense(dense: Dense, t: Array) -> Array:
    """The sum of all dense targets but t [..., F]."""
    return dense.rest[..., None] + (dense.largest[..., None] - t)


def target_sum(targets: Targets, x: Array) -> Array:
    """sum_k t_k over the classes of this tile, [...]."""
    t = jnp.zeros(x.shape[:-1], targets.total.dtype)
    if (labels := targets.labels) is not None:
        label, target = labels
        inside = (label >= 0) & (label < x.shape[-1])
        t = jnp.sum(jnp.where(inside, target, 0), axis=-1)
    if (dense := targets.dense) is not None:
        t = t + jnp.sum(dense.t, axis=-1) * (x.shape[-1] // dense.t.shape[-1])
    return t


def gap(t: Array, x: Array, m: Array, log1p_r: Array) -> Array:
    """m - x, which a target t multiplies in D0.

    Where t = 0 meets x = -inf it is not infinite but -log1p(r), so that the class costs
    (m - x) + log1p(r) = 0: 0 log 0 = 0, and no derivative meets 0 * inf.
    """
    return jnp.where((t == 0) & (x == -jnp.inf), -log1p_r, m - x.astype(m.dtype))


def label_gap(labels: Sparse, x: Array, m: Array, log1p_r: Array) -> Array:
    """m - x at each label, [..., M], and 0 where the tile does not hold it."""
    found, inside = take_labels(x, labels.label)
    return jnp.where(inside, gap(labels.target, found, m[..., None], log1p_r[..., None]), 0)


def dense_cost(t: Array, x: Array, m: Array, log1p_r: Array) -> Array:
    """sum_k t_k (m - x_k), [..., K] to [...]: D0 without log1p(r). The plain twin."""
    return jnp.sum(t * gap(t, x, m[..., None], log1p_r[..., None]), axis=-1)


def sum_without_largest(t: Array, largest: Array, total: Array, backend: Backend) -> Array:
    """sum_k t_k of one tile with one largest target left out, [..., K] to [...]. The plain twin."""
    # If the largest is more than twice the others' sum, each of them is below half of it. Then the
    # minimum is 0 for the largest and t for the others, and takes no comparison. Targets may be
    # negative, so that magnitudes are compared.
    outweighs = jnp.sum(jnp.abs(t), axis=-1) < 1.5 * largest
    others = jnp.sum(jnp.minimum(t, apart(largest, total, backend)[..., None] - t), axis=-1)
    return jnp.where(outweighs, others, total - largest)


def merge_dense(shard: Dense, axis_name: AxisName) -> Dense:
    """The targets of one shard, with the parts of the sum over all shards."""
    if axis_name is None:
        return shard
    t, largest_of_shard, rest = shard
    largest = pmax(lax.stop_gradient(largest_of_shard), axis_name)
    # A shard without the largest of all adds its own again. Of shards that tie for it, all but one
    # do.
    top = largest_of_shard == largest
    rest = jnp.where(top, rest, rest + largest_of_shard)
    rest, tops = psum((rest, top.astype(t.dtype)), axis_name)
    return Dense(t, largest, rest + (tops - 1) * largest)
