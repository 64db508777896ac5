"""Means and sums of rows with the gradient kernel for GPUs, in the forward pass.

The weight of a row in a mean is known before its logits are read. So the kernel writes the gradient
while the row is on the chip, and the backward pass only scales the gradient.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike

from sxe._arrays import keep, wide
from sxe._rows import twins
from sxe._rows.cross_entropy import CrossEntropy, Part, Results, State
from sxe._rows.gpu_gradient import state_and_gradient
from sxe._rows.gpu_terms import Found, RowTerms, spread
from sxe._rows.normalizer import has_softmax
from sxe._rows.rules import instantiate, results_and_state, values_and_wanted
from sxe._rows.targets import Dense, Rows, Targets, dense_cost, gap, take_labels


class Terms(NamedTuple):
    """The kernel's inputs besides the logits.

    Attributes:
      rows: the inputs of each row, [...].
      dense: targets [..., K], or [1, ..., 1, K] if all rows have the same targets, or None.
    """

    rows: RowTerms
    dense: Array | None


class Share(NamedTuple):
    """The parameters of a mean, sum_i w_i (loss_i + z lse_i^2) / divisor, with row weights w.

    Attributes:
      divisor: a scalar.
      z_loss: z, a scalar, or None.
    """

    divisor: Array
    z_loss: Array | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 4))
def _of_rows(
    f: CrossEntropy, x: Array, with_loss: Array, terms: Terms, d_dtype: DTypeLike
) -> Found:
    """The state and gradient of rows [..., K].

    ``with_loss`` [...] is used only by the derivative rule below: see ``Rows.with_loss``.
    """

    @custom_vmap
    def by_kernel(x: Array, terms: Terms) -> Found:
        shape, classes = x.shape[:-1], x.shape[-1]
        found = state_and_gradient(
            x.reshape(-1, classes),
            None if terms.dense is None else terms.dense.reshape(-1, classes),
            jax.tree.map(lambda a: a.reshape(-1), terms.rows),
            d_dtype=d_dtype,
            cores=f.backend.cores,
            interpret=f.backend.interprets_kernels,
        )
        return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), found)

    @by_kernel.def_vmap
    def of_examples(size: int, mapped: Any, x: Array, terms: Terms) -> tuple[Found, Any]:
        """Computes the rows of all examples in a single call."""
        dense, is_mapped = terms.dense, mapped[1].dense
        x, rows = jax.tree.map(
            lambda is_mapped, a: a if is_mapped else jnp.broadcast_to(a, (size, *a.shape)),
            (mapped[0], mapped[1].rows),
            (x, terms.rows),
        )
        if dense is not None:
            # Whether all rows of all examples have the same targets.
            same = not is_mapped and dense.size == dense.shape[-1]
            dense = dense[None] if same else jnp.broadcast_to(dense, x.shape)
        found = by_kernel(x, Terms(rows, dense))
        return found, jax.tree.map(lambda a: True, found)

    return by_kernel(x, terms)


def _by_xla(f: CrossEntropy, x: Array, with_loss: Array, terms: Terms, d_dtype: DTypeLike) -> Found:
    """The same results as ``_of_rows``, from operations that JAX can differentiate."""
    label, _, weight, lse_weight, label_target, uniform = terms.rows
    kept, one = keep(with_loss, x), jnp.ones_like(weight)
    state = twins.normalize(kept, f.backend)
    targets, gaps, total = Targets(label, one, None, one), None, None
    if uniform is not None:
        each = uniform[..., None]
        dense = Dense(each, uniform, uniform * (x.shape[-1] - 1))
        targets = Targets(label, label_target, dense, one)
        of_classes = gap(each, kept, state.m[..., None], state.log1p_r[..., None])
        gaps = jnp.sum(spread(each) * of_classes, axis=-1)
    if terms.dense is not None:
        t = wide(terms.dense)
        t = keep(with_loss, t) if t.shape == x.shape else t
        dense = twins.dense_targets(t, None, f.backend)
        targets = Targets(label, label_target, dense, one)
        gaps = dense_cost(t, kept, state.m, state.log1p_r)
        total = jnp.broadcast_to(dense.largest + dense.rest, label.shape)
    g = Results(weight, lse_weight * state.lse)
    d = keep(with_loss, f.gradient(kept, targets, State(state), g)).astype(d_dtype)
    x_label, inside = (a[..., 0] for a in take_labels(kept, label[..., None]))
    return Found(state, jnp.where(inside, wide(x_label), 0), d, gaps, total)


@_of_rows.defjvp
def _of_rows_jvp(
    f: CrossEntropy, d_dtype: DTypeLike, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Found, Found]:
    (x, with_loss, terms), (x_dot, _, terms_dot) = primals, tangents
    names = ("weight", "lse_weight", "label_target", "uniform")

    def floats(terms: Terms) -> Any:
        return {name: getattr(terms.rows, name) for name in names}, terms.dense

    def by_xla(x: Array, floats: Any) -> Found:
        of_rows, dense = floats
        given = Terms(terms.rows._replace(**of_rows), dense)
        return _by_xla(f, x, with_loss, given, d_dtype)

    found = _of_rows(f, x, with_loss, terms, d_dtype)
    return found, jax.jvp(by_xla, (x, floats(terms)), (x_dot, floats(terms_dot)))[1]


class Forward(NamedTuple):
    """The results of the kernel for rows of logits [..., K].

    Attributes:
      results: the results of each row, [...].
      d: the gradient of their weighted sum for the logits, [..., K].
      d_targets: the gradients of this sum for the targets.
    """

    results: Results
    d: Array
    d_targets: Targets


def _terms(rows: Rows, g: Array, z_loss: Array | None) -> Terms:
    targets, shape = rows.targets, rows.weight.shape
    counts = jnp.ones(shape, bool) if rows.mask is None else rows.mask
    z = 0 if z_loss is None else z_loss
    # Rows without a label get the label -1, which is no class.
    label, label_target = jnp.int32(-1), jnp.float32(0)
    if targets.label is not None and targets.label_target is not None:
        label, label_target = targets.label, targets.label_target
    # The gradient of a row with weight 0 is 0, whatever its logits are. The row may have a loss.
    has_gradient = counts & (rows.weight != 0)
    terms, dense = RowTerms(label, has_gradient, g * targets.total, 2 * z * g), None
    if targets.dense is not None:
        # 0, or NaN for an invalid label.
        nothing = 0 if targets.label is None else 0 * targets.total
        terms = terms._replace(weight=g + nothing, label_target=label_target)
        dense = targets.dense.t
        if dense.shape[-1] == 1:
            terms, dense = terms._replace(uniform=dense[..., 0]), None
    return Terms(jax.tree.map(lambda a: jnp.broadcast_to(a, shape), terms), dense)


def forward(
    f: CrossEntropy, x: Array, rows: Rows, *, g: Array, z_loss: Array | None, d_dtype: DTypeLike
) -> Forward:
    """The results of rows, and the gradients of sum_i g_i (loss_i + z lse_i^2).

    Rows with weight 0 may have logits without a loss (NaN or infinite), although ``rows.mask`` is
    True for them.
    """
    terms = _terms(rows, g, z_loss)
    known = has_softmax(x, None, f.backend) & ~f.is_infinite(x, rows.targets)
    known = rows.with_loss(known)  # XLA removes it if it is not used
    found = _of_rows(f, x, known, terms, d_dtype)
    state, with_loss = found.state, rows.with_loss(_has_finite_loss(found, rows.targets))
    # As elsewhere, the lse of a row of -inf alone is -inf.
    found = found._replace(state=state._replace(r=jnp.where(state.m == -jnp.inf, -1, state.r)))
    masked = jax.tree.map(lambda a: jnp.where(with_loss, a, 0), found._replace(d=None))
    targets = rows.targets
    if targets.label is None:
        targets = targets._replace(total=masked.total + 0 * masked.total)  # NaN if not finite
    kept = keep(with_loss, x)
    cost, d_targets = _of_targets(f, kept, targets, (terms, masked, g))
    part = Part(masked.state, cost, None, f.gap_sum(kept, masked.state.m))
    results, _ = f.merge(part, targets)  # D0
    return Forward(results, found.d, d_targets)


def _has_finite_loss(found: Found, targets: Targets) -> Array:
    """Whether each row has a finite loss, [...]. If its label is invalid, this is arbitrary."""
    has_loss: Array = found.state.has_softmax
    if targets.label_target is not None:
        has_loss &= (found.x_label > -jnp.inf) | (targets.label_target == 0)
    return has_loss if found.gap is None else has_loss & ~jnp.isinf(found.gap)


def _of_targets(
    f: CrossEntropy, x: Array, targets: Targets, of_rows: tuple[Terms, Found, Array]
) -> tuple[Array, Targets]:
    """The costs sum_k t_k (m - x_k) of each row, and the gradients for the targets."""
    terms, found, g = of_rows
    state, gaps = found.state, found.gap
    cost = jnp.zeros_like(state.m)
    d_targets = jax.tree.map(jnp.zeros_like, targets._replace(label=None))
    if targets.label is not None and targets.label_target is not None:
        is_class = (targets.label >= 0) & (targets.label < x.shape[-1])
        label_gap = gap(targets.label_target, found.x_label, state.m, state.log1p_r)
        label_gap = jnp.where(is_class, label_gap, 0)
        cost = targets.label_target * label_gap
        # The derivative of D0 with respect to t_k is -log q_k. It includes t_k's part in T.
        d_targets = d_targets._replace(label_target=g * (label_gap + state.log1p_r))
    if targets.dense is None:
        return cost, d_targets
    if terms.dense is not None:
        of_dense = f.target_gradient(x, targets, State(state), Results(g, None)).dense
        return cost + gaps, d_targets._replace(dense=of_dense)
    # If ``uniform`` is 0, the cost of all classes is 0, even where a logit is -inf.
    uniform = terms.rows.uniform
    assert uniform is not None
    of_all = gaps / spread(uniform) + x.shape[-1] * state.log1p_r
    d_t = jnp.sum(g * of_all).reshape(targets.dense.t.shape)
    d_targets = d_targets._replace(dense=d_targets.dense._replace(t=d_t))
    return cost + jnp.where(uniform == 0, 0, gaps), d_targets


def _mean(f: CrossEntropy, results: Results, rows: Rows, share: Share) -> Array:
    # Divide after the sum: a confident row's loss may be so small that dividing it would underflow.
    return jnp.sum(f.weigh(results, rows.weight, share.z_loss).value) / share.divisor


def _forward(f: CrossEntropy, x: Array, rows: Rows, share: Share) -> Forward:
    g = rows.weight / share.divisor
    return forward(f, x, rows, g=g, z_loss=share.z_loss, d_dtype=x.dtype)


def mean_and_gradient(
    f: CrossEntropy, x: Array, rows: Rows, share: Share
) -> tuple[Array, Results, Array]:
    """The weighted mean of the row losses, the rows' results, and the gradient for the logits."""
    found = _forward(f, x, rows, share)
    return _mean(f, found.results, rows, share), found.results, found.d


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mean(f: CrossEntropy, x: Array, rows: Rows, share: Share) -> tuple[Array, Results]:
    """The weighted mean of the row losses and, without a gradient, the rows' results.

    If the mean is differentiated, the gradient kernel computes all of them.
    """
    targets = rows.targets
    if targets.dense is not None:
        targets = targets._replace(dense=targets.dense._replace(t=wide(targets.dense.t)))
    results, state = results_and_state(f, x, targets)
    with_loss = rows.with_loss(state.has_softmax)
    results = jax.tree.map(lambda a: jnp.where(with_loss, a, 0), results)
    return _mean(f, results, rows, share), results


