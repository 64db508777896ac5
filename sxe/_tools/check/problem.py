"""The random problem that is measured: its size, and its arrays."""

import random
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

MAX_ENTRIES = 2048  # of x; a Jacobian has the square of that, 32 MiB in float64


class Problem(NamedTuple):
    """The arrays of a problem with N rows and K classes.

    Attributes:
      x: logits [N, K].
      y: targets [N, K] whose rows sum to one.
      T: row sums [N, 1] far from one, for the targets T y.
      labels: class indices [N].
      g: cotangents of the rows' losses [N].
    """

    x: Array
    y: Array
    T: Array
    labels: Array
    g: Array


def problem_size(rows: int | None, classes: int | None, seed: int) -> tuple[int, int]:
    """N and K. Where they are None the seed decides: 2 to 7 rows, 2 to 11 classes.

    Raises:
      ValueError: rows or classes below 1, or too many of both.
    """
    draw = random.Random(seed)
    drawn = draw.randint(2, 7), draw.randint(2, 11)
    N, K = drawn[0] if rows is None else rows, drawn[1] if classes is None else classes
    for name, size in (("rows", N), ("classes", K)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if N * K > MAX_ENTRIES:
        raise ValueError(f"rows * classes: expected at most {MAX_ENTRIES}, got {N} * {K} = {N * K}")
    return N, K


def random_problem(N: int, K: int, seed: int) -> Problem:
    """The same seed gives the same arrays, in JAX's widest float."""
    draw = random.Random(seed)
    x = [[draw.gauss(0, 2) for _ in range(K)] for _ in range(N)]
    # Every line is linear in y, so targets that only sum to one show what one-hot ones would.
    y = [[draw.expovariate(1) for _ in range(K)] for _ in range(N)]
    y = [[y_ik / sum(y_i) for y_ik in y_i] for y_i in y]
    T = [[draw.uniform(2, 4)] for _ in range(N)]
    labels = [draw.randrange(K) for _ in range(N)]
    g = [draw.gauss(0, 1) for _ in range(N)]
    return Problem(*(jnp.array(a) for a in (x, y, T, labels, g)))
