"""The head (the fused final linear layer and loss) on one chunk of rows.

A row function, such as ``CrossEntropy``, computes the results from the chunk's logits, and the
gradients of the logits. The chain rule of ``projection`` turns these into the gradients of hidden
states and kernel. ``chunk_fwd`` computes results and gradients in a forward pass. ``chunk_bwd``
computes the gradients in a backward pass, after the results. ``chunked`` loops over the chunks.

H0 to H7 are the formulas of ``projection``: H0 is u = hidden @ kernel, and H1 and H2 turn u into
logits. D0 and D7 are lines of ``sxe.derivation``. d u is the gradient of u.
"""

import dataclasses
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array

from sxe._arrays import keep, wide_dtype
from sxe._head.path import GradientPath
from sxe._head.projection import Products, Transform, transform, transform_bwd
from sxe._rows.blocks import in_row_blocks
from sxe._rows.cross_entropy import CrossEntropy
from sxe._rows.gpu_choice import has_gradient_kernel
from sxe._rows.normalizer import has_softmax
from sxe._rows.predictions import Ranking, rank
from sxe._rows.rules import RowFunction, Weighed, own_targets, results_and_state
from sxe._rows.targets import Dense, Rows

T = TypeVar("T")
Sums = tuple[Array, "Shared"]  # the sum of weighted results; gradients of the shared parameters
Logits = tuple[Array, ...]  # [C, K], one per projection


class Projection(NamedTuple):
    """The parameters that turn hidden states into logits, shared by all rows.

    In a projection of gradients, None marks a gradient that is not computed.

    Attributes:
      kernel: [D, K], or None if the hidden states [..., K] are u already.
      transform: the parameters of H1 and H2.
    """

    kernel: Any
    transform: Transform


class Hidden(NamedTuple):
    """The arrays of one projection that have an entry for each row.

    Attributes:
      states: [..., D].
      logit_scale: [...], one factor per row of states @ kernel, or None if all rows share it.
    """

    states: Any
    logit_scale: Any


class Shared(NamedTuple):
    """The parameters that all rows share.

    None means that the option is off or, for a gradient, that it is not computed.

    Attributes:
      projections: the model's and, if the targets are logits of a projection, the target's.
      dense: the part of the targets that comes from label smoothing, with t [1, K] or [1, 1].
      z_loss: a scalar.
    """

    projections: tuple[Projection, ...]
    dense: Dense | None
    z_loss: Array | None


Chunk = tuple[tuple[Hidden, ...], Rows]  # a block of rows, [C, ...]


@dataclasses.dataclass(frozen=True)
class Head:
    """The static options of the head.

    Attributes:
      f: the row function.
      products: how matrix products are computed, one entry per projection.
      path: in which pass the gradients are computed.
      rule: the differentiation rule, "vjp", "jvp" or "autodiff".
      chunk_size: the largest number of rows in a chunk, or None for the default.
      skips: whether to skip rows that do not count: masked out, ignored, or of weight 0.
      has_weights: whether there are row weights. A row of weight 0 may have no finite loss.
      predicts: whether to compute the class of the largest logit of each row.
      ranks: whether to count, in addition, the logits that are larger than the label's.
      chunks: the number of chunks, set once the number of rows is known.
      wanted: set in a rule: pytrees like the shared parameters, the hidden states and the rows,
        with True for each array that is differentiated. No other gradient is computed.
    """

    f: RowFunction
    products: tuple[Products, ...]
    path: GradientPath
    rule: str
    chunk_size: int | None
    skips: bool
    has_weights: bool
    predicts: bool
    ranks: bool = False
    chunks: int = 1
    wanted: tuple[Any, Any, Any] = (None, None, None)

    def wants(self, projection: int) -> bool:
        """Whether any gradient of this projection or of its hidden states is requested."""
        shared, hidden, _ = self.wanted
        return any(jax.tree.leaves((shared.projections[projection], hidden[projection])))


class Tile(NamedTuple):
    """A block of rows on the way through the head, [C, ...].

    Attributes:
      x: the logits. Their values in rows that do not count have no influence.
      targets: the targets of the row function, or the target's logits.
      us: u of each projection, [C, K], with 0 in rows that do not count.
      by: the transform of each projection. A per-row logit_scale is 0 in rows that do not count.
      mask: the rows that count, or None if all do.
      late_mask: the mask to apply to the gradients, if it was not applied to x; otherwise None.
      ranking: of the logits, or None if it is not requested.
    """

    x: Array
    targets: Any
    us: Logits
    by: tuple[Transform, ...]
    mask: Array | None
    late_mask: Array | None
    ranking: Ranking | None


