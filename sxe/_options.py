"""The options that the losses share: what a caller may pass, and the errors for anything else."""

import difflib
import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sxe._axes import AxisName, axis_names
from sxe._layout import Layout

REDUCTIONS = ("mean", "sum", "none")
HEAD_ORDER = "hidden, kernel, labels"


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


def _wrong_type(name: str, expected: str, value: Any) -> TypeError:
    advice = ""
    if isinstance(value, jax.core.Tracer):
        advice = "; close over a Python value, or name it in the static_argnames of jax.jit"
    return TypeError(f"{name}: expected {expected}, got {value!r}{advice}")


def array(name: str, x: ArrayLike, ignore_index: int | None = None) -> Array:
    try:
        return jnp.asarray(x if isinstance(x, Array) else _held(x, ignore_index))
    except (TypeError, ValueError, OverflowError) as error:  # which does not name the argument
        plain = isinstance(x, np.ndarray | list | tuple | dict | str | numbers.Number | None)
        got = reprlib.repr(x) if plain else f"an object of type {type(x).__name__}"
        raise TypeError(f"{name}: expected an array, got {got}{_unpacking(name, x)}") from error


def _held(x: Any, ignore_index: int | None) -> Any:
    """x as JAX can hold it: in this machine's byte order, and without integers that do not fit.

    With x64 off JAX would wrap a label that 32 bits do not hold, and make it another class.
    """
    leaves, nesting = jax.tree.flatten(x, is_leaf=lambda a: not isinstance(a, list | tuple))
    leaves = [_native(a) for a in leaves]
    if all(_is_integer(a) for a in leaves):
        leaves = [_fit(a, ignore_index) for a in leaves]
    return jax.tree.unflatten(nesting, leaves)


def _native(x: Any) -> Any:
    if isinstance(x, Array | int | float | complex):
        return x
    if hasattr(x, "__jax_array__"):
        return _native(x.__jax_array__())
    if hasattr(x, "__cuda_array_interface__"):  # on a GPU, from where NumPy does not take it
        return x
    x = x if isinstance(x, np.ndarray) else np.asarray(x)
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def _is_integer(x: Any) -> bool:
    if isinstance(x, Array | np.ndarray):
        return bool(jnp.issubdtype(x.dtype, jnp.integer))
    return isinstance(x, int)


def _fit(x: Any, ignore_index: int | None) -> Any:
    """x, in which another integer stands for each that JAX does not hold.

    It is the largest that JAX holds, which is no class, or if that is ignored the one below it.
    """
    number = isinstance(x, int)
    if not number and (isinstance(x, Array) or x.dtype.itemsize < 8):
        return x
    held = jnp.iinfo(jax.dtypes.canonicalize_dtype(int if number else x.dtype))
    other = held.max - (ignore_index == held.max)
    if number:
        return x if held.min <= x <= held.max else other
    return np.where((x < held.min) | (x > held.max), other, x)


def _unpacking(name: str, x: Any) -> str:
    """What to pass instead of something that holds arrays, or is one that JAX does not take."""
    if isinstance(x, np.ma.MaskedArray):
        return "; pass its .filled(0), and what its mask leaves as where"
    if isinstance(x, np.ndarray):
        return f"; JAX has no dtype {x.dtype}: cast it"
    if isinstance(x, jax.ShapeDtypeStruct):
        return "; for shapes alone call jax.eval_shape"
    if isinstance(x, jax.Ref):
        return "; read it, as by ref[...]"
    if hasattr(x, "unbox"):
        return "; unbox it, as by nn.meta.unbox(params) of Flax"
    for held in ("kernel", "embedding.T", "weight.T"):  # by layers of Flax, or Equinox and PyTorch
        if name == "kernel" and hasattr(x, held.removesuffix(".T")):
            return f"; pass its .{held}"
    if hasattr(x, "value"):
        return "; pass its .value"
    if isinstance(x, Mapping) and any(hasattr(a, "shape") for a in jax.tree.leaves(x)):
        return "; pass one of the arrays in it"
    return ""


def _optional_array(name: str, x: ArrayLike | None) -> Array | None:
    return None if x is None else array(name, x)


