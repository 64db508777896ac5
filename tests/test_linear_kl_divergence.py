"""The divergence of hidden states and kernels, compared with a float64 oracle."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from fresh import run as run_fresh
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from option_cases import RULES as ALL_RULES
from option_cases import each_value, one_in, slow
from oracle import assert_close, naming
from problems import floats, head_problem, normal, with_gradients
from programs import all_of, quick_jit
from tolerances import DIVERGENCE_BAR, DIVERGENCE_GRADIENT_BAR

import sxe

N, D, TARGET_D, K = 16, 6, 4, 24
MODES = ("forward", "reverse", "jensen_shannon")
RULES = ["vjp", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("jvp", "autodiff"))]
OPTIONS = ("bias", "softcap")


def problem(*options, target=("bias", "row_scale", "softcap"), dtype="float32", seed=0):
    """Arguments of sxe.linear_kl_divergence by name. ``target`` has the options of the target."""
    p = head_problem(*options, dtype=dtype, shape=(N, D, K), seed=seed)
    of_target = head_problem(*target, dtype=dtype, shape=(N, TARGET_D, K), seed=seed + 1)
    del p["labels"], of_target["labels"]
    return p | {f"target_{name}": a for name, a in of_target.items()}


def with_target_logits(p):
    """The same, with the target's product as logits. They are then scaled and softcapped."""
    p = dict(p)
    u = p.pop("target_hidden").astype(np.float64) @ p.pop("target_kernel").astype(np.float64)
    p.pop("target_bias", None)
    return p | {"target_logits": u.astype(np.float32)}


def expected(p, g, **static):
    """The value, and by name the gradients of its product with g, in float64."""
    names = ("hidden", "kernel", "bias", "logit_scale", "softcap")
    of_model = {name: p[name] for name in names if name in p}
    of_target = {name: p[f"target_{name}"] for name in names if f"target_{name}" in p}
    if "target_logits" in p:  # multiply them with an identity kernel
        of_target |= {"hidden": p["target_logits"], "kernel": np.eye(K)}
    sides = oracle.head(**of_model), oracle.head(**of_target)
    rest = {name: p[name] for name in ("where", "weights", "class_mask") if name in p}
    logits = {"logits": sides[0][0], "target_logits": sides[1][0]} | rest
    d = oracle.kl_divergence_gradients(g, **logits, **static)
    gradients = {"weights": d["weights"]} | sides[0][1](d["logits"])
    for name, a in sides[1][1](d["target_logits"]).items():
        gradients[f"target_{name}"] = a
    gradients["target_logits"] = gradients["target_hidden"]
    return oracle.kl_divergence(**logits, **static), gradients


def cotangent(reduction):
    return normal(N, seed=5) if reduction == "none" else np.float32(1.7)


def check(results, calls):
    for (p, static), (value, gradients) in zip(calls, results, strict=True):
        known = {k: v for k, v in static.items() if k in ("mode", "beta", "reduction")}
        right, d = expected(p, cotangent(static["reduction"]), **known)
        with naming(*static.values(), *p):
            assert_close(value, right, scale=np.abs(right).max())
            for name, a in gradients.items():
                with naming(name):
                    assert a.dtype == p[name].dtype
                    scale = max(np.abs(d[name]).max(), 1e-3)
                    assert_close(a, d[name], scale=3 * scale if a.dtype == np.float32 else scale)


def calls_of(rule):
    """Calls with every option, both kinds of target, each mode and reduction, and bfloat16."""
    every = problem("bias", "logit_scale", "softcap", "where", "weights", "class_mask")
    some = problem("row_scale", "weights", target=("logit_scale",), seed=1)
    static = {"rule": rule, "chunk_size": 6}
    return [
        (every, static | {"mode": "forward", "reduction": "mean"}),
        (every, static | {"mode": "jensen_shannon", "beta": 0.2, "reduction": "none"}),
        (some, static | {"mode": "reverse", "reduction": "sum"}),
        (some, static | {"mode": "forward", "reduction": "none"}),
        (with_target_logits(some), static | {"mode": "jensen_shannon", "reduction": "mean"}),
        (with_target_logits(every), static | {"mode": "reverse", "reduction": "none"}),
        (problem(dtype="bfloat16"), static | {"mode": "reverse", "reduction": "mean"}),
    ]


