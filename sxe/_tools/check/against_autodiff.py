"""The lines of the derivation and the attached rules, against autodiff and central differences."""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sxe import derivation, softmax_cross_entropy
from sxe._tools.check.problem import random_problem
from sxe._tools.check.results import TOLERANCES, Comparison, Example, MeasuredLine
from sxe.derivation import Line, d0, softmax

EXAMPLE = 3, 4  # rows and classes


class Reference(NamedTuple):
    """The derivative that a line has to give, found in two ways."""

    autodiff: Array
    differences: Array


class References(NamedTuple):
    """What the lines are compared with, in float64: L [], ds/dx [N, K, N, K] and dL/dx [N, K]."""

    loss: Array
    jacobian: Reference
    gradient: Reference


def central_differences(f: Callable[[Array], Array], x: Array) -> Array:
    """(f(x + h e_jl) - f(x - h e_jl)) / 2h for all unit matrices e_jl; layout (f's ..., j, l)."""
    h = 2.0**-17  # near the cube root of float64's eps, where h^2 and eps / h balance
    units = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    slopes = jax.vmap(lambda e: (f(x + h * e) - f(x - h * e)) / (2 * h), out_axes=-1)(units)
    return slopes.reshape(*slopes.shape[:-1], *x.shape)


def _error(value: Array, reference: Array, unit: float = 1, kept: Array | bool = True) -> Array:
    """max |value - reference| / unit, over the largest |reference| / unit where that is above 1.

    Entries that are not kept do not count. The error is inf for a wrong shape or a NaN.
    """
    if value.shape != reference.shape:
        return jnp.asarray(jnp.inf)
    v, r = value.astype(jnp.float64) / unit, reference.astype(jnp.float64) / unit
    error = jnp.max(jnp.where(kept, jnp.abs(v - r), 0)) / jnp.maximum(1, jnp.max(jnp.abs(r)))
    return jnp.where(jnp.isnan(error), jnp.inf, error)  # a NaN would slip through Python's max


@partial(jax.jit, static_argnums=0)
def _references(loss: Callable[..., Array], x: Array, y: Array) -> References:
    return References(
        loss(x, y),
        jacobian=Reference(jax.jacfwd(softmax)(x), central_differences(softmax, x)),
        gradient=Reference(jax.grad(d0)(x, y), central_differences(lambda x: d0(x, y), x)),
    )


@partial(jax.jit, static_argnums=0)
def _line_errors(
    line: Line, x: Array, y: Array, references: References
) -> tuple[Array, Array, Array]:
    """Against autodiff, against central differences, and whether there were entries to compare."""
    value, of_gradient = line.closed_form(x, y), 1 / len(x)
    if line.entries == "->":  # D0 is a number: central differences are there for its gradient
        slope = jax.grad(lambda x: jnp.sum(line.closed_form(x, y)))(x)
        against_differences = _error(slope, references.gradient.differences, of_gradient)
        return _error(value, references.loss), against_differences, jnp.asarray(True)
    reference, unit = references.gradient, of_gradient
    if line.entries.startswith("ik"):
        reference, unit = references.jacobian, 1
    kept = jnp.asarray(True) if line.kept is None else line.kept(x)
    autodiff, differences = (
        _error(value, jnp.einsum(line.entries, derivative), unit, kept) for derivative in reference
    )
    return autodiff, differences, jnp.any(kept)


def check_lines(lines: Iterable[Line], x: Array, y: Array) -> tuple[MeasuredLine, ...]:
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


def check_row_sums(x: Array, t: Array) -> tuple[Comparison, ...]:
    """Where the targets' rows do not sum to one, D7 has to hold and D8 has to be far off."""
    lines = [line for line in derivation.LINES if line.name in ("D7", "D8")]
    d7, d8 = (line.autodiff_error for line in check_lines(lines, x, t))
    bound, far = TOLERANCES["float64"].autodiff, 1e-4
    return (
        Comparison("D7 where sum_k y_jk != 1", d7, f"<= {bound:.0e}, it holds", d7 <= bound),
        Comparison("D8 where sum_k y_jk != 1", d8, f"> {far:.0e}, it fails as it must", d8 > far),
    )


@partial(jax.jit, static_argnums=0)
def _rule_errors(loss: Callable[..., Array], x: Array, y: Array, g: Array) -> tuple[Array, ...]:
    """The errors of "vjp" and "jvp": the largest of the rows' losses and of all gradients.

    Gradients are pulled back from the cotangents g, one for each row.
    """

    def pulled_back(rule: str) -> list[Array]:
        value, vjp = jax.vjp(lambda x, y: loss(x, y, reduction="none", rule=rule), x, y)
        gradients = vjp(g.astype(value.dtype))
        return [value, *(dx for dx in gradients if dx.dtype != jax.dtypes.float0)]

    primal = pulled_back("autodiff")
    return tuple(
        jnp.max(jnp.stack([*map(_error, pulled_back(rule), primal)])) for rule in ("vjp", "jvp")
    )


def check_rules(x: Array, targets: dict[str, Array], g: Array) -> tuple[Comparison, ...]:
    """Both rules against autodiff of the loss, for each kind of target, in each dtype."""
    results = []
    for (kind, y), dtype in itertools.product(targets.items(), TOLERANCES):
        y = y.astype(dtype) if jnp.issubdtype(y.dtype, jnp.floating) else y
        errors = map(float, _rule_errors(softmax_cross_entropy, x.astype(dtype), y, g))
        bound = TOLERANCES[dtype].rule
        for rule, error in zip(("vjp", "jvp"), errors, strict=True):
            name = f"{rule}, {kind}, {dtype}"
            results.append(Comparison(name, error, f"<= {bound:.0e}", error <= bound))
    return tuple(results)


def example(seed: int) -> Example:
    problem = random_problem(*EXAMPLE, seed)
    x = problem.x / 2  # closer together, so that few entries look like zero
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
