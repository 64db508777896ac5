"""The loss under each transformation of JAX and compositions, against the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from option_cases import EVERY_OF_LOGITS, FORWARD_RULES, RULES, slow
from oracle import assert_close
from problems import at, floats, logits_problem, normal, wide_dtype, with_gradients
from programs import quick_jit

from sxe import softmax_cross_entropy

N, K, B, D = 5, 7, 3, 2
KINDS = ("integer", "dense")
# Both kinds for the default rule, and one kind for each other rule, where one is enough.
SOME = [("vjp", "integer"), ("vjp", "dense"), ("jvp", "integer"), ("autodiff", "dense")]


# The third rule is plain JAX. It has no code of its own to transform.
# The derivative by a dense target of a class that cannot occur is infinite.
OF_DENSE = tuple(name for name in EVERY_OF_LOGITS if name != "class_mask")


@pytest.fixture(params=["vjp", "jvp", pytest.param("autodiff", marks=pytest.mark.slow)])
def rule(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=["float32", "bfloat16", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def problem(kind, dtype="float32", lead=(), seed=0):
    """By name, the array arguments of a call with all options and these leading axes."""
    options = OF_DENSE if kind == "dense" else EVERY_OF_LOGITS
    p = logits_problem(
        *options, dense=kind == "dense", dtype=dtype, shape=(N, K), lead=lead, seed=seed
    )
    return jax.tree.map(jnp.asarray, p)


def edges(kind, dtype="float32"):
    """A problem with tied maxima, -inf logits, a confident row, and NaN in a masked row."""
    p = problem(kind, dtype)
    del p["label_smoothing"]  # it would give a target to the classes at -inf
    p.pop("class_mask", None)  # it could mask these edge cases
    logits = np.array(p["logits"])
    logits[0, [0, 2, 5]] = logits[0].max() + 1
    logits[1, 3] += 30
    logits[2, [1, 6]] = -np.inf
    logits[2, [0, 4]] = logits[2].max() + 1
    logits[3] = np.nan
    labels = np.array([2, 3, 0, 1, 5], np.int32)
    if kind == "dense":
        labels = np.array(p["labels"])
        labels[np.isinf(logits)] = 0
    where = jnp.arange(N) != 3
    weights = 0.5 + jnp.arange(N, dtype=p["weights"].dtype)
    p |= {"logits": jnp.asarray(logits), "labels": jnp.asarray(labels)}
    return p | {"where": where, "weights": weights}


def cotangent(shape=(N,), dtype="float32", seed=1):
    """Random, with a random sign for each row."""
    return jnp.asarray(normal(*shape, dtype=dtype, seed=seed))


def row_loss(rule):
    return lambda p: softmax_cross_entropy(**p, reduction="none", rule=rule)


def with_gradient(loss):
    """A function of p and g: row losses, and the gradient of sum(g * loss) in the logits."""

    def call(p, g):
        value, gradients = with_gradients(loss, ("logits",))(p, g)
        return value, gradients["logits"]

    return call


def assert_matches(actual, p, g, **options):
    """Compare row losses and the gradient in the logits with the reference."""
    value, gradient = actual
    assert_close(value, oracle.loss(**p, reduction="none", **options))
    assert_close(gradient, oracle.gradient(**p, g=g, reduction="none", **options))


def as_float64(p):
    return {name: np.asarray(a).astype(np.float64) for name, a in floats(p).items()}


def numerical_jacobian(f, x, h=1e-5):
    """Central differences of f, in float64."""
    x = np.asarray(x).astype(np.float64)
    columns = []
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        columns.append((f(x + step) - f(x - step)) / (2 * h))
    return np.stack(columns, axis=-1).reshape(np.shape(columns[0]) + x.shape)


def literal_hessian(p, g):
    """The second derivative of sum(g * loss) in the logits, [N, K, N, K]."""
    z = float(p.get("z_loss", 0))
    x, t, counts, w, _ = oracle.rows(**{k: v for k, v in p.items() if k != "z_loss"})
    hessian = np.zeros((N, K, N, K))
    for i in np.flatnonzero(counts):
        top = x[i].max()
        q = np.exp(x[i] - top) / np.exp(x[i] - top).sum()
        lse = top + np.log(np.exp(x[i] - top).sum())
        spread = np.diag(q) - np.outer(q, q)
        row = t[i].sum() * spread + 2 * z * (lse * spread + np.outer(q, q))
        hessian[i, :, i] = np.asarray(g, np.float64)[i] * w[i] * row
    return hessian


# With and without jit


@pytest.mark.parametrize(
    ("kind", "dtype"), [("dense", "bfloat16"), ("integer", "float64")], indirect=["dtype"]
)
def test_jit(rule, kind, dtype):
    p, g = problem(kind, dtype), cotangent(dtype=wide_dtype(dtype))
    value, gradient = jax.jit(with_gradient(row_loss(rule)))(p, g)
    assert value.dtype == g.dtype
    assert gradient.dtype == dtype
    assert_matches((value, gradient), p, g)


@pytest.mark.parametrize(("rule", "kind"), SOME)
def test_eager_with_numbers_equals_jitted_with_traced_options(rule, kind):
    p, g = problem(kind), cotangent()
    numbers = {name: float(p[name]) for name in ("label_smoothing", "z_loss")}
    eager = with_gradient(row_loss(rule))(p | numbers, g)
    jitted = jax.jit(with_gradient(row_loss(rule)))(p, g)
    assert_matches(jitted, p, g)
    jax.tree.map(assert_close, eager, jitted)


def test_disable_jit(rule, kind):
    p, g = edges(kind), cotangent()
    with jax.disable_jit():
        assert_matches(with_gradient(row_loss(rule))(p, g), p, g)


def test_eval_shape(rule, dtype):
    p = problem("dense", dtype)

    def losses(p):
        options = {"return_metrics": True, "rule": rule}
        each = [softmax_cross_entropy(**p, reduction=r, **options) for r in ("mean", "sum", "none")]
        return [value for value, _ in each], each[0][1]

    def of(*shapes_and_dtypes):
        return [jax.ShapeDtypeStruct(*a) for a in shapes_and_dtypes]

    wide = wide_dtype(dtype)
    values, metrics = jax.eval_shape(losses, p)
    assert values == of(((), wide), ((), wide), ((N,), wide))
    rows = of(((N,), wide), ((N,), jnp.int32), ((N,), wide))
    assert list(metrics) == [*of(((), wide), ((), wide)), *rows, None, rows[0]]
    gradients = jax.eval_shape(jax.grad(lambda q: losses(p | q)[0][0]), floats(p))
    assert gradients == jax.eval_shape(lambda q: q, floats(p))


# vmap


@pytest.mark.parametrize(
    ("mapped", "rule", "kind"),
    [(name, "vjp", "dense") for name in ("logits", "labels", *OF_DENSE, "g")]
    + [(name, "jvp", "integer") for name in ("logits", "labels", "class_weights")]
    + [("class_mask", rule, "integer") for rule in RULES],
)
def test_vmap_over_one_argument(mapped, rule, kind):
    batch = problem(kind, lead=(B,)) | {"g": cotangent((B, N))}
    axes = {name: 0 if name == mapped else None for name in batch}
    p = {name: a if name == mapped else a[0] for name, a in batch.items()}

    def call(p):
        p = dict(p)
        return with_gradient(row_loss(rule))(p, p.pop("g"))

    out = quick_jit(jax.vmap(call, in_axes=(axes,)))(p)
    for i in range(B):
        each = p | {mapped: p[mapped][i]}
        assert_matches(at(out, i), each, each.pop("g"))


@pytest.mark.parametrize(("rule", "kind"), SOME)
def test_vmap_over_every_argument(rule, kind):
    batch, g = problem(kind, lead=(B,)), cotangent((B, N))
    out = quick_jit(jax.vmap(with_gradient(row_loss(rule))))(batch, g)
    for i in range(B):
        assert_matches(at(out, i), at(batch, i), g[i])


def test_vmap_over_masks_of_classes(kind):
    p, g = problem(kind), cotangent()
    del p["label_smoothing"]
    masks = np.random.default_rng(2).random((B, N, K)) < 0.7
    if kind == "integer":
        masks |= np.arange(K) == np.asarray(p["labels"])[:, None]
    else:
        masks |= np.arange(K) < 2
        p["labels"] = jnp.where(masks.all(0), p["labels"], 0)
    call = with_gradient(row_loss("vjp"))
    out = quick_jit(jax.vmap(lambda where: call(p | {"where": where}, g)))(masks)
    for i in range(B):
        assert_matches(at(out, i), p | {"where": masks[i]}, g)


def test_vmap_in_and_out_axes(rule):
    batch, g = problem("integer", lead=(B,)), cotangent((B, N))
    axes = {"logits": 2, "labels": 1, "where": 1, "weights": -1, "class_weights": 1}
    p = {name: jnp.moveaxis(a, 0, axes.get(name, 0)) for name, a in batch.items()}
    in_axes = ({name: axes.get(name, 0) for name in p}, 1)
    call = jax.vmap(with_gradient(row_loss(rule)), in_axes=in_axes, out_axes=(1, 2))
    value, gradient = quick_jit(call)(p, g.T)
    for i in range(B):
        assert_matches((value[:, i], gradient[..., i]), at(batch, i), g[i])


def test_nested_vmap(rule):
    outer = {"logits", "labels", "where", "class_weights", "z_loss"}
    inner = {"logits", "labels", "weights", "label_smoothing"}
    p, g = problem("dense", lead=(2, B)), cotangent((2, B, N))
    p = {n: a if n in outer else a[0] for n, a in p.items()}
    p = {n: a if n in inner else a[:, 0] for n, a in p.items()}
    call = jax.vmap(
        with_gradient(row_loss(rule)), in_axes=({n: 0 if n in inner else None for n in p}, 0)
    )
    call = jax.vmap(call, in_axes=({n: 0 if n in outer else None for n in p}, 0))
    out = quick_jit(call)(p, g)
    for i, j in np.ndindex(2, B):
        each = {n: a[i] if n in outer else a for n, a in p.items()}
        each = {n: a[j] if n in inner else a for n, a in each.items()}
        assert_matches(at(out, (i, j)), each, g[i, j])


@pytest.mark.parametrize("shared", [("logits", "z_loss"), ("labels", "weights")])
def test_gradient_of_vmap_sums_over_what_is_shared(shared, rule):
    batch, g = problem("dense", lead=(B,)), cotangent((B, N))
    axes = {name: None if name in shared else 0 for name in batch}
    p = {name: a[0] if name in shared else a for name, a in batch.items()}
    rows = jax.vmap(row_loss(rule), in_axes=(axes,))
    gradients = quick_jit(jax.grad(lambda q: jnp.vdot(g, rows(p | q))))({n: p[n] for n in shared})

    def total(name, a):
        each = (at(batch, i) | {n: p[n] for n in shared} | {name: a} for i in range(B))
        return sum(np.vdot(g[i], oracle.loss(**q, reduction="none")) for i, q in enumerate(each))

    for name, gradient in gradients.items():
        by_name = numerical_jacobian(functools.partial(total, name), p[name])
        assert_close(gradient, by_name)


@pytest.mark.parametrize("mapped", ["labels", "dense", "label_smoothing", "class_weights"])
def test_gradient_of_vmap_over_what_lse_does_not_depend_on(mapped, rule):
    """All examples share the logits, and so lse, which each example's z-loss uses."""
    kind, mapped = ("dense", "labels") if mapped == "dense" else ("integer", mapped)
    batch, g = problem(kind, lead=(B,)), cotangent((B, N))
    del batch["weights"]  # with weights, labels decide which rows count, and so their lse
    p = {name: a if name == mapped else a[0] for name, a in batch.items()}
    axes = {name: 0 if name == mapped else None for name in p}
    rows = jax.vmap(row_loss(rule), in_axes=(axes,))
    gradient = quick_jit(jax.grad(lambda x: jnp.vdot(g, rows(p | {"logits": x}))))(p["logits"])
    each = [p | {mapped: a} for a in p[mapped]]
    expected = sum(
        oracle.gradient(**q, g=g_i, reduction="none") for q, g_i in zip(each, g, strict=True)
    )
    assert_close(gradient, expected)


