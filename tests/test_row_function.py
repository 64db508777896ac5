"""A new row function is a single class. The rules, the head and meshes work with it as they are.

This one is the entropy H of the softmax, with H = log1p(r) + sum_k q_k (m - x_k) and the gradient
dH/dx_l = q_l ((m - x_l) - sum_k q_k (m - x_k)).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sxe._arrays import psum, vary, vary_like
from sxe._backend import Backend
from sxe._head.chunk import Head, Hidden, Projection, Shared
from sxe._head.examples import outcome_of_examples
from sxe._head.path import AGAIN, FORWARD
from sxe._head.projection import Products, Transform
from sxe._rows.normalizer import Normalizer, exp_difference, merge_over
from sxe._rows.rules import RULES, Weighed, move_confident
from sxe._rows.targets import Rows, Targets
from sxe._rows.twins import normalize

N, D, K = 13, 5, 37
BACKEND = Backend("cpu", is_local=False)
NO_TARGETS = Targets(None, None, None, None)


class Entropies(NamedTuple):
    entropy: jax.Array


class State(NamedTuple):
    m: jax.Array
    r: jax.Array
    gap: jax.Array  # sum_k q_k (m - x_k)


@dataclasses.dataclass(frozen=True)
class Entropy:
    axis_name: str | None
    backend: Backend

    def is_infinite(self, x, targets):
        return jnp.zeros(x.shape[:-1], bool)

    def tile(self, x, targets):
        state = normalize(x, self.backend)
        gap = state.m[..., None] - x
        return state, jnp.sum(jnp.exp(-gap) * gap, axis=-1)

    def merge(self, part, targets):
        (m_shard, r_shard), sum_of_gaps = part
        m, r = merge_over(Normalizer(m_shard, r_shard), self.axis_name)
        moved = exp_difference(m_shard, m) * (sum_of_gaps + (1 + r_shard) * (m - m_shard))
        gap = psum(moved, self.axis_name) / (1 + r)
        return Entropies(jnp.log1p(r) + gap), State(m, r, gap)

    def gradient(self, x, targets, state, g):
        (m, r, gap), (g,) = vary_like((state, g), x)
        q = jnp.exp(x - m[..., None]) / (1 + r)[..., None]
        return g[..., None] * q * ((m[..., None] - x) - gap[..., None])

    def target_gradient(self, x, targets, state, g):
        return targets

    def target_tangent(self, x, targets, state, t_dot):
        return Entropies(jnp.zeros_like(state.m))

    def primal(self, x, targets):
        x, _, state = move_confident(x, self.axis_name, self.backend)
        q = jnp.exp(x - vary_like(state.lse, x)[..., None])
        return Entropies(state.lse - psum(jnp.sum(q * x, axis=-1), self.axis_name))

    def weigh(self, results, weight, z_loss):
        return Weighed(weight * results.entropy, Entropies(weight), results.entropy, None)


def truth(x):
    """H [N] and dH/dx [N, K] in float64."""
    x = np.asarray(x, np.float64)
    log_q = x - x.max(-1, keepdims=True)
    log_q -= np.log(np.exp(log_q).sum(-1, keepdims=True))
    q = np.exp(log_q)
    entropy = -(q * log_q).sum(-1)
    return entropy, -q * (log_q + entropy[:, None])


def inputs():
    rng = np.random.default_rng(0)
    shapes = (N, D), (D, K), (N,), (N,)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    hidden, kernel, g, _ = inputs()
    x = 3 * hidden @ kernel
    f = Entropy(None, BACKEND)
    results, vjp = jax.vjp(lambda x: RULES[rule](f, x, NO_TARGETS).entropy, x)
    entropy, gradient = truth(x)
    np.testing.assert_allclose(results, entropy, rtol=1e-5)
    np.testing.assert_allclose(vjp(g)[0], g[:, None] * gradient, atol=1e-6)
    if rule != "vjp":
        tangent = jax.jvp(lambda x: RULES[rule](f, x, NO_TARGETS).entropy, (x,), (x,))[1]
        np.testing.assert_allclose(tangent, (gradient * np.asarray(x, float)).sum(-1), atol=2e-5)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("by", ["vjp", "jvp", "autodiff", "sum"])
def test_head_and_mesh(by, shards):
    """Row results with each rule, and a sum whose gradient is computed in the forward pass."""
    hidden, kernel, weight, g = inputs()
    kernel = jnp.pad(kernel, ((0, 0), (0, 3)))
    mesh = jax.make_mesh((shards,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    f = Entropy("classes", BACKEND)
    products = Products(jnp.dtype("float32"), jax.lax.Precision.HIGHEST, BACKEND)
    head = Head(
        f,
        (products,),
        path=FORWARD if by == "sum" else AGAIN,
        rule="vjp" if by == "sum" else by,
        chunk_size=5,
        skips=False,
        has_weights=False,
        predicts=False,
    )

    def run(hidden, kernel):
        hidden, kernel = (vary(a, frozenset({"classes"})) for a in (hidden, kernel))
        shared = Shared((Projection(kernel, Transform(None, None, None)),), None, None)
        rows = Rows(NO_TARGETS, weight, None, None)
        outcome = outcome_of_examples(head, shared, (Hidden(hidden, None),), rows)
        if by == "sum":
            return outcome.value
        return jnp.sum(g * weight * outcome.results.entropy) / jnp.sum(g * g)

    def whole(hidden, kernel):
        run_on_mesh = jax.shard_map(
            run, mesh=mesh, in_specs=(P(), P(None, "classes")), out_specs=P()
        )
        return run_on_mesh(hidden, kernel)

    value, gradients = jax.jit(jax.value_and_grad(whole, (0, 1)))(hidden, kernel)
    entropy, gradient = truth(hidden @ kernel)
    w = np.asarray(weight, float)
    if by != "sum":
        w = w * np.asarray(g, float) / np.sum(np.asarray(g, float) ** 2)
    np.testing.assert_allclose(value, np.sum(w * entropy), rtol=1e-5)
    d_x = w[:, None] * gradient
    expected = d_x @ np.asarray(kernel, float).T, np.asarray(hidden, float).T @ d_x
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
