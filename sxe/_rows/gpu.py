"""Means and sums of rows by the row kernel for GPUs, with the gradient made in the forward pass.

What a row weighs in a mean is known before its logits are read, so that the kernel, which has the
row on the chip, writes the gradient at once. The backward pass only scales it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sxe._arrays import keep, vary_like, wide
from sxe._rows import gpu_kernel, twins
from sxe._rows.cross_entropy import CrossEntropy, Part, Results
from sxe._rows.normalizer import Normalizer
from sxe._rows.rules import results_and_state
from sxe._rows.targets import Rows, Targets, gap, take_label


class Mean(NamedTuple):
    """What comes out of the rows of a call.

    Attributes:
      value: the sum of the rows' weighted losses over the divisor, a scalar.
      results: of each row, [...], without gradient.
    """

    value: Array
    results: Results


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_rows(
    f: CrossEntropy, x: Array, label: Array, weight: Array, counts: Array
) -> tuple[Normalizer, Array, Array]:
    """Of rows [N, K]: the state, the label's logit, and weight (q_l - [l = label])."""
    found = gpu_kernel.state_and_gradient(
        x, label, weight, counts, cores=f.backend.cores, interpret=f.backend.interprets_kernels
    )
    return vary_like(found, x)  # JAX's types do not say so of a kernel's results


@_of_rows.defjvp
def _of_rows_jvp(f: CrossEntropy, primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> Any:
    """Derivatives of the gradient are XLA's."""
    x, label, weight, counts = primals

    def by_xla(x: Array, weight: Array) -> tuple[Normalizer, Array, Array]:
        kept, one = keep(counts, x), jnp.ones_like(weight)
        state = twins.normalize(kept, f.backend)
        targets = Targets(label, one, None, one)
        d = keep(counts, f.gradient(kept, targets, state, Results(weight, None)))
        x_label, inside = take_label(kept, label)
        return state, jnp.where(inside, wide(x_label), 0), d.astype(x.dtype)

    _, dots = jax.jvp(by_xla, (x, weight), (tangents[0], tangents[2]))
    return _of_rows(f, *primals), dots


def _forward(
    f: CrossEntropy, x: Array, rows: Rows, divisor: Array
) -> tuple[Results, Normalizer, Array, Array]:
    """The results and the state of rows, the label's part of D0, and the mean's gradient."""
    targets = rows.targets
    assert targets.label is not None
    assert targets.label_target is not None
    shape = targets.label.shape
    counts = jnp.ones(shape, bool) if rows.mask is None else rows.mask
    # D7 of a label alone is T (q_l - [l = y]). T is NaN where the label is no class.
    weight = rows.weight / divisor * targets.total
    of_rows = (jnp.broadcast_to(a, shape).reshape(-1) for a in (targets.label, weight, counts))
    state, x_label, d = _of_rows(f, x.reshape(-1, x.shape[-1]), *of_rows)
    m, r, x_label = (jnp.where(counts, a.reshape(shape), 0) for a in (*state, x_label))
    state = Normalizer(m, r)
    cost = gap(targets.label_target, x_label, m, state.log1p_r)
    results, _ = f.merge(Part(state, targets.label_target * cost, None), targets)  # D0
    return results, state, cost, d.reshape(x.shape)


def _mean(f: CrossEntropy, results: Results, rows: Rows, divisor: Array) -> Mean:
    # Divided after the sum, as what is left of a confident row's loss may be too small before it.
    return Mean(jnp.sum(f.weigh(results, rows.weight, None).value) / divisor, results)


def mean_and_gradient(f: CrossEntropy, x: Array, rows: Rows, divisor: Array) -> tuple[Mean, Array]:
    """The weighted mean of the rows' losses, and its gradient for the logits."""
    results, _, _, d = _forward(f, x, rows, divisor)
    return _mean(f, results, rows, divisor), d


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mean(f: CrossEntropy, x: Array, rows: Rows, divisor: Array) -> Mean:
    """The weighted mean of the rows' losses. The kernel makes it where it is differentiated."""
    results, _ = results_and_state(f, keep(rows.mask, x), rows.targets)
    return _mean(f, results, rows, divisor)


def _mean_fwd(f: CrossEntropy, x: Array, rows: Rows, divisor: Array) -> tuple[Mean, Any]:
    results, state, cost, d = _forward(f, x, rows, divisor)
    found = _mean(f, results, rows, divisor)
    # D0 differentiated in t_k, which counts what t_k adds to T.
    d_target = rows.weight / divisor * (cost + state.log1p_r)
    d_targets = rows.targets._replace(
        label=None, label_target=d_target, total=jnp.zeros_like(rows.targets.total)
    )
    d_weight = f.weigh(results, rows.weight, None).d_weight / divisor
    return found, (d, Rows(d_targets, d_weight, None, None), -found.value / divisor)


def _mean_bwd(f: CrossEntropy, res: tuple[Array, Rows, Array], g: Mean) -> tuple[Any, ...]:
    d, *others = res
    # A factor that is the constant 1 costs nothing. By another one, a gradient in bfloat16 is
    # rounded a second time. One in float16 would have lost what is small: see ``unserved``.
    d_x = (g.value * d.astype(g.value.dtype)).astype(d.dtype)
    return d_x, *jax.tree.map(lambda a: g.value * a, others)


mean.defvjp(_mean_fwd, _mean_bwd)