# The first derivative, reverse and forward


def test_value_and_grad_with_metrics(rule):
    p = problem("integer")

    def loss(x):
        return softmax_cross_entropy(**(p | {"logits": x}), return_metrics=True, rule=rule)

    (value, metrics), gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))(p["logits"])
    x = np.where(p["class_mask"], np.asarray(p["logits"], np.float64), -np.inf)
    assert_close(value, oracle.loss(**p))
    assert_close(gradient, oracle.gradient(**p))
    assert_close(metrics.loss_sum, oracle.loss(**p, reduction="sum"))
    assert_close(metrics.loss_sum / metrics.weight_sum, oracle.loss(**p))
    counts = np.asarray(p["where"]) & (np.asarray(p["weights"]) != 0)
    oracle.check_rows_metrics(metrics, x, counts, p["labels"])


def test_no_gradient_passes_through_a_metric(rule):
    p = problem("dense")

    def metrics(q):
        found = softmax_cross_entropy(**(p | q), return_metrics=True, rule=rule)[1]
        return found.loss_sum, found.weight_sum, found.lse, found.max_probability

    jacobian = quick_jit(jax.jacrev(metrics))(floats(p))
    assert len(jax.tree.leaves(jacobian)) == 4 * len(floats(p))
    jax.tree.map(lambda j: np.testing.assert_array_equal(j, 0), jacobian)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("jacobian", "rule", "kind"),
    [(jax.jacrev, *case) for case in SOME] + [(jax.jacfwd, *case) for case in SOME[2:]],
)
def test_jacobian_of_every_reduction_in_every_argument(jacobian, rule, kind):
    """Logits, dense targets, weights, class weights, label smoothing and z-loss."""
    p = problem(kind, "float64")

    def every_reduction(loss, p, **options):
        losses = (loss(**p, reduction=r, **options) for r in ("none", "mean", "sum"))
        return [a.ravel() for a in losses]

    def actual(q):
        return jnp.concatenate(every_reduction(softmax_cross_entropy, p | q, rule=rule))

    def expected(name, a):
        return np.concatenate(every_reduction(oracle.loss, p | {name: a}))

    for name, j in quick_jit(jacobian(actual))(floats(p)).items():
        by_name = numerical_jacobian(functools.partial(expected, name), p[name])
        assert_close(j, by_name, "float32")  # the accuracy of central differences


