"""The head on all rows: a row function of hidden states and a kernel, without the [N, K] logits.

Rows are processed in chunks, so that only the logits of one chunk exist at a time. ``chunk``
computes the gradients from these logits, on one of two paths:

    sums of rows    The weight of each row is known. If the sum is differentiated, the forward pass
                    computes the gradients from a chunk's logits right away, and the backward pass
                    only scales them: 6 N D K FLOPs.
    single rows     The cotangents are known in the backward pass only. It computes the logits of
                    each chunk again: 8 N D K FLOPs.

If some rows do not count, the rows that count are moved to the front. Only these are run: in whole
chunks, and the rows that are left in parts of a chunk.

With rules other than "vjp", all chunks are run, and JAX differentiates one chunk after the other.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from sxe._arrays import are_known, equal_shares, sum_of_shares, vary_like, zeros_like
from sxe._head.chunk import (
    Chunk,
    Head,
    Hidden,
    Logits,
    Projection,
    Shared,
    Sums,
    chunk_bwd,
    chunk_fwd,
    keep_rows,
    only,
    runs_weightless,
    scales_of,
    tile_of,
    us_of,
    zeroed,
)
from sxe._head.loops import over_chunks, tiling
from sxe._head.path import FORWARD
from sxe._head.projection import Products, keep_classes
from sxe._primitives import undivided
from sxe._rows.blocks import in_row_blocks
from sxe._rows.predictions import Ranking
from sxe._rows.rules import RULES, cotangents, instantiate, own_targets, values_and_wanted
from sxe._rows.targets import Rows

T = TypeVar("T")
HiddenRows = tuple[Hidden, ...]  # [N, ...], one per projection


class Outcome(NamedTuple):
    """The results of the head.

    Attributes:
      value: the sum of the rows' weighted results, or None if single rows are requested.
      results: the results of f for each row, [N]. If ``value`` is given, they have no gradient.
      ranking: of the logits of each row, among the classes of this shard, or None.
    """

    value: Array | None
    results: Any
    ranking: Ranking | None


def outcome_of(head: Head, shared: Shared, hidden: HiddenRows, rows: Rows) -> Outcome:
    """Run the head on hidden states [N, D] and their rows, on the head's path, by its rule."""
    n, dtype, backend = hidden[0].states.shape[0], head.products[0].dtype, head.f.backend
    sizes = n, shared.projections[0].kernel.shape[1]
    chunks, _, padding = tiling(*sizes, chunk_size=head.chunk_size, dtype=dtype, backend=backend)
    head = dataclasses.replace(head, chunks=chunks)
    if padding:
        mask = jnp.ones(n, jnp.bool_) if rows.mask is None else rows.mask
        rows = rows._replace(mask=vary_like(mask, rows.weight))
        hidden, rows = jax.tree.map(
            lambda a: jnp.pad(a, ((0, padding),) + ((0, 0),) * (a.ndim - 1)), (hidden, rows)
        )
    if head.path == FORWARD:
        outcome = weighted_sum(head, shared, hidden, rows)
    elif head.rule == "vjp":
        outcome = single_rows(head, shared, hidden, rows)
    else:
        outcome = _results_by_rule(head, shared, hidden, rows)
    if not padding:
        return outcome
    results, ranking = jax.tree.map(lambda a: a[:n], (outcome.results, outcome.ranking))
    return Outcome(outcome.value, results, ranking)


def _runs(head: Head, rows: Rows) -> Array | None:
    """The rows to run, or None for all."""
    # If the number of rows is symbolic, JAX can't tell that a chunk has no more rows than that.
    if not head.skips or rows.mask is None or not are_known(rows.mask.shape[0]):
        return None
    return rows.mask if runs_weightless(head) else rows.mask & (rows.weight != 0)


def _narrow(head: Head, shared: Shared, hidden: HiddenRows) -> tuple[Shared, HiddenRows]:
    """Cast kernels and hidden states to the dtype of their product.

    The arguments are float32 (or float64), so that their gradients are float32 (or float64) too.
    """

    def narrow(x: Any, products: Products) -> Any:
        return None if x is None else x.astype(products.dtype)

    each = list(zip(shared.projections, hidden, head.products, strict=True))
    projections = tuple(by._replace(kernel=narrow(by.kernel, products)) for by, _, products in each)
    hidden = tuple(h._replace(states=narrow(h.states, products)) for _, h, products in each)
    return shared._replace(projections=projections), hidden


