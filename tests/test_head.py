"""The head compared with float64 logits in NumPy: options, precision, edge cases and cost."""

import functools
import itertools
import math
import re

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import optax
import option_cases
import oracle
import pytest
from jax.experimental import checkify
from option_cases import (
    EVERY_OF_HEAD,
    RULES,
    each_value,
    in_fours,
    slow,
    vjp_by_default,
    with_row_scale,
)
from oracle import assert_close, naming
from problems import apart, floats, head_problem, normal
from programs import QUICK
from tolerances import GRADIENT_BAR, LOSS_BAR, SMALLEST

import sxe

N, D, K = 13, 5, 11
INF, NAN = np.inf, np.nan


def problem(*options, dense=False):
    """The arguments of a call with these options and a prime number of rows."""
    # Gradients of three reductions are added, each rounded to its dtype. With seeds 0 and 1, an
    # entry of one of these is much larger than the sum, and 16 bits hold too few digits of the sum.
    return head_problem(*options, dense=dense, shape=(N, D, K), seed=2)


def head(p, **static):
    return sxe.linear_softmax_cross_entropy(**p, **static)


def cotangents():
    return {"mean": np.float32(1.7), "sum": np.float32(0.6), "none": normal(N)}


@functools.cache
def program(by, reductions, metrics, static, compiler_options):
    """A jitted function of p, its entries ``by``, and one cotangent per reduction."""

    def run(given, p, g):
        def losses(given):
            out, found = {}, None
            for r in reductions:
                out[r] = head(p | given, reduction=r, return_metrics=metrics, **dict(static))
                if metrics:
                    out[r], found = out[r]
            return out, found

        value, pullback, found = jax.vjp(losses, given, has_aux=True)
        return value, pullback(g)[0], found

    return jax.jit(run, compiler_options=dict(compiler_options))


def value_and_gradients(p, g, by=None, metrics=False, compiler_options=QUICK, **static):
    """The loss for each reduction in g, the gradients of their sum weighted by g, and the metrics.

    The gradients are for the arguments in ``by``; by default, for all that have a gradient.
    """
    p, numbers = apart(p)
    static |= numbers
    by = tuple(floats(p) if by is None else by)
    run = program(by, tuple(g), metrics, tuple(static.items()), tuple(compiler_options.items()))
    return jax.tree.map(np.asarray, run({k: p[k] for k in by}, p, g))


def expected(p, g):
    """The reference: gradients by formula for the head's arguments, numerical for the others."""

    def losses(p):
        return {r: oracle.head_loss(**p, reduction=r) for r in g}

    def total(p):
        return sum(np.vdot(g[r], loss) for r, loss in losses(p).items())

    each = [oracle.head_gradients(**p, g=np.float64(g[r]), reduction=r) for r in g]
    gradients = {k: sum(d[k] for d in each) for k in each[0] if k in p}
    value, step = losses(p), 1e-6
    if "labels" in floats(p):
        # The loss is linear in the targets, row by row. So move one class of all rows at once.
        rows = functools.partial(oracle.head_loss, reduction="none")
        total_of_rows = rows(**p).sum()
        ratio = {r: loss / total_of_rows if r != "none" else 1 for r, loss in value.items()}
        share = sum(np.asarray(g[r]) * ratio[r] for r in g) * np.ones(len(p["labels"]))
        labels = np.asarray(p["labels"], np.float64)
        ahead = [rows(**(p | {"labels": labels + e})) for e in np.eye(labels.shape[-1])]
        more = np.stack(ahead, axis=-1) - rows(**p)[:, None]
        # A class that cannot occur has no target, and so its derivative is 0.
        more = np.where(p.get("class_mask", True), more, 0)
        gradients["labels"] = share[:, None] * more
    for name in set(floats(p)) - set(gradients):
        a = np.asarray(p[name], np.float64)
        gradients[name] = np.zeros(a.shape)
        for i in np.ndindex(a.shape):
            e = np.zeros(a.shape)
            e[i] = step
            change = total(p | {name: a + e}) - total(p | {name: a - e})
            gradients[name][i] = change / (2 * step)
    return value, gradients


