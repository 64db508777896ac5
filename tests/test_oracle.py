"""The oracle itself: gradient against central differences, float64 against 60 digits."""

import numpy as np
import oracle
import pytest


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_is_the_slope_of_the_loss(reduction):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 2, 5))
    labels = rng.integers(0, 5, size=(3, 2))
    options = {
        "weights": rng.uniform(size=(3, 2)),
        "class_weights": rng.uniform(size=5),
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "ignore_index": 1,
        "reduction": reduction,
    }
    step = 1e-5
    slope = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        e = np.zeros_like(x)
        e[i] = step
        up, down = (oracle.loss(x + s * e, labels, **options) for s in (1, -1))
        slope[i] = (up - down) / (2 * step)
    np.testing.assert_allclose(oracle.gradient(x, labels, **options), slope, atol=1e-9)


def test_float64_is_the_rounded_sixty_digits():
    rng = np.random.default_rng(2)
    x, label = rng.normal(size=(1, 6)) * 3, 4
    exact, gradient = oracle.exact_row(x[0], np.eye(6)[label])
    assert oracle.relative_error(oracle.loss(x, [label]), exact) < 1e-14
    got = oracle.gradient(x, [label])[0]
    assert max(map(oracle.relative_error, got, gradient)) < 1e-13