def _is_numpy_scalar(value: Any) -> bool:
    if not isinstance(value, np.ndarray | np.generic) or value.shape != ():
        return False
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def _number(
    name: str, value: Any, expected: str, fits: Callable[[float], bool], off: float
) -> Array | float | None:
    """A number that fits, None for the number ``off``, or a scalar array of JAX.

    The value of such an array is not looked at: it may be traced, or a device may not have computed
    it yet.
    """
    if not isinstance(value, Array) and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
    if _is_numpy_scalar(value):
        value = float(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if not fits(number):
            raise ValueError(f"{name}: expected {expected}, got {value}")
        return None if number == off else number
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        advice = _unpacking(name, value) if dtype is None else "; cast it to a float dtype"
        raise TypeError(
            f"{name}: expected {expected}, or a scalar float array, got {value!r}{advice}"
        )
    shape = jnp.shape(value)
    if shape != ():
        advice = ""
        if math.prod(shape) == 1:
            advice = f"; take {name}{'[0]' if shape == (1,) else '.reshape(())'}"
        elif name == "logit_scale":
            advice = "; for a scale for each row multiply hidden by it"
        raise ValueError(f"{name}: expected a scalar, got shape {shape}{advice}")
    return value


def integer(name: str, value: Any, expected: str = "an int") -> int:
    """The value as an int, if it is an integer of any kind: of Python, of NumPy, a scalar array."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise _wrong_type(name, expected, value)


def _integer_or_none(name: str, value: Any) -> int | None:
    return None if value is None else integer(name, value, "an int or None")


def _axis(axis: Any) -> int | tuple[int, ...]:
    expected = "an int or a tuple of ints"
    if isinstance(axis, (tuple, list)):
        return tuple(integer("axis", a, expected) for a in axis)
    return integer("axis", axis, expected)


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _wrong_type(name, "True or False", value)
    return bool(value)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        close = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.7)
        advice = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}{advice}"
        )
    return value


def mesh_axes(name: str, value: Any) -> AxisName:
    names = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if value is None or names == ():
        return None
    if not all(isinstance(n, str) for n in names):
        raise TypeError(f"{name}: expected a mesh axis name or a tuple of them, got {value!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{name}: expected mesh axes named once, got {value!r}")
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
    arrays = Arrays(
        where=_optional_array("where", where),
        weights=_optional_array("weights", weights),
        class_weights=_optional_array("class_weights", class_weights),
        label_smoothing=_number(
            "label_smoothing",
            label_smoothing,
            "a number in [0, 1] (0.0 is off)",
            lambda a: 0 <= a <= 1,
            off=0,
        ),
        z_loss=_number(
            "z_loss",
            z_loss,
            "a finite number of at least 0 (0.0 is off)",
            lambda z: 0 <= z < math.inf,
            off=0,
        ),
    )
    static = Static(
        ignore_index=_integer_or_none("ignore_index", ignore_index),
        axis=_axis(axis),
        reduction=one_of("reduction", reduction, reductions),
        return_metrics=_bool("return_metrics", return_metrics),
        axis_name=mesh_axes("axis_name", axis_name),
        batch_axis_name=mesh_axes("batch_axis_name", batch_axis_name),
        rule=one_of("rule", rule, rules),
        layout=layout,
    )
    both = set(axis_names(static.axis_name)) & set(axis_names(static.batch_axis_name))
    if both:
        raise ValueError(
            f"batch_axis_name: expected other mesh axes than axis_name, got {sorted(both)} in both"
        )
    return arrays, static


def _check_float(name: str, x: Array, shape: tuple[int, ...], each: str, advice: str = "") -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        cast = "cast it to a float dtype"
        if name == "weights":
            mask = "weights" if x.dtype == jnp.bool_ else "weights != 0"
            cast = f"for a mask of rows pass where={mask}, else {cast}"
        raise TypeError(f"{name}: expected a float dtype, got {x.dtype}; {cast}")
    if x.shape != shape:
        raise ValueError(
            f"{name}: expected shape {shape}, one for each {each}, got {x.shape}{advice}"
        )


def _broadcasts(
    name: str, shape: tuple[int, ...], expected: tuple[int, ...], along: tuple[int, ...] = ()
) -> list[str]:
    """The ways to broadcast an array of that shape that put elements along all axes ``along``."""
    ways = []
    for behind in range(len(expected) - len(shape) + 1):
        full = (1,) * (len(expected) - len(shape) - behind) + shape + (1,) * behind
        elements = {axis for axis, n in enumerate(full) if n != 1}
        fits = all(full[axis] == expected[axis] for axis in elements)
        if fits and elements >= set(along):
            index = ", ".join([":"] * len(shape) + ["None"] * behind)
            ways.append(f"jnp.broadcast_to({name}{f'[{index}]' if behind else ''}, {expected})")
        if not elements:
            break  # with one element all ways are the same
    return ways


def _not_broadcast(ways: list[str]) -> str:
    """The advice for an array that would have to be broadcast.

    It may have several ways: for rows [T, T] an array [T] may have one element for each of the
    first axis, or of the second.
    """
    return f"; it is not broadcast: pass {' or '.join(ways)}" if ways else ""


def _fitting(name: str, shape: tuple[int, ...], expected: tuple[int, ...], within: str = "") -> str:
    """The advice how to give an array of that shape the expected one.

    ``within`` is the advice inside of ``jax.shard_map``, or "".
    """
    if shape == (*expected, 1):
        return f"; take {name}[..., 0]"
    if within:
        return within
    if shape == (1, *expected):
        return f"; take {name}[0]"
    if len(shape) == 2 and shape == expected[::-1]:
        return f"; take {name}.T"
    if 1 in (len(shape), len(expected)) and math.prod(shape) == math.prod(expected):
        return f"; take {name}.reshape({expected})"
    return _not_broadcast(_broadcasts(name, shape, expected))


def _shift(name: str, labels: tuple[int, ...], rows: tuple[int, ...]) -> str:
    """The advice for a language model, where a label is the token that follows, or ""."""
    if len(labels) != len(rows) or len(rows) < 2 or labels[:-1] != rows[:-1]:
        return ""
    if labels[-1] == rows[-1] - 1:
        return f"; if these are the tokens that follow, pass {name}[..., :-1, :]"
    if labels[-1] == rows[-1] + 1:
        return "; if these are all tokens, pass those that follow, labels[..., 1:]"
    return ""


def parse_projection(
    bias: ArrayLike | None, logit_scale: ArrayLike, softcap: ArrayLike | None
) -> Projection:
    """The options of the head alone, checked as far as that needs no other argument."""
    return Projection(
        bias=_optional_array("bias", bias),
        logit_scale=_number(
            "logit_scale", logit_scale, "a finite number (1.0 is off)", math.isfinite, off=1
        ),
        softcap=None
        if softcap is None
        else _number(
            "softcap", softcap, "a number above 0 (None is off)", lambda c: c > 0, off=math.inf
        ),
    )


def parse_chunk_size(chunk_size: Any) -> int | None:
    size = _integer_or_none("chunk_size", chunk_size)
    if size is not None and size < 1:
        raise ValueError(f"chunk_size: expected at least 1, or None for the default, got {size}")
    return size


def check_projection(hidden: Array, kernel: Array, projection: Projection) -> None:
    """Raises unless hidden states, kernel and its options fit together."""
    check_logits("hidden", hidden)
    check_logits("kernel", kernel)
    size = hidden.shape[-1]
    if kernel.ndim != 2 or kernel.shape[0] != size:
        advice = ""
        if kernel.ndim == 2 and kernel.shape[1] == size:
            advice = "; of an embedding [K, D] pass its transpose, embedding.T"
        elif hidden.ndim == 2 and kernel.shape[-1:] == hidden.shape[:1]:
            advice = f"; the order of arguments is {HEAD_ORDER}"
        raise ValueError(
            f"kernel: expected shape [D, K] with D = {size}, the last axis of hidden "
            f"{hidden.shape}, got {kernel.shape}{advice}"
        )
    if kernel.shape[1] == 0:
        raise ValueError(f"kernel: expected [D, K] with at least one class, got {kernel.shape}")
    if projection.bias is not None:
        bias, expected = projection.bias, kernel.shape[1:]
        if bias.ndim == 0:
            raise ValueError(
                f"bias: expected shape {expected}, one for each class, or None, got a scalar"
            )
        _check_float("bias", bias, expected, "class", _fitting("bias", bias.shape, expected))


def check_dtype(name: str, dtype: Any, advice: str = "") -> jnp.dtype:
    """The dtype, if it is one that the losses compute with."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        raise TypeError(
            f"{name}: expected dtype bfloat16, float16, float32 or float64, got {dtype}{advice}"
        )
    return dtype


