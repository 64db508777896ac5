"""The softmax normalizer of a row as a state (m, r), and how states merge.

For logits x_1 .. x_K of one row

    m   = max_k x_k                     e_k = exp(x_k - m)
    r   = sum_k e_k with one maximal element left out, so that 1 + r = sum_k e_k
    lse = m + log1p(r)                  q_k = e_k / (1 + r)

The 1 of the maximum is never added to the rest, so that it absorbs nothing: the loss and the
gradient of a confident row, where r is 1e-20, keep their digits. States form a monoid under
``merge``. So one state serves a whole row, a tile of its classes, and a shard of them on a mesh.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from sxe._arrays import AxisName, pmax, psum, wide
from sxe._backend import Backend


class Normalizer(NamedTuple):
    """The state (m, r) of rows of logits, each of shape [...]. The identity is (-inf, -1)."""

    m: Array
    r: Array

    @property
    def log1p_r(self) -> Array:
        """lse - m, shape [...]."""
        return jnp.log1p(self.r)

    @property
    def lse(self) -> Array:
        """log sum_k exp(x_k), shape [...]."""
        return self.m + self.log1p_r

    @property
    def max_probability(self) -> Array:
        """The largest q_k, [...], and NaN where ``has_loss`` is False."""
        # m - m is 0, and NaN where m is infinite.
        return 1 / (1 + self.r) + (self.m - self.m)

    @property
    def has_loss(self) -> Array:
        """Whether the largest logit is finite and none is NaN, bool [...]."""
        return jnp.isfinite(self.m) & ~jnp.isnan(self.r)


# Exponentials below the smallest normal number would each be 0, but add up where they are scaled.
SCALE = 2.0**64


def exp_difference(x: Array, m: Array, scale: float = 1) -> Array:
    """scale exp(x - m) for x <= m, of the exact difference.

    A difference of 80 that is rounded to float32 would make a relative error of 4e-6.
    """
    # Halves are taken because x - m may overflow.
    a, b = jnp.maximum(x, jnp.finfo(x.dtype).min) / 2, m / 2
    e = jnp.exp(a - b)
    return (scale * e) * e * (1 + 2 * lost_in_difference(a, b))


def lost_in_difference(a: Array, b: Array) -> Array:
    """What rounding takes from a - b, without derivative: the two together are exact."""
    s = a - b
    back = s - a
    return lax.stop_gradient((a - (s - back)) - (b + back))  # Knuth's two-sum


def finite_shift(m: Array) -> Array:
    """m, and 0 for a row whose logits are all -inf: x - m would be NaN there."""
    return jnp.where(m == -jnp.inf, 0, m)


def has_loss(x: Array, axis_name: AxisName, backend: Backend) -> Array:
    """``Normalizer.has_loss`` of rows of logits, [..., K] to [...], before their state is known."""
    x = wide(lax.stop_gradient(x))
    m = jnp.max(x, axis=-1)
    if backend.loses_nan_in_maximum:
        # Scaled, so that no sum of numbers overflows.
        m = jnp.where(jnp.isnan(jnp.sum(x * 2.0**-24, axis=-1)), jnp.inf, m)
    return jnp.isfinite(pmax(m, axis_name))


def normalize_tile(x: Array, backend: Backend, *, scale: float = SCALE) -> Normalizer:
    """The state of a tile of logits, [..., K] to [...]. The plain twin.

    With a scale of 1, JAX may differentiate it as it stands. m is a constant then, because no
    result depends on the choice of the shift, and r carries all of the derivative of lse: every
    class has the derivative e_k, a maximal one too.
    """
    x = wide(x)
    m = lax.stop_gradient(jnp.max(x, axis=-1))
    shift = finite_shift(m)[..., None]
    e = exp_difference(x, shift, scale)
    # Of each class near the maximum, 1 is counted, and what e_k differs from 1 is summed. For a
    # maximal one that is 0. It would not do to look for x = m: XLA may compute the logits again for
    # the sums, from what the caller made them of, and round them in another way.
    near = x >= shift - 0.25
    rest = jnp.sum(e - jnp.where(near, scale, jnp.zeros_like(e)), axis=-1) / scale
    # Where the maximum is the smallest number, all other logits are -inf. exp_difference took them
    # for that number, so that the rest is set to 0 here. Its derivative stays as it is.
    rest = jnp.where(m <= jnp.finfo(x.dtype).min, rest - lax.stop_gradient(rest), rest)
    # An accelerator takes both sums in one read of x: they share x, and no exponential.
    count = jnp.sum(near, axis=-1, dtype=rest.dtype)
    return Normalizer(m, rest + (count - 1))


def _rest(state: Normalizer, m: Array) -> tuple[Array, Array]:
    """What the classes of a state add to the r of a merged state with the maximum m.

    The second number is 1 where m is the maximum of these classes too, and else 0. Where it is 1,
    one maximal element of theirs is left out already.
    """
    top = state.m == m
    rest = jnp.where(top, state.r, (1 + state.r) * exp_difference(state.m, finite_shift(m)))
    return rest, top.astype(rest.dtype)


def merge(a: Normalizer, b: Normalizer) -> Normalizer:
    """The state of all classes, from the states of two parts of them."""
    m = jnp.maximum(a.m, b.m)
    (rest_a, top_a), (rest_b, top_b) = _rest(a, m), _rest(b, m)
    return Normalizer(m, rest_a + rest_b + (top_a + top_b - 1))


def merge_parts(parts: Normalizer) -> Normalizer:
    """The state of all classes, from the states of parts of them along a first axis."""
    m = jnp.max(parts.m, axis=0, keepdims=True)
    rest, tops = (jnp.sum(a, axis=0) for a in _rest(parts, m))
    return Normalizer(m[0], rest + (tops - 1))


def merge_over(state: Normalizer, axis_name: AxisName) -> Normalizer:
    """``merge`` of the states of all shards: one max and one sum over a mesh."""
    if axis_name is None:
        return state
    m = pmax(lax.stop_gradient(state.m), axis_name)  # pmax has no derivative, and m needs none
    rest, tops = psum(_rest(state, m), axis_name)
    return Normalizer(m, rest + (tops - 1))