def check(actual, p, g):
    for found, right in zip(actual[:2], expected(p, g), strict=True):
        for name, a in found.items():
            with naming(name):
                assert_close(a, right[name], scale=max(1, np.abs(right[name]).max(initial=0)))


# Options


# One row, unequal chunks, one row left over, two chunks less a row, all rows, more, the default.
CHUNK_SIZES = (1, 4, 12, 7, 13, 100, None)


# One logit_scale for all rows and, in the next case that has one, one per row.
CASES = [
    with_row_scale(case) if i % 2 else case for i, case in enumerate(in_fours(*option_cases.HEAD))
]
EVERY = [(*EVERY_OF_HEAD, "ignore_index"), (*with_row_scale(EVERY_OF_HEAD), "dense")]


@pytest.mark.parametrize(
    ("case", "chunk_size", "rule"),
    [
        *(
            # Any three factors meet in the first half. In both, any four do.
            (case, size, "vjp") if i < 12 else slow(case, size, "vjp")
            for i, (case, size) in enumerate(zip(CASES, itertools.cycle(CHUNK_SIZES)))
        ),
        (EVERY[0], 4, "jvp"),
        (EVERY[1], 4, "autodiff"),
        slow(EVERY[0], 4, "autodiff"),
        slow(EVERY[1], 4, "jvp"),
    ],
)
def test_option_cases(case, chunk_size, rule):
    """Check values, gradients for every argument, and metrics, also with rows that do not count."""
    p, g = problem(*case, dense="dense" in case), cotangents()
    actual = value_and_gradients(p, g, metrics=True, rule=rule, chunk_size=chunk_size)
    check(actual, p, g)
    projection = {k: p[k] for k in ("bias", "logit_scale", "softcap") if k in p}
    x, _ = oracle.head(p["hidden"], p["kernel"], **projection)
    rest = {k: v for k, v in p.items() if k not in ("hidden", "kernel", "z_loss", *projection)}
    x, _, counts, _, norm = oracle.rows(x, **rest)
    metrics = actual[2]
    assert_close(metrics.loss_sum, oracle.head_loss(**p, reduction="sum"))
    assert_close(metrics.weight_sum, (norm * counts).sum())
    oracle.check_rows_metrics(metrics, x, counts, None if "dense" in case else p["labels"])


@pytest.mark.parametrize(
    "by", [("hidden",), ("kernel",), ("labels", "softcap"), ("bias", "weights"), ("class_weights",)]
)
def test_the_gradients_that_are_asked_for(by):
    """Request some gradients without the others, which are then not computed."""
    p = problem("bias", "softcap", "weights", "class_weights", dense=True)
    g = cotangents()
    check(value_and_gradients(p, g, by, chunk_size=4), p, g)


@pytest.mark.parametrize(
    ("shape", "width", "classes"),
    [((), 3, 4), ((1,), 1, 1), ((0,), 3, 4), ((2, 3), 1, 4), ((2, 0, 3), 3, 4), ((5,), 3, 1)],
)
@pytest.mark.parametrize("rule", ["vjp", "jvp"])
def test_leading_dimensions(shape, width, classes, rule):
    """One row, one class, hidden size 1, and no rows, with a loss of 0 and gradients of zeros."""
    p = {"hidden": normal(*shape, width), "kernel": normal(width, classes)}
    p["labels"] = np.random.default_rng(0).integers(classes, size=shape)
    g = {"mean": np.float32(1.7), "none": normal(*shape)}
    value, gradients, _ = value_and_gradients(p, g, chunk_size=2, rule=rule)
    if 0 in shape:
        assert value["none"].shape == shape
        assert gradients["hidden"].shape == p["hidden"].shape
        assert value["mean"] == 0
        assert not gradients["kernel"].any()
    else:
        check((value, gradients), p, g)


@pytest.mark.parametrize("rule", RULES)
def test_axes_of_size_0_in_several_chunks(rule):
    hidden, kernel, labels = jnp.ones((4, 2)), jnp.ones((2, 3)), np.array([0, 1, 2, 0])
    f = functools.partial(sxe.linear_softmax_cross_entropy, chunk_size=2, rule=rule)
    none = np.zeros((4, 0))
    assert f(hidden, kernel, none.astype(int), label_weights=jnp.asarray(none)) == 0
    assert_close(f(hidden[:, :0], kernel[:0], labels), math.log(3))
    gradient = jax.grad(f)(hidden[:, :0], kernel[:0], labels)
    assert gradient.shape == (4, 0)


