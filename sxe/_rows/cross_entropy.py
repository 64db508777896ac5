"""Softmax cross-entropy of a row: lines D0 and D7 of the derivation.

With the state (m, r) of a row's logits, e_k = exp(x_k - m), targets t_k, and T = sum_k t_k:

    D0  loss        = sum_k t_k (m - x_k) + T log1p(r)
    D7  d loss/dx_l = (e_l (T - t_l) - t_l ((1 - e_l) + r)) / (1 + r)         = T q_l - t_l

No term of D0 is negative, and the two terms of D7 don't cancel. The log-probability of a label is
-D0. On request, the row's entropy is another result: see ``entropy``.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from sxe._arrays import AxisName, any_class, psum, vary_like, wide
from sxe._backend import Backend, apart
from sxe._rows import twins
from sxe._rows.entropy import entropy, gap_sum, mean_gap, slope
from sxe._rows.normalizer import Normalizer, merge_over
from sxe._rows.rules import Weighed, move_confident
from sxe._rows.targets import (
    Dense,
    Sparse,
    Targets,
    class_tile,
    dense_cost,
    gap,
    label_gap,
    label_tile,
    put_labels,
    take_labels,
    target_sum,
)


class Results(NamedTuple):
    """The results of each row, [...].

    In a tuple of cotangents, ``lse`` and ``entropy`` may be None, which means 0.

    Attributes:
      loss: the loss without the z-loss.
      lse: log sum_k exp(x_k).
      max_probability: the largest q_k. It has no derivative: its tangent is None, and its cotangent
        is ignored.
      entropy: -sum_k q_k log q_k, or None if not requested.
    """

    loss: Array
    lse: Array | None
    max_probability: Array | None = None
    entropy: Array | None = None


class Part(NamedTuple):
    """The contributions of the classes of one tile to their rows, [...].

    Attributes:
      state: the state of the tile's logits.
      cost: sum_k t_k (m - x_k).
      target: sum_k t_k, or None if the classes are not sharded.
      gap_sum: sum_k e_k (m - x_k), or None if the entropy is not requested.
    """

    state: Normalizer
    cost: Array
    target: Array | None
    gap_sum: Array | None = None


class State(NamedTuple):
    """The values of whole rows that gradients are computed from, [...].

    Attributes:
      normalizer: the state of the rows' logits.
      mean_gap: sum_k q_k (m - x_k), or None if the entropy is not requested.
    """

    normalizer: Normalizer
    mean_gap: Array | None = None

    @property
    def has_softmax(self) -> Array:
        return self.normalizer.has_softmax


def scaled_difference(e: Array, t_and_others: tuple[Array, Array], r: Array) -> Array:
    """(1 + r) (T q - t), which is D7 times 1 + r, from e = exp(x - m), t, T - t and r."""
    t, others = t_and_others
    return e * others - t * ((1 - e) + r)


def row_gradient(
    x: Array, t: tuple[Array | None, Array], state: State, g: Results, backend: Backend
) -> Array:
    """The gradient for a tile of logits x [..., K] (D7 and E1), from cotangents g of the results.

    ``t`` is the tuple of t and T - t, each [..., K] or broadcastable to it. A t of None is 0.
    """
    t_here, t_elsewhere = t
    m, r = apart(state.normalizer.m, state.normalizer.r, backend), state.normalizer.r[..., None]
    e = jnp.exp(wide(x) - m[..., None])
    g_loss, by_e = g.loss[..., None], _cotangent_of_e(x, m, state, g)
    if t_here is None:
        d = t_elsewhere * g_loss
        return e * ((d if by_e is None else d + by_e) / (1 + r))
    d = scaled_difference(e, (t_here, t_elsewhere), r) * g_loss
    return (d if by_e is None else d + e * by_e) / (1 + r)


def _cotangent_of_e(x: Array, m: Array, state: State, g: Results) -> Array | None:
    """The factor of q in the gradients of lse and of the entropy. None is 0."""
    by_lse = None if g.lse is None else g.lse[..., None]
    if g.entropy is None:
        return by_lse
    assert state.mean_gap is not None
    by_entropy = slope(wide(x), m, state.mean_gap) * g.entropy[..., None]
    return by_entropy if by_lse is None else by_lse + by_entropy


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The row function of cross-entropy. ``RowFunction`` documents its methods.

    Attributes:
      axis_name: the mesh axes over which the classes are sharded.
      backend: where it runs.
      with_entropy: whether to compute the entropy.
    """

    axis_name: AxisName
    backend: Backend
    with_entropy: bool = False

    def is_infinite(self, x: Array, targets: Targets) -> Array:
        x, targets = lax.stop_gradient((x, targets))
        cannot_occur = jnp.zeros((*x.shape[:-1], 1), jnp.bool_)
        if (labels := targets.labels) is not None:
            found, inside = take_labels(x, labels.label)
            cannot_occur = inside & (found == -jnp.inf) & (labels.target != 0)
        is_infinite = any_class(cannot_occur, None)
        if targets.dense is not None:
            cannot_occur = (x == -jnp.inf) & (targets.dense.t != 0)
            is_infinite |= any_class(cannot_occur, None)
        return is_infinite

    def tile(self, x: Array, targets: Targets) -> Part:
        state = twins.normalize(x, self.backend)
        gaps = self.gap_sum(x, state.m)
        if self.axis_name is None:
            return Part(state, self._cost(x, targets, state.m, state.log1p_r), None, gaps)
        # All logits of a row may be -inf in this shard but not in others: then use m = 0.
        empty = state.m == -jnp.inf
        m, log1p_r = (jnp.where(empty, 0, a) for a in (state.m, state.log1p_r))
        return Part(state, self._cost(x, targets, m, log1p_r), target_sum(targets, x), gaps)

    def gap_sum(self, x: Array, m: Array) -> Array | None:
        """The ``gap_sum`` of a tile, or None if the entropy is not requested."""
        return twins.gap_sum(x, m, self.backend) if self.with_entropy else None

    def merge(self, part: Part, targets: Targets) -> tuple[Results, State]:
        state = merge_over(part.state, self.axis_name)
        cost = part.cost
        if part.target is not None:
            # Each shard computed its cost from its own maximum, so that no term is negative. Now
            # add the distance from its own maximum to the row's maximum.
            own = jnp.where(part.state.m == -jnp.inf, 0, part.state.m)
            cost = psum(cost + part.target * (state.m - own), self.axis_name)
        loss = cost + targets.total * state.log1p_r  # D0
        # If jax.vmap maps only the targets, the loss has a batch axis and lse has none. JAX would
        # then count the cotangent of lse once per example. The select gives all results the axis.
        of_logits = [state.lse, state.max_probability]
        gaps = None
        if part.gap_sum is not None:
            gaps = mean_gap(part.gap_sum, part.state, state, self.axis_name)
            of_logits.append(entropy(state, gaps))  # E0
        of_logits = [jnp.where(loss == 0, a, a) for a in of_logits]
        return Results(loss, *of_logits), State(state, gaps)

    def gradient(self, x: Array, targets: Targets, state: State, g: Results) -> Array:
        targets, state, g = vary_like((targets, state, g), x)
        d = row_gradient(x, class_tile(targets), state, g, self.backend)
        if (labels := targets.labels) is None:
            return d
        # Compute the labels' classes separately, so that all others need less arithmetic.
        found, inside = take_labels(x, labels.label)
        # The gradient of a label outside of the tile is not used, but must be finite.
        found = jnp.where(inside, wide(found), state.normalizer.m[..., None])
        at_label = row_gradient(found, label_tile(targets, labels), state, g, self.backend)
        return put_labels(d, labels.label, at_label, self.backend)

    def target_gradient(self, x: Array, targets: Targets, state: State, g: Results) -> Targets:
        zeros = jax.tree.map(lambda a: vary_like(jnp.zeros_like(a), a), targets)
        d = Targets(None, None, zeros.dense, zeros.total)
        if (labels := targets.labels) is not None:
            d_target = g.loss[..., None] * self._cost_of_labels(x, labels, state)
            if targets.sparse is None:
                d = d._replace(label_target=d_target[..., 0])
            else:
                d = d._replace(sparse=Sparse(None, d_target))
        if targets.dense is not None:
            d_t = vary_like(g.loss, x)[..., None] * self._cost_of_classes(x, targets.dense, state)
            ones = tuple(i for i, n in enumerate(targets.dense.t.shape) if n == 1)
            d_t = jnp.sum(d_t, axis=ones, keepdims=True)
            d = d._replace(dense=zeros.dense._replace(t=d_t))
        return d

    def target_tangent(self, x: Array, targets: Targets, state: State, t_dot: Any) -> Results:
        loss_dot = jnp.zeros_like(state.normalizer.r)
        # Skip zero tangents: 0 times an infinite derivative would be NaN.
        if (labels := targets.labels) is not None:
            one = targets.sparse is None
            dot = t_dot.label_target if one else t_dot.sparse.target
            if not isinstance(dot, SymbolicZero):
                cost = self._cost_of_labels(x, labels, state)
                loss_dot = loss_dot + jnp.sum((dot[..., None] if one else dot) * cost, axis=-1)
        if targets.dense is not None and not isinstance(t_dot.dense.t, SymbolicZero):
            by_class = t_dot.dense.t * self._cost_of_classes(x, targets.dense, state)
            loss_dot = loss_dot + psum(jnp.sum(by_class, axis=-1), self.axis_name)
        none = jnp.zeros_like(loss_dot)
        return Results(loss_dot, none, None, none if self.with_entropy else None)

    def primal(self, x: Array, targets: Targets) -> Results:
        x, origin, state = move_confident(x, self.axis_name, self.backend)
        # Compute D0 as sum_k t_k (lse - x_k). If T log1p(r) were a separate term, 0 log 0 would
        # have two parts, each multiplied by a cotangent and rounded before they cancel.
        lse, zero = state.lse, jnp.zeros_like(state.r)
        total = lax.stop_gradient(targets.total)
        nothing = total - total  # 0, or NaN for an invalid label: a factor also makes gradients NaN
        loss = nothing * (origin + lse)  # with a single class, only the origin depends on x
        if (labels := targets.labels) is not None:
            cost = jnp.sum(labels.target * label_gap(labels, x, lse, zero), axis=-1)
            loss = loss + psum(cost, self.axis_name)
        if targets.dense is not None:
            cost = dense_cost(targets.dense.t, x, *vary_like((lse, zero), x))  # no custom rule
            loss = loss + psum(cost, self.axis_name)
        of_row = origin + lse, lax.stop_gradient(state.max_probability)
        if not self.with_entropy:
            return Results(loss, *of_row)
        m = vary_like(state.m, x)
        plain, scaled = gap_sum(x, m, scale=1), gap_sum(*lax.stop_gradient((x, m)))
        # Take the value from the scaled sum, where nothing underflows, and the derivative from the
        # plain sum.
        gaps = psum(plain + (scaled - lax.stop_gradient(plain)), self.axis_name)
        return Results(loss, *of_row, (1 + nothing) * entropy(state, gaps / (1 + state.r)))

    def weigh(self, results: Results, weight: Array, z_loss: Array | None) -> Weighed:
        """w_i (loss_i + z lse_i^2)."""
        loss, lse = results.loss, results.lse
        assert lse is not None
        g_lse = d_z = None
        if z_loss is not None:
            # Multiply in this order: lse^2 may overflow where z lse^2 does not, and z may be 0.
            loss = loss + z_loss * lse * lse
            g_lse, d_z = 2 * z_loss * lse * weight, jnp.sum(weight * lse * lse)
        # Weight 0 times an infinite loss is 0, not NaN.
        loss = jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)
        return Weighed(weight * loss, Results(weight, g_lse), loss, d_z)

    def _cost(self, x: Array, targets: Targets, m: Array, log1p_r: Array) -> Array:
        """sum_k t_k (m - x_k) over the classes of this tile, [...]."""
        cost = jnp.zeros_like(m)
        if (labels := targets.labels) is not None:
            cost = jnp.sum(labels.target * label_gap(labels, x, m, log1p_r), axis=-1)
        if targets.dense is not None:
            m, log1p_r = vary_like((m, log1p_r), x)
            cost = cost + twins.dense_cost(targets.dense.t, x, m, log1p_r, self.backend)
        return cost

    # The derivative of D0 with respect to t_k is -log q_k. It already includes t_k's part in T, so
    # that T itself gets the gradient 0.

    def _cost_of_labels(self, x: Array, labels: Sparse, state: State) -> Array:
        """-log q at each label, [..., M]."""
        m, log1p_r = state.normalizer.m, state.normalizer.log1p_r
        # Whether a class contributes 0 log 0 depends on its whole target, from all labels.
        t, _ = labels.of_classes()
        gaps = label_gap(labels._replace(target=t), x, m, log1p_r)
        return psum(gaps, self.axis_name) + log1p_r[..., None]

    def _cost_of_classes(self, x: Array, dense: Dense, state: State) -> Array:
        """-log q at each class of the tile, [..., K]."""
        m, log1p_r = vary_like((state.normalizer.m, state.normalizer.log1p_r), x)
        return gap(dense.t, x, m[..., None], log1p_r[..., None]) + log1p_r[..., None]
