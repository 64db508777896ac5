"""Comparison with 60-digit arithmetic, for rows where rounding ruins the textbook formulas."""

import functools

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from option_cases import RULES, one_in
from tolerances import FLOAT64_BAR, GRADIENT_BAR, LOSS_BAR, SMALLEST, ZERO

import sxe


def extreme_rows(dtype, classes=8):
    """Rows with scales up to 80, offsets up to 1e8, and leads up to 80, rounded to the dtype."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=classes) * scale for scale in (1, 3, 10, 30, 80)]
    offsets = (1e4, -1e4, 1e8, -1e8)
    rows += [rng.normal(size=classes) * scale + o for scale in (1, 10, 80) for o in offsets]
    for lead in (0, 1e-3, 0.3, 0.7, 5, 10, 15, 17, 20, 30, 40, 60, 80):
        row = rng.normal(size=classes)
        row[2] = row.max() + lead
        rows += [row, row - row.max(), row * 0 + np.where(np.arange(classes) == 2, lead, 0)]
    rows += [np.zeros(classes), np.full(classes, 1e8), np.arange(classes) % 2 * 50.0]
    rows += [np.where(np.arange(classes) < 2, 60.0, 0.0)]  # two maxima far above the rest
    if dtype == "float16":
        rows = [np.clip(row, -6e4, 6e4) for row in rows]
    return np.asarray(jnp.asarray(np.stack(rows), dtype))


@functools.cache
def problem(dtype):
    """Each extreme row with two labels, its maximum and another class, and the exact results."""
    x = extreme_rows(dtype)
    best = np.argmax(x.astype(np.float64), axis=-1)
    labels = np.concatenate([best, (best + 3) % x.shape[1]])
    x = np.concatenate([x, x])
    exact = [oracle.exact_row(row, np.eye(x.shape[1])[y]) for row, y in zip(x, labels, strict=True)]
    return x, labels, exact


def worst(actual, exact):
    """The largest relative error among entries whose exact magnitude is not negligible."""
    pairs = [(a, e) for a, e in zip(actual, exact, strict=True) if abs(e) > SMALLEST]
    assert pairs
    return max(oracle.relative_error(a, e) for a, e in pairs)


def value_and_gradients(x, targets, rule, jit):
    f = compiled_sum(rule) if jit else functools.partial(sum_of_rows, rule=rule)
    (_, each), gradient = f(jnp.asarray(x), np.asarray(targets))
    return np.asarray(each), np.asarray(gradient)


def sum_of_rows(x, targets, rule):
    def total(x):
        each = sxe.softmax_cross_entropy(x, targets, reduction="none", rule=rule)
        return each.sum(), each

    return jax.value_and_grad(total, has_aux=True)(x)


@functools.cache
def compiled_sum(rule):
    return jax.jit(functools.partial(sum_of_rows, rule=rule))


DENSE = {"integer": False, "dense": True}
HEAD = {"logits": False, "head": True}


@one_in(2, dense=DENSE, jit={"eager": False, "jitted": True}, rule=RULES)
def test_float32_extremes(rule, jit, dense):
    x, labels, exact = problem("float32")
    targets = jax.nn.one_hot(labels, x.shape[1]) if dense else labels
    loss, gradient = value_and_gradients(x, targets, rule, jit)
    assert worst(loss, [row_loss for row_loss, _ in exact]) < LOSS_BAR
    assert worst(gradient.ravel(), [d for _, row in exact for d in row]) < GRADIENT_BAR


@one_in(2, dense=DENSE, rule=RULES)
def test_without_jit(rule, dense):
    x, labels, exact = problem("float32")
    targets = jax.nn.one_hot(labels, x.shape[1]) if dense else labels
    with jax.disable_jit():
        loss, gradient = value_and_gradients(x, targets, rule, jit=False)
    assert worst(loss, [row_loss for row_loss, _ in exact]) < LOSS_BAR
    assert worst(gradient.ravel(), [d for _, row in exact for d in row]) < GRADIENT_BAR


@pytest.mark.parametrize("rule", RULES)
def test_float64_extremes(rule):
    with jax.enable_x64(True):
        x, labels, exact = problem("float64")
        loss, gradient = value_and_gradients(x, labels, rule, jit=True)
    assert loss.dtype == gradient.dtype == np.float64
    assert worst(loss, [row_loss for row_loss, _ in exact]) < FLOAT64_BAR
    assert worst(gradient.ravel(), [d for _, row in exact for d in row]) < FLOAT64_BAR


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rule", RULES)
def test_low_precision_rounds_once(rule, dtype):
    x, labels, exact = problem(dtype)
    loss, gradient = value_and_gradients(x, labels, rule, jit=True)
    assert loss.dtype == np.float32
    assert gradient.dtype == jnp.dtype(dtype)
    assert worst(loss, [row_loss for row_loss, _ in exact]) < LOSS_BAR
    # Half a unit in the last place for the final rounding, plus the error before it.
    info = jnp.finfo(dtype)
    exact_gradient = [d for _, row in exact for d in row]
    normal = [
        (a, e)
        for a, e in zip(gradient.ravel(), exact_gradient, strict=True)
        if abs(e) > float(info.tiny)
    ]
    error = max(oracle.relative_error(a, e) for a, e in normal)
    assert error < float(info.eps) / 2 + GRADIENT_BAR


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [1e7, 1e30, -1e30, 0.0])
def test_equal_logits(rule, value):
    loss, gradient = value_and_gradients(np.full((1, 2048), value, np.float32), [5], rule, True)
    assert loss[0] == pytest.approx(np.log(2048), rel=LOSS_BAR)
    # This is a quotient of exact numbers, so it is as precise as a loss.
    assert np.delete(gradient[0], 5) == pytest.approx(1 / 2048, rel=LOSS_BAR)
    assert gradient[0].astype(np.float64).sum() == pytest.approx(0, abs=ZERO)


@pytest.mark.parametrize("rule", RULES)
def test_a_confident_row_sums_to_zero_among_others(rule):
    """A row with loss 1e-8 has an accurate gradient at its label, among rows that need no care."""
    x = np.zeros((3, 5), np.float32)
    x[1, 3] = 20
    loss, gradient = value_and_gradients(x, [0, 3, 1], rule, True)
    assert loss[1] == pytest.approx(4 * np.exp(-20), rel=LOSS_BAR)
    assert gradient[1, 3] == pytest.approx(-4 * np.exp(-20), rel=LOSS_BAR)


def soft_targets(dtype="float32"):
    """Logits and dense targets where one class has most of the sum, none has, or several tie."""
    rng = np.random.default_rng(11)
    few = [([20, 0, -np.inf, -np.inf], [1, 1e-9, 0, 0]), ([9, 0, 0, 0], [1, 1e-4, 1e-4, 0])]
    few += [([0, 9, 0, 1], [1e-4, 3e4, 1e-4, 1]), ([5, 0, 0, 0], [1000, 0, 3, 1])]
    few += [([30, 30, 0, 1], [1, 1, 1e-8, 0]), ([0, 0, 0, 0], [0, 0, 0, 0])]
    many = []
    for sharpness in (1, 8, 20, 40):  # teachers, with students who agree or disagree
        for lead in (0, 5, 20):
            z = rng.normal(size=37)
            z[4] = z.max() + sharpness
            x = rng.normal(size=37)
            x[[4, 5][lead == 5]] = x.max() + lead
            many += [(x, np.exp(z - z.max())), (x, np.exp(z - z.max()) * 1e-6)]
    return [
        [np.asarray(jnp.asarray(a, dtype)) for a in zip(*rows, strict=True)] for rows in (few, many)
    ]


def worst_soft(gradients, x, t):
    """The largest error of any row's gradient, in units of the terms of D7. NaN if one is NaN."""
    rows = zip(np.asarray(gradients), x, t, strict=True)
    return np.max([oracle.gradient_errors(*row) for row in rows])


