"""The softmax normaliser as a pair (m, r), and the row rule that stands on it.

For logits x_1 .. x_K of one row

    m   = max_k x_k                     e_k = exp(x_k - m)
    r   = sum_k e_k with one maximal element left out, so that 1 + r = sum_k e_k
    lse = m + log1p(r)                  q_k = e_k / (1 + r)

The 1 of the maximum is never added to the rest, so nothing is absorbed: the loss and the gradient
of a confident row, where r is 1e-20, keep their digits. (m, r) is a monoid, and so one state serves
a whole row, a chunk of its classes, and a shard of them on a mesh.

For targets t_k with T = sum_k t_k the row loss and its gradient are

    loss        = sum_k t_k (m - x_k) + T log1p(r)
    d loss/dx_l = (e_l (T - t_l) - t_l ((1 - e_l) + r)) / (1 + r)     = T q_l - t_l, line D7

Each is written once, here, and takes the logits of one tile: all classes of a row or some of them.
Where one target holds nearly all of T, the difference T - t_l would cancel, as 1 - q_l would. So
T - t_l is an argument here, and ``_targets`` sums it from the targets of all other classes.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sxe._axes import LOCAL_CPU, place


class Normalizer(NamedTuple):
    """The state (m, r) of rows of logits, each of shape [...]. The identity is (-inf, -1)."""

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


def wide(x: Array) -> Array:
    """x in the dtype that the losses compute in: float64 stays, all else is float32."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def apart(m: Array, after: Array) -> Array:
    """m, hidden behind a result that was computed with it.

    XLA's CPU backend fuses a sum of exponentials into one pass over x. Where two sums or a sum and
    the gradient share their terms, it writes the terms out instead: an array of the size of x.
    """
    if place(m).platform == "cpu":
        # No derivative passes through what only hides m: JAX 0.12 can't transpose it in a loop.
        m, _ = lax.optimization_barrier((m, lax.stop_gradient(after)))
    return m


def _exp_difference(x: Array, m: Array, scale: float = 1) -> Array:
    """scale exp(x - m), and of the exact difference: float32 rounds one of 80 by up to 4e-6.

    What the rounding lost is Knuth's two-sum; halves, because x - m may overflow.
    """
    a, b = jnp.maximum(x, jnp.finfo(x.dtype).min) / 2, m / 2
    s = a - b
    back = s - a
    lost = (a - (s - back)) - (b + back)
    e = jnp.exp(s)
    return (scale * e) * e * (1 + lax.stop_gradient(2 * lost))


def normalize_tile(x: Array) -> Normalizer:
    """The state of a tile of logits, [..., K] to [...], of which a row of -inf is the identity.

    m is a constant under differentiation. No result depends on the choice of the shift, so that its
    derivative is zero, and r carries all of lse's. JAX may differentiate it as it stands.
    """
    return _normalize_tile(x, _rest_in_one_pass)


def _normalize_tile(x: Array, rest: Callable[[Array, Array, Array], Array]) -> Normalizer:
    x = wide(x)
    m = lax.stop_gradient(jnp.max(x, axis=-1))
    shift = jnp.where(m == -jnp.inf, 0, m)
    total = jnp.sum(jnp.exp(x - shift[..., None]), axis=-1)
    # Below a sum of 1.5 the maximum is alone and every other term below 1/2. From 1.5 on,
    # subtracting 1 costs no digits.
    confident = total < 1.5
    r = jnp.where(confident, rest(x, apart(shift, total), confident), total - 1)
    return Normalizer(m, jnp.where(m == -jnp.inf, -1, r))


def _rest_in_one_pass(x: Array, m: Array, confident: Array, scale: float = 1) -> Array:
    """sum_k exp(x_k - m) over x_k < m, [..., K] to [...], for the confident rows.

    Scaled, terms below the smallest normal number, which would each be 0, add up as well.
    """
    e = _exp_difference(x, m[..., None], scale)
    # Of a maximum 0 is left, with its derivative, and of all others all.
    return jnp.sum(e - scale * jnp.floor(e / scale), axis=-1) / scale


def _rest_if_needed(x: Array, m: Array, confident: Array) -> Array:
    """The same from the second largest logit, in two passes over x, and without a derivative.

    No difference that matters is then large enough to be rounded much, so that none but that of the
    two largest has to be exact. It pays where arithmetic costs more than memory, and a condition
    less than either: on a CPU, with x in its cache, half of the time, and none without such rows.
    """

    def rest() -> Array:
        others = jnp.where(x < m[..., None], x, -jnp.inf)
        second = jnp.max(others, axis=-1)
        shift = jnp.where(second == -jnp.inf, 0, second)
        others_sum = jnp.sum(jnp.exp(others - shift[..., None]), axis=-1)
        return _exp_difference(second, m) * others_sum

    return lax.cond(jnp.any(confident), rest, lambda: jnp.zeros_like(m))


FEW_CLASSES = 16


def _normalize_few(x: Array) -> Normalizer:
    """The state of rows of few classes, class by class, and without a derivative.

    Of two logits the larger goes on as the maximum so far and the smaller is left behind: in the
    end those left behind are all but one maximal element. A CPU takes many rows at a time for that,
    where it would take a row of few classes after the other for a sum.
    """
    m, *others = (wide(x[..., k]) for k in range(x.shape[-1]))
    left = []
    for other in others:
        left.append(jnp.minimum(m, other))
        m = jnp.maximum(m, other)
    second = functools.reduce(jnp.maximum, left)
    shift = jnp.where(second == -jnp.inf, 0, second)
    r = _exp_difference(second, jnp.where(m == -jnp.inf, 0, m)) * sum(
        jnp.exp(smaller - shift) for smaller in left
    )
    # Behind a barrier, or the gradient would have it all computed once more, for each result.
    return Normalizer(*lax.optimization_barrier((m, jnp.where(m == -jnp.inf, -1, r))))


