"""Log-probability, entropy and divergences under all transformations of JAX.

The tests compare functions of logits and of the head, with single and composed transformations,
with the float64 reference.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions import FUNCTIONS, MODES, B, K, N, every_function, of_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.test_util import check_grads
from option_cases import FORWARD_RULES, RULES, each_value, slow, vjp_by_default
from oracle import assert_close, naming
from problems import at, floats, normal, wide_dtype, with_gradients
from programs import all_of, quick_jit
from tolerances import SAME_FLOAT32

import sxe

# One rule for each function, where more rules would test nothing new: they share the arithmetic.
# The slow tests have the other two divergences, because all three share their code.
MANY = {"forward": pytest.mark.slow, "reverse": pytest.mark.slow}
SOME = dict(zip(FUNCTIONS, ("jvp", "vjp", "jvp", "vjp", "autodiff"), strict=True))
some_rules = pytest.mark.parametrize(
    ("f", "rule"),
    [pytest.param(f, SOME[n], id=n, marks=MANY.get(n, ())) for n, f in FUNCTIONS.items()],
)
some_functions = pytest.mark.parametrize(
    "f", [pytest.param(f, id=n, marks=MANY.get(n, ())) for n, f in FUNCTIONS.items()]
)
some_forward_rules = pytest.mark.parametrize(
    ("f", "rule"),
    [(f, FORWARD_RULES[i % 2]) for i, f in enumerate(FUNCTIONS.values())],
    ids=FUNCTIONS,
)


def edges(f, dtype="float32"):
    """Tied maxima, classes at -inf on both sides, a confident row, and NaN in a masked row."""
    p = f.plain(dtype=dtype)
    for name in ("logits", "target_logits"):
        if name in p:
            x = np.array(p[name])
            x[0, [0, 2, 5]] = x[0].max() + 1
            x[1, 3] += 20
            x[2, [1, 6]] = -np.inf
            x[2, [0, 4]] = x[2].max() + 1
            x[3] = np.nan
            p[name] = jnp.asarray(x)
    if "labels" in p:
        p["labels"] = jnp.array([2, 3, 0, 99, 5], jnp.int32)
    if f.is_head:
        p["hidden"] = p["hidden"].at[3].set(jnp.nan)
        p["bias"] = jnp.zeros(K, p["kernel"].dtype).at[jnp.array([1, 6])].set(-jnp.inf)
    return p | {"where": jnp.arange(N) != 3}


def as_float64(p):
    return {name: np.asarray(a).astype(np.float64) for name, a in floats(p).items()}


def jacobian_of(f, x, step=1e-5):
    """Central differences in float64."""
    columns = []
    for i in np.ndindex(*x.shape):
        e = np.zeros(x.shape)
        e[i] = step
        columns.append((f(x + e) - f(x - e)) / (2 * step))
    return np.stack(columns, axis=-1).reshape(*columns[0].shape, *x.shape)


# With and without jit


@each_value(f=FUNCTIONS, dtype=["float32", "bfloat16", "float16", "float64"])
def test_dtypes(f, dtype):
    """Results are float32 or float64. Each gradient has its input's dtype and is rounded once."""
    with jax.enable_x64(dtype == "float64"):
        for rule in RULES if dtype == "float32" else RULES[:1]:
            p = f.problem(dtype=dtype)
            g = f.cotangent(p)
            value, gradients = quick_jit(with_gradients(f(rule=rule)))(p, g)
            assert {a.dtype for a in jax.tree.leaves(value)} == {jnp.dtype(wide_dtype(dtype))}
            # The head's loop computes the gradients of scalars in float32.
            f.assert_matches((value, gradients), p, g)


@each_value(mode=MODES, x=["float32", "bfloat16"])
def test_a_teacher_of_another_dtype(mode, x):
    """Both sides are cast to float32, and each gradient has its input's dtype."""
    f = FUNCTIONS[mode]
    p = f.problem()
    p["logits"] = p["logits"].astype(x)
    p["target_logits"] = p["target_logits"].astype("bfloat16" if x == "float32" else "float32")
    g = jnp.asarray(normal(N, seed=1))
    with jax.numpy_dtype_promotion("standard"):
        value, gradients = quick_jit(with_gradients(f()))(p, g)
    assert value.dtype == jnp.float32
    f.assert_matches((value, gradients), p, g)


@some_rules
def test_eager_equals_jitted(f, rule):
    p = f.problem()
    g = f.cotangent(p)
    call = with_gradients(f(rule=rule))
    eager, jitted = call(p, g), quick_jit(call)(p, g)
    f.assert_matches(eager, p, g)
    jax.tree.map(functools.partial(assert_close, dtype="float32"), eager, jitted)


