"""The CPU implementations of functions of rows.

Each has the same arguments and results as the plain implementation of the same name, and has no
derivative. On a CPU, arithmetic takes more time than memory access, and ``lax.cond`` takes less
than either. XLA's CPU backend writes to memory what it doesn't fuse: comparisons, and terms that
two sums share.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax

from sxe._arrays import are_known, wide
from sxe._backend import Backend, apart, bits_of
from sxe._rows import targets
from sxe._rows.blocks import rows_per_block
from sxe._rows.normalizer import SCALE, Normalizer, exp_difference, finite_shift

FEW_CLASSES = 16


def normalize_tile(x: Array, backend: Backend) -> Normalizer:
    """The state of a tile of logits, computed in blocks of rows where the backend allows a loop."""
    if not backend.loops_over_rows:
        return _normalize_all(x, backend)
    known = are_known(*x.shape)
    if known and backend.takes_few_classes_one_by_one and 2 <= x.shape[-1] <= FEW_CLASSES:
        return _normalize_few(x)
    flat = x.reshape(-1, x.shape[-1]) if known and x.size else None
    if flat is not None and len(flat) >= 2 * rows_per_block(flat.shape, backend):
        m, r = _normalize_in_blocks(flat, backend)
    else:
        m, r, _ = _normalize_block(x, backend, fewest=1)
    r = jnp.where(m == -jnp.inf, -1, r)
    return Normalizer(m.reshape(x.shape[:-1]), r.reshape(x.shape[:-1]))


def _normalize_block(x: Array, backend: Backend, *, fewest: int) -> tuple[Array, Array, Array]:
    """m, r, and the rows whose r is still missing.

    The sums for confident rows are computed only if at least ``fewest`` rows are confident.
    Otherwise the r of confident rows is missing.
    """
    x = wide(x)  # cast once, not in each pass
    m = jnp.max(x, axis=-1)
    total = jnp.sum(jnp.exp(x - finite_shift(m)[..., None]), axis=-1)
    # If the sum is below 1.5, there is one maximum and every other term is below 1/2. If it is 1.5
    # or more, subtracting 1 loses no precision.
    confident = (total < 1.5) & (m > -jnp.inf)
    enough = jnp.sum(confident, dtype=jnp.int32) >= fewest
    m_apart = apart(m, total, backend)
    rest = lax.cond(enough, lambda: _rest(x, m_apart), lambda: total)
    return m, _confident(total, rest), confident & ~enough


def _confident(total: Array, rest: Array) -> Array:
    """r, from the sum of all terms and, for confident rows, the sum without the largest term.

    XLA may recompute the logits for a sum, from the caller's inputs, and round them differently.
    Then ``rest`` may include the maximum by mistake. In this case it is at least 1.
    """
    return jnp.where((total < 1.5) & (rest < 0.75), rest, total - 1)


def _rest(x: Array, m: Array) -> Array:
    """sum_k exp(x_k - m) over x_k < m, [..., K] to [...], for confident rows."""
    # Subtract the second largest logit from all others. Then no difference that matters is large
    # enough for a large rounding error, except the difference of the two largest logits.
    others = jnp.where(x < m[..., None], x, -jnp.inf)
    second = jnp.max(others, axis=-1)
    sum_of_others = jnp.sum(jnp.exp(others - finite_shift(second)[..., None]), axis=-1)
    return exp_difference(second, m, SCALE) * sum_of_others / SCALE


def _normalize_in_blocks(x: Array, backend: Backend) -> tuple[Array, Array]:
    """m and r of rows [N, K]. A block with many confident rows computes ``_rest`` for each row."""
    size = rows_per_block(x.shape, backend)
    bits = bits_of(x, backend)

    def block(first: Array) -> tuple[Array, Array, Array]:
        part = lax.bitcast_convert_type(lax.dynamic_slice_in_dim(bits, first, size), x.dtype)
        return _normalize_block(part, backend, fewest=-(-size // 4))

    # The last block may overlap the block before it.
    blocks, last = -(-len(x) // size), len(x) - size
    parts = lax.map(block, jnp.minimum(jnp.arange(blocks) * size, last))
    twice = blocks * size - len(x)
    m, r, missing = (
        jnp.concatenate([a[:-1].ravel(), a[-1, twice:]]) if twice else a.ravel() for a in parts
    )
    fill = functools.partial(_fill_rests, x, Normalizer(m, r), missing, backend)
    return m, lax.cond(jnp.any(missing), fill, lambda: r)


def _fill_rests(x: Array, state: Normalizer, missing: Array, backend: Backend) -> Array:
    """r, with the missing rows filled in.

    The missing rows are gathered in groups, so that the time depends only on their number.
    """
    group = min(len(x), max(1, backend.row_group_bytes // (4 * x.shape[-1])))
    bits = bits_of(x, backend)
    rank = jnp.cumsum(missing, dtype=jnp.int32) - 1  # among the rows where r is missing
    slots = -(-len(x) // group) * group
    row = jnp.zeros(slots, jnp.int32)
    at = jnp.where(missing, rank, slots)
    row = row.at[at].set(jnp.arange(len(x), dtype=jnp.int32), mode="drop")

    def of_group(i: Array, rests: Array) -> Array:
        rows = lax.dynamic_slice_in_dim(row, i * group, group)
        part = bits.at[rows].get(mode="promise_in_bounds")
        part = wide(lax.bitcast_convert_type(part, x.dtype))
        rest = _rest(part, state.m.at[rows].get(mode="promise_in_bounds"))
        return lax.dynamic_update_slice_in_dim(rests, rest, i * group, 0)

    groups = (rank[-1] + group) // group
    rests = lax.fori_loop(0, groups, of_group, jnp.zeros(slots, state.r.dtype))
    return jnp.where(missing, _confident(1 + state.r, rests[jnp.maximum(rank, 0)]), state.r)


def _normalize_all(x: Array, backend: Backend) -> Normalizer:
    """The state of rows that may be sharded over devices, without ``lax.cond`` on all rows."""
    x = wide(x)
    m = jnp.max(x, axis=-1)
    shift = finite_shift(m)
    total = jnp.sum(jnp.exp(x - shift[..., None]), axis=-1)
    e = exp_difference(x, apart(shift, total, backend)[..., None], SCALE)
    # Each term is 0 at the maximum, where e = SCALE, and e elsewhere.
    rest = jnp.sum(e - SCALE * jnp.floor(e / SCALE), axis=-1) / SCALE
    return Normalizer(m, jnp.where(m == -jnp.inf, -1, _confident(total, rest)))


def _normalize_few(x: Array) -> Normalizer:
    """The state of rows with few classes, computed class by class.

    Each step compares the maximum so far with the next logit. The larger one is the new maximum,
    and the smaller one goes into ``left``. In the end ``left`` has all logits except one maximum.
    """
    m, *others = (wide(x[..., k]) for k in range(x.shape[-1]))
    left = []
    for other in others:
        left.append(jnp.minimum(m, other))
        m = jnp.maximum(m, other)
    second = functools.reduce(jnp.maximum, left)
    sum_of_left = sum(jnp.exp(smaller - finite_shift(second)) for smaller in left)
    r = exp_difference(second, finite_shift(m), SCALE) * sum_of_left / SCALE
    # Without the barrier, XLA would recompute all of this for each result in the gradient.
    return Normalizer(*lax.optimization_barrier((m, jnp.where(m == -jnp.inf, -1, r))))


def dense_cost(t: Array, x: Array, m: Array, log1p_r: Array) -> Array:
    """sum_k t_k (m - x_k) without a comparison or a clamp.

    For these XLA would write an array as large as x to memory.
    """
    x, most = x.astype(m.dtype), jnp.finfo(m.dtype).max
    impossible = jnp.minimum(jnp.maximum(x, -most) - x, most)  # most where x = -inf, 0 elsewhere
    half = jnp.minimum((m / 2)[..., None] - x / 2, most)  # m - x may overflow
    return 2 * jnp.sum(t * half * (1 + impossible), axis=-1)


def sum_without_largest(t: Array, largest: Array, total: Array, backend: Backend) -> Array:
    """total - largest, or two more sums if this difference cancels in some row."""

    def from_terms() -> Array:
        return targets.sum_without_largest(t, largest, total, backend)

    return lax.cond(jnp.any(total < 1.5 * largest), from_terms, lambda: total - largest)
