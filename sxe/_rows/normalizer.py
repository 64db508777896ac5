"""The softmax normalizer of a row as a state (m, r), and how to merge states.

For the logits x_1 .. x_K of one row:

    m   = max_k x_k                     e_k = exp(x_k - m)
    r   = sum_k e_k with one maximal element left out, so that 1 + r = sum_k e_k
    lse = m + log1p(r)                  q_k = e_k / (1 + r)

A state holds r instead of the sum 1 + r, because 1 + r would round a small r away. In a confident
row, the largest logit leads by far, and r may be 1e-20. The loss and gradient of such a row still
have full relative precision. States form a monoid under ``merge``, so that a state can describe a
whole row, a tile of its classes, or a shard of its classes on a mesh.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from sxe._arrays import AxisName, pmax, psum, wide
from sxe._backend import Backend


class Normalizer(NamedTuple):
    """The states (m, r) of rows of logits, each [...]. ``merge`` has the identity (-inf, -1)."""

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
    def is_confident(self) -> Array:
        """Whether the largest q_k exceeds 4/7, bool [...].

        All other logits are then smaller by at least log(4/3).
        """
        return (self.r < 0.75) & (self.m > -jnp.inf)

    @property
    def max_probability(self) -> Array:
        """The largest q_k, [...], or NaN where ``has_softmax`` is False."""
        # m - m is 0, or NaN where m is infinite.
        return 1 / (1 + self.r) + (self.m - self.m)

    @property
    def has_softmax(self) -> Array:
        """Whether the largest logit is finite and none is NaN, bool [...]."""
        return jnp.isfinite(self.m) & ~jnp.isnan(self.r)


def is_near(x: Array, m: Array) -> Array:
    """Whether logits x [..., K] are the maximum m [..., 1] or near it.

    A test x == m might fail for all classes: XLA may compute the logits again for each use, and
    round them differently.
    """
    return x >= m - 0.25


def is_top(x: Array, state: Normalizer) -> Array:
    """True at a class with a probability above 4/7, bool [..., K]."""
    return is_near(x, state.m[..., None]) & state.is_confident[..., None]


# Exponentials below the smallest normal number would be flushed to 0. This factor prevents that, so
# that their sum is right.
SCALE = 2.0**64


def exp_difference(x: Array, m: Array, scale: float = 1) -> Array:
    """scale * exp(x - m) for x <= m, from the exact difference x - m.

    Rounding a difference of 80 to float32 would cause a relative error of 4e-6 in the exponential.
    """
    # Use half of each number, because x - m may overflow.
    a, b = jnp.maximum(x, jnp.finfo(x.dtype).min) / 2, m / 2
    e = jnp.exp(a - b)
    return (scale * e) * e * (1 + 2 * lost_in_difference(a, b))


def lost_in_difference(a: Array, b: Array) -> Array:
    """The part of a - b that rounding loses, as a constant: (a - b) + this part is exact."""
    s = a - b
    back = s - a
    return lax.stop_gradient((a - (s - back)) - (b + back))  # Knuth's two-sum


def finite_shift(m: Array) -> Array:
    """m, or 0 for a row whose logits are all -inf, where x - m would be NaN."""
    return jnp.where(m == -jnp.inf, 0, m)


def has_softmax(
    x: Array, axis_name: AxisName, backend: Backend, *, unless: Array | None = None
) -> Array:
    """``Normalizer.has_softmax`` from logits [..., K] instead of their state, bool [...].

    Also False where ``unless`` [...] is True on any shard of the classes.
    """
    x = wide(lax.stop_gradient(x))
    m = jnp.max(x, axis=-1)
    if backend.loses_nan_in_maximum:
        # NaN propagates through a sum. The scale keeps a sum of finite logits from overflowing.
        m = jnp.where(jnp.isnan(jnp.sum(x * 2.0**-24, axis=-1)), jnp.inf, m)
    # The maximum over shards may lose a NaN, as the one of NCCL does. One maximum serves all cases.
    has_none = jnp.isnan(m) if unless is None else jnp.isnan(m) | unless
    return jnp.isfinite(pmax(jnp.where(has_none, jnp.inf, m), axis_name))


def normalize_tile(x: Array, backend: Backend, *, scale: float = SCALE) -> Normalizer:
    """The state of a tile of logits, [..., K] to [...]. This is the plain implementation.

    With scale=1, JAX can differentiate this function. m is then a constant, because lse and q are
    the same for any shift m. r carries the whole derivative of lse: dr/dx_k = e_k for every class,
    including a maximal one.
    """
    x = wide(x)
    m = lax.stop_gradient(jnp.max(x, axis=-1))
    shift = finite_shift(m)[..., None]
    e = exp_difference(x, shift, scale)
    # r is a sum plus a count minus 1. A class near the maximum adds e_k - 1 to the sum, which is 0
    # for a maximal class, and 1 to the count. Other classes add e_k to the sum.
    near = is_near(x, shift)
    rest = jnp.sum(e - jnp.where(near, scale, jnp.zeros_like(e)), axis=-1) / scale
    # If the maximum is the lowest finite number, all other logits are equal to it or -inf.
    # exp_difference treats -inf as that number, so set the rest to 0 here. Keep its derivative.
    rest = jnp.where(m <= jnp.finfo(x.dtype).min, rest - lax.stop_gradient(rest), rest)
    # The two sums share x but no exponential, so an accelerator computes both in one read of x.
    count = jnp.sum(near, axis=-1, dtype=rest.dtype)
    return Normalizer(m, rest + (count - 1))


def _rest(state: Normalizer, m: Array) -> tuple[Array, Array]:
    """The contribution of a state to the r of a merged state with the maximum m.

    The second result is 1 where m is also the maximum of this state, and 0 elsewhere. It counts the
    maximal elements that the states' own r leave out: the merged state leaves out only one.
    """
    top = state.m == m
    rest = jnp.where(top, state.r, (1 + state.r) * exp_difference(state.m, finite_shift(m)))
    return rest, top.astype(rest.dtype)


def merge(a: Normalizer, b: Normalizer) -> Normalizer:
    """The state of all classes, from the states of two parts of the classes."""
    m = jnp.maximum(a.m, b.m)
    (rest_a, top_a), (rest_b, top_b) = _rest(a, m), _rest(b, m)
    return Normalizer(m, rest_a + rest_b + (top_a + top_b - 1))


def merge_parts(parts: Normalizer) -> Normalizer:
    """The state of all classes, from the states of parts of the classes, stacked along axis 0."""
    m = jnp.max(parts.m, axis=0, keepdims=True)
    rest, tops = (jnp.sum(a, axis=0) for a in _rest(parts, m))
    return Normalizer(m[0], rest + (tops - 1))


def merge_over(state: Normalizer, axis_name: AxisName) -> Normalizer:
    """``merge`` of the states of all shards, in one pmax and one psum."""
    if axis_name is None:
        return state
    m = pmax(lax.stop_gradient(state.m), axis_name)  # pmax has no derivative, and m needs none
    rest, tops = psum(_rest(state, m), axis_name)
    return Normalizer(m, rest + (tops - 1))
