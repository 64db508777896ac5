"""Softmax cross-entropy of a row: lines D0 and D7 of the derivation, each written once.

With the state (m, r) of a row's logits, e_k = exp(x_k - m), and targets t_k with T = sum_k t_k:

    D0  loss        = sum_k t_k (m - x_k) + T log1p(r)
    D7  d loss/dx_l = (e_l (T - t_l) - t_l ((1 - e_l) + r)) / (1 + r)         = T q_l - t_l

No term of D0 is negative, and neither of the two terms of D7 cancels.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from sxe._arrays import AxisName, psum, vary_like, wide
from sxe._backend import Backend, apart
from sxe._rows import twins
from sxe._rows.normalizer import Normalizer, merge_over
from sxe._rows.rules import Weighed
from sxe._rows.targets import (
    Targets,
    dense_cost,
    dense_gap,
    label_gap,
    put_label,
    take_label,
    target_sum,
    target_tile,
)


class Results(NamedTuple):
    """Of each row, [...].

    Attributes:
      loss: without its z-loss.
      lse: log sum_k exp(x_k). As a cotangent, None is 0.
      max_probability: the largest of all q_k. It has no derivative, so that as a tangent or a
        cotangent it is None or of no effect.
    """

    loss: Array
    lse: Array | None
    max_probability: Array | None = None


class Part(NamedTuple):
    """What the classes of one tile contribute to their rows, [...].

    Attributes:
      state: of their logits.
      cost: sum_k t_k (m - x_k).
      target: sum_k t_k, which only a shard needs, or None.
    """

    state: Normalizer
    cost: Array
    target: Array | None


def scaled_difference(e: Array, t_and_others: tuple[Array, Array], r: Array) -> Array:
    """(1 + r) (T q - t): D7 times 1 + r, from e = exp(x - m), t, and T - t."""
    t, others = t_and_others
    return e * others - t * ((1 - e) + r)


def row_gradient(
    x: Array, t: tuple[Array | None, Array], state: Normalizer, g: Results, backend: Backend
) -> Array:
    """D7: the gradient for a tile of logits x [..., K], from the cotangents g [...] of the results.

    ``t`` is t and T - t, each [..., K] or broadcastable to it. A t of None is 0.
    """
    t_here, t_elsewhere = t
    r = state.r[..., None]
    e = jnp.exp(wide(x) - apart(state.m, state.r, backend)[..., None])
    g_loss, g_lse = g.loss[..., None], None if g.lse is None else g.lse[..., None]
    if t_here is None:
        d = t_elsewhere * g_loss
        return e * ((d if g_lse is None else d + g_lse) / (1 + r))
    d = scaled_difference(e, (t_here, t_elsewhere), r) * g_loss
    return (d if g_lse is None else d + e * g_lse) / (1 + r)


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The row function: see ``RowFunction`` for its methods.

    Attributes:
      axis_name: the mesh axes that split the classes.
      backend: where it runs.
    """

    axis_name: AxisName
    backend: Backend

    def tile(self, x: Array, targets: Targets) -> Part:
        state = twins.normalize(x, self.backend)
        if self.axis_name is None:
            return Part(state, self._cost(x, targets, state.m, state.log1p_r), None)
        # Other shards may hold finite logits where all of this one's are -inf.
        empty = state.m == -jnp.inf
        m, log1p_r = (jnp.where(empty, 0, a) for a in (state.m, state.log1p_r))
        return Part(state, self._cost(x, targets, m, log1p_r), target_sum(targets, x))

    def merge(self, part: Part, targets: Targets) -> tuple[Results, Normalizer]:
        state = merge_over(part.state, self.axis_name)
        cost = part.cost
        if part.target is not None:
            # A shard measures costs from its own maximum, so that no term is negative.
            own = jnp.where(part.state.m == -jnp.inf, 0, part.state.m)
            cost = psum(cost + part.target * (state.m - own), self.axis_name)
        loss = cost + targets.total * state.log1p_r  # D0
        # All results of a custom rule have to be batched alike. Where jax.vmap maps the targets
        # alone, it would not batch lse, and would count lse's cotangent once for each example.
        of_logits = (jnp.where(loss == 0, a, a) for a in (state.lse, state.max_probability))
        return Results(loss, *of_logits), state

    def gradient(self, x: Array, targets: Targets, state: Normalizer, g: Results) -> Array:
        targets, state, g = vary_like((targets, state, g), x)
        label, t, dense, total = targets
        if label is None or t is None or dense is not None:
            return row_gradient(x, target_tile(targets, x.shape[-1]), state, g, self.backend)
        # The label's class is apart, so that all others have less to compute.
        d = row_gradient(x, (None, total[..., None]), state, g, self.backend)
        found, inside = take_label(x, label)
        x = jnp.where(inside, wide(found), state.m)  # elsewhere it is of no use, but finite
        t_label = t[..., None], (total - t)[..., None]  # of one target, T - t is exactly 0
        at_label = row_gradient(x[..., None], t_label, state, g, self.backend)
        return put_label(d, label, at_label[..., 0])

    def target_gradient(self, x: Array, targets: Targets, state: Normalizer, g: Results) -> Targets:
        at_label, at_dense = self._minus_log_q(x, targets, state)  # D0 differentiated in t_k
        zeros = jax.tree.map(lambda a: vary_like(jnp.zeros_like(a), a), targets)
        d = Targets(None, None, zeros.dense, zeros.total)
        if targets.label_target is not None:
            d = d._replace(label_target=g.loss * at_label)
        if targets.dense is not None:
            d_t = vary_like(g.loss, x)[..., None] * at_dense
            ones = tuple(i for i, n in enumerate(targets.dense.t.shape) if n == 1)
            d_t = jnp.sum(d_t, axis=ones, keepdims=True)
            d = d._replace(dense=zeros.dense._replace(t=d_t))
        return d

    def target_tangent(self, x: Array, targets: Targets, state: Normalizer, t_dot: Any) -> Results:
        at_label, at_dense = self._minus_log_q(x, targets, state)
        loss_dot = jnp.zeros_like(state.r)
        # A tangent of zero must not meet an infinite derivative.
        if targets.label is not None and not isinstance(t_dot.label_target, SymbolicZero):
            loss_dot = loss_dot + t_dot.label_target * at_label
        if targets.dense is not None and not isinstance(t_dot.dense.t, SymbolicZero):
            by_class = jnp.sum(at_dense * t_dot.dense.t, axis=-1)
            loss_dot = loss_dot + psum(by_class, self.axis_name)
        return Results(loss_dot, jnp.zeros_like(loss_dot))

    def primal(self, x: Array, origin: Array, targets: Targets, state: Normalizer) -> Results:
        # D0 is sum_k t_k (lse - x_k) here. With T log1p(r) apart, the two parts of 0 log 0 would
        # each meet a cotangent and be rounded before they cancel.
        lse, zero = state.lse, jnp.zeros_like(state.r)
        total = lax.stop_gradient(targets.total)
        loss = (total - total) * lse  # 0, or NaN in value and derivative: the label is no class
        if targets.label_target is not None:
            cost = targets.label_target * label_gap(targets, x, lse, zero)
            loss = loss + psum(cost, self.axis_name)
        if targets.dense is not None:
            cost = dense_cost(targets.dense.t, x, *vary_like((lse, zero), x))  # the plain twin
            loss = loss + psum(cost, self.axis_name)
        return Results(loss, origin + lse, lax.stop_gradient(state.max_probability))

    def weigh(self, results: Results, weight: Array, z_loss: Array | None) -> Weighed:
        """w_i (loss_i + z lse_i^2)."""
        loss, lse, _ = results
        assert lse is not None
        g_lse = d_z = None
        if z_loss is not None:
            # In this order: lse^2 may overflow where z lse^2 does not, and z may be 0.
            loss = loss + z_loss * lse * lse
            g_lse, d_z = 2 * z_loss * lse * weight, jnp.sum(weight * lse * lse)
        # A weight of 0 times an infinite loss is 0.
        loss = jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)
        return Weighed(weight * loss, Results(weight, g_lse), loss, d_z)

    def _cost(self, x: Array, targets: Targets, m: Array, log1p_r: Array) -> Array:
        """sum_k t_k (m - x_k) over the classes of this tile, [...]."""
        cost = jnp.zeros_like(m)
        if targets.label_target is not None:
            cost = targets.label_target * label_gap(targets, x, m, log1p_r)
        if targets.dense is not None:
            m, log1p_r = vary_like((m, log1p_r), x)
            cost = cost + twins.dense_cost(targets.dense.t, x, m, log1p_r, self.backend)
        return cost

    def _minus_log_q(self, x: Array, targets: Targets, state: Normalizer) -> tuple[Array, Array]:
        """-log q at the label, [...], and of each class, [..., K]: D0 differentiated in t_k.

        It counts what t_k adds to T, so that T itself has the derivative 0.
        """
        log1p_r = state.log1p_r
        at_label = psum(label_gap(targets, x, state.m, log1p_r), self.axis_name) + log1p_r
        at_dense = dense_gap(targets, x, state.m, log1p_r) + vary_like(log1p_r, x)[..., None]
        return at_label, at_dense
