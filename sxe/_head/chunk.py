"""One chunk of rows of the head: logits, results, and the gradients that follow from them.

The logits of a chunk go through the function of rows as any others do. From their gradient the
chain rule of ``projection`` leads to hidden states and kernel. ``chunk_fwd`` does all of that in a
forward pass, ``chunk_bwd`` in a backward pass, which has the results already. ``chunked`` runs them
for all chunks.
"""

import dataclasses
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array

from sxe._arrays import keep, wide_dtype
from sxe._head.loops import in_row_blocks
from sxe._head.path import GradientPath
from sxe._head.projection import Products, Transform, transform, transform_bwd
from sxe._rows.cross_entropy import CrossEntropy
from sxe._rows.gpu_choice import has_gradient_kernel
from sxe._rows.normalizer import has_loss
from sxe._rows.predictions import Ranking, rank
from sxe._rows.rules import RowFunction, Weighed, own_targets, results_and_state
from sxe._rows.targets import Dense, Rows, Targets

T = TypeVar("T")
Sums = tuple[Array, "Shared"]  # the weighted results, and the gradients of what rows share
Chunk = tuple[Array, Rows]  # hidden states [C, D], and the rest of their rows


class Shared(NamedTuple):
    """What all rows share. None: the option is off or, of gradients, not wanted.

    Attributes:
      kernel: [D, K].
      transform: of u to logits.
      dense: what label smoothing adds to each row's targets, with t [1, K] or [1, 1].
      z_loss: a scalar.
    """

    kernel: Any
    transform: Transform
    dense: Dense | None
    z_loss: Array | None


@dataclasses.dataclass(frozen=True)
class Head:
    """How rows go through the head.

    Attributes:
      f: the function of rows.
      products: how hidden states and kernel are multiplied.
      path: where its gradients are computed.
      rule: by which it is differentiated.
      chunk_size: the most rows that a chunk may have, None for the default.
      skips: whether rows that do not count are left out.
      has_weights: whether a row of weight 0 may have no loss.
      predicts: whether the class of each row's largest logit is wanted.
      ranks: whether the number of logits that are larger than the label's is wanted besides.
      chunks: how many chunks the rows are divided into, once their number is known.
      wanted: in a rule, True for what is differentiated of what rows share, of the hidden states,
        and of the rows. No other gradient is computed.
    """

    f: RowFunction
    products: Products
    path: GradientPath
    rule: str
    chunk_size: int | None
    skips: bool
    has_weights: bool
    predicts: bool
    ranks: bool = False
    chunks: int = 1
    wanted: tuple[Any, Any, Any] = (None, None, None)


class Tile(NamedTuple):
    """Some rows on the way through the head, [C, ...].

    Attributes:
      x: the logits. What stands in rows that do not count has no influence.
      u: what they come from, 0 in these rows.
      by: what makes x of u. If rows have a logit_scale of their own, it is 0 in these rows.
      targets: of each row and each class.
      mask: the rows that count, or None where all do.
      late_mask: the mask where x is not masked, so that gradients have to be, and else None.
      ranking: of the logits, or None where it is not wanted.
    """

    x: Array
    u: Array
    by: Transform
    targets: Targets
    mask: Array | None
    late_mask: Array | None
    ranking: Ranking | None


def tile_of(head: Head, shared: Shared, u: Array, rows: Rows, *, by_kernel: bool = False) -> Tile:
    """H1 and H2. Where a row does not count, u and a logit_scale of its own are taken as 0.

    So nothing there is NaN.
    """
    mask, by = rows.mask, _transform_of(shared, rows)
    if head.has_weights and not by_kernel:
        mask = rows.with_loss(has_loss(transform(u, by), head.f.axis_name, head.f.backend))
    kept, kept_by = keep(mask, u), by
    if rows.logit_scale is not None:
        kept_by = by._replace(logit_scale=keep(mask, rows.logit_scale))
    # For a kernel XLA would write a masked copy of u, so that gradients are masked instead. The
    # exception is XLA's gradient for targets that rows share, a sum over all rows.
    masks_late = by_kernel or (head.f.backend.uses_row_kernels and shared.dense is None)
    late_mask = mask if masks_late else None
    x, ranking = transform(kept if late_mask is None else u, kept_by), None
    if head.predicts:
        ranking = rank(x, rows.targets.label if head.ranks else None, head.f.axis_name)
    targets = rows.targets if shared.dense is None else rows.targets._replace(dense=shared.dense)
    return Tile(x, kept, kept_by, targets, mask, late_mask, ranking)


