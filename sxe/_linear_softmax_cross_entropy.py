"""The softmax cross-entropy loss of hidden states and a kernel, without the logits.

    u = hidden @ kernel      z = logit_scale u + bias      x = softcap tanh(z / softcap)

The loss and the gradient of the logits x are those of ``_softmax_cross_entropy``. From there

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
from sxe._errors import ArgumentValueError
from sxe._head.chunk import Head, Shared
from sxe._head.chunked import HiddenRows
from sxe._head.examples import outcome_of_examples
from sxe._rows.cross_entropy import CrossEntropy
from sxe._rows.targets import Rows

Prepared = tuple[Head, Shared, HiddenRows, Rows]  # what the head takes, of rows [N, ...]


class _Inputs(NamedTuple):
    hidden: Array
    kernel: Array
    labels: Array
    options: Options


def _prepare(inputs: _Inputs) -> tuple[Prepared, Rows]:
    """A call as what the head takes; and its rows as they came."""
    hidden, kernel, labels, options = inputs
    rows_shape, classes = hidden.shape[:-1], kernel.shape[1]
    side = Linear(hidden, kernel, options.bias, options.logit_scale, options.softcap)
    dtype, shape = side.dtype, (*rows_shape, classes)
    backend = backend_of(hidden, kernel)
    backend = choose(options.implementation, backend, dtype=dtype, shape=shape)
    check_rule(options.rule, backend)
    finite = None
    if options.weights is not None:
        finite = side.has_loss(options.axis_name, backend)
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
    loss = outcome.value
    if loss is None:
        loss = head.f.weigh(outcome.results, flat.weight, shared.z_loss).value
    # Divided after the sum: before it, what is left of a confident row's loss or gradient would be
    # below float32's normal numbers, and 0.
    sums = reduction.sum_rows(jnp.sum(loss), rows, options)
    value = sums.loss / reduction.denominator(sums.weight, sums.parts, options.reduction)
    if options.reduction == "none":
        value = rows_of(loss)
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
    """The same with the layout that the types of arrays on an Explicit mesh have.

    They say how the inputs are split, but cannot say how chunks of split rows are.
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
    """``linear_softmax_cross_entropy``, of global arrays on a mesh where there is a layout."""
    parsed = parse(layout=layout, **options)
    inputs = _Inputs(
        arguments.array("hidden", hidden),
        arguments.array("kernel", kernel),
        arguments.array("labels", labels, parsed.ignore_index),
        parsed,
    )
    jet_traces = checks.check_jet(inputs, parsed)
    try:
        return _call(inputs)
    except KeyError as error:  # from jet, of a primitive for which it has no rule
        if not jet_traces or str(error) not in ("scan", "while"):
            raise
        raise ArgumentValueError(
            "hidden",
            "expected as many rows as one chunk has in a call that jax.experimental.jet "
            f"differentiates, because jet can't differentiate a loop, got {inputs.hidden.shape}; "
            "raise chunk_size to the number of rows, or pass logits to sxe.softmax_cross_entropy",
        ) from error


