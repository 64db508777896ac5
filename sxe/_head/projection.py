"""From hidden states and a kernel to logits, and back from the gradient of the logits.

For a chunk of C rows, hidden is [C, D], kernel is [D, K], and u, z and the logits x are [C, K]:

H0  u = hidden @ kernel
H1  z = logit_scale u + bias
H2  x = softcap tanh(z / softcap)           or z, without softcap; -inf for a masked class

H3  d z = (1 - tanh(z / softcap)^2) d x
H4  d u = logit_scale d z       d logit_scale = sum u d z       d bias = sum_rows d z
    where d logit_scale sums over rows and classes, or over classes if each row has its own scale
H5  d softcap = sum (tanh(y) - y (1 - tanh(y)^2)) d x           with y = z / softcap
H6  d hidden = d u kernel^T
H7  d kernel = hidden^T d u
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from sxe._arrays import AxisName, vary, wide, wide_dtype, zeros_like
from sxe._backend import Backend, rounded
from sxe._head.loops import Columns, over_class_blocks

Gradients = tuple[Array | None, Array | None]  # of hidden states and kernel


class Transform(NamedTuple):
    """The parameters of H1 and H2, which turn u into logits. None means that a part is off.

    Attributes:
      bias: [K].
      logit_scale: a scalar, or [C] with one number per row of a chunk.
      softcap: a scalar.
      class_mask: bool [K], the classes that can occur. The logits of the other classes are -inf,
        whatever their u and bias are.
    """

    bias: Array | None
    logit_scale: Array | None
    softcap: Array | None
    class_mask: Array | None = None


def transform(u: Array, by: Transform) -> Array:
    """Apply H1 and H2: from u [C, K] to the logits [C, K]."""
    u, by = _of_possible(u, by)
    z = _scaled(u, by)
    x = z if by.softcap is None else capped(z, by.softcap)
    return x if by.class_mask is None else jnp.where(by.class_mask[None, :], x, -jnp.inf)


def transform_bwd(d_x: Array, u: Array, by: Transform) -> tuple[Array, Transform]:
    """Apply H3 to H5: compute d u, and the gradients of the parameters."""
    d_bias = d_scale = d_softcap = None
    u, by = _of_possible(u, by)
    d_z = d_x = d_x if by.class_mask is None else jnp.where(by.class_mask[None, :], d_x, 0)
    if by.softcap is not None:
        y = _ratio(_scaled(u, by), by.softcap)
        d_z = _slope(y) * d_x  # H3
        d_softcap = jnp.sum(_derivative_by_cap(y) * d_x)  # H5
    if by.bias is not None:
        d_bias = jnp.sum(d_z, axis=0)  # H4
    d_u = d_z
    if by.logit_scale is not None:
        d_scale = jnp.sum(u * d_z, axis=1 if by.logit_scale.ndim else None)
        d_u = _for_rows(by.logit_scale) * d_z
    return d_u, Transform(d_bias, d_scale, d_softcap)


def _of_possible(u: Array, by: Transform) -> tuple[Array, Transform]:
    """u and bias with 0 for masked classes, because a gradient of 0 times a NaN would be NaN."""
    if by.class_mask is None:
        return u, by
    bias = None if by.bias is None else jnp.where(by.class_mask, by.bias, 0)
    return jnp.where(by.class_mask[None, :], u, 0), by._replace(bias=bias)


def _scaled(u: Array, by: Transform) -> Array:
    """H1."""
    z = u if by.logit_scale is None else rounded(_for_rows(by.logit_scale) * u)
    return z if by.bias is None else z + by.bias[None, :]


def _for_rows(scale: Array) -> Array:
    """The scale in a shape that broadcasts to [C, K]."""
    return scale[:, None] if scale.ndim else scale


@jax.custom_jvp
def capped(z: Array, c: Array) -> Array:
    """c tanh(z / c) for a scalar c, and z for c = inf.

    The result is also z where c tanh(z / c) differs from z by less than a rounding error. There,
    z / c may underflow.
    """
    y = _ratio(z, c)
    near = jnp.abs(y) < (jnp.finfo(z.dtype).eps / 2) ** 0.5  # 1 - tanh(y) / y is about y^2 / 3
    return jnp.where(near, z, jnp.where(jnp.isinf(c), 1, c) * jnp.tanh(y))


def _ratio(z: Array, c: Array) -> Array:
    """z / c, or 0 if c is infinite, whatever z is."""
    off = jnp.isinf(c)
    # XLA replaces z / c with z (1 / c), and rounds 1 / c to 0 for the largest c. So scale both z
    # and c down. The clip changes no value. It prevents XLA from merging the two factors.
    smaller = jnp.where(c > 1, 1 / 16, jnp.ones_like(c))
    most = jnp.finfo(z.dtype).max
    part = jnp.clip(z * smaller, -most, most)
    return jnp.where(off, 0, part / jnp.where(off, 1, c * smaller))


def _slope(y: Array) -> Array:
    """1 - tanh(y)^2, computed without cancellation."""
    s = jnp.exp(-2 * jnp.abs(y))
    return 4 * s / (1 + s) ** 2


def _derivative_by_cap(y: Array) -> Array:
    """tanh(y) - y slope. Where this cancels: slope (sinh(2 y) / 2 - y), by its power series."""
    slope = _slope(y)
    small = jnp.abs(y) < 0.5
    near = jnp.where(small, y, 0)
    coefficients = [4.0**n / math.factorial(2 * n + 1) for n in range(9, 0, -1)]
    series = jnp.polyval(jnp.array(coefficients, y.dtype), near**2) * near**2 * near
    # For |y| of 1000 and more, slope is 0. y may be infinite there.
    return jnp.where(small, slope * series, jnp.tanh(y) - jnp.clip(y, -1000, 1000) * slope)


def _capped_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (z, c), (z_dot, c_dot) = primals, tangents
    y = _ratio(z, c)
    x_dot = jnp.zeros_like(z)
    if not isinstance(z_dot, SymbolicZero):
        x_dot = x_dot + _slope(y) * z_dot  # H3
    if not isinstance(c_dot, SymbolicZero):
        x_dot = x_dot + _derivative_by_cap(y) * c_dot  # H5
    return capped(z, c), x_dot


capped.defjvp(_capped_jvp, symbolic_zeros=True)


@dataclasses.dataclass(frozen=True)
class Products:
    """How the three matrix products of a chunk are computed: H0, H6 and H7.

    Attributes:
      dtype: the dtype of hidden states and kernel.
      precision: the precision of the products.
      backend: where the products run.
    """

    dtype: jnp.dtype
    precision: Any
    backend: Backend

    @property
    def gradient_dtype(self) -> jnp.dtype:
        """The dtype in which the gradient of the logits is multiplied with hidden and kernel."""
        return self.backend.gradient_dtype(self.dtype)

    def u(self, hidden: Array, kernel: Array | None, class_mask: Array | None = None) -> Array:
        """H0, [C, K]. Without a kernel, ``hidden`` is u already."""
        if kernel is None:
            return wide(hidden)
        if class_mask is not None:
            return _u_of_possible(self, hidden, kernel, class_mask)
        dtype = self.backend.product_dtype(self.dtype)
        if dtype == self.dtype:
            return self._product(hidden, kernel, (1, 0))
        hidden = hidden.astype(dtype)

        def block(u: Array, at: Columns) -> Array:
            return at.put(u, self._product(hidden, at.take(kernel).astype(dtype), (1, 0)))

        u = zeros_like(hidden, (len(hidden), kernel.shape[1]))
        return over_class_blocks(block, u, kernel, self.backend)

    def backward(
        self,
        d_u: Array,
        hidden: Array,
        kernel: Array | None,
        class_mask: Array | None = None,
        *,
        d_kernel: Array | None,
        want_hidden: bool,
    ) -> Gradients:
        """d hidden [C, D] by H6, if requested, and d_kernel [D, K] with H7 added in place.

        A gradient that is not requested is None.
        """
        if kernel is None:
            return d_u if want_hidden else None, None
        dtype = self.gradient_dtype
        hidden, d_u = hidden.astype(dtype), d_u.astype(dtype)
        whole = None
        if want_hidden and dtype == self.dtype and class_mask is None:
            whole, want_hidden = self._product(d_u, kernel, (1, 1)), False
        if d_kernel is None and not want_hidden:
            return whole, None

        # One loop computes both gradients, so that each block of d_u is sliced once.
        def block(gradients: Gradients, at: Columns) -> Gradients:
            d_hidden, d_kernel = gradients
            part = at.take(d_u)
            if d_hidden is not None:
                of_kernel = at.take(kernel)
                if class_mask is not None:
                    of_kernel = keep_classes(at.take(class_mask[None, :])[0], of_kernel)
                d_hidden += self._product(part, of_kernel.astype(dtype), (1, 1))
            if d_kernel is not None:
                d_kernel = at.put(d_kernel, at.take(d_kernel) + self._product(hidden, part, (0, 0)))
            return d_hidden, d_kernel

        zeros = zeros_like(d_u, hidden.shape) if want_hidden else None
        d_hidden, d_kernel = over_class_blocks(block, (zeros, d_kernel), kernel, self.backend)
        return whole if d_hidden is None else d_hidden, d_kernel

    def _product(self, a: Array, b: Array, over: tuple[int, int]) -> Array:
        """The matrix product over one axis of each array, accumulated in float32 or float64."""
        dimensions = (((over[0],), (over[1],)), ((), ()))
        return lax.dot_general(a, b, dimensions, self.precision, wide_dtype(a.dtype))


def keep_classes(class_mask: Array | None, kernel: Array) -> Array:
    """The kernel [D, K] with 0 for masked classes, where a NaN times a d u of 0 would be NaN."""
    return kernel if class_mask is None else jnp.where(class_mask[None, :], kernel, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _u_of_possible(products: Products, hidden: Array, kernel: Array, class_mask: Array) -> Array:
    """H0, where u of masked classes is arbitrary. The derivatives treat the kernel as 0 there."""
    return products.u(hidden, kernel)


@_u_of_possible.defjvp
def _u_of_possible_jvp(
    products: Products, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Any]
) -> tuple[Array, Array]:
    (hidden, kernel, class_mask), (hidden_dot, kernel_dot, _) = primals, tangents
    by_hidden = products.u(hidden_dot, keep_classes(class_mask, kernel))
    by_kernel = products.u(hidden, keep_classes(class_mask, kernel_dot))
    return _u_of_possible(products, hidden, kernel, class_mask), by_hidden + by_kernel


def product_precision(dtype: DTypeLike) -> Any:
    """The precision of all matrix products, for inputs of this dtype.

    It is the precision that the caller has chosen, or else one that does not round the inputs.
    JAX's default rounds float32: to TF32 on a GPU, which has 10 of its 23 mantissa bits, and to
    bfloat16 on a TPU. It does not round bfloat16. HIGH represents float16 exactly, in TF32 or in
    three bfloat16 products.
    """
    chosen = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
    if chosen is not None:
        return chosen
    return {
        jnp.dtype(jnp.float32): lax.Precision.HIGHEST,
        jnp.dtype(jnp.float16): lax.Precision.HIGH,
    }.get(jnp.dtype(dtype), lax.Precision.DEFAULT)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def gather_rows(
    kernel: Array, axis_name: AxisName, names: frozenset[str], dtype: DTypeLike
) -> Array:
    """Gather the rows of the kernel over these mesh axes, in a wider dtype.

    The result also varies over the mesh axes in ``names``. The transpose sums gradients in the
    wider dtype, first over the axes along which it scatters the rows, then over the other axes. It
    rounds only the sum.
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
