"""Log-probabilities of labels and the entropy of their softmax, of logits or of a head.

log q_y = -(lse(x) - x_y)                            line D0 for one label of target 1, negated
H       = log1p(r) + sum_k q_k (m - x_k)             line E0
"""

from __future__ import annotations  # so that help() names types shortly

from jax.typing import ArrayLike

from sxe._arrays import AxisName
from sxe._call.options import Rule
from sxe._call.reduction import LogProbAndEntropy
from sxe._linear_softmax_cross_entropy import log_prob_of_hidden
from sxe._softmax_cross_entropy import log_prob_of_logits


def log_prob_and_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    ignore_index: int | None = None,
    axis: int | tuple[int, ...] = -1,
    axis_name: AxisName = None,
    rule: Rule = "vjp",
) -> LogProbAndEntropy:
    """The log-probability of each row's label, and the entropy of the row's softmax.

    With q_i = softmax(logits_i) and labels y_i:

        log_prob_i          = log q_iy
        entropy_i           = -sum_k q_ik log q_ik
        d log_prob_i/d x_l  = [l = y] - q_il
        d entropy_i/d x_l   = -q_il (log q_il + entropy_i)

    Both keep full relative precision at every magnitude of the logits. An entropy is never a
    difference of two terms. Where nothing is computed from one of them, it costs nothing.

    Args:
      logits: [..., K], bfloat16, float16, float32 or float64. For a policy at a temperature pass
        ``logits / temperature``.
      labels: class indices [...] of any integer dtype, such as sampled tokens.
      where: bool [...], the rows that count; or bool [..., K], the classes that can occur in each
        row: a row with none left does not count.
      class_mask: bool [K], the classes that can occur in any row.
      ignore_index: labels with this value mark rows that do not count.
      axis: the class axis of the logits, or a tuple of axes, as for ``softmax_cross_entropy``.
      axis_name: inside ``jax.shard_map``, the mesh axis (or axes) along which the classes are
        split, as for ``softmax_cross_entropy``.
      rule: "vjp", "jvp" or "autodiff", as for ``softmax_cross_entropy``.

    Returns:
      ``LogProbAndEntropy(log_prob, entropy)``, both [...] and float32 (float64 for float64 logits),
      both differentiable by the logits, with any cotangent for each row of each.

    Rows that do not count are 0 in both and contribute nothing, whatever stands in them. A logit of
    -inf has q = 0 and adds 0 to the entropy; the log-probability of such a label is -inf. A row of
    -inf alone, a +inf, a NaN or an index outside of [0, K) gives NaN in that row, in both and in
    their gradients, and in no other row; under ``checkify`` such an index raises an error.

    Raises:
      TypeError: for labels of a float dtype, another dtype that is none of the above, or an option
        of a wrong type.
      ValueError: for a shape or an axis that does not fit, and as for ``softmax_cross_entropy``.

    Source: lines D0, E0 and E1 of ``sxe.derivation``; the arithmetic is in ``sxe._rows.entropy``.

    Example:
      >>> import jax.numpy as jnp, sxe
      >>> logits, labels = jnp.array([[0.0, 0.0], [20.0, 0.0]]), jnp.array([0, 0])
      >>> sxe.log_prob_and_entropy(logits, labels).log_prob
      Array([-6.93147e-01, -2.06115e-09], dtype=float32)
      >>> sxe.log_prob_and_entropy(logits, labels).entropy
      Array([6.93147e-01, 4.32842e-08], dtype=float32)
    """
    found: LogProbAndEntropy = log_prob_of_logits(
        logits,
        labels,
        where=where,
        class_mask=class_mask,
        ignore_index=ignore_index,
        axis=axis,
        axis_name=axis_name,
        rule=rule,
    )
    return found


def linear_log_prob_and_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    logit_scale: ArrayLike = 1.0,
    softcap: ArrayLike | None = None,
    chunk_size: int | None = None,
    where: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    ignore_index: int | None = None,
    axis_name: AxisName = None,
    rule: Rule = "vjp",
) -> LogProbAndEntropy:
    """``log_prob_and_entropy`` of hidden states and a kernel, without the [N, K] logits.

    Of these logits a chunk of rows exists at a time:

        z = logit_scale hidden @ kernel + bias
        logits = softcap tanh(z / softcap)         or z, without softcap; -inf by the class mask

    One pass over the rows makes both results, 2 N D K FLOPs, and with gradients 8 N D K, as a loss
    with ``reduction="none"`` takes. An entropy that nothing is computed from costs nothing.

    Args:
      hidden: [..., D], bfloat16, float16, float32 or float64.
      kernel: [D, K], likewise; a tied embedding [K, D] passes its transpose.
      labels: class indices [...] of any integer dtype, such as sampled tokens.
      logit_scale: a number or a scalar array, such as 1 / temperature; or float [...], one for each
        row.
      where: bool [...], the rows that count. Rows that do not are not computed: see head.md.
      bias, softcap, chunk_size, class_mask, ignore_index, axis_name, rule: as for
        ``linear_softmax_cross_entropy``.

    Returns:
      ``LogProbAndEntropy(log_prob, entropy)``, both [...] and float32 (float64 if hidden or kernel
      is). Gradients exist for hidden, kernel, bias, logit_scale and softcap.

    Rows that do not count, infinite logits and bad labels do what they do in
    ``log_prob_and_entropy``. Errors are those of ``linear_softmax_cross_entropy``, and a TypeError
    for labels of a float dtype.

    Source: D0, E0 and E1 of ``sxe.derivation``, and the chain rule H0 to H7 of
    ``sxe._head.projection``.

    Example:
      >>> import jax, jax.numpy as jnp, sxe
      >>> hidden, kernel = jnp.array([[4.0, 0.0], [0.0, 2.0]]), jnp.array([[5.0, 0, 0], [0, 0, 1]])
      >>> tokens, temperature = jnp.array([0, 2]), 2.0
      >>> log_prob, entropy = sxe.linear_log_prob_and_entropy(
      ...     hidden, kernel, tokens, logit_scale=1 / temperature)
      >>> log_prob
      Array([-9.079574e-05, -5.514447e-01], dtype=float32)
      >>> entropy
      Array([0.00099871, 0.97532785], dtype=float32)
    """
    found: LogProbAndEntropy = log_prob_of_hidden(
        hidden,
        kernel,
        labels,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_size=chunk_size,
        where=where,
        class_mask=class_mask,
        ignore_index=ignore_index,
        axis_name=axis_name,
        rule=rule,
    )
    return found