@pytest.mark.parametrize(
    ("kind", "dtype"), [("integer", "float32"), ("dense", "bfloat16")], indirect=["dtype"]
)
@pytest.mark.parametrize("rule", FORWARD_RULES)
def test_jvp_along_every_argument(rule, kind, dtype):
    p = problem(kind, dtype)
    v = {name: cotangent(a.shape, a.dtype, seed=len(name)) for name, a in floats(p).items()}
    value, tangent = quick_jit(lambda q, v: jax.jvp(lambda q: row_loss(rule)(p | q), (q,), (v,)))(
        floats(p), v
    )
    a, b = as_float64(p), as_float64(v)

    def along(h):
        return oracle.loss(**(p | {n: a[n] + h * b[n] for n in a}), reduction="none")

    assert value.dtype == tangent.dtype == jnp.float32
    assert_close(value, along(0))
    assert_close(tangent, numerical_jacobian(along, 0))


@pytest.mark.parametrize("rule", FORWARD_RULES)
def test_linearize_and_its_transpose(rule, kind):
    p, g, x_dot = edges(kind), cotangent(), cotangent((N, K))

    @quick_jit
    def call(x):
        value, f_jvp = jax.linearize(lambda x: row_loss(rule)(p | {"logits": x}), x)
        return value, f_jvp(x_dot), *jax.linear_transpose(f_jvp, x)(g)

    value, tangent, gradient = call(p["logits"])
    each = oracle.gradient(**p, g=1.0, reduction="none")
    assert_close(tangent, np.sum(each * np.asarray(x_dot), axis=-1))
    assert_matches((value, gradient), p, g)


