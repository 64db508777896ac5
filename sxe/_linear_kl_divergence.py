"""The divergence between the softmax of a model and that of a target, from hidden states.

Each side consists of hidden states and a kernel; the target's side may also be logits. The logits
of both sides exist for one chunk of rows at a time. The divergence of these logits and its gradient
are those of ``_kl_divergence``. The chain rule of ``_linear_softmax_cross_entropy`` is then applied
to each side.
"""

from __future__ import annotations  # so that help() names types shortly

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from sxe._arrays import AxisName, any_class, sharding
from sxe._backend import backend_of
from sxe._call import arguments, axes, checks, reduction
from sxe._call.layout import Layout, join_shards, layout_of
from sxe._call.linear import (
    Linear,
    flat_rows,
    head_of,
    projections_of,
    typed_alike,
    wide_of,
)
from sxe._call.options import Options, Reduction, Rule, parse
from sxe._call.rows import weight_and_mask
from sxe._errors import ArgumentTypeError, ArgumentValueError
from sxe._head.chunk import Shared
from sxe._head.examples import outcome_of_examples
from sxe._rows.kl_divergence import KLDivergence, Mode
from sxe._rows.targets import Rows


class _Inputs(NamedTuple):
    hidden: Array
    kernel: Array
    target_hidden: Array | None
    target_kernel: Array | None
    target_logits: Array | None
    options: Options

    @property
    def sides(self) -> tuple[Linear, Linear]:
        """The side of the model, and that of the target."""
        options, target = self.options, self.target_hidden
        if self.target_logits is not None:
            target = self.target_logits
        assert target is not None
        scale, target_scale = options.logit_scale, options.target_logit_scale
        return (
            Linear(self.hidden, self.kernel, options.bias, scale, options.softcap),
            Linear(
                target,
                self.target_kernel,
                options.target_bias,
                target_scale,
                options.target_softcap,
            ),
        )


def _result(inputs: _Inputs) -> Array:
    options, sides, shape = inputs.options, inputs.sides, inputs.hidden.shape[:-1]
    backend = backend_of(*(a for a in inputs[:-1] if a is not None))
    mask = options.where
    if options.class_mask is not None:
        possible = jnp.broadcast_to(any_class(options.class_mask, options.axis_name), shape)
        mask = possible if mask is None else mask & possible
    have_softmax = [side.has_softmax(options.axis_name, backend) for side in sides]
    weight, mask = weight_and_mask(options, mask, have_softmax[0] & have_softmax[1], wide_of(sides))
    f = KLDivergence(options.axis_name, backend, options.mode, options.beta)
    projections, hidden = projections_of(sides, options)
    rows = flat_rows(Rows(None, weight, None, mask), shape)
    shared, hidden, rows = typed_alike(
        Shared(projections, None, None), hidden, rows, options.axis_name
    )
    outcome = outcome_of_examples(head_of(f, sides, options), shared, hidden, rows)
    weighed = outcome.value
    if weighed is None:
        weighed = f.weigh(outcome.results, rows.weight, None).value.reshape(shape)
    value, _ = reduction.reduced(weighed, Rows(None, weight, weight, mask), options)
    return value


@functools.partial(jax.jit, inline=True)
def _call(inputs: _Inputs) -> Array:
    hidden, kernel, *_, options = inputs
    checks.check_projection(hidden, kernel, options)
    shape, class_axes = (*hidden.shape[:-1], kernel.shape[1]), (hidden.ndim - 1,)
    _check_target(inputs, shape)
    checks.check_masks_and_weights(options, shape, class_axes, head=True)
    if options.layout is None:
        axes.check_axis_name("axis_name", options.axis_name, "the kernel", kernel)
        target, what = inputs.target_kernel, "the target kernel"
        if inputs.target_logits is not None:
            target, what = inputs.target_logits, "the target logits"
        assert target is not None
        axes.check_axis_name("axis_name", options.axis_name, what, target)
        names = options.batch_axis_name
        axes.check_axis_name("batch_axis_name", names, "the hidden states", hidden)
        inputs = _laid_out(join_shards(inputs, class_axes, ndim=len(shape)), class_axes)
    layout = inputs.options.layout
    if layout is None:
        return _result(inputs)
    out = layout.of_rows() if options.reduction == "none" else PartitionSpec()
    return layout.run(_result, inputs, class_axes, ndim=len(shape), out=out)


