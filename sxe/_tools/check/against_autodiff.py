"""Compare the derivation and the gradient rules with autodiff and central differences."""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sxe import (
    LogProbAndEntropy,
    derivation,
    kl_divergence,
    log_prob_and_entropy,
    softmax_cross_entropy,
)
from sxe._tools.check.problem import Problem, random_problem
from sxe._tools.check.results import TOLERANCES, Comparison, Example, MeasuredLine
from sxe._tools.progress import Show, silent
from sxe.derivation import Line, softmax

EXAMPLE = 3, 4  # rows and classes


class OfValue(NamedTuple):
    """The reference of a line that is a value, in float64.

    Attributes:
      value: the value, computed by sxe.
      differences: the gradient of the value by central differences. It is compared with autodiff
        of the line.
      unit: the unit of the gradient's error. The gradient of a mean over N rows is about 1 / N.
    """

    value: Array
    differences: Array
    unit: float


class OfDerivative(NamedTuple):
    """The references of a line that is a derivative, in float64.

    Attributes:
      autodiff: the derivative by automatic differentiation.
      differences: the derivative by central differences.
      unit: the unit of the error, as in `OfValue`.
    """

    autodiff: Array
    differences: Array
    unit: float


References = dict[str, OfValue | OfDerivative]  # the keys are values of Line.compared_with
Others = dict[str, Array | float]  # the arguments of a Line except x, by name


def central_differences(f: Callable[[Array], Array], x: Array) -> Array:
    """(f(x + h e_jl) - f(x - h e_jl)) / 2h for all unit matrices e_jl, axes (f's ..., j, l)."""
    h = 2.0**-17  # near the cube root of float64's eps, which balances the errors h^2 and eps / h
    units = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    slopes = jax.vmap(lambda e: (f(x + h * e) - f(x - h * e)) / (2 * h), out_axes=-1)(units)
    return slopes.reshape(*slopes.shape[:-1], *x.shape)


def _error(value: Array, reference: Array, unit: float = 1, kept: Array | bool = True) -> Array:
    """max |value - reference| / max(unit, |reference|), where max takes the largest entry.

    Entries that are not kept do not count. The error is inf for a wrong shape or a NaN.
    """
    if value.shape != reference.shape:
        return jnp.asarray(jnp.inf)
    v, r = value.astype(jnp.float64) / unit, reference.astype(jnp.float64) / unit
    error = jnp.max(jnp.where(kept, jnp.abs(v - r), 0)) / jnp.maximum(1, jnp.max(jnp.abs(r)))
    return jnp.where(jnp.isnan(error), jnp.inf, error)  # Python's max could drop a NaN


def _gradient(value: Callable[[Array], Array], x: Array, unit: float) -> OfDerivative:
    """References for the gradient of value(x), or of its sum over the rows."""
    differences = jnp.sum(central_differences(value, x).reshape(-1, *x.shape), axis=0)
    return OfDerivative(jax.grad(lambda x: jnp.sum(value(x)))(x), differences, unit)


@partial(jax.jit, static_argnums=0)
def _references(loss: Callable[..., Array], x: Array, y: Array) -> References:
    """The references of D0 to D9."""
    gradient = _gradient(lambda x: derivation.d0(x, y), x, unit=1 / len(x))
    autodiff, differences, unit = gradient
    return {
        "sxe's mean loss": OfValue(loss(x, y), differences, unit),
        "jacfwd of s": OfDerivative(jax.jacfwd(softmax)(x), central_differences(softmax, x), 1),
        "grad of D0": gradient,
        "(grad of D0)^T": OfDerivative(autodiff.T, differences.T, unit),
    }