@pytest.mark.parametrize(
    "forward",
    [
        lambda f, x: jax.jvp(f, (x,), (x,)),
        lambda f, x: jax.linearize(f, x)[1](x),
        lambda f, x: jax.jacfwd(f)(x),
    ],
    ids=["jvp", "linearize", "jacfwd"],
)
def test_rule_vjp_has_no_forward_mode(forward):
    p = problem("integer")
    loss = functools.partial(softmax_cross_entropy, labels=p["labels"])
    with pytest.raises(TypeError, match="custom_vjp"):
        forward(loss, p["logits"])


# The second derivative

HESSIANS = {
    "hessian": jax.hessian,
    "jacfwd(jacrev)": lambda f: jax.jacfwd(jax.jacrev(f)),
    "jacrev(jacrev)": lambda f: jax.jacrev(jax.jacrev(f)),
}
FORWARD_HESSIANS = {
    "jacfwd(jacfwd)": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "jacrev(jacfwd)": lambda f: jax.jacrev(jax.jacfwd(f)),
}
# The product of the Hessian of f at x with v.
PRODUCTS = {
    "jvp of grad": lambda f, x, v: jax.jvp(jax.grad(f), (x,), (v,))[1],
    "linearize of grad": lambda f, x, v: jax.linearize(jax.grad(f), x)[1](v),
    "vjp of grad": lambda f, x, v: jax.vjp(jax.grad(f), x)[1](v)[0],
    "grad of grad": lambda f, x, v: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x),
}
FORWARD_PRODUCTS = {
    "grad of jvp": lambda f, x, v: jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1])(x),
}


