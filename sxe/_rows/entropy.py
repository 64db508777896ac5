"""The entropy of a row's softmax: lines E0 and E1 of the derivation, each written once.

With the state (m, r) of a row's logits, e_k = exp(x_k - m), and q_k = e_k / (1 + r):

    E0  H       = log1p(r) + S                  S = sum_k q_k (m - x_k)
    E1  dH/dx_l = q_l ((m - x_l) - S)           = -q_l (log q_l + H)

No term of E0 is negative, so that nothing cancels.
"""

import jax.numpy as jnp
from jax import Array

from sxe._arrays import AxisName, psum, wide
from sxe._rows.normalizer import SCALE, Normalizer, exp_difference, finite_shift

# From this gap on e_k is 0, scaled as in gap_sum, in float32 and in float64.
LARGEST_GAP = 1000.0


def bounded_gap(x: Array, m: Array) -> Array:
    """m - x, which is finite where x is -inf, so that it may meet an e of 0."""
    return jnp.minimum(m - x, LARGEST_GAP)


def gap_sum(x: Array, m: Array, *, scale: float = SCALE) -> Array:
    """sum_k e_k (m - x_k) over the classes of a tile, [..., K] to [...].

    With a scale of 1, JAX may differentiate it as it stands.
    """
    x, shift = wide(x), finite_shift(m)[..., None]
    e = exp_difference(x, shift, scale)
    return jnp.sum(e * bounded_gap(x, shift), axis=-1) / scale


def mean_gap(of_tile: Array, tile: Normalizer, row: Normalizer, axis_name: AxisName) -> Array:
    """S of rows, from the ``gap_sum`` and the state of each shard of their classes."""
    if axis_name is not None:
        # A shard has measured from its own maximum. What all of its classes lack is added.
        lacking = bounded_gap(tile.m, row.m) * (1 + tile.r)
        of_tile = psum(exp_difference(tile.m, finite_shift(row.m)) * (of_tile + lacking), axis_name)
    return of_tile / (1 + row.r)  # NaN where all logits are -inf


def entropy(row: Normalizer, mean_gap: Array) -> Array:
    """E0, [...]."""
    return row.log1p_r + mean_gap


def slope(x: Array, m: Array, mean_gap: Array) -> Array:
    """E1 over q: (m - x_l) - S, for a tile of logits [..., K]."""
    return bounded_gap(x, m[..., None]) - mean_gap[..., None]
