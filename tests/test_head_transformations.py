"""The head under every JAX transformation, compared with logits in float64."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax import export
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.flatten_util import ravel_pytree
from option_cases import EVERY_OF_HEAD, FORWARD_RULES, RULES, vjp_by_default, with_row_scale
from oracle import assert_close
from problems import at, floats, head_problem, normal, with_gradients
from programs import quick_jit

import sxe

N, D, K, B = 5, 2, 4, 3
REDUCTIONS = ("mean", "none")

DIFFERENTIATED = ("hidden", "kernel", "bias", "logit_scale", "softcap")
slow = pytest.mark.slow


def problem(dense=False, dtype="float32", lead=()):
    """The array arguments of a call with all options, by name, with these leading axes."""
    # With dense targets, each row has its own logit_scale.
    every = with_row_scale(EVERY_OF_HEAD) if dense else EVERY_OF_HEAD
    p = head_problem(*every, dense=dense, dtype=dtype, shape=(N, D, K), lead=lead, seed=1)
    return jax.tree.map(jnp.asarray, p)


def plain(p):
    """The arguments without options."""
    return {name: p[name] for name in ("hidden", "kernel", "labels")}


def cotangents(lead=(), dtype="float32"):
    """Random cotangents for both reductions. Those of rows have different signs."""
    shapes = {"mean": lead, "none": (*lead, N)}
    return {r: jnp.asarray(normal(*shape, dtype=dtype)) for r, shape in shapes.items()}


def head(rule="vjp", reductions=REDUCTIONS):
    """p to the loss by both reductions, which compute the gradients on different paths."""

    def losses(p):
        call = functools.partial(sxe.linear_softmax_cross_entropy, chunk_size=2, rule=rule)
        return {r: call(**p, reduction=r) for r in reductions}

    return losses


def assert_matches(actual, p, g, dtype=None):
    value, gradients = actual
    each = {r: oracle.head_gradients(**p, g=np.float64(g[r]), reduction=r) for r in value}
    for r, loss in value.items():
        assert_close(loss, oracle.head_loss(**p, reduction=r), dtype)
    for name, gradient in gradients.items():
        right = sum(d[name] for d in each.values())
        scale = max(np.abs(d[name]).max(initial=0) for d in each.values())
        # The gradient for a scalar is a sum with cancellation.
        assert_close(gradient, right, dtype, scale if np.ndim(right) else max(10, scale))
        assert gradient.dtype == p[name].dtype


def materialised(p):
    """The losses in plain JAX, from logits."""
    scale, possible = p["logit_scale"], p["class_mask"][None, :]
    scale = scale[:, None] if scale.ndim else scale
    z = scale * (p["hidden"] @ p["kernel"]) + p["bias"][None, :]
    x = jnp.where(possible, p["softcap"] * jnp.tanh(z / p["softcap"]), -jnp.inf)
    log_q, a = jax.nn.log_softmax(x), p["label_smoothing"]
    log_q = jnp.where(possible, log_q, 0)
    y = p["labels"] if p["labels"].ndim == 2 else jax.nn.one_hot(p["labels"], K, dtype=x.dtype)
    spread = jnp.where(possible, a / possible.sum().astype(x.dtype), 0)
    t = p["class_weights"][None, :] * ((1 - a) * y + spread)
    w = jnp.where(p["where"], p["weights"], 0)
    loss = w * (p["z_loss"] * jax.nn.logsumexp(x, axis=-1) ** 2 - jnp.sum(t * log_q, axis=-1))
    norm = w if p["labels"].ndim == 2 else w * p["class_weights"][p["labels"]]
    return {"mean": loss.sum() / norm.sum(), "none": loss}


# With and without jit


@vjp_by_default
def test_without_jit(rule):
    """Run eagerly, each primitive on its own, while JAX checks every result for NaN.

    One class cannot occur.
    """
    p, g = problem(), cotangents()
    p = plain(p) | {name: p[name] for name in ("bias", "where", "weights")}
    p["bias"] = p["bias"].at[2].set(-jnp.inf)
    p["labels"] = jnp.where(p["labels"] == 2, 3, p["labels"])
    reductions = REDUCTIONS if rule == "vjp" else ["mean"]
    call = with_gradients(head(rule, reductions), DIFFERENTIATED)
    g = g if rule == "vjp" else {"mean": g["mean"]}
    with jax.debug_nans(True):
        if rule == "vjp":
            assert_matches(call(p, g), p, g)
        with jax.disable_jit():
            assert_matches(call(p, g), p, g)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@vjp_by_default
def test_eval_shape(rule, dtype):
    with jax.enable_x64(dtype == "float64"):
        p = problem(True, dtype)
        wide = p["weights"].dtype

        def loss(q, reduction="mean"):
            options = {"return_metrics": True, "rule": rule, "reduction": reduction}
            return sxe.linear_softmax_cross_entropy(**(p | q), **options, chunk_size=2)

        def of(*shapes_and_dtypes):
            return [jax.ShapeDtypeStruct(*a) for a in shapes_and_dtypes]

        rows = of(((N,), wide), ((N,), jnp.int32), ((N,), wide))
        metrics = [*of(((), wide), ((), wide)), *rows, None, rows[0]]
        for reduction, shape in [("mean", ()), ("sum", ()), ("none", (N,))]:
            value, found = jax.eval_shape(functools.partial(loss, reduction=reduction), p)
            assert [value, *found] == [*of((shape, wide)), *metrics]
        gradients, _ = jax.eval_shape(jax.grad(loss, has_aux=True), floats(p))
        assert gradients == jax.eval_shape(lambda q: q, floats(p))


# vmap


@pytest.mark.parametrize(
    ("rule", "mapped"),
    [
        ("vjp", ("hidden",)),
        ("vjp", ("kernel",)),
        ("vjp", ("hidden", "kernel")),
        ("vjp", ("labels",)),
        ("vjp", tuple(problem())),
        pytest.param("vjp", ("bias", "softcap", "where", "z_loss"), marks=slow),
        pytest.param("jvp", tuple(problem()), marks=slow),
        pytest.param("autodiff", ("kernel", "labels", "weights"), marks=slow),
    ],
)
def test_vmap(rule, mapped):
    """Map some of the arguments, and the cotangents."""
    batch, g = problem(lead=(B,)), cotangents((B,))
    p = {name: a if name in mapped else a[0] for name, a in batch.items()}
    axes = {name: 0 if name in mapped else None for name in p}
    out = quick_jit(jax.vmap(with_gradients(head(rule), DIFFERENTIATED), in_axes=(axes, 0)))(p, g)
    for i in range(B):
        each = {name: a[i] if name in mapped else a for name, a in p.items()}
        assert_matches(at(out, i), each, at(g, i))


@vjp_by_default
def test_gradient_of_vmap_sums_over_a_shared_kernel(rule):
    batch, g = problem(lead=(B,)), cotangents((B,))
    axes = {name: None if name in ("kernel", "bias") else 0 for name in batch}
    p = {name: a[0] if axes[name] is None else a for name, a in batch.items()}
    losses = jax.vmap(head(rule), in_axes=(axes,))
    _, gradients = quick_jit(with_gradients(losses, ("kernel", "bias")))(p, g)
    each = [
        oracle.head_gradients(
            **(at(batch, i) | {n: p[n] for n in gradients}), g=g[r][i], reduction=r
        )
        for i in range(B)
        for r in REDUCTIONS
    ]
    for name, gradient in gradients.items():
        assert_close(gradient, sum(d[name] for d in each))


@vjp_by_default
def test_gradient_of_vmap_over_labels_alone(rule):
    """All examples share hidden states and kernel, and so lse, on which the z-loss depends."""
    batch, g = problem(lead=(B,)), cotangents((B,))
    del batch["weights"]  # with weights, the label decides whether a row counts, and so its lse
    p = {name: a if name == "labels" else a[0] for name, a in batch.items()}
    axes = {name: 0 if name == "labels" else None for name in p}
    losses = jax.vmap(head(rule), in_axes=(axes,))
    _, gradients = quick_jit(with_gradients(losses, ("hidden", "kernel")))(p, g)
    each = [
        oracle.head_gradients(**(p | {"labels": y}), g=g[r][i], reduction=r)
        for i, y in enumerate(p["labels"])
        for r in REDUCTIONS
    ]
    for name, gradient in gradients.items():
        assert_close(gradient, sum(d[name] for d in each))


# Derivatives


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("rule", "dense"), [("jvp", False), pytest.param("autodiff", True, marks=slow)]
)
def test_forward_mode(rule, dense):
    """jvp, linearize and its transpose, and jacfwd, for every argument."""
    p, g = problem(dense, "float64"), cotangents(dtype="float64")
    p_dot = jax.tree.map(lambda a: jnp.sin(1 + 5 * a), floats(p))

    def ways(losses, q, q_dot):
        def f(q):
            return losses(p | q)

        value, linear = jax.linearize(f, q)
        jacobian = jax.jacfwd(lambda kernel: f(q | {"kernel": kernel}))(q["kernel"])
        transposed = jax.linear_transpose(linear, q)(g)
        return jax.jvp(f, (q,), (q_dot,)), (value, linear(q_dot)), transposed, jacobian

    actual = quick_jit(functools.partial(ways, head(rule)))(floats(p), p_dot)
    expected = quick_jit(functools.partial(ways, materialised))(floats(p), p_dot)
    jax.tree.map(assert_close, actual, expected)


def test_rule_vjp_has_no_forward_mode():
    p = plain(problem())
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jacfwd(lambda kernel: head()(p | {"kernel": kernel}))(p["kernel"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_do_not_depend_on_those_taken_before(reduction):
    """Gradients for both arguments follow one for a single argument: JAX caches a custom rule."""
    p = plain(problem())
    static = {"labels": p["labels"], "reduction": reduction, "chunk_size": 2}
    kernels = jnp.stack([p["kernel"], 2 * p["kernel"]])

    def loss(hidden, kernel):
        return jnp.sum(sxe.linear_softmax_cross_entropy(hidden, kernel, **static))

    def of_vmap(hidden):
        return jnp.sum(jax.vmap(loss, in_axes=(None, 0))(hidden, kernels))

    both = jax.grad(loss, argnums=(0, 1))
    first = quick_jit(both)(p["hidden"], p["kernel"])
    quick_jit(jax.grad(of_vmap))(p["hidden"])
    again = quick_jit(jax.grad(jax.checkpoint(loss), (0, 1)))(p["hidden"], p["kernel"])
    jax.tree.map(assert_close, again, first)


# The product of the Hessian of f at x with v, and the Hessian
SECOND = {
    "hessian": lambda f, x, v: jax.hessian(f)(x) @ v,  # jvp of grad
    "grad of grad": lambda f, x, v: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x),
}
FORWARD_SECOND = {
    "grad of jvp": lambda f, x, v: jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1])(x),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("rule", "reduction"),
    [
        ("vjp", "mean"),
        ("vjp", "none"),
        pytest.param("jvp", "none", marks=slow),
        pytest.param("autodiff", "mean", marks=slow),
    ],
)
def test_second_derivatives(rule, reduction):
    """In hidden states, kernel, bias, scale, cap and weights together, with mixed derivatives."""
    p, g = problem(rule == "autodiff", "float64"), cotangents(dtype="float64")[reduction]
    x, unravel = ravel_pytree({name: p[name] for name in (*DIFFERENTIATED, "weights")})
    v = jnp.sin(1 + 5 * x)

    def total(losses, x):
        return jnp.sum(g * losses(p | unravel(x))[reduction])

    ways = SECOND | (FORWARD_SECOND if rule in FORWARD_RULES else {})
    f = functools.partial(total, head(rule, [reduction]))
    actual = quick_jit(lambda x: {name: way(f, x, v) for name, way in ways.items()})(x)
    expected = quick_jit(jax.hessian(functools.partial(total, materialised)))(x) @ v
    for product in actual.values():
        assert_close(product, expected)


@pytest.mark.parametrize(
    "policy",
    [None, *(pytest.param(p, marks=slow) for p in ("everything_saveable", "dots_saveable"))],
)
@pytest.mark.parametrize("rule", ["vjp", pytest.param("jvp", marks=slow)])
def test_checkpoint(rule, policy):
    p, g = problem(), cotangents()
    policy = policy and getattr(jax.checkpoint_policies, policy)
    call = with_gradients(jax.checkpoint(head(rule), policy=policy), DIFFERENTIATED)
    assert_matches(quick_jit(call)(p, g), p, g)


# Sizes


def avals(jaxpr):
    """The types of all values that a program computes, also within loops and calls."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for x in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(x, Jaxpr | ClosedJaxpr):
                yield from avals(getattr(x, "jaxpr", x))