@pytest.mark.usefixtures("double")
def test_hessian(rule, kind):
    p, g = edges(kind, "float64"), cotangent(dtype="float64")

    def total(x):
        return jnp.vdot(g, row_loss(rule)(p | {"logits": x}))

    ways = HESSIANS | (FORWARD_HESSIANS if rule in FORWARD_RULES else {})
    hessians = quick_jit(lambda x: {name: way(total)(x) for name, way in ways.items()})(p["logits"])
    for hessian in hessians.values():
        assert_close(hessian, literal_hessian(p, g))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("dense", "float32"), ("integer", "bfloat16")], indirect=["dtype"]
)
def test_hessian_vector_product(rule, kind, dtype):
    p, g = edges(kind, dtype), cotangent(dtype=wide_dtype(dtype))
    v = cotangent((N, K), dtype, seed=2)

    def total(x):
        return jnp.vdot(g, row_loss(rule)(p | {"logits": x}))

    ways = PRODUCTS | (FORWARD_PRODUCTS if rule in FORWARD_RULES else {})
    call = quick_jit(lambda x, v: {name: way(total, x, v) for name, way in ways.items()})
    expected = np.einsum("ikjl,jl->ik", literal_hessian(p, g), np.asarray(v).astype(np.float64))
    for name, product in call(p["logits"], v).items():
        assert product.dtype == dtype
        # A second reverse pass adds two cotangents of the logits, each rounded to their dtype; here
        # they are several times larger than their sum.
        forward = name in ("jvp of grad", "linearize of grad")
        terms = 4 if dtype == "bfloat16" and not forward else 1
        assert_close(product, expected, scale=terms * np.abs(expected).max())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("rule", "kind"), SOME)
def test_derivative_of_the_gradient_in_every_argument(rule, kind):
    p, g = problem(kind, "float64"), cotangent(dtype="float64")

    def gradient(q):
        return with_gradient(row_loss(rule))(p | q, g)[1]

    def expected(name, a):
        return oracle.gradient(**(p | {name: a}), g=g, reduction="none")

    for name, j in quick_jit(jax.jacrev(gradient))(floats(p)).items():
        by_name = numerical_jacobian(functools.partial(expected, name), p[name])
        assert_close(j, by_name, "float32")  # the accuracy of central differences


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("mode", "rule"),
    [
        ("rev", "vjp"),
        ("fwd", "jvp"),
        slow("rev", "jvp"),
        slow("rev", "autodiff"),
        slow("fwd", "autodiff"),
    ],
)
def test_check_grads(mode, rule):
    p = {name: problem("dense", "float64")[name] for name in ("logits", "labels", "weights")}
    with jax.disable_jit():  # many evaluations of small programs
        check_grads(row_loss(rule), (p,), order=2, modes=[mode])