def us_of(head: Head, shared: Shared, hidden: tuple[Hidden, ...]) -> Logits:
    """H0 for each projection."""
    parts = zip(head.products, hidden, shared.projections, strict=True)
    return tuple(
        products.u(of_rows.states, by.kernel, by.transform.class_mask)
        for products, of_rows, by in parts
    )


def scales_of(hidden: tuple[Hidden, ...]) -> tuple[Array | None, ...]:
    return tuple(of_rows.logit_scale for of_rows in hidden)


def tile_of(
    head: Head, shared: Shared, us: Logits, scales_and_rows: Any, *, by_kernel: bool = False
) -> Tile:
    """Apply H1 and H2. In rows that do not count, set u and a per-row logit_scale to 0.

    So a NaN in these rows does not reach the gradients of shared parameters.
    """
    scales, rows = scales_and_rows
    mask, by = rows.mask, _transforms(shared, scales)
    if head.has_weights and not by_kernel:
        xs = tuple(transform(u, each) for u, each in zip(us, by, strict=True))
        of_f = head.f.axis_name, head.f.backend
        is_infinite = head.f.is_infinite(xs[0], _targets(shared, rows, xs))
        has_loss = has_softmax(xs[0], *of_f, unless=is_infinite)
        for x in xs[1:]:
            has_loss &= has_softmax(x, *of_f)
        mask = rows.with_loss(has_loss)
    kept = keep_rows(mask, us)
    kept_by = _transforms(shared, keep_rows(mask, scales))
    # For a GPU kernel, XLA would write out a masked copy of u. So mask the gradients instead. But
    # if XLA computes the gradient for targets that all rows share, it sums over rows: mask u then.
    masks_late = by_kernel or (head.f.backend.uses_row_kernels and shared.dense is None)
    late_mask = mask if masks_late else None
    if late_mask is not None:
        xs = tuple(transform(u, each) for u, each in zip(us, kept_by, strict=True))
    else:
        parts = zip(kept, kept_by, strict=True)
        xs = tuple(_kept_transform(mask, u, each) for u, each in parts)
    ranking = None
    if head.predicts:
        ranking = rank(xs[0], rows.targets.label if head.ranks else None, head.f.axis_name)
    targets = _targets(shared, rows, xs)
    return Tile(xs[0], targets, kept, kept_by, mask, late_mask, ranking)


def _kept_transform(mask: Array | None, u: Array, by: Transform) -> Array:
    """The logits of u, where u is 0 in rows that do not count. There, all logits are finite."""
    x = transform(u, by)
    # A bias of -inf, or a class that is masked, would make the loss of such a row infinite.
    return x if by.bias is None and by.class_mask is None else keep(mask, x)


def _targets(shared: Shared, rows: Rows, xs: tuple[Array, ...]) -> Any:
    """The targets of the row function: those of the rows, or the target's logits."""
    if len(xs) == 2:
        return xs[1]
    return rows.targets if shared.dense is None else rows.targets._replace(dense=shared.dense)


def _transforms(shared: Shared, scales: tuple[Array | None, ...]) -> tuple[Transform, ...]:
    """The transform of each projection, with the per-row logit_scale if there is one."""
    return tuple(
        by.transform if scale is None else by.transform._replace(logit_scale=scale)
        for by, scale in zip(shared.projections, scales, strict=True)
    )


def _has_gradient_kernel(head: Head, shared: Shared, scales_and_rows: Any) -> bool:
    """Whether a single GPU kernel computes the rows' results and the gradient of their logits."""
    f, (scales, rows) = head.f, scales_and_rows
    if not f.backend.uses_row_kernels or not isinstance(f, CrossEntropy):
        return False
    (products,), (projection,) = head.products, shared.projections
    (by,) = _transforms(shared, scales)
    classes, dtype = projection.kernel.shape[1], wide_dtype(products.dtype)
    dense = rows.targets.dense if shared.dense is None else shared.dense
    dense_dtype = None if dense is None or dense.t.shape[-1] == 1 else dense.t.dtype
    transformed = any(parameter is not None for parameter in by)
    return (
        f.axis_name is None
        and rows.targets.sparse is None
        and not transformed
        and has_gradient_kernel(classes, dtype, products.gradient_dtype, dense_dtype)
    )


