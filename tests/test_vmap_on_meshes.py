"""jax.vmap if an Explicit mesh shards its arrays, and if its examples are shards of the classes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from option_cases import EVERY_OF_HEAD, EVERY_OF_LOGITS, each_value, every_rule, vjp_by_default
from oracle import assert_close, naming
from problems import at, floats, head_problem, logits_problem
from programs import quick_jit

import sxe

B, N, D, K = 8, 4, 3, 8
HEAD, LOGITS = sxe.linear_softmax_cross_entropy, sxe.softmax_cross_entropy
LOSSES = {"head": HEAD, "logits": LOGITS}
BOTH = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
slow = pytest.mark.slow
needs_jax_0_10_1 = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 1), reason="JAX 0.10.0 itself fails in these programs"
)
EXPLICIT = functools.partial(make_mesh, kind=AxisType.Explicit)

# Each example has its own of these arrays. The examples share all others.
OWN = ("hidden", "logits", "labels", "weights", "where")


EVERY = {HEAD: EVERY_OF_HEAD, LOGITS: EVERY_OF_LOGITS}


def one(loss, *options, dense=False, seed=0):
    """The arrays of a call with N rows, by name."""
    if loss is HEAD:
        return head_problem(*options, dense=dense, seed=seed, shape=(N, D, K))
    return logits_problem(*options, dense=dense, seed=seed, shape=(N, K))


def examples(loss, *names, dense=False, own=OWN):
    """The arrays of B calls, by name: [B, ...] if each call has its own."""
    each = [one(loss, *names, dense=dense, seed=seed) for seed in range(B)]
    return {n: np.stack([p[n] for p in each]) if n in own else a for n, a in each[0].items()}


def example(p, i, own=OWN):
    return {name: a[i] if name in own else a for name, a in p.items()}


def call(loss, static, p):
    return loss(**p, **({"chunk_size": 3} if loss is HEAD else {}), **static)


def expected(loss, p, static, g, own=OWN):
    """The losses of all calls, and the gradients of their sum weighted by g [B] or [B, N]."""
    values, total = [], {}
    static = {name: value for name, value in static.items() if name != "rule"}
    for i in range(len(g)):
        q = example(p, i, own)
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
    """p, g to losses and gradients of a vmap, and to gradients and losses of each example."""

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
    """p on the mesh, with these mesh axes for examples, rows and classes."""
    specs = {
        "hidden": (rows, None),
        "logits": (rows, classes),
        "labels": (rows, classes) if p["labels"].ndim == 3 else (rows,),
        "kernel": (None, classes),
        **dict.fromkeys(("bias", "class_weights", "class_mask"), (classes,)),
        **dict.fromkeys(("weights", "where"), (rows,)),
    }

    def place(name, a):
        spec = specs.get(name, ())
        return jax.device_put(a, NamedSharding(mesh, P(batch, *spec) if name in own else P(*spec)))

    return {name: place(name, a) for name, a in p.items()}


def check(loss, p, static, mesh, layout, *, jit=quick_jit, own=OWN, **options):
    """Check that vmap on this mesh and layout gives the oracle's results for each example."""
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


@needs_jax_0_10_1
@each_value(loss=LOSSES, on=[LAYOUTS[0], LAYOUTS[3]])
def test_examples_that_a_mesh_splits(loss, on):
    """The mesh has one device, or also shards the classes."""
    shape, layout = on
    check(loss, examples(loss, *EVERY[loss]), {"ignore_index": 1}, mesh_of(shape), layout)


@slow
@BOTH
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=str)
@every_rule
def test_every_layout(loss, shape, layout, rule):
    mesh = mesh_of(shape)
    for names, dense, reduction in [
        (EVERY[loss], False, "mean"),
        (EVERY[loss], True, "none"),
        ((), False, "none"),
        ((), True, "sum"),
    ]:
        static = {"rule": rule, "reduction": reduction}
        check(loss, examples(loss, *names, dense=dense), static, mesh, layout)


@slow
@BOTH
@pytest.mark.parametrize(("shape", "layout"), [LAYOUTS[0], LAYOUTS[3]], ids=str)
@every_rule
def test_eager_calls(loss, shape, layout, rule):
    def eager(f):
        return f

    p = examples(loss, "class_weights", "weights")
    check(loss, p, {"rule": rule}, mesh_of(shape), layout, jit=eager)


