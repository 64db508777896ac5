"""Several labels per row, with weights: t_k = sum_m w_m [k = y_m].

The tests compare the results with those of the equal dense targets.
"""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import option_cases
import oracle
import pytest
from hlo import collectives
from jax import export
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from option_cases import FORWARD_RULES, RULES, in_fours, one_in, vjp_by_default
from oracle import assert_close, naming
from problems import cotangent, floats, head_problem, logits_problem, with_gradients
from programs import all_of, quick_jit
from tolerances import FLOAT64_BAR, GRADIENT_BAR, LOSS_BAR

import sxe
from sxe import _linear_softmax_cross_entropy, _softmax_cross_entropy
from sxe._backend import Backend

HEAD, LOGITS = sxe.linear_softmax_cross_entropy, sxe.softmax_cross_entropy
N, D, K, M = 8, 3, 24, 5
NAN, INF = float("nan"), float("inf")
LOSSES = {"head": HEAD, "logits": LOGITS}
both_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
# The head shares the arithmetic of targets with the loss of logits.
rules_in_turn = one_in(2, loss=LOSSES, rule=RULES)


def sparse(rows, classes, *, labels=M, dtype="float32", seed=0):
    """Labels and their weights. Some rows repeat a label or have an invalid padding label."""
    rng = np.random.default_rng([seed, *rows, classes, labels])
    y = rng.integers(0, classes, (*rows, labels)).astype(np.int32)
    w = np.asarray(rng.uniform(0.1, 1, y.shape), jnp.dtype(dtype))
    y[..., -1] = np.where(rng.random(rows) < 0.5, y[..., 0], y[..., -1])
    padding = rng.random(rows) < 0.4
    y[..., 1] = np.where(padding, rng.choice([-1, -100, classes, 2**31 - 1], rows), y[..., 1])
    w[..., 1] = np.where(padding, 0, w[..., 1])
    return y, w


def dense(labels, label_weights, classes):
    """The same targets as a dense array [..., K] in float64."""
    t = np.zeros((*labels.shape[:-1], classes))
    for at in np.ndindex(labels.shape):
        if 0 <= labels[at] < classes:
            t[at[:-1]][labels[at]] += np.float64(label_weights[at])
    return t


def dense_of(y, classes):
    """A differentiable function from label weights to the same targets as a dense array."""

    def targets(w):
        one_hot = jax.nn.one_hot(y, classes, dtype=w.dtype)
        return jnp.sum(w[..., None] * one_hot, axis=-2)

    return targets


def problem(loss, *options, labels=M, dtype="float32", seed=0):
    """The arguments of a call with label_weights, and with dense targets for the reference."""
    make = head_problem if loss is HEAD else logits_problem
    shape = (N, D, K) if loss is HEAD else (N, K)
    given = make(*options, dense=True, dtype=dtype, shape=shape, seed=seed)
    wide = "float64" if dtype == "float64" else "float32"
    y, w = sparse((N,), K, labels=labels, dtype=wide, seed=seed)
    if "where_class" in options:
        w = np.where(np.take_along_axis(given["where"], np.clip(y, 0, K - 1), -1), w, 0)
        w = np.asarray(w, jnp.dtype(wide))
    return given | {"labels": y, "label_weights": w}, given | {"labels": dense(y, w, K)}


def truth_of(loss):
    return oracle.head_loss if loss is HEAD else oracle.loss


def gradients_of(loss, p, g, **options):
    if loss is HEAD:
        return oracle.head_gradients(**p, g=g, **options)
    return {"logits": oracle.gradient(**p, g=g, **options)}


# Other options

CASES = {
    loss: [
        tuple(name for name in case if name not in ("dense", "ignore_index"))
        for case in in_fours(*(option_cases.HEAD if loss is HEAD else option_cases.LOGITS))
    ]
    for loss in (HEAD, LOGITS)
}


