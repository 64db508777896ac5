"""The softmax cross-entropy loss of logits, with its gradient in closed form.

loss_i = sum_k t_ik (lse(x_i) - x_ik) + z lse(x_i)^2            line D0, and the z-loss
d loss_i/dx_il = T_i q_il - t_il + 2 z lse(x_i) q_il            line D7
"""

from __future__ import annotations  # so that help() names types shortly

import functools
import itertools
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from sxe._arrays import (
    AxisName,
    any_class,
    axis_names,
    is_dense,
    keep,
    keep_tangent,
    reshard,
    sharding,
    vary,
    vary_like,
    varying,
)
from sxe._backend import Backend, backend_of
from sxe._call import arguments, axes, checks, reduction
from sxe._call.implementation import choose
from sxe._call.layout import Layout, join_shards, layout_of_logits
from sxe._call.options import (
    Implementation,
    LogitsGradientOptions,
    LogitsOptions,
    Options,
    Reduction,
    Rule,
    parse,
)
from sxe._call.reduction import Metrics
from sxe._call.rows import make_rows, masked_classes
from sxe._rows.cross_entropy import CrossEntropy, Results
from sxe._rows.gpu_choice import has_gradient_kernel
from sxe._rows.normalizer import has_softmax
from sxe._rows.predictions import rank
from sxe._rows.rules import RULES, results_and_state
from sxe._rows.targets import Rows, Targets


class _Inputs(NamedTuple):
    logits: Array
    labels: Array
    options: Options


def _masked(inputs: _Inputs) -> tuple[_Inputs, Array | None]:
    """Move the classes to the last axis, and set the logits of masked classes to -inf.

    Also returns the mask, [..., K] or [1, ..., K], or None without a mask.
    """
    logits, labels, options = inputs
    class_axes = axes.class_axes(options.axis, logits.ndim)
    options, class_mask = masked_classes(logits, options, class_axes)
    if is_dense(labels):
        labels = axes.classes_last(labels, class_axes)
    logits = axes.classes_last(logits, class_axes)
    if class_mask is not None:
        logits = jnp.where(class_mask, logits, -jnp.inf)
    return _Inputs(logits, labels, options), class_mask


def _prepare(f: CrossEntropy, inputs: _Inputs, *, by_kernel: bool) -> tuple[Array, Rows]:
    """The logits [..., K] and the rows of a call.

    With ``by_kernel``, one GPU kernel computes the results and the gradient of the logits. It finds
    by itself which rows of weight 0 have a finite loss. ``with_loss`` then serves only the
    derivatives of the weights: if they are not needed, XLA drops its reads of the logits. The
    kernel takes dense targets unmasked and in their own dtype, because XLA would write a copy of
    them otherwise.
    """
    logits, labels, options = inputs
    finite = None
    if options.weights is not None:
        finite = has_softmax(logits, f.axis_name, f.backend)
    rows = make_rows(
        labels.astype(_dense_dtype(inputs)) if by_kernel and is_dense(labels) else labels,
        options,
        f.backend,
        shape=logits.shape,
        dtype=logits.dtype,
        finite=None if by_kernel else finite,
        as_given=by_kernel,
    )
    x, targets = _typed_alike(logits, rows.targets, f.axis_name)
    rows = rows._replace(targets=targets)
    if finite is None:
        return x, rows
    is_infinite = any_class(f.is_infinite(x, targets)[..., None], f.axis_name)
    with_loss = rows.with_loss(finite & ~is_infinite)
    # Both weights are 0 without a finite loss. ``keep`` and ``keep_tangent`` set their derivatives
    # to 0, too. XLA can drop only ``keep_tangent`` from the values.
    of_rows = functools.partial(keep_tangent if by_kernel else keep, with_loss)
    mask = rows.mask if by_kernel else with_loss
    return x, rows._replace(weight=of_rows(rows.weight), norm=of_rows(rows.norm), mask=mask)


