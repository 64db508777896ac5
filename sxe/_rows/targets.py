"""The targets of rows: a label, or a target for each class, or both.

Every option about targets ends as a target t_k for each class, before any function of rows:

    integer label y     t_k = c_k ((1 - a) [k = y] + a / K)
    dense targets p     t_k = c_k ((1 - a) p_k + a / K)

with class weights c and label smoothing a. The sum of all is T. What the gradient needs of the
targets of all other classes, T - t_k, is not computed as that difference: it would cancel where one
target holds nearly all of T.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from sxe._arrays import AxisName, pmax, psum, sharding, vary_like
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


class Targets(NamedTuple):
    """t_k = label_target [k = label] + dense.t_k, which all classes together sum to total.

    Attributes:
      label: [...], counted from the first class of the tile. It may lie outside of the tile.
      label_target: [...].
      dense: has the rank of the logits, and is broadcast along its axes of size 1.
      total: T, [...]. NaN marks a label that is no class: it makes the row's loss and gradient NaN.

    Either label and label_target or dense may be None.
    """

    label: Array | None
    label_target: Array | None
    dense: Dense | None
    total: Array


class Rows(NamedTuple):
    """The targets of rows, and what each row weighs, [...].

    A row that does not count has targets of zero and weighs 0, and its logits go through ``keep``.

    Attributes:
      targets: see there.
      weight: multiplies the row's results.
      norm: the row's part of the denominator of the mean, or None where it is not needed.
      mask: bool, the rows that count, or None where all of them do.
      logit_scale: in the head, what its row of hidden @ kernel is multiplied by, or None where no
        row has one of its own.
    """

    targets: Targets
    weight: Any
    norm: Any
    mask: Array | None
    logit_scale: Array | None = None

    def with_loss(self, has_loss: Array) -> Array:
        """Of the rows that count, those that weigh something or whose logits have a loss."""
        with_loss = (self.weight != 0) | has_loss
        return with_loss if self.mask is None else self.mask & with_loss


def is_label(label: Array, classes: int) -> Array:
    """[k = label] for a tile of so many classes, [...] to [..., K]."""
    k = lax.broadcasted_iota(jnp.int32, (1,) * label.ndim + (classes,), label.ndim)
    return k == label[..., None]


def take_label(x: Array, label: Array) -> tuple[Array, Array]:
    """x_label, [..., K] and [...] to [...], and whether the tile holds the label: if not, any x."""
    inside = (label >= 0) & (label < x.shape[-1])
    if sharding(x)[-1] is not None:
        # On an Explicit mesh a gather has no rule for a sharded class axis. A comparison has one.
        return jnp.sum(jnp.where(is_label(label, x.shape[-1]), x, 0), axis=-1), inside
    index = jnp.where(inside, label, 0)[..., None]
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")[..., 0], inside


def put_label(d: Array, label: Array, at_label: Array) -> Array:
    """d [..., K] with at_label [...] at the label, where the tile holds it."""
    return jnp.where(is_label(label, d.shape[-1]), at_label[..., None], d)


def target_tile(targets: Targets, classes: int) -> tuple[Array, Array]:
    """Of a tile of so many classes, t and T - t: [..., K], or broadcastable to it."""
    label, label_target, dense, total = targets
    assert dense is not None  # a label alone has its class apart: see the gradient of a row
    t, others = dense.t, dense.rest[..., None] + (dense.largest[..., None] - dense.t)
    if label is None or label_target is None:
        return t, others
    here, at_label = is_label(label, classes), label_target[..., None]
    nothing = 0 * total[..., None]  # or NaN, where the label is no class
    return t + jnp.where(here, at_label, 0), (others + nothing) + jnp.where(here, 0, at_label)


def target_sum(targets: Targets, x: Array) -> Array:
    """sum_k t_k over the classes of this tile, [...]."""
    label, label_target, dense, _ = targets
    t = jnp.zeros(x.shape[:-1], targets.total.dtype)
    if label is not None and label_target is not None:
        t = jnp.where((label >= 0) & (label < x.shape[-1]), label_target, 0)
    if dense is not None:
        t = t + jnp.sum(dense.t, axis=-1) * (x.shape[-1] // dense.t.shape[-1])
    return t


def gap(t: Array, x: Array, m: Array, log1p_r: Array) -> Array:
    """m - x, which a target t multiplies in D0.

    Where t = 0 meets x = -inf it is not infinite but -log1p(r), so that the class costs
    (m - x) + log1p(r) = 0: 0 log 0 = 0, and no derivative meets 0 * inf.
    """
    return jnp.where((t == 0) & (x == -jnp.inf), -log1p_r, m - x.astype(m.dtype))


def label_gap(targets: Targets, x: Array, m: Array, log1p_r: Array) -> Array:
    """m - x at the label, [...], and 0 where the tile does not hold it or there is none."""
    if targets.label is None or targets.label_target is None:
        return jnp.zeros_like(m)
    found, inside = take_label(x, targets.label)
    return jnp.where(inside, gap(targets.label_target, found, m, log1p_r), 0)


def dense_gap(targets: Targets, x: Array, m: Array, log1p_r: Array) -> Array:
    """m - x of each class of the tile, [..., K], and 0 where there are no dense targets."""
    if targets.dense is None:
        return jnp.zeros_like(m)[..., None]
    m, log1p_r = vary_like((m, log1p_r), x)
    return gap(targets.dense.t, x, m[..., None], log1p_r[..., None])


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