def test_lse_where_logits_are_computed_twice():
    """XLA may compute logit_scale * u + bias once for the maximum, and again for the sum.

    With several CPU devices and without optimizations, the two differ by a rounding error.
    """
    p = head_problem("bias", "logit_scale", shape=(64, D, K))
    x, _ = oracle.head(**{name: a for name, a in p.items() if name != "labels"})
    _, metrics = head(p, return_metrics=True)
    assert_close(metrics.lse, np.logaddexp.reduce(x, axis=-1))


# Dtypes and precision


@pytest.mark.parametrize(
    ("hidden", "kernel", "x64"),
    [
        ("bfloat16", "bfloat16", False),
        ("float16", "float16", True),
        ("float32", "float32", True),
        ("float64", "float64", True),
        ("bfloat16", "float32", False),
        ("float16", "bfloat16", False),
        ("bfloat16", "float64", True),
    ],
)
def test_dtypes(hidden, kernel, x64):
    """Different dtypes are promoted as in hidden @ kernel. A gradient has its input's dtype."""
    with (
        jax.enable_x64(x64),
        jax.numpy_dtype_promotion("strict" if hidden == kernel else "standard"),
    ):
        p = problem("weights", "bias")
        dtypes = {"hidden": hidden, "kernel": kernel, "bias": "float16"}
        p |= {name: p[name].astype(jnp.dtype(dtype)) for name, dtype in dtypes.items()}
        product = jnp.promote_types(hidden, kernel)
        wide = jnp.dtype("float64" if product == "float64" else "float32")
        g = {r: a.astype(wide) for r, a in cotangents().items()}
        value, gradients, _ = value_and_gradients(p, g, chunk_size=4, logit_scale=0.5, z_loss=0.25)
    q = p | {"logit_scale": 0.5, "z_loss": 0.25}
    right, right_gradients = expected(q, g)
    for r, a in value.items():
        assert a.dtype == wide
        assert_close(a, right[r])
    for name, a in gradients.items():
        assert a.dtype == p[name].dtype
        assert_close(a, right_gradients[name], None if name in p else "float32")


@each_value(
    of=[("vjp", "mean"), ("vjp", "none"), ("jvp", "none"), ("autodiff", "mean")],
    dtype=["bfloat16", "float16"],
)
def test_precision(of, dtype):
    """The result is as precise as one from float32 logits of the same inputs, rounded once.

    By this measure, a kernel gradient that is accumulated in the inputs' dtype fails.
    """
    rule, reduction = of
    n, width, classes, chunk_size = 257, 24, 61, 16
    hidden = jnp.asarray(3 * normal(n, width), dtype)
    kernel = jnp.asarray(normal(width, classes) + 0.5, dtype)
    labels = np.random.default_rng(0).integers(classes, size=n)
    g = np.float32(100) if reduction == "mean" else normal(n)

    def ours(hidden, kernel):
        options = {"reduction": reduction, "chunk_size": chunk_size, "rule": rule}
        each = sxe.linear_softmax_cross_entropy(hidden, kernel, labels, **options)
        return jnp.sum(g * each), each

    def theirs(hidden, kernel):
        each = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
        each = each.mean() if reduction == "mean" else each
        return jnp.sum(g * each), each

    run = [
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(*arrays)
        for f, arrays in [
            (ours, (hidden, kernel)),
            (theirs, (hidden.astype(jnp.float32), kernel.astype(jnp.float32))),
        ]
    ]
    x, pullback = oracle.head(hidden, kernel)
    d_x = oracle.gradient(x, labels, g, reduction=reduction)
    gradients = pullback(d_x)
    right = [oracle.loss(x, labels, reduction=reduction), gradients["hidden"], gradients["kernel"]]

    def within(actual, float32, right, to):
        actual, float32 = (np.asarray(a).astype(np.float64) for a in (actual, float32))
        info = jnp.finfo(to)
        once = np.maximum(float(info.eps) * np.abs(right), float(info.smallest_subnormal)) / 2
        return np.all(np.abs(actual - right) <= np.abs(float32 - right).max() + once)

    ours, theirs = ([each, *gradients] for (_, each), gradients in run)
    for a, b, c, to in zip(ours, theirs, right, ("float32", dtype, dtype), strict=True):
        assert within(a, b, c, to)

    d_kernel = np.zeros((width, classes), dtype)
    for i in range(0, n, chunk_size):
        rows = slice(i, i + chunk_size)
        of_rows = np.asarray(hidden, np.float64)[rows].T @ d_x[rows]
        d_kernel = (d_kernel.astype(np.float64) + of_rows).astype(dtype)
    assert not within(d_kernel, theirs[2], right[2], dtype)