def _counted(x: Array, rows: Rows, backend: Backend) -> tuple[Array, Targets, Array | None]:
    """Logits, targets, and a mask of the rows that count.

    If the returned mask is None, the logits of rows that do not count are set to 0. Otherwise the
    logits are unchanged, and the caller has to mask results and gradients. This is done for a GPU
    kernel, because XLA would write a masked copy of the logits for it.
    """
    # All rows may share dense targets. Their gradient is then a sum over rows: mask the logits.
    if rows.mask is None or not backend.uses_row_kernels or rows.targets.dense is not None:
        return keep(rows.mask, x), rows.targets, None
    x, targets = jax.tree.map(functools.partial(keep_tangent, rows.mask), (x, rows.targets))
    return x, targets, rows.mask


def _typed_alike(x: Array, targets: Targets, axis_name: AxisName) -> tuple[Array, Targets]:
    """Cast logits and targets to vary over the same mesh axes and to be sharded in the same way.

    shard_map and Explicit meshes need a cotangent of the same type as its input. The cotangents of
    a differentiation rule have the joint type of all inputs, so each input is cast to that type.
    """
    every = frozenset().union(*(varying(a) for a in jax.tree.leaves((x, targets))))
    of_rows = every - set(axis_names(axis_name))
    labels = None if targets.labels is None else targets.labels.label
    splits = [sharding(x)]
    if labels is not None:
        splits.append(sharding(labels)[:-1])
    if targets.dense is not None:
        splits.append(sharding(targets.dense.t))
    spec = [next(filter(None, at), None) for at in itertools.zip_longest(*splits)]

    def alike(a: Array) -> Array:
        return vary(reshard(a, spec[: a.ndim]), every if a.ndim == x.ndim else of_rows)

    def alike_by_label(a: Array) -> Array:  # [..., M]
        return vary(reshard(a, (*spec[:-1], None)), of_rows)

    sparse = jax.tree.map(alike_by_label, targets.sparse)
    others = jax.tree.map(alike, targets._replace(sparse=None))
    return alike(axes.mapped_as(x, labels)), others._replace(sparse=sparse)


def _result(inputs: _Inputs, *, with_gradient: bool) -> Any:
    """The loss, with metrics and its gradient if requested; or log-probabilities and entropy."""
    given, options = inputs.logits, inputs.options
    inputs, class_mask = _masked(inputs)
    shape = inputs.logits.shape
    backend = choose(options.implementation, backend_of(given), dtype=given.dtype, shape=shape)
    f = CrossEntropy(options.axis_name, backend, with_entropy=options.needs_entropy)
    by_kernel = class_mask is None and _has_gradient_kernel(f, inputs, with_gradient=with_gradient)
    x, rows = _prepare(f, inputs, by_kernel=by_kernel)
    if by_kernel:
        return _result_of_kernel(f, inputs, x, rows, like=given if with_gradient else None)
    x, targets, mask = _counted(x, rows, backend)
    if with_gradient:
        results, state = results_and_state(f, x, targets)
    else:
        results = RULES[options.rule](f, x, targets)
    results = jax.tree.map(functools.partial(keep, mask), results)
    if options.returns_log_prob:
        return reduction.log_prob_and_entropy(results, rows)
    z = None if options.z_loss is None else jnp.asarray(options.z_loss, results.loss.dtype)
    loss, sums = reduction.reduced(f.weigh(results, rows.weight, z).value, rows, options)
    value: Any = loss
    if options.return_metrics:
        value = value, _metrics(inputs, x, rows, (sums, results))
    if not with_gradient:
        return value
    divisor = reduction.denominator(sums.weight, sums.parts, options.reduction)
    g = f.weigh(results, rows.weight / divisor, z).g
    gradient = keep(mask, f.gradient(x, targets, state, g))  # D7
    if class_mask is not None:
        gradient = jnp.where(class_mask, gradient, 0)
    class_axes = axes.class_axes(options.axis, given.ndim)
    return value, axes.classes_back(gradient.astype(given.dtype), class_axes, given.shape)