def check_logits(name: str, x: Array) -> None:
    """Raises unless x has one of the dtypes that the losses compute with, and an axis."""
    order = "logits, labels" if name == "logits" else HEAD_ORDER
    advice = "; cast it to one of these"
    if jnp.issubdtype(x.dtype, jnp.integer):
        advice = f"; the order of arguments is {order}"
    check_dtype(name, x.dtype, advice)
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least one axis, got a scalar")


def check_rows(
    labels: Array,
    arrays: Arrays,
    static: Static,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    projection: Projection | None = None,
) -> None:
    """Raises unless labels, masks and weights fit logits of that shape with those class axes.

    ``projection``: the head's, and None for a loss of logits.
    """
    rows = tuple(n for i, n in enumerate(shape) if i not in axes)
    classes = math.prod(shape[a] for a in axes)
    if classes == 0:
        raise ValueError(
            f"logits: expected at least one class along axis {static.axis}, got shape {shape}"
        )
    within = ""
    if static.axis_name or static.batch_axis_name:
        within = "; inside jax.shard_map shapes are those of one device: see its in_specs"

    sparse = jnp.issubdtype(labels.dtype, jnp.integer)
    one_hot = "; cast one-hot labels to a float dtype"
    if len(axes) == 1:
        one_hot += f", or pass jnp.argmax(labels, axis={static.axis})"
    if not sparse and not jnp.issubdtype(labels.dtype, jnp.floating):
        advice = one_hot if labels.shape == shape else "; cast them to one of these"
        raise TypeError(
            "labels: expected class indices of an integer dtype or dense targets of a float dtype, "
            f"got {labels.dtype}{advice}"
        )
    if labels.shape != (rows if sparse else shape):
        head = projection is not None
        other = [a for a in range(len(shape)) if shape[:a] + shape[a + 1 :] == labels.shape]
        if labels.shape == shape:
            one_row = "" if rows else f"; logits of shape {shape} are of one row"
            advice = one_row + one_hot
        elif labels.shape == rows:
            advice = "; cast class indices to an integer dtype"
        elif sparse and other and not head and not within:
            advice = f"; if the classes are along axis {other[-1]}, pass axis={other[-1]}"
        else:
            name = "hidden" if head else "logits"
            shift = _shift(name, labels.shape, rows) if sparse and not within else ""
            expected = rows if sparse or labels.shape == (*rows, 1) else shape
            advice = shift or _fitting("labels", labels.shape, expected, within)
        raise ValueError(
            f"labels: expected shape {rows} of integers (class indices) or {shape} of floats "
            f"(dense targets), got {labels.shape} of {labels.dtype}{advice}"
        )
    if not sparse and static.ignore_index is not None:
        raise ValueError(
            f"ignore_index: expected None with dense targets, got {static.ignore_index}; "
            "mask rows with where"
        )
    where, weights, class_weights, _, _ = arrays
    if where is not None:
        _check_where(where, shape, axes, within=within, projection=projection)
    if weights is not None:
        of_classes = weights.shape == (classes,) and not within
        advice = "; for a weight for each class pass class_weights" if of_classes else ""
        advice += _fitting("weights", weights.shape, rows, within)
        _check_float("weights", weights, rows, "row", advice)
    if class_weights is not None:
        of_rows = class_weights.shape == rows and not within
        advice = "; for a weight for each row pass weights" if of_rows else ""
        advice += _fitting("class_weights", class_weights.shape, (classes,), within)
        _check_float("class_weights", class_weights, (classes,), "class", advice)


