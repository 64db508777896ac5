"""Log-probability, entropy and divergences on a mesh: shard_map, over_mesh, and global arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from distributions import FUNCTIONS, MODES, every_function, of_logits
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, use_mesh
from option_cases import each_value, slow, vjp_by_default
from oracle import assert_close, naming
from problems import divergence_problem, floats, normal, with_gradients
from programs import all_of, quick_jit
from tolerances import DIVERGENCE_BAR, ENTROPY_BAR, LOG_PROB_BAR

import sxe

N, D, K = 8, 3, 16  # every mesh of eight devices divides N and K
SIZES = {"rows": (N,), "width": D, "classes": K}
INF, NAN = np.inf, np.nan


def specs(p, rows, classes):
    """The specs of the arguments, with rows and classes sharded over these mesh axes."""
    of = {
        **dict.fromkeys(("logits", "target_logits"), P(rows, classes)),
        "hidden": P(rows),
        "kernel": P(None, classes),
        **dict.fromkeys(("bias", "class_mask"), P(classes)),
    }
    of_rows = ("labels", "where", "weights", "logit_scale", "target_logit_scale")
    of |= {name: P(rows) for name in of_rows if np.ndim(p.get(name)) == 1}
    if np.ndim(p.get("where")) == 2:
        of["where"] = P(rows, classes)
    return {name: of.get(name, P()) for name in p}


def outside(f, p, mesh, rows, classes, rule="vjp", **options):
    """The gradient of a function wrapped in shard_map."""
    call = f(rule=rule, axis_name=classes)
    out = P(rows) if f.is_divergence else sxe.LogProbAndEntropy(P(rows), P(rows))
    shards = jax.shard_map(
        call, mesh=mesh, in_specs=(specs(p, rows, classes),), out_specs=out, **options
    )
    return with_gradients(shards)


def inside(f, p, mesh, rows, classes, rule="vjp"):
    """The gradient, computed inside of shard_map."""
    layout = specs(p, rows, classes)
    out = P(rows) if f.is_divergence else sxe.LogProbAndEntropy(P(rows), P(rows))
    return jax.shard_map(
        with_gradients(f(rule=rule, axis_name=classes)),
        mesh=mesh,
        in_specs=(layout, out),
        out_specs=(out, {name: layout[name] for name in floats(p)}),
    )


def unchecked(*arguments):
    return outside(*arguments, check_vma=False)


def over(f, p, mesh, rows, classes, rule="vjp"):
    """The gradient of a function wrapped in over_mesh."""
    of_mesh = sxe.over_mesh(f.function, mesh, batch=rows, classes=classes)
    return with_gradients(lambda p: of_mesh(**p, **f.static, rule=rule))


TRANSFORMS = (outside, inside, unchecked, over)


def placed(mesh, rows, classes):
    """A function that puts the arguments and cotangents of a call on the mesh."""

    def put(a, spec):
        return jax.device_put(a, NamedSharding(mesh, spec))

    def place(p, g):
        of = specs(p, rows, classes)
        placed_g = jax.tree.map(lambda a: put(a, P(rows)), g)
        return {name: put(a, of[name]) for name, a in p.items()}, placed_g

    return place


def check_all(functions, fs, place=lambda *arguments: arguments):
    """Runs all of these functions in one program, and checks their results."""
    arguments = [(p, f.cotangent(p)) for f, p in fs]
    results = quick_jit(all_of(functions))([place(*each) for each in arguments])
    for (f, _), (p, g), result in zip(fs, arguments, results, strict=True):
        with naming(f.function.__name__, *f.static.values()):
            f.assert_matches(result, p, g)
    return results


@each_value(f=FUNCTIONS, transform={t.__name__: t for t in TRANSFORMS})
@vjp_by_default
def test_every_option(f, rule, transform):
    """The gradient outside of shard_map (check_vma on and off), inside of it, and of over_mesh."""
    p = f.problem(**SIZES)
    check_all([transform(f, p, make_mesh(2, 4), "data", "model", rule)], [(f, p)])


@vjp_by_default
@of_logits
def test_masks_of_classes(f, rule):
    p = f.problem("where_class", **SIZES)
    calls = [(f, p)] * 2
    mesh = make_mesh(2, 4), "data", "model", rule
    check_all([outside(f, p, *mesh), over(f, p, *mesh)], calls)


@each_value(
    shape=[(1, 8), (8, 1), (4, 2)], kind={"auto": AxisType.Auto, "explicit": AxisType.Explicit}
)
def test_every_mesh(shape, kind):
    fs = [(f, f.problem(**SIZES)) for f in FUNCTIONS.values()]
    mesh = make_mesh(*shape, kind=kind)
    check_all([over(f, p, mesh, "data", "model") for f, p in fs], fs)


@pytest.mark.parametrize(
    ("rows", "classes"),
    [
        slow("a", None),
        (("a", "c"), None),
        slow(None, ("b", "a")),
        slow(None, "a"),
        (("c", "b"), "a"),
    ],
)
def test_one_axis_or_several(rows, classes):
    mesh = make_mesh(2, 2, 2, names=("a", "b", "c"))
    fs = [(f, f.problem(**SIZES)) for f in FUNCTIONS.values()]
    transforms = (inside, over, unchecked, outside, inside)
    check_all([t(f, p, mesh, rows, classes) for t, (f, p) in zip(transforms, fs, strict=True)], fs)


@each_value(layout=[("data", "model"), (None, "model"), ("data", None)], kind=["explicit", "auto"])
def test_global_arrays(kind, layout):
    """JAX shards global arrays on Auto and Explicit meshes.

    On an Explicit mesh, gradients are sharded as their arguments are.
    """
    mesh, context = use_mesh(kind)
    fs = [(f, f.problem(**SIZES)) for f in FUNCTIONS.values()]
    with context:
        results = check_all([with_gradients(f()) for f, _ in fs], fs, placed(mesh, *layout))
    if kind == "explicit":
        for (_, p), (value, gradients) in zip(fs, results, strict=True):
            for a in jax.tree.leaves(value):
                assert jax.typeof(a).sharding.spec == P(layout[0])
            for name, d in gradients.items():
                expected = NamedSharding(mesh, specs(p, *layout)[name])
                assert d.sharding.is_equivalent_to(expected, d.ndim), name


@each_value(mode=MODES, way=["shard_map", "over_mesh", "explicit"])
def test_sums_and_means_over_all_rows(mode, way):
    """All weights of one shard are 0, and some shards have no row that counts."""
    p = divergence_problem(shape=(N, K))
    weights = np.array([0, 0, 1, -3, 2, 0.5, 0, 1], np.float32)
    static = {"mode": mode} | ({"beta": 0.3} if mode == "jensen_shannon" else {})
    mesh = make_mesh(4, 2, kind=AxisType.Explicit if way == "explicit" else AxisType.Auto)

    def call(p, reduction):
        options = static | {"reduction": reduction}
        if way == "over_mesh":
            return sxe.over_mesh(sxe.kl_divergence, mesh, batch="data", classes="model")(
                **p, **options
            )
        if way == "explicit":
            return sxe.kl_divergence(**p, **options)
        options |= {"axis_name": "model", "batch_axis_name": "data"}
        layout = specs(p, "data", "model")
        one = functools.partial(sxe.kl_divergence, **options)
        return jax.shard_map(lambda p: one(**p), mesh=mesh, in_specs=(layout,), out_specs=P())(p)

    reductions = ("mean", "sum")
    run = quick_jit(
        all_of([with_gradients(functools.partial(call, reduction=r)) for r in reductions])
    )
    for where in (np.arange(N) != 3, np.arange(N) == 5, np.zeros(N, bool)):
        q = p | {"where": where, "weights": weights}
        given = q
        if way == "explicit":
            given, _ = placed(mesh, "data", "model")(q, ())
        with jax.set_mesh(mesh):
            results = run([(given, np.float32(0.7))] * 2)
        for reduction, (value, gradients) in zip(reductions, results, strict=True):
            options = static | {"reduction": reduction}
            assert_close(value, oracle.kl_divergence(**q, **options))
            right = oracle.kl_divergence_gradients(np.float32(0.7), **q, **options)
            for name in ("logits", "target_logits"):
                assert_close(gradients[name], right[name])
            if where.any():
                least = np.abs(right["weights"]).max()
                assert_close(gradients["weights"], right["weights"], scale=max(1, least))


@vjp_by_default
@of_logits
def test_edges_over_shards(f, rule):
    """Shards with only -inf, labels outside of all shards, and rows without a distribution."""
    p = {name: np.array(a) for name, a in f.plain(**SIZES).items()}
    sides = [name for name in ("logits", "target_logits") if name in p]
    for name in sides:
        p[name][0, 4:8] = -INF
        p[name][1, :12] = -INF
        p[name][1, 13] = 30
    p[sides[-1]][2, 9] = -INF  # on one side only, if there are two
    p[sides[0]][3], p[sides[0]][4, 7], p[sides[-1]][5, 15] = -INF, INF, NAN
    bad = np.isin(np.arange(N), [3, 4, 5])
    if "labels" in p:
        p["labels"][:3] = 2, 14, 9
        p["labels"][6:] = -1, K
        bad[6:] = True
    g = f.cotangent(p)
    good = {name: a.copy() for name, a in p.items()}
    for name in (*sides, "labels"):
        if name in p:
            good[name][bad] = 0
    with np.errstate(invalid="ignore"):
        right, right_gradients = f.truth(good, g)
    for transform in (outside, inside, over):
        value, gradients = quick_jit(transform(f, p, make_mesh(2, 4), "data", "model", rule))(p, g)
        with naming(transform.__name__):
            for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(right), strict=True):
                assert_close(a, np.where(bad, NAN, b))
            # Skip rows with an infinite divergence, whose gradient may be infinite or NaN.
            rows = np.isfinite(jax.tree.leaves(right)[0]) if f.is_divergence else ~bad | bad
            for name in sides:
                expected = np.where(bad[:, None], NAN, right_gradients[name])
                assert_close(np.asarray(gradients[name])[rows], expected[rows])


@vjp_by_default
@every_function
def test_rows_that_do_not_count(f, rule):
    """They may contain NaN. In some cases no row of a shard counts, or no row at all."""
    p = f.plain(**SIZES)
    out = np.array([1, 2, 5, 6])
    clean, g = p, f.cotangent(p)
    for name in ("hidden", "logits", "target_logits"):
        if name in p:
            p = p | {name: p[name].at[out].set(NAN)}
    if "labels" in p:
        p["labels"] = p["labels"].at[out].set(K + 3)
    counts = ~np.isin(np.arange(N), out)
    run = quick_jit(over(f, p | {"where": counts}, make_mesh(2, 4), "data", "model", rule))
    for where in (counts, counts & (np.arange(N) < 4), counts & False):
        f.assert_matches(run(p | {"where": where}, g), clean | {"where": where}, g)


def test_digits_over_shards():
    """Confident rows and close pairs of rows are as accurate as on one device."""
    rng = np.random.default_rng(10)
    z = rng.normal(size=(8, 64))
    z[[1, 3, 5], [8, 33, 60]] += (10, 30, 60)
    z[5:] += 1e4
    z = z.astype(np.float32)
    distance = np.array([1e-2, 1e-2, 1, 1e-2, 5, 1, 1, 1])[:, None]
    x = (z + distance * rng.normal(size=z.shape)).astype(np.float32)
    mesh = make_mesh(1, 8)
    labels = np.argmax(x, -1)
    f = sxe.over_mesh(sxe.log_prob_and_entropy, mesh, classes="model")
    log_prob, entropy = jax.jit(f)(x, labels)
    for i, row in enumerate(x):
        exact, exact_entropy, _ = oracle.exact_log_prob_and_entropy(row, labels[i])
        assert oracle.relative_error(log_prob[i], exact) < LOG_PROB_BAR
        assert oracle.relative_error(entropy[i], exact_entropy) < ENTROPY_BAR
    f = sxe.over_mesh(sxe.kl_divergence, mesh, classes="model")
    for mode in MODES:
        beta = {"beta": 0.3} if mode == "jensen_shannon" else {}
        run = jax.jit(functools.partial(f, mode=mode, reduction="none", **beta))
        value = run(x, z)
        for i in range(len(x)):
            exact, *_ = oracle.exact_divergence(x[i], z[i], mode, 0.3)
            assert oracle.relative_error(value[i], exact) < DIVERGENCE_BAR
        assert not np.asarray(run(z, z)).any()


# Forward mode and second derivatives


@each_value(f=FUNCTIONS, rule=["jvp", "autodiff"])
def test_forward_mode_and_second_derivatives(f, rule):
    """shard_map and over_mesh give the same derivatives as a single device."""
    p = f.plain(**SIZES)
    g, mesh = f.cotangent(p), make_mesh(2, 4)
    by = ("hidden", "kernel") if f.is_head else tuple(floats(p))
    q = {name: p[name] for name in by}
    v = {name: jnp.asarray(normal(*a.shape, seed=3)) for name, a in q.items()}
    layout = specs(p, "data", "model")
    out = P("data") if f.is_divergence else sxe.LogProbAndEntropy(P("data"), P("data"))

    def ways(call):
        def total(q):
            return sum(map(jnp.vdot, jax.tree.leaves(g), jax.tree.leaves(call(p | q))))

        _, tangent = jax.jvp(lambda q: call(p | q), (q,), (v,))
        _, product = jax.jvp(jax.grad(total), (q,), (v,))
        return tangent, product

    one = f(rule=rule)
    shards = jax.shard_map(
        f(rule=rule, axis_name="model"), mesh=mesh, in_specs=(layout,), out_specs=out
    )
    of_mesh = sxe.over_mesh(f.function, mesh, batch="data", classes="model")
    calls = [one, shards, lambda p: of_mesh(**p, **f.static, rule=rule)]
    right, *found = quick_jit(lambda: [ways(call) for call in calls])()
    for each in found:
        for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(right), strict=True):
            assert_close(a, np.asarray(b, np.float64), scale=max(1, float(np.abs(b).max())))


# Communication of compiled programs


@pytest.mark.parametrize("way", ["shard_map", slow("over_mesh"), "explicit"])
def test_collectives_of_logits_are_numbers_of_rows(way):
    """Values and gradients for [32, 256] logits, with all functions and all of their options."""
    sizes = {"rows": (32,), "classes": 256}
    fs = [(f, f.problem(**sizes)) for f in FUNCTIONS.values() if not f.is_head]
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = make_mesh(2, 4, kind=kind)
    transform = {"shard_map": outside, "over_mesh": over}.get(way)
    functions = [
        transform(f, p, mesh, "data", "model") if transform else with_gradients(f()) for f, p in fs
    ]
    place = placed(mesh, "data", "model")
    arguments = [place(p, f.cotangent(p)) for f, p in fs]
    with jax.set_mesh(mesh):
        text = quick_jit(all_of(functions)).lower(arguments).compile().as_text()
    found = collectives(text)
    assert found
    for c in found:
        assert c.size <= 32, found


@pytest.mark.parametrize("shape", [(2, 4), slow((1, 8)), slow((8, 1))], ids=str)
def test_collectives_of_the_head(shape):
    """One all-reduce each of d hidden and d kernel. In the loop, at most one number per row."""
    rows, width, classes = 64, 24, 512
    f = FUNCTIONS["head"]
    p = f.problem(rows=(rows,), width=width, classes=classes)
    mesh = make_mesh(*shape)
    arguments = placed(mesh, "data", "model")(p, f.cotangent(p))
    call = over(f, p, mesh, "data", "model")
    found = collectives(quick_jit(call).lower(*arguments).compile().as_text())
    data, model = shape
    large = sorted((c.opcode, c.size, c.in_loop) for c in found if c.size > rows // data)
    d_kernel = ("all-reduce", width * classes // model, False)
    d_hidden = ("all-reduce", rows // data * width, False)
    assert large == sorted([d_kernel] * (data > 1) + [d_hidden] * (model > 1))
    assert all(c.size <= 2 for c in found if c.in_loop), found  # a chunk has two rows


# Wrong use


@pytest.mark.parametrize(
    "function", [sxe.log_prob_and_entropy, sxe.linear_log_prob_and_entropy, sxe.kl_divergence]
)
def test_wrong_use_of_over_mesh(function):
    mesh = make_mesh(2, 4)
    of_mesh = sxe.over_mesh(function, mesh, batch="data", classes="model")
    assert of_mesh.__name__ == function.__name__
    assert of_mesh == sxe.over_mesh(function, mesh, batch="data", classes=("model",))
    with pytest.raises(TypeError, match=r"^axis_name: "):
        of_mesh(axis_name="model")
    if function is not sxe.linear_log_prob_and_entropy:
        with pytest.raises(ValueError, match=r"^fsdp: "):
            sxe.over_mesh(function, mesh, batch="data", fsdp="data")
        x = np.zeros((4, 6), np.float32)
        other = x if function is sxe.kl_divergence else np.zeros(4, int)
        with pytest.raises(ValueError, match=r"^logits: "):
            of_mesh(x, other)


@of_logits
def test_wrong_axis_names(f):
    p = f.plain(**SIZES)
    layout = specs(p, "data", None)
    out = P("data") if f.is_divergence else sxe.LogProbAndEntropy(P("data"), P("data"))
    for name in ("model", "other"):
        shards = jax.shard_map(
            f(axis_name=name), mesh=make_mesh(2, 4), in_specs=(layout,), out_specs=out
        )
        with pytest.raises(ValueError, match=rf"^axis_name: .*'{name}'"):
            jax.jit(shards)(p)


def test_target_logits_that_are_not_split_as_the_logits():
    """It raises an error if only one side is sharded over the classes."""
    p = FUNCTIONS["forward"].plain(**SIZES)
    layout = specs(p, "data", "model") | {"target_logits": P("data")}
    call = FUNCTIONS["forward"](axis_name="model")
    shards = jax.shard_map(call, mesh=make_mesh(2, 4), in_specs=(layout,), out_specs=P("data"))
    with pytest.raises(ValueError, match=r"^(target_logits|axis_name): "):
        jax.jit(shards)(p)
