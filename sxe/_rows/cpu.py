"""The fast twins of row functions for a CPU.

Each has the arguments and the results of its plain twin, and no derivative. Arithmetic costs more
than memory on a CPU, and a condition costs less than either. XLA writes out what it doesn't fuse
there: comparisons, and terms that two sums share.
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
    """In blocks of rows, where rows may be looped over."""
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
    """m, r, and the rows whose r is not known yet, because fewer than ``fewest`` are confident."""
    x = wide(x)  # once, and not again in each pass
    m = jnp.max(x, axis=-1)
    total = jnp.sum(jnp.exp(x - finite_shift(m)[..., None]), axis=-1)
    # Below a sum of 1.5 the maximum is alone and every other term below 1/2. From 1.5 on,
    # subtracting 1 costs no digits.
    confident = (total < 1.5) & (m > -jnp.inf)
    enough = jnp.sum(confident, dtype=jnp.int32) >= fewest
    m_apart = apart(m, total, backend)
    rest = lax.cond(enough, lambda: _rest(x, m_apart), lambda: total)
    return m, _confident(total, rest), confident & ~enough


def _confident(total: Array, rest: Array) -> Array:
    """r of rows, from the sum of all their terms and, of confident ones, that of all but one.

    XLA may compute the logits again for a sum, from what the caller made them of, and round them in
    another way. Then the maximum may be missed, and the rest has all terms. It is at least 1.
    """
    return jnp.where((total < 1.5) & (rest < 0.75), rest, total - 1)


def _rest(x: Array, m: Array) -> Array:
    """sum_k exp(x_k - m) over x_k < m, [..., K] to [...], for confident rows."""
    # The others are measured from the largest of them. No difference that matters is then large
    # enough to be rounded much, but that of the two largest logits.
    others = jnp.where(x < m[..., None], x, -jnp.inf)
    second = jnp.max(others, axis=-1)
    sum_of_others = jnp.sum(jnp.exp(others - finite_shift(second)[..., None]), axis=-1)
    return exp_difference(second, m, SCALE) * sum_of_others / SCALE


def _normalize_in_blocks(x: Array, backend: Backend) -> tuple[Array, Array]:
    """m and r of rows [N, K]. A block with many confident rows takes the rest of all its rows."""
    size = rows_per_block(x.shape, backend)
    bits = bits_of(x, backend)

    def block(first: Array) -> tuple[Array, Array, Array]:
        part = lax.bitcast_convert_type(lax.dynamic_slice_in_dim(bits, first, size), x.dtype)
        return _normalize_block(part, backend, fewest=-(-size // 4))

    # The last block may have rows of the one before it.
    blocks, last = -(-len(x) // size), len(x) - size
    parts = lax.map(block, jnp.minimum(jnp.arange(blocks) * size, last))
    twice = blocks * size - len(x)
    m, r, missing = (
        jnp.concatenate([a[:-1].ravel(), a[-1, twice:]]) if twice else a.ravel() for a in parts
    )
    fill = functools.partial(_fill_rests, x, Normalizer(m, r), missing, backend)
    return m, lax.cond(jnp.any(missing), fill, lambda: r)


def _fill_rests(x: Array, state: Normalizer, missing: Array, backend: Backend) -> Array:
    """r with the rest of the rows where it is missing, a group of these rows at a time.

    So they cost by their number, wherever they are.
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
    """The state of rows that several devices may hold, where no condition may look at all rows."""
    x = wide(x)
    m = jnp.max(x, axis=-1)
    shift = finite_shift(m)
    total = jnp.sum(jnp.exp(x - shift[..., None]), axis=-1)
    e = exp_difference(x, apart(shift, total, backend)[..., None], SCALE)
    # Of a maximal element nothing is left, and of all others all.
    rest = jnp.sum(e - SCALE * jnp.floor(e / SCALE), axis=-1) / SCALE
    return Normalizer(m, jnp.where(m == -jnp.inf, -1, _confident(total, rest)))


def _normalize_few(x: Array) -> Normalizer:
    """The state of rows of few classes, class by class.

    Of two logits the larger one is the maximum so far, and the smaller one is left behind. In the
    end those left behind are all but one maximal element.
    """
    m, *others = (wide(x[..., k]) for k in range(x.shape[-1]))
    left = []
    for other in others:
        left.append(jnp.minimum(m, other))
        m = jnp.maximum(m, other)
    second = functools.reduce(jnp.maximum, left)
    sum_of_left = sum(jnp.exp(smaller - finite_shift(second)) for smaller in left)
    r = exp_difference(second, finite_shift(m), SCALE) * sum_of_left / SCALE
    # Behind a barrier, or the gradient would have it all computed once more for each result.
    return Normalizer(*lax.optimization_barrier((m, jnp.where(m == -jnp.inf, -1, r))))


def dense_cost(t: Array, x: Array, m: Array, log1p_r: Array) -> Array:
    """Without a comparison or a clamp, for which XLA would write out an array as large as x."""
    x, most = x.astype(m.dtype), jnp.finfo(m.dtype).max
    impossible = jnp.minimum(jnp.maximum(x, -most) - x, most)  # where x = -inf, and else 0
    half = jnp.minimum((m / 2)[..., None] - x / 2, most)  # m - x may overflow
    return 2 * jnp.sum(t * half * (1 + impossible), axis=-1)


def sum_without_largest(t: Array, largest: Array, total: Array, backend: Backend) -> Array:
    """By the difference, unless it cancels in some row: two more sums take time."""

    def from_terms() -> Array:
        return targets.sum_without_largest(t, largest, total, backend)

    return lax.cond(jnp.any(total < 1.5 * largest), from_terms, lambda: total - largest)