# For vjp of grad by the other rules, JAX keeps the values that its backward loop computes.
@pytest.mark.parametrize(
    ("rule", "derivative"),
    [
        ("vjp", "vjp of grad"),
        *itertools.product(RULES, ["none", "grad", "jvp of grad"]),
    ],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_has_the_size_of_the_logits(rule, reduction, derivative):
    rows, width, classes, chunk_size = 64, 3, 40, 4
    p = {"hidden": jnp.ones((rows, width)), "kernel": jnp.ones((width, classes))}
    static = {"chunk_size": chunk_size, "reduction": reduction, "rule": rule}
    static |= {"labels": jnp.ones(rows, int), "label_smoothing": 0.1, "softcap": 3.0}
    static |= {"where": jnp.arange(rows) > 5, "class_weights": jnp.ones(classes)}

    def total(p):
        return jnp.sum(sxe.linear_softmax_cross_entropy(**p, **static) ** 2)

    gradient = jax.grad(total)
    f = {
        "none": total,
        "grad": gradient,
        "jvp of grad": lambda p: jax.jvp(gradient, (p,), (p,)),
        "vjp of grad": lambda p: jax.vjp(gradient, p)[1](p),
    }[derivative]
    sizes = [math.prod(a.shape) for a in avals(jax.make_jaxpr(f)(p).jaxpr)]
    assert chunk_size * classes in sizes
    assert max(sizes) < rows * classes


# Training


def test_steps_of_an_optimizer_in_a_scan():
    """In bfloat16. The carry, parameters and optimizer state, keeps its dtypes."""
    optimizer, steps = optax.sgd(0.1, momentum=0.9), 3
    p = plain(problem(dtype="bfloat16"))
    params = {"hidden": p["hidden"], "kernel": p["kernel"]}

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(lambda params: head()(p | params)["mean"])(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = params, optimizer.init(params)
    (actual, _), losses = quick_jit(lambda c: jax.lax.scan(step, c, length=steps))(carry)
    wide = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), params)
    trace = dict.fromkeys(wide, 0)
    for i in range(steps):
        assert_close(losses[i], oracle.head_loss(**(p | wide)), "bfloat16")
        gradients = oracle.head_gradients(**(p | wide))
        trace = {n: gradients[n] + 0.9 * trace[n] for n in wide}
        wide = {n: wide[n] - 0.1 * trace[n] for n in wide}
    for name, a in actual.items():
        assert a.dtype == jnp.bfloat16
        assert_close(a, wide[name])


