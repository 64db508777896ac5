"""Row losses to the result: weights, the three reductions, and the metrics beside them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, export, lax
from jax.sharding import PartitionSpec

from sxe._axes import AxisName, sum_over
from sxe._options import Arrays, Static
from sxe._targets import Rows


class Metrics(NamedTuple):
    """What a training loop wants beside the loss. No gradient passes through any of it.

    Attributes:
      loss_sum: the sum of the weighted row losses, a scalar; over the global batch where
        ``batch_axis_name`` is given.
      weight_sum: the denominator of the mean, a scalar, likewise. ``loss_sum / weight_sum`` is the
        mean. Both summed first, over shards or accumulation steps, it is the mean over them all.
      lse: log sum_k exp(logits_k) of each row, [...], and 0 where the row does not count.
      predictions: the class of each row's largest logit, [...] int32.
    """

    loss_sum: Array
    weight_sum: Array
    lse: Array
    predictions: Array


export.register_namedtuple_serialization(Metrics, serialized_name="sxe.Metrics")


class Sums(NamedTuple):
    """sum_i w_i loss_i, the mean's denominator, and how many rows have a part in the mean.

    All are over the global batch. ``parts`` is None without weights: ``weight`` is then the number
    of these rows.
    """

    loss: Array
    weight: Array
    parts: Array | None


def weighted(loss: Array, lse: Array, weight: Array, z_loss: Array | None) -> Array:
    """w_i (loss_i + z lse_i^2), where a weight of 0 times an infinite loss is 0."""
    if z_loss is not None:
        # In this order: lse^2 may overflow where z lse^2 does not, and z may be 0.
        loss = loss + z_loss * lse * lse
    return weight * jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)


def sums(loss: Array, rows: Rows, arrays: Arrays, batch_axis_name: AxisName) -> Sums:
    """``loss`` is the sum of this device's weighted row losses."""
    weight = jnp.sum(rows.norm)
    summed = sum_over(loss, batch_axis_name), sum_over(weight, batch_axis_name)
    if arrays.weights is None and arrays.class_weights is None:
        return Sums(*summed, None)
    # A row whose label has class weight 0 adds nothing to the denominator, but with smoothing or a
    # z-loss it adds to the loss, and so has a part.
    z = 0 if arrays.z_loss is None else arrays.z_loss
    has_part = (rows.norm != 0) | ((rows.weight != 0) & ((rows.targets.total != 0) | (z != 0)))
    parts = jnp.sum(has_part, dtype=weight.dtype)
    return Sums(*summed, sum_over(parts, batch_axis_name))


def denominator(total: Sums, reduction: str) -> Array:
    """What the sum of losses is divided by.

    A mean over nothing is 0, and so is its gradient. One over rows whose weights sum to 0 has no
    value: it is NaN, and so is its gradient.
    """
    if reduction == "sum":
        return jnp.ones_like(total.weight)
    if total.parts is None:
        return jnp.where(total.weight == 0, jnp.inf, total.weight)
    weight = jnp.where(total.parts == 0, jnp.inf, total.weight)
    # 0 / 0 and not a constant NaN, which would trip debug_nans where the weights are good.
    return weight / jnp.where(weight == 0, 0, jnp.ones_like(weight))


def metrics(total: Sums, lse: Array, rows: Rows, predictions: Array) -> Metrics:
    lse = jnp.where(rows.weight == 0, 0, lse)
    return jax.tree.map(lax.stop_gradient, Metrics(total.loss, total.weight, lse, predictions))


def specs(static: Static, rows: PartitionSpec) -> Any:
    """How a result is split over a mesh that splits the rows so: sums are on every device."""
    one = PartitionSpec()
    value = rows if static.reduction == "none" else one
    of_metrics: Any = Metrics(one, one, rows, rows)  # type: ignore[arg-type]
    return (value, of_metrics) if static.return_metrics else value


class Best(NamedTuple):
    """The first of the largest logits of a tile's classes, [...]: its class and its value."""

    k: Array
    x: Array


def best(x: Array) -> Best:
    """[..., K] to [...]."""
    return Best(jnp.argmax(x, axis=-1).astype(jnp.int32), lax.stop_gradient(jnp.max(x, axis=-1)))


def first_of(best: Best, classes: int, axis_name: AxisName) -> Array:
    """The class of the first of all shards' largest logits, where a shard has so many classes."""
    if axis_name is None:
        return best.k
    k = best.k + lax.axis_index(axis_name) * classes
    x = lax.stop_gradient(best.x)  # a custom rule's result
    behind = x < lax.pmax(x, axis_name)
    return lax.pmin(jnp.where(behind, jnp.iinfo(jnp.int32).max, k), axis_name)
