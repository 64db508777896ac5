"""Functions of a tile of rows with several implementations ("twins"), and the choice between them.

A plain implementation and a fast one give the same results. The fast ones are not differentiated.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from sxe._arrays import AxisName, jvp_of_moved, psum, wide
from sxe._backend import Backend, apart
from sxe._rows import cpu, entropy, normalizer, targets
from sxe._rows.normalizer import Normalizer, finite_shift
from sxe._rows.targets import Dense


def normalize_constant(x: Array, backend: Backend) -> Normalizer:
    """The state of rows of constant logits, [..., K] to [...]. It is not differentiable."""
    if backend.uses_row_kernels:
        from sxe._rows import gpu_state  # imported here, because importing Pallas is slow

        return gpu_state.normalize_tile(x, backend)
    twin = cpu if backend.writes_out_comparisons else normalizer
    return twin.normalize_tile(x, backend)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalize(x: Array, backend: Backend) -> Normalizer:
    """The state of rows of logits, [..., K] to [...]."""
    return normalize_constant(x, backend)


@normalize.defjvp
def _normalize_jvp(
    backend: Backend, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Normalizer, Normalizer]:
    (x,), (x_dot,) = primals, tangents
    state = normalize(x, backend)
    shift = apart(finite_shift(state.m), state.r, backend)
    e = jnp.exp(wide(x) - shift[..., None])
    r_dot = jnp.sum(e * wide(x_dot), axis=-1)  # dr/dx_k = e_k, and m is a constant
    return state, Normalizer(jnp.zeros_like(state.m), r_dot)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def gap_sum(x: Array, m: Array, backend: Backend) -> Array:
    """sum_k e_k (m - x_k) over a tile of logits, [..., K] to [...], where m is a constant."""
    return entropy.gap_sum(x, m)


@gap_sum.defjvp
def _gap_sum_jvp(
    backend: Backend, primals: tuple[Array, Array], tangents: tuple[Array, Any]
) -> tuple[Array, Array]:
    (x, m), (x_dot, _) = primals, tangents
    found = gap_sum(x, m, backend)
    shift = apart(finite_shift(m), found, backend)[..., None]
    e, gap = jnp.exp(wide(x) - shift), entropy.bounded_gap(wide(x), shift)
    return found, jnp.sum(e * (gap - 1) * wide(x_dot), axis=-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def dense_cost(t: Array, x: Array, m: Array, log1p_r: Array, backend: Backend) -> Array:
    """sum_k t_k (m - x_k), [..., K] to [...]: inf if t > 0 where x = -inf. 0 log 0 is 0."""
    twin = cpu if backend.writes_out_comparisons else targets
    return twin.dense_cost(t, x, m, log1p_r)


def _dense_cost_jvp(
    backend: Backend, primals: tuple[Array, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    # Skip zero tangents: 0 times an infinite gap would be NaN.
    _, cost_dot = jvp_of_moved(targets.dense_cost, primals, tangents)
    return dense_cost(*primals, backend), cost_dot


dense_cost.defjvp(_dense_cost_jvp, symbolic_zeros=True)


def dense_targets(t: Array, axis_name: AxisName, backend: Backend) -> Dense:
    """``Dense`` targets of all classes or of one shard, with the sum over all shards."""
    twin, given, t = cpu if backend.loops_over_rows else targets, t, wide(t)
    largest, total = lax.stop_gradient(jnp.max(t, axis=-1)), jnp.sum(t, axis=-1)
    rest = twin.sum_without_largest(*lax.stop_gradient((t, largest, total)), backend)
    dense = targets.merge_dense(Dense(t, largest, rest), axis_name)
    total = psum(total, axis_name)
    rest = lax.stop_gradient(dense.rest) + (total - lax.stop_gradient(total))
    return dense._replace(t=given, rest=rest)