@vjp_by_default
@both_losses
@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_options(loss, half, rule):
    """The value and all gradients, in combination with other options."""
    for i, case in enumerate(dict.fromkeys(CASES[loss][12 * half : 12 * (half + 1)]), 12 * half):
        reduction = ("mean", "sum", "none")[i % 3]
        p, right = problem(loss, *case, seed=i, labels=(M, 20)[i % 4 == 3])
        g = cotangent(p, reduction, seed=i)
        static = {"reduction": reduction, "rule": rule}
        static |= {"chunk_size": 3} if loss is HEAD else {}
        of_w = dense_of(p["labels"], K)

        def by_dense(p, of_w=of_w, static=static):
            p = dict(p)
            return loss(**p | {"labels": of_w(p.pop("label_weights"))}, **static)

        both = [lambda p, static=static: loss(**p, **static), by_dense]
        found = quick_jit(all_of(map(with_gradients, both)))([(p, g)] * 2)
        (value, gradients), (_, expected) = found
        with naming(case, reduction):
            assert_close(value, truth_of(loss)(**right, reduction=reduction))
            for name, d in gradients_of(loss, right, g, reduction=reduction).items():
                if name in gradients:
                    assert_close(gradients[name], d, scale=max(1, np.abs(d).max()))
        # The other gradients equal those of the loss of dense targets.
        assert expected.keys() == gradients.keys()
        for name, d in expected.items():
            with naming(case, reduction, name):
                assert gradients[name].dtype == p[name].dtype
                right = np.asarray(d, np.float64)
                largest = np.abs(right[np.isfinite(right)]).max(initial=0)
                assert_close(gradients[name], right, "float32", scale=max(8, largest))


@both_losses
def test_the_derivative_by_a_label_weight_is_its_labels_cost(loss):
    p, right = problem(loss, "where", "class_weights")
    g = cotangent(p, "none")
    x = oracle.head(p["hidden"], p["kernel"])[0] if loss is HEAD else np.float64(p["logits"])
    cost = np.log(np.exp(x).sum(-1, keepdims=True)) - x
    is_class = (p["labels"] >= 0) & (p["labels"] < K)
    at = np.where(is_class, p["labels"], 0)
    expected = np.take_along_axis(cost, at, -1) * p["class_weights"][at]
    expected = np.where(is_class & p["where"][:, None], g[:, None] * expected, 0)
    run = with_gradients(lambda p: loss(**p, reduction="none"), by=["label_weights"])
    value, gradients = jax.jit(run)(p, g)
    assert_close(value, truth_of(loss)(**right, reduction="none"))
    assert_close(gradients["label_weights"], expected)


@one_in(
    2,
    indirect=["x64"],
    loss=LOSSES,
    dtype=["bfloat16", "float16", "float32", "float64"],
    x64=[False, True],
)
def test_dtypes(loss, dtype, x64):
    """Each gradient has the dtype of its input, whatever integer dtype the labels have."""
    if dtype == "float64" and not x64:
        pytest.skip("needs x64")
    p, right = problem(loss, dtype=dtype)
    y = np.where(p["label_weights"] == 0, 0, p["labels"]).astype(np.uint8)
    w = jnp.asarray(p["label_weights"], dtype)
    p |= {"labels": y, "label_weights": w}
    right["labels"] = dense(y, np.asarray(w, np.float64), K)
    value, gradients = with_gradients(lambda p: loss(**p))(p, jnp.ones((), value_dtype(dtype)))
    assert value.dtype == value_dtype(dtype)
    assert_close(value, truth_of(loss)(**right))
    for name, d in gradients_of(loss, right, 1.0).items():
        if name in p:
            assert gradients[name].dtype == p[name].dtype
            assert_close(gradients[name], d)
    assert gradients["label_weights"].dtype == w.dtype


def value_dtype(dtype):
    return jnp.float64 if dtype == "float64" else jnp.float32


@one_in(3, axis=[0, 1, -2, (1,), (0, 2), (2, 0), (0, 1, 2)], labels=[3, 2, 20])
def test_the_labels_axis_is_the_last_wherever_the_classes_are(axis, labels):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, 5, 2)).astype(np.float32)
    axes = tuple(a % 3 for a in (axis if isinstance(axis, tuple) else (axis,)))
    rows = tuple(n for i, n in enumerate(logits.shape) if i not in axes)
    shape = tuple(logits.shape[a] for a in axes)
    y, w = sparse(rows, int(np.prod(shape)), labels=labels)
    t = dense(y, w, int(np.prod(shape))).reshape(*rows, *shape)
    t = np.moveaxis(t, range(len(rows), 3), axes)
    options = {"label_weights": w, "axis": axis}
    rows_of = sxe.softmax_cross_entropy(logits, y, **options, reduction="none")
    loss, gradient = sxe.softmax_cross_entropy_with_gradient(logits, y, **options)
    assert_close(rows_of, oracle.loss(logits, t, axis=axis, reduction="none"))
    assert_close(loss, oracle.loss(logits, t, axis=axis))
    assert_close(gradient, oracle.gradient(logits, t, axis=axis))


def test_as_many_labels_as_classes_are_not_dense_targets():
    rng = np.random.default_rng(5)
    logits = np.float32(rng.normal(size=(6, 6)))
    y, w = rng.integers(0, 6, (6, 6)), np.float32(rng.uniform(size=(6, 6)))
    t = dense(y, w, 6)
    for axis, targets in ((-1, t), (0, t.T)):
        value = sxe.softmax_cross_entropy(logits, y, label_weights=w, axis=axis)
        assert_close(value, oracle.loss(logits, targets, axis=axis))