BLOCK_BYTES = 4 * 2**20  # a block of rows in float32; its temporaries stay in a CPU's cache


def part_of(size: int, most: int) -> int:
    """How long the parts of an axis are that may have so many elements at most.

    If possible it divides the axis: a remainder is a second program to compile.
    """
    most = min(size, most)
    return next((n for n in range(most, most // 2, -1) if size % n == 0), most)


def rows_per_block(x: Array) -> int | None:
    """How many rows ``normalize`` takes at a time, or None for all of them at once.

    Blocks pay on a CPU only, where XLA writes out what it can't fuse: for many class counts the
    exponentials, for bfloat16 all logits in float32. A loop over rows that are split over devices
    would gather them, so that several devices, or a mesh of any, rule blocks out.
    """
    known = all(isinstance(n, int) for n in x.shape)
    split = any(axis is not None for axis in jax.typeof(x).sharding.spec)
    if place(x).platform != "cpu" or jax.device_count() > 1 or split or not known:
        return None
    n, most = math.prod(x.shape[:-1]), max(1, BLOCK_BYTES // (4 * x.shape[-1]))
    return part_of(n, most) if n >= 2 * most else None


def normalize_constant(x: Array) -> Normalizer:
    """``normalize`` without a rule for its derivative, of logits that are constants."""
    on_cpu = place(x) == LOCAL_CPU
    K = x.shape[-1]  # of an exported program it may be a symbol
    few = isinstance(K, int) and 2 <= K <= FEW_CLASSES
    # JAX 0.10 compiles it wrongly in a sharded program, at the lowest level of optimization.
    if on_cpu and few and jax.device_count() == 1 and jax.__version_info__ >= (0, 11):
        return _normalize_few(x)
    rest = _rest_if_needed if on_cpu else functools.partial(_rest_in_one_pass, scale=2.0**64)
    tile = functools.partial(_normalize_tile, rest=rest)
    rows = rows_per_block(x)
    if rows is None:
        return tile(x)
    flat = x.reshape(-1, x.shape[-1])
    bits = flat
    if flat.dtype.itemsize == 2 and jax.__version_info__ < (0, 11):
        # In every step of the loop XLA would widen all of flat, not the slice. Integers it can't.
        bits = lax.bitcast_convert_type(flat, jnp.uint16)

    def block(first: Array) -> Normalizer:
        part = lax.dynamic_slice_in_dim(bits, first, rows)
        return tile(lax.bitcast_convert_type(part, flat.dtype))

    # The last block may have rows of the one before it.
    blocks, last = -(-len(flat) // rows), len(flat) - rows
    parts = lax.map(block, jnp.minimum(jnp.arange(blocks) * rows, last))
    twice = blocks * rows - len(flat)

    def join(a: Array) -> Array:
        if twice:
            a = jnp.concatenate([a[:-1].ravel(), a[-1, twice:]])
        return a.reshape(x.shape[:-1])

    return jax.tree.map(join, parts)


@jax.custom_jvp
def normalize(x: Array) -> Normalizer:
    """``normalize_tile`` of logits in any float dtype, in blocks of rows where that is faster."""
    return normalize_constant(x)


@normalize.defjvp
def _normalize_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Normalizer, Normalizer]:
    # The derivative of normalize_tile. JAX's own, of a loop over slices of x, would add up an array
    # of the size of x for every block.
    (x,), (x_dot,) = primals, tangents
    state = normalize(x)
    shift = jnp.where(state.m == -jnp.inf, 0, state.m)
    e = jnp.exp(wide(x) - apart(shift, state.r)[..., None])
    r_dot = jnp.sum(e * wide(x_dot), axis=-1)
    return state, Normalizer(jnp.zeros_like(state.m), r_dot)


def merge_over(state: Normalizer, axis_name: str | tuple[str, ...] | None) -> Normalizer:
    """The state of whole rows from the states of their shards: one max and one sum over a mesh."""
    if axis_name is None:
        return state
    m = lax.pmax(lax.stop_gradient(state.m), axis_name)  # pmax has no derivative, m needs none
    top = state.m == m
    # A shard without the maximum gives all of its terms, one with it all but its own maximum. Every
    # maximum but one is then still to be counted.
    rest = jnp.where(top, state.r, (1 + state.r) * _exp_difference(state.m, m))
    rest, tops = lax.psum((rest, top.astype(rest.dtype)), axis_name)
    return Normalizer(m, rest + (tops - 1))


def row_loss(state: Normalizer, cost: Array, total: Array) -> Array:
    """D0 for one row: cost + T log1p(r), where cost = sum_k t_k (m - x_k)."""
    return cost + total * state.log1p_r


def row_gradient(
    x: Array,
    targets: tuple[Array | None, Array],
    state: Normalizer,
    g: Array,
    g_lse: Array | None = None,
) -> Array:
    """The gradient for a tile of logits x, given the gradients g of the row loss and g_lse of lse.

    ``targets`` are t and T - t. Shapes: x, t and T - t [..., K] or broadcastable to it, all others
    [...]. A t of None is 0.
    """
    t, others = targets
    r = state.r[..., None]
    e = jnp.exp(wide(x) - apart(*state)[..., None])
    g = g[..., None]
    g_lse = None if g_lse is None else g_lse[..., None]
    if t is None:  # D7 without its second term
        d = others * g
        return e * ((d if g_lse is None else d + g_lse) / (1 + r))
    d = (e * others - t * ((1 - e) + r)) * g  # D7 times 1 + r
    return (d if g_lse is None else d + e * g_lse) / (1 + r)