def _check_target(inputs: _Inputs, shape: tuple[int, ...]) -> None:
    """Raises unless the target's side fits logits of this shape, [..., K]."""
    options, logits = inputs.options, inputs.target_logits
    if logits is not None:
        checks.check_target_logits(shape, logits, options)
        checks.check_row_scale("target_logit_scale", options.target_row_scale, shape[:-1], options)
        return
    target_hidden, target_kernel = inputs.target_hidden, inputs.target_kernel
    assert target_hidden is not None
    assert target_kernel is not None
    if target_hidden.shape[:-1] != shape[:-1]:
        raise ArgumentValueError(
            "target_hidden",
            f"expected the row axes of hidden, {shape[:-1]}, and one last axis of any size, got "
            f"shape {target_hidden.shape}",
        )
    if target_kernel.ndim == 2 and target_kernel.shape[1] != shape[-1]:
        raise ArgumentValueError(
            "target_kernel",
            f"expected shape [D, K] with K = {shape[-1]}, the number of classes of kernel, got "
            f"{target_kernel.shape}; if only one side has a padded vocabulary, slice it",
        )
    checks.check_projection(target_hidden, target_kernel, options, of_target=True)


def _laid_out(inputs: _Inputs, class_axes: tuple[int, ...]) -> _Inputs:
    """Add the layout that the types of arrays on an Explicit mesh describe."""
    named = inputs._asdict()
    options = named.pop("options")
    if not axes.is_explicit(*named.values()):
        return inputs
    others = {"target_logits": inputs.target_logits, **options.of_rows()}
    biases = {"bias": options.bias, "target_bias": options.target_bias}
    axes.check_mapped(**named, **biases, **options.of_rows())
    layout = layout_of(inputs.hidden, inputs.kernel)
    split = (*sharding(inputs.hidden)[:-1], sharding(inputs.kernel)[1])
    axes.check_splits("hidden and kernel", split, class_axes, **others)
    if inputs.target_hidden is not None and inputs.target_kernel is not None:
        target = layout_of(inputs.target_hidden, inputs.target_kernel, of="target_")
        splits = zip(
            (*target.rows, target.classes, target.fsdp),
            (*layout.rows, layout.classes, layout.fsdp),
            strict=True,
        )
        if any(of_target not in (None, of_model) for of_target, of_model in splits):
            raise ArgumentValueError(
                "target_kernel",
                "expected target_hidden and target_kernel to be sharded as hidden and kernel, or "
                "unsharded, got "
                f"{jax.typeof(inputs.target_hidden)} and {jax.typeof(inputs.target_kernel)}, "
                f"with {jax.typeof(inputs.hidden)} and {jax.typeof(inputs.kernel)}; use "
                "jax.reshard",
            )
    return inputs._replace(options=options.replace(layout=layout))