def test_metrics_are_those_of_dense_targets():
    p, right = problem(LOGITS, "weights", "class_weights", "z_loss")
    right["labels"] = right["labels"].astype(np.float32)
    _, ours = LOGITS(**p, return_metrics=True)
    _, theirs = LOGITS(**right, return_metrics=True)
    assert ours.label_rank is None
    assert theirs.label_rank is None
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert_close(a, np.asarray(b, np.float64), "float32")


# Precision


def extreme_rows(dtype):
    """Logits, labels and weights. One or several labels have nearly all weight, or are repeated."""
    rows = [
        ([20, 0, 0, 1], [0, 1, 0, 2], [1, 1e-9, 0, 0]),
        ([20, 0, 0, 1], [0, 1, 0, 1], [0.5, 1e-9, 0.5, 3e-9]),
        ([0, 20, 3, 1], [0, 1, 0, 1], [1e-9, 1, 1e-9, 1e-4]),
        ([9, 0, 0, 0], [1, 2, 0, 1], [1e-4, 1e-4, 1, 0]),
        ([0, 9, 0, 1], [1, 1, 1, 0], [1e4, 1e4, 1e4, 1e-4]),
        ([60, 0, 0, 0], [0, 0, 0, 0], [0.3, 0.3, 0.3, 0.1]),
        ([1e8, 1e8, 0, 0], [1, 0, 2, 0], [0.25, 0.5, 0, 0.25]),
        ([30, 30, 0, 1], [0, 1, 2, 3], [1, 1, 1e-8, 0]),
        ([5, -40, 0, 2], [1, 3, 9, 3], [1e-6, 1e3, 0, 1]),
        ([0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 0]),
    ]
    x, y, w = zip(*rows, strict=True)
    return np.array(x, dtype), np.array(y), np.array(w, dtype)


def exact_targets(y, w, classes, a=0.0, c=None):
    """t_k = c_k ((1 - a) sum_m w_m [k = y_m] + a / K) for one row, in 60-digit arithmetic."""
    with mpmath.workdps(oracle.DIGITS):
        c = np.ones(classes) if c is None else c
        w, a = [mpmath.mpf(float(v)) for v in w], mpmath.mpf(float(a))
        sums = [
            mpmath.fsum(v for v, k in zip(w, y, strict=True) if k == at) for at in range(classes)
        ]
        return [mpmath.mpf(float(c[k])) * ((1 - a) * sums[k] + a / classes) for k in range(classes)]


def assert_exact(loss, gradient, x, targets, bars):
    """Checks the row losses and their gradients against these error bars."""
    for actual, d, row, t in zip(np.asarray(loss), np.asarray(gradient), x, targets, strict=True):
        with mpmath.workdps(oracle.DIGITS):
            x_row = [mpmath.mpf(float(v)) for v in row]
            lse = max(x_row) + mpmath.log(mpmath.fsum(mpmath.exp(v - max(x_row)) for v in x_row))
            exact = mpmath.fsum(t_k * (lse - v) for t_k, v in zip(t, x_row, strict=True))
        assert float(actual) == exact == 0 or oracle.relative_error(actual, exact) < bars[0]
        assert max(oracle.gradient_errors(d, row, t)) < bars[1]


OPTIONS = [{}, {"label_smoothing": 1e-6}, {"class_weights": [1000, 0.001, 2, 0.001]}]
OPTIONS += [OPTIONS[1] | OPTIONS[2]]


def value_and_gradient(loss, x, y, w, **options):
    """The row losses, and the gradient of their sum for the logits."""

    def total(x):
        # Use the logits as kernel, so that the kernel's gradient is the logits' gradient.
        given = (jnp.eye(len(x), dtype=x.dtype), x) if loss is HEAD else (x,)
        each = loss(*given, y, label_weights=w, reduction="none", **options)
        return each.sum(), each

    (_, each), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return each, gradient


