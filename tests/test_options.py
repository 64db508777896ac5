"""The options of the loss, with both kinds of labels, against the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from option_cases import RULES, of_logits, one_in
from oracle import assert_close
from problems import logits_problem
from tolerances import SAME_FLOAT32

import sxe

SHAPE, K = (5, 3), 7  # rows of logits [5, 3, 7]


def call_of(case):
    """Logits, labels and options; the classes are the first axis if the case has "axis"."""
    dense = "dense" in case
    p = logits_problem(*case, dense=dense, shape=(*SHAPE, K))
    # Python numbers, which are constants of the program.
    p |= {name: float(p[name]) for name in ("label_smoothing", "z_loss") if name in p}
    if dense:
        p["labels"][..., 2] = 0
    if "axis" in case:
        for name in ("logits", "labels", "where"):
            if np.ndim(p.get(name)) == 3:
                p[name] = np.moveaxis(p[name], -1, 0)
        p["axis"] = 0
    return p.pop("logits"), p.pop("labels"), p


CASES = of_logits("axis")


# In either half of the cases any three options meet: by default the first half, and the last case,
# serve one rule, and the second half another. The third rule is JAX's own derivative of the loss: a
# half of the cases serve it, and some of these by default.
BY_DEFAULT = {"vjp": [*range(12), 24], "jvp": range(12, 24), "autodiff": range(0, 12, 3)}


def rules_and_cases():
    for rule in RULES:
        for i, case in enumerate(CASES[: 12 if rule == "autodiff" else None]):
            marks = () if i in BY_DEFAULT[rule] else pytest.mark.slow
            yield pytest.param(rule, case, id=f"{rule}-{'+'.join(case)}", marks=marks)


@pytest.mark.parametrize(("rule", "case"), list(rules_and_cases()))
def test_option_cases(rule, case):
    """All three reductions, and the gradient of a random combination of their results."""
    logits, labels, kwargs = call_of(case)
    rng = np.random.default_rng(3)
    g = {"mean": 1.7, "sum": -0.6, "none": rng.normal(size=SHAPE)}

    def losses(x):
        return {
            r: sxe.softmax_cross_entropy(x, labels, reduction=r, rule=rule, **kwargs) for r in g
        }

    @jax.jit
    def run(x):
        value, pullback = jax.vjp(losses, x)
        (gradient,) = pullback({r: jnp.asarray(v, jnp.float32) for r, v in g.items()})
        return value, gradient, sxe.softmax_cross_entropy_with_gradient(x, labels, **kwargs)

    value, gradient, both = run(logits)
    expected = {r: oracle.loss(logits, labels, reduction=r, **kwargs) for r in g}
    for r in g:
        assert_close(value[r], expected[r])
    pulled = [oracle.gradient(logits, labels, g[r], reduction=r, **kwargs) for r in g]
    assert_close(gradient, sum(pulled))
    assert_close(both[0], expected["mean"])
    assert_close(both[1], oracle.gradient(logits, labels, **kwargs))


@one_in(
    2,
    axis=[-1, 0, 1, 2, -2, (1,), (2, 0), (0, 2), (0, 1, 2), (1, -1)],
    dense={"integer": False, "dense": True},
)
def test_axis(axis, dense):
    """Any axis or, as in optax, a tuple of axes over which the label is a flat index."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, 5, 2)).astype(np.float32)
    axes = axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(a % 3 for a in axes)
    rest = tuple(n for i, n in enumerate(logits.shape) if i not in axes)
    classes = int(np.prod([logits.shape[a] for a in axes]))
    labels = rng.integers(0, classes, size=rest)
    if dense:
        labels = rng.uniform(size=logits.shape).astype(np.float32)

    @jax.jit
    def run(x):
        return (
            sxe.softmax_cross_entropy(x, labels, axis=axis, reduction="none"),
            jax.grad(sxe.softmax_cross_entropy)(x, labels, axis=axis),
            *sxe.softmax_cross_entropy_with_gradient(x, labels, axis=axis),
        )

    rows, gradient, loss, same_gradient = run(logits)
    assert_close(rows, oracle.loss(logits, labels, axis=axis, reduction="none"))
    assert_close(loss, oracle.loss(logits, labels, axis=axis))
    for d in (gradient, same_gradient):
        assert_close(d, oracle.gradient(logits, labels, axis=axis))
    if not dense:
        theirs = optax.softmax_cross_entropy_with_integer_labels(logits, labels, axis=axis)
        assert_close(rows, np.asarray(theirs, np.float64))


