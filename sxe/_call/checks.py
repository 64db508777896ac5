"""Check that the arguments of a call fit together. The errors say what would fit."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import jet

from sxe._arrays import is_dense
from sxe._call.arguments import as_scalar, check_dtype
from sxe._call.options import Options
from sxe._errors import ArgumentTypeError, ArgumentValueError

HEAD_ORDER = "hidden, kernel, labels"


def _check_float(name: str, x: Array, shape: tuple[int, ...], *, each: str, advice: str) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        cast = "cast it to a float dtype"
        if name == "weights":
            mask = "weights" if x.dtype == jnp.bool_ else "weights != 0"
            cast = f"to mask rows, pass where={mask}; otherwise {cast}"
        raise ArgumentTypeError(name, f"expected a float dtype, got {x.dtype}; {cast}")
    if x.shape != shape:
        raise ArgumentValueError(
            name, f"expected shape {shape}, one value per {each}, got {x.shape}{advice}"
        )


def _broadcasts(
    name: str, shape: tuple[int, ...], expected: tuple[int, ...], along: tuple[int, ...] = ()
) -> list[str]:
    """The ways to broadcast an array to the shape ``expected``, as code.

    Only ways in which the array's own axes include the axes ``along``.
    """
    ways = []
    for behind in range(len(expected) - len(shape) + 1):
        full = (1,) * (len(expected) - len(shape) - behind) + shape + (1,) * behind
        elements = {axis for axis, n in enumerate(full) if n != 1}
        fits = all(full[axis] == expected[axis] for axis in elements)
        if fits and elements >= set(along):
            index = ", ".join([":"] * len(shape) + ["None"] * behind)
            ways.append(f"jnp.broadcast_to({name}{f'[{index}]' if behind else ''}, {expected})")
        if not elements:
            break  # for a single element, all ways are the same
    return ways


def _not_broadcast(ways: list[str]) -> str:
    """Advice for an array that would have to be broadcast in one of these ways.

    There may be several: for rows [T, T], an array [T] may have one value per index of the first
    axis, or of the second.
    """
    return f"; sxe does not broadcast it: pass {' or '.join(ways)}" if ways else ""


def _fitting(name: str, shape: tuple[int, ...], expected: tuple[int, ...], within: str = "") -> str:
    """Advice on how to bring an array of this shape to the expected shape.

    ``within`` is the advice inside of ``jax.shard_map``, or "".
    """
    if shape == (*expected, 1):
        return f"; pass {name}[..., 0]"
    if within:
        return within
    if shape == (1, *expected):
        return f"; pass {name}[0]"
    if len(shape) == 2 and shape == expected[::-1]:
        return f"; pass {name}.T"
    if 1 in (len(shape), len(expected)) and math.prod(shape) == math.prod(expected):
        return f"; pass {name}.reshape({expected})"
    return _not_broadcast(_broadcasts(name, shape, expected))


def _within(options: Options) -> str:
    """Advice inside of ``jax.shard_map``, or ""."""
    if options.axis_name or options.batch_axis_name:
        return "; inside jax.shard_map, shapes are those of one device: check its in_specs"
    return ""


def _shift(name: str, labels: tuple[int, ...], rows: tuple[int, ...]) -> str:
    """Advice for a language model, whose labels are the next tokens, or ""."""
    if len(labels) != len(rows) or len(rows) < 2 or labels[:-1] != rows[:-1]:
        return ""
    if labels[-1] == rows[-1] - 1:
        return f"; if the labels are the next tokens, pass {name}[..., :-1, :]"
    if labels[-1] == rows[-1] + 1:
        return "; if the labels are all tokens, pass the next tokens, labels[..., 1:]"
    return ""


def check_projection(
    hidden: Array, kernel: Array, options: Options, *, of_target: bool = False
) -> None:
    """Raises unless hidden states, kernel, bias and scale fit together.

    With ``of_target``, they belong to a target, and the argument names begin with "target_".
    """
    of = "target_" if of_target else ""
    bias = options.target_bias if of_target else options.bias
    row_scale = options.target_row_scale if of_target else options.row_scale
    check_logits(f"{of}hidden", hidden)
    check_logits(f"{of}kernel", kernel)
    size = hidden.shape[-1]
    if kernel.ndim != 2 or kernel.shape[0] != size:
        advice = ""
        if kernel.ndim == 2 and kernel.shape[1] == size:
            advice = "; for an embedding [K, D], pass its transpose, embedding.T"
        elif hidden.ndim == 2 and kernel.shape[-1:] == hidden.shape[:1]:
            advice = f"; the order of arguments is {HEAD_ORDER}"
        raise ArgumentValueError(
            f"{of}kernel",
            f"expected shape [D, K] with D = {size}, the size of the last axis of {of}hidden "
            f"{hidden.shape}, got {kernel.shape}{advice}",
        )
    if kernel.shape[1] == 0:
        raise ArgumentValueError(
            f"{of}kernel", f"expected shape [D, K] with at least one class, got {kernel.shape}"
        )
    if bias is not None:
        expected = kernel.shape[1:]
        if bias.ndim == 0:
            raise ArgumentValueError(
                f"{of}bias",
                f"expected shape {expected}, one value per class, or None, got a scalar",
            )
        advice = _fitting(f"{of}bias", bias.shape, expected)
        _check_float(f"{of}bias", bias, expected, each="class", advice=advice)
    check_row_scale(f"{of}logit_scale", row_scale, hidden.shape[:-1], options)


def check_row_scale(
    name: str, scale: Array | None, rows: tuple[int, ...], options: Options
) -> None:
    """Raises unless the scale is None or has one value per row."""
    if scale is not None:
        advice = as_scalar(name, scale.shape)
        advice = advice or _fitting(name, scale.shape, rows, _within(options))
        _check_float(name, scale, rows, each="row, or a scalar", advice=advice)


def check_target_logits(shape: tuple[int, ...], target_logits: Array, options: Options) -> None:
    """Raises unless the target logits have the shape of the model's logits, ``shape``."""
    check_logits("target_logits", target_logits, "logits, target_logits")
    if target_logits.shape != shape:
        advice = _fitting("target_logits", target_logits.shape, shape, _within(options))
        raise ArgumentValueError(
            "target_logits",
            f"expected shape {shape}, the shape of the model's logits, got {target_logits.shape}"
            f"{advice}",
        )


