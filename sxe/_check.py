"""How far each line of the derivation, the attached rules and the loss are from what they equal.

>>> report = check(rows=4, classes=4)
>>> [line.name for line in report.lines if line.passed]
['D0', 'D1', 'D2', 'D3', 'D4', 'D5', 'D6', 'D7', 'D8', 'D9']
>>> report.failures
()
"""

import decimal
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from sxe import derivation
from sxe._softmax_cross_entropy import softmax_cross_entropy
from sxe.derivation import Line, d0, softmax


class Tolerance(NamedTuple):
    """The largest errors that pass, as `_error` measures them."""

    autodiff: float
    differences: float  # in float64 it is the differences that are off, by about N eps / h
    rule: float  # in bfloat16, one rounding


TOLERANCES = {
    "float64": Tolerance(autodiff=1e-13, differences=1e-7, rule=1e-13),
    "float32": Tolerance(autodiff=5e-6, differences=5e-6, rule=5e-6),
    "bfloat16": Tolerance(autodiff=4e-2, differences=4e-2, rule=8e-3),
}
PRECISION = {"loss": 1e-6, "label gradient": 2e-5}  # in float32, in the units of `Truth`
MAX_ENTRIES = 2048  # of x; a Jacobian has the square of that, 32 MiB in float64


class Row(NamedTuple):
    """Logits, exact in float32, and a target for each class, or None: then the label is class 0."""

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
SWEEPS = {  # by magnitude a, and the row of logits with it; the label is class 0
    # To where exp(-a) is about to leave float32's normal numbers.
    "lead": ([float(n) for n in range(81)], "a, 0, -1", lambda a: (a, 0, -1)),
    "offset": ([10 ** (n / 8) for n in range(65)], "a, a + 1, a - 2", lambda a: (a, a + 1, a - 2)),
}
EXAMPLE = 3, 4  # rows and classes


class MeasuredLine(NamedTuple):
    """A line of the derivation, and how far it is from autodiff and from central differences.

    Attributes:
      shown: whether there were entries to compare: one row or one class leaves D1 or D3 none.
    """

    line: Line
    shown: bool
    autodiff_error: float
    differences_error: float
    passed: bool

    @property
    def name(self) -> str:
        return self.line.name


class Comparison(NamedTuple):
    """An error, and what it is expected to be."""

    name: str
    error: float
    expected: str
    passed: bool


class Precision(NamedTuple):
    """A number that float32 rounds away: the truth, two results and their errors."""

    name: str
    truth: float
    sxe: float
    optax: float
    sxe_error: float
    optax_error: float
    passed: bool


class Sweep(NamedTuple):
    """Relative errors of a number in float32 as the logits grow; inf where it is not finite."""

    name: str
    magnitude: str
    row: str  # the logits, with a for the magnitude
    quantity: str
    at: tuple[float, ...]
    errors: dict[str, tuple[float, ...]]
    passed: bool


class Truth(NamedTuple):
    """A row's loss, and its gradient at class 0: s_0 (T - t_0) - t_0 (1 - s_0).

    An error of the loss is measured in units of the loss, one of the gradient in units of the sum
    of its two terms. For a label that sum is the gradient's magnitude. For targets that a model has
    learned the gradient is 0, and the sum is not.
    """

    loss: float
    gradient: float
    terms: float


Matrix = tuple[tuple[float, ...], ...]


class Example(NamedTuple):
    """A small problem with one-hot targets: what autodiff gives, to be looked at."""

    jacobian: tuple[tuple[Matrix, ...], ...]  # of softmax, [i][k][j][l]
    q: Matrix
    y: Matrix
    difference: Matrix  # q - y
    gradient: Matrix  # of the loss, [N, K], by the attached rule
    jacobian_error: float  # of D4
    gradient_error: float  # of D9


class Report(NamedTuple):
    """What `check` measured."""

    rows: int
    classes: int
    seed: int
    dtype: str
    lines: tuple[MeasuredLine, ...]
    row_sums: tuple[Comparison, ...]
    rules: tuple[Comparison, ...]
    precision: tuple[Precision, ...]
    sweeps: tuple[Sweep, ...]
    example: Example

    @property
    def failures(self) -> tuple[str, ...]:
        """The names of what did not pass. optax's errors are reported, not judged."""
        parts = (self.lines, self.row_sums, self.rules, self.precision, self.sweeps)
        return tuple(result.name for part in parts for result in part if not result.passed)