def _check_where(
    where: Array,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    *,
    within: str,
    projection: Projection | None,
) -> None:
    rows = tuple(n for i, n in enumerate(shape) if i not in axes)
    if where.dtype != jnp.bool_:
        raise TypeError(f"where: expected dtype bool, got {where.dtype}; pass where != 0")
    head = projection is not None
    if where.shape == rows or (where.shape == shape and not head):
        return
    masks = f"{rows} (rows)" if head else f"{rows} (rows) or {shape} (classes)"
    advice = _fitting("where", where.shape, rows, within)
    of_classes = _broadcasts("where", where.shape, shape, axes)
    if of_classes and not within and not advice.startswith("; take"):
        if projection is None:
            advice = _not_broadcast(_broadcasts("where", where.shape, rows) + of_classes)
        elif projection.softcap is None:
            advice += (
                "; to leave classes out of all rows give them a bias of -inf, to leave them out "
                "of some rows pass logits to sxe.softmax_cross_entropy"
            )
        else:
            advice += (
                "; the head cannot mask classes under a softcap, which bounds a bias of -inf too: "
                "leave them out of kernel and bias, or pass logits to sxe.softmax_cross_entropy"
            )
    raise ValueError(f"where: expected a mask of shape {masks}, got {where.shape}{advice}")