@vjp_by_default
def test_digits_of_extreme_rows(rule):
    """Confident rows and large offsets. With one hidden unit per row, the logits are exact."""
    x = normal(8, 16)
    for i, lead in enumerate([20, 40, 80, 20, 40]):
        x[i, 3] = x[i].max() + lead
    x[5:] = 8 * np.round(2 * x[5:]) + np.float32(1e8)
    labels = np.array([3, 3, 3, 0, 1, 3, 4, 5])
    g = np.exp2(np.arange(8) - 4).astype(np.float32)
    p = {"hidden": np.eye(8, dtype=np.float32), "kernel": x, "labels": labels}
    value, gradients, _ = value_and_gradients(
        p, {"none": g}, rule=rule, chunk_size=3, compiler_options={}
    )
    exact = [oracle.exact_row(row, np.eye(16)[y]) for row, y in zip(x, labels, strict=True)]
    d_x = g[:, None] * np.array([d for _, d in exact], np.float64)
    assert (np.abs(d_x) > SMALLEST).all()
    np.testing.assert_allclose(value["none"], [float(loss) for loss, _ in exact], rtol=LOSS_BAR)
    np.testing.assert_allclose(gradients["kernel"], d_x, rtol=GRADIENT_BAR)
    wide = x.astype(np.float64)
    bound = GRADIENT_BAR * (np.abs(d_x) @ np.abs(wide).T)
    assert (np.abs(gradients["hidden"] - d_x @ wide.T) <= bound).all()


# Rows that do not count, and bad rows


def edges(rule, p):
    """Losses and gradients. One program serves all tests of this section."""
    g = {"mean": np.float32(1.7), "none": normal(N)}
    options = {"where": np.ones(N, bool), "weights": np.ones(N, np.float32), "bias": normal(K)}
    by = ("hidden", "kernel", "bias", "weights")
    p = problem() | options | p
    return *value_and_gradients(p, g, by, rule=rule, chunk_size=4, ignore_index=99)[:2], p, g


@vjp_by_default
@pytest.mark.parametrize("reason", ["where", "weights", "ignore_index"])
def test_a_row_that_does_not_count_contributes_nothing(reason, rule):
    """The row has NaN or infinity in its hidden states, or a label out of range."""
    out = [0, 3, 7, 8, 12]
    counts = ~np.isin(range(N), out)
    hidden, labels = np.array(problem()["hidden"]), np.array(problem()["labels"])
    hidden[[0, 3]], hidden[7], hidden[8, 2], labels[[3, 12]] = NAN, INF, -INF, (K, -1)
    change = {
        "where": {"where": counts},
        "weights": {"weights": np.where(counts, np.abs(normal(N)), 0)},
        "ignore_index": {"labels": np.where(counts, labels, 99)},
    }[reason]
    value, gradients, p, g = edges(rule, {"hidden": hidden, "labels": labels} | change)
    check((value, gradients), p | problem() | {"where": counts}, g)
    for a in (value["none"], gradients["hidden"], gradients["weights"]):
        assert not a[out].any()


