"""The options that the losses share: what a caller may pass, and the errors for anything else."""

import math
import numbers
import sys
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sxe._axes import AxisName, axis_names
from sxe._layout import Layout

REDUCTIONS = ("mean", "sum", "none")


class Arrays(NamedTuple):
    """The options that are arrays, or numbers that may be traced. None: the option is off."""

    where: Array | None
    weights: Array | None
    class_weights: Array | None
    label_smoothing: Array | float | None
    z_loss: Array | float | None


class Static(NamedTuple):
    """The options that choose a program."""

    ignore_index: int | None
    axis: int | tuple[int, ...]
    reduction: str
    return_metrics: bool
    axis_name: AxisName
    batch_axis_name: AxisName
    rule: str
    layout: Layout | None  # of global arrays, over a mesh


class Projection(NamedTuple):
    """The head's options for its logits, as ``Arrays``."""

    bias: Array | None
    logit_scale: Array | float | None
    softcap: Array | float | None


def _number(name: str, value: Any, lower: float, upper: float, off: float) -> Array | float | None:
    """A number in that range, or None if it is the one that is off; or a scalar array."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if not lower <= number <= upper:
            raise ValueError(f"{name}: expected a number in [{lower}, {upper}], got {value}")
        return None if number == off else number
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name}: expected a number or a scalar float array, got {value!r}")
    if jnp.shape(value) != ():
        raise ValueError(f"{name}: expected a scalar, got shape {jnp.shape(value)}")
    return value


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def mesh_axes(name: str, value: Any) -> AxisName:
    names = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if value is None or names == ():
        return None
    if not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        raise TypeError(f"{name}: expected a mesh axis name or a tuple of them, got {value!r}")
    return names


def parse(
    *,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    class_weights: ArrayLike | None,
    label_smoothing: ArrayLike,
    z_loss: ArrayLike,
    ignore_index: int | None,
    axis: int | tuple[int, ...],
    reduction: str,
    reductions: tuple[str, ...] = REDUCTIONS,
    return_metrics: bool,
    axis_name: AxisName | Layout,
    batch_axis_name: AxisName,
    rule: str,
    rules: tuple[str, ...],
) -> tuple[Arrays, Static]:
    """The options of one call, checked as far as that needs no other argument.

    ``over_mesh`` gives a layout for ``axis_name``.
    """
    layout = None
    if isinstance(axis_name, Layout):
        layout, axis_name = axis_name, None
    if ignore_index is not None and (
        not isinstance(ignore_index, (int, np.integer)) or isinstance(ignore_index, bool)
    ):
        raise TypeError(f"ignore_index: expected an int or None, got {ignore_index!r}")

    def array(x: ArrayLike | None) -> Array | None:
        return None if x is None else jnp.asarray(x)

    arrays = Arrays(
        where=array(where),
        weights=array(weights),
        class_weights=array(class_weights),
        label_smoothing=_number("label_smoothing", label_smoothing, 0, 1, off=0),
        z_loss=_number("z_loss", z_loss, 0, math.inf, off=0),
    )
    static = Static(
        ignore_index=None if ignore_index is None else int(ignore_index),
        axis=tuple(axis) if isinstance(axis, list) else axis,
        reduction=one_of("reduction", reduction, reductions),
        return_metrics=bool(return_metrics),
        axis_name=mesh_axes("axis_name", axis_name),
        batch_axis_name=mesh_axes("batch_axis_name", batch_axis_name),
        rule=one_of("rule", rule, rules),
        layout=layout,
    )
    both = set(axis_names(static.axis_name)) & set(axis_names(static.batch_axis_name))
    if both:
        raise ValueError(
            f"batch_axis_name: expected mesh axes that axis_name does not name, got {sorted(both)}"
        )
    return arrays, static


def _check_float(name: str, x: Array, shape: tuple[int, ...]) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}: expected a float dtype, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {x.shape}")


def parse_projection(
    bias: ArrayLike | None, logit_scale: ArrayLike, softcap: ArrayLike | None
) -> Projection:
    """The options of the head alone, checked as far as that needs no other argument."""
    if isinstance(softcap, numbers.Real) and softcap == 0:
        raise ValueError("softcap: expected a number above 0 or None, got 0")
    return Projection(
        bias=None if bias is None else jnp.asarray(bias),
        logit_scale=_number("logit_scale", logit_scale, -sys.float_info.max, sys.float_info.max, 1),
        softcap=None if softcap is None else _number("softcap", softcap, 0, math.inf, math.inf),
    )


def parse_chunk_size(chunk_size: Any) -> int | None:
    if chunk_size is None:
        return None
    if not isinstance(chunk_size, (int, np.integer)) or isinstance(chunk_size, bool):
        raise TypeError(f"chunk_size: expected an int or None, got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    return int(chunk_size)


def check_projection(hidden: Array, kernel: Array, projection: Projection) -> None:
    """Raises unless hidden states, kernel and its options fit together."""
    check_logits("hidden", hidden)
    check_logits("kernel", kernel)
    if kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"kernel: expected shape [D, K] with D = {hidden.shape[-1]}, the last axis of hidden "
            f"{hidden.shape}, got {kernel.shape}"
        )
    if projection.bias is not None:
        _check_float("bias", projection.bias, kernel.shape[1:])


def check_dtype(name: str, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype, if it is one that the losses compute with."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        raise TypeError(
            f"{name}: expected dtype bfloat16, float16, float32 or float64, got {dtype}"
        )
    return dtype


def check_logits(name: str, x: Array) -> None:
    """Raises unless x has one of the dtypes that the losses compute with, and an axis."""
    check_dtype(name, x.dtype)
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least one axis, got a scalar")


def check_rows(
    labels: Array, arrays: Arrays, static: Static, shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    """Raises unless labels, masks and weights fit logits of that shape with those class axes."""
    rows = tuple(n for i, n in enumerate(shape) if i not in axes)
    classes = math.prod(shape[a] for a in axes)
    if classes == 0:
        raise ValueError(
            f"logits: expected at least one class along axis {static.axis}, got shape {shape}"
        )
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if labels.shape != rows:
            raise ValueError(
                f"labels: expected integer labels of shape {rows}, the logits' shape {shape} "
                f"without axis {static.axis}, got {labels.shape} (dense targets have a float dtype)"
            )
    elif jnp.issubdtype(labels.dtype, jnp.floating):
        if labels.shape != shape:
            raise ValueError(
                f"labels: expected dense targets of the logits' shape {shape}, got {labels.shape} "
                "(class indices have an integer dtype)"
            )
        if static.ignore_index is not None:
            raise ValueError(
                f"ignore_index: expected None with dense targets, got {static.ignore_index}; "
                "mask rows with where"
            )
    else:
        raise TypeError(
            "labels: expected class indices of an integer dtype or dense targets of a float dtype, "
            f"got {labels.dtype}"
        )
    where, weights, class_weights, _, _ = arrays
    if where is not None:
        if where.dtype != jnp.bool_:
            raise TypeError(f"where: expected dtype bool, got {where.dtype}")
        if where.shape not in (rows, shape):
            raise ValueError(
                f"where: expected shape {rows} (a mask of rows) or {shape} (a mask of classes), "
                f"got {where.shape}"
            )
    if weights is not None:
        _check_float("weights", weights, rows)
    if class_weights is not None:
        _check_float("class_weights", class_weights, (classes,))
