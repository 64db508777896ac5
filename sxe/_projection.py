"""The product of hidden states and kernel, its gradients, and the logits that the head makes of it.

u = hidden @ kernel      z = logit_scale u + bias      x = softcap tanh(z / softcap)
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from sxe import _normalizer as nz
from sxe._axes import AxisName, place, vary, varying
from sxe._tiles import classes_per_block, over_classes


def product_dtype(dtype: DTypeLike, platform: str) -> Any:
    """The dtype in which hidden states and kernel are multiplied, exactly, for the logits.

    It is their own, except on a CPU, for which XLA widens float16.
    """
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 and platform == "cpu" else dtype)


def gradient_dtype(dtype: DTypeLike, platform: str) -> Any:
    """The dtype in which the gradient of u is multiplied with hidden states and kernel.

    An accelerator multiplies bfloat16 with bfloat16 only, so that the gradient is rounded to it. A
    CPU gains little by that, and float16 would lose every probability below 6e-8.
    """
    if dtype == jnp.bfloat16 and platform != "cpu":
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def product_precision(dtype: DTypeLike) -> Any:
    """The precision of all products, for inputs of that dtype: the caller's, or one that keeps it.

    JAX's default multiplies float32 in TF32 on a GPU, with 10 of its 23 bits, and in bfloat16 on a
    TPU. Neither rounds bfloat16. TF32 and the three bfloat16s that HIGH stands for hold float16.
    """
    chosen = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
    if chosen is not None:
        return chosen
    return {
        jnp.dtype(jnp.float32): lax.Precision.HIGHEST,
        jnp.dtype(jnp.float16): lax.Precision.HIGH,
    }.get(jnp.dtype(dtype), lax.Precision.DEFAULT)


def _product(a: Array, b: Array, over: tuple[int, int], precision: Any) -> Array:
    """The matrix product over one axis of each, accumulated in float32, or float64."""
    dimensions = (((over[0],), (over[1],)), ((), ()))
    wide = jnp.float64 if a.dtype == jnp.float64 else jnp.float32
    return lax.dot_general(a, b, dimensions, precision, wide)


def zeros_as(x: Array, shape: tuple[int, ...]) -> Array:
    """Zeros of that shape, float32 or float64 and typed as varying as x, to start a loop with."""
    zeros = jnp.zeros(shape, nz.wide(x).dtype)
    if jax.sharding.get_abstract_mesh().explicit_axes:
        # Under jit the type of new zeros has no mesh, and then jax.vmap can't carry them in a loop.
        zeros = jax.reshard(zeros, PartitionSpec(*(None for _ in shape)))
    return vary(zeros, varying(x))


def product_fwd(hidden: Array, kernel: Array, precision: Any) -> Array:
    """u [C, K]."""
    (rows, hidden_size), classes = hidden.shape, kernel.shape[1]
    at = place(hidden, kernel)
    dtype = product_dtype(hidden.dtype, at.platform)
    if dtype == hidden.dtype:
        return _product(hidden, kernel, (1, 0), precision)
    hidden = hidden.astype(dtype)

    def block(u: Array, take: Callable[..., Any], put: Callable[..., Any]) -> Array:
        return put(u, _product(hidden, take(kernel).astype(dtype), (1, 0), precision))

    size = classes_per_block(hidden_size, classes, at)
    return over_classes(block, zeros_as(hidden, (rows, classes)), classes, size)


def product_bwd(
    d_u: Array,
    hidden: Array,
    kernel: Array,
    d_kernel: Array | None,
    want_hidden: bool,
    precision: Any,
) -> tuple[Array | None, Array | None]:
    """d hidden if wanted, and d_kernel with that of a chunk added unless it is None."""
    classes, at = kernel.shape[1], place(hidden, kernel)
    dtype = gradient_dtype(hidden.dtype, at.platform)
    wide_hidden = hidden.astype(dtype)

    def block(d: Any, take: Callable[..., Any], put: Callable[..., Any]) -> Any:
        d_hidden, d_kernel = d
        d_part = take(d_u).astype(dtype)
        if d_hidden is not None:
            part = take(kernel).astype(dtype)
            d_hidden = d_hidden + _product(d_part, part, (1, 1), precision)
        if d_kernel is not None:
            part = take(d_kernel) + _product(wide_hidden, d_part, (0, 0), precision)
            d_kernel = put(d_kernel, part)
        return d_hidden, d_kernel

    size = classes_per_block(hidden.shape[1], classes, at)
    if d_kernel is None and dtype == hidden.dtype:
        size = classes
    d_hidden = zeros_as(d_u, hidden.shape) if want_hidden else None
    return over_classes(block, (d_hidden, d_kernel), classes, size)


def transform(
    u: Array, bias: Array | None, logit_scale: Array | None, softcap: Array | None
) -> Array:
    """The logits, from the product of hidden states and kernel."""
    z = u if logit_scale is None else logit_scale * u
    z = z if bias is None else z + bias[None, :]
    return z if softcap is None else capped(z, softcap)


@jax.custom_jvp
def capped(z: Array, c: Array) -> Array:
    """c tanh(z / c) for a scalar c, and z for c = inf.

    It is z as well where the two differ by less than rounding, so that z / c may underflow.
    """
    y = _share_of_cap(z, c)
    near = jnp.abs(y) < (jnp.finfo(z.dtype).eps / 2) ** 0.5  # 1 - tanh(y) / y is about y^2 / 3
    return jnp.where(near, z, jnp.where(jnp.isinf(c), 1, c) * jnp.tanh(y))


def _share_of_cap(z: Array, c: Array) -> Array:
    """z / c, and 0 where c is infinite, whatever z is."""
    off = jnp.isinf(c)
    # XLA multiplies by the reciprocal of a scalar, which for the largest ones is rounded to 0. So
    # both are made smaller, with a clip of no effect that keeps XLA from merging the factors.
    smaller = jnp.where(c > 1, 1 / 16, jnp.ones_like(c))
    most = jnp.finfo(z.dtype).max
    part = jnp.clip(z * smaller, -most, most)
    return jnp.where(off, 0, part / jnp.where(off, 1, c * smaller))


def _capped_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (z, c), (z_dot, c_dot) = primals, tangents
    y = _share_of_cap(z, c)
    s = jnp.exp(-2 * jnp.abs(y))
    slope = 4 * s / (1 + s) ** 2  # 1 - tanh(y)^2, without its cancellation
    x_dot = jnp.zeros_like(z)
    if not isinstance(z_dot, SymbolicZero):
        x_dot = x_dot + slope * z_dot
    if not isinstance(c_dot, SymbolicZero):
        x_dot = x_dot + _derivative_by_cap(y, slope) * c_dot
    return capped(z, c), x_dot


capped.defjvp(_capped_jvp, symbolic_zeros=True)


def _derivative_by_cap(y: Array, slope: Array) -> Array:
    """tanh(y) - y slope, which is slope (sinh(2 y) / 2 - y): from the series where it cancels."""
    small = jnp.abs(y) < 0.5
    near = jnp.where(small, y, 0)
    coefficients = [4.0**n / math.factorial(2 * n + 1) for n in range(9, 0, -1)]
    series = jnp.polyval(jnp.array(coefficients, y.dtype), near**2) * near**2 * near
    # From 1000 on, slope is 0 and y may be infinite.
    return jnp.where(small, slope * series, jnp.tanh(y) - jnp.clip(y, -1000, 1000) * slope)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def gather_rows(
    kernel: Array, axis_name: AxisName, names: frozenset[str], dtype: DTypeLike
) -> Array:
    """The rows of the kernel from all devices along these mesh axes, in a wider dtype.

    It varies along the mesh axes named besides. The transpose sums over them in that dtype, the
    scattered rows last, and rounds once.
    """
    return lax.all_gather(vary(kernel, names), axis_name, axis=0, tiled=True).astype(dtype)


@gather_rows.defjvp
def _gather_rows_jvp(
    axis_name: AxisName,
    names: frozenset[str],
    dtype: DTypeLike,
    primals: tuple[Array],
    tangents: tuple[Array],
) -> tuple[Array, Array]:
    (kernel,), (kernel_dot,) = primals, tangents
    wide_dot = vary(kernel_dot.astype(dtype), names)
    wide_dot = lax.all_gather(wide_dot, axis_name, axis=0, tiled=True)
    return gather_rows(kernel, axis_name, names, dtype), wide_dot