def chunk_fwd(
    head: Head, shared: Shared, sums: Sums, chunk: Chunk, all_run: bool
) -> tuple[Sums, Any]:
    """Compute a chunk's logits and results, and the gradients of the weighted sum of the results.

    ``all_run`` is True if the chunk has only rows to run.
    """
    hidden, rows = zeroed(chunk, all_run)
    if all_run and not runs_weightless(head):
        head = dataclasses.replace(head, has_weights=False)
    us = us_of(head, shared, hidden)  # H0

    def block(sums: Sums, us: Logits, at_rows: Any) -> tuple[Sums, Any, Any]:
        by_kernel = _has_gradient_kernel(head, shared, at_rows)
        tile, rows = tile_of(head, shared, us, at_rows, by_kernel=by_kernel), at_rows[1]  # H1, H2
        results_of = _kernel_results if by_kernel else _tile_results
        results, weighed, gradients = results_of(head, shared, tile, rows)  # D0, D7
        d_us, d_shared, d_scales, d_targets = _tile_bwd(head, shared, tile, gradients)  # H3 to H5
        d_shared = d_shared._replace(z_loss=weighed.d_z)
        sums = sums[0] + jnp.sum(weighed.value), _add(sums[1], d_shared)
        d_rows = only(head.wanted[2], Rows(d_targets, weighed.d_weight, None, None))
        return sums, d_us, (tile.mask, (results, tile.ranking), (d_scales, d_rows))

    at_rows = scales_of(hidden), rows
    sums, d_us, outputs = in_row_blocks(block, sums, us, at_rows, backend=head.f.backend)
    mask, outcome, (d_scales, d_rows) = outputs
    sums, d_states = _products_bwd(head, shared, sums, (d_us, keep_rows(mask, hidden)))
    return sums, (*outcome, (_d_hidden(mask, d_states, d_scales), d_rows))


def chunk_bwd(
    head: Head, shared: Shared, sums: Sums, chunk: tuple[Chunk, tuple[Any, Any]], all_run: bool
) -> tuple[Sums, Any]:
    """Compute a chunk's logits again, and its gradients from the state and cotangents of rows."""
    (hidden, rows), state_and_g = zeroed(chunk[0], all_run), chunk[1]
    us = us_of(head, shared, hidden)  # H0

    def block(sums: Sums, us: Logits, at_rows: Any) -> tuple[Sums, Any, Any]:
        scales_and_rows, state_and_g = at_rows
        tile = tile_of(head, shared, us, scales_and_rows)  # H1, H2
        gradients = _tile_gradients(head, tile, *state_and_g)  # D7
        d_us, d_shared, d_scales, d_targets = _tile_bwd(head, shared, tile, gradients)  # H3 to H5
        d_targets = own_targets(d_targets, tile.x.ndim, head.f.axis_name)
        d_rows = only(head.wanted[2], Rows(d_targets, None, None, None))
        return (sums[0], _add(sums[1], d_shared)), d_us, (tile.mask, d_scales, d_rows)

    at_rows = (scales_of(hidden), rows), state_and_g
    sums, d_us, outputs = in_row_blocks(block, sums, us, at_rows, backend=head.f.backend)
    mask, d_scales, d_rows = outputs
    sums, d_states = _products_bwd(head, shared, sums, (d_us, keep_rows(mask, hidden)))
    return sums, (_d_hidden(mask, d_states, d_scales), d_rows)


def zeroed(chunk: Chunk, all_run: bool) -> Chunk:
    """Set the hidden states to 0 in rows that do not count.

    Otherwise a NaN in the hidden states times a d u of 0 would be NaN, in the gradient of the
    kernel and when a gradient is differentiated again.

    If ``all_run`` is True, the mask is True in all rows. It is dropped then, because XLA's CPU
    backend would write out the masked logits.
    """
    hidden, rows = chunk
    if all_run:
        return hidden, rows._replace(mask=None)
    return tuple(h._replace(states=keep(rows.mask, h.states)) for h in hidden), rows


def _tile_results(
    head: Head, shared: Shared, tile: Tile, rows: Rows
) -> tuple[Any, Weighed, tuple[Array, Any]]:
    """The results of rows, their terms in the sum, and the sum's gradients for logits, targets."""
    results, state = results_and_state(head.f, tile.x, tile.targets)
    results = keep_rows(tile.mask, results)
    weighed = head.f.weigh(results, rows.weight, shared.z_loss)
    return results, weighed, _tile_gradients(head, tile, state, weighed.g)


