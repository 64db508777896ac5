"""The targets of rows: labels, a target for each class, or both.

All options about targets are first converted to a target t_k for each class:

    integer label y                 t_k = c_k ((1 - a) [k = y] + a / K)
    labels y_m with weights w_m     t_k = c_k ((1 - a) sum_m w_m [k = y_m] + a / K)
    dense targets p                 t_k = c_k ((1 - a) p_k + a / K)

with class weights c and label smoothing a. T is the sum of all t_k. The gradient needs T - t_k, the
sum of the targets of all other classes. This sum is not computed as a difference, which would
cancel where one target is nearly all of T.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sxe._arrays import AxisName, are_known, pmax, psum, sharding
from sxe._backend import Backend, apart


class Dense(NamedTuple):
    """A target for each class, and the sum of all targets in two parts, largest + rest.

    As a single number, the sum would round small targets away next to a large one. The targets of
    all classes except k sum to rest + (largest - t_k), which does not cancel.

    Attributes:
      t: [..., K], or [..., 1] if all classes have the same target.
      largest: the largest target of all classes, [...], without a derivative.
      rest: the sum of all targets except one largest, [...]. It has the derivative of the full sum.
    """

    t: Array
    largest: Array
    rest: Array


class Sparse(NamedTuple):
    """Targets of a few labels: t_k = sum_m target_m [k = label_m]. Labels may be repeated.

    Attributes:
      label: [..., M], counted from the first class of the tile. A label may be outside of the tile.
        None in a gradient.
      target: [..., M].
    """

    label: Any
    target: Array

    def of_classes(self) -> tuple[Array, Array]:
        """t_k of each label's class, and the sum over the labels of other classes, [..., M]."""
        same = self.label[..., :, None] == self.label[..., None, :]
        here, elsewhere = (jnp.where(at, self.target[..., None, :], 0) for at in (same, ~same))
        return jnp.sum(here, axis=-1), jnp.sum(elsewhere, axis=-1)


class Targets(NamedTuple):
    """The targets t_k = label_target [k = label] + sparse.t_k + dense.t_k, and their sum T.

    Attributes:
      label: [...], counted from the first class of the tile. It may be outside of the tile.
      label_target: [...].
      dense: targets with as many axes as the logits, broadcast along axes of size 1.
      total: T, [...]. NaN marks an invalid label, and makes the row's loss and gradient NaN.
      sparse: several labels per row, instead of ``label``.

    Each part except ``total`` may be None.
    """

    label: Array | None
    label_target: Array | None
    dense: Dense | None
    total: Array
    sparse: Sparse | None = None

    @property
    def labels(self) -> Sparse | None:
        """The labels of each row as ``Sparse``: with M = 1 for a single label, or None."""
        if self.label is None or self.label_target is None:
            return self.sparse
        return Sparse(self.label[..., None], self.label_target[..., None])


class Rows(NamedTuple):
    """The targets and the weights of rows, [...].

    Where the mask is False, the weight is 0, and ``keep`` sets the logits to 0.

    Attributes:
      targets: the targets of the row function. None in the head (the fused final linear layer and
        loss) if the targets are logits, which the head itself computes.
      weight: the factor of the row's results.
      norm: the row's part of the denominator of the mean, or None if it is not needed.
      mask: bool, False for rows that are masked out or ignored, or None if there are none. A row of
        weight 0 stays True if it may have a finite loss, which is the derivative for its weight.
    """

    targets: Any
    weight: Any
    norm: Any
    mask: Array | None

    def with_loss(self, has_loss: Array) -> Array:
        """The unmasked rows that have a nonzero weight or a finite loss, bool [...]."""
        with_loss = (self.weight != 0) | has_loss
        return with_loss if self.mask is None else self.mask & with_loss


def is_label(label: Array, classes: int) -> Array:
    """[k = label] for a tile of ``classes`` classes, [...] to [..., K]."""
    k = lax.broadcasted_iota(jnp.int32, (1,) * label.ndim + (classes,), label.ndim)
    return k == label[..., None]


def take_labels(x: Array, label: Array) -> tuple[Array, Array]:
    """x at each label, [..., M], and whether the label is in the tile. If not, x is arbitrary."""
    inside = (label >= 0) & (label < x.shape[-1])
    if sharding(x)[-1] is not None:
        # On an Explicit mesh, JAX can't gather along a sharded class axis, but it can compare.
        return _compare_labels(x, label), inside
    index = jnp.where(inside, label, 0)
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds"), inside