@slow
@BOTH
@pytest.mark.parametrize(("shape", "layout"), [LAYOUTS[0], LAYOUTS[2]], ids=str)
def test_spmd_axis_name(loss, shape, layout):
    """It names the axis over which the examples are sharded, or another axis."""
    p = examples(loss, *EVERY[loss])
    check(loss, p, {}, mesh_of(shape), layout, spmd_axis_name="data")
    check(loss, p, {}, mesh_of(shape), (None, None, None), spmd_axis_name="data")


@slow
@pytest.mark.parametrize(("shape", "layout"), [LAYOUTS[0], LAYOUTS[3], LAYOUTS[7]], ids=str)
def test_a_kernel_for_each_example(shape, layout):
    own = (*OWN, "kernel", "bias")
    check(HEAD, examples(HEAD, *EVERY_OF_HEAD, own=own), {}, mesh_of(shape), layout, own=own)


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
        values, pull = jax.vjp(lambda x: jax.jit(f)(x, q["labels"]), x)
        (d,) = pull(jax.device_put(cotangents({}), NamedSharding(mesh, P(layout[0]))))
    right_values, right = expected(loss, p, {}, cotangents({}))
    assert_close(values, right_values)
    assert_close(np.moveaxis(np.asarray(d), 1, 0), right[name])


@slow
@pytest.mark.parametrize(("shape", "layout"), [LAYOUTS[0], LAYOUTS[3], LAYOUTS[4]], ids=str)
def test_value_with_gradient_and_metrics(shape, layout):
    p, mesh = examples(LOGITS, *EVERY_OF_LOGITS), mesh_of(shape)
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
    metrics = jax.tree.map(np.asarray, metrics)
    x = np.where(p["class_mask"], p["logits"], -np.inf)
    for i in range(B):
        one = example(p, i)
        *_, counts, _, _ = oracle.rows(**{n: a for n, a in one.items() if n != "z_loss"})
        oracle.check_rows_metrics(at(metrics, i), x[i], counts, one["labels"])
    x = np.einsum("bnd,bdk->bnk", *(q[name].astype(np.float64) for name in ("hidden", "kernel")))
    oracle.check_rows_metrics(of_head, x, np.ones((B, N), bool), q["labels"])


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


# The examples of a named vmap are shards of the classes, or of the rows

SHARDS = 4
ROWS = ("hidden", "labels", "weights", "where")
CLASSES = ("kernel", "bias", "class_weights", "class_mask")


def shards(p, option):
    """The arrays of a call as shards, and the axis of each array that a vmap maps."""
    cut, axes = {}, {}
    for name, a in p.items():
        axis = 0 if option == "batch_axis_name" else -1
        names = ("logits", *(ROWS if axis == 0 else CLASSES))
        mapped = name in names or (name == "labels" and a.ndim == 2)
        cut[name] = np.stack(np.split(a, SHARDS, axis)) if mapped else a
        axes[name] = 0 if mapped else None
    return cut, axes


def check_named_vmap(loss, p, static, option="axis_name", jit=quick_jit):
    """Values, and gradients for cotangents that are equal on all shards, on one only, or random."""
    cut, axes = shards(p, option)
    f = jax.vmap(functools.partial(call, loss, static | {option: "m"}), (axes,), axis_name="m")
    g = cotangents(static)[0]

    def run(c):
        def total(q):
            values = f(cut | q)
            return jnp.sum(g * jnp.tensordot(c, values, 1)), values

        return jax.grad(total, has_aux=True)(floats(cut))

    run = jit(run)
    one_hot, uneven = np.eye(SHARDS)[2], np.random.default_rng(3).normal(size=SHARDS)
    for c in (np.ones(SHARDS), one_hot, uneven):
        gradients, values = run(c.astype(np.float32))
        q = {name: a[None] for name, a in p.items()}
        right_values, right = expected(loss, q, static, g[None] * c.sum(), own=tuple(q))
        for value in np.asarray(values):
            assert_close(value, right_values[0])
        for name, d in right.items():
            found = gradients[name]
            if axes[name] is not None:
                found = np.concatenate(found, 0 if option == "batch_axis_name" else -1)
            with naming(name, c, *static.values(), *p):
                assert_close(np.asarray(found), d[0], scale=max(1, np.abs(d).max()))


@BOTH
def test_shards_of_a_named_vmap(loss):
    check_named_vmap(loss, one(loss, *EVERY[loss]), {})
    check_named_vmap(loss, one(loss, dense=True), {"reduction": "none"})


