"""The complete check."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sxe import derivation
from sxe._tools.check.against_autodiff import (
    check_lines,
    check_row_lines,
    check_row_sums,
    check_rules,
    example,
    rule_cases,
)
from sxe._tools.check.precision import check_distances, check_precision, check_sweeps
from sxe._tools.check.problem import problem_size, random_problem
from sxe._tools.check.results import TOLERANCES, Report
from sxe._tools.progress import Show, silent


def _silent(total: int) -> AbstractContextManager[Show]:
    return nullcontext(silent)


def check(
    rows: int | None = None,
    classes: int | None = None,
    seed: int = 0,
    dtype: DTypeLike = "float64",
    progress: Callable[[int], AbstractContextManager[Show]] = _silent,
) -> Report:
    """Measure the lines, the assumption of D8, the gradient rules, and the effect of rounding.

    Args:
      rows, classes: N and K of a random problem; None draws 2 to 7 and 2 to 11 from the seed.
      seed: any int; the same seed gives the same report.
      dtype: float64, float32 or bfloat16: the dtype in which the lines are evaluated. The
        references are evaluated in float64, at the same rounded arrays.
      progress: called with the number of steps. It returns a context manager, which gives a
        function that is called with a short text at the start of each step.

    Returns:
      The `Report`. Nothing is printed, and the caller's JAX configuration does not change.

    Raises:
      ValueError: rows or classes is below 1, rows * classes is too large, or the dtype has no
        tolerance.
    """
    N, K = problem_size(rows, classes, seed)
    try:
        name = "None" if dtype is None else jnp.dtype(dtype).name  # NumPy takes None for float64
    except TypeError:
        name = str(dtype)
    if name not in TOLERANCES:
        raise ValueError(f"dtype: expected one of {', '.join(TOLERANCES)}, got {name}")
    with jax.enable_x64(True):
        problem = random_problem(N, K, seed)
        x, y, z = (a.astype(name) for a in (problem.x, problem.y, problem.z))
        steps = len(derivation.LINES) + len(derivation.ROW_LINES)
        steps += len(rule_cases(problem)) * len(TOLERANCES) + 4
        with progress(steps) as show:
            lines = check_lines(derivation.LINES, x, y, show)
            row_sums = check_row_sums(problem.x, problem.T * problem.y)
            row_lines = check_row_lines(derivation.ROW_LINES, x, z, problem.beta, show)
            rules = check_rules(problem, show)
            show("Measuring rows that are lost to rounding")
            precision = check_precision()
            show("Measuring the error by magnitude")
            sweeps = check_sweeps()
            show("Measuring the error by distance")
            distances = check_distances()
            show("Computing the example")
            return Report(
                *(N, K, seed, name),
                beta=problem.beta,
                lines=lines,
                row_sums=row_sums,
                row_lines=row_lines,
                rules=rules,
                precision=precision,
                sweeps=sweeps,
                distances=distances,
                example=example(seed),
            )
