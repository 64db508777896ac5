"""Means and sums of rows by the gradient kernel for GPUs, made in the forward pass.

What a row weighs in a mean is known before its logits are read. So the kernel, which has the row on
the chip, writes the gradient at once, and the backward pass only scales it.
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
from sxe._rows.cross_entropy import CrossEntropy, Part, Results
from sxe._rows.gpu_gradient import Found, RowTerms, spread, state_and_gradient
from sxe._rows.normalizer import has_loss
from sxe._rows.rules import results_and_state
from sxe._rows.targets import Dense, Rows, Targets, gap, take_label


class Share(NamedTuple):
    """How rows add up to a mean: sum_i w_i (loss_i + z lse_i^2) / divisor, for weights w of rows.

    Attributes:
      divisor: a scalar.
      z_loss: z, a scalar, or None.
    """

    divisor: Array
    z_loss: Array | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 4))
def _of_rows(
    f: CrossEntropy, x: Array, with_loss: Array, terms: RowTerms, d_dtype: DTypeLike
) -> Found:
    """State and gradient of rows [..., K].

    Of rows that count, ``with_loss`` [...] says which weigh something or have a loss: only the
    derivatives of the gradient ask.
    """

    @custom_vmap
    def by_kernel(x: Array, terms: RowTerms) -> Found:
        shape, cores = x.shape[:-1], f.backend.cores
        flat = jax.tree.map(lambda a: a.reshape(-1), terms)
        found = state_and_gradient(
            x.reshape(-1, x.shape[-1]),
            flat,
            d_dtype=d_dtype,
            cores=cores,
            interpret=f.backend.interprets_kernels,
        )
        return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), found)

    @by_kernel.def_vmap
    def of_examples(size: int, mapped: Any, x: Array, terms: RowTerms) -> tuple[Found, Any]:
        """Rows of all examples are rows of one call."""
        x, terms = jax.tree.map(
            lambda is_mapped, a: a if is_mapped else jnp.broadcast_to(a, (size, *a.shape)),
            tuple(mapped),
            (x, terms),
        )
        found = by_kernel(x, terms)
        return found, jax.tree.map(lambda a: True, found)

    return by_kernel(x, terms)


def _by_xla(
    f: CrossEntropy, x: Array, with_loss: Array, terms: RowTerms, d_dtype: DTypeLike
) -> Found:
    """The same results as ``_of_rows``, in operations that JAX can differentiate."""
    label, _, weight, lse_weight, label_target, uniform = terms
    kept, one = keep(with_loss, x), jnp.ones_like(weight)
    state = twins.normalize(kept, f.backend)
    targets, gaps = Targets(label, one, None, one), None
    if uniform is not None:
        each = uniform[..., None]
        dense = Dense(each, uniform, uniform * (x.shape[-1] - 1))
        targets = Targets(label, label_target, dense, one)
        of_classes = gap(each, kept, state.m[..., None], state.log1p_r[..., None])
        gaps = jnp.sum(spread(each) * of_classes, axis=-1)
    g = Results(weight, lse_weight * state.lse)
    d = keep(with_loss, f.gradient(kept, targets, state, g)).astype(d_dtype)
    x_label, inside = take_label(kept, label)
    return Found(state, jnp.where(inside, wide(x_label), 0), d, gaps)


@_of_rows.defjvp
def _of_rows_jvp(
    f: CrossEntropy, d_dtype: DTypeLike, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Found, Found]:
    (x, with_loss, terms), (x_dot, _, terms_dot) = primals, tangents
    names = ("weight", "lse_weight", "label_target", "uniform")
    floats, dots = ({name: getattr(of, name) for name in names} for of in (terms, terms_dot))

    def by_xla(x: Array, floats: dict[str, Any]) -> Found:
        return _by_xla(f, x, with_loss, terms._replace(**floats), d_dtype)

    found = _of_rows(f, x, with_loss, terms, d_dtype)
    return found, jax.jvp(by_xla, (x, floats), (x_dot, dots))[1]


class Forward(NamedTuple):
    """What is known of rows of logits [..., K] when the kernel has run.

    Attributes:
      results: of each row, [...].
      d: the gradient of their weighted sum for the logits, [..., K].
      d_targets: its gradients for the targets.
    """

    results: Results
    d: Array
    d_targets: Targets


def forward(
    f: CrossEntropy, x: Array, rows: Rows, *, g: Array, z_loss: Array | None, d_dtype: DTypeLike
) -> Forward:
    """The results of rows, and the gradients of sum_i g_i (loss_i + z lse_i^2).

    A row may count that weighs 0 and has logits without a loss, NaN or infinite ones.
    """
    targets = rows.targets
    assert targets.label is not None
    assert targets.label_target is not None
    shape = targets.label.shape
    counts = jnp.ones(shape, bool) if rows.mask is None else rows.mask
    z = 0 if z_loss is None else z_loss
    # A row of weight 0 has a gradient of 0, whatever its logits are, and may have a loss.
    has_gradient = counts & (rows.weight != 0)
    terms = RowTerms(targets.label, has_gradient, g * targets.total, 2 * z * g)
    if targets.dense is not None:
        # 0, or NaN where the label is no class.
        terms = terms._replace(
            weight=g + 0 * targets.total,
            label_target=targets.label_target,
            uniform=jnp.broadcast_to(targets.dense.t[..., 0], shape),
        )
    terms = jax.tree.map(lambda a: jnp.broadcast_to(a, shape), terms)
    known = rows.with_loss(has_loss(x, None, f.backend))  # XLA drops it where nothing needs it
    found = _of_rows(f, x, known, terms, d_dtype)
    state, x_label, d, gaps = found
    with_loss = rows.with_loss(state.has_loss)
    state, x_label, gaps = jax.tree.map(
        lambda a: jnp.where(with_loss, a, 0), (state, x_label, gaps)
    )
    label_gap = gap(targets.label_target, x_label, state.m, state.log1p_r)
    cost = targets.label_target * label_gap
    d_targets = jax.tree.map(jnp.zeros_like, targets._replace(label=None))
    # D0 differentiated in t_k is -log q_k, which counts what t_k adds to T.
    d_targets = d_targets._replace(label_target=g * (label_gap + state.log1p_r))
    if targets.dense is not None:
        # Where nothing is spread, no class costs anything, not even one that cannot occur.
        cost = cost + jnp.where(terms.uniform == 0, 0, gaps)
        of_all = gaps / spread(terms.uniform) + x.shape[-1] * state.log1p_r
        d_t = jnp.sum(g * of_all).reshape(targets.dense.t.shape)
        d_targets = d_targets._replace(dense=d_targets.dense._replace(t=d_t))
    results, _ = f.merge(Part(state, cost, None), targets)  # D0
    return Forward(results, d, d_targets)


def _mean(f: CrossEntropy, results: Results, rows: Rows, share: Share) -> Array:
    # Divided after the sum, as what is left of a confident row's loss may be too small before it.
    return jnp.sum(f.weigh(results, rows.weight, share.z_loss).value) / share.divisor


def _forward(f: CrossEntropy, x: Array, rows: Rows, share: Share) -> Forward:
    g = rows.weight / share.divisor
    return forward(f, x, rows, g=g, z_loss=share.z_loss, d_dtype=x.dtype)


def mean_and_gradient(
    f: CrossEntropy, x: Array, rows: Rows, share: Share
) -> tuple[Array, Results, Array]:
    """The weighted mean of the rows' losses, their results, and its gradient for the logits."""
    found = _forward(f, x, rows, share)
    return _mean(f, found.results, rows, share), found.results, found.d


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mean(f: CrossEntropy, x: Array, rows: Rows, share: Share) -> tuple[Array, Results]:
    """The weighted mean of the rows' losses and, without gradient, their results.

    The gradient kernel makes them where the mean is differentiated.
    """
    results, state = results_and_state(f, x, rows.targets)
    with_loss = rows.with_loss(state.has_loss)
    results = jax.tree.map(lambda a: jnp.where(with_loss, a, 0), results)
    return _mean(f, results, rows, share), results


def _mean_fwd(
    f: CrossEntropy, x: Array, rows: Rows, share: Share
) -> tuple[tuple[Array, Results], Any]:
    results, d, d_targets = _forward(f, x, rows, share)
    value = _mean(f, results, rows, share)
    weighed = f.weigh(results, rows.weight, share.z_loss)
    d_rows = Rows(d_targets, weighed.d_weight / share.divisor, None, None)
    d_z = None if weighed.d_z is None else weighed.d_z / share.divisor
    return (value, results), (d, d_rows, Share(-value / share.divisor, d_z))


def _mean_bwd(f: CrossEntropy, res: tuple[Array, Rows, Share], g: Any) -> tuple[Any, ...]:
    (d, *others), (g_mean, _) = res, g
    # A factor that is the constant 1 costs nothing. By another one, a gradient in bfloat16 is
    # rounded a second time.
    d_x = (g_mean * d.astype(g_mean.dtype)).astype(d.dtype)
    return d_x, *jax.tree.map(lambda a: g_mean * a, others)


mean.defvjp(_mean_fwd, _mean_bwd)
