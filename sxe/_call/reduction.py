"""Row losses to the result: weights, the three reductions, and the metrics beside them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, export, lax
from jax.sharding import PartitionSpec

from sxe._call.axes import sum_over
from sxe._call.options import Options
from sxe._rows.targets import Rows


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


def sum_rows(loss: Array, rows: Rows, options: Options) -> Sums:
    """``loss`` is the sum of this device's weighted row losses."""
    return Sums(sum_over(loss, options.batch_axis_name), *sum_weights(rows, options))


def sum_weights(rows: Rows, options: Options) -> tuple[Array, Array | None]:
    """``weight`` and ``parts`` of the sums, which are known before the losses are."""
    batch_axis_name = options.batch_axis_name
    weight = sum_over(jnp.sum(rows.norm), batch_axis_name)
    if options.weights is None and options.class_weights is None:
        return weight, None
    # A row whose label has class weight 0 adds nothing to the denominator, but with smoothing or a
    # z-loss it adds to the loss, and so has a part.
    z = 0 if options.z_loss is None else options.z_loss
    has_part = (rows.norm != 0) | ((rows.weight != 0) & ((rows.targets.total != 0) | (z != 0)))
    parts = jnp.sum(has_part, dtype=weight.dtype)
    return weight, sum_over(parts, batch_axis_name)


def denominator(weight: Array, parts: Array | None, reduction: str) -> Array:
    """What the sum of losses is divided by, from ``sum_weights``.

    A mean over nothing is 0, and so is its gradient. One over rows whose weights sum to 0 has no
    value: it is NaN, and so is its gradient.
    """
    if reduction == "sum":
        return jnp.ones_like(weight)
    if parts is None:
        return jnp.where(weight == 0, jnp.inf, weight)
    weight = jnp.where(parts == 0, jnp.inf, weight)
    # 0 / 0 and not a constant NaN, which would trip debug_nans where the weights are good.
    return weight / jnp.where(weight == 0, 0, jnp.ones_like(weight))


def metrics(sums: Sums, lse: Array, rows: Rows, predictions: Array) -> Metrics:
    lse = jnp.where(rows.weight == 0, 0, lse)
    return jax.tree.map(lax.stop_gradient, Metrics(sums.loss, sums.weight, lse, predictions))


def result_specs(options: Options, rows: PartitionSpec) -> Any:
    """How a result is split over a mesh that splits the rows so: sums are on every device."""
    one = PartitionSpec()
    value = rows if options.reduction == "none" else one
    of_metrics: Any = Metrics(one, one, rows, rows)  # type: ignore[arg-type]
    return (value, of_metrics) if options.return_metrics else value