@pytest.mark.parametrize("rule", RULES)
def test_dense_targets_of_which_one_class_holds_most(rule):
    """T - t_l must not be a difference: next to a target of 1, one of 1e-9 is half the gradient."""
    for x, t in soft_targets():
        loss, gradient = value_and_gradients(x, t, rule, jit=True)
        assert worst_soft(gradient, x, t) < GRADIENT_BAR
        for actual, x_i, t_i in zip(loss, x, t, strict=True):
            possible = x_i > -np.inf
            exact, _ = oracle.exact_row(x_i[possible], t_i[possible])
            assert actual == exact == 0 or oracle.relative_error(actual, exact) < LOSS_BAR


@pytest.mark.parametrize("rule", RULES)
def test_dense_targets_in_float64(rule):
    with jax.enable_x64(True):
        for x, t in soft_targets("float64"):
            _, gradient = value_and_gradients(x, t, rule, jit=True)
            assert worst_soft(gradient, x, t) < FLOAT64_BAR


SMOOTHINGS = [0.5, 0.1, 1e-3, 1e-4, 1e-6, 1e-8]
WEIGHTS = [None, [1000, 0.001, 0.001, 0.001], [0.001, 1000, 0.001, 0.001], [2, 3, 0, 1]]


def smoothed(call):
    """Errors for small label smoothings, with class weights that are largest or smallest at y."""
    x = np.array([[40, 0, 0, 0], [0, 12, 3, -2], [1, 2, 3, 4], [2, 2, 2, 2]], np.float32)
    labels = np.array([0, 1, 0, 0])
    for a in SMOOTHINGS:
        for c in WEIGHTS:
            a = np.float32(a)
            c = None if c is None else np.array(c, np.float32)
            gradients = call(x, labels, label_smoothing=a, class_weights=c)
            t = [oracle.exact_targets(label, 4, a, c) for label in labels]
            yield a, c, worst_soft(gradients, x, t)