def _metrics(
    inputs: _Inputs, x: Array, rows: Rows, sums_and_results: tuple[reduction.Sums, Results]
) -> Metrics:
    sums, results = sums_and_results
    options = inputs.options
    label = rows.targets.label if reduction.ranks_labels(inputs.labels, options) else None
    ranking = rank(x, label, options.axis_name)
    found = results, ranking
    return reduction.metrics(sums, rows, found, options, classes=x.shape[-1])


def _has_gradient_kernel(f: CrossEntropy, inputs: _Inputs, *, with_gradient: bool) -> bool:
    """Whether one kernel computes the results of rows and their gradient."""
    logits, options = inputs.logits, inputs.options
    if not f.backend.uses_row_kernels:
        return False
    # The kernel would round the gradient to float16 before a loss scale could multiply it.
    rounds_early = logits.dtype == jnp.float16 and not with_gradient
    if options.rule != "vjp" or options.reduction == "none" or rounds_early:
        return False
    if logits.size == 0 or f.axis_name is not None or options.label_weights is not None:
        return False
    of_logits = logits.shape[-1], logits.dtype, logits.dtype
    return has_gradient_kernel(*of_logits, _dense_dtype(inputs))


def _dense_dtype(inputs: _Inputs) -> DTypeLike | None:
    """The dtype in which the gradient kernel reads targets [N, K], or None if it reads none."""
    labels, options = inputs.labels, inputs.options
    smooths, weighs = options.label_smoothing is not None, options.class_weights is not None
    if not is_dense(labels):
        return jnp.float32 if smooths and weighs else None
    is_served = labels.dtype in (jnp.bfloat16, jnp.float16)
    return labels.dtype if is_served and not (smooths or weighs) else jnp.float32


def _result_of_kernel(
    f: CrossEntropy, inputs: _Inputs, x: Array, rows: Rows, *, like: Array | None
) -> Any:
    """``_result`` by the gradient kernel. If the logits are passed as ``like``, with gradient."""
    from sxe._rows import gpu_mean  # Pallas takes a while to import

    options = inputs.options
    divisor = reduction.denominator(*reduction.sum_weights(rows, options), options.reduction)
    z = None if options.z_loss is None else jnp.asarray(options.z_loss, divisor.dtype)
    # The rule's cotangents vary over the mesh axes of x, so every input must do so too.
    weighted, share = vary_like((rows._replace(norm=None), gpu_mean.Share(divisor, z)), x)
    if like is not None:
        mean, results, gradient = gpu_mean.mean_and_gradient(f, x, weighted, share)
    else:
        mean, results = gpu_mean.mean(f, x, weighted, share)
    value: Any = axes.sum_over(mean, options.batch_axis_name)
    if options.return_metrics:
        sums = reduction.sum_rows(f.weigh(results, rows.weight, z).value, rows, options)
        value = value, _metrics(inputs, x, rows, (sums, results))
    if like is None:
        return value
    class_axes = axes.class_axes(options.axis, like.ndim)
    return value, axes.classes_back(gradient, class_axes, like.shape)


@functools.partial(jax.jit, static_argnames=("with_gradient",), inline=True)
def _call(inputs: _Inputs, *, with_gradient: bool) -> Any:
    logits, labels, options = inputs
    checks.check_logits("logits", logits, "logits, labels")
    class_axes = axes.class_axes(options.axis, logits.ndim)
    checks.check_rows(labels, options, logits.shape, class_axes)
    if options.layout is not None:
        return _divided(options.layout, inputs, class_axes, with_gradient=with_gradient)
    axes.check_axis_name("axis_name", options.axis_name, "the logits", logits)
    axes.check_axis_name("batch_axis_name", options.batch_axis_name, "the logits", logits)
    inputs = join_shards(inputs, class_axes, ndim=logits.ndim)
    logits = inputs.logits
    others = {"labels": inputs.labels, **inputs.options.of_rows()}
    axes.check_mapped(logits=logits, **others)
    axes.check_splits("logits", sharding(logits), class_axes, **others)
    if options.implementation == "mosaic_gpu" and axes.is_explicit(logits):
        # XLA partitions its own programs by the types of arrays, but it cannot partition a kernel.
        layout = layout_of_logits(logits, class_axes)
        found = _divided(layout, inputs, class_axes, with_gradient=with_gradient)
    else:
        found = _result(inputs, with_gradient=with_gradient)
    if with_gradient and inputs.options.axis_name != options.axis_name:
        value, gradient = found
        return value, axes.shard_of(gradient, options.axis_name, class_axes[0])
    return found


