"""Compare float32 losses, label gradients and KL divergences with 60-digit arithmetic.

The inputs are those for which rounding destroys the results of common formulas.
"""

import decimal
import functools
import math
import operator
import random
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sxe import derivation, kl_divergence, softmax_cross_entropy
from sxe._tools.check.results import PRECISION, Precision, Sweep


class Row(NamedTuple):
    """Logits that are exact in float32, and targets. The label is class 0 if targets is None."""

    logits: Sequence[float]
    targets: Sequence[float] | None = None
    label_smoothing: float | None = None


ROUNDED_AWAY = {
    "1e8, 1e8": Row((1e8, 1e8)),
    "20, 0": Row((20.0, 0.0)),
    "40, 0, 0": Row((40.0, 0.0, 0.0)),
    "2048 times 1e7": Row((1e7,) * 2048),
    "20, 0, targets 1, 1e-9": Row((20.0, 0.0), targets=(1.0, 1e-9)),
    "40, 0, 0, smoothing 1e-6": Row((40.0, 0.0, 0.0), label_smoothing=1e-6),
}
SWEEPS = {  # name: magnitudes a, the logits as text, the logits as a function of a; the label is 0
    # For a above 80, exp(-a) is no longer a normal number in float32.
    "lead": ([float(n) for n in range(81)], "a, 0, -1", lambda a: (a, 0, -1)),
    "offset": ([10 ** (n / 8) for n in range(65)], "a, a + 1, a - 2", lambda a: (a, a + 1, a - 2)),
}


class Truth(NamedTuple):
    """The loss of a row, and its gradient at class 0: s_0 (T - t_0) - t_0 (1 - s_0).

    An error of the loss is relative to the loss. An error of the gradient is relative to `terms`,
    the sum of the two terms. For a label this sum is the magnitude of the gradient. For targets
    that a model has learned exactly, the gradient is 0 but the sum is not.
    """

    loss: float
    gradient: float
    terms: float


def sixty_digits(row: Row) -> Truth:
    """L of one row (D0) and dL/dx_0 (D7) of the float32 inputs, in 60-digit arithmetic."""
    K, (a, *targets) = len(row.logits), _float32(row.label_smoothing or 0.0, *(row.targets or ()))
    with decimal.localcontext(prec=60, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN):
        exp_x = [Decimal(x_k).exp() for x_k in row.logits]
        s = [exp_x_k / sum(exp_x) for exp_x_k in exp_x]
        t = targets or [(1 - a) * (k == 0) + a / K for k in range(K)]
        loss = -sum(t_k * s_k.ln() for t_k, s_k in zip(t, s, strict=True) if t_k)
        # s_0 T and t_0, each minus s_0 t_0, which cancels in their difference
        terms = s[0] * sum(t[1:]), t[0] * sum(s[1:])
        return Truth(float(loss), float(terms[0] - terms[1]), float(terms[0] + terms[1]))


def _float32(*values: float) -> list[Decimal]:
    return [Decimal(float(jnp.float32(value))) for value in values]


def _error_in_units(value: float, truth: Truth, n: int) -> float:
    """The error of the loss (n = 0) or the gradient (n = 1); inf if the value is not finite."""
    return _error(value, truth[n], (truth.loss, truth.terms)[n])


def _error(value: float, truth: float, unit: float) -> float:
    return abs(value - truth) / unit if math.isfinite(value) else math.inf


def _optax(x: Array, y: Array, label_smoothing: Array | None = None) -> Array:
    if label_smoothing is not None:
        y = optax.smooth_labels(jax.nn.one_hot(y, x.shape[1], dtype=x.dtype), label_smoothing)
    if jnp.issubdtype(y.dtype, jnp.floating):
        return jnp.mean(optax.softmax_cross_entropy(x, y))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, y))


Arguments = tuple[Array, Array, dict[str, Array]]  # logits, labels or targets, options


def _arguments(row: Row) -> Arguments:
    label, a = jnp.zeros(1, jnp.int32), row.label_smoothing
    targets = label if row.targets is None else jnp.array([row.targets], jnp.float32)
    options = {} if a is None else {"label_smoothing": jnp.float32(a)}
    return jnp.array([row.logits], jnp.float32), targets, options


@partial(jax.jit, static_argnums=0)
def _losses_and_gradients(loss: Callable[..., Array], rows: list[Arguments]) -> Array:
    results = (jax.value_and_grad(loss)(x, y, **options) for x, y, options in rows)
    return jnp.stack([jnp.stack([value, dL_dx[0, 0]]) for value, dL_dx in results])


def check_precision() -> tuple[Precision, ...]:
    """Compare loss and label gradient of sxe and optax, for the rows in ROUNDED_AWAY."""
    rows = list(map(_arguments, ROUNDED_AWAY.values()))
    ours = _losses_and_gradients(softmax_cross_entropy, rows).tolist()
    theirs = _losses_and_gradients(_optax, rows).tolist()
    results = []
    for (name, row), *found in zip(ROUNDED_AWAY.items(), ours, theirs, strict=True):
        truth = sixty_digits(row)
        for n, (quantity, most) in enumerate(PRECISION.items()):
            a, b = (numbers[n] for numbers in found)
            errors = _error_in_units(a, truth, n), _error_in_units(b, truth, n)
            passed = errors[0] <= most
            results.append(Precision(f"{name}: {quantity}", truth[n], a, b, *errors, passed))
    return tuple(results)