def check_logits(name: str, x: Array, order: str = HEAD_ORDER) -> None:
    """Raises unless x has a dtype that the losses support, and at least one axis.

    ``order`` is the order of the arguments, for the error.
    """
    advice = "; cast it to one of these dtypes"
    if jnp.issubdtype(x.dtype, jnp.integer):
        advice = f"; the order of arguments is {order}"
    check_dtype(name, x.dtype, advice)
    if x.ndim == 0:
        raise ArgumentValueError(name, "expected at least one axis, got a scalar")


def check_rows(
    labels: Array,
    options: Options,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    *,
    head: bool = False,
) -> None:
    """Raises unless labels, masks and weights fit logits of this shape with these class axes.

    With ``head``, the logits come from hidden states and a kernel.
    """
    rows = tuple(n for i, n in enumerate(shape) if i not in axes)
    check_classes(options, shape, axes)
    within = _within(options)
    if options.returns_log_prob and is_dense(labels):
        raise ArgumentTypeError(
            "labels",
            f"expected class indices of an integer dtype, got {labels.dtype}; for dense targets, "
            "call the loss, which is minus the expected log-probability",
        )
    if options.label_weights is None:
        _check_labels(labels, options, shape, axes, within=within, head=head)
    else:
        _check_label_weights(labels, options, rows, within=within)
    if options.ignore_index is not None and (is_dense(labels) or options.label_weights is not None):
        kind = "dense targets" if is_dense(labels) else "label_weights"
        padding = "" if is_dense(labels) else ", and give padding labels a weight of 0"
        raise ArgumentValueError(
            "ignore_index",
            f"expected None with {kind}, got {options.ignore_index}; mask rows with where{padding}",
        )
    check_masks_and_weights(options, shape, axes, head=head)


