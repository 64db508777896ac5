"""The softmax cross-entropy loss of hidden states and a kernel, without the logits.

    u = hidden @ kernel      z = logit_scale u + bias      x = softcap tanh(z / softcap)

This fused final linear layer and loss is called the head. The loss and the gradient of the logits x
are those of ``_softmax_cross_entropy``. The chain rule gives

    d u = logit_scale (1 - (x / softcap)^2) d x
    d hidden = d u kernel^T                         d kernel = hidden^T d u
"""

from __future__ import annotations  # so that help() names types shortly

import functools
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from sxe._arrays import AxisName, sharding, wide_dtype
from sxe._backend import backend_of
from sxe._call import arguments, axes, checks, reduction
from sxe._call.implementation import check_rule, choose
from sxe._call.layout import Layout, join_shards, layout_of
from sxe._call.linear import Linear, flat_rows, head_of, projections_of, typed_alike
from sxe._call.options import HeadOptions, Implementation, Options, Reduction, Rule, parse
from sxe._call.reduction import Metrics
from sxe._call.rows import make_rows
from sxe._head.chunk import Head, Shared
from sxe._head.chunked import HiddenRows
from sxe._head.examples import outcome_of_examples
from sxe._rows.cross_entropy import CrossEntropy
from sxe._rows.targets import Rows

Prepared = tuple[Head, Shared, HiddenRows, Rows]  # the inputs of the head, with rows [N, ...]


class _Inputs(NamedTuple):
    hidden: Array
    kernel: Array
    labels: Array
    options: Options


def _prepare(inputs: _Inputs) -> tuple[Prepared, Rows]:
    """The inputs of the head, with rows [N, ...], and the rows of the call, [...]."""
    hidden, kernel, labels, options = inputs
    rows_shape, classes = hidden.shape[:-1], kernel.shape[1]
    side = Linear(hidden, kernel, options.bias, options.logit_scale, options.softcap)
    dtype, shape = side.dtype, (*rows_shape, classes)
    backend = backend_of(hidden, kernel)
    backend = choose(options.implementation, backend, dtype=dtype, shape=shape)
    check_rule(options.rule, backend)
    finite = None
    if options.weights is not None:
        finite = side.has_softmax(options.axis_name, backend)
    rows = make_rows(labels, options, backend, shape=shape, dtype=dtype, finite=finite)
    targets, dense = rows.targets, None
    labels_of_rows = None if targets.labels is None else targets.labels.label
    if labels_of_rows is not None and targets.dense is not None:  # label smoothing
        dense = jax.tree.map(lambda a: a.reshape(1, *a.shape[len(rows_shape) :]), targets.dense)
        targets = targets._replace(dense=None)
    side = side._replace(hidden=axes.mapped_as(hidden, labels_of_rows))
    projections, flat_hidden = projections_of([side], options)
    z = None if options.z_loss is None else jnp.asarray(options.z_loss, wide_dtype(dtype))
    f = CrossEntropy(options.axis_name, backend, with_entropy=options.needs_entropy)
    head = head_of(f, [side], options, ranks=reduction.ranks_labels(labels, options))
    flat = flat_rows(Rows(targets, rows.weight, None, rows.mask), rows_shape)
    shared = Shared(projections, dense, z)
    return (head, *typed_alike(shared, flat_hidden, flat, options.axis_name)), rows


def _result(inputs: _Inputs) -> Any:
    options = inputs.options
    (head, shared, hidden, flat), rows = _prepare(inputs)
    outcome = outcome_of_examples(head, shared, hidden, flat)

    def rows_of(x: Any) -> Array:
        return x.reshape(rows.weight.shape)

    if options.returns_log_prob:
        return reduction.log_prob_and_entropy(jax.tree.map(rows_of, outcome.results), rows)
    weighed = outcome.value
    if weighed is None:
        weighed = rows_of(head.f.weigh(outcome.results, flat.weight, shared.z_loss).value)
    value, sums = reduction.reduced(weighed, rows, options)
    if outcome.ranking is None:
        return value
    results, ranking = jax.tree.map(rows_of, (outcome.results, outcome.ranking))
    classes = inputs.kernel.shape[1]
    return value, reduction.metrics(sums, rows, (results, ranking), options, classes=classes)


@functools.partial(jax.jit, inline=True)
def _call(inputs: _Inputs) -> Any:
    hidden, kernel, labels, options = inputs
    checks.check_projection(hidden, kernel, options)
    shape, class_axes = (*hidden.shape[:-1], kernel.shape[1]), (hidden.ndim - 1,)
    checks.check_rows(labels, options, shape, class_axes, head=True)
    if options.layout is None:
        axes.check_axis_name("axis_name", options.axis_name, "the kernel", kernel)
        names = options.batch_axis_name
        axes.check_axis_name("batch_axis_name", names, "the hidden states", hidden)
        inputs = _laid_out(join_shards(inputs, class_axes, ndim=len(shape)), class_axes)
    layout = inputs.options.layout
    if layout is None:
        return _result(inputs)
    out = reduction.result_specs(labels, inputs.options, layout.of_rows())
    return layout.run(_result, inputs, class_axes, ndim=len(shape), out=out)