@vjp_by_default
@some_functions
def test_edges_without_jit_and_with(f, rule):
    """No result is NaN. Without jit, debug_nans checks that no intermediate value is NaN either."""
    p = edges(f)
    g = f.cotangent(p)
    call = with_gradients(f(rule=rule))
    clean = p | {"hidden": p["hidden"].at[3].set(0)} if f.is_head else p
    with jax.disable_jit():
        f.assert_matches(call(p, g), clean, g)
    p = clean | {n: a.at[3].set(-jnp.inf) for n, a in p.items() if n.endswith("logits")}
    with jax.debug_nans(True):
        f.assert_matches(quick_jit(call)(p, g), p, g)
        with jax.disable_jit():
            f.assert_matches(call(p, g), p, g)


@every_function
def test_eval_shape(f):
    p = f.problem()
    of_rows = jax.ShapeDtypeStruct((N,), jnp.float32)
    expected = of_rows if f.is_divergence else sxe.LogProbAndEntropy(of_rows, of_rows)
    found, gradients = jax.eval_shape(with_gradients(f()), p, expected)
    assert found == expected
    assert gradients == jax.eval_shape(floats, p)


# vmap


@some_rules
def test_vmap_over_each_argument(f, rule):
    """A single program maps over each argument, over the cotangents, and over everything."""
    batch = f.problem(lead=(B,))
    g = jax.tree.map(lambda *a: jnp.stack(a), *(f.cotangent(at(batch, 0), i) for i in range(B)))
    names = [*batch, None]
    functions, arguments = [], []
    for mapped in [[name] for name in names] + [names]:
        p = {name: a if name in mapped else a[0] for name, a in batch.items()}
        axes = {name: 0 if name in mapped else None for name in p}
        of = None if None not in mapped else 0
        functions.append(jax.vmap(with_gradients(f(rule=rule)), in_axes=(axes, of)))
        arguments.append((p, g if of == 0 else at(g, 0)))
    results = quick_jit(all_of(functions))(arguments)
    for mapped, (p, g), out in zip([[n] for n in names] + [names], arguments, results, strict=True):
        for i in range(B):
            each = {name: a[i] if name in mapped else a for name, a in p.items()}
            f.assert_matches(at(out, i), each, at(g, i) if None in mapped else g)


@some_rules
def test_gradient_of_vmap_sums_over_what_is_shared(f, rule):
    batch = f.problem(lead=(B,))
    g = jax.tree.map(lambda *a: jnp.stack(a), *(f.cotangent(at(batch, 0), i) for i in range(B)))
    shared = ("hidden", "target_logits", "weights") if f.is_divergence else ("kernel", "bias")
    shared = [name for name in shared if name in batch] or ["logits"]
    axes = {name: None if name in shared else 0 for name in batch}
    p = {name: a[0] if name in shared else a for name, a in batch.items()}
    rows = jax.vmap(f(rule=rule), in_axes=(axes,))
    _, gradients = quick_jit(with_gradients(rows, shared))(p, g)
    each = [f.truth(at(batch, i) | {n: p[n] for n in shared}, at(g, i))[1] for i in range(B)]
    for name, gradient in gradients.items():
        assert_close(gradient, sum(d[name] for d in each))


@of_logits
def test_vmap_in_and_out_axes(f):
    batch = f.plain(lead=(B,))
    g = jax.tree.map(lambda *a: jnp.stack(a), *(f.cotangent(at(batch, 0), i) for i in range(B)))
    moved = {name: jnp.moveaxis(a, 0, -1) for name, a in batch.items()}
    of_g = jax.tree.map(lambda a: a.T, g)
    call = jax.vmap(with_gradients(f()), in_axes=(dict.fromkeys(moved, -1), 1), out_axes=(1, 2))
    value, gradients = quick_jit(call)(moved, of_g)
    value = jax.tree.map(lambda a: a.T, value)
    gradients = {name: jnp.moveaxis(d, 2, 0) for name, d in gradients.items()}
    for i in range(B):
        f.assert_matches(at((value, gradients), i), at(batch, i), at(g, i))


# Forward mode


