"""Means and sums of rows by the row kernel for GPUs, with the gradient made in the forward pass.

What a row weighs in a mean is known before its logits are read, so that the kernel, which has the
row on the chip, writes the gradient at once. The backward pass only scales it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from sxe._arrays import keep, vary_like, wide
from sxe._rows import gpu_kernel, twins
from sxe._rows.cross_entropy import CrossEntropy, Part, Results
from sxe._rows.gpu_kernel import Found, RowTerms
from sxe._rows.normalizer import Normalizer
from sxe._rows.rules import results_and_state
from sxe._rows.targets import Dense, Rows, Targets, dense_cost, gap, take_label


class Share(NamedTuple):
    """How rows add up to a mean: sum_i w_i (loss_i + z lse_i^2) / divisor, for weights w of rows.

    Attributes:
      divisor: a scalar.
      z_loss: z, a scalar, or None.
    """

    divisor: Array
    z_loss: Array | None


class Mean(NamedTuple):
    """What comes out of the rows of a call.

    Attributes:
      value: a scalar.
      results: of each row, [...], without gradient.
    """

    value: Array
    results: Results


def serves(
    f: CrossEntropy, x: Array, *, d_dtype: DTypeLike, has_uniform_targets: bool = False
) -> bool:
    """Whether the kernel computes a mean of rows of these logits [..., K] and its gradient.

    Their targets are a label's, and the same for all classes beside it if they are uniform.
    """
    of_rows = gpu_kernel.takes_rows(
        x.shape[-1], x.dtype, d_dtype, has_uniform_targets=has_uniform_targets
    )
    return of_rows and f.axis_name is None and x.size > 0


def _with_loss(rows: Rows, m: Array) -> Array:
    """Of the rows that count, those that weigh something or whose largest logit m is finite."""
    with_loss = (rows.weight != 0) | jnp.isfinite(m)
    return with_loss if rows.mask is None else rows.mask & with_loss


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def _of_rows(f: CrossEntropy, x: Array, terms: RowTerms, d_dtype: DTypeLike) -> Found:
    """State and gradient of rows [N, K]."""
    # A row of weight 0 has a gradient of 0, whatever its logits are, and may have a loss.
    has_gradient = terms.counts & ((terms.weight != 0) | (terms.lse_weight != 0))
    found = gpu_kernel.state_and_gradient(
        x,
        terms._replace(counts=has_gradient),
        d_dtype=d_dtype,
        cores=f.backend.cores,
        interpret=f.backend.interprets_kernels,
    )
    return vary_like(found, x)  # JAX's types do not say of a kernel's results that they vary


def _by_xla(f: CrossEntropy, x: Array, terms: RowTerms, d_dtype: DTypeLike) -> Found:
    """What the kernel finds, as JAX differentiates it."""
    label, counts, weight, lse_weight, label_target, uniform = terms
    weighs = (weight != 0) | (lse_weight != 0)
    counts &= weighs | jnp.isfinite(jnp.max(lax.stop_gradient(x), axis=-1))
    kept, one = keep(counts, x), jnp.ones_like(weight)
    state = twins.normalize(kept, f.backend)
    targets, gaps = Targets(label, one, None, one), None
    if uniform is not None:
        each = uniform[:, None]
        dense = Dense(each, uniform, uniform * (x.shape[-1] - 1))
        targets = Targets(label, label_target, dense, one)
        gaps = dense_cost(jnp.ones_like(each), kept, state.m, state.log1p_r)
    g = Results(weight, lse_weight * state.lse)
    d = keep(counts, f.gradient(kept, targets, state, g)).astype(d_dtype)
    x_label, inside = take_label(kept, label)
    return Found(*state, jnp.where(inside, wide(x_label), 0), d, gaps)


@_of_rows.defjvp
def _of_rows_jvp(
    f: CrossEntropy, d_dtype: DTypeLike, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Found, Found]:
    (x, terms), (x_dot, terms_dot) = primals, tangents
    names = ("weight", "lse_weight", "label_target", "uniform")
    floats, dots = ({name: getattr(of, name) for name in names} for of in (terms, terms_dot))

    def by_xla(x: Array, floats: dict[str, Any]) -> Found:
        return _by_xla(f, x, terms._replace(**floats), d_dtype)

    return _of_rows(f, x, terms, d_dtype), jax.jvp(by_xla, (x, floats), (x_dot, dots))[1]


class Forward(NamedTuple):
    """What one kernel computes of rows of logits [..., K].

    Attributes:
      results: of each row, [...].
      d: the mean's gradient for the logits, [..., K].
      d_targets: the mean's gradients for the targets.
    """

    results: Results
    d: Array
    d_targets: Targets


def forward(f: CrossEntropy, x: Array, rows: Rows, share: Share, *, d_dtype: DTypeLike) -> Forward:
    """The results of rows, and what is left to do of a backward pass: to scale these gradients.

    Rows of weight 0 may count whose logits have no loss.
    """
    targets = rows.targets
    assert targets.label is not None
    assert targets.label_target is not None
    shape = targets.label.shape
    counts = jnp.ones(shape, bool) if rows.mask is None else rows.mask
    g = rows.weight / share.divisor
    z = 0 if share.z_loss is None else share.z_loss
    terms = RowTerms(targets.label, counts, g * targets.total, 2 * z * g)
    if targets.dense is not None:
        # 0, or NaN where the label is no class.
        terms = terms._replace(
            weight=g + 0 * targets.total,
            label_target=targets.label_target,
            uniform=jnp.broadcast_to(targets.dense.t[..., 0], shape),
        )
    flat = jax.tree.map(lambda a: jnp.broadcast_to(a, shape).reshape(-1), terms)
    found = _of_rows(f, x.reshape(-1, x.shape[-1]), flat, d_dtype)

    found = found._replace(d=found.d.reshape(x.shape), m=found.m.reshape(shape))
    with_loss = _with_loss(rows, found.m)

    def of_counted(a: Array | None) -> Any:
        return None if a is None else jnp.where(with_loss, a.reshape(shape), 0)

    state = Normalizer(of_counted(found.m), of_counted(found.r))
    log1p_r = state.log1p_r
    label_gap = gap(targets.label_target, of_counted(found.x_label), state.m, log1p_r)
    cost = targets.label_target * label_gap
    d_targets = jax.tree.map(jnp.zeros_like, targets._replace(label=None))
    # D0 differentiated in t_k is -log q_k, which counts what t_k adds to T.
    d_targets = d_targets._replace(label_target=g * (label_gap + log1p_r))
    if targets.dense is not None:
        gaps = of_counted(found.gap)
        # Where nothing is spread, no class costs anything, not even one that cannot occur.
        cost = cost + jnp.where(terms.uniform == 0, 0, terms.uniform * gaps)
        d_t = jnp.sum(g * (gaps + x.shape[-1] * log1p_r)).reshape(targets.dense.t.shape)
        d_targets = d_targets._replace(dense=d_targets.dense._replace(t=d_t))
    results, _ = f.merge(Part(state, cost, None), targets)  # D0
    return Forward(results, found.d, d_targets)


def _mean(f: CrossEntropy, results: Results, rows: Rows, share: Share) -> Mean:
    # Divided after the sum, as what is left of a confident row's loss may be too small before it.
    loss = f.weigh(results, rows.weight, share.z_loss).value
    return Mean(jnp.sum(loss) / share.divisor, results)


def mean_and_gradient(f: CrossEntropy, x: Array, rows: Rows, share: Share) -> tuple[Mean, Array]:
    """The weighted mean of the rows' losses, and its gradient for the logits."""
    found = forward(f, x, rows, share, d_dtype=x.dtype)
    return _mean(f, found.results, rows, share), found.d


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mean(f: CrossEntropy, x: Array, rows: Rows, share: Share) -> Mean:
    """The weighted mean of the rows' losses. One kernel makes it where it is differentiated."""
    results, state = results_and_state(f, x, rows.targets)
    with_loss = _with_loss(rows, state.m)
    results = jax.tree.map(lambda a: jnp.where(with_loss, a, 0), results)
    return _mean(f, results, rows, share)


def _mean_fwd(f: CrossEntropy, x: Array, rows: Rows, share: Share) -> tuple[Mean, Any]:
    results, d, d_targets = forward(f, x, rows, share, d_dtype=x.dtype)
    found = _mean(f, results, rows, share)
    weighed = f.weigh(results, rows.weight, share.z_loss)
    d_rows = Rows(d_targets, weighed.d_weight / share.divisor, None, None)
    d_z = None if weighed.d_z is None else weighed.d_z / share.divisor
    return found, (d, d_rows, Share(-found.value / share.divisor, d_z))


def _mean_bwd(f: CrossEntropy, res: tuple[Array, Rows, Share], g: Mean) -> tuple[Any, ...]:
    d, *others = res
    # A factor that is the constant 1 costs nothing. By another one, a gradient in bfloat16 is
    # rounded a second time.
    d_x = (g.value * d.astype(g.value.dtype)).astype(d.dtype)
    return d_x, *jax.tree.map(lambda a: g.value * a, others)


mean.defvjp(_mean_fwd, _mean_bwd)