def _laid_out(inputs: _Inputs, class_axes: tuple[int, ...]) -> _Inputs:
    """Add the layout that the types of arrays on an Explicit mesh describe.

    The head has to run in ``jax.shard_map``: types cannot describe chunks of sharded rows.
    """
    hidden, kernel, labels, options = inputs
    if not axes.is_explicit(hidden, kernel):
        return inputs
    others = {"labels": labels, **options.of_rows()}
    axes.check_mapped(hidden=hidden, kernel=kernel, bias=options.bias, **others)
    layout = layout_of(hidden, kernel)
    split = (*sharding(hidden)[:-1], sharding(kernel)[1])
    axes.check_splits("hidden and kernel", split, class_axes, **others)
    return inputs._replace(options=options.replace(layout=layout))


def loss_of_hidden(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    layout: Layout | None = None,
    **options: Any,
) -> Any:
    """``linear_softmax_cross_entropy``; with a layout, for global arrays on a mesh."""
    parsed = parse(layout=layout, **options)
    inputs = _Inputs(
        arguments.array("hidden", hidden),
        arguments.array("kernel", kernel),
        arguments.array("labels", labels, parsed.ignore_index),
        parsed,
    )
    with checks.explained_jet(inputs, parsed):
        result = _call(inputs)
    return result


def log_prob_of_hidden(
    hidden: ArrayLike, kernel: ArrayLike, labels: ArrayLike, **options: Any
) -> Any:
    """``linear_log_prob_and_entropy``; with a layout, for global arrays on a mesh."""
    options |= {"reduction": "none", "returns_log_prob": True}
    return loss_of_hidden(hidden, kernel, labels, **options)