# checkpoint and control flow


@pytest.mark.parametrize(
    ("rule", "policy"),
    [(rule, None) for rule in RULES]
    + [("vjp", policy) for policy in ("nothing_saveable", "everything_saveable", "dots_saveable")],
)
def test_checkpoint(rule, policy):
    p, g = edges("dense"), cotangent()
    policy = policy and getattr(jax.checkpoint_policies, policy)
    call = with_gradient(jax.checkpoint(row_loss(rule), policy=policy))
    assert_matches(quick_jit(call)(p, g), p, g)


@pytest.mark.usefixtures("double")
def test_gradient_through_a_scan_of_gradient_steps(rule):
    """The carry is x -> x - rate * gradient(x); its derivative is I - rate * Hessian(x)."""
    p, g, rate, steps = problem("dense", "float64"), cotangent(dtype="float64"), 0.3, 3
    call = with_gradient(row_loss(rule))

    def last_loss(x):
        def body(x, _):
            value, gradient = call(p | {"logits": x}, g)
            return x - rate * gradient, value

        x, values = jax.lax.scan(body, x, length=steps)
        return jnp.vdot(g, row_loss(rule)(p | {"logits": x})), values

    (_, values), gradient = quick_jit(jax.value_and_grad(last_loss, has_aux=True))(p["logits"])
    x = [np.asarray(p["logits"])]
    for step in range(steps):
        q = p | {"logits": x[-1]}
        assert_close(values[step], oracle.loss(**q, reduction="none"))
        x.append(x[-1] - rate * oracle.gradient(**q, g=g, reduction="none"))
    expected = oracle.gradient(**(p | {"logits": x.pop()}), g=g, reduction="none")
    while x:
        hessian = literal_hessian(p | {"logits": x.pop()}, g)
        expected = expected - rate * np.einsum("ikjl,jl->ik", hessian, expected)
    assert_close(gradient, expected)


def test_map_in_batches_that_do_not_divide(rule):
    batch, g = problem("integer", lead=(B,)), cotangent((B, N))
    call = with_gradient(row_loss(rule))
    out = quick_jit(lambda *a: jax.lax.map(lambda a: call(*a), a, batch_size=2))(batch, g)
    for i in range(B):
        assert_matches(at(out, i), at(batch, i), g[i])


def test_fori_loop(rule):
    batch, g = problem("integer", lead=(B,)), cotangent((B, N))

    def total(x):
        def body(i, sum_):
            return sum_ + jnp.vdot(g[i], row_loss(rule)(at(batch | {"logits": x}, i)))

        return jax.lax.fori_loop(0, B, body, jnp.float32(0))

    value, gradient = quick_jit(jax.value_and_grad(total))(batch["logits"])
    each = [at(batch, i) for i in range(B)]
    losses = np.stack([oracle.loss(**p, reduction="none") for p in each])
    assert_close(value, np.vdot(g, losses), scale=np.abs(losses).sum())
    assert_close(
        gradient,
        np.stack([oracle.gradient(**p, g=g[i], reduction="none") for i, p in enumerate(each)]),
    )


def test_while_loop_until_the_loss_is_small(rule):
    p = problem("integer")
    loss = functools.partial(softmax_cross_entropy, rule=rule)

    def unfinished(x):
        return loss(x, p["labels"]) > 0.5

    def step(x):
        return x - 2 * jax.grad(loss)(x, p["labels"])

    actual = quick_jit(lambda x: jax.lax.while_loop(unfinished, step, x))(p["logits"])
    x, steps = np.asarray(p["logits"], np.float64), 0
    while oracle.loss(x, p["labels"]) > 0.5:
        x, steps = x - 2 * oracle.gradient(x, p["labels"]), steps + 1
    assert steps > 3
    assert_close(actual, x)