def _results(
    head: Head, shared: Shared, hidden: HiddenRows, rows: Rows
) -> tuple[Outcome, Any, Array | None]:
    """The results, the state from which a backward pass starts, and the mask of rows that count.

    The states of class shards are merged after the loop, once for all rows.
    """
    of_all = dataclasses.replace(head, has_weights=False)

    def chunk(
        shared: Shared, none: tuple[()], chunk: Chunk, all_run: bool
    ) -> tuple[tuple[()], Any]:
        hidden, rows = zeroed(chunk, all_run)

        def block(none: tuple[()], us: Logits, at_rows: Any) -> tuple[tuple[()], Any, Any]:
            tile = tile_of(of_all, shared, us, at_rows)
            nothing = tuple(None for _ in us)
            return none, nothing, (head.f.tile(tile.x, tile.targets), tile.ranking)

        us, at_rows = us_of(head, shared, hidden), (scales_of(hidden), rows)
        return none, in_row_blocks(block, none, us, at_rows, backend=head.f.backend)[2]

    arrays = shared, (), (hidden, rows)
    _, (parts, ranking) = over_chunks(chunk, arrays, head.chunks, runs=_runs(head, rows))
    results, state = head.f.merge(parts, rows.targets)
    mask = rows.mask
    if head.has_weights:
        mask = rows.with_loss(state.has_softmax & ~jnp.isinf(results[0]))
    return Outcome(None, keep_rows(mask, results), ranking), keep_rows(mask, state), mask


def _results_by_rule(head: Head, shared: Shared, hidden: HiddenRows, rows: Rows) -> Outcome:
    """The results of single rows, by one of the rules for logits, differentiated by JAX.

    All chunks are run.
    """

    def chunk(
        shared: Shared, none: tuple[()], chunk: Chunk, all_run: bool
    ) -> tuple[tuple[()], Outcome]:
        hidden, rows = zeroed(chunk, all_run)
        tile = tile_of(head, shared, us_of(head, shared, hidden), (scales_of(hidden), rows))
        results = RULES[head.rule](head.f, tile.x, tile.targets)
        return none, Outcome(None, keep_rows(tile.mask, results), tile.ranking)

    # Multiply in float32 (or float64), which represents narrower operands exactly. In a narrower
    # dtype JAX would round the gradient of the kernel in every chunk.
    shared = shared._replace(projections=tuple(map(_possible_classes, shared.projections)))
    products = tuple(
        dataclasses.replace(each, dtype=h.states.dtype)
        for each, h in zip(head.products, hidden, strict=True)
    )
    head = dataclasses.replace(head, products=products)
    return over_chunks(chunk, (shared, (), (hidden, rows)), head.chunks)[1]


def _possible_classes(by: Projection) -> Projection:
    """The projection with 0 for masked classes in the kernel, so the product needs no mask."""
    if by.kernel is None:
        return by
    return by._replace(kernel=keep_classes(by.transform.class_mask, by.kernel))


def _mapped_like(like: Array, x: T) -> T:
    """x, which jax.vmap maps wherever it maps ``like``: a scalar, or one number per row, as in x.

    The forward pass of a rule is a single call, of which jax.vmap maps every result or none. So a
    function with a rule has to return results of which the same holds. XLA removes the select.
    """
    return jax.tree.map(lambda a: jnp.where(like == 0, a, a), x)


def _zero_sums(head: Head, shared: Shared, rows: Rows) -> Sums:
    zeros = jax.tree.map(lambda a: zeros_like(a, a.shape), shared)
    return zeros_like(rows.weight, ()), only(head.wanted[0], zeros)


# Sums of rows: the gradients are computed in the forward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sum(head: Head, shared: Shared, hidden: HiddenRows, rows: Rows) -> Outcome:
    """The sum of the rows' weighted results, and the results, which have no gradient here."""
    outcome, _, _ = _results(head, *_narrow(head, shared, hidden), rows)
    value = jnp.sum(head.f.weigh(outcome.results, rows.weight, shared.z_loss).value)
    return Outcome(value, *_mapped_like(value, (outcome.results, outcome.ranking)))


