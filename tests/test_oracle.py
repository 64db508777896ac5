"""The float64 reference: its gradient against central differences, its values against 60 digits."""

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
    slope = slope_of(lambda x: oracle.loss(x, labels, **options), x)
    np.testing.assert_allclose(oracle.gradient(x, labels, **options), slope, atol=1e-9)


def slope_of(f, x, step=1e-5):
    """Central differences of a scalar function."""
    x = np.asarray(x, np.float64)
    slope = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        e = np.zeros_like(x)
        e[i] = step
        slope[i] = (f(x + e) - f(x - e)) / (2 * step)
    return slope


def test_gradient_is_the_slope_of_log_prob_and_entropy():
    rng = np.random.default_rng(3)
    x, labels = rng.normal(size=(3, 5, 2)), rng.integers(5, size=(3, 2))
    g = rng.normal(size=(2, 3, 2))
    x[1, 2, 0] = x[0] = -700  # a class with almost no probability, and equal logits
    where = rng.random(x.shape) < 0.8
    options = {"axis": 1, "where": where, "class_mask": np.arange(5) != 3, "ignore_index": 2}
    np.put_along_axis(where, labels[:, None], True, axis=1)
    labels[labels == 3] = 2

    def total(x):
        return np.sum(g * np.stack(oracle.log_prob_and_entropy(x, labels, **options)))

    gradient = oracle.log_prob_and_entropy_gradient(x, labels, g, **options)
    np.testing.assert_allclose(gradient, slope_of(total, x), atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", ["forward", "reverse", "jensen_shannon"])
def test_gradient_is_the_slope_of_the_divergence(mode, reduction):
    rng = np.random.default_rng(4)
    p = {name: rng.normal(size=(3, 4, 5)) for name in ("logits", "target_logits")}
    p |= {name: rng.uniform(0.5, 2, size=(3, 4)) for name in ("weights", "target_logit_scale")}
    p |= {"where": rng.random((3, 4, 5)) < 0.8, "logit_scale": 1.3}
    p |= {"class_mask": np.arange(5) != 3}
    static = {"mode": mode, "beta": 0.3, "reduction": reduction}
    g = rng.normal(size=(3, 4) if reduction == "none" else ())
    gradients = oracle.kl_divergence_gradients(g, **p, **static)
    for name in ("logits", "target_logits", "weights", "logit_scale", "target_logit_scale"):

        def total(a, name=name):
            return np.sum(g * oracle.kl_divergence(**(p | {name: a}), **static))

        np.testing.assert_allclose(gradients[name], slope_of(total, p[name]), atol=1e-9)


def test_classes_that_cannot_occur():
    x, z = np.zeros((2, 3)), np.zeros((2, 3))
    x[0, 1] = z[1, 1] = -np.inf
    p = {"logits": x, "target_logits": z, "reduction": "none"}
    log = np.log(1.5)
    np.testing.assert_allclose(oracle.kl_divergence(**p), [np.inf, log])
    np.testing.assert_allclose(oracle.kl_divergence(**p, mode="reverse"), [log, np.inf])
    js = oracle.kl_divergence(**p, mode="jensen_shannon")
    # The softmaxes are 1/2, 0, 1/2 and 1/3, 1/3, 1/3. Their mean is 5/12, 1/6, 5/12.
    expected = np.log(2) / 3 + 2 / 3 * np.log(4 / 5) + np.log(6 / 5)
    np.testing.assert_allclose(js, [expected / 2] * 2)
    log_prob, entropy = oracle.log_prob_and_entropy(x, [1, 1])
    np.testing.assert_allclose(log_prob, [-np.inf, -np.log(3)])
    np.testing.assert_allclose(entropy, np.log([2, 3]))


def test_float64_is_the_rounded_sixty_digits():
    rng = np.random.default_rng(2)
    x, label = rng.normal(size=(1, 6)) * 3, 4
    exact, gradient = oracle.exact_row(x[0], np.eye(6)[label])
    assert oracle.relative_error(oracle.loss(x, [label]), exact) < 1e-14
    got = oracle.gradient(x, [label])[0]
    assert max(map(oracle.relative_error, got, gradient)) < 1e-13


def test_float64_is_the_rounded_sixty_digits_of_entropies_and_divergences():
    rng = np.random.default_rng(5)
    x, z, g = *rng.normal(size=(2, 1, 6)) * 3, (0.0, 1.0)
    *values, gradient = oracle.exact_log_prob_and_entropy(x[0], 4)
    found = oracle.log_prob_and_entropy(x, [4])
    assert max(map(oracle.relative_error, [a[0] for a in found], values)) < 1e-13
    got = oracle.log_prob_and_entropy_gradient(x, [4], g)[0]
    assert oracle.error_of_row(got, gradient) < 1e-13
    for mode in ("forward", "reverse", "jensen_shannon"):
        options = {"mode": mode, "beta": 0.3}
        p = {"logits": x, "target_logits": z}
        value, *gradients = oracle.exact_divergence(x[0], z[0], **options)
        assert oracle.relative_error(oracle.kl_divergence(**p, **options), value) < 1e-13
        got = oracle.kl_divergence_gradients(**p, **options)
        for name, gradient in zip(p, gradients, strict=True):
            assert oracle.error_of_row(got[name][0], gradient) < 1e-13