@some_forward_rules
def test_jvp_along_every_argument(f, rule):
    with jax.enable_x64(True):
        p = f.problem(dtype="float64")
        v = {
            n: jnp.asarray(normal(*a.shape, dtype="float64", seed=3)) for n, a in floats(p).items()
        }

        def ways(q, v):
            call = lambda q: f(rule=rule)(p | q)  # noqa: E731
            value, linear = jax.linearize(call, q)
            return jax.jvp(call, (q,), (v,)), (value, linear(v))

        a, b = as_float64(p), as_float64(v)

        def along(h):
            q = p | {n: a[n] + h * b[n] for n in a}
            return np.stack(jax.tree.leaves(f.truth(q, f.cotangent(p))[0]))

        for value, tangent in quick_jit(ways)(floats(p), v):
            assert_close(np.stack(jax.tree.leaves(value)), along(np.zeros(())))
            slope = jacobian_of(along, np.zeros(()))
            assert_close(np.stack(jax.tree.leaves(tangent)), slope, "float32")


@every_function
def test_rule_vjp_has_no_forward_mode(f):
    p = f.plain()
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda q: f()(p | q), (floats(p),), (floats(p),))


# Second derivatives


@some_rules
def test_derivatives_of_the_gradient_in_every_argument(f, rule):
    """Second derivatives with respect to all pairs of arguments."""
    with jax.enable_x64(True):
        p = f.problem(dtype="float64")
        g = f.cotangent(p)
        call = with_gradients(f(rule=rule))
        jacobian = quick_jit(jax.jacrev(lambda q: call(p | q, g)[1]))(floats(p))
        for by in floats(p):

            def gradients(a, by=by):
                found = f.truth(p | {by: a}, g)[1]
                return np.concatenate([found[name].ravel() for name in jacobian])

            right = jacobian_of(gradients, np.asarray(p[by]))
            found = [j[by].reshape(-1, *p[by].shape) for j in jacobian.values()]
            # The tolerance is limited by the accuracy of central differences.
            assert_close(np.concatenate(found), right, "float32")


HESSIANS = {
    "hessian": lambda f, x, v: jnp.tensordot(jax.hessian(f)(x), v, x.ndim),
    "jvp of grad": lambda f, x, v: jax.jvp(jax.grad(f), (x,), (v,))[1],
    "vjp of grad": lambda f, x, v: jax.vjp(jax.grad(f), x)[1](v)[0],
    "grad of grad": lambda f, x, v: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x),
}
FORWARD_HESSIANS = {
    "grad of jvp": lambda f, x, v: jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1])(x),
    "jacfwd of jacfwd": lambda f, x, v: jnp.tensordot(jax.jacfwd(jax.jacfwd(f))(x), v, x.ndim),
}


@vjp_by_default
@some_functions
def test_hessian(f, rule):
    """All ways to compute Hessian products for logits, hidden states and target logits."""
    with jax.enable_x64(True):
        p = edges(f, "float64")
        g = f.cotangent(p)
        for name in ("hidden", "logits", "target_logits"):
            if name not in p:
                continue

            def total(x, name=name):
                value = f(rule=rule)(p | {name: x})
                return sum(map(jnp.vdot, jax.tree.leaves(g), jax.tree.leaves(value)))

            def gradient(x, name=name):
                return f.truth(p | {name: x}, g)[1][name]

            x = np.array(p[name])
            v = normal(*x.shape, dtype="float64", seed=4)
            # Central differences leave out infinite and NaN entries.
            still = ~np.isfinite(x)
            v[still] = 0
            ways = HESSIANS | (FORWARD_HESSIANS if rule in FORWARD_RULES else {})
            run = quick_jit(lambda x, v, ways=ways: {n: w(total, x, v) for n, w in ways.items()})
            found = run(p[name], v)
            h = 1e-5
            right = (gradient(np.where(still, x, x + h * v)) - gradient(x - h * v)) / (2 * h)
            right[3] = 0
            for way, product in found.items():
                with naming(name, way):
                    assert_close(product, right, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "rule"), [("rev", "vjp"), ("rev", "jvp"), ("fwd", "jvp"), ("fwd", "autodiff")]
)
@of_logits
def test_check_grads(f, mode, rule):
    with jax.enable_x64(True), jax.disable_jit():
        p = f.plain(dtype="float64")
        check_grads(lambda q: f(rule=rule)(p | q), (floats(p),), order=2, modes=[mode])


# checkpoint, control flow, and compositions


@some_rules
def test_checkpoint(f, rule):
    p = f.problem()
    g = f.cotangent(p)
    f.assert_matches(quick_jit(with_gradients(jax.checkpoint(f(rule=rule))))(p, g), p, g)