def _transform_of(shared: Shared, rows: Rows) -> Transform:
    """What makes logits of these rows: each may have a logit_scale of its own."""
    if rows.logit_scale is None:
        return shared.transform
    return shared.transform._replace(logit_scale=rows.logit_scale)


def _has_gradient_kernel(head: Head, shared: Shared, rows: Rows) -> bool:
    """Whether one kernel computes the results of rows and the gradient of their logits."""
    f, classes, dtype = head.f, shared.kernel.shape[1], wide_dtype(head.products.dtype)
    dense = rows.targets.dense if shared.dense is None else shared.dense
    dense_dtype = None if dense is None or dense.t.shape[-1] == 1 else dense.t.dtype
    transformed = any(parameter is not None for parameter in _transform_of(shared, rows))
    return (
        f.backend.uses_row_kernels
        and isinstance(f, CrossEntropy)
        and f.axis_name is None
        and rows.targets.sparse is None
        and not transformed
        and has_gradient_kernel(classes, dtype, head.products.gradient_dtype, dense_dtype)
    )


def chunk_fwd(
    head: Head, shared: Shared, sums: Sums, chunk: Chunk, all_run: bool
) -> tuple[Sums, Any]:
    """The results of a chunk and, from its logits on, the gradients of their weighted sum."""
    hidden, rows = zeroed(chunk, all_run)
    if all_run and not runs_weightless(head):
        head = dataclasses.replace(head, has_weights=False)
    u = head.products.u(hidden, shared.kernel, shared.transform.class_mask)  # H0

    def block(sums: Sums, u: Array, rows: Rows) -> tuple[Sums, Array, Any]:
        by_kernel = _has_gradient_kernel(head, shared, rows)
        tile = tile_of(head, shared, u, rows, by_kernel=by_kernel)  # H1, H2
        results_of = _kernel_results if by_kernel else _tile_results
        results, weighed, gradients = results_of(head, shared, tile, rows)  # D0, D7
        d_u, d_shared, d_rows = _tile_bwd(shared, tile, rows, gradients)  # H3 to H5
        d_shared = d_shared._replace(z_loss=weighed.d_z)
        sums = sums[0] + jnp.sum(weighed.value), _add(sums[1], d_shared)
        d_rows = only(head.wanted[2], d_rows._replace(weight=weighed.d_weight))
        return sums, d_u, (tile.mask, results, tile.ranking, d_rows)

    sums, d_u, outputs = in_row_blocks(block, sums, u, rows, backend=head.f.backend)
    mask, *outputs = outputs
    sums, d_hidden = _products_bwd(head, shared, sums, (d_u, keep(mask, hidden)))
    return sums, (keep_rows(mask, d_hidden), *outputs)


def chunk_bwd(
    head: Head, shared: Shared, sums: Sums, chunk: tuple[Chunk, tuple[Any, Any]], all_run: bool
) -> tuple[Sums, Any]:
    """The logits of a chunk again and, from the state and the cotangents g of rows, gradients."""
    (hidden, rows), state_and_g = zeroed(chunk[0], all_run), chunk[1]
    u = head.products.u(hidden, shared.kernel, shared.transform.class_mask)  # H0

    def block(sums: Sums, u: Array, at_rows: Any) -> tuple[Sums, Array, Any]:
        rows, state_and_g = at_rows
        tile = tile_of(head, shared, u, rows)  # H1, H2
        gradients = _tile_gradients(head, tile, *state_and_g)  # D7
        d_u, d_shared, d_rows = _tile_bwd(shared, tile, rows, gradients)  # H3 to H5
        d_targets = own_targets(d_rows.targets, tile.x, head.f.axis_name)
        d_rows = only(head.wanted[2], d_rows._replace(targets=d_targets))
        return (sums[0], _add(sums[1], d_shared)), d_u, (tile.mask, d_rows)

    at_rows = rows, state_and_g
    sums, d_u, (mask, d_rows) = in_row_blocks(block, sums, u, at_rows, backend=head.f.backend)
    sums, d_hidden = _products_bwd(head, shared, sums, (d_u, keep(mask, hidden)))
    return sums, (keep_rows(mask, d_hidden), d_rows)