def _kernel_results(
    head: Head, shared: Shared, tile: Tile, rows: Rows
) -> tuple[Any, Weighed, tuple[Array, Any]]:
    """The same as ``_tile_results``, by a single GPU kernel."""
    from sxe._rows import gpu_mean  # here, because importing Pallas takes long

    found = gpu_mean.forward(
        cast(CrossEntropy, head.f),
        tile.x,
        rows._replace(targets=tile.targets),
        g=rows.weight,
        z_loss=shared.z_loss,
        d_dtype=head.products[0].gradient_dtype,
    )
    weighed = head.f.weigh(found.results, rows.weight, shared.z_loss)
    return found.results, weighed, (found.d, found.d_targets)


def _tile_gradients(head: Head, tile: Tile, state: Any, g: Any) -> tuple[Array, Any]:
    """The gradients for logits and targets, from the cotangents g of the results."""
    d_x = head.f.gradient(tile.x, tile.targets, state, g)
    d_targets = head.f.target_gradient(tile.x, tile.targets, state, g)
    return keep_rows(tile.late_mask, (d_x, d_targets))


def _tile_bwd(
    head: Head, shared: Shared, tile: Tile, gradients: tuple[Array, Any]
) -> tuple[tuple[Array | None, ...], Shared, tuple[Array | None, ...], Any]:
    """d u of each projection, and the gradients of shared parameters, row scales and targets."""
    d_x, d_targets = gradients
    d_logits: tuple[Array, ...] = (d_x,)
    if len(tile.us) == 2:
        d_logits, d_targets = (d_x, d_targets), None
    d_us, d_scales, d_projections = [], [], []
    for i, (d, u, by) in enumerate(zip(d_logits, tile.us, tile.by, strict=True)):
        d_u, d_scale, d_transform = None, None, Transform(None, None, None)
        if head.wants(i):
            d_u, d_transform = transform_bwd(d, u, by)
        if shared.projections[i].transform.logit_scale is None:
            d_scale, d_transform = d_transform.logit_scale, d_transform._replace(logit_scale=None)
        d_us.append(d_u)
        d_scales.append(d_scale)
        d_projections.append(Projection(None, d_transform))
    d_dense = None
    if shared.dense is not None:
        d_dense, d_targets = d_targets.dense, d_targets._replace(dense=None)
    return tuple(d_us), Shared(tuple(d_projections), d_dense, None), tuple(d_scales), d_targets


def _products_bwd(
    head: Head, shared: Shared, sums: Sums, us_and_hidden: tuple[Logits, tuple[Hidden, ...]]
) -> tuple[Sums, tuple[Array | None, ...]]:
    """The sums with d kernel added, and d states. d u and states are 0 where rows do not count."""
    value, d_shared = sums
    d_states, d_projections = [], []
    for i, (d_u, hidden) in enumerate(zip(*us_and_hidden, strict=True)):
        projection, d_projection, found = shared.projections[i], d_shared.projections[i], None
        if head.wants(i):
            found, d_kernel = head.products[i].backward(  # H6, H7
                d_u,
                hidden.states,
                projection.kernel,
                projection.transform.class_mask,
                d_kernel=d_projection.kernel,
                want_hidden=head.wanted[1][i].states,
            )
            d_projection = d_projection._replace(kernel=d_kernel)
        d_states.append(found)
        d_projections.append(d_projection)
    return (value, d_shared._replace(projections=tuple(d_projections))), tuple(d_states)


def _d_hidden(
    mask: Array | None,
    d_states: tuple[Array | None, ...],
    d_scales: tuple[Array | None, ...],
) -> tuple[Hidden, ...]:
    d_states = keep_rows(mask, d_states)
    return tuple(Hidden(*each) for each in zip(d_states, d_scales, strict=True))


def keep_rows(mask: Array | None, results: T) -> T:
    return jax.tree.map(lambda a: keep(mask, a), results)


def _add(sums: T, more: T) -> T:
    """sums + more. None in sums is a gradient that is not computed; None in more adds nothing."""

    def add(a: Array | None, b: Any) -> Array | None:
        return a if a is None or b is None else a + b

    return jax.tree.map(add, sums, more, is_leaf=lambda a: a is None)


def runs_weightless(head: Head) -> bool:
    """Whether rows of weight 0 have to be run, because the weights are differentiated.

    These rows add nothing to the sum, but the derivative for a row's weight is the row's loss.
    """
    of_rows = head.wanted[2]
    return of_rows is not None and of_rows.weight


def only(wanted: Any, gradients: T) -> T:
    """The gradients that are wanted, with None for all others."""
    return jax.tree.map(
        lambda w, d: d if w else None, wanted, gradients, is_leaf=lambda a: a is None
    )