@functools.cache
def gradient_of_smoothed(rule, head):
    def loss(x, labels, label_smoothing, class_weights):
        options = {
            "label_smoothing": label_smoothing,
            "class_weights": class_weights,
            "reduction": "sum",
            "rule": rule,
        }
        if not head:
            return sxe.softmax_cross_entropy(x, labels, **options)
        eye = jnp.eye(4)
        return sxe.linear_softmax_cross_entropy(x, eye, labels, **options)

    return jax.jit(jax.grad(loss))


@one_in(2, head=HEAD, rule=RULES)
def test_small_label_smoothing_and_class_weights_of_different_size(rule, head):
    f = gradient_of_smoothed(rule, head)
    for *case, error in smoothed(lambda x, y, **options: f(x, y, *options.values())):
        assert error < GRADIENT_BAR, case


def test_with_gradient_is_as_exact_for_soft_targets():
    def gradient(x, labels, **options):
        return sxe.softmax_cross_entropy_with_gradient(x, labels, reduction="sum", **options)[1]

    for *case, error in smoothed(jax.jit(gradient)):
        assert error < GRADIENT_BAR, case
    for x, t in soft_targets():
        assert worst_soft(gradient(x, t), x, t) < GRADIENT_BAR


@one_in(2, head=HEAD, rule=RULES)
def test_soft_targets_over_shards_of_classes(rule, head):
    """The class with the largest target is on one device, the other targets are on another."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    loss = sxe.linear_softmax_cross_entropy if head else sxe.softmax_cross_entropy
    loss = sxe.over_mesh(loss, mesh, classes="model")

    def total(x, labels, **options):
        x = (x, jnp.eye(x.shape[-1])) if head else (x,)
        return loss(*x, labels, reduction="sum", rule=rule, **options)

    f = jax.jit(jax.grad(total))
    for *case, error in smoothed(f):
        assert error < GRADIENT_BAR, case
    (x, t), _ = soft_targets()
    x = np.where(np.isfinite(x), x, -30)  # a product with the head's kernel would be NaN
    for order in ([0, 1, 2, 3], [1, 2, 0, 3]):
        assert worst_soft(f(x[:, order], t[:, order]), x[:, order], t[:, order]) < GRADIENT_BAR


@pytest.mark.parametrize("rule", RULES)
def test_targets_of_either_sign(rule):
    """D7 is true for every t. A target may be an advantage times a one-hot row."""
    rng = np.random.default_rng(12)
    t = rng.normal(size=(30, 5)).astype(np.float32)
    t[:10] *= np.eye(5)[rng.integers(5, size=10)]
    t[10:15] = [2, 1.5, -3, 0, 0.1]
    x = rng.normal(size=t.shape).astype(np.float32)
    loss, gradient = value_and_gradients(x, t, rule, jit=True)
    oracle.assert_close(loss, oracle.loss(x, t, reduction="none"))
    oracle.assert_close(gradient, oracle.gradient(x, t, reduction="sum"))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([1, 2, 7, 64]),
    scale=st.floats(0.0, 80.0),
    sharpness=st.floats(0.0, 80.0),
    size=st.sampled_from([1e-6, 1.0, 1000.0]),
    ties=st.integers(1, 3),
    rule=st.sampled_from(RULES),
)
def test_any_dense_targets(seed, classes, scale, sharpness, size, ties, rule):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(1, classes)) * scale).astype(np.float32)
    z = rng.normal(size=(1, classes)) * sharpness
    z[0, rng.permutation(classes)[:ties]] = z.max()
    t = (np.exp(z - z.max()) * size).astype(np.float32)
    t[t < 1e-30] = 0
    _, gradient = compiled(rule, classes)(x, t)
    exact = oracle.exact_row(x[0], t[0])[1]
    # As for labels: with rule "autodiff", JAX may add up numbers below float32's normal range.
    normal = [rule != "autodiff" or abs(d) > 1e-31 for d in exact]
    errors = np.array(oracle.gradient_errors(np.asarray(gradient[0]), x[0], t[0]))[normal]
    assert np.max(errors, initial=0.0) < GRADIENT_BAR


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("classes", [1009, 50021])
def test_many_classes(rule, classes):
    x = np.random.default_rng(3).normal(size=(2, classes)).astype(np.float32)
    x[1] *= 10
    labels = np.array([7, int(x[1].argmax())])
    loss, gradient = value_and_gradients(x, labels, rule, True)
    np.testing.assert_allclose(loss, oracle.loss(x, labels, reduction="none"), rtol=LOSS_BAR)
    expected = oracle.gradient(x, labels, reduction="sum")
    np.testing.assert_allclose(gradient, expected, rtol=GRADIENT_BAR, atol=SMALLEST)


@functools.cache
def compiled_hessian(rule):
    f = functools.partial(sxe.softmax_cross_entropy, labels=np.array(1), rule=rule)
    return jax.jit(jax.hessian(f))


@pytest.mark.parametrize("lead", [0.3, 5.0, 20.0, 40.0])
@pytest.mark.parametrize("rule", RULES)
def test_second_derivative_of_a_confident_row(rule, lead):
    """The Hessian at a confident label is diag(q) - q q^T. Its entries are small, but not 0."""
    x = np.zeros(4, np.float32)
    x[1] = lead
    hessian = compiled_hessian(rule)(x)
    q = np.exp(x.astype(np.float64) - lead)
    q /= q.sum()
    expected = -np.outer(q, q)
    np.fill_diagonal(expected, q * (np.arange(4) != 1) * (1 - q))
    expected[1, 1] = q[1] * (q.sum() - q[1]) if lead < 30 else q[[0, 2, 3]].sum()
    np.testing.assert_allclose(hessian, expected, rtol=GRADIENT_BAR)


@functools.cache
def compiled(rule, classes):
    def rows(x, labels):
        f = functools.partial(sxe.softmax_cross_entropy, reduction="none", rule=rule)
        loss, pullback = jax.vjp(lambda x: f(x, labels), x)
        return loss, *pullback(jnp.ones_like(loss))

    return jax.jit(rows)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([1, 2, 7, 64]),
    scale=st.floats(0.0, 80.0),
    offset=st.sampled_from([0.0, 1.0, -1e4, 1e6, 1e8]),
    lead=st.floats(0.0, 80.0),
    ties=st.integers(1, 3),
    rule=st.sampled_from(RULES),
)
@example(seed=0, classes=64, scale=6.0, offset=1e8, lead=73.0, ties=1, rule="autodiff")
def test_any_row(seed, classes, scale, offset, lead, ties, rule):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1, classes)) * scale
    x[0, rng.permutation(classes)[:ties]] = x.max() + lead
    x = (x + offset).astype(np.float32)
    label = rng.integers(classes)
    row_loss, row = oracle.exact_row(x[0], np.eye(classes)[label])
    loss, gradient = compiled(rule, classes)(x, np.array([label]))
    # Without a closed form, the gradient at the largest logit is a sum over other classes. Terms
    # below float32's normal range are 0.
    smallest = 1e-31 if rule == "autodiff" else SMALLEST
    for actual, exact, bar, least in [
        (loss[0], row_loss, LOSS_BAR, SMALLEST),
        *(
            (a, e, GRADIENT_BAR, smallest)
            for a, e in zip(np.asarray(gradient[0]), row, strict=True)
        ),
    ]:
        assert abs(exact) < least or oracle.relative_error(actual, exact) < bar


@pytest.mark.parametrize("rule", RULES)
def test_leads_that_float32_rounds(rule):
    """x - m is no float32 number here. Rounding it would change the loss by up to 4e-6."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(200, 2))
    x[:, 0] = x.max(-1) + rng.uniform(0, 80, size=200)
    x = x.astype(np.float32)
    loss, gradient = value_and_gradients(x, np.zeros(200, int), rule, True)
    exact = [oracle.exact_row(row, [1, 0]) for row in x]
    # The bound is below LOSS_BAR, to exclude the error of a rounded difference, up to 4e-6.
    assert worst(loss, [row_loss for row_loss, _ in exact]) < 5e-7
    assert worst(gradient.ravel(), [d for _, row in exact for d in row]) < GRADIENT_BAR


