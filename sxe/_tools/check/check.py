"""The whole check.

>>> report = check(rows=4, classes=4)
>>> [line.name for line in report.lines if line.passed]
['D0', 'D1', 'D2', 'D3', 'D4', 'D5', 'D6', 'D7', 'D8', 'D9']
>>> [line.name for line in report.row_lines if line.passed]
['E0', 'E1', 'K0', 'K1', 'K2', 'K3', 'K4', 'K5']
>>> report.failures
()
"""

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
)
from sxe._tools.check.precision import check_distances, check_precision, check_sweeps
from sxe._tools.check.problem import problem_size, random_problem
from sxe._tools.check.results import TOLERANCES, Report


def check(
    rows: int | None = None,
    classes: int | None = None,
    seed: int = 0,
    dtype: DTypeLike = "float64",
) -> Report:
    """Measure the lines, what D8 assumes, the attached rules, and what rounding destroys.

    Args:
      rows, classes: N and K of a random problem; None draws 2 to 7 and 2 to 11 from the seed.
      seed: any int; the same seed gives the same report.
      dtype: float64, float32 or bfloat16, in which the lines are evaluated. What they are compared
        with is evaluated in float64, at the same rounded arrays.

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
        problem = random_problem(N, K, seed)
        x, y, z = (a.astype(name) for a in (problem.x, problem.y, problem.z))
        return Report(
            *(N, K, seed, name),
            beta=problem.beta,
            lines=check_lines(derivation.LINES, x, y),
            row_sums=check_row_sums(problem.x, problem.T * problem.y),
            row_lines=check_row_lines(derivation.ROW_LINES, x, z, problem.beta),
            rules=check_rules(problem),
            precision=check_precision(),
            sweeps=check_sweeps(),
            distances=check_distances(),
            example=example(seed),
        )
