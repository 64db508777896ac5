"""The entropy of a row's softmax: lines E0 and E1 of the derivation.

With the state (m, r) of a row's logits, e_k = exp(x_k - m), and q_k = e_k / (1 + r):

    E0  H       = log1p(r) + S                  S = sum_k q_k (m - x_k)
    E1  dH/dx_l = q_l ((m - x_l) - S)           = -q_l (log q_l + H)

No term of E0 is negative, so nothing cancels.
"""

import jax.numpy as jnp
from jax import Array

from sxe._arrays import AxisName, psum, wide
from sxe._rows.normalizer import SCALE, Normalizer, exp_difference, finite_shift

# For gaps m - x of this size or larger, the scaled e_k of gap_sum is 0, in float32 and float64.
LARGEST_GAP = 1000.0


def bounded_gap(x: Array, m: Array) -> Array:
    """m - x, bounded so that e (m - x) is 0, not NaN, where x is -inf and e is 0."""
    return jnp.minimum(m - x, LARGEST_GAP)


def gap_sum(x: Array, m: Array, *, scale: float = SCALE) -> Array:
    """sum_k e_k (m - x_k) over the classes of a tile, [..., K] to [...].

    With scale=1, JAX can differentiate this function.
    """
    x, shift = wide(x), finite_shift(m)[..., None]
    e = exp_difference(x, shift, scale)
    return jnp.sum(e * bounded_gap(x, shift), axis=-1) / scale


def mean_gap(of_tile: Array, tile: Normalizer, row: Normalizer, axis_name: AxisName) -> Array:
    """S of each row, from the ``gap_sum`` and the state of each shard of its classes."""
    if axis_name is not None:
        # Each shard measured the gaps from its own maximum. Add its distance to the row's maximum.
        lacking = bounded_gap(tile.m, row.m) * (1 + tile.r)
        of_tile = psum(exp_difference(tile.m, finite_shift(row.m)) * (of_tile + lacking), axis_name)
    return of_tile / (1 + row.r)  # NaN where all logits are -inf


def entropy(row: Normalizer, mean_gap: Array) -> Array:
    """E0, [...]."""
    return row.log1p_r + mean_gap


def slope(x: Array, m: Array, mean_gap: Array) -> Array:
    """(m - x_l) - S, which is E1 divided by q_l, for a tile of logits [..., K]."""
    return bounded_gap(x, m[..., None]) - mean_gap[..., None]