@one_in(2, labels=[4, 20], loss=LOSSES, rule=RULES)
def test_digits(loss, labels, rule):
    """For a label with nearly all weight, T - t is the sum of the others, not a difference."""
    x, y, w = extreme_rows(np.float32)
    y, w = np.tile(y, labels // 4), np.tile(w, labels // 4)
    run = jax.jit(functools.partial(value_and_gradient, loss, rule=rule))
    for options in OPTIONS:
        options = {name: np.float32(a) for name, a in options.items()}
        found = run(x, y, w, **options)
        targets = [
            exact_targets(*row, 4, options.get("label_smoothing", 0), options.get("class_weights"))
            for row in zip(y, w, strict=True)
        ]
        with naming(*options):
            assert_exact(*found, x, targets, (LOSS_BAR, GRADIENT_BAR))


@rules_in_turn
def test_digits_in_float64(loss, rule):
    with jax.enable_x64(True):
        x, y, w = extreme_rows(np.float64)
        found = value_and_gradient(loss, x, y, w, rule=rule)
    targets = [exact_targets(*row, 4) for row in zip(y, w, strict=True)]
    assert_exact(*found, x, targets, (FLOAT64_BAR, FLOAT64_BAR))


# Invalid labels and infinite values


@one_in(2, bad=[5, -1, -100, 2**31 - 1, -(2**31)], loss=LOSSES, rule=RULES)
def test_a_label_out_of_range_is_padding_or_nan(loss, bad, rule):
    """It is padding if its weight is 0. Otherwise its row is NaN, and no other row."""
    x = np.float32(np.random.default_rng(0).normal(size=(4, 5)))
    y = np.array([[1, bad], [bad, 2], [3, 3], [bad, bad]])
    w = np.array([[1, 0], [0.5, 1], [1, 1], [0, 0]], np.float32)
    each, gradient = value_and_gradient(loss, x, y, w, rule=rule)
    right = dense(y, np.where(y == bad, 0, w), 5)
    rows = [0, 2, 3]
    assert np.isnan(each).tolist() == [False, True, False, False]
    assert_close(each[rows, ...], oracle.loss(x, right, reduction="none")[rows])
    if loss is LOGITS:  # in the head, the gradient of the kernel sums over all rows
        assert np.isnan(gradient).any(-1).tolist() == [False, True, False, False]
        assert np.isnan(gradient[1]).all()
        expected = oracle.gradient(x, right, reduction="sum")
        assert_close(gradient[jnp.array(rows)], expected[rows])


@rules_in_turn
def test_padding_has_no_derivative(loss, rule):
    p, _ = problem(loss, "label_smoothing", "class_weights")
    p["label_weights"][0] = 0
    p["labels"][0] = -100
    run = with_gradients(lambda p: loss(**p, rule=rule), by=["label_weights"])
    _, gradients = run(p, jnp.ones(()))
    is_class = (p["labels"] >= 0) & (p["labels"] < K)
    assert np.all(np.isfinite(gradients["label_weights"]))
    np.testing.assert_array_equal(gradients["label_weights"] != 0, is_class)


@one_in(2, reason=["where", "weights"], loss=LOSSES, rule=RULES)
def test_a_row_that_does_not_count_contributes_nothing(loss, reason, rule):
    p, right = problem(loss, reason, "class_weights", "label_smoothing")
    counts = p[reason] != 0
    y, w = p["labels"].copy(), p["label_weights"].copy()
    y[~counts], w[~counts] = [-7, 3, 3, 2, K], [NAN, INF, NAN, 1, 0.5]
    given = p | {"labels": y, "label_weights": w}
    run = jax.jit(with_gradients(lambda p: loss(**p, rule=rule)))
    value, gradients = run(given, jnp.ones(()))
    expected, right_gradients = run(p, jnp.ones(()))
    assert_close(value, truth_of(loss)(**right))
    assert_close(value, np.asarray(expected))
    for name, d in right_gradients.items():
        if name == "weights":
            continue  # for a row of weight 0 it is the row's loss, which may be NaN
        assert_close(gradients[name], np.asarray(d))
    np.testing.assert_array_equal(gradients["label_weights"][~counts], 0)


@one_in(2, bad=[NAN, INF, -INF], loss=LOSSES, rule=RULES)
def test_weights_that_are_not_finite_are_nan_in_their_row(loss, bad, rule):
    x = np.float32(np.random.default_rng(0).normal(size=(3, 5)))
    y, w = np.array([[1, 2], [0, 4], [3, 3]]), np.full((3, 2), 0.5, np.float32)
    w[1, 0] = bad
    each, gradient = value_and_gradient(loss, x, y, w, rule=rule)
    assert np.isnan(each).tolist() == [False, True, False]
    if loss is LOGITS:
        assert np.isnan(gradient).all(-1).tolist() == [False, True, False]


@one_in(2, labels=[3, 20], rule=RULES)
def test_a_logit_of_minus_infinity(labels, rule):
    """0 log 0 is 0. With a weight above 0 the loss is inf. Gradients agree with dense targets."""
    x = np.array([[0, 1, -INF, 2]] * 3, np.float32)
    y = np.array([[0, 2, 3], [0, 2, 0], [2, 2, 1]])
    w = np.array([[0.5, 0, 0.5], [1, 0.5, 1], [0, 1, 1]], np.float32)
    y, w = np.pad(y, ((0, 0), (0, labels - 3))), np.pad(w, ((0, 0), (0, labels - 3)))

    def total(x, w):
        each = LOGITS(x, y, label_weights=w, reduction="none", rule=rule)
        return each.sum(), each

    @jax.jit
    def run(x, w, t):
        by_dense = jax.value_and_grad(lambda x: LOGITS(x, t, reduction="none").sum())(x)
        return jax.grad(total, (0, 1), has_aux=True)(x, w), by_dense

    ((d_x, d_w), each), (theirs, d) = run(x, w, np.float32(dense(y, w, 4)))
    assert np.isinf(theirs)
    assert_close(each[0], oracle.loss(x[:1], dense(y, w, 4)[:1], reduction="sum"))
    assert np.isposinf(each[1:]).all()
    np.testing.assert_allclose(d_x, d, rtol=1e-6)
    np.testing.assert_array_equal(d_w[0, 1], 0)
    assert np.isposinf(d_w[1, 1])
    if rule != "autodiff":  # this rule differentiates each label separately
        assert np.isposinf(d_w[2, :2]).all()


@rules_in_turn
def test_no_labels_are_no_targets(loss, rule):
    p, _ = problem(loss, "z_loss")
    p |= {"labels": p["labels"][:, :0], "label_weights": p["label_weights"][:, :0]}
    right = p | {"labels": np.zeros((N, K))}
    del right["label_weights"]
    value, gradients = with_gradients(lambda p: loss(**p, rule=rule))(p, jnp.ones(()))
    assert_close(value, truth_of(loss)(**right))
    assert gradients["label_weights"].shape == (N, 0)
    for name, d in gradients_of(loss, right, 1.0).items():
        if name in p:
            assert_close(gradients[name], d)


def test_checkify_names_a_label_that_weighs_something():
    f = checkify.checkify(LOGITS)
    x, y = np.zeros((2, 5), np.float32), np.array([[0, 1, -1], [3, 9, -7]])
    w = np.array([[1, 1, 0], [1, 1, 1]], np.float32)
    message = f(x, y, label_weights=w)[0].get()
    assert "labels: expected class indices in [0, 5), got 9 at position [1 1]" in message
    assert "; give padding labels a weight of 0" in message
    assert "ignore_index" not in message
    assert f(x, y, label_weights=np.where(y == 9, 0, np.where(y < 0, 0, w)))[0].get() is None
    assert f(x, y, label_weights=w, where=np.array([True, False]))[0].get() is None


@both_losses
def test_debug_nans_passes_padding_and_impossible_classes(loss):
    p, _ = problem(loss, "label_smoothing")
    if loss is LOGITS:
        x = p["logits"]
        hit = np.any(p["labels"][..., None] == np.arange(K), axis=1)
        p["logits"] = np.where(hit, x, -INF)
        del p["label_smoothing"]
    with jax.debug_nans(True):
        value, _ = jax.jit(with_gradients(lambda p: loss(**p)))(p, jnp.ones(()))
    assert np.isfinite(value)


# Transformations


def functions_of(loss, labels=M, **static):
    """Arguments, a function of them with label weights, and the same function by dense targets."""
    p, _ = problem(loss, "class_weights", "label_smoothing", labels=labels, dtype="float64")
    of_w, y = dense_of(p["labels"], K), p.pop("labels")

    def ours(p):
        return jnp.sum(jnp.sin(loss(**p, labels=y, reduction="none", **static)))

    def theirs(p):
        p = dict(p)
        labels = of_w(p.pop("label_weights"))
        return jnp.sum(jnp.sin(loss(**p, labels=labels, reduction="none", **static)))

    return jax.tree.map(jnp.asarray, p), ours, theirs


def assert_trees_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * (1 + np.max(np.abs(b))))


