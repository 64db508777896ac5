"""The divergence between the softmax of a model and that of a target, from logits of both.

KL(p || q) = sum_k p_k (log p_k - log q_k)          lines K0 to K5 of the derivation
"""

from __future__ import annotations  # so that help() names types shortly

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from sxe._arrays import AxisName, any_class, keep, reshard, sharding, vary, varying, wide_dtype
from sxe._backend import backend_of, rounded
from sxe._call import arguments, axes, checks, reduction
from sxe._call.layout import Layout, join_shards
from sxe._call.options import Options, Reduction, Rule, parse
from sxe._call.rows import masked_classes, weight_and_mask
from sxe._rows.kl_divergence import KLDivergence, Mode
from sxe._rows.normalizer import has_softmax
from sxe._rows.rules import RULES
from sxe._rows.targets import Rows


class _Inputs(NamedTuple):
    logits: Array
    target_logits: Array
    options: Options


def _scaled(x: Array, scale: Array | float | None) -> Array:
    """The logits [..., K] times a scale, which is a scalar or has one value per row, [...]."""
    if scale is None:
        return x
    factor = jnp.asarray(scale, x.dtype)
    return rounded(factor[..., None] * x if factor.ndim else factor * x)


def _alike(x: Array, z: Array) -> tuple[Array, Array]:
    """Cast x and z to vary over the same mesh axes and to be sharded in the same way."""
    every = varying(x) | varying(z)
    spec = [next(filter(None, at), None) for at in itertools.zip_longest(sharding(x), sharding(z))]
    x, z = (vary(reshard(a, spec), every) for a in (x, z))
    return x, z


def _result(inputs: _Inputs) -> Array:
    given, options = inputs.logits, inputs.options
    class_axes = axes.class_axes(options.axis, given.ndim)
    backend = backend_of(given, inputs.target_logits)
    options, class_mask = masked_classes(given, options, class_axes)
    mask = options.where
    dtype = wide_dtype(given.dtype, inputs.target_logits.dtype)
    x, z = (axes.classes_last(a, class_axes).astype(dtype) for a in (given, inputs.target_logits))
    x, z = _scaled(x, options.logit_scale), _scaled(z, options.target_logit_scale)
    if class_mask is not None:
        x, z = (jnp.where(class_mask, a, -jnp.inf) for a in (x, z))
        possible = jnp.broadcast_to(any_class(class_mask, options.axis_name), x.shape[:-1])
        mask = possible if mask is None else mask & possible
    x, z = _alike(x, z)
    f = KLDivergence(options.axis_name, backend, options.mode, options.beta)
    has_loss = has_softmax(x, f.axis_name, backend, unless=f.is_infinite(x, z))
    has_loss &= has_softmax(z, f.axis_name, backend)
    weight, mask = weight_and_mask(options, mask, has_loss, dtype)
    x, z = keep(mask, x), keep(mask, z)
    weighed = f.weigh(RULES[options.rule](f, x, z), weight, None).value
    value, _ = reduction.reduced(weighed, Rows(None, weight, weight, mask), options)
    return value


@functools.partial(jax.jit, inline=True)
def _call(inputs: _Inputs) -> Array:
    logits, target_logits, options = inputs
    checks.check_logits("logits", logits, "logits, target_logits")
    checks.check_target_logits(logits.shape, target_logits, options)
    class_axes = axes.class_axes(options.axis, logits.ndim)
    checks.check_classes(options, logits.shape, class_axes)
    checks.check_masks_and_weights(options, logits.shape, class_axes)
    rows = tuple(n for i, n in enumerate(logits.shape) if i not in class_axes)
    checks.check_row_scale("logit_scale", options.row_scale, rows, options)
    checks.check_row_scale("target_logit_scale", options.target_row_scale, rows, options)
    if options.layout is not None:
        layout, ndim = options.layout, logits.ndim
        out = layout.of_rows() if options.reduction == "none" else jax.sharding.PartitionSpec()
        return layout.run(_result, inputs, class_axes, ndim=ndim, out=out)
    axes.check_axis_name("axis_name", options.axis_name, "the logits", logits)
    axes.check_axis_name("axis_name", options.axis_name, "the target logits", target_logits)
    axes.check_axis_name("batch_axis_name", options.batch_axis_name, "the logits", logits)
    inputs = join_shards(inputs, class_axes, ndim=logits.ndim)
    others = {"target_logits": inputs.target_logits, **inputs.options.of_rows()}
    axes.check_mapped(logits=inputs.logits, **others)
    axes.check_splits("logits", sharding(inputs.logits), class_axes, **others)
    return _result(inputs)


def divergence_of_logits(
    logits: ArrayLike, target_logits: ArrayLike, *, layout: Layout | None = None, **options: Any
) -> Array:
    """``kl_divergence``; with a layout, for global arrays on a mesh."""
    parsed = parse(layout=layout, **options)
    inputs = _Inputs(
        arguments.array("logits", logits), arguments.array("target_logits", target_logits), parsed
    )
    with checks.explained_jet(inputs, parsed):
        result = _call(inputs)
    return result