def divergence(static):
    return lambda p: sxe.linear_kl_divergence(**p, **static)


def run_all(functions, calls):
    arguments = [(p, cotangent(static["reduction"])) for p, static in calls]
    return quick_jit(all_of(functions))(arguments)


@pytest.mark.parametrize("rule", RULES)
def test_values_and_gradients(rule):
    calls = calls_of(rule)
    check(run_all([with_gradients(divergence(static)) for _, static in calls], calls), calls)


@pytest.mark.slow
def test_a_device_that_skips_rows_that_do_not_count():
    """With one device, whole chunks run without a mask, and the remaining rows in parts."""
    run_fresh(
        "-c",
        """
import sys
sys.path.insert(0, "tests")
import test_linear_kl_divergence as t
from programs import quick_jit
import jax, numpy as np
assert jax.device_count() == 1
t.test_values_and_gradients("vjp")
p = t.problem("where", "weights")
p["hidden"][~p["where"]] = p["target_hidden"][~p["where"]] = np.nan
static = {"mode": "reverse", "reduction": "mean", "chunk_size": 4}
finite = p | {n: np.nan_to_num(p[n]) for n in ("hidden", "target_hidden")}
calls = [(p, static)]
results = t.run_all([t.with_gradients(t.divergence(static))], calls)
t.check(results, [(finite, static)])
        """.strip(),
    )


def spec(p, rows, classes):
    """The sharding of the arguments on a mesh with these axes for rows and classes."""
    layouts = dict.fromkeys(("bias", "target_bias", "class_mask"), P(classes))
    layouts |= dict.fromkeys(("hidden", "target_hidden", "where", "weights"), P(rows))
    layouts |= dict.fromkeys(("kernel", "target_kernel"), P(None, classes))
    layouts |= {"target_logits": P(rows, classes)}
    for name in ("logit_scale", "target_logit_scale"):
        layouts[name] = P(rows) if np.ndim(p.get(name)) else P()
    return {name: layouts.get(name, P()) for name in p}


# A test on a mesh takes half of the calls by default, and the next one the other half.
EVEN, ODD, ALL = slice(0, None, 2), slice(1, None, 2), slice(None)


@pytest.mark.parametrize(
    ("place", "check_vma", "some"),
    [
        ("outside", True, EVEN),
        ("inside", True, ODD),
        slow("outside", True, ALL),
        slow("outside", False, ALL),
        slow("inside", True, ALL),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_shard_map(rule, place, check_vma, some):
    """The gradient is outside, or inside, which needs the varying types of check_vma."""
    mesh, calls, functions = make_mesh(2, 4), calls_of(rule)[some], []
    for p, static in calls:
        static = static | {"axis_name": "model", "batch_axis_name": "data"}
        layout, out = spec(p, "data", "model"), P("data") if static["reduction"] == "none" else P()
        shard_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
        if place == "outside":
            f = shard_map(divergence(static), in_specs=(layout,), out_specs=out)
            functions.append(with_gradients(f))
        else:
            outs = out, {name: layout[name] for name in floats(p)}
            f = with_gradients(divergence(static))
            functions.append(shard_map(f, in_specs=(layout, out), out_specs=outs))
    check(run_all(functions, calls), calls)


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        (AxisType.Auto, ODD),
        (AxisType.Explicit, EVEN),
        slow(AxisType.Auto, ALL),
        slow(AxisType.Explicit, ALL),
    ],
)
def test_over_mesh(kind, some):
    """The rows of the kernels are sharded as well."""
    mesh = make_mesh(2, 4, kind=kind)
    calls = calls_of("vjp")[some]
    over = sxe.over_mesh(sxe.linear_kl_divergence, mesh, batch="data", classes="model", fsdp="data")
    functions = [with_gradients(lambda p, s=static: over(**p, **s)) for _, static in calls]
    with jax.set_mesh(mesh):
        check(run_all(functions, calls), calls)