def _sums_fwd(head: Head, shared: Shared, hidden: HiddenRows, rows: Rows) -> tuple[Sums, Any]:
    chunk = functools.partial(chunk_fwd, head)
    arrays = shared, _zero_sums(head, shared, rows), (hidden, rows)
    return over_chunks(chunk, arrays, head.chunks, runs=_runs(head, rows))


def _weighted_sum_fwd(
    head: Head, shared_primals: Shared, hidden_primal: Any, rows_primals: Rows
) -> tuple[Outcome, Any]:
    (shared, hidden, rows), wanted = values_and_wanted(shared_primals, hidden_primal, rows_primals)
    head = dataclasses.replace(head, wanted=wanted)
    shared, hidden = _narrow(head, shared, hidden)
    sums, outputs = undivided(functools.partial(_sums_fwd, head), shared, hidden, rows)
    (value, d_shared), (results, ranking, (d_hidden, d_rows)) = sums, outputs
    res = jax.tree.map(
        lambda w, d: d if w else jnp.zeros((0,)),
        wanted,
        (d_shared, d_hidden, d_rows),
        is_leaf=lambda a: a is None,
    )
    return Outcome(value, results, ranking), res


def _weighted_sum_bwd(head: Head, res: Any, g: Outcome) -> tuple[Shared, Any, Rows]:
    d_shared, d_hidden, d_rows = jax.tree.map(lambda d: None if d.shape == (0,) else d, res)
    axis_name = head.f.axis_name
    g_sum = sum_of_shares(instantiate(g.value), axis_name)
    d_shared, d_hidden, d_rows = jax.tree.map(lambda a: g_sum * a, (d_shared, d_hidden, d_rows))
    d_z = res[0].z_loss  # a sum of lse^2, which may be infinite where the loss is finite
    if d_shared.z_loss is not None:
        g_own = equal_shares(g_sum, axis_name)
        d_shared = d_shared._replace(z_loss=jnp.where(g_own == 0, 0, g_own * d_z))
    # A class shard has its own part of the gradients of hidden states, kernel and targets [N, K].
    # Other targets and the weights have the same gradient on all shards. Each shard returns an
    # equal share of it.
    d_targets = own_targets(d_rows.targets, 2, axis_name)
    d_weight = equal_shares(d_rows.weight, axis_name)
    return d_shared, d_hidden, d_rows._replace(targets=d_targets, weight=d_weight)


weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)


# Single rows: the logits are computed again in the backward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def single_rows(head: Head, shared: Shared, hidden: HiddenRows, rows: Rows) -> Outcome:
    """The results of each row."""
    outcome, _, _ = _results(head, *_narrow(head, shared, hidden), rows)
    for like in (outcome.results[0], rows.weight, shared.z_loss):
        outcome = outcome if like is None else _mapped_like(like, outcome)
    return outcome


def _single_rows_fwd(
    head: Head, shared_primals: Shared, hidden_primal: Any, rows_primals: Rows
) -> tuple[Outcome, Any]:
    (shared, hidden, rows), wanted = values_and_wanted(shared_primals, hidden_primal, rows_primals)
    shared, hidden = _narrow(head, shared, hidden)
    results = functools.partial(_results, dataclasses.replace(head, wanted=wanted))
    outcome, state, mask = undivided(results, shared, hidden, rows)
    # The flags become arrays, because residuals may not be Python values.
    flags = jax.tree.map(lambda w: jnp.zeros((int(w),)), wanted)
    return outcome, (shared, hidden, rows._replace(mask=mask), state, flags)


def _single_rows_bwd(head: Head, res: Any, g: Outcome) -> tuple[Shared, Any, Rows]:
    shared, hidden, rows, state, flags = res
    # The mask already excludes rows without a loss, so has_weights is off.
    wanted = jax.tree.map(lambda w: w.size > 0, flags)
    head = dataclasses.replace(head, wanted=wanted, predicts=False, has_weights=False)
    g_results = sum_of_shares(cotangents(g.results), head.f.axis_name)
    chunk = functools.partial(chunk_bwd, head)
    arrays = shared, _zero_sums(head, shared, rows), ((hidden, rows), (state, g_results))
    sums, outputs = over_chunks(chunk, arrays, head.chunks, runs=_runs(head, rows))
    return sums[1], *outputs


single_rows.defvjp(_single_rows_fwd, _single_rows_bwd, symbolic_zeros=True)