@slow
@BOTH
@every_rule
@pytest.mark.parametrize("jit", [quick_jit, lambda f: f], ids=["jit", "eager"])
def test_every_way_with_shards_of_a_named_vmap(loss, rule, jit):
    for dense, reduction in [(False, "none"), (True, "mean"), (True, "none"), (False, "sum")]:
        static = {"rule": rule, "reduction": reduction}
        check_named_vmap(loss, one(loss, *EVERY[loss], dense=dense), static, jit=jit)
        if reduction != "none":
            check_named_vmap(loss, one(loss, *EVERY[loss]), static, "batch_axis_name", jit)


@BOTH
def test_rows_of_a_named_vmap(loss):
    check_named_vmap(loss, one(loss, "weights", "where"), {}, "batch_axis_name")


def test_shards_of_two_named_vmaps():
    """The classes are not the last axis, and some are masked."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 8, 2)).astype(np.float32), rng.integers(8, size=(3, 2))
    where = rng.random(x.shape) < 0.8
    where[np.arange(3)[:, None], y, np.arange(2)] = True
    options = {"axis": 1, "class_weights": rng.random(8).astype(np.float32)}

    def cut(a, axis):
        return np.stack(np.split(np.stack(np.split(a, 4, axis)), 2))  # the outer axis comes first

    def f(x, where, c):
        names = {"axis": 1, "axis_name": ("outer", "inner")}
        return LOGITS(x, y, where=where, class_weights=c, **names)

    for name in ("inner", "outer"):
        f = jax.vmap(f, axis_name=name)
    arguments = cut(x, 1), cut(where, 1), cut(options["class_weights"], 0)
    value, d = quick_jit(jax.value_and_grad(lambda *a: f(*a)[1, 0]))(*arguments)
    assert_close(value, oracle.loss(x, y, where=where, **options))
    right = oracle.gradient(x, y, where=where, **options)
    assert_close(np.concatenate(np.asarray(d).reshape(4, 3, 2, 2), 1), right)


@pytest.mark.parametrize("spec", [None, P("data"), P()], ids=["no mesh", "split", "whole"])
def test_value_with_gradient_of_shards_of_a_named_vmap(spec):
    """Each example gets the gradient of its classes, also if an Explicit mesh shards them."""
    p = one(LOGITS, "class_weights", "label_smoothing")
    cut, axes = shards(p, "axis_name")

    def of_a_shard(q):
        return sxe.softmax_cross_entropy_with_gradient(**q, axis_name="m")

    f = jax.vmap(of_a_shard, (axes,), axis_name="m")
    value, gradient = oracle.loss(**p), oracle.gradient(**p)
    mesh = EXPLICIT(SHARDS if spec else 1, names=("data",))
    with contextlib.ExitStack() as stack:
        if spec is not None:
            stack.enter_context(jax.set_mesh(mesh))
            where = {n: P() if axes[n] is None else spec for n in cut}
            cut = {n: jax.device_put(a, NamedSharding(mesh, where[n])) for n, a in cut.items()}
        for g in (f, quick_jit(f)):
            values, parts = g(cut)
            assert_close(values, np.full(SHARDS, value))
            assert_close(np.concatenate(np.asarray(parts), -1), gradient)


def test_a_vmap_around_other_axes():
    """A vmap may have a name while the loss has an axis of shard_map, or none."""
    mesh = make_mesh(4, names=("model",))
    p = examples(LOGITS)
    call_ = {
        "inside": jax.shard_map(
            lambda x, y: LOGITS(x, y, axis_name="model"),
            mesh=mesh,
            in_specs=(P(None, "model"), P()),
            out_specs=P(),
        ),
        "without": LOGITS,
    }
    right_values, right = expected(LOGITS, p, {}, np.ones(B))
    for name, loss in call_.items():
        with naming(name):
            f = jax.vmap(jax.value_and_grad(loss), axis_name="m")
            values, gradient = quick_jit(f)(p["logits"], p["labels"])
            assert_close(values, right_values)
            assert_close(gradient, right["logits"])


@vjp_by_default
def test_a_gradient_inside_is_that_of_the_sum_of_shards(rule):
    """Under pmap, vmap, and shard_map without varying types, as for lax.psum."""
    p = one(LOGITS)
    x = np.stack(np.split(p["logits"], SHARDS, -1))
    gradient = jax.grad(lambda x: LOGITS(x, p["labels"], axis_name="m", rule=rule))
    mesh = make_mesh(SHARDS, names=("m",))
    every = jax.shard_map(
        lambda x: gradient(x[0])[None],
        mesh=mesh,
        in_specs=P("m"),
        out_specs=P("m"),
        check_vma=False,
    )
    ways = [quick_jit(every), quick_jit(jax.vmap(gradient, axis_name="m"))]
    ways.append(jax.pmap(gradient, axis_name="m"))
    right = oracle.gradient(p["logits"], p["labels"])
    of_psum = jax.vmap(jax.grad(lambda x: jax.lax.psum(x, "m")), axis_name="m")
    np.testing.assert_array_equal(of_psum(np.ones(SHARDS)), SHARDS)
    for way in ways:
        assert_close(np.concatenate(np.asarray(way(x)), -1), SHARDS * right)


def test_axes_of_a_vmap_in_shard_map():
    """JAX has no sums over these axes if shard_map tracks varying types."""
    p = one(LOGITS)
    mesh = make_mesh(2, names=("d",))
    x = np.stack(np.split(p["logits"], SHARDS, -1))

    def f(x, **options):
        return jax.vmap(lambda x: LOGITS(x, p["labels"], **options), axis_name="m")(x)[None]

    def run(check_vma=True, **options):
        local = functools.partial(f, **options)
        spec = {"in_specs": P(), "out_specs": P("d"), "check_vma": check_vma}
        return quick_jit(jax.shard_map(local, mesh=mesh, **spec))(x)

    for value in np.ravel(run(check_vma=False, axis_name="m")):
        assert_close(value, oracle.loss(p["logits"], p["labels"]))
    for name in ("axis_name", "batch_axis_name"):
        with pytest.raises(ValueError, match=rf"^{name}: .*'m' of a jax.vmap.*check_vma=False"):
            run(**{name: "m"})
    with pytest.raises(ValueError, match=r"^axis_name: .*only, got \('d', 'm'\).*one kind"):
        run(check_vma=False, axis_name=("d", "m"))


def test_rows_of_a_named_vmap_on_an_explicit_mesh():
    """If a mesh shards the hidden states or the kernel, the caller has to sum the rows."""
    p, mesh = one(HEAD, "weights"), EXPLICIT(2, 4)
    cut, axes = shards(p, "batch_axis_name")

    def run(**kinds):
        f = jax.vmap(lambda p: HEAD(**p, batch_axis_name="m"), (axes,), axis_name="m")
        with jax.set_mesh(mesh):
            q = {
                n: jax.device_put(a, NamedSharding(mesh, P(*kinds.get(n, ()))))
                for n, a in cut.items()
            }
            return quick_jit(f)(q)

    for value in np.asarray(run()):
        assert_close(value, oracle.head_loss(**p))
    with pytest.raises(ValueError, match=r"^batch_axis_name: .*'m' .*return_metrics"):
        run(kernel=(None, "model"))


@needs_jax_0_10_1
def test_types_of_a_mesh_inside_shard_map_over_another_axis():
    """The shard along axis_name is itself sharded over the other axes that its types name."""
    mesh, p = EXPLICIT(2, 4), one(HEAD, "bias", "class_weights")
    specs = {"hidden": P("data"), "labels": P("data"), "kernel": P(None, "model")}
    specs = {name: specs.get(name, P("model")) for name in p}
    with jax.set_mesh(mesh):
        q = {name: jax.device_put(a, NamedSharding(mesh, specs[name])) for name, a in p.items()}
        local = {n: P(*(a if a == "model" else None for a in s)) for n, s in specs.items()}
        f = jax.shard_map(
            lambda q: HEAD(**q, axis_name="model", reduction="sum"),
            mesh=mesh,
            in_specs=(local,),
            out_specs=P(),
            axis_names={"model"},
        )
        assert_close(quick_jit(f)(q), oracle.head_loss(**p, reduction="sum"))


@each_value(loss=LOSSES, devices=[1, 8])
def test_labels_alone_are_mapped(loss, devices):
    """Several targets for the same logits. No example has its own logits."""
    p, mesh = examples(loss, own=("labels",)), EXPLICIT(devices, names=("data",))
    p["labels"] = np.stack([np.roll(p["labels"][0], i) for i in range(B)])
    g = cotangents({})
    values, gradients = expected(loss, p, {}, g, own=("labels",))

    def run(p, g):
        def total(q):
            shared = {n: a for n, a in (p | q).items() if n != "labels"}
            each = jax.vmap(lambda y: call(loss, {}, shared | {"labels": y}))(p["labels"])
            return jnp.sum(g * each), each

        return jax.grad(total, has_aux=True)(floats(p))

    with jax.set_mesh(mesh):
        for f in (run, quick_jit(run)):
            d, each = f(split(p, mesh, "data", None, None, own=("labels",)), g)
            assert_close(each, values)
            for name, exact in gradients.items():
                assert_close(d[name], exact)