# With rules that leave the kernel's product to JAX, a cotangent of 0 meets an infinite kernel.
@pytest.mark.parametrize(
    ("reason", "rule"), [*(("where", rule) for rule in RULES), ("weights", "vjp")]
)
def test_logits_that_overflow_where_they_do_not_count(reason, rule):
    """Finite hidden states overflow. The infinite kernel entry is an impossible class elsewhere."""
    counts, others = np.arange(N) % 3 > 0, np.arange(K) != 4
    hidden, kernel = (np.array(problem()[name]) for name in ("hidden", "kernel"))
    hidden[:, 0] = np.where(counts, -np.abs(hidden[:, 0]), 3e38)
    kernel[0], kernel[0, 4] = 3, INF
    labels = np.where(problem()["labels"] == 4, 1, problem()["labels"])
    change = {"where": counts} if reason == "where" else {"weights": counts.astype(np.float32)}
    value, gradients, p, g = edges(
        rule, {"hidden": hidden, "kernel": kernel, "labels": labels} | change
    )
    p |= {"hidden": np.where(counts[:, None], hidden, 0), "kernel": kernel[:, others]}
    p |= {"labels": labels - (labels > 4), "bias": p["bias"][others]}
    right, right_gradients = expected(p, g)
    for r in g:
        assert_close(value[r], right[r])
    for name in ("kernel", "bias"):
        assert_close(gradients[name][..., others], right_gradients[name])
        assert not gradients[name][..., 4].any()
    assert not gradients["hidden"][~counts].any()


@vjp_by_default
def test_a_bad_row_is_nan_alone(rule):
    """A row is bad with NaN or infinity in its hidden states, or a label out of range."""
    bad = np.isin(range(N), [1, 4, 5, 12])
    hidden, labels = np.array(problem()["hidden"]), np.array(problem()["labels"])
    hidden[1, 2], hidden[4, 0], labels[[5, 12]] = NAN, INF, (K, -1)
    value, gradients, p, g = edges(rule, {"hidden": hidden, "labels": labels})
    right, right_gradients = expected(p | problem(), g)
    assert np.isnan(value["mean"])
    assert_close(value["none"], np.where(bad, NAN, right["none"]))
    d_hidden = np.where(bad[:, None], NAN, right_gradients["hidden"])
    assert_close(gradients["hidden"], d_hidden)


def test_checkify_names_position_label_and_classes():
    p = head_problem(shape=(6, D, K))
    p = {k: a.reshape(2, 3, *a.shape[1:]) if k != "kernel" else a for k, a in p.items()}
    labels = np.array([[0, 1, 2], [3, 99, -7]])
    f = checkify.checkify(jax.jit(jax.grad(functools.partial(head, chunk_size=2), allow_int=True)))
    message = f(p | {"labels": labels})[0].get()
    assert f"[0, {K})" in message
    assert "got 99" in message
    assert "[1 1]" in message
    assert f(p)[0].get() is None
    where = np.array([[True] * 3, [True, False, False]])
    assert f(p | {"labels": labels, "where": where})[0].get() is None


@vjp_by_default
def test_a_bias_of_minus_infinity_cannot_occur(rule):
    """The class has no gradient. If it is the label, the loss is infinite with gradient -1."""
    bias = np.where(np.arange(K) == 4, -INF, normal(K)).astype(np.float32)
    labels = np.where(problem()["labels"] == 4, 1, problem()["labels"])
    value, gradients, p, g = edges(rule, {"bias": bias, "labels": labels})
    check((value, gradients), p, g)
    assert gradients["bias"][4] == 0
    assert not gradients["kernel"][:, 4].any()
    labels[6] = 4
    value, gradients, p, g = edges(rule, {"bias": bias, "labels": labels})
    assert value["none"][6] == value["mean"] == INF
    right = [oracle.head_gradients(**p, g=g[r], reduction=r) for r in g]
    for name in ("hidden", "kernel", "bias"):
        assert_close(gradients[name], sum(d[name] for d in right))


# Cost