@one_in(3, labels=[M, 20], loss=LOSSES, rule=RULES)
@pytest.mark.usefixtures("double")
def test_second_derivatives(loss, labels, rule):
    """With respect to all floating arguments, and in forward mode if the rule supports it."""
    p, ours, theirs = functions_of(loss, labels, rule=rule)
    v = jax.tree.map(jnp.cos, p)

    def along(f):
        return lambda p: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(f)(p), v)))

    def second(f):
        found = jax.grad(along(f))(p)
        if rule in FORWARD_RULES:
            return found, jax.jvp(f, (p,), (v,)), jax.jvp(jax.grad(f), (p,), (v,))
        return found

    assert_trees_close(*jax.jit(lambda: (second(ours), second(theirs)))())


@pytest.mark.usefixtures("double")
def test_hessian_by_label_weights():
    p, ours, theirs = functions_of(LOGITS, rule="jvp")
    w = p.pop("label_weights")
    found = (jax.hessian(lambda w, f=f: f(p | {"label_weights": w}))(w) for f in (ours, theirs))
    assert_trees_close(*found)


@one_in(
    2,
    labels=[M, 20],
    loss=LOSSES,
    mapped=[("labels", "label_weights"), ("labels",), ("label_weights",), ()],
)
def test_vmap_over_any_argument(loss, labels, mapped):
    name = "hidden" if loss is HEAD else "logits"
    mapped = {*mapped} | ({name} if mapped != ("labels",) else set())
    p, _ = problem(loss, "class_weights", labels=labels)
    each = [problem(loss, "class_weights", labels=labels, seed=seed)[0] for seed in range(3)]
    p = {n: np.stack([q[n] for q in each]) if n in mapped else a for n, a in p.items()}
    axes = {n: 0 if n in mapped else None for n in p}
    g = cotangent(p if name not in mapped else each[0], "none")

    def run(p):
        return with_gradients(lambda p: loss(**p, reduction="none"))(p, g)

    found = jax.jit(jax.vmap(run, (axes,)))(p)
    for i in range(3):
        one = jax.jit(run)({n: a[i] if n in mapped else a for n, a in p.items()})
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            assert_close(a[i], np.asarray(b, np.float64))


