"""jax.vmap where an Explicit mesh splits its arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close
from test_head_sharding import EVERY, floats, problem, quick_jit
from test_sharding import RULES, make_mesh, naming

import sxe

B, N, D, K = 8, 4, 3, 8
HEAD, LOGITS = sxe.linear_softmax_cross_entropy, sxe.softmax_cross_entropy
BOTH = pytest.mark.parametrize("loss", [HEAD, LOGITS], ids=["head", "logits"])
slow = pytest.mark.slow
EXPLICIT = functools.partial(make_mesh, kind=AxisType.Explicit)

# What every example has its own of. All else the examples share.
OWN = ("hidden", "logits", "labels", "weights", "where")


def one(loss, *names, dense=False, seed=0):
    """The arrays of a call with N rows, by name."""
    p = problem(*names, dense=dense, seed=seed, shape=(N, D, K))
    if loss is LOGITS:
        del p["kernel"], p["hidden"]
        p = {n: a for n, a in p.items() if n not in ("bias", "logit_scale", "softcap")}
        p["logits"] = np.random.default_rng(seed).normal(size=(N, K)).astype(np.float32)
    return p


def examples(loss, *names, dense=False, own=OWN):
    """The arrays of B calls: [B, ...] of what each has its own of."""
    each = [one(loss, *names, dense=dense, seed=seed) for seed in range(B)]
    return {n: np.stack([p[n] for p in each]) if n in own else a for n, a in each[0].items()}


def example(p, i, own=OWN):
    return {name: a[i] if name in own else a for name, a in p.items()}


def call(loss, static, p):
    return loss(**p, **({"chunk_size": 3} if loss is HEAD else {}), **static)


def expected(loss, p, static, g, own=OWN):
    """The losses of all calls, and the gradients of their sum weighted by g [B] or [B, N]."""
    values, total = [], {}
    for i in range(len(g)):
        q, static = example(p, i, own), {k: v for k, v in static.items() if k != "rule"}
        if loss is HEAD:
            values.append(oracle.head_loss(**q, **static))
            gradients = oracle.head_gradients(**q, **static, g=g[i])
        else:
            values.append(oracle.loss(**q, **static))
            gradients = {"logits": oracle.gradient(**q, **static, g=g[i])}
        for name, d in gradients.items():
            total.setdefault(name, []).append(d)
    total = {n: np.stack(ds) if n in own else sum(ds) for n, ds in total.items() if n in p}
    return np.stack(values), total


def cotangents(static):
    shape = (B, N) if static.get("reduction") == "none" else (B,)
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def both_ways(loss, static, axes, **options):
    """p, g to the losses, the gradients of a vmap, and the gradients and losses of each example."""

    def run(p, g):
        def total(q):
            values = jax.vmap(functools.partial(call, loss, static), (axes,), **options)(p | q)
            return jnp.sum(g * values), values

        def each(p, g):
            def value(q):
                loss_ = call(loss, static, p | q)
                return jnp.sum(g * loss_), loss_

            return jax.grad(value, has_aux=True)(floats(p))

        gradients, values = jax.grad(total, has_aux=True)(floats(p))
        return values, gradients, *jax.vmap(each, (axes, 0), **options)(p, g)

    return run


def split(p, mesh, batch, rows, classes, own=OWN):
    """p on the mesh, whose axes split examples, rows and classes so."""
    specs = {
        "hidden": (rows, None),
        "logits": (rows, classes),
        "labels": (rows, classes) if p["labels"].ndim == 3 else (rows,),
        "kernel": (None, classes),
        **dict.fromkeys(("bias", "class_weights"), (classes,)),
        **dict.fromkeys(("weights", "where"), (rows,)),
    }

    def place(name, a):
        spec = specs.get(name, ())
        return jax.device_put(a, NamedSharding(mesh, P(batch, *spec) if name in own else P(*spec)))

    return {name: place(name, a) for name, a in p.items()}


def check(loss, p, static, mesh, layout, *, jit=quick_jit, own=OWN, **options):
    """That vmap on this mesh, with this layout, gives what the oracle gives for each example."""
    g = cotangents(static)
    axes = {name: 0 if name in own else None for name in p}
    with naming(*layout, *static.values(), *p), jax.set_mesh(mesh):
        run = jit(both_ways(loss, static, axes, **options))
        placed = jax.device_put(g, NamedSharding(mesh, P(layout[0])))
        values, gradients, of_each, again = run(split(p, mesh, *layout, own), placed)
    right_values, right = expected(loss, p, static, g, own)
    assert_close(values, right_values)
    assert_close(again, right_values)
    for name, d in right.items():
        with naming(name, *layout, *static.values(), *p):
            scale = max(1, np.abs(d).max())
            assert_close(gradients[name], d, scale=scale)
            each = np.asarray(of_each[name])
            assert_close(each if name in own else each.sum(0), d, dtype="float32", scale=scale)


LAYOUTS = [
    ((1,), ("data", None, None)),
    ((1,), (None, None, None)),
    ((8,), ("data", None, None)),
    ((2, 4), ("data", None, "model")),
    ((2, 4), ("model", "data", None)),
    ((2, 4), (("data", "model"), None, None)),
    ((2, 4), ("data", None, None)),
    ((2, 4), (None, "data", "model")),
    ((2, 4), (None, None, "data")),
    ((2, 4), (None, None, None)),
]


def mesh_of(shape):
    return EXPLICIT(*shape, names=("data", "model")[: len(shape)])


@BOTH
@pytest.mark.parametrize(("shape", "layout"), [LAYOUTS[0], LAYOUTS[3]], ids=str)
def test_examples_that_a_mesh_splits(loss, shape, layout):
    """On one device, and with classes split as well."""
    check(loss, examples(loss, *EVERY), {"ignore_index": 1}, mesh_of(shape), layout)


@slow
@BOTH
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_layout(loss, shape, layout, rule):
    mesh = mesh_of(shape)
    for names, dense, reduction in [
        (EVERY, False, "mean"),
        (EVERY, True, "none"),
        ((), False, "none"),
        ((), True, "sum"),
    ]:
        static = {"rule": rule, "reduction": reduction}
        check(loss, examples(loss, *names, dense=dense), static, mesh, layout)


@slow
@BOTH
@pytest.mark.parametrize(("shape", "layout"), [LAYOUTS[0], LAYOUTS[3]], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_eager_calls(loss, shape, layout, rule):
    def eager(f):
        return f

    p = examples(loss, "class_weights", "weights")
    check(loss, p, {"rule": rule}, mesh_of(shape), layout, jit=eager)


@slow
@BOTH
@pytest.mark.parametrize(("shape", "layout"), [LAYOUTS[0], LAYOUTS[2]], ids=str)
def test_spmd_axis_name(loss, shape, layout):
    """Of the axis that splits the examples. Where none does, the loss does not need it."""
    p = examples(loss, *EVERY)
    check(loss, p, {}, mesh_of(shape), layout, spmd_axis_name="data")
    check(loss, p, {}, mesh_of(shape), (None, None, None), spmd_axis_name="data")


@slow
@pytest.mark.parametrize(("shape", "layout"), [LAYOUTS[0], LAYOUTS[3], LAYOUTS[7]], ids=str)
def test_a_kernel_for_each_example(shape, layout):
    own = (*OWN, "kernel", "bias")
    check(HEAD, examples(HEAD, *EVERY, own=own), {}, mesh_of(shape), layout, own=own)


@slow
@BOTH
@pytest.mark.parametrize(("shape", "layout"), [LAYOUTS[0], LAYOUTS[3]], ids=str)
def test_examples_along_another_axis(loss, shape, layout):
    mesh, p, name = mesh_of(shape), examples(loss), "hidden" if loss is HEAD else "logits"
    with jax.set_mesh(mesh):
        q = split(p, mesh, *layout)
        spec = list(jax.typeof(q[name]).sharding.spec)
        x = np.moveaxis(p[name], 0, 1)
        x = jax.device_put(x, NamedSharding(mesh, P(spec[1], spec[0], spec[2])))
        rest = {n: a for n, a in q.items() if n not in (name, "labels")}
        f = jax.vmap(lambda x, y: call(loss, {}, rest | {name: x, "labels": y}), (1, 0))
        values, pull = jax.vjp(lambda x: quick_jit(f)(x, q["labels"]), x)
        (d,) = pull(jax.device_put(cotangents({}), NamedSharding(mesh, P(layout[0]))))
    right_values, right = expected(loss, p, {}, cotangents({}))
    assert_close(values, right_values)
    assert_close(np.moveaxis(np.asarray(d), 1, 0), right[name])


@slow
@pytest.mark.parametrize(("shape", "layout"), [LAYOUTS[0], LAYOUTS[3], LAYOUTS[4]], ids=str)
def test_value_with_gradient_and_metrics(shape, layout):
    p, mesh = examples(LOGITS, *EVERY), mesh_of(shape)
    axes = {name: 0 if name in OWN else None for name in p}

    def both(p):
        return sxe.softmax_cross_entropy_with_gradient(**p, return_metrics=True)

    with jax.set_mesh(mesh):
        found = quick_jit(jax.vmap(both, (axes,)))(split(p, mesh, *layout))
        lone = quick_jit(jax.vmap(lambda p: call(HEAD, {"return_metrics": True}, p)))
        q = examples(HEAD, own=(*OWN, "kernel"))
        _, of_head = lone(split(q, mesh, *layout, own=(*OWN, "kernel")))
    (values, metrics), gradient = found
    right_values, right = expected(LOGITS, p, {}, np.ones(B))
    assert_close(values, right_values)
    assert_close(gradient, right["logits"])
    np.testing.assert_array_equal(metrics.predictions, p["logits"].argmax(-1))
    x = np.einsum("bnd,bdk->bnk", *(q[name].astype(np.float64) for name in ("hidden", "kernel")))
    np.testing.assert_array_equal(of_head.predictions, x.argmax(-1))
    assert_close(of_head.lse, np.logaddexp.reduce(x, axis=-1))


def test_what_a_vmap_cannot_have():
    mesh = EXPLICIT(2, 4)
    p = examples(HEAD)
    with jax.set_mesh(mesh):
        q = split(p, mesh, "data", None, None)
        kernel = jax.reshard(q["kernel"], P(None, "data"))
        over = sxe.over_mesh(HEAD, mesh, batch="data")
        message = r"^kernel: .* than \['data'\], .*jax.vmap maps.*; use jax.reshard.*P\(None, None"
        with pytest.raises(ValueError, match=message):
            jax.vmap(lambda h, y: HEAD(h, kernel, y))(q["hidden"], q["labels"])
        labels = jax.reshard(p["labels"][0], P("data"))
        with pytest.raises(ValueError, match=r"^labels: .* than \['data'\], .*jax.reshard"):
            jax.vmap(lambda h: HEAD(h, p["kernel"], labels))(q["hidden"])
        with pytest.raises(ValueError, match=r"^batch, classes: .* than \['data'\], .*jax.vmap"):
            jax.vmap(lambda h, y: over(h, q["kernel"], y))(q["hidden"], q["labels"])
        whole = split(p, mesh, None, None, "model")
        with pytest.raises(ValueError, match=r"^spmd_axis_name: .*\['data'\].*jax.reshard"):
            jax.vmap(lambda h, y: HEAD(h, whole["kernel"], y), spmd_axis_name="data")(
                whole["hidden"], whole["labels"]
            )