def test_cond(rule):
    p, g = problem("dense"), cotangent()
    bare = {name: p[name] for name in ("logits", "labels")}

    def either(flag, p):
        return jax.lax.cond(
            flag, row_loss(rule), lambda p: row_loss(rule)({n: p[n] for n in bare}), p
        )

    call = quick_jit(lambda flag, p, g: with_gradient(functools.partial(either, flag))(p, g))
    assert_matches(call(True, p, g), p, g)
    assert_matches(call(False, p, g), bare, g)


# Training: optax, pytrees, carries, donation


def numpy_sgd(gradient, trace, step):
    """The update of optax.sgd(0.1, momentum=0.9), and the state after it."""
    trace = gradient + 0.9 * trace
    return -0.1 * trace, trace


def numpy_adam(gradient, state, step):
    """The update of optax.adam(0.1), and the state after it."""
    mu, nu = state or (0, 0)
    mu, nu = 0.9 * mu + 0.1 * gradient, 0.999 * nu + 0.001 * gradient**2
    return -0.1 * (mu / (1 - 0.9**step)) / (np.sqrt(nu / (1 - 0.999**step)) + 1e-8), (mu, nu)


@pytest.mark.parametrize(
    ("optimizer", "numpy_update", "dtype"),
    [
        (optax.sgd(0.1, momentum=0.9), numpy_sgd, "float32"),
        (optax.sgd(0.1, momentum=0.9), numpy_sgd, "bfloat16"),
        (optax.adam(0.1), numpy_adam, "float32"),
    ],
    ids=["sgd-float32", "sgd-bfloat16", "adam-float32"],
)
def test_optax_steps_in_a_scan(optimizer, numpy_update, dtype):
    """The carry, which is parameters and optimizer state, keeps its dtypes."""
    hidden = cotangent((N, D), dtype, seed=3)
    params = {"kernel": cotangent((D, K), dtype, seed=4), "bias": cotangent((K,), dtype, seed=5)}
    labels, steps = problem("integer")["labels"], 3

    def loss(params):
        logits = hidden @ params["kernel"] + params["bias"][None]
        return softmax_cross_entropy(logits, labels)

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax.adam needs it
            updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = params, optimizer.init(params)
    (actual, _), losses = quick_jit(lambda c: jax.lax.scan(step, c, length=steps))(carry)

    hidden, expected = np.asarray(hidden, np.float64), as_float64(params)
    states = dict.fromkeys(params, 0)
    for i in range(steps):
        logits = hidden @ expected["kernel"] + expected["bias"]
        assert_close(losses[i], oracle.loss(logits, labels), dtype)
        d_logits = oracle.gradient(logits, labels)
        gradients = {"kernel": hidden.T @ d_logits, "bias": d_logits.sum(0)}
        for name, gradient in gradients.items():
            update, states[name] = numpy_update(gradient, states[name], i + 1)
            expected[name] = expected[name] + update
    for name in params:
        assert actual[name].dtype == dtype
        assert_close(actual[name], expected[name])


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(rule, "float32") for rule in RULES] + [("vjp", "bfloat16")],
    indirect=["dtype"],
)
def test_donated_logits_hold_the_gradient(rule, dtype):
    p = problem("integer", dtype)
    x = jnp.copy(p["logits"])

    def loss(x):
        return softmax_cross_entropy(**(p | {"logits": x}), rule=rule)

    compiled = jax.jit(jax.value_and_grad(loss), donate_argnums=0).lower(x).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == x.nbytes
    value, gradient = compiled(x)
    assert x.is_deleted()
    assert_close(value, oracle.loss(**p))
    assert_close(gradient, oracle.gradient(**p))