@both_losses
def test_checkpoint_in_a_scan(loss):
    p, _ = problem(loss)
    step = jax.checkpoint(lambda p: loss(**p))

    def total(q):
        return jax.lax.scan(lambda s, _: (s + step(p | q), None), jnp.zeros(()), None, length=3)[0]

    found = jax.jit(jax.grad(total))(floats(p))
    expected = jax.grad(lambda q: 3 * loss(**p | q))(floats(p))
    for name, d in expected.items():
        assert_close(found[name], np.asarray(d))


@one_in(2, loss=LOSSES, labels=[20, M])
def test_export(loss, labels):
    p, right = problem(loss, "class_weights", labels=labels)
    run = jax.jit(with_gradients(lambda p: loss(**p)))
    given = p, jnp.ones(())
    exported = export.export(run, platforms=["cpu", "cuda", "tpu"])(*given)
    again = export.deserialize(exported.serialize())
    value, gradients = again.call(*given)
    assert_close(value, truth_of(loss)(**right))
    assert_trees_alike((value, gradients), run(*given))


@one_in(2, loss=LOSSES, options=[("label_smoothing", "class_weights"), ()])
def test_export_with_sizes_that_are_open(loss, options):
    """The numbers of rows, classes, labels and hidden units are symbolic."""
    p, right = problem(loss, *options)
    n, k, m, d = export.symbolic_shape("n, k, m, d")
    shapes = {"labels": (n, m), "label_weights": (n, m), "logits": (n, k), "class_weights": (k,)}
    shapes |= {"hidden": (n, d), "kernel": (d, k), "label_smoothing": ()}
    run = jax.jit(with_gradients(lambda p: loss(**p)))
    open_p = {name: jax.ShapeDtypeStruct(shapes[name], a.dtype) for name, a in p.items()}
    found = export.export(run)(open_p, jax.ShapeDtypeStruct((), jnp.float32))
    again = export.deserialize(found.serialize()).call(p, jnp.ones(()))
    assert_close(again[0], truth_of(loss)(**right))
    assert_trees_alike(again, run(p, jnp.ones(())))


