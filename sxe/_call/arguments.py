"""Parse one argument of a call: return its value, or raise an error.

Each function takes the name of the argument, for its errors, and the value that was passed.
"""

import difflib
import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sxe._arrays import AxisName
from sxe._errors import ArgumentError, ArgumentTypeError, ArgumentValueError


def _wrong_type(name: str, expected: str, value: Any) -> TypeError:
    advice = ""
    if isinstance(value, jax.core.Tracer):
        advice = f"; it is static: pass a Python value, or name {name} in jax.jit's static_argnames"
    return ArgumentTypeError(name, f"expected {expected}, got {value!r}{advice}")


def array(name: str, x: ArrayLike, ignore_index: int | None = None) -> Array:
    try:
        return jnp.asarray(x if isinstance(x, Array) else _held(x, ignore_index))
    except ArgumentError:
        raise
    except (TypeError, ValueError, OverflowError) as error:  # JAX does not name the argument
        plain = isinstance(x, np.ndarray | list | tuple | dict | str | numbers.Number | None)
        got = reprlib.repr(x) if plain else f"an object of type {type(x).__name__}"
        raise ArgumentTypeError(
            name, f"expected an array, got {got}{_unpacking(name, x)}"
        ) from error


def _held(x: Any, ignore_index: int | None) -> Any:
    """Convert x to this machine's byte order, and replace integers that JAX cannot hold.

    With x64 off, JAX would wrap a label that does not fit into 32 bits. The wrapped label could be
    the index of another class.
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
    if hasattr(x, "__cuda_array_interface__"):  # an array on a GPU, which NumPy cannot read
        return x
    x = x if isinstance(x, np.ndarray) else np.asarray(x)
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def _is_integer(x: Any) -> bool:
    if isinstance(x, Array | np.ndarray):
        return bool(jnp.issubdtype(x.dtype, jnp.integer))
    return isinstance(x, int)


def _fit(x: Any, ignore_index: int | None) -> Any:
    """Replace the integers in x that JAX cannot hold.

    The replacement is the largest integer that JAX can hold, or the one below it if the largest is
    ``ignore_index``. Neither is a class index. Raises an error if x could contain an
    ``ignore_index`` that JAX cannot hold, because no replacement would match it.
    """
    number = isinstance(x, int)
    if not number and (isinstance(x, Array) or x.dtype.itemsize < 8):
        return x
    held = jnp.iinfo(jax.dtypes.canonicalize_dtype(int if number else x.dtype))
    if ignore_index is not None and not held.min <= ignore_index <= held.max:
        may_contain = number or np.iinfo(x.dtype).min <= ignore_index <= np.iinfo(x.dtype).max
        if may_contain:
            raise ArgumentValueError(
                "ignore_index",
                f"expected an int from {held.min} to {held.max}, because JAX holds integers of "
                f"{held.bits} bits, got {ignore_index}; set jax_enable_x64 for 64 bits",
            )
    other = held.max - (ignore_index == held.max)
    if number:
        return x if held.min <= x <= held.max else other
    return np.where((x < held.min) | (x > held.max), other, x)


def _unpacking(name: str, x: Any) -> str:
    """Advice for an object that contains arrays, or that JAX does not accept as an array."""
    if isinstance(x, np.ma.MaskedArray):
        return f"; pass {name}.filled(0), and the rows that are not masked as where"
    if isinstance(x, np.ndarray):
        return f"; JAX does not support dtype {x.dtype}: cast it"
    if isinstance(x, jax.ShapeDtypeStruct):
        return "; to compute shapes only, call jax.eval_shape"
    if isinstance(x, jax.Ref):
        return "; read it with ref[...]"
    if hasattr(x, "unbox"):
        return "; unbox it with nn.meta.unbox(params) of Flax"
    for held in ("kernel", "embedding.T", "weight.T"):  # of layers in Flax, or Equinox and PyTorch
        if name == "kernel" and hasattr(x, held.removesuffix(".T")):
            return f"; pass its .{held}"
    if hasattr(x, "value"):
        return "; pass its .value"
    if isinstance(x, Mapping) and any(hasattr(a, "shape") for a in jax.tree.leaves(x)):
        return "; pass one of the arrays that it contains"
    return ""


def _is_numpy_scalar(value: Any) -> bool:
    if not isinstance(value, np.ndarray | np.generic) or value.shape != ():
        return False
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def number(
    name: str, value: Any, expected: str, *, fits: Callable[[float], bool], off: float
) -> Array | float | None:
    """The number as a float, None for the number ``off``, or a scalar array of JAX as it is.

    The value of an array is not checked, because it may be traced or not be computed yet.
    """
    if not isinstance(value, Array) and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
    if _is_numpy_scalar(value):
        value = float(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            given = float(value)
        except OverflowError:  # from an int of more than 1024 bits
            given = math.nan
        if not fits(given):
            raise ArgumentValueError(name, f"expected {expected}, got {value}")
        return None if given == off else given
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        advice = _unpacking(name, value) if dtype is None else "; cast it to a float dtype"
        raise ArgumentTypeError(
            name, f"expected {expected}, or a scalar float array, got {value!r}{advice}"
        )
    shape = jnp.shape(value)
    if shape != ():
        raise ArgumentValueError(
            name, f"expected a scalar, got shape {shape}{as_scalar(name, shape)}"
        )
    return value


def as_scalar(name: str, shape: tuple[int, ...]) -> str:
    """Advice on how to make an array of this shape a scalar, or "" if it has several elements."""
    if math.prod(shape) != 1:
        return ""
    return f"; pass {name}{'[0]' if shape == (1,) else '.reshape(())'}"


def integer(name: str, value: Any, expected: str = "an int") -> int:
    """The value as an int. It may be a Python or NumPy integer or a scalar integer array."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise _wrong_type(name, expected, value)


def integer_or_none(name: str, value: Any) -> int | None:
    return None if value is None else integer(name, value, "an int or None")


def axis(name: str, value: Any) -> int | tuple[int, ...]:
    expected = "an int or a tuple of ints"
    if isinstance(value, (tuple, list)):
        return tuple(integer(name, a, expected) for a in value)
    return integer(name, value, expected)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _wrong_type(name, "True or False", value)
    return bool(value)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        close = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.7)
        advice = f"; did you mean {close[0]!r}?" if close else ""
        raise ArgumentValueError(
            name, f"expected one of {', '.join(map(repr, choices))}, got {value!r}{advice}"
        )
    return value


def mesh_axes(name: str, value: Any) -> AxisName:
    names = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if value is None or names == ():
        return None
    if not all(isinstance(n, str) for n in names):
        raise ArgumentTypeError(
            name, f"expected the name of a mesh axis or a tuple of names, got {value!r}"
        )
    if len(set(names)) != len(names):
        raise ArgumentValueError(name, f"expected each mesh axis at most once, got {value!r}")
    return names


def check_dtype(name: str, dtype: Any, advice: str = "") -> jnp.dtype:
    """The dtype, if the losses support it."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        raise ArgumentTypeError(
            name, f"expected dtype bfloat16, float16, float32 or float64, got {dtype}{advice}"
        )
    return dtype