def check(
    rows: int | None = None,
    classes: int | None = None,
    seed: int = 0,
    dtype: DTypeLike = "float64",
) -> Report:
    """Measure the lines, what D8 assumes, the attached rules, and rows that rounding destroys.

    Args:
      rows, classes: N and K of a random problem; None draws 2 to 7 and 2 to 11 from the seed.
      seed: any int; the same seed gives the same report.
      dtype: float64, float32 or bfloat16, in which the lines are evaluated. What they are compared
        with is evaluated in float64, at the same rounded logits and targets.

    Returns:
      The `Report`. Nothing is printed, and the caller's JAX configuration is left as it is.

    Raises:
      ValueError: rows or classes below 1, too many of both, or a dtype without a tolerance.
    """
    N, K = problem_size(rows, classes, seed)
    try:
        name = "None" if dtype is None else jnp.dtype(dtype).name  # of None, NumPy makes float64
    except TypeError:
        name = str(dtype)
    if name not in TOLERANCES:
        raise ValueError(f"dtype: expected one of {', '.join(TOLERANCES)}, got {name}")
    with jax.enable_x64(True):
        x, y, T, labels, g = _problem(N, K, seed)
        return Report(
            *(N, K, seed, name),
            lines=_check_lines(derivation.LINES, x.astype(name), y.astype(name)),
            row_sums=_check_row_sums(x, T * y),
            rules=_check_rules(x, {"integer labels": labels, "dense targets": T * y}, g),
            precision=_check_precision(),
            sweeps=_check_sweeps(),
            example=_example(seed),
        )


