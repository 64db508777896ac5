"""The random problem of a check: its size and its arrays."""

import random
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

MAX_ENTRIES = 2048  # of x; the Jacobian has the square of this number, 32 MiB in float64


class Problem(NamedTuple):
    """A problem with N rows and K classes.

    Attributes:
      x: logits [N, K].
      y: targets [N, K] whose rows sum to one.
      T: row sums [N, 1], far from one. The targets T y have these row sums.
      labels: class indices [N].
      g: cotangents [2, N] of the results of each row, which are one or two.
      z: target logits [N, K].
      beta: the weight in the Jensen-Shannon divergence. It is exact in every dtype and differs
        from the default 0.5.
    """

    x: Array
    y: Array
    T: Array
    labels: Array
    g: Array
    z: Array
    beta: float


def problem_size(rows: int | None, classes: int | None, seed: int) -> tuple[int, int]:
    """N and K. The seed draws those that are None: 2 to 7 rows, 2 to 11 classes.

    Raises:
      ValueError: rows or classes is below 1, or rows * classes is too large.
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
    """Arrays in JAX's widest float, drawn from the seed."""
    draw = random.Random(seed)
    x = [[draw.gauss(0, 2) for _ in range(K)] for _ in range(N)]
    # Every line is linear in y. Targets that sum to one therefore cover one-hot targets.
    y = [[draw.expovariate(1) for _ in range(K)] for _ in range(N)]
    y = [[y_ik / sum(y_i) for y_ik in y_i] for y_i in y]
    T = [[draw.uniform(2, 4)] for _ in range(N)]
    labels = [draw.randrange(K) for _ in range(N)]
    g = [[draw.gauss(0, 1) for _ in range(N)] for _ in range(2)]
    z = [[x_ik + draw.gauss(0, 1) for x_ik in x_i] for x_i in x]
    return Problem(
        x=jnp.array(x),
        y=jnp.array(y),
        T=jnp.array(T),
        labels=jnp.array(labels),
        g=jnp.array(g),
        z=jnp.array(z),
        beta=draw.randrange(1, 16, 2) / 16,
    )