@pytest.mark.parametrize("some", [EVEN, slow(ALL)])
def test_explicit_types(some):
    """The types say how the arguments are sharded, and ``over_mesh`` is not needed."""
    mesh, calls = make_mesh(2, 4, kind=AxisType.Explicit), calls_of("vjp")[some]
    placed = [
        {
            n: jax.device_put(a, NamedSharding(mesh, spec(p, "data", "model")[n]))
            for n, a in p.items()
        }
        for p, _ in calls
    ]
    functions = [with_gradients(divergence(static)) for _, static in calls]
    with jax.set_mesh(mesh):
        arguments = [
            (p, jax.device_put(g, NamedSharding(mesh, P("data") if np.ndim(g) else P())))
            for p, (_, static) in zip(placed, calls, strict=True)
            for g in [cotangent(static["reduction"])]
        ]
        check(quick_jit(all_of(functions))(arguments), calls)
        unsplit = placed[0] | {"target_kernel": jax.reshard(placed[0]["target_kernel"], P())}
        assert_close(sxe.linear_kl_divergence(**unsplit), expected(calls[0][0], 1.0)[0])
        other = placed[0] | {"target_hidden": jax.reshard(placed[0]["target_hidden"], P("model"))}
        other["target_kernel"] = unsplit["target_kernel"]
        with pytest.raises(ValueError, match=r"^target_kernel: .*sharded as hidden and kernel"):
            sxe.linear_kl_divergence(**other)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_devices_exchange_numbers_of_rows(reduction):
    """Also, once per call, the gradients of hidden states and kernel."""
    p = problem()
    mesh = make_mesh(2, 4)
    over = sxe.over_mesh(sxe.linear_kl_divergence, mesh, batch="data", classes="model")
    g = cotangent(reduction)
    layout = spec(p, "data", "model")
    p = {name: jax.device_put(a, NamedSharding(mesh, layout[name])) for name, a in p.items()}
    g = jax.device_put(g, NamedSharding(mesh, P("data") if reduction == "none" else P()))

    def f(p, g):
        static = {"reduction": reduction, "chunk_size": 2}
        by = {name: p[name] for name in ("hidden", "kernel")}
        return jax.vjp(lambda q: over(**(p | q), **static), by)[1](g)

    found = collectives(quick_jit(f).lower(p, g).compile().as_text())
    assert {c.opcode for c in found} == {"all-reduce"}
    assert {c.size for c in found if c.in_loop} <= {2}
    large = sorted(c.size for c in found if c.size > N // 2)
    assert large == sorted([N // 2 * D, D * K // 4])


def test_second_derivatives_and_vmap():
    p = problem("bias", "where", target=("bias",))
    x64 = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in p.items()}
    g = normal(N, seed=3).astype(np.float64)

    def by_logits(q):
        q = x64 | q
        x, z = (
            q[f"{of}hidden"] @ q[f"{of}kernel"] + q[f"{of}bias"][None] for of in ("", "target_")
        )
        return jnp.sum(g * sxe.kl_divergence(x, z, where=q["where"], reduction="none"))

    def by_head(q, reduction):
        call = functools.partial(sxe.linear_kl_divergence, chunk_size=5, reduction=reduction)
        if reduction == "sum":
            return call(**(x64 | q), weights=g)
        return jnp.sum(g * call(**(x64 | q)))

    def twice(f):
        return jax.grad(lambda q: sum(jnp.sum(a**2) for a in jax.tree.leaves(jax.grad(f)(q))))

    by = ("hidden", "kernel", "target_hidden", "target_kernel")
    with jax.enable_x64(True):
        q = {name: jnp.asarray(x64[name]) for name in by}
        right = quick_jit(twice(by_logits))(q)
        for reduction in ("none", "sum"):
            found = quick_jit(twice(functools.partial(by_head, reduction=reduction)))(q)
            for name in by:
                np.testing.assert_allclose(found[name], right[name], rtol=1e-9, atol=1e-12)
        pairs = np.stack([x64["hidden"], 2 * x64["hidden"]])
        each = quick_jit(jax.vmap(lambda h: by_head({"hidden": h}, "none")))(pairs)
        alone = [by_logits({"hidden": h}) for h in pairs]
        np.testing.assert_allclose(each, alone, rtol=1e-12)


@each_value(mode=MODES, distance=[1e-3, 1.0])
def test_digits_where_both_sides_nearly_agree(mode, distance):
    """With one hidden unit per row, the logits are exact."""
    z = normal(4, 16, seed=2)
    z[0, 3] += 30
    x = (z + distance * normal(4, 16, seed=7)).astype(np.float32)
    eye = np.eye(4, dtype=np.float32)

    def f(x, z):
        return sxe.linear_kl_divergence(eye, x, eye, z, mode=mode, chunk_size=2, reduction="none")

    value, pull = jax.vjp(jax.jit(f), x, z)
    d = pull(np.ones(4, np.float32))
    right = oracle.kl_divergence(logits=x, target_logits=z, mode=mode, reduction="none")
    gradients = oracle.kl_divergence_gradients(
        logits=x, target_logits=z, mode=mode, reduction="none"
    )
    # float64 has enough digits for all rows except the confident one.
    np.testing.assert_allclose(value[1:], right[1:], rtol=DIVERGENCE_BAR)
    for a, name in zip(d, ("logits", "target_logits"), strict=True):
        top = np.abs(gradients[name]).max(-1, keepdims=True)
        error = np.abs(np.asarray(a, np.float64) - gradients[name]) / top
        assert error[1:].max() <= DIVERGENCE_GRADIENT_BAR
    assert (f(z, z) == 0).all()


def test_a_side_that_is_not_differentiated_costs_its_logits():
    """It has one product, and the other side has three."""
    p = problem()

    def products(*by):
        def f(p):
            q = {name: p[name] for name in by}
            return jax.grad(lambda q: sxe.linear_kl_divergence(**(p | q), chunk_size=4))(q)

        text = jax.jit(f).lower(p).as_text()
        return len(re.findall(r"stablehlo\.dot_general", text))

    assert products("hidden", "kernel") == 4
    assert products("kernel") == 3
    assert products("hidden", "kernel", "target_hidden", "target_kernel") == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target_kernel": None}, TypeError, "got target_hidden; pass logits as target_logits="),
        ({"target_hidden": None, "target_kernel": None}, TypeError, "none of them$"),
        ({"target_logits": np.zeros((N, K))}, TypeError, "target_kernel and target_logits$"),
        ({"target_hidden": np.zeros((N, 5))}, ValueError, "^target_kernel: .*D = 5"),
        ({"target_hidden": np.zeros((N + 1, TARGET_D))}, ValueError, "^target_hidden: .*row axes"),
        ({"target_kernel": np.zeros((TARGET_D, 7))}, ValueError, "^target_kernel: .*K = 24"),
        ({"target_bias": np.zeros(7)}, ValueError, "^target_bias: .*one value per class"),
        ({"target_logit_scale": np.zeros(7)}, ValueError, "^target_logit_scale: .*per row"),
        ({"target_softcap": -1.0}, ValueError, "^target_softcap: .*above 0"),
        ({"mode": "backward"}, ValueError, "^mode: .*'forward'"),
        ({"beta": 1.0}, ValueError, "^beta: .*below 1"),
        ({"beta": 0.3}, ValueError, "^beta: expected no value with mode 'forward', got 0.3"),
        ({"where": np.ones((N, K), bool)}, ValueError, "^where: .*rows"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        sxe.linear_kl_divergence(**(problem() | change))


@one_in(2, reduction=["sum", "none"], mode=["forward", "reverse"], rule=ALL_RULES)
def test_an_infinite_divergence_of_weight_0(mode, reduction, rule):
    """One side has a class that the other side does not have. Neither side has a gradient there."""
    hidden, kernel = np.zeros((2, 2), np.float32), np.eye(2, dtype=np.float32)
    weights, bias = np.array([0, 0], np.float32), np.array([0, -np.inf], np.float32)
    biases = {"bias" if mode == "forward" else "target_bias": bias}

    def f(hidden, target_hidden):
        static = {"weights": weights, "mode": mode, "reduction": reduction, "chunk_size": 1}
        static["rule"] = rule
        arrays = hidden, kernel, target_hidden, kernel
        return jnp.sum(sxe.linear_kl_divergence(*arrays, **biases, **static))

    value, gradients = jax.value_and_grad(f, (0, 1))(hidden, hidden)
    assert value == 0
    for d in gradients:
        np.testing.assert_array_equal(d, 0)