def problem_size(rows: int | None, classes: int | None, seed: int) -> tuple[int, int]:
    """N and K of `check`, drawn from the seed where None; raises its ValueError for sizes."""
    draw = random.Random(seed)
    drawn = draw.randint(2, 7), draw.randint(2, 11)
    N, K = drawn[0] if rows is None else rows, drawn[1] if classes is None else classes
    for name, size in (("rows", N), ("classes", K)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if N * K > MAX_ENTRIES:
        raise ValueError(f"rows * classes: expected at most {MAX_ENTRIES}, got {N} * {K} = {N * K}")
    return N, K


def _problem(N: int, K: int, seed: int) -> tuple[Array, ...]:
    """Logits x, targets y that sum to one, row sums T for other targets, labels, cotangents g."""
    draw = random.Random(seed)
    x = [[draw.gauss(0, 2) for _ in range(K)] for _ in range(N)]
    # Every line is linear in y, so targets that only sum to one show what one-hot ones would.
    y = [[draw.expovariate(1) for _ in range(K)] for _ in range(N)]
    y = [[y_ik / sum(y_i) for y_ik in y_i] for y_i in y]
    T = [[draw.uniform(2, 4)] for _ in range(N)]
    labels = [draw.randrange(K) for _ in range(N)]
    g = [draw.gauss(0, 1) for _ in range(N)]
    return tuple(jnp.array(a) for a in (x, y, T, labels, g))


def central_differences(f: Callable[[Array], Array], x: Array) -> Array:
    """(f(x + h e_jl) - f(x - h e_jl)) / 2h for all unit matrices e_jl; layout (f's ..., j, l)."""
    h = 2.0**-17  # near the cube root of float64's eps, where h^2 and eps / h balance
    units = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    slopes = jax.vmap(lambda e: (f(x + h * e) - f(x - h * e)) / (2 * h), out_axes=-1)(units)
    return slopes.reshape(*slopes.shape[:-1], *x.shape)


def _error(value: Array, reference: Array, unit: float = 1, kept: Array | bool = True) -> Array:
    """max |value - reference| in `unit`s, relative to the largest |reference| where above one."""
    if value.shape != reference.shape:
        return jnp.asarray(jnp.inf)
    v, r = value.astype(jnp.float64) / unit, reference.astype(jnp.float64) / unit
    error = jnp.max(jnp.where(kept, jnp.abs(v - r), 0)) / jnp.maximum(1, jnp.max(jnp.abs(r)))
    return jnp.where(jnp.isnan(error), jnp.inf, error)  # a NaN would slip through Python's max


Pair = tuple[Array, Array]  # what autodiff gives, what central differences give


@partial(jax.jit, static_argnums=0)
def _references(loss: Callable[..., Array], x: Array, y: Array) -> tuple[Pair, Pair, Pair]:
    """For L, ds/dx and dL/dx. The differences beside L are for its gradient."""
    ds_dx = jax.jacfwd(softmax)(x), central_differences(softmax, x)
    dL_dx = jax.grad(d0)(x, y), central_differences(lambda x: d0(x, y), x)
    return (loss(x, y), dL_dx[1]), ds_dx, dL_dx


@partial(jax.jit, static_argnums=0)
def _line_errors(
    line: Line, x: Array, y: Array, references: tuple[Pair, Pair, Pair]
) -> tuple[Array, Array, Array]:
    value, (L, ds_dx, dL_dx) = line.closed_form(x, y), references
    if line.entries == "->":
        slope = jax.grad(lambda x: jnp.sum(line.closed_form(x, y)))(x)
        return _error(value, L[0]), _error(slope, L[1], 1 / len(x)), jnp.asarray(True)
    pair, unit = (ds_dx, 1) if line.entries.startswith("ik") else (dL_dx, 1 / len(x))
    kept = jnp.asarray(True) if line.kept is None else line.kept(x)
    autodiff, differences = (
        _error(value, jnp.einsum(line.entries, reference), unit, kept) for reference in pair
    )
    return autodiff, differences, jnp.any(kept)


def _check_lines(lines: Iterable[Line], x: Array, y: Array) -> tuple[MeasuredLine, ...]:
    tolerance = TOLERANCES[x.dtype.name]
    x64, y64 = x.astype(jnp.float64), y.astype(jnp.float64)
    references = _references(softmax_cross_entropy, x64, y64)

    def measured(line: Line) -> MeasuredLine:
        autodiff, differences, shown = map(float, _line_errors(line, x, y, references))
        return MeasuredLine(
            line,
            shown=bool(shown),
            autodiff_error=autodiff,
            differences_error=differences,
            passed=autodiff <= tolerance.autodiff and differences <= tolerance.differences,
        )

    return tuple(measured(line) for line in lines)


def _check_row_sums(x: Array, t: Array) -> tuple[Comparison, ...]:
    """Where the targets' rows do not sum to one, D7 is to hold and D8 is to be far off."""
    lines = [line for line in derivation.LINES if line.name in ("D7", "D8")]
    d7, d8 = (line.autodiff_error for line in _check_lines(lines, x, t))
    bound, far = TOLERANCES["float64"].autodiff, 1e-4
    return (
        Comparison("D7 where sum_k y_jk != 1", d7, f"<= {bound:.0e}, it holds", d7 <= bound),
        Comparison("D8 where sum_k y_jk != 1", d8, f"> {far:.0e}, it fails as it must", d8 > far),
    )


@partial(jax.jit, static_argnums=0)
def _rule_errors(loss: Callable[..., Array], x: Array, y: Array, g: Array) -> tuple[Array, ...]:
    """Of the rows' losses and all gradients, pulled back from a cotangent g_i for each row."""

    def pulled_back(rule: str) -> list[Array]:
        value, vjp = jax.vjp(lambda x, y: loss(x, y, reduction="none", rule=rule), x, y)
        gradients = vjp(g.astype(value.dtype))
        return [value, *(dx for dx in gradients if dx.dtype != jax.dtypes.float0)]

    primal = pulled_back("autodiff")
    return tuple(
        jnp.max(jnp.stack([*map(_error, pulled_back(rule), primal)])) for rule in ("vjp", "jvp")
    )


def _check_rules(x: Array, targets: dict[str, Array], g: Array) -> tuple[Comparison, ...]:
    results = []
    for (kind, y), dtype in itertools.product(targets.items(), TOLERANCES):
        y = y.astype(dtype) if jnp.issubdtype(y.dtype, jnp.floating) else y
        errors = map(float, _rule_errors(softmax_cross_entropy, x.astype(dtype), y, g))
        bound = TOLERANCES[dtype].rule
        for rule, error in zip(("vjp", "jvp"), errors, strict=True):
            name = f"{rule}, {kind}, {dtype}"
            results.append(Comparison(name, error, f"<= {bound:.0e}", error <= bound))
    return tuple(results)


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


def _check_precision() -> tuple[Precision, ...]:
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
    """D0 as it is written, for autodiff."""
    return derivation.d0(x, jax.nn.one_hot(labels, x.shape[1], dtype=x.dtype))


@partial(jax.jit, static_argnums=0)
def _sweep(loss: Callable[..., Array], rows: Array) -> tuple[Array, Array]:
    """Of each row, with label 0: the loss, and its gradient there."""
    label = jnp.zeros(1, jnp.int32)
    values, gradients = jax.vmap(lambda x: jax.value_and_grad(loss)(x[None], label))(rows)
    return values, gradients[:, 0, 0]


def _check_sweeps() -> tuple[Sweep, ...]:
    losses = {"sxe": softmax_cross_entropy, "optax": _optax, "autodiff of D0": _textbook}
    results = []
    for magnitude, (at, row, logits) in SWEEPS.items():
        rows = jnp.array([logits(a) for a in at], jnp.float32)
        truths = [sixty_digits(Row(logits)) for logits in rows.tolist()]  # of what float32 holds
        found = {who: _sweep(loss, rows) for who, loss in losses.items()}
        for n, (quantity, most) in enumerate(PRECISION.items()):
            errors = {
                who: tuple(map(partial(_error_in_units, n=n), numbers[n].tolist(), truths))
                for who, numbers in found.items()
            }
            passed = max(errors["sxe"]) <= most
            name = f"{magnitude} {at[0]:.0f} to {at[-1]:.3g}: {quantity}"
            results.append(Sweep(name, magnitude, row, quantity, tuple(at), errors, passed))
    return tuple(results)


def _error_in_units(value: float, truth: Truth, n: int) -> float:
    """The error of the loss, n = 0, or of the gradient, n = 1; inf if the value is not finite."""
    unit = (truth.loss, truth.terms)[n]
    return abs(value - truth[n]) / unit if math.isfinite(value) else math.inf


def _example(seed: int) -> Example:
    x, _, _, labels, _ = _problem(*EXAMPLE, seed)
    arrays = _pictured(softmax_cross_entropy, x / 2, labels)  # nearer: few entries look like zero
    return Example(*(_tuples(a.tolist()) for a in arrays))


@partial(jax.jit, static_argnums=0)
def _pictured(loss: Callable[..., Array], x: Array, labels: Array) -> tuple[Array, ...]:
    q, y = softmax(x), jax.nn.one_hot(labels, x.shape[1], dtype=x.dtype)
    jacobian, gradient = jax.jacfwd(softmax)(x), jax.grad(loss)(x, labels)
    errors = _error(derivation.d4(x, y), jacobian), _error(derivation.d9(x, y), gradient.T)
    return jacobian, q, y, q - y, gradient, *errors


def _tuples(nested: Any) -> Any:
    return tuple(map(_tuples, nested)) if isinstance(nested, list) else nested


def sixty_digits(row: Row) -> Truth:
    """L of one row (D0) and dL/dx_0 (D7), in 60-digit arithmetic, of what float32 holds."""
    K, (a, *targets) = len(row.logits), _float32(row.label_smoothing or 0.0, *(row.targets or ()))
    with decimal.localcontext(prec=60, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN):
        exp_x = [Decimal(x_k).exp() for x_k in row.logits]
        s = [exp_x_k / sum(exp_x) for exp_x_k in exp_x]
        t = targets or [(1 - a) * (k == 0) + a / K for k in range(K)]
        loss = -sum(t_k * s_k.ln() for t_k, s_k in zip(t, s, strict=True) if t_k)
        # s_0 T and t_0, each less s_0 t_0, which cancels in their difference
        terms = s[0] * sum(t[1:]), t[0] * sum(s[1:])
        return Truth(float(loss), float(terms[0] - terms[1]), float(terms[0] + terms[1]))


def _float32(*values: float) -> list[Decimal]:
    return [Decimal(float(jnp.float32(value))) for value in values]