@pytest.mark.parametrize(
    ("of", "reduction", "products"),
    [
        ((), "mean", 1),
        (("hidden", "kernel"), "mean", 3),
        (("hidden",), "mean", 2),
        (("kernel",), "sum", 2),
        (("hidden", "kernel"), "none", 4),
    ],
)
def test_flops(of, reduction, products):
    """2 N D K per product, and one more product if the backward pass computes the logits again.

    XLA counts the body of a loop once. So two chunks count half, and one chunk needs no loop.
    """
    n, width, classes = 64, 1024, 256
    chunks = 2 if reduction == "none" else 1
    p = {"hidden": jnp.zeros((n, width)), "kernel": jnp.zeros((width, classes))}
    p |= {"labels": jnp.zeros(n, int)}

    def run(given, rest, g):
        value, pullback = jax.vjp(
            lambda given: head(rest | given, reduction=reduction, chunk_size=n // chunks), given
        )
        return value, pullback(g)

    given = {k: p.pop(k) for k in of}
    g = normal(n) if reduction == "none" else np.float32(2)
    # JAX itself traces no product that XLA would have to remove.
    assert str(jax.make_jaxpr(run)(given, p, g)).count("dot_general[") == products
    flops = jax.jit(run).lower(given, p, g).compile().cost_analysis()["flops"]
    assert flops == pytest.approx(2 * n // chunks * width * classes * products, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "width", "classes", "chunk"),
    [
        (8192, 4096, 128256, 1024),
        (16384, 4096, 131072, 2048),
        (32768, 2560, 128256, 2048),
        (2**20, 4096, 262144, 2048),
        (65536, 1024, 1000, 8192),
    ],
)
def test_chunks_on_an_accelerator(rows, width, classes, chunk):
    """A chunk keeps logits and gradient below 64 MiB or below a fifth of all logits."""
    plan = sxe.plan(rows, width, classes, "bfloat16", backend="gpu")
    assert plan.chunk_size == chunk
    assert plan.gradient_dtype == "bfloat16"
    assert chunk * classes * (4 + 2) < max(64 * 2**20, plan.logits_bytes / 5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_rows_of_tiny_losses_add_up(reduction):
    """The share of a row in the mean, 8e-40, is below the normal numbers of float32."""
    n = 4096
    x, kernel = np.ones((n, 1), np.float32), np.array([[82, 0, -1]], np.float32)
    loss = functools.partial(sxe.linear_softmax_cross_entropy, reduction=reduction)
    value, gradient = jax.value_and_grad(loss, 1)(x, kernel, np.zeros(n, np.int32))
    q = np.exp(kernel[0, 1:].astype(np.float64) - 82)
    scale = n if reduction == "sum" else 1
    np.testing.assert_allclose(value, scale * q.sum(), rtol=LOSS_BAR)
    # The gradient of the kernel is a float32 sum of 4,096 equal numbers.
    np.testing.assert_allclose(gradient[0], scale * np.array([-q.sum(), *q]), rtol=5e-5)


def precisions(f, *arguments):
    """The precision of every matrix product in f, as JAX passes it to XLA."""
    text = jax.jit(f).lower(*arguments).as_text()
    found = re.findall(r"dot_general.*?precision = \[(\w+), (\w+)\]", text)
    assert len(found) == text.count("stablehlo.dot_general") > 0
    return {name for both in found for name in both}


@vjp_by_default
@each_value(
    of=[
        ("float32", "float32", "HIGHEST"),
        ("bfloat16", "float32", "HIGHEST"),
        ("float16", "float16", "HIGH"),
        ("bfloat16", "bfloat16", "DEFAULT"),
    ],
    reduction=["mean", "none"],
)
def test_precision_of_products(of, reduction, rule):
    """The dtype of the inputs decides. No product drops digits, unless the caller chose so."""
    hidden, kernel, precision = of
    p = {"hidden": jnp.zeros((N, D), hidden), "kernel": jnp.zeros((D, K), kernel)}
    labels = problem()["labels"]

    def pullback(forward, p, g):
        def loss(p):
            with jax.numpy_dtype_promotion("standard"):
                static = {"reduction": reduction, "rule": rule, "chunk_size": 4}
                return head(p | {"labels": labels}, **static)

        with jax.default_matmul_precision(forward):
            _, pullback = jax.vjp(loss, p)
        return pullback(g)  # outside of the context

    g = cotangents()[reduction]
    for forward, expected in [
        (None, precision),
        ("tensorfloat32", "HIGH"),
        ("bfloat16", "DEFAULT"),
        ("float32", "HIGHEST"),
    ]:
        assert precisions(functools.partial(pullback, forward), p, g) == {expected}


ONE_DEVICE = """
import jax, jax.numpy as jnp, numpy as np, sxe

assert jax.device_count() == 1
n, width, classes = 199, 64, 16411  # 2 chunks of 63 + 37 rows and of 4 * 4096 + 27 classes
rng = np.random.default_rng(0)
weights = rng.uniform(size=n).astype("float32")
bias, class_weights = rng.normal(size=(2, classes)).astype("float32")
options = {"weights": weights, "where": weights < 0.8, "class_weights": abs(class_weights)}
options |= {"label_smoothing": 0.1, "z_loss": 0.01}
for dtype, reduction, dense, options in [
    ("float32", "none", True, options),
    ("bfloat16", "mean", False, options),
    ("float16", "none", False, {}),
]:
    hidden = jnp.asarray(rng.normal(size=(n, width)), dtype)
    kernel = jnp.asarray(0.3 * rng.normal(size=(width, classes)), dtype)
    labels = rng.integers(classes, size=n)
    labels = rng.uniform(size=(n, classes)).astype("float32") if dense else labels
    g = 100 * rng.normal(size=(n,) if reduction == "none" else ()).astype("float32")
    static = {"reduction": reduction, "return_metrics": True} | options

    def head(hidden, kernel, bias, labels):
        value, metrics = sxe.linear_softmax_cross_entropy(
            hidden, kernel, labels, bias=bias, softcap=5.0, chunk_size=100, **static
        )
        return jnp.sum(g * value), (value, metrics)

    def materialised(hidden, kernel, bias, labels):
        logits = 5 * jnp.tanh((hidden @ kernel + bias) / 5)
        value, metrics = sxe.softmax_cross_entropy(logits, labels, **static)
        return jnp.sum(g * value), (value, metrics)

    (_, results), gradients = jax.jit(jax.value_and_grad(head, (0, 1, 2), has_aux=True))(
        hidden, kernel, bias, labels
    )
    (_, right), right_gradients = jax.jit(
        jax.value_and_grad(materialised, (0, 1, 2), has_aux=True)
    )(hidden.astype("float32"), kernel.astype("float32"), bias, labels)
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(right)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, right_gradients):
        eps = float(jnp.finfo(a.dtype).eps)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=eps, atol=1e-5 * abs(b).max())

for dtype, sizes in [("float32", [4096]), ("bfloat16", [2048, 4096])]:
    temporaries = []
    for n in sizes:
        arrays = [jax.ShapeDtypeStruct(s, dtype) for s in ((n, width), (width, classes))]
        labels = jax.ShapeDtypeStruct((n,), "int32")
        f = jax.jit(jax.value_and_grad(sxe.linear_softmax_cross_entropy, (0, 1)))
        memory = f.lower(*arrays, labels).compile().memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
    print(dtype, temporaries)
    assert max(temporaries) < 64 * 2**20 + width * classes * 4, temporaries
    # An array or two of [N, D], and chunks that are a little larger; the logits are 128 MiB more.
    assert temporaries[-1] - temporaries[0] < 8 * 2**20, temporaries
"""


def test_one_cpu_device_takes_blocks_of_classes():
    """It also takes blocks of rows, with remainders. The memory does not grow with the rows.

    This runs in its own process, because the tests have several devices, where there are no blocks.
    """
    fresh.run("-c", ONE_DEVICE)


BIAS_AND_SCALE = """
import jax, jax.numpy as jnp, numpy as np, sxe

rng = np.random.default_rng(0)
shapes = {"hidden": (31, 5), "kernel": (5, 2), "bias": (2,)}
p = {name: jnp.asarray(rng.normal(size=n), jnp.float32) for name, n in shapes.items()}
labels, g = jnp.asarray(rng.integers(0, 2, 31)), jnp.asarray(rng.normal(size=31), jnp.float32)

def loss(p, rule):
    static = {"reduction": "none", "rule": rule, "chunk_size": 2}
    rows = sxe.linear_softmax_cross_entropy(**p, labels=labels, logit_scale=0.7, **static)
    return jnp.sum(g * rows)

found = [jax.jit(jax.grad(loss), static_argnums=1)(p, rule) for rule in ("vjp", "autodiff")]
for name, right in found[0].items():
    np.testing.assert_allclose(found[1][name], right, rtol=1e-4, atol=1e-5, err_msg=name)
"""


def test_a_bias_and_a_scale_in_chunks_on_one_device():
    """On one device XLA computes the logits of a chunk again, and may round them differently."""
    fresh.run("-c", BIAS_AND_SCALE)
