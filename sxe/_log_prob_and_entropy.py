"""Log-probabilities of labels, and the entropy of the softmax, from logits or hidden states.

log q_y = -(lse(x) - x_y)                            line D0, negated, for a label of target 1
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
    """The log-probability of each row's label, and the entropy of each row's softmax.

    With q_i = softmax(logits_i) and labels y_i, in nats:

        log_prob_i          = log q_iy
        entropy_i           = -sum_k q_ik log q_ik
        d log_prob_i/d x_l  = [l = y] - q_il
        d entropy_i/d x_l   = -q_il (log q_il + entropy_i)

    Here x is the row of logits. Both results keep full relative precision at every magnitude of the
    logits: the entropy is never computed as a difference of two terms. A result that is not used
    under ``jax.jit`` is not computed.

    Args:
      logits: [..., K], bfloat16, float16, float32 or float64. For a policy at a temperature, pass
        ``logits / temperature``.
      labels: class indices [...] of any integer dtype, such as sampled tokens.
      where: bool [...], True for the rows that count. Or bool [..., K], True for the classes that
        can occur in each row: a row without any class does not count.
      class_mask: bool [K], True for the classes that can occur, the same for all rows.
      ignore_index: rows whose label has this value do not count.
      axis: the class axis of the logits, or a tuple of axes, as for ``softmax_cross_entropy``.
      axis_name: inside ``jax.shard_map``, the mesh axis, or axes, along which the classes are
        sharded, as for ``softmax_cross_entropy``.
      rule: "vjp", "jvp" or "autodiff", as for ``softmax_cross_entropy``.

    Returns:
      ``LogProbAndEntropy(log_prob, entropy)``, both [...] and float32 (float64 for float64 logits).
        Both are differentiable with respect to the logits, with any cotangent for each row.

    Rows that do not count:
      Both results are 0 in rows that are masked out or ignored. Such rows contribute nothing to any
      gradient, whatever they contain.

    Infinite logits:
      A logit of -inf has q = 0 and adds 0 to the entropy. If it is the label's logit, the
      log-probability is -inf. If a row is -inf in all classes, or contains +inf or NaN, both of its
      results and their gradients are NaN, and those of no other row.

    Invalid labels:
      If a label is outside of [0, K), both results of its row and their gradients are NaN, and
      those of no other row. Under ``checkify`` the label raises an error.

    Raises:
      TypeError: if labels have a float dtype, another dtype is none of the above, or an option has
        a wrong type.
      ValueError: if a shape or an axis does not fit, and as for ``softmax_cross_entropy``.

    Source:
      Lines D0, E0 and E1 of ``sxe.derivation``. ``sxe._rows.entropy`` explains the arithmetic.

    Examples:
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

    The results are those of the following logits, which exist for one chunk of rows at a time:

        z = logit_scale hidden @ kernel + bias
        logits = softcap tanh(z / softcap)         or z, without softcap; -inf for masked classes

    One pass over the rows computes both results, with 2 N D K FLOPs. Results and gradients together
    take 8 N D K FLOPs, like a loss with ``reduction="none"``. An entropy that is not used under
    ``jax.jit`` is not computed.

    Args:
      hidden: [..., D], bfloat16, float16, float32 or float64.
      kernel: [D, K], of the same dtypes. For a tied embedding [K, D], pass its transpose.
      labels: class indices [...] of any integer dtype, such as sampled tokens.
      bias: float [K], as for ``linear_softmax_cross_entropy``.
      logit_scale: a number or a scalar array, such as 1 / temperature; or float [...], one per row.
      softcap: a number above 0 or a scalar array, a bound on the magnitude of the logits.
      chunk_size: the largest number of rows in a chunk, as for ``linear_softmax_cross_entropy``.
      where: bool [...], True for the rows that count. The other rows are not computed: see head.md.
      class_mask: bool [K], True for the classes that can occur, the same for all rows.
      ignore_index: rows whose label has this value do not count.
      axis_name: inside ``jax.shard_map``, the mesh axis, or axes, along which the classes are
        sharded, as for ``linear_softmax_cross_entropy``.
      rule: "vjp", "jvp" or "autodiff", as for ``linear_softmax_cross_entropy``.

    Returns:
      ``LogProbAndEntropy(log_prob, entropy)``, both [...] and float32 (float64 if hidden or kernel
        is). Gradients exist for hidden, kernel, bias, logit_scale and softcap.

    Rows that do not count, infinite logits and invalid labels are handled as in
    ``log_prob_and_entropy``.

    Raises:
      TypeError: if labels have a float dtype, and as for ``linear_softmax_cross_entropy``.
      ValueError: as for ``linear_softmax_cross_entropy``.

    Source:
      Lines D0, E0 and E1 of ``sxe.derivation``, and the chain rule, lines H0 to H7 of
      ``sxe._head.projection``.

    Examples:
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