@pytest.mark.parametrize("rule", RULES)
def test_terms_too_small_for_float32_add_up(rule):
    """61 terms of exp(-88) are 1 % of the loss and of the gradient at the largest logit."""
    x = np.array([[0.0, -80.0, -80.0] + 61 * [-88.0]], np.float32)
    row_loss, row = oracle.exact_row(x[0], np.eye(64)[0])
    loss, gradient = compiled(rule, 64)(x, np.array([0]))
    assert oracle.relative_error(loss[0], row_loss) < LOSS_BAR
    assert worst(gradient[0, 1:3], row[1:3]) < GRADIENT_BAR
    if rule != "autodiff":  # here JAX sums derivatives that are each flushed to 0
        assert oracle.relative_error(gradient[0, 0], row[0]) < GRADIENT_BAR


def test_with_gradient_is_as_exact():
    x, labels, exact = problem("float32")
    loss, gradient = sxe.softmax_cross_entropy_with_gradient(x, labels, reduction="sum")
    assert np.isfinite(loss)
    assert worst(np.asarray(gradient).ravel(), [d for _, row in exact for d in row]) < GRADIENT_BAR


@pytest.mark.slow
def test_with_all_optimizations():
    """Runs all tests above with XLA's default optimizations, as in users' programs."""
    flags = "--xla_backend_optimization_level=3 --xla_llvm_disable_expensive_passes=false"
    flags += " --xla_cpu_use_fusion_emitters=true"
    fresh.run_tests(__file__, XLA_FLAGS=flags)


@pytest.mark.slow
def test_on_one_device():
    """The same tests on one device, where confident rows use their second largest logit."""
    flags = "--xla_force_host_platform_device_count=1"
    others = ("-k", "not test_on_one_device")  # this test would start itself again
    fresh.run_tests(*others, __file__, XLA_FLAGS=flags)