def divergence_of_hidden(
    hidden: ArrayLike,
    kernel: ArrayLike,
    target_hidden: ArrayLike | None = None,
    target_kernel: ArrayLike | None = None,
    *,
    target_logits: ArrayLike | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> Array:
    """``linear_kl_divergence``; with a layout, for global arrays on a mesh."""
    parsed = parse(layout=layout, **options)
    given = target_hidden is not None, target_kernel is not None, target_logits is not None
    if given not in ((True, True, False), (False, False, True)):
        names = [f"target_{name}" for name in ("hidden", "kernel", "logits")]
        got = [name for name, is_given in zip(names, given, strict=True) if is_given]
        advice = "; pass logits as target_logits=..." if got == names[:1] else ""
        raise ArgumentTypeError(
            "target_hidden",
            "expected target_hidden and target_kernel, or only target_logits, got "
            f"{' and '.join(got) or 'none of them'}{advice}",
        )

    def array(name: str, x: ArrayLike | None) -> Array | None:
        return None if x is None else arguments.array(name, x)

    inputs = _Inputs(
        arguments.array("hidden", hidden),
        arguments.array("kernel", kernel),
        array("target_hidden", target_hidden),
        array("target_kernel", target_kernel),
        array("target_logits", target_logits),
        parsed,
    )
    with checks.explained_jet(inputs, parsed, of_logits="sxe.kl_divergence"):
        result = _call(inputs)
    return result


def linear_kl_divergence(
    hidden: ArrayLike,
    kernel: ArrayLike,
    target_hidden: ArrayLike | None = None,
    target_kernel: ArrayLike | None = None,
    *,
    target_logits: ArrayLike | None = None,
    mode: Mode = "forward",
    beta: float = 0.5,
    bias: ArrayLike | None = None,
    target_bias: ArrayLike | None = None,
    logit_scale: ArrayLike = 1.0,
    target_logit_scale: ArrayLike = 1.0,
    softcap: ArrayLike | None = None,
    target_softcap: ArrayLike | None = None,
    chunk_size: int | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    rule: Rule = "vjp",
) -> Array:
    """``kl_divergence`` of hidden states and kernels, without the [N, K] logits of either side.

    The result is that of the following logits, which exist for one chunk of rows at a time:

        z = logit_scale hidden @ kernel + bias
        logits = softcap tanh(z / softcap)         or z, without softcap; -inf for masked classes

    The target's logits are computed in the same way from the arguments whose names begin with
    ``target_``. Value and gradients are those of ``kl_divergence`` for these logits, with its
    precision. If a "mean" or "sum" is differentiated, the forward pass computes the gradients. This
    takes 6 N D K FLOPs for a side whose hidden states and kernel are differentiated, and 2 N D K
    for a side that is not. For "none", the backward pass computes the logits of both sides again.

    Args:
      hidden: [..., D], bfloat16, float16, float32 or float64, of the model.
      kernel: [D, K], of the same dtypes.
      target_hidden: [..., D'], of the same dtypes, of a teacher or a reference policy. D' may
        differ from D.
      target_kernel: [D', K], of the same dtypes.
      target_logits: [..., K], the target's logits if they exist already. Pass them in place of
        target_hidden and target_kernel.
      mode: "forward", "reverse" or "jensen_shannon", as for ``kl_divergence``.
      beta: from 1e-20 to below 1, only for "jensen_shannon"; another mode raises ValueError.
      bias: float [K].
      target_bias: float [K], likewise.
      logit_scale: a factor for hidden @ kernel: a number, a scalar array, or float [...], one per
        row.
      target_logit_scale: likewise, for target_hidden @ target_kernel or the target logits.
      softcap: a number above 0 or a scalar array, a bound on the magnitude of the logits.
      target_softcap: likewise, for the target.
      chunk_size: the largest number of rows in a chunk, as for ``linear_softmax_cross_entropy``. A
        chunk has logits of both sides.
      where: bool [...], True for the rows that count. The other rows are not computed: see head.md.
      weights: float [...], one weight per row. A row of weight 0 does not count.
      class_mask: bool [K], True for the classes that can occur, in all rows and on both sides.
      reduction: "mean", "sum" or "none", as for ``kl_divergence``.
      axis_name: inside ``jax.shard_map``, the mesh axis, or axes, along which the classes of both
        kernels are sharded.
      batch_axis_name: likewise, the mesh axis, or axes, along which the rows are sharded.
      rule: "vjp", "jvp" or "autodiff", as for ``linear_softmax_cross_entropy``.

    ``mode``, ``beta``, ``chunk_size``, ``reduction``, the axis names and ``rule`` are static under
    ``jax.jit``: see ``softmax_cross_entropy``.

    Returns:
      The divergence, float32 (float64 if an input is float64), a scalar or, for "none", [...].

    Gradients exist for hidden states, kernels, target logits, biases, scales, softcaps and weights.
    A gradient that is not requested is not computed.

    Rows that do not count and infinite logits are handled as in ``kl_divergence``.

    Raises:
      TypeError: if a dtype is none of the above, or an option has a wrong type; or if the target is
        given neither by target_hidden and target_kernel nor by target_logits alone.
      ValueError: if shapes do not fit, and as for ``kl_divergence``.

    Source:
      Lines K0 to K5 of ``sxe.derivation``, and the chain rule, lines H0 to H7 of
      ``sxe._head.projection``.

    Examples:
      >>> import jax, jax.numpy as jnp, sxe
      >>> student, teacher = jnp.ones((2, 3, 4)), jnp.ones((2, 3, 8))
      >>> kernel, teacher_kernel = jnp.zeros((4, 50)), jnp.eye(8, 50)
      >>> loss, d_kernel = jax.value_and_grad(sxe.linear_kl_divergence, argnums=1)(
      ...     student, kernel, teacher, teacher_kernel)
      >>> print(f"{loss:.4f}")
      0.0983
    """
    return divergence_of_hidden(
        hidden,
        kernel,
        target_hidden,
        target_kernel,
        target_logits=target_logits,
        mode=mode,
        beta=beta,
        bias=bias,
        target_bias=target_bias,
        logit_scale=logit_scale,
        target_logit_scale=target_logit_scale,
        softcap=softcap,
        target_softcap=target_softcap,
        chunk_size=chunk_size,
        where=where,
        weights=weights,
        class_mask=class_mask,
        reduction=reduction,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        rule=rule,
    )