def _compare_labels(x: Array, label: Array) -> Array:
    """x at the labels, [..., K] to [..., M], and 0 for a label that is not in the tile."""
    each = (is_label(label[..., m], x.shape[-1]) for m in range(label.shape[-1]))
    found = [jnp.sum(jnp.where(here, x, 0), axis=-1, keepdims=True) for here in each]
    # The empty array in front is for M = 0: concatenate does not accept an empty list.
    return jnp.concatenate([jnp.zeros_like(label[..., :0], x.dtype), *found], axis=-1)


def put_labels(d: Array, label: Array, at_label: Array, backend: Backend) -> Array:
    """d [..., K] with its values at the labels in the tile replaced with at_label [..., M].

    The values of a repeated label have to be equal.
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
    # Unlike d.at, this scatter also drops negative labels, instead of counting them from the end.
    return lax.scatter(d, label[..., None], at_label, dimensions, mode="drop")


def class_tile(targets: Targets) -> tuple[Array | None, Array]:
    """t and T - t of the classes that are not labels, [..., K] or [..., 1]. A t of None is 0."""
    total = targets.total[..., None]
    if targets.dense is None:
        return None, total
    t, others = targets.dense.t, _others_of_dense(targets.dense, targets.dense.t)
    if (labels := targets.labels) is None:
        return t, others
    # 0 * total is 0, or NaN where a label is invalid.
    return t, others + (jnp.sum(labels.target, axis=-1, keepdims=True) + 0 * total)


def label_tile(targets: Targets, labels: Sparse) -> tuple[Array, Array]:
    """t and T - t of each label's class, [..., M]."""
    t, others = labels.of_classes()
    others = others + 0 * targets.total[..., None]
    if targets.dense is None:
        return t, others
    dense_t = targets.dense.t
    if dense_t.shape[-1] != 1 and jax.typeof(labels.label).sharding.mesh.explicit_axes:
        # On an Explicit mesh, JAX can't gather from targets that sharded or vmapped rows share.
        dense_t = _compare_labels(dense_t, labels.label)
    elif dense_t.shape[-1] != 1:
        dense_t, _ = take_labels(dense_t, labels.label)
    return t + dense_t, others + _others_of_dense(targets.dense, dense_t)


def _others_of_dense(dense: Dense, t: Array) -> Array:
    """For each t of [..., F], the sum of the row's other dense targets, [..., F]."""
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
    """m - x, the factor of the target t in line D0.

    Where t = 0 and x = -inf, the result is -log1p(r) instead of inf. So -log q_k, which is
    (m - x) + log1p(r), is 0. This gives 0 log 0 = 0, and no derivative contains 0 * inf.
    """
    return jnp.where((t == 0) & (x == -jnp.inf), -log1p_r, m - x.astype(m.dtype))


def label_gap(labels: Sparse, x: Array, m: Array, log1p_r: Array) -> Array:
    """m - x at each label, [..., M], and 0 for a label that is not in the tile."""
    found, inside = take_labels(x, labels.label)
    return jnp.where(inside, gap(labels.target, found, m[..., None], log1p_r[..., None]), 0)


def dense_cost(t: Array, x: Array, m: Array, log1p_r: Array) -> Array:
    """sum_k t_k (m - x_k), [..., K] to [...]: D0 without log1p(r). The plain implementation."""
    return jnp.sum(t * gap(t, x, m[..., None], log1p_r[..., None]), axis=-1)


def sum_without_largest(t: Array, largest: Array, total: Array, backend: Backend) -> Array:
    """sum_k t_k of a tile except one largest target, [...]. The plain implementation."""
    # If the largest target is more than twice the sum of the others, each other target is below
    # half of the largest. Then min(t, largest - t) is 0 for the largest target and t for the
    # others, and XLA need not compare each class. Targets may be negative, so use magnitudes.
    outweighs = jnp.sum(jnp.abs(t), axis=-1) < 1.5 * largest
    others = jnp.sum(jnp.minimum(t, apart(largest, total, backend)[..., None] - t), axis=-1)
    return jnp.where(outweighs, others, total - largest)


def merge_dense(shard: Dense, axis_name: AxisName) -> Dense:
    """The targets of one shard, with ``largest`` and ``rest`` of all shards."""
    if axis_name is None:
        return shard
    t, largest_of_shard, rest = shard
    largest = pmax(lax.stop_gradient(largest_of_shard), axis_name)
    # A shard whose largest target is not the largest of all shards adds it to the rest. If several
    # shards tie for the largest of all, all of them except one add it.
    top = largest_of_shard == largest
    rest = jnp.where(top, rest, rest + largest_of_shard)
    rest, tops = psum((rest, top.astype(t.dtype)), axis_name)
    return Dense(t, largest, rest + (tops - 1) * largest)
