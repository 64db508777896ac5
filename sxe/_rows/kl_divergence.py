"""Divergences between the softmax of two rows: lines K0 to K5 of the derivation.

q is the softmax of the model's logits x, and p is the softmax of the target logits z. Their states
are (m_x, r_x) and (m_z, r_z). The log-ratio is not computed as a difference of log-probabilities:

    u_k = log q_k - log p_k = ((x_k - z_k) - (m_x - m_z)) - (log1p(r_x) - log1p(r_z))

A divergence is KL(p || M), KL(q || M), or a weighted sum of both. M is the other distribution, or
beta p + (1 - beta) q for Jensen-Shannon. With v_k = log M_k - log p_k and phi(v) = exp(v) - 1 - v:

    K0, K2, K4  KL(p || M)          = sum_k p_k phi(v_k)
    K1          d KL(p || q)/d x_l  = p_l expm1(v_l)                = q_l - p_l
    K3, K5      d KL(p || M)/d z_l  = p_l (sum_k p_k v_k - v_l)     = p_l (-v_l - KL(p || M))

For KL(q || M), swap p and q, and x and z. phi is never negative. Where p and M nearly agree, an
error of the states shifts all v_k by the same e. Because sum_k M_k = sum_k p_k, this changes the
divergence by only e^2 / 2. So the divergence is accurate even where the usual formula,
sum_k p_k (log p_k - log q_k), has no correct digits. In K3 and K5 such an error cancels. In K1 it
does not. But the exact sum_k p_k expm1(v_k) is 0, so the computed sum is used to correct K1.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from sxe._arrays import AxisName, any_class, are_known, psum, vary_like, wide
from sxe._backend import Backend, apart
from sxe._rows import twins
from sxe._rows.blocks import Tiles, in_row_blocks
from sxe._rows.normalizer import (
    Normalizer,
    exp_difference,
    finite_shift,
    is_top,
    lost_in_difference,
    merge_over,
    normalize_tile,
)
from sxe._rows.rules import Weighed

Mode = Literal["forward", "reverse", "jensen_shannon"]
MODES = ("forward", "reverse", "jensen_shannon")


class Results(NamedTuple):
    """The results of each row, [...]."""

    divergence: Array


class Sums(NamedTuple):
    """Sums over the classes of a row or a tile, [...], for one distribution p compared with M.

    Attributes:
      divergence: KL(p || M), sum_k p_k phi(v_k).
      error: sum_k p_k expm1(v_k), which is 0 except for rounding errors.
      mean: sum_k p_k w_k, where w_k = v_k - origin, and w_k = 0 at the class of the origin.
      origin: v_k at the class with p_k > 4/7, among all classes of the row, or 0 without such a
        class. At this class sum_k p_k v_k - v_k would cancel; ``mean`` - w_k does not.
    """

    divergence: Array
    error: Array
    mean: Array
    origin: Array


class State(NamedTuple):
    """The values of rows that gradients are computed from.

    Attributes:
      of_x, of_z: the normalizer states of x and z.
      of_p, of_q: the sums for p and M, and for q and M. None for a divergence that is not used.
    """

    of_x: Normalizer
    of_z: Normalizer
    of_p: Sums | None
    of_q: Sums | None

    @property
    def has_softmax(self) -> Array:
        """Whether x and z both have a softmax, bool [...]."""
        return self.of_x.has_softmax & self.of_z.has_softmax


class Side(NamedTuple):
    """One of the two distributions, compared with M, over the classes of a tile, [..., K].

    Attributes:
      p: its probabilities.
      v: log M - log p. It may be infinite where p or M is 0.
      excess: M - p.
      top: bool, True at a class with a probability above 4/7.
    """

    p: Array
    v: Array
    excess: Array
    top: Array


def phi(v: Array) -> Array:
    """exp(v) - 1 - v for v from -1 to 1, by its power series."""
    terms = 11 if v.dtype == jnp.float32 else 19
    total = jnp.zeros_like(v)
    for n in range(terms, 1, -1):
        total = total * v + 1 / math.factorial(n)
    return total * v * v


def _near(v: Array) -> tuple[Array, Array]:
    """Whether v is between -1 and 1, and v with all other values replaced by 0."""
    near = jnp.abs(v) < 1
    return near, jnp.where(near, v, 0)


def _finite(v: Array) -> Array:
    """v, or 0 where it is infinite, because p v is 0 where p is 0."""
    return jnp.where(jnp.isinf(v), 0, v)


def divergence_terms(side: Side) -> Array:
    """p phi(v), which is +inf where M is 0 and p is not."""
    near, small = _near(side.v)
    # Where p is 0, p v has to be 0 and differentiable, even if v is infinite.
    far = side.excess - side.p * jnp.where(side.p == 0, 0, side.v)
    # v = -inf means that M is 0 but p is not. If p is 0 here, it was rounded to 0.
    far = jnp.where((side.p == 0) & (side.v == -jnp.inf), jnp.inf, far)
    return jnp.where(near, side.p * phi(small), far)


def difference(side: Side) -> Array:
    """p expm1(v), which is M - p."""
    near, small = _near(side.v)
    return jnp.where(near, side.p * (small + phi(small)), side.excess)


def from_origin(side: Side, origin: Array) -> Array:
    """w of ``Sums.mean``, [..., K]."""
    most = jnp.finfo(origin.dtype).max
    w = jnp.clip(_finite(side.v) - origin[..., None], -most, most)  # finite, because p may be 0
    return jnp.where(side.top, 0, w)


def origin_of(side: Side, axis_name: AxisName) -> Array:
    """``Sums.origin``, [...], from all shards of the classes."""
    return psum(jnp.sum(jnp.where(side.top, _finite(side.v), 0), axis=-1), axis_name)


def mean_of(side: Side, origin: Array) -> Array:
    """``Sums.mean`` of a tile, for a given origin of its rows."""
    means = side.p * from_origin(side, vary_like(origin, side.p))
    return jnp.sum(jnp.where(side.v == -jnp.inf, -jnp.inf, means), axis=-1)


def gradient_of_other(side: Side, sums: Sums) -> Array:
    """K1: the gradient of KL(p || M) for the logits of M, where M is the other distribution."""
    return difference(side) - sums.error[..., None] * (side.p + side.excess)


def gradient_of_own(side: Side, sums: Sums) -> Array:
    """K3 and K5 without their weight: the gradient of KL(p || M) for the logits of p."""
    slope = sums.mean[..., None] - from_origin(side, sums.origin)
    slope = jnp.where(side.v == -jnp.inf, jnp.inf, slope)
    none = side.p == 0
    return jnp.where(none, 0, side.p * jnp.where(none, 0, slope))


def _log_mixture(v: Array, own: float, other: float) -> Array:
    """log(own + other exp(v)) for own + other = 1."""
    bounded = jnp.minimum(v, 80)  # for larger v, own is negligible
    more = other * jnp.expm1(bounded)
    much_less = more < -0.5
    less = jnp.log(own + other * jnp.exp(bounded))
    close = jnp.log1p(jnp.where(much_less, 0, more))
    return jnp.where(much_less, less, close) + jnp.maximum(v - 80, 0)


def _log_ratio(x: Array, z: Array, of_x: Normalizer, of_z: Normalizer) -> Array:
    """u, [..., K], which is 0 where both logits are -inf.

    The offset between the two rows may be much larger than their other differences. The rounding
    error of x - z may then exceed (x - z) - (m_x - m_z). So this error is added back.
    """
    none, finite = (x == -jnp.inf) & (z == -jnp.inf), (x > -jnp.inf) & (z > -jnp.inf)
    # Use a quarter of each number, because the differences may overflow.
    m_x, m_z = (finite_shift(state.m) / 4 for state in (of_x, of_z))
    lost = lost_in_difference(*(jnp.where(finite, a / 4, 0) for a in (x, z)))
    lost = lost - lost_in_difference(m_x, m_z)[..., None]
    x, z = (jnp.where(none, 0, a / 4) for a in (x, z))
    u = 4 * (((x - z) - (m_x - m_z)[..., None]) + lost)
    return jnp.where(none, 0, u - (of_x.log1p_r - of_z.log1p_r)[..., None])


def _probabilities(x: Array, state: Normalizer) -> Array:
    return exp_difference(x, finite_shift(state.m)[..., None]) / (1 + state.r)[..., None]


def _pulled_back(g: Array, d: Array) -> Array:
    """g d, but 0 instead of NaN where g is 0 and d is infinite."""
    return g * jnp.where((g == 0) & jnp.isinf(d), 0, d)


def _behind(states: tuple[Normalizer, Normalizer], after: Any) -> tuple[Normalizer, Normalizer]:
    """The states, placed after ``after`` by an optimization barrier.

    Earlier and later code share terms [..., K]. Without the barrier, XLA would write these terms to
    memory. With the barrier, it reads the tile again and recomputes them.
    """
    of_x, of_z = states
    # ``after`` needs no derivative, and JAX 0.12 can't transpose the barrier in a loop.
    (m_x, m_z), _ = lax.optimization_barrier(((of_x.m, of_z.m), lax.stop_gradient(after)))
    return of_x._replace(m=m_x), of_z._replace(m=m_z)


@dataclasses.dataclass(frozen=True)
class KLDivergence:
    """The row function of a divergence. ``RowFunction`` documents its methods.

    Its targets are the logits z.

    Attributes:
      axis_name: the mesh axes over which the classes are sharded.
      backend: where it runs.
      mode: which divergence to compute.
      beta: the weight of p in M, for "jensen_shannon".
    """

    axis_name: AxisName
    backend: Backend
    mode: Mode
    beta: float

    def is_infinite(self, x: Array, z: Array) -> Array:
        # KL(p || q) is +inf if a class can occur in p but not in q.
        x, z = lax.stop_gradient((x, z))
        if self.mode == "jensen_shannon":
            return jnp.zeros(x.shape[:-1], jnp.bool_)
        p, q = (z, x) if self.mode == "forward" else (x, z)
        return any_class((p > -jnp.inf) & (q == -jnp.inf), None)

    def tile(self, x: Array, z: Array) -> State:
        # The terms of a class depend on the states of whole rows, so merge the shards' states here.
        of_x, of_z = (merge_over(twins.normalize(a, self.backend), self.axis_name) for a in (x, z))
        shape, classes = x.shape[:-1], x.shape[-1]
        if not self.backend.loops_over_rows or not are_known(*x.shape):
            return State(of_x, of_z, *self._sums(x, z, of_x, of_z))

        def block(none: tuple[()], tiles: Tiles, states: Any) -> tuple[tuple[()], Any, Any]:
            (x, z), (of_x, of_z) = tiles, states
            return none, (None, None), self._sums(x, z, of_x, of_z)

        tiles = x.reshape(-1, classes), z.reshape(-1, classes)
        states = jax.tree.map(jnp.ravel, (of_x, of_z))
        *_, sums = in_row_blocks(block, (), tiles, states, backend=self.backend)
        return State(of_x, of_z, *jax.tree.map(lambda a: a.reshape(shape), sums))

    def merge(self, part: State, z: Array) -> tuple[Results, State]:
        of_p, of_q = (self._of_row(sums) for sums in (part.of_p, part.of_q))
        state = part._replace(of_p=of_p, of_q=of_q)
        return Results(self._weighed(of_p, of_q)), state

    def gradient(self, x: Array, z: Array, state: State, g: Results) -> Array:
        return self._gradient(1, (x, z), state, g)

    def target_gradient(self, x: Array, z: Array, state: State, g: Results) -> Array:
        return self._gradient(0, (x, z), state, g)

    def _gradient(self, of: int, logits: tuple[Array, Array], state: State, g: Results) -> Array:
        """The gradient for the logits of p (of = 0) or of q (of = 1)."""
        (x, z), other = logits, 1 - of
        state, g = vary_like((state, g), x)
        sums = state.of_p, state.of_q
        sides = self._sides(x, z, *_behind((state.of_x, state.of_z), sums))
        if (own := sums[of]) is not None:
            d = self._weights[of] * gradient_of_own(sides[of], own)  # K3, K5
        else:
            of_other = sums[other]
            assert of_other is not None
            d = gradient_of_other(sides[other], of_other)  # K1
        return _pulled_back(g.divergence[..., None], d)

    def target_tangent(self, x: Array, z: Array, state: State, z_dot: Any) -> Results:
        zeros = jnp.zeros_like(state.of_x.r)
        if isinstance(z_dot, SymbolicZero):
            return Results(zeros)
        d = self.target_gradient(x, z, state, Results(zeros + 1))
        return Results(psum(jnp.sum(d * z_dot, axis=-1), self.axis_name))

    def primal(self, x: Array, z: Array) -> Results:
        plain = (normalize_tile(a, self.backend, scale=1) for a in (x, z))
        of_x, of_z = (merge_over(state, self.axis_name) for state in plain)
        sums = (self._of_row(sums) for sums in self._sums(x, z, of_x, of_z))
        return Results(self._weighed(*sums))

    def weigh(self, results: Results, weight: Array, z_loss: Array | None) -> Weighed:
        """w_i divergence_i."""
        value = results.divergence
        # Weight 0 times an infinite divergence is 0, not NaN.
        value = jnp.where((weight == 0) & jnp.isinf(value), 0, value)
        return Weighed(weight * value, Results(weight), value, None)

    @property
    def _weights(self) -> tuple[float, float]:
        """The weights of KL(p || M) and KL(q || M)."""
        by_mode = {
            "forward": (1.0, 0.0),
            "reverse": (0.0, 1.0),
            "jensen_shannon": (self.beta, 1 - self.beta),
        }
        return by_mode[self.mode]

    def _weighed(self, of_p: Sums | None, of_q: Sums | None) -> Array:
        by_weight = zip(self._weights, (of_p, of_q), strict=True)
        first, *second = (weight * sums.divergence for weight, sums in by_weight if sums)
        return first + second[0] if second else first

    def _of_row(self, sums: Sums | None) -> Sums | None:
        """The sums of whole rows, from the sums of tiles."""
        if sums is None:
            return None
        return Sums(*psum(sums[:-1], self.axis_name), sums.origin)

    def _sums(self, x: Array, z: Array, of_x: Normalizer, of_z: Normalizer) -> list[Sums | None]:
        """The sums of p and of q over the classes of a tile."""
        of_x, of_z = vary_like((of_x, of_z), x)
        # 0, or NaN in a row where x or z has no distribution.
        nothing = sum(a - a for a in (*of_x, *of_z))
        found: list[Sums | None] = []
        for i, side in enumerate(self._sides(x, z, of_x, of_z)):
            if not self._weights[i]:
                found.append(None)
                continue
            origin = origin_of(side, self.axis_name)
            behind = self._sides(x, z, *_behind((of_x, of_z), origin))[i]
            divergence = jnp.sum(divergence_terms(side), axis=-1) + nothing
            error = jnp.sum(difference(side), axis=-1)
            found.append(Sums(divergence, error, mean_of(behind, origin), origin))
        return found

    def _sides(self, x: Array, z: Array, of_x: Normalizer, of_z: Normalizer) -> tuple[Side, Side]:
        """p and q, each compared with M, [..., K]."""
        x, z = wide(x), wide(z)
        of_x, of_z = (s._replace(m=apart(s.m, s.r, self.backend)) for s in (of_x, of_z))
        p, q = _probabilities(z, of_z), _probabilities(x, of_x)
        u, tops = _log_ratio(x, z, of_x, of_z), (is_top(z, of_z), is_top(x, of_x))
        if self.mode != "jensen_shannon":
            return Side(p, u, q - p, tops[0]), Side(q, -u, p - q, tops[1])
        of_p, of_q = self.beta, 1 - self.beta
        return (
            Side(p, _log_mixture(u, of_p, of_q), of_q * (q - p), tops[0]),
            Side(q, _log_mixture(-u, of_q, of_p), of_p * (p - q), tops[1]),
        )