def zeroed(chunk: Chunk, all_run: bool) -> Chunk:
    """With hidden states of 0 in rows that do not count: a NaN there times a d u of 0 is a NaN.

    That is so in the transpose of a product, too, where a gradient is differentiated again.

    Rows that all have to be run all count. They need no mask, for which XLA's CPU backend would
    write out the masked logits.
    """
    hidden, rows = chunk
    if all_run:
        return hidden, rows._replace(mask=None)
    return keep(rows.mask, hidden), rows


def _tile_results(
    head: Head, shared: Shared, tile: Tile, rows: Rows
) -> tuple[Any, Weighed, tuple[Array, Targets]]:
    """The results of rows, what they add to their sum, and its gradients for logits and targets."""
    results, state = results_and_state(head.f, tile.x, tile.targets)
    results = keep_rows(tile.mask, results)
    weighed = head.f.weigh(results, rows.weight, shared.z_loss)
    return results, weighed, _tile_gradients(head, tile, state, weighed.g)


def _kernel_results(
    head: Head, shared: Shared, tile: Tile, rows: Rows
) -> tuple[Any, Weighed, tuple[Array, Targets]]:
    """``_tile_results`` by one kernel."""
    from sxe._rows import gpu_mean  # Pallas takes a while to import

    found = gpu_mean.forward(
        cast(CrossEntropy, head.f),
        tile.x,
        rows._replace(targets=tile.targets),
        g=rows.weight,
        z_loss=shared.z_loss,
        d_dtype=head.products.gradient_dtype,
    )
    weighed = head.f.weigh(found.results, rows.weight, shared.z_loss)
    return found.results, weighed, (found.d, found.d_targets)


def _tile_gradients(head: Head, tile: Tile, state: Any, g: Any) -> tuple[Array, Targets]:
    """The gradients for logits and targets, from the cotangents of the results."""
    d_x = head.f.gradient(tile.x, tile.targets, state, g)
    d_targets = head.f.target_gradient(tile.x, tile.targets, state, g)
    return keep_rows(tile.late_mask, (d_x, d_targets))


def _tile_bwd(
    shared: Shared, tile: Tile, rows: Rows, gradients: tuple[Array, Targets]
) -> tuple[Array, Shared, Rows]:
    """d u, and the gradients of what rows share and of what each row has."""
    d_x, d_targets = gradients
    d_u, d_transform = transform_bwd(d_x, tile.u, tile.by)
    d_scale = None
    if rows.logit_scale is not None:
        d_scale, d_transform = d_transform.logit_scale, d_transform._replace(logit_scale=None)
    d_shared = Shared(None, d_transform, None, None)
    if shared.dense is not None:
        d_shared = d_shared._replace(dense=d_targets.dense)
        d_targets = d_targets._replace(dense=None)
    return d_u, d_shared, Rows(d_targets, None, None, None, d_scale)


def _products_bwd(
    head: Head, shared: Shared, sums: Sums, d_u_and_hidden: tuple[Array, Array]
) -> tuple[Sums, Array | None]:
    """The sums with d kernel; and d hidden. Where a row does not count, d_u and hidden are 0."""
    (d_u, hidden), (value, d_shared) = d_u_and_hidden, sums
    d_hidden, d_kernel = head.products.backward(  # H6, H7
        d_u,
        hidden,
        shared.kernel,
        shared.transform.class_mask,
        d_kernel=d_shared.kernel,
        want_hidden=head.wanted[1],
    )
    return (value, d_shared._replace(kernel=d_kernel)), d_hidden


def keep_rows(mask: Array | None, results: T) -> T:
    return jax.tree.map(lambda a: keep(mask, a), results)


def _add(sums: T, more: T) -> T:
    """sums + more. None in sums is not wanted, and None in more adds nothing."""

    def add(a: Array | None, b: Any) -> Array | None:
        return a if a is None or b is None else a + b

    return jax.tree.map(add, sums, more, is_leaf=lambda a: a is None)


def runs_weightless(head: Head) -> bool:
    """Whether rows of weight 0 have to be run.

    They add nothing, but where one has a loss, that is its weight's derivative.
    """
    of_rows = head.wanted[2]
    return of_rows is not None and of_rows.weight


def only(wanted: Any, gradients: T) -> T:
    """The gradients that are wanted, and None for all others."""
    return jax.tree.map(
        lambda w, d: d if w else None, wanted, gradients, is_leaf=lambda a: a is None
    )