def _divided(
    layout: Layout, inputs: _Inputs, class_axes: tuple[int, ...], *, with_gradient: bool
) -> Any:
    """Run ``_result`` in ``jax.shard_map`` on global inputs."""
    ndim = inputs.logits.ndim
    out = reduction.result_specs(inputs.labels, inputs.options, layout.of_rows())
    out = (out, layout.of_logits(ndim, class_axes)) if with_gradient else out
    result = functools.partial(_result, with_gradient=with_gradient)
    return layout.run(result, inputs, class_axes, ndim=ndim, out=out)


def _run(
    logits: ArrayLike, labels: ArrayLike, options: Options, *, with_gradient: bool = False
) -> Any:
    inputs = _Inputs(
        arguments.array("logits", logits),
        arguments.array("labels", labels, options.ignore_index),
        options,
    )
    with checks.explained_jet(inputs, options):
        result = _call(inputs, with_gradient=with_gradient)
    return result


def loss_of_logits(
    logits: ArrayLike, labels: ArrayLike, *, layout: Layout | None = None, **options: Any
) -> Any:
    """``softmax_cross_entropy``; with a layout, for global arrays on a mesh."""
    return _run(logits, labels, parse(layout=layout, **options))


def log_prob_of_logits(logits: ArrayLike, labels: ArrayLike, **options: Any) -> Any:
    """``log_prob_and_entropy``; with a layout, for global arrays on a mesh."""
    return loss_of_logits(logits, labels, reduction="none", returns_log_prob=True, **options)