def test_donation():
    """The memory of hidden states and kernel is reused for their gradients."""
    p, g = problem(), cotangents()

    def step(hidden, kernel):
        return with_gradients(head(), ("hidden", "kernel"))(
            p | {"hidden": hidden, "kernel": kernel}, g
        )

    given = jnp.copy(p["hidden"]), jnp.copy(p["kernel"])
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(a.nbytes for a in given)
    value, gradients = compiled(*given)
    assert all(a.is_deleted() for a in given)
    assert_matches((value, gradients), p, g)


# Modes of JAX


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
@vjp_by_default
def test_float32_stays_float32_when_x64_is_on(rule, dense):
    """There is no float64 in between, and float64 options change nothing."""
    p, g = problem(dense), cotangents()
    numbers = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.5, "softcap": 3.0}
    q = {name: p[name] for name in p if name not in (*numbers, "weights")}
    call = jax.jit(with_gradients(lambda q: head(rule)(q | numbers), DIFFERENTIATED))
    text = call.lower(q, g).as_text()
    assert "xf32>" in text
    assert "xf64>" not in text
    if not dense:
        wide = {n: a.astype(jnp.float64) for n, a in floats(p).items() if a.ndim < 2}
        wide["labels"] = p["labels"].astype(jnp.int64)
        out = quick_jit(with_gradients(head(rule), DIFFERENTIATED))(p | wide, g)
        assert out[0]["none"].dtype == jnp.float32
        assert_matches(out, p | wide, g, "float32")


# Export


@pytest.mark.parametrize(
    ("rule", "dense"),
    [
        ("vjp", False),
        *(pytest.param(rule, rule != "jvp", marks=slow) for rule in RULES),
    ],
)
def test_export_round_trip(rule, dense):
    """The program goes through bytes. It is for every platform."""
    p, g = problem(dense), cotangents()
    f = jax.jit(with_gradients(head(rule), DIFFERENTIATED))
    exported = export.export(f, platforms=["cpu", "cuda", "tpu"])(p, g)
    again = export.deserialize(exported.serialize())
    assert_matches(again.call(p, g), p, g)


def test_gradient_of_the_exported_loss():
    p, g = problem(), cotangents()
    exported = export.export(jax.jit(head()))(p)
    again = export.deserialize(exported.serialize(vjp_order=1))
    assert_matches(with_gradients(again.call, DIFFERENTIATED)(p, g), p, g)