# Modes of JAX


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("rule", "kind"), SOME)
def test_float32_stays_float32_among_float64_arguments(rule, kind):
    p, g = problem(kind, "float32"), cotangent()
    for name in ("weights", "class_weights", "label_smoothing", "z_loss"):
        p[name] = p[name].astype(jnp.float64)
    p["labels"] = p["labels"].astype(jnp.int64 if kind == "integer" else jnp.float64)

    value, gradients = quick_jit(with_gradients(row_loss(rule)))(p, g)
    assert value.dtype == jnp.float32
    assert {n: d.dtype for n, d in gradients.items()} == {n: a.dtype for n, a in floats(p).items()}
    assert_matches((value, gradients["logits"]), p, g)


@pytest.mark.usefixtures("double")
def test_float32_program_has_no_float64_array(rule, kind):
    p, g = problem(kind, "float32"), cotangent()
    if kind == "integer":
        p["labels"] = p["labels"].astype(jnp.int64)
    del p["weights"]  # without them, the loss creates its own
    numbers = {name: float(p.pop(name)) for name in ("label_smoothing", "z_loss")}
    call = jax.jit(with_gradient(lambda p: row_loss(rule)(p | numbers)))
    text = call.lower(p, g).as_text()
    assert "xf32>" in text
    assert "xf64>" not in text


def test_debug_nans_with_masked_classes(rule, kind):
    """No result is NaN. Without jit, JAX checks each primitive, and none of them gives NaN."""
    p, g, v = edges(kind), cotangent(), cotangent((N, K), seed=2)
    p["logits"] = p["logits"].at[3].set(-jnp.inf)  # a masked row
    mask = p["logits"] > -jnp.inf
    masked = p | {"where": mask, "logits": jnp.where(mask, p["logits"], 0)}
    call = with_gradient(row_loss(rule))

    def product(p):
        return jax.vjp(lambda x: call(p | {"logits": x}, g)[1], p["logits"])[1](v)[0]

    with jax.debug_nans(True):
        for q in (p, masked):
            assert_matches(quick_jit(call)(q, g), q, g)
            with jax.disable_jit():
                assert_matches(call(q, g), q, g)
                expected = np.einsum("ikjl,jl->ik", literal_hessian(q, g), v)
                assert_close(product(q), expected)


# Compositions

WRAPPERS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": jax.vmap,
    "map": lambda f: lambda *args: jax.lax.map(lambda a: f(*a), args),
    "scan": lambda f: lambda *args: jax.lax.scan(lambda _, a: (None, f(*a)), None, args)[1],
}
some_wrappers = st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=2)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(RULES),
    kind=st.sampled_from(KINDS),
    options=st.sets(st.sampled_from(EVERY_OF_LOGITS)),
    inner=some_wrappers,
    outer=some_wrappers,
)
def test_composition(rule, kind, options, inner, outer):
    """Transformations of the loss, then its gradient, then more transformations."""
    lead = (2,) * sum(name in ("vmap", "map", "scan") for name in inner + outer)
    p, g = problem(kind, lead=lead), cotangent((*lead, N))
    p = {name: a for name, a in p.items() if name not in set(EVERY_OF_LOGITS) - options}
    call = row_loss(rule)
    for name in inner:
        call = WRAPPERS[name](call)
    call = with_gradient(call)
    for name in outer:
        call = WRAPPERS[name](call)
    out = quick_jit(call)(p, g)
    for i in np.ndindex(*lead):
        assert_matches(at(out, i), at(p, i), g[i])


@pytest.mark.parametrize("rule", ["vjp", slow("jvp"), slow("autodiff")])
def test_the_gradient_of_two_parts_is_rounded_once(rule):
    """The gradients of the loss and its z-loss for one logit almost cancel."""
    x = np.asarray(jnp.array([[5.3, 5.1, -3.0]], "bfloat16"))
    wide = x.astype(np.float64)[0]
    q = np.exp(wide - wide.max())
    lse = np.log(q.sum()) + wide.max()
    q /= q.sum()
    z = float(np.float32(1.003 * (1 - q[0]) / (2 * lse * q[0])))
    call = functools.partial(softmax_cross_entropy, labels=np.array([0]), z_loss=z, rule=rule)
    assert_close(jax.grad(call)(x), oracle.gradient(x, [0], z_loss=z), scale=1e-3)