@pytest.mark.parametrize("name", [slow("logits"), "head", slow("forward")])
def test_control_flow(name):
    """A scan, a map whose batch size does not divide the examples, and a cond."""
    f = FUNCTIONS[name]
    batch = f.problem(lead=(B,))
    g = jax.tree.map(lambda *a: jnp.stack(a), *(f.cotangent(at(batch, 0), i) for i in range(B)))

    def scanned(p):
        return jax.lax.scan(lambda c, q: (c + 1, f()(q)), 0, p)[1]

    def mapped(p):
        return jax.lax.map(f(), p, batch_size=2)

    def either(p):
        return jax.vmap(lambda q: jax.lax.cond(q["i"] >= 0, f(), f(), q["p"]))(
            {"p": p, "i": jnp.arange(B)}
        )

    functions = [with_gradients(h) for h in (scanned, mapped, either)]
    for out in quick_jit(all_of(functions))([(batch, g)] * 3):
        for i in range(B):
            f.assert_matches(at(out, i), at(batch, i), at(g, i))


@some_functions
def test_descent_through_its_own_gradient(f):
    """A gradient through a scan of gradient steps agrees with central differences."""
    with jax.enable_x64(True):
        p = f.plain(dtype="float64")
        g = f.cotangent(p)
        name, rate, steps = "hidden" if f.is_head else "logits", 0.1, 2

        def last(x):
            def step(x, _):
                return x - rate * with_gradients(f(), (name,))(p | {name: x}, g)[1][name], None

            x, _ = jax.lax.scan(step, x, length=steps)
            value = f()(p | {name: x})
            return sum(map(jnp.vdot, jax.tree.leaves(g), jax.tree.leaves(value)))

        def expected(x):
            for _ in range(steps):
                x = x - rate * f.truth(p | {name: x}, g)[1][name]
            value = f.truth(p | {name: x}, g)[0]
            return sum(map(np.vdot, jax.tree.leaves(g), jax.tree.leaves(value)))

        found = quick_jit(jax.value_and_grad(last))(p[name])
        assert_close(found[0], expected(np.asarray(p[name])), scale=10)
        assert_close(found[1], jacobian_of(expected, np.asarray(p[name])), "float32")


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
    name=st.sampled_from(sorted(FUNCTIONS)),
    rule=st.sampled_from(RULES),
    options=st.integers(0, 31),
    inner=some_wrappers,
    outer=some_wrappers,
)
def test_composition(name, rule, options, inner, outer):
    """Some transformations of the function, then the gradient, then more transformations."""
    f = FUNCTIONS[name]
    lead = (2,) * sum(name in ("vmap", "map", "scan") for name in inner + outer)
    some = [option for i, option in enumerate(f.options) if options >> i & 1]
    p = f.problem(*some or ["none"], lead=lead)
    g = [f.cotangent(at(p, i), 5 + n) for n, i in enumerate(np.ndindex(*lead))]
    g = jax.tree.map(lambda *a: jnp.stack(a).reshape(*lead, *a[0].shape), *g)
    call = f(rule=rule)
    for wrapper in inner:
        call = WRAPPERS[wrapper](call)
    call = with_gradients(call)
    for wrapper in outer:
        call = WRAPPERS[wrapper](call)
    out = quick_jit(call)(p, g)
    for i in np.ndindex(*lead):
        f.assert_matches(at(out, i), at(p, i), at(g, i))


# Modes of JAX, and export


@some_functions
def test_float32_stays_float32_where_x64_is_on(f):
    with jax.enable_x64(True):
        p = f.problem()
        g = f.cotangent(p)
        text = jax.jit(with_gradients(f())).lower(p, g).as_text()
        assert "xf32>" in text
        assert "xf64>" not in text
        for name in ("weights", "logit_scale"):
            if name in p and name in floats(p):
                p[name] = p[name].astype(jnp.float64)
        f.assert_matches(quick_jit(with_gradients(f()))(p, g), p, g, dtype="float32")


@some_functions
def test_export(f):
    """Export for all platforms, with serialization, including the gradient."""
    p = f.problem(rows=(8,))
    g = f.cotangent(p)
    exported = export.export(jax.jit(f()), platforms=["cpu", "cuda", "tpu"])(p)
    again = export.deserialize(exported.serialize(vjp_order=1))
    found = quick_jit(with_gradients(again.call))(p, g)
    f.assert_matches(found, p, g)
    direct = quick_jit(with_gradients(f()))(p, g)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(a, b, rtol=SAME_FLOAT32, atol=1e-6)


@of_logits
def test_export_of_an_open_number_of_rows(f):
    (rows,) = export.symbolic_shape("n")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), f.plain())
    g = f.cotangent(f.plain())
    of_g = jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows,), a.dtype), g)
    exported = export.export(jax.jit(with_gradients(f())))(shapes, of_g)
    for n in (1, 5):
        p = f.plain(rows=(n,))
        g = f.cotangent(p)
        f.assert_matches(exported.call(p, g), p, g)