def assert_trees_alike(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(a, np.asarray(b, np.float64))


# Meshes


def arrays_of(loss, *options, labels=M):
    options = (*options, "weights", "class_weights", "label_smoothing")
    p, _ = problem(loss, *options, labels=labels)
    return p


def on_one_device(loss, p, g, static):
    return program_of_one_device(loss, **static)(p, g)


@functools.cache
def program_of_one_device(loss, **static):
    return quick_jit(with_gradients(lambda p: loss(**p, **static)))


MESHES = [((1, 8), AxisType.Auto), ((2, 4), AxisType.Explicit), ((4, 2), AxisType.Auto)]
slow = pytest.mark.slow


@one_in(2, mesh=MESHES, loss=LOSSES)
@vjp_by_default
@pytest.mark.parametrize("labels", [M, pytest.param(20, marks=slow), pytest.param(K, marks=slow)])
def test_over_a_mesh(loss, mesh, labels, rule):
    """The labels of a row are not sharded, even if there are as many labels as classes."""
    shape, kind = mesh
    p = arrays_of(loss, labels=labels)
    over = sxe.over_mesh(loss, make_mesh(*shape, kind=kind), batch="data", classes="model")
    static = [{"reduction": r, "rule": rule} for r in ("mean", "none")]
    g = [cotangent(p, s["reduction"]) for s in static]
    each = [with_gradients(lambda p, s=s: over(**p, **s)) for s in static]
    found = quick_jit(all_of(each))([(p, g_) for g_ in g])
    for result, s, g_ in zip(found, static, g, strict=True):
        assert_meshes_alike(result, on_one_device(loss, p, g_, s))


def assert_meshes_alike(found, expected):
    (value, gradients), (right, right_gradients) = found, expected
    assert_close(value, np.asarray(right))
    for name, d in right_gradients.items():
        with naming(name):
            d = np.asarray(d, np.float64)
            assert_close(gradients[name], d, scale=max(8 if d.ndim == 0 else 1, np.abs(d).max()))


@one_in(2, loss=LOSSES, labels=[20, M])
def test_types_of_an_explicit_mesh(loss, labels):
    p = arrays_of(loss, labels=labels)
    mesh = make_mesh(2, 4, kind=AxisType.Explicit)
    specs = {"logits": P("data", "model"), "hidden": P("data"), "kernel": P(None, "model")}
    specs |= {"class_weights": P("model"), "label_smoothing": P()}
    placed = {
        n: jax.device_put(a, NamedSharding(mesh, specs.get(n, P("data")))) for n, a in p.items()
    }
    with jax.set_mesh(mesh):
        found = quick_jit(with_gradients(lambda p: loss(**p)))(placed, jnp.ones(()))
    assert_meshes_alike(found, on_one_device(loss, p, jnp.ones(()), {}))


@both_losses
def test_examples_that_an_explicit_mesh_splits(loss):
    """jax.vmap over a sharded axis of the labels alone, or of all arguments."""
    each = [arrays_of(loss) | problem(loss, seed=seed)[0] for seed in range(4)]
    mesh = make_mesh(2, 4, kind=AxisType.Explicit)
    run = with_gradients(lambda p: loss(**p))
    for mapped in (("labels",), ("labels", "label_weights", "hidden", "logits")):
        p = {n: np.stack([q[n] for q in each]) if n in mapped else a for n, a in each[0].items()}
        axes = {n: 0 if n in mapped else None for n in p}
        placed = {
            n: jax.device_put(a, NamedSharding(mesh, P("data") if n in mapped else P()))
            for n, a in p.items()
        }
        with jax.set_mesh(mesh):
            found = jax.device_get(quick_jit(jax.vmap(run, (axes, None)))(placed, jnp.ones(())))
        for i in range(4):
            one = {n: a[i] if n in mapped else a for n, a in p.items()}
            expected = on_one_device(loss, one, jnp.ones(()), {})
            assert_meshes_alike(jax.tree.map(lambda a, i=i: a[i], found), expected)


@both_losses
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("rule", ["vjp", pytest.param("jvp", marks=slow)])
def test_shards_of_the_classes(loss, check_vma, rule):
    """Labels count the classes of all shards. Each shard computes its part of the gradient."""
    p = arrays_of(loss)
    mesh = make_mesh(2, 4)
    specs = {"logits": P("data", "model"), "hidden": P("data"), "kernel": P(None, "model")}
    specs |= {"class_weights": P("model"), "label_smoothing": P()}
    specs = {name: specs.get(name, P("data")) for name in p}
    axes = {"axis_name": "model", "batch_axis_name": "data"}
    reductions, calls = ("mean", "none"), []
    for reduction in reductions:
        of_shard = jax.shard_map(
            functools.partial(
                lambda p, **static: loss(**p, **static), reduction=reduction, rule=rule, **axes
            ),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=P("data") if reduction == "none" else P(),
            check_vma=check_vma,
        )
        calls.append(with_gradients(of_shard))
    each = [(p, cotangent(p, reduction)) for reduction in reductions]
    found = quick_jit(all_of(calls))(each)
    for result, given, reduction in zip(found, each, reductions, strict=True):
        expected = on_one_device(loss, *given, {"reduction": reduction, "rule": rule})
        assert_meshes_alike(result, expected)


def test_shards_of_the_classes_along_an_axis_of_vmap():
    p = arrays_of(LOGITS)
    x = p.pop("logits").reshape(N, 4, K // 4)
    c = p.pop("class_weights").reshape(4, K // 4)

    def total(p, x, c):
        of_shard = functools.partial(LOGITS, axis_name="model", **p)
        each = jax.vmap(
            lambda x, c: of_shard(x, class_weights=c), (1, 0), axis_name="model", axis_size=4
        )(x, c)
        return each[0]

    found = quick_jit(total)(p, x, c)
    assert_close(found, oracle_value(p, x, c))


def oracle_value(p, x, c):
    p = dict(p)
    labels = dense(p.pop("labels"), p.pop("label_weights"), K)
    return oracle.loss(x.reshape(N, K), labels, class_weights=c.ravel(), **p)


def without_weights(p):
    """The same arguments with one label per row."""
    p = p | {"labels": np.clip(p["labels"][..., 0], 0, K - 1)}
    return {name: a for name, a in p.items() if name != "label_weights"}


@both_losses
def test_what_a_mesh_exchanges_does_not_grow_with_the_labels(loss):
    """As for one label, devices exchange one number per row, no logits and no label weights."""
    over = sxe.over_mesh(loss, make_mesh(2, 4), batch="data", classes="model")

    @jax.jit
    def run(p):
        by = {name: p[name] for name in ("logits", "hidden", "kernel") if name in p}
        return jax.grad(lambda q: over(**p | q))(by)

    p, _ = problem(loss)
    one, several = (
        sorted(c.size for c in collectives(run.lower(given).compile().as_text()))
        for given in (without_weights(p), p)
    )
    assert several == one


def test_an_axis_of_labels_that_an_explicit_mesh_splits():
    mesh = make_mesh(2, 4, kind=AxisType.Explicit)
    p, _ = problem(LOGITS, labels=4)
    specs = {"logits": P("data"), "labels": P("data", "model"), "label_weights": P("data")}
    p = {name: jax.device_put(a, NamedSharding(mesh, specs[name])) for name, a in p.items()}
    message = (
        "labels: expected the axis of several labels per row not to be sharded, got "
        r"int32.*; use jax.reshard\(labels, P.*\('data',\)\)"
    )
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        LOGITS(**p)


# Compiled programs


@both_losses
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_one_label(loss, dtype):
    """The targets are never expanded to an array as large as the logits."""
    rows, classes = 1024, 4096

    def compiled(labels):
        def arrays(*shape, dtype=dtype):
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

        p = {"labels": arrays(rows, dtype="int32"), "logits": arrays(rows, classes)}
        if loss is HEAD:
            del p["logits"]
            p |= {"hidden": arrays(rows, 64), "kernel": arrays(64, classes)}
        if labels:
            p["labels"] = arrays(rows, labels, dtype="int32")
            p["label_weights"] = arrays(rows, labels, dtype="float32")
        by = [name for name in p if not name.startswith("label")]
        call = with_gradients(lambda p: loss(**p), by=by)
        return jax.jit(call).lower(p, jnp.ones(())).compile().memory_analysis()

    one, several = (compiled(labels).temp_size_in_bytes for labels in (0, 8))
    assert several < one + 0.1 * rows * classes * 4


# GPU kernels

BACKEND = Backend("gpu", is_local=True, interprets_kernels=jax.default_backend() != "gpu")


@pytest.mark.skipif(BACKEND.needs_for_row_kernels is not None, reason="needs JAX 0.11.2")
@both_losses
@pytest.mark.parametrize("options", [(), ("where", "weights", "label_smoothing")], ids=str)
def test_the_state_kernel_serves_them(loss, options, monkeypatch):
    """The state kernel is used. The gradient kernel is not, because it takes one label per row."""
    for module in (_softmax_cross_entropy, _linear_softmax_cross_entropy):
        monkeypatch.setattr(module, "backend_of", lambda *arrays: BACKEND)
    jax.clear_caches()
    make = head_problem if loss is HEAD else logits_problem
    given = make(*options, dense=True, shape=(6, 3, 64) if loss is HEAD else (6, 64))
    y, w = sparse((6,), 64)
    right = given | {"labels": dense(y, w, 64)}
    p = given | {"labels": y, "label_weights": w}
    run = with_gradients(lambda p: loss(**p, implementation="mosaic_gpu"))
    from sxe._rows import gpu_state  # older versions of JAX can't import it

    called, state = [], gpu_state.state
    monkeypatch.setattr(gpu_state, "state", lambda *a, **k: called.append(a) or state(*a, **k))
    value, gradients = jax.jit(run)(p, jnp.ones(()))
    assert called
    assert_close(value, truth_of(loss)(**right))
    for name, d in gradients_of(loss, right, 1.0).items():
        if name in p:
            assert_close(gradients[name], d)
    plain = jax.jit(with_gradients(lambda p: loss(**p, implementation="xla")))(p, jnp.ones(()))
    assert_trees_alike(gradients["label_weights"], plain[1]["label_weights"])
    jax.clear_caches()