def kl_divergence(
    logits: ArrayLike,
    target_logits: ArrayLike,
    *,
    mode: Mode = "forward",
    beta: float = 0.5,
    logit_scale: ArrayLike = 1.0,
    target_logit_scale: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    axis: int | tuple[int, ...] = -1,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    rule: Rule = "vjp",
) -> Array:
    """The Kullback-Leibler or Jensen-Shannon divergence between two softmax distributions.

    With q_i = softmax(logit_scale logits_i), p_i = softmax(target_logit_scale target_logits_i):

        "forward"           KL(p_i || q_i) = sum_k p_ik (log p_ik - log q_ik)
        "reverse"           KL(q_i || p_i)
        "jensen_shannon"    beta KL(p_i || M_i) + (1 - beta) KL(q_i || M_i)
                            with M_i = beta p_i + (1 - beta) q_i

    The result keeps full relative precision even if p and q nearly agree, such as a policy and its
    reference. There, the textbook formula gives rounding noise of either sign. The result is never
    negative. It is exactly 0 for equal logits and for logits that differ by a constant.

    Args:
      logits: [..., K], bfloat16, float16, float32 or float64, of the model.
      target_logits: [..., K], of the same dtypes, of a teacher or a reference policy.
      mode: distillation minimizes "forward", which makes q cover all classes that are likely in p.
        "reverse" keeps a policy close to a reference: it makes q avoid classes that are unlikely in
        p. "jensen_shannon" lies between them.
      beta: from 1e-20 to below 1, only for "jensen_shannon"; another mode raises ValueError.
      logit_scale: a factor for the logits, such as 1 / temperature: a number, a scalar array, or
        float [...], one per row.
      target_logit_scale: likewise, a factor for the target logits.
      where: bool [...], True for the rows that count. Or bool [..., K], True for the classes that
        can occur in each row, on both sides: a row without any class does not count.
      weights: float [...], one weight per row. A row of weight 0 does not count.
      class_mask: bool [K], True for the classes that can occur, in all rows and on both sides.
      axis: the class axis of both arrays of logits, or a tuple of axes.
      reduction: "mean" is sum_i w_i KL_i / sum_i w_i over the rows that count, with the row weights
        w_i. The mean is 0 if no row counts. The mean and its gradient are NaN if rows count but
        their weights sum to 0. "sum" is sum_i w_i KL_i. "none" is w_i KL_i, [...], and 0 in rows
        that do not count.
      axis_name: inside ``jax.shard_map``, the mesh axis, or axes, along which the classes of both
        sides are sharded, as for ``softmax_cross_entropy``.
      batch_axis_name: likewise, the mesh axis, or axes, along which the rows are sharded.
      rule: "vjp", "jvp" or "autodiff", as for ``softmax_cross_entropy``.

    ``mode``, ``beta``, ``axis``, ``reduction``, the axis names and ``rule`` are static under
    ``jax.jit``: see ``softmax_cross_entropy``.

    Returns:
      The divergence, float32 (float64 if one side is float64), a scalar or, for "none", [...].

    Gradients exist for the logits of both sides, their scales, and the weights. A gradient that is
    not requested is not computed, so a teacher that is not trained needs no ``stop_gradient``.

    Rows that do not count:
      Rows that are masked out or have weight 0 contribute nothing, whatever they contain.

    Infinite logits:
      A class whose logit is -inf on both sides adds nothing. If it is -inf only in the logits, a
      "forward" divergence is +inf. If it is -inf only in the target logits, a "reverse" divergence
      is +inf. A "jensen_shannon" divergence is always finite. If a row is -inf in all classes, or
      contains +inf or NaN, on either side, its value and gradient are NaN, and those of no other
      row.

    Raises:
      TypeError: if a dtype is none of the above, or an option has a wrong type.
      ValueError: if shapes differ, a mode is unknown, or beta is outside of its range; and as for
        ``softmax_cross_entropy``.

    Source:
      Lines K0 to K5 of ``sxe.derivation``. ``sxe._rows.kl_divergence`` explains the arithmetic.

    Examples:
      >>> import jax, jax.numpy as jnp, sxe
      >>> policy, reference = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, 2.0, 3.001]])
      >>> sxe.kl_divergence(policy, reference)
      Array(1.1130705e-07, dtype=float32)
      >>> jax.grad(sxe.kl_divergence)(policy, reference, mode="reverse")
      Array([[ 5.9887687e-05,  1.6279161e-04, -2.2267929e-04]], dtype=float32)
    """
    return divergence_of_logits(
        logits,
        target_logits,
        mode=mode,
        beta=beta,
        logit_scale=logit_scale,
        target_logit_scale=target_logit_scale,
        where=where,
        weights=weights,
        class_mask=class_mask,
        axis=axis,
        reduction=reduction,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        rule=rule,
    )