@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[HeadOptions],
) -> Array: ...
@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    return_metrics: Literal[True],
    **options: Unpack[HeadOptions],
) -> tuple[Array, Metrics]: ...
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    logit_scale: ArrayLike = 1.0,
    softcap: ArrayLike | None = None,
    chunk_size: int | None = None,
    label_weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    rule: Rule = "vjp",
    implementation: Implementation = None,
) -> Array | tuple[Array, Metrics]:
    """Softmax cross-entropy of hidden states and a kernel, without the [N, K] logits.

    This is the loss of the following logits, which exist for one chunk of rows at a time:

        z = logit_scale hidden @ kernel + bias
        logits = softcap tanh(z / softcap)         or z, without softcap; -inf for masked classes

    Value and gradients are those of ``softmax_cross_entropy`` for these logits, with its options
    and its precision. If a "mean" or "sum" is differentiated, the forward pass computes the
    gradients: 6 N D K FLOPs for hidden and kernel, 4 N D K for one of them. For "none", the
    backward pass computes the logits again: 8 N D K FLOPs. ``sxe.plan`` reports FLOPs and memory.

    Args:
      hidden: [..., D], bfloat16, float16, float32 or float64.
      kernel: [D, K], of the same dtypes. For a tied embedding [K, D], pass its transpose. Different
        dtypes are promoted as in ``hidden @ kernel``.
      labels: class indices [...] of any integer dtype, or dense targets [..., K] of a float dtype.
        With ``label_weights``, class indices [..., M]: M labels per row.
      bias: float [K]. Without a softcap, a class with a bias of -inf cannot occur. With a softcap
        it can, because its logit is -softcap; use ``class_mask`` instead.
      logit_scale: a number or a scalar array, such as 1 / temperature; or float [...], one per row.
        It multiplies hidden @ kernel in float32, so that no operand is rounded again.
      softcap: a number above 0 or a scalar array, a bound on the magnitude of the logits, bias
        included. None is off.
      chunk_size: the largest number of rows in a chunk. By default, a chunk has at most 48 MiB of
        logits on a CPU (24 MiB before JAX 0.11) and 32 MiB elsewhere, so that memory does not grow
        with the number of rows. If fewer than 128 rows fit on a CPU, a chunk has more: up to 128
        rows, but at most a sixteenth of all rows. If fewer than 2048 rows (512 in float32) fit on
        an accelerator, a chunk has up to this number, but at most an eighth of all rows.
      label_weights: float [..., M], one weight per label. The targets are sum_m w_m [k = y_m], and
        no [N, K] array of them is made.
      where: bool [...], True for the rows that count. To exclude classes, use ``class_mask``, which
        is the same for all rows.
      weights: float [...], one weight per row, as for ``softmax_cross_entropy``.
      class_weights: float [K], one weight per class.
      class_mask: bool [K], True for the classes that can occur, the same for all rows; False for
        masked classes, such as the padding of a vocabulary. The result is that of a kernel, bias
        and class weights without the masked classes, also under a softcap. The entries of masked
        classes may hold any value, including NaN, and have a gradient of 0. There is one exception:
        if a row that counts has hidden states that are not finite, the gradient of the kernel is
        NaN at masked classes too. If hidden is differentiated, an accelerator makes one masked copy
        of the kernel, to keep NaN out of the gradient of hidden. Rules other than "vjp" make this
        copy on every platform.
      label_smoothing: in [0, 1], as for ``softmax_cross_entropy``.
      z_loss: finite and at least 0, as for ``softmax_cross_entropy``.
      ignore_index: rows whose integer label has this value do not count.
      reduction: "mean", "sum" or "none", as for ``softmax_cross_entropy``.
      return_metrics: also return ``sxe.Metrics``.
      axis_name: inside ``jax.shard_map``, the mesh axis, or axes, along which the classes are
        sharded. Kernel, bias, dense targets, class weights and class mask are then the shards of
        this device; labels are indices into all classes. With ``check_vma=False``, an axis that
        does not shard the classes is not detected. See ``softmax_cross_entropy`` for ``jax.pmap``
        and ``jax.vmap``, and for gradients taken inside.
      batch_axis_name: likewise, the mesh axis, or axes, along which the rows are sharded.
      rule: "vjp": gradients as above, for reverse mode. "jvp": the closed form for logits with
        ``jax.custom_jvp``, for forward mode too. "autodiff": no closed form. With "jvp" and
        "autodiff", JAX differentiates one chunk after the other, and matmuls are in float32.
        ``jax.experimental.jet`` needs "autodiff", no softcap, and a single chunk.
      implementation: as for ``softmax_cross_entropy``, applied to the logits of each chunk.
        "mosaic_gpu" needs rule "vjp". XLA computes the matrix products in any case. ``sxe.plan``
        reports which kernel a call uses.

    ``chunk_size``, ``ignore_index``, ``reduction``, ``return_metrics``, the axis names, ``rule``
    and ``implementation`` are static under ``jax.jit``: see ``softmax_cross_entropy``.

    Returns:
      The loss, float32 (float64 if hidden or kernel is float64), a scalar or, for "none", [...].
        With ``return_metrics``, the tuple ``(loss, sxe.Metrics)``.

    Gradients exist for hidden, kernel, bias, logit_scale, softcap, and everything that
    ``softmax_cross_entropy`` has gradients for. Each has the dtype of its input and is rounded
    once. A gradient that is not requested is not computed.

    Precision:
      Logits are accumulated in float32 for operands of any dtype. The gradient of hidden (within
      its chunk) and the gradient of kernel (over all chunks) are accumulated in float32 too. The
      gradient of the logits is multiplied with hidden and kernel in float32, or in bfloat16 on an
      accelerator if the operands are bfloat16.

      float32 operands are multiplied as float32, even where JAX's default for matmuls is TF32 (GPU)
      or bfloat16 (TPU). TF32 and bfloat16 are several times as fast. To use them, set
      ``jax.default_matmul_precision("tensorfloat32")`` or ``"bfloat16"`` around the call, or the
      option ``jax_default_matmul_precision``. This applies to all products of the forward and the
      backward pass.

      On a CPU, within one compiled program, the bits of a row's results do not depend on the other
      rows. head.md names an exception. A program for another number of rows or another
      ``chunk_size`` may give other last bits.

    Rows that do not count:
      Rows that are masked out, ignored, or have weight 0 do not count. They contribute nothing to
      the value or the gradient, whatever they contain. With rule "vjp", on one device or inside of
      ``jax.shard_map``, the rows that count are gathered into chunks, and only these chunks are
      computed.

    Infinite logits and invalid labels are handled as in ``softmax_cross_entropy``.

    Transformations:
      ``jax.vmap`` over hidden states and labels turns the examples into rows of one call. The
      gradient of the vmapped function then needs memory for only one gradient of the kernel. It
      computes the logits twice: 8 N D K FLOPs. If the gradient of a ``jax.lax.scan`` is taken
      outside of the scan, a "mean" or "sum" keeps one gradient of the kernel for each step; "none"
      does not.

    Raises:
      TypeError: if a dtype is none of the above, or an option has a wrong type.
      ValueError: if a shape does not fit, ``where`` has a class axis, ``chunk_size`` is below 1, or
        ``jax.experimental.jet`` is used with a softcap; and as for ``softmax_cross_entropy``.

    Source:
      Lines D0 and D7 of ``sxe.derivation``, and the chain rule, lines H0 to H7 of
      ``sxe._head.projection``.

    Examples:
      >>> import jax, jax.numpy as jnp, sxe
      >>> hidden, kernel = jnp.array([[4.0, 0.0], [0.0, 2.0]]), jnp.array([[5.0, 0, 0], [0, 0, 1]])
      >>> labels = jnp.array([0, 2])
      >>> sxe.linear_softmax_cross_entropy(hidden, kernel, labels, reduction="none")
      Array([4.12231e-09, 2.39545e-01], dtype=float32)
      >>> jax.grad(sxe.linear_softmax_cross_entropy)(hidden, kernel, labels)
      Array([[-1.03058e-08,  1.03058e-09],
             [ 2.66267e-01, -1.06507e-01]], dtype=float32)
    """
    return loss_of_hidden(
        hidden,
        kernel,
        labels,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_size=chunk_size,
        label_weights=label_weights,
        where=where,
        weights=weights,
        class_weights=class_weights,
        class_mask=class_mask,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        reduction=reduction,
        return_metrics=return_metrics,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        rule=rule,
        implementation=implementation,
    )