@one_in(2, shape=[(), (1,), (11,), (2, 1, 3), (2, 3, 1, 2)], classes=[1, 2, 13])
def test_leading_dimensions(shape, classes):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(*shape, classes)).astype(np.float32)
    labels = rng.integers(0, classes, size=shape)
    reductions = ("mean", "sum", "none")

    @jax.jit
    def run(*arrays):
        values = [sxe.softmax_cross_entropy(*arrays, reduction=each) for each in reductions]
        return values, sxe.softmax_cross_entropy_with_gradient(*arrays)

    values, (_, gradient) = run(logits, labels)
    for reduction, got in zip(reductions, values, strict=True):
        assert_close(got, oracle.loss(logits, labels, reduction=reduction), scale=1)
    assert_close(gradient, oracle.gradient(logits, labels), scale=1)


@one_in(
    2,
    indirect=["x64"],
    dtype=["bfloat16", "float16", "float32", "float64"],
    target_dtype=["int32", "uint8", "bfloat16", "float32"],
    x64=[False, True],
)
def test_dtypes(dtype, target_dtype, x64):
    if dtype == "float64" and not x64:
        dtype = "float32"
    rng = np.random.default_rng(6)
    logits = jnp.asarray(rng.normal(size=(6, 5)), dtype)
    if target_dtype in ("int32", "uint8"):
        labels = jnp.asarray(rng.integers(0, 5, size=6), target_dtype)
    else:
        labels = jnp.asarray(rng.uniform(size=(6, 5)), target_dtype)
    weights = jnp.asarray(rng.uniform(size=6), "bfloat16")
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    f = functools.partial(sxe.softmax_cross_entropy, **options)
    value, gradient = jax.jit(jax.value_and_grad(f))(logits, labels, weights=weights)
    options["weights"] = weights
    assert value.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    assert gradient.dtype == logits.dtype
    # The options are Python floats, which are rounded to float32.
    tolerance = "float32" if target_dtype == "float32" or dtype != "float64" else "float64"
    assert_close(value, oracle.loss(logits, labels, **options), tolerance)
    expected = oracle.gradient(logits, labels, **options)
    assert_close(gradient, expected, dtype if dtype != "float64" else tolerance)


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
def test_metrics(dense):
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(9, 4)).astype(np.float32)
    labels = rng.uniform(size=(9, 4)).astype(np.float32) if dense else rng.integers(0, 4, size=9)
    where = rng.uniform(size=9) < 0.6
    weights = rng.uniform(size=9).astype(np.float32)
    weights[np.flatnonzero(where)[0]] = 0
    kwargs = {"where": where, "weights": weights, "z_loss": 0.01}
    for reduction in ("mean", "sum", "none"):
        f = functools.partial(sxe.softmax_cross_entropy, reduction=reduction, return_metrics=True)
        value, metrics = jax.jit(f)(logits, labels, **kwargs)
        assert_close(value, oracle.loss(logits, labels, reduction=reduction, **kwargs))
        assert isinstance(metrics, sxe.Metrics)
        assert_close(metrics.loss_sum, oracle.loss(logits, labels, reduction="sum", **kwargs))
        assert_close(metrics.weight_sum, (weights * where).astype(np.float64).sum())
        counts = where & (weights != 0)
        oracle.check_rows_metrics(metrics, logits, counts, None if dense else labels)
    (_, again), _ = sxe.softmax_cross_entropy_with_gradient(
        logits, labels, return_metrics=True, **kwargs
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=SAME_FLOAT32), again, metrics)


def test_global_mean_over_accumulation_steps():
    """loss_sum and weight_sum of parts of different sizes give the global mean."""
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(10, 4)).astype(np.float32)
    labels = rng.integers(0, 4, size=10)
    parts = [
        sxe.softmax_cross_entropy(x, y, ignore_index=3, return_metrics=True)[1]
        for x, y in [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    ]
    mean = sum(p.loss_sum for p in parts) / sum(p.weight_sum for p in parts)
    assert_close(mean, oracle.loss(logits, labels, ignore_index=3))