def loss_and_gradient(
    logits: ArrayLike, labels: ArrayLike, *, layout: Layout | None = None, **options: Any
) -> Any:
    """``softmax_cross_entropy_with_gradient``; with a layout, for global arrays on a mesh."""
    arguments.one_of("reduction", options["reduction"], ("mean", "sum"))
    return _run(logits, labels, parse(layout=layout, **options), with_gradient=True)


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LogitsOptions],
) -> Array: ...
@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LogitsOptions],
) -> tuple[Array, Metrics]: ...
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_index: int | None = None,
    axis: int | tuple[int, ...] = -1,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    rule: Rule = "vjp",
    implementation: Implementation = None,
) -> Array | tuple[Array, Metrics]:
    """Softmax cross-entropy of logits and labels, with its gradient in closed form.

    With the targets t_i of row i, T_i = sum_k t_ik and q_i = softmax(logits_i):

        loss_i         = -sum_k t_ik log q_ik + z_loss lse(logits_i)^2
        d loss_i/d x_l = T_i q_il - t_il + 2 z_loss lse(logits_i) q_il

    Here x is the row of logits, and lse is log sum exp. The loss keeps full relative precision at
    every magnitude of the logits. T q - t is computed as q (T - t) - t (1 - q). Both terms keep
    full relative precision too, whichever class holds most of T.

    The targets follow from the labels, the label smoothing a and the class weights c:

        t_k = c_k ((1 - a) p_k + a / K)

    For a class index y, p_k is [k = y]. For several class indices y_m with ``label_weights`` w_m,
    p_k is sum_m w_m [k = y_m]. For dense targets, p_k is given. No [N, K] array is made for class
    indices. With a ``class_mask``, K is the number of classes that can occur, and the other classes
    get no share of a.

    A row counts unless it is masked out, ignored, or has weight 0.

    Args:
      logits: [..., K], bfloat16, float16, float32 or float64.
      labels: class indices [...] of any integer dtype, or dense targets [..., K] of a float dtype.
        Dense targets are non-negative and need not sum to one. With ``label_weights``, class
        indices [..., M]: M labels per row. M is always the last axis, for any ``axis``.
      label_weights: float [..., M], one weight per label, for rows with several labels, such as the
        largest targets of a teacher or several right answers. They are non-negative and need not
        sum to one. Weights of equal labels add up. A label out of range is padding if its weight is
        0. To leave out whole rows, use ``where``; ``ignore_index`` is for rows with one label.
      where: bool [...], True for the rows that count. Or bool [..., K], True for the classes that
        can occur in each row: the other classes are treated as logits of -inf, and a row without
        any class does not count.
      weights: float [...], one weight per row. Weights may be negative, such as advantages. In a
        "mean", negative weights must not make the sum of the weights 0.
      class_weights: float [K], one weight per class.
      class_mask: bool [K], True for the classes that can occur, the same for all rows; False for
        masked classes, such as the padding of a vocabulary. The result is that of logits and class
        weights without the masked classes. The entries of masked classes may hold any value,
        including NaN, and have a gradient of 0. A target for a masked class makes the loss +inf. If
        all classes are masked, no row counts. ``class_mask`` can be combined with a ``where`` of
        classes.
      label_smoothing: in [0, 1], the share of the target that is spread over all classes, or over
        the classes of ``class_mask``. A class that a ``where`` or a logit of -inf excludes
        still has its share, which makes the loss +inf.
      z_loss: finite and at least 0, the weight of lse^2, which keeps logits from drifting.
      ignore_index: rows whose integer label has this value do not count. By default, no label is
        ignored: a label of -100, as in PyTorch, is out of range and makes its row NaN.
      axis: the class axis of the logits, or a tuple of axes. With a tuple, a label is a flat index
        over these axes in the given order, and ``class_weights`` and ``class_mask`` are flat too.
      reduction: "sum" is sum_i w_i loss_i over the rows that count, with row weights w_i. "mean"
        is this sum divided by sum_i v_i. If each row has one integer label, v_i is w_i times the
        class weight of this label. Otherwise v_i is w_i. The mean is 0 if no row counts. The mean
        and its gradient are NaN if rows count but sum_i v_i is 0, or if it overflows. In a mean, a
        row whose label has class weight 0 counts only if label smoothing or z_loss gives it a loss.
        "none" is w_i loss_i, [...], and 0 in rows that do not count.
      return_metrics: also return ``sxe.Metrics``, computed in the same pass and without gradient.
        Pass ``has_aux=True`` to ``jax.value_and_grad``.
      axis_name: inside ``jax.shard_map``, the mesh axis, or axes, along which the classes are
        sharded. Logits, dense targets, class weights and masks of classes are then the shards of
        this device; labels are indices into all classes. An axis that does not shard the logits
        raises ValueError. With ``check_vma=False``, this mistake is not detected, and the value is
        wrong. ``axis_name`` may also be an axis of ``jax.pmap`` or ``jax.vmap``, where the mistake
        is not detected either.
      batch_axis_name: likewise, the mesh axis, or axes, along which the rows are sharded. "mean",
        "sum" and the sums in the metrics are then over the global batch.
      rule: how the gradient is defined for JAX. "vjp": the closed form, by ``jax.custom_vjp``, for
        reverse mode, with the least memory; forward mode raises JAX's error "can't apply
        forward-mode autodiff (jvp) to a custom_vjp function". "jvp": the closed form, by
        ``jax.custom_jvp``, for forward mode too. "autodiff": no closed form; JAX differentiates the
        loss itself. ``jax.experimental.jet`` needs this rule.
      implementation: how the computations on rows are compiled. "xla": by XLA. "mosaic_gpu": by two
        kernels for NVIDIA GPUs of the Hopper generation, a gradient kernel and a state kernel. For
        a "mean" or "sum" with rule "vjp", the gradient kernel reads the logits once and writes the
        gradient once, in the forward pass. The backward pass multiplies this gradient by the
        cotangent, so a cotangent other than 1 rounds a bfloat16 gradient a second time. The
        gradient kernel needs rows of logits and of dense targets whose size is a multiple of 16
        bytes. It does not support sharded classes, masks of classes, ``label_weights``, or
        ``jax.grad`` of float16 logits, which a loss scale may multiply later. In all other calls,
        the state kernel reads the logits once for the maximum and the sum of exponentials of each
        row, and XLA computes the gradient. float64, other platforms, and JAX before 0.11.2 raise
        ValueError. Calls on several devices raise it too, unless ``jax.shard_map``,
        ``sxe.over_mesh`` or an Explicit mesh shards the rows. None is currently "xla".

    With ``axis_name`` or ``batch_axis_name``, a gradient taken outside of the mapped function is
    correct. With n shards, a gradient taken inside of ``jax.pmap``, ``jax.vmap``, or
    ``jax.shard_map`` with ``check_vma=False`` is n times the correct gradient, as for
    ``jax.lax.psum``. For an argument that is replicated over the shards, such as the weights, each
    shard gets a part of it.

    ``ignore_index``, ``axis``, ``reduction``, ``return_metrics``, the axis names, ``rule`` and
    ``implementation`` are static under ``jax.jit``: bind them with ``functools.partial``, or name
    them in ``static_argnames``. Logits that are sharded over an Explicit mesh need
    ``jax.set_mesh(mesh)``.

    Returns:
      The loss, float32 (float64 for float64 logits), a scalar or, for "none", [...].
        With ``return_metrics``, the tuple ``(loss, sxe.Metrics)``.

    Gradients exist for logits, dense targets, label weights, row weights, class weights and traced
    options. Each gradient has the dtype of its input and is rounded once. The gradient for dense
    targets is -log q. The gradient for the weights of a "sum" is the loss of each row, also at a
    weight of 0.

    Rows that do not count:
      These rows contribute nothing to the value or the gradient, whatever they contain: NaN,
      infinities, labels out of range.

    Infinite logits:
      A logit of -inf has q = 0 and gradient 0. If it is the label's logit, the loss is +inf and its
      gradient is -1. 0 log 0 is 0, in the value and in all derivatives. If a row is -inf in
      all classes, or contains +inf or NaN, its loss and gradient are NaN, and those of no other
      row.

    Invalid labels:
      If a class index is outside of [0, K), the loss and gradient of its row are NaN, and those of
      no other row. Under ``checkify``, such an index raises an error that gives the label, its
      position and K. An index whose label weight is 0 is padding: it causes neither NaN nor an
      error.

    Raises:
      TypeError: if a dtype is none of the above, or an option has a wrong type.
      ValueError: if a shape or an axis does not fit, K is 0, a reduction or rule is unknown, or an
        option is out of range (the value of a ``jax.Array`` is not checked); if two of
        ``ignore_index``, ``label_weights`` and dense targets are combined; if a mesh axis does not
        shard the logits, or an array is sharded over an Explicit mesh differently from the logits;
        if ``jax.experimental.jet`` is used with a rule other than "autodiff"; or if "mosaic_gpu"
        cannot run, see ``implementation``.

    Source:
      Lines D0 and D7 of ``sxe.derivation``. ``sxe._rows.normalizer`` explains the arithmetic.

    Examples:
      >>> import jax, jax.numpy as jnp, sxe
      >>> logits, labels = jnp.array([[20.0, 0.0], [1e8, 1e8]]), jnp.array([0, 1])
      >>> sxe.softmax_cross_entropy(logits, labels, reduction="none")
      Array([2.06115e-09, 6.93147e-01], dtype=float32)
      >>> jax.grad(sxe.softmax_cross_entropy)(logits, labels)
      Array([[-1.03058e-09,  1.03058e-09],
             [ 2.50000e-01, -2.50000e-01]], dtype=float32)
    """
    return loss_of_logits(
        logits,
        labels,
        label_weights=label_weights,
        where=where,
        weights=weights,
        class_weights=class_weights,
        class_mask=class_mask,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        axis=axis,
        reduction=reduction,
        return_metrics=return_metrics,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        rule=rule,
        implementation=implementation,
    )