@partial(jax.jit, static_argnums=(0, 1), static_argnames="beta")
def _row_references(
    log_prob_and_entropy: Callable[..., LogProbAndEntropy],
    kl_divergence: Callable[..., Array],
    x: Array,
    z: Array,
    *,
    beta: float,
) -> References:
    """The references of E0 to K5."""
    entropy = log_prob_and_entropy(x, jnp.zeros(len(x), jnp.int32)).entropy
    divergence = partial(kl_divergence, x, z, reduction="none")
    by_sxe = {  # the value by sxe, and the line whose value it must equal
        "sxe's entropy": (entropy, "E0", derivation.e0),
        "sxe's KL(p || q)": (divergence(mode="forward"), "K0", lambda x: derivation.k0(x, z)),
        "sxe's KL(q || p)": (divergence(mode="reverse"), "K2", lambda x: derivation.k2(x, z)),
        "sxe's JS": (
            divergence(mode="jensen_shannon", beta=beta),
            *("K4", lambda x: derivation.k4(x, z, beta=beta)),
        ),
    }
    references: References = {}
    for compared_with, (value, name, line) in by_sxe.items():
        gradient = references[f"grad of {name}"] = _gradient(line, x, unit=1)
        references[compared_with] = OfValue(value, gradient.differences, gradient.unit)
    return references


@partial(jax.jit, static_argnums=0)
def _line_errors(
    line: Line, x: Array, others: Others, references: References
) -> tuple[Array, Array, Array]:
    """The errors against autodiff and central differences; whether any entries were compared."""

    def of(x: Array) -> Array:
        arguments = {"x": x, **others}
        return line.closed_form(**{name: arguments[name] for name in line.takes})

    value, reference = of(x), references[line.compared_with]
    unit = reference.unit
    if isinstance(reference, OfValue):
        slope = jax.grad(lambda x: jnp.sum(of(x)))(x)
        against_differences = _error(slope, reference.differences, unit)
        return _error(value, reference.value), against_differences, jnp.asarray(True)
    kept = jnp.asarray(True) if line.kept is None else line.kept(x)
    autodiff, differences = (
        _error(value, jnp.einsum(line.entries, derivative), unit, kept)
        for derivative in (reference.autodiff, reference.differences)
    )
    return autodiff, differences, jnp.any(kept)


def _measured(
    line: Line, x: Array, others: Others, references: References, show: Show
) -> MeasuredLine:
    show(f"Measuring {line.name}")
    tolerance = TOLERANCES[x.dtype.name]
    autodiff, differences, shown = map(float, _line_errors(line, x, others, references))
    return MeasuredLine(
        line,
        shown=bool(shown),
        autodiff_error=autodiff,
        differences_error=differences,
        passed=autodiff <= tolerance.autodiff and differences <= tolerance.differences,
    )


def check_lines(
    lines: Iterable[Line], x: Array, y: Array, show: Show = silent
) -> tuple[MeasuredLine, ...]:
    """Measure D0 to D9, in the dtype of x and y."""
    references = _references(softmax_cross_entropy, x.astype(jnp.float64), y.astype(jnp.float64))
    return tuple(_measured(line, x, {"y": y}, references, show) for line in lines)


def check_row_lines(
    lines: Iterable[Line], x: Array, z: Array, beta: float, show: Show = silent
) -> tuple[MeasuredLine, ...]:
    """Measure E0 to K5, in the dtype of x and z."""
    x64, z64 = x.astype(jnp.float64), z.astype(jnp.float64)
    references = _row_references(log_prob_and_entropy, kl_divergence, x64, z64, beta=beta)
    others: Others = {"z": z, "beta": beta}
    return tuple(_measured(line, x, others, references, show) for line in lines)


def check_row_sums(x: Array, t: Array) -> tuple[Comparison, ...]:
    """Check that for targets whose rows do not sum to one, D7 holds and D8 is far off."""
    lines = [line for line in derivation.LINES if line.name in ("D7", "D8")]
    d7, d8 = (line.autodiff_error for line in check_lines(lines, x, t))
    bound, far = TOLERANCES["float64"].autodiff, 1e-4
    return (
        Comparison("D7 where sum_k y_jk != 1", d7, f"<= {bound:.0e}, must hold", d7 <= bound),
        Comparison("D8 where sum_k y_jk != 1", d8, f"> {far:.0e}, must fail", d8 > far),
    )