def _textbook(x: Array, labels: Array) -> Array:
    """D0 exactly as written, which JAX differentiates."""
    return derivation.d0(x, jax.nn.one_hot(labels, x.shape[1], dtype=x.dtype))


@partial(jax.jit, static_argnums=0)
def _sweep(loss: Callable[..., Array], rows: Array) -> tuple[Array, Array]:
    """The loss of each row for label 0, and its gradient at class 0."""
    label = jnp.zeros(1, jnp.int32)
    values, gradients = jax.vmap(lambda x: jax.value_and_grad(loss)(x[None], label))(rows)
    return values, gradients[:, 0, 0]


def check_sweeps() -> tuple[Sweep, ...]:
    """Compare sxe, optax and autodiff of D0 at each magnitude in SWEEPS."""
    losses = {"sxe": softmax_cross_entropy, "optax": _optax, "autodiff of D0": _textbook}
    results = []
    for magnitude, (at, row, logits) in SWEEPS.items():
        rows = jnp.array([logits(a) for a in at], jnp.float32)
        truths = [sixty_digits(Row(logits)) for logits in rows.tolist()]  # of the float32 logits
        found = {who: _sweep(loss, rows) for who, loss in losses.items()}
        for n, (quantity, most) in enumerate(PRECISION.items()):
            errors = {
                who: tuple(map(partial(_error_in_units, n=n), numbers[n].tolist(), truths))
                for who, numbers in found.items()
            }
            passed = max(errors["sxe"]) <= most
            name, limits = f"{magnitude} {at[0]:.0f} to {at[-1]:.3g}: {quantity}", (most,) * len(at)
            results.append(Sweep(name, magnitude, row, quantity, tuple(at), limits, errors, passed))
    return tuple(results)


CLASSES = 200
PER_DECADE = 8
DISTANCES = [10 ** (1 - n / PER_DECADE) for n in range(5 * PER_DECADE + 1)]  # 10 to 1e-4


def kl_in_sixty_digits(logits: Sequence[float], target_logits: Sequence[float]) -> float:
    """KL(p || q) of one row by the first form of K0, of the float32 logits."""
    with decimal.localcontext(prec=60):
        x, z = (list(map(Decimal, row)) for row in (logits, target_logits))
        exp_z = list(map(Decimal.exp, z))
        S_x, S_z = sum(map(Decimal.exp, x), Decimal(0)), sum(exp_z, Decimal(0))
        shift = S_z.ln() - S_x.ln()
        terms = (e_k * (z_k - x_k - shift) for e_k, z_k, x_k in zip(exp_z, z, x, strict=True))
        return float(sum(terms) / S_z)


@partial(jax.jit, static_argnums=0)
def _divergences(kl_divergence: Callable[..., Array], x: Array, z: Array) -> Array:
    return kl_divergence(x, z, reduction="none")


@jax.jit
def _textbook_kl(x: Array, z: Array) -> Array:
    """The first form of K0, with a log-softmax that does not overflow."""
    log_q, log_p = jax.nn.log_softmax(x), jax.nn.log_softmax(z)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)


class Pairs(NamedTuple):
    """Logits and target logits [DISTANCES, CLASSES], exact in float32, and their divergences."""

    logits: list[list[float]]
    target_logits: list[list[float]]
    truths: list[float]


@functools.cache  # all checks use the same pairs
def _pairs() -> Pairs:
    draw = random.Random(0)
    logits = [[draw.gauss(0, 2) for _ in range(CLASSES)] for _ in DISTANCES]
    noise = [[a * draw.gauss(0, 1) for _ in range(CLASSES)] for a in DISTANCES]
    x = jnp.array(logits, jnp.float32)
    rows = x.tolist(), (x + jnp.array(noise, jnp.float32)).tolist()
    return Pairs(*rows, list(map(kl_in_sixty_digits, *rows)))


def check_distances() -> Sweep:
    """Compare KL(p || q) of sxe and of the textbook form, for logits of shrinking distance."""
    logits, target_logits, truths = _pairs()
    x, z = (jnp.array(rows, jnp.float32) for rows in (logits, target_logits))
    found = {"sxe": _divergences(kl_divergence, x, z), "textbook form": _textbook_kl(x, z)}
    errors = {
        who: tuple(map(_error, values.tolist(), truths, truths)) for who, values in found.items()
    }
    limits = tuple(1e-5 if n <= 4 * PER_DECADE else 1e-4 for n in range(len(DISTANCES)))
    return Sweep(
        name="distance 10 to 0.0001: KL divergence",
        magnitude="distance",
        row="x and x + a g, g random",
        quantity="KL divergence",
        at=tuple(DISTANCES),
        limits=limits,
        errors=errors,
        passed=all(map(operator.le, errors["sxe"], limits)),
    )