@overload
def softmax_cross_entropy_with_gradient(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LogitsGradientOptions],
) -> tuple[Array, Array]: ...
@overload
def softmax_cross_entropy_with_gradient(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LogitsGradientOptions],
) -> tuple[tuple[Array, Metrics], Array]: ...
def softmax_cross_entropy_with_gradient(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_index: int | None = None,
    axis: int | tuple[int, ...] = -1,
    reduction: Literal["mean", "sum"] = "mean",
    return_metrics: bool = False,
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    implementation: Implementation = None,
) -> tuple[Array | tuple[Array, Metrics], Array]:
    """The loss and its gradient with respect to the logits, both in closed form and in one pass.

    For a mean over N rows the gradient is line D7 of the derivation:

        d loss/d logits = (1/N) (T q - t)          with t, T and q as in ``softmax_cross_entropy``

    This is what ``jax.grad`` of ``softmax_cross_entropy`` gives, computed without autodiff. It has
    the shape and dtype of the logits. Line D9 is its transpose, [K, N], for targets that sum to 1.
    The arguments are those of ``softmax_cross_entropy`` without ``rule``. They are described there.

    Args:
      logits: [..., K], bfloat16, float16, float32 or float64.
      labels: class indices [...], dense targets [..., K], or, with ``label_weights``, class
        indices [..., M].
      label_weights: float [..., M], one weight per label.
      where: bool [...], the rows that count, or bool [..., K], the classes that can occur.
      weights: float [...], one weight per row.
      class_weights: float [K], one weight per class.
      class_mask: bool [K], the classes that can occur, the same for all rows.
      label_smoothing: in [0, 1], the share of the target that is spread over all classes.
      z_loss: finite and at least 0, the weight of lse^2.
      ignore_index: rows whose integer label has this value do not count.
      axis: the class axis of the logits, or a tuple of axes.
      reduction: "mean" or "sum".
      return_metrics: also return ``sxe.Metrics``.
      axis_name: the mesh axis, or axes, along which the classes are sharded.
      batch_axis_name: the mesh axis, or axes, along which the rows are sharded.
      implementation: None, "xla" or "mosaic_gpu".

    Returns:
      ``(loss, gradient)``, or ``((loss, sxe.Metrics), gradient)`` with ``return_metrics``. With
        ``batch_axis_name``, the gradient is that of the global loss for the rows of this device.

    Rows that do not count, infinite logits and invalid labels are handled as in
    ``softmax_cross_entropy``.

    Raises:
      TypeError: as for ``softmax_cross_entropy``.
      ValueError: as for ``softmax_cross_entropy``, and for reduction "none".

    Source:
      Line D7 of ``sxe.derivation``.

    Examples:
      >>> import jax.numpy as jnp, sxe
      >>> logits, labels = jnp.zeros((1, 4)), jnp.array([2])
      >>> sxe.softmax_cross_entropy_with_gradient(logits, labels)
      (Array(1.38629, dtype=float32), Array([[ 0.25,  0.25, -0.75,  0.25]], dtype=float32))
    """
    return loss_and_gradient(
        logits,
        labels,
        label_weights=label_weights,
        where=where,
        weights=weights,
        class_weights=class_weights,
        class_mask=class_mask,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        axis=axis,
        reduction=reduction,
        return_metrics=return_metrics,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        implementation=implementation,
    )
