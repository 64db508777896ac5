"""From the values of rows to the result: weights, the three reductions, and the metrics."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, export, lax
from jax.sharding import PartitionSpec

from sxe._arrays import is_dense, keep, psum
from sxe._call.axes import sum_over
from sxe._call.options import Options
from sxe._rows.cross_entropy import Results
from sxe._rows.predictions import Ranking, best_of_shards
from sxe._rows.targets import Rows

# The prediction in a row that does not count. Padding often has the label -1, so -1 would make it
# look like a correct prediction.
NO_CLASS = jnp.iinfo(jnp.int32).min


class Metrics(NamedTuple):
    """What ``return_metrics=True`` returns in addition to the loss, without gradients.

    A row counts unless it is masked out, ignored, or has weight 0. A row that does not count is
    never a correct prediction, whatever its label is, because -2**31 is no label. A jitted program
    computes only the metrics that it uses.

    Attributes:
      loss_sum: the sum of the weighted row losses, a scalar; with ``batch_axis_name``, over the
        global batch.
      weight_sum: the denominator of the mean, a scalar, likewise. ``loss_sum / weight_sum`` is the
        mean. To average over shards or accumulation steps, sum both first, then divide.
      lse: log sum_k exp(logits_k) of each row, [...]; 0 where the row does not count.
      predictions: the class of each row's largest logit, the first of equal ones, int32 [...];
        -2**31 where the row does not count or has no softmax. ``sum(predictions >= 0)`` is the
        number of all other rows.
      max_probability: the probability of the predicted class, [...]; 0 where the row does not
        count, and NaN where its logits contain NaN or +inf, or are all -inf, and so have no
        softmax.
      label_rank: the number of classes with a larger logit than the label's, int32 [...]. A rank of
        0 is a correct prediction; a rank below k is one of the top k. Equal logits are not larger.
        If a row does not count, has no softmax, or has a label outside of [0, K), its rank is the
        number of all classes, including masked classes. None for dense targets and with
        label_weights, where rows do not have a single label.
      entropy: -sum_k q_k log q_k of each row, with q = softmax(logits), [...]; 0 where the row does
        not count, and NaN where it has no softmax.
    """

    loss_sum: Array
    weight_sum: Array
    lse: Array
    predictions: Array
    max_probability: Array
    label_rank: Array | None
    entropy: Array


class LogProbAndEntropy(NamedTuple):
    """The result of ``sxe.log_prob_and_entropy``. Both arrays are differentiable.

    Attributes:
      log_prob: log q_y for the label y of each row, [...]; 0 where the row does not count.
      entropy: -sum_k q_k log q_k of each row, [...]; 0 where the row does not count.
    """

    log_prob: Array
    entropy: Array


export.register_namedtuple_serialization(Metrics, serialized_name="sxe.Metrics")
export.register_namedtuple_serialization(LogProbAndEntropy, serialized_name="sxe.LogProbAndEntropy")


class Sums(NamedTuple):
    """Sums over the rows of the global batch.

    ``loss`` is the sum of w_i loss_i, ``weight`` the denominator of the mean, and ``parts`` the
    number of rows in the mean. Without weights, ``parts`` is None, because it equals ``weight``.
    """

    loss: Array
    weight: Array
    parts: Array | None


def sum_rows(weighed: Array, rows: Rows, options: Options) -> Sums:
    """The sums of a call. ``weighed`` is w_i loss_i of each row, or its sum over all rows."""
    total = sum_over(jnp.sum(weighed), options.batch_axis_name)
    return Sums(total, *sum_weights(rows, options))


def reduced(weighed: Array, rows: Rows, options: Options) -> tuple[Array, Sums]:
    """The value that a call returns, and its sums. ``weighed`` is as for ``sum_rows``.

    For the reduction "none", the value is w_i loss_i of each row.
    """
    sums = sum_rows(weighed, rows, options)
    if options.reduction == "none":
        return weighed, sums
    # Divide after the sum. If each row were divided first, the small loss or gradient of a row
    # could fall below float32's normal numbers and be flushed to 0.
    return sums.loss / denominator(sums.weight, sums.parts, options.reduction), sums


def sum_weights(rows: Rows, options: Options) -> tuple[Array, Array | None]:
    """``weight`` and ``parts`` of the sums, which are known before the losses."""
    batch_axis_name = options.batch_axis_name
    weight = sum_over(jnp.sum(rows.norm), batch_axis_name)
    if options.weights is None and options.class_weights is None:
        return weight, None
    has_part = rows.norm != 0
    if rows.targets is not None:
        # A row whose label has class weight 0 adds nothing to the denominator. With label smoothing
        # or a z-loss it still adds to the loss, and is then counted in ``parts``.
        z = 0 if options.z_loss is None else options.z_loss
        has_part |= (rows.weight != 0) & ((rows.targets.total != 0) | (z != 0))
    parts = jnp.sum(has_part, dtype=weight.dtype)
    return weight, sum_over(parts, batch_axis_name)


def denominator(weight: Array, parts: Array | None, reduction: str) -> Array:
    """The divisor of the sum of losses, from ``sum_weights``.

    A mean over no rows is 0, with a gradient of 0. A mean over rows whose weights sum to 0, or to
    more than a float can hold, is NaN, with a gradient of NaN.
    """
    if reduction == "sum":
        return jnp.ones_like(weight)
    if parts is None:
        return jnp.where(weight == 0, jnp.inf, weight)
    weight = weight + (weight - weight)  # NaN if the sum is infinite
    weight = jnp.where(parts == 0, jnp.inf, weight)
    # NaN is computed as 0 / 0: a constant NaN would trip debug_nans even if the sum is not 0.
    return weight / jnp.where(weight == 0, 0, jnp.ones_like(weight))


def ranks_labels(labels: Array, options: Options) -> bool:
    """Whether the metrics have a label_rank. It needs one label per row."""
    return options.return_metrics and options.label_weights is None and not is_dense(labels)


def metrics(
    sums: Sums,
    rows: Rows,
    results_and_ranking: tuple[Results, Ranking],
    options: Options,
    *,
    classes: int,
) -> Metrics:
    """The metrics. ``classes`` is the number of classes on this device."""
    (results, ranking), axis_name = results_and_ranking, options.axis_name
    counts = rows.weight != 0
    _, lse, p, entropy = lax.stop_gradient(results)
    assert lse is not None
    assert p is not None
    assert entropy is not None
    predictions = best_of_shards(ranking, classes, axis_name, options.class_mask)
    label_rank = None
    if ranking.larger is not None:
        number = classes if axis_name is None else classes * lax.axis_size(axis_name)
        # The total is NaN where the label is not in [0, K).
        is_ranked = counts & ~jnp.isnan(p) & ~jnp.isnan(rows.targets.total)
        label_rank = jnp.where(is_ranked, psum(ranking.larger, axis_name), number)
    return Metrics(
        *lax.stop_gradient((sums.loss, sums.weight)),
        lse=jnp.where(counts, lse, 0),
        predictions=jnp.where(counts & ~jnp.isnan(p), predictions, NO_CLASS),
        max_probability=jnp.where(counts, p, 0),
        label_rank=label_rank,
        entropy=jnp.where(counts, entropy, 0),
    )


def log_prob_and_entropy(results: Results, rows: Rows) -> LogProbAndEntropy:
    """The result for rows that each have one label, of target 1."""
    assert results.entropy is not None
    # The total is NaN where the label is not in [0, K). Then both results are NaN.
    entropy = results.entropy + 0 * rows.targets.total
    return LogProbAndEntropy(keep(rows.mask, 0 - results.loss), keep(rows.mask, entropy))


def result_specs(labels: Array, options: Options, rows: PartitionSpec) -> Any:
    """The partition specs of a result, for rows sharded as in ``rows``. Sums are replicated."""
    if options.returns_log_prob:
        return LogProbAndEntropy(rows, rows)  # type: ignore[arg-type]
    one = PartitionSpec()
    value = rows if options.reduction == "none" else one
    label_rank = rows if ranks_labels(labels, options) else None
    of_metrics: Any = Metrics(*(one, one, rows, rows, rows, label_rank, rows))  # type: ignore[arg-type]
    return (value, of_metrics) if options.return_metrics else value