class RuleCase(NamedTuple):
    """A loss with gradient rules, called as function(x, second, rule=..., **options)."""

    function: Callable[..., Any]
    second: Array
    options: tuple[tuple[str, str | float], ...] = ()


def rule_cases(problem: Problem) -> dict[str, RuleCase]:
    labels, z, rows = problem.labels, problem.z, ("reduction", "none")
    return {
        "integer labels": RuleCase(softmax_cross_entropy, labels, (rows,)),
        "dense targets": RuleCase(softmax_cross_entropy, problem.T * problem.y, (rows,)),
        "log prob and entropy": RuleCase(log_prob_and_entropy, labels),
        "forward KL": RuleCase(kl_divergence, z, (rows, ("mode", "forward"))),
        "reverse KL": RuleCase(kl_divergence, z, (rows, ("mode", "reverse"))),
        "Jensen-Shannon": RuleCase(
            kl_divergence, z, (rows, ("mode", "jensen_shannon"), ("beta", 0.25))
        ),
    }


@partial(jax.jit, static_argnames=("function", "options"))
def _rule_errors(
    x: Array,
    second: Array,
    g: Array,
    *,
    function: Callable[..., Any],
    options: tuple[tuple[str, str | float], ...],
) -> tuple[Array, ...]:
    """The errors of rules "vjp" and "jvp": the largest error of the results and all gradients.

    Gradients are pulled back from the cotangents g, [results per row, N].
    """

    def pulled_back(rule: str) -> list[Array]:
        call = partial(function, **dict(options), rule=rule)
        results, vjp = jax.vjp(lambda *arrays: jax.tree.leaves(call(*arrays)), x, second)
        gradients = vjp(
            [g_n.astype(y.dtype) for g_n, y in zip(g[: len(results)], results, strict=True)]
        )
        return [*results, *(dx for dx in gradients if dx.dtype != jax.dtypes.float0)]

    primal = pulled_back("autodiff")
    return tuple(
        jnp.max(jnp.stack([*map(_error, pulled_back(rule), primal)])) for rule in ("vjp", "jvp")
    )


def check_rules(problem: Problem, show: Show = silent) -> tuple[Comparison, ...]:
    """Compare both rules with autodiff of the same function, in each dtype."""
    results = []
    for (kind, case), dtype in itertools.product(rule_cases(problem).items(), TOLERANCES):
        show(f"Measuring the rules for {kind} in {dtype}")
        function, second, options = case
        second = second.astype(dtype) if jnp.issubdtype(second.dtype, jnp.floating) else second
        x = problem.x.astype(dtype)
        errors = _rule_errors(x, second, problem.g, function=function, options=options)
        bound = TOLERANCES[dtype].rule
        for rule, error in zip(("vjp", "jvp"), map(float, errors), strict=True):
            name = f"{rule}, {kind}, {dtype}"
            results.append(Comparison(name, error, f"<= {bound:.0e}", error <= bound))
    return tuple(results)


def example(seed: int) -> Example:
    """A small problem with one-hot targets, and what autodiff gives for it."""
    problem = random_problem(*EXAMPLE, seed)
    x = problem.x / 2  # smaller logits, so that few entries are shown as zero
    arrays = _example(softmax_cross_entropy, x, problem.labels)
    return Example(*(_tuples(a.tolist()) for a in arrays))


@partial(jax.jit, static_argnums=0)
def _example(loss: Callable[..., Array], x: Array, labels: Array) -> tuple[Array, ...]:
    q, y = softmax(x), jax.nn.one_hot(labels, x.shape[1], dtype=x.dtype)
    jacobian, gradient = jax.jacfwd(softmax)(x), jax.grad(loss)(x, labels)
    errors = _error(derivation.d4(x, y), jacobian), _error(derivation.d9(x, y), gradient.T)
    return jacobian, q, y, q - y, gradient, *errors


def _tuples(nested: Any) -> Any:
    return tuple(map(_tuples, nested)) if isinstance(nested, list) else nested