def check_classes(options: Options, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    """Raises unless there is at least one class."""
    if math.prod(shape[a] for a in axes) == 0:
        raise ArgumentValueError(
            "logits", f"expected at least one class along axis {options.axis}, got shape {shape}"
        )


def check_masks_and_weights(
    options: Options, shape: tuple[int, ...], axes: tuple[int, ...], *, head: bool = False
) -> None:
    """Raises unless masks and weights fit logits of this shape with these class axes."""
    rows = tuple(n for i, n in enumerate(shape) if i not in axes)
    classes, within = math.prod(shape[a] for a in axes), _within(options)
    weights, class_weights = options.weights, options.class_weights
    if options.where is not None:
        _check_where(options, shape, axes, within=within, head=head)
    if weights is not None:
        advice = ""
        if options.label_weights is not None and weights.shape == options.label_weights.shape:
            advice = "; to weight single labels, multiply label_weights by these weights"
        elif weights.shape == (classes,) and not within:
            advice = "; to weight classes, pass class_weights"
        advice += _fitting("weights", weights.shape, rows, within)
        _check_float("weights", weights, rows, each="row", advice=advice)
    if class_weights is not None:
        of_rows = class_weights.shape == rows and not within
        advice = "; to weight rows, pass weights" if of_rows else ""
        advice += _fitting("class_weights", class_weights.shape, (classes,), within)
        _check_float("class_weights", class_weights, (classes,), each="class", advice=advice)
    if options.class_mask is not None:
        _check_class_mask(options.class_mask, rows, classes, within=within, head=head)


def _check_labels(
    labels: Array,
    options: Options,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    *,
    within: str,
    head: bool,
) -> None:
    """Raises unless the labels are one class index per row, or dense targets."""
    rows = tuple(n for i, n in enumerate(shape) if i not in axes)
    dense = is_dense(labels)
    one_hot = "; cast one-hot labels to a float dtype"
    if len(axes) == 1:
        one_hot += f", or pass jnp.argmax(labels, axis={options.axis})"
    if not dense and not jnp.issubdtype(labels.dtype, jnp.integer):
        advice = one_hot if labels.shape == shape else "; cast them to one of these dtypes"
        raise ArgumentTypeError(
            "labels",
            "expected class indices of an integer dtype or dense targets of a float dtype, "
            f"got {labels.dtype}{advice}",
        )
    if labels.shape != (shape if dense else rows):
        other = [a for a in range(len(shape)) if shape[:a] + shape[a + 1 :] == labels.shape]
        if labels.shape == shape:
            one_row = "" if rows else f"; logits of shape {shape} are a single row"
            advice = one_row + one_hot
        elif labels.shape == rows:
            advice = "; cast class indices to an integer dtype"
        elif not dense and other and not head and not within:
            advice = f"; if the classes are along axis {other[-1]}, pass axis={other[-1]}"
        else:
            name = "hidden" if head else "logits"
            shift = "" if dense or within else _shift(name, labels.shape, rows)
            expected = shape if dense and labels.shape != (*rows, 1) else rows
            advice = shift or _fitting("labels", labels.shape, expected, within)
        several = labels.shape[:-1] == rows and labels.ndim == len(rows) + 1
        if several and not dense and labels.shape[-1] != 1:
            advice += f"; for several labels per row, pass label_weights of shape {labels.shape}"
        raise ArgumentValueError(
            "labels",
            f"expected shape {rows} of integers (class indices) or {shape} of floats "
            f"(dense targets), got {labels.shape} of {labels.dtype}{advice}",
        )


def _check_class_mask(
    mask: Array, rows: tuple[int, ...], classes: int, *, within: str, head: bool
) -> None:
    if mask.dtype != jnp.bool_:
        raise ArgumentTypeError(
            "class_mask", f"expected dtype bool, got {mask.dtype}; pass class_mask != 0"
        )
    if mask.shape == (classes,):
        return
    advice = _fitting("class_mask", mask.shape, (classes,), within)
    if mask.shape == rows and not within:
        advice = f"; to mask rows, pass where{advice}"
    elif mask.ndim > 1 and not within:
        to = " logits to sxe.softmax_cross_entropy, with" if head else ""
        advice = f"; to mask classes in some rows only, pass{to} where{advice}"
    raise ArgumentValueError(
        "class_mask",
        f"expected shape {(classes,)}, one value per class, got {mask.shape}{advice}",
    )


def _check_label_weights(
    labels: Array, options: Options, rows: tuple[int, ...], *, within: str
) -> None:
    label_weights = options.label_weights
    assert label_weights is not None
    if is_dense(labels):
        raise ArgumentValueError(
            "label_weights",
            f"expected None with labels of {labels.dtype} (dense targets), got shape "
            f"{label_weights.shape}; pass class indices of an integer dtype, or put the weights "
            "into the dense targets",
        )
    several = str((*rows, "M")).replace("'", "")
    if labels.ndim != len(rows) + 1 or labels.shape[:-1] != rows:
        advice = within
        if labels.shape == rows:
            advice = "; for one label per row, pass labels[..., None] and label_weights of that "
            advice += "shape; to weight rows, pass weights instead"
        elif labels.shape[1:] == rows and not within:
            advice = "; pass jnp.moveaxis(labels, 0, -1)"
        raise ArgumentValueError(
            "labels",
            f"expected shape {several} with label_weights, M labels per row along the last "
            f"axis, got {labels.shape}{advice}",
        )
    advice = _fitting("label_weights", label_weights.shape, labels.shape, within)
    if label_weights.shape == rows != labels.shape:
        advice = "; to weight rows, pass weights" + advice
    _check_float("label_weights", label_weights, labels.shape, each="label", advice=advice)


def _check_where(
    options: Options,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    *,
    within: str,
    head: bool,
) -> None:
    where = options.where
    assert where is not None
    rows = tuple(n for i, n in enumerate(shape) if i not in axes)
    if where.dtype != jnp.bool_:
        raise ArgumentTypeError("where", f"expected dtype bool, got {where.dtype}; pass where != 0")
    if where.shape == rows or (where.shape == shape and not head):
        return
    masks = f"{rows} (rows)" if head else f"{rows} (rows) or {shape} (classes)"
    advice = _fitting("where", where.shape, rows, within)
    of_classes = _broadcasts("where", where.shape, shape, axes)
    if of_classes and not within and not advice.startswith("; pass"):
        if head:
            advice += (
                "; to mask classes in all rows, pass class_mask; to mask them in some rows only, "
                "pass logits to sxe.softmax_cross_entropy"
            )
        else:
            advice = _not_broadcast(_broadcasts("where", where.shape, rows) + of_classes)
    raise ArgumentValueError(
        "where", f"expected a mask of shape {masks}, got {where.shape}{advice}"
    )


@contextlib.contextmanager
def explained_jet(
    inputs: Any, options: Options, *, of_logits: str = "sxe.softmax_cross_entropy"
) -> Iterator[None]:
    """Run a call. If ``jax.experimental.jet`` can't differentiate it, raise an error that says why.

    ``of_logits`` is the function of logits that computes the same as the function of the call.
    """
    if not any(isinstance(x, jet.JetTracer) for x in jax.tree.leaves(inputs)):
        yield
        return
    reason = (
        "in a call that jax.experimental.jet differentiates, because jet cannot differentiate "
        "functions with custom rules"
    )
    if options.rule != "autodiff":
        raise ArgumentValueError(
            "rule",
            f"expected 'autodiff' {reason}, got {options.rule!r}; all functions but "
            "sxe.softmax_cross_entropy_with_gradient take rule='autodiff'",
        )
    for name in ("softcap", "target_softcap"):
        if (cap := getattr(options, name)) is not None:
            raise ArgumentValueError(
                name, f"expected None {reason}, got {cap!r}; pass capped logits to {of_logits}"
            )
    try:
        yield
    except KeyError as error:  # from jet, for a primitive that it has no rule for
        if str(error) not in ("scan", "while") or not hasattr(inputs, "hidden"):
            raise
        raise ArgumentValueError(
            "hidden",
            "expected rows that fit into one chunk, because jax.experimental.jet cannot "
            f"differentiate a loop over chunks, got shape {inputs.hidden.shape}; "
            f"raise chunk_size to the number of rows, or pass logits to {of_logits}",
        ) from error