def log_prob_of_hidden(
    hidden: ArrayLike, kernel: ArrayLike, labels: ArrayLike, **options: Any
) -> Any:
    """``linear_log_prob_and_entropy``, likewise."""
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

    The loss of these logits, of which a chunk of rows exists at a time:

        z = logit_scale hidden @ kernel + bias
        logits = softcap tanh(z / softcap)         or z, without softcap; -inf by the class mask

    Value and gradients are those of ``softmax_cross_entropy`` on them, with its options and its
    precision. A "mean" or "sum" takes the gradients in the forward pass where it is differentiated,
    6 N D K FLOPs for hidden and kernel, 4 N D K if one of them is not differentiated. "none"
    computes the logits again in the backward pass, 8 N D K. ``sxe.plan`` tells what a call does.

    Args:
      hidden: [..., D], bfloat16, float16, float32 or float64.
      kernel: [D, K], likewise; a tied embedding [K, D] passes its transpose. If the dtypes differ
        they are promoted as in ``hidden @ kernel``.
      labels: class indices [...] of any integer dtype, or dense targets [..., K] of a float dtype,
        or class indices [..., M] with ``label_weights``: M labels for each row.
      label_weights: float [..., M], a weight for each of several labels of a row, as for
        ``softmax_cross_entropy``. The targets are sum_m w_m [k = y_m], and no [N, K] array of them
        is made.
      bias: float [K]. Without softcap, a class with a bias of -inf cannot occur. With softcap it
        can: its logit is -softcap. See ``class_mask``.
      logit_scale: a number or a scalar array, for example 1 / temperature; or float [...], one for
        each row. It multiplies hidden @ kernel in float32, so that no operand is rounded again.
      softcap: a number above 0 or a scalar array, a bound on the logits' magnitude, bias included.
        None is off.
      chunk_size: the most rows that a chunk may have. By default as many as have logits of 48 MiB
        on a CPU, 32 MiB elsewhere, so that memory does not grow with the rows; more where that is
        less than 128 rows on a CPU, up to a sixteenth of all, or on an accelerator less than 2048
        (512 of float32), up to an eighth.
      where: bool [...], the rows that count. For classes that cannot occur there is ``class_mask``,
        which is the same for all rows.
      class_mask: bool [K], the classes that can occur in any row: False for those of a padded
        vocabulary. The result is that of a kernel, bias and class weights without the others, also
        under a softcap. These may hold anything, NaN too. Their gradient is 0, but for d kernel
        where a row that counts has hidden states that are not finite. So that d hidden is right,
        an accelerator makes one masked copy of the kernel, which it does not need if hidden is not
        differentiated, and rules other than "vjp" make one everywhere.
      axis_name: inside ``jax.shard_map``, the mesh axis (or axes) along which the classes are
        split: kernel, bias, dense targets, class weights and class mask are this device's, labels
        are indices of all classes. With ``check_vma=False`` one that splits nothing goes unnoticed.
        For ``jax.pmap`` and ``jax.vmap``, and gradients taken inside, see
        ``softmax_cross_entropy``.
      weights, class_weights, label_smoothing, z_loss, ignore_index, reduction, return_metrics,
        batch_axis_name: as for ``softmax_cross_entropy``.
      rule: "vjp": gradients as above, for reverse mode. "jvp": the closed form for logits as
        ``jax.custom_jvp``, for forward mode too; "autodiff": no closed form. For these two JAX
        differentiates one chunk after the other, and matmuls are in float32.
        ``jax.experimental.jet`` needs "autodiff", no softcap, and one chunk.
      implementation: as for ``softmax_cross_entropy``, of the logits of a chunk, with rule "vjp".
        The products are XLA's. ``sxe.plan`` tells which kernel a call uses.

    ``chunk_size``, ``ignore_index``, ``reduction``, ``return_metrics``, the axis names, ``rule``
    and ``implementation`` are Python values, static under ``jax.jit``: see
    ``softmax_cross_entropy``.

    Returns:
      The loss, float32 (float64 if hidden or kernel is), or ``(loss, sxe.Metrics)``. Gradients
      exist for hidden, kernel, bias, logit_scale, softcap, and all that ``softmax_cross_entropy``
      has them for, each in the dtype of its input, rounded once. One that is not asked for is not
      computed.

    Logits are accumulated in float32 whatever the operands are, and so are d hidden in its chunk
    and d kernel over all chunks. The gradient of the logits stays in float32 for its products on a
    CPU; on an accelerator it is rounded to bfloat16 where the operands are bfloat16.

    float32 is multiplied as float32, also where JAX's default for matmuls is TF32, on a GPU, or
    bfloat16, on a TPU. For those, which are several times as fast, ask JAX:
    ``jax.default_matmul_precision("tensorfloat32")`` or ``"bfloat16"``, around the call or as the
    option ``jax_default_matmul_precision``, applies to all products of the head, both ways.

    On a CPU, in one compiled program, the bits of a row's results depend on that row alone; another
    number of rows, or another ``chunk_size``, may change the last bits. head.md says where else.

    Rows that do not count contribute nothing to value or gradient, whatever stands in them. By rule
    "vjp", and on one device or inside of ``jax.shard_map``, the rows that count are put together
    into chunks, and no other chunks are run. Infinite logits and bad labels do what they do in
    ``softmax_cross_entropy``.

    ``jax.vmap`` over hidden states and labels makes the examples rows of one call. A gradient of
    the vmap then has one gradient of the kernel, and computes the logits twice, 8 N D K. In a
    ``jax.lax.scan`` whose gradient is taken outside of it, a "mean" or "sum" keeps a gradient of
    the kernel for each step, and "none" does not.

    Raises:
      TypeError: for a dtype that is none of the above, or an option of a wrong type.
      ValueError: for a shape that does not fit, a ``where`` of classes, a ``chunk_size``
        below 1, ``jax.experimental.jet`` of a softcap, and as for ``softmax_cross_entropy``.

    Source: D0 and D7 of ``sxe.derivation``, and the chain rule H0 to H7 of
    ``sxe._head.projection``.

    Example:
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