def _mean_fwd(f: CrossEntropy, x: Any, rows: Any, share: Any) -> tuple[tuple[Array, Results], Any]:
    (x, rows, share), (_, wanted, _) = values_and_wanted(x, rows, share)
    results, d, d_targets = _forward(f, x, rows, share)
    value = _mean(f, results, rows, share)
    weighed = f.weigh(results, rows.weight, share.z_loss)
    t_like = None
    if d_targets.dense is not None:
        # Keep the gradient of targets [..., K] only if it is needed. It is cast to their dtype
        # after the multiplication with the cotangent.
        t_like = jnp.zeros((0,), rows.targets.dense.t.dtype)
        d_t = d_targets.dense.t if wanted.targets.dense.t else t_like
        d_targets = d_targets._replace(dense=d_targets.dense._replace(t=d_t))
    d_rows = Rows(d_targets, weighed.d_weight / share.divisor, None, None)
    d_z = None if weighed.d_z is None else weighed.d_z / share.divisor
    return (value, results), (d, d_rows, Share(-value / share.divisor, d_z), t_like)


def _mean_bwd(f: CrossEntropy, res: tuple[Any, ...], g: Any) -> tuple[Any, ...]:
    (*gradients, t_like), g_mean = res, instantiate(g[0])

    def times(a: Array) -> Array | None:
        # A constant factor of 1 adds no computation. Any other factor rounds a bfloat16 gradient a
        # second time. An empty gradient is one that is not needed.
        return None if a.shape == (0,) else (g_mean * a.astype(g_mean.dtype)).astype(a.dtype)

    d_x, d_rows, d_share = jax.tree.map(times, gradients)
    if t_like is not None and d_rows.targets.dense.t is not None:
        dense = d_rows.targets.dense
        dense = dense._replace(t=dense.t.astype(t_like.dtype))
        d_rows = d_rows._replace(targets=d_rows.targets._replace(dense=dense))
    return d_x, d_rows, d_share


mean.defvjp(_mean_fwd, _mean_bwd, symbolic_zeros=True)
