"""over_mesh: losses of global arrays, whose rows and classes are sharded over a mesh."""

import copy
import functools
import inspect
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import option_cases
import oracle
import pytest
from hlo import collectives
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from option_cases import EVERY_OF_HEAD, each_value, in_pairs, slow
from oracle import assert_close, naming
from problems import apart, cotangent, floats, head_problem, logits_problem, with_gradients
from programs import all_of, quick_jit

import sxe

N, D, K = 8, 8, 16
SHAPES = [(1, 8), (2, 4), (4, 2), (8, 1)]
HEAD, LOGITS = sxe.linear_softmax_cross_entropy, sxe.softmax_cross_entropy
WITH_GRADIENT = sxe.softmax_cross_entropy_with_gradient
LOSSES = [HEAD, LOGITS, WITH_GRADIENT]

# In addition to options: "none" is a reduction, "bfloat16" the dtype, "fsdp" shards the kernel.
OF_LOGITS = tuple(name for name in option_cases.LOGITS if name != "where_class")
FACTORS = {
    LOGITS: (*OF_LOGITS, "none", "bfloat16"),
    HEAD: (*option_cases.HEAD, "none", "bfloat16", "fsdp"),
}


def problem(loss, *options, **more):
    """The arguments of one call. Every mesh of SHAPES divides its rows and classes."""
    if loss is HEAD:
        return head_problem(*options, shape=(N, D, K), **more)
    return logits_problem(*options, shape=(N, K), **more)


def calls(loss, rule="vjp"):
    """The arrays and other arguments of one call per case, and the arguments of its mesh."""
    for i, case in enumerate(in_pairs(*FACTORS[loss])):
        dtype = "bfloat16" if "bfloat16" in case else "float32"
        p = problem(loss, *case, dense="dense" in case, dtype=dtype, seed=i)
        p, ignored = apart(p)
        static = {"reduction": "none" if "none" in case else ("mean", "sum")[i % 2], "rule": rule}
        static |= ignored | ({"chunk_size": 1} if loss is HEAD else {})
        yield p, static, {"fsdp": "data"} if "fsdp" in case else {}


def called(loss, static):
    return with_gradients(lambda p: loss(**p, **static))


def assert_alike(results, expected):
    """Compare value and gradients, each gradient with the tolerance of its dtype."""
    (value, gradients), (right_value, right_gradients) = results, expected
    assert_close(value, np.asarray(right_value, np.float64))
    assert gradients.keys() == right_gradients.keys()
    for name, right in right_gradients.items():
        with naming(name):
            assert gradients[name].dtype == right.dtype
            right = np.asarray(right).astype(np.float64)
            # The gradient for a scalar sums terms of size 1 or more, of both signs, one per row.
            least = 8 if right.ndim == 0 else 1
            assert_close(gradients[name], right, scale=max(least, np.abs(right).max()))


@functools.cache
def dense_results(loss):
    """The results on one device, by rule "vjp"."""
    each = list(calls(loss))
    run = quick_jit(all_of(called(loss, static) for _, static, _ in each))
    return run(arguments_of(each))


def arguments_of(each):
    return [(p, cotangent(p, static["reduction"])) for p, static, _ in each]


def options_of(static):
    return {k: v for k, v in static.items() if k in ("reduction", "ignore_index")}


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = {"auto": AUTO, "explicit": EXPLICIT}
OTHERS = [(shape, kind) for shape in SHAPES for kind in (AUTO, EXPLICIT)]
EACH = [((2, 4), EXPLICIT), ((4, 2), AUTO)]


@pytest.mark.parametrize("loss", [HEAD, LOGITS], ids=["head", "logits"])
@pytest.mark.parametrize(
    ("shape", "kind", "rule"),
    [(*mesh, "vjp") for mesh in EACH]
    + [
        pytest.param(*mesh, rule, marks=pytest.mark.slow)
        for mesh in OTHERS
        for rule in ("vjp", "jvp", "autodiff")
        if (mesh in EACH) <= (rule != "vjp")
    ],
)
def test_sharded_equals_dense(loss, shape, kind, rule):
    mesh = make_mesh(*shape, kind=kind)
    each = list(calls(loss, rule))
    functions = [
        called(sxe.over_mesh(loss, mesh, batch="data", classes="model", **fsdp), static)
        for _, static, fsdp in each
    ]
    results = quick_jit(all_of(functions))(arguments_of(each))
    truth = oracle.head_loss if loss is HEAD else oracle.loss
    for (p, static, fsdp), result, right in zip(each, results, dense_results(loss), strict=True):
        with naming(*static.values(), *fsdp, *p):
            assert_close(result[0], truth(**p, **options_of(static)))
            assert_alike(result, right)


# Layouts


@each_value(
    axes=[
        (None, None, None),
        ("a", None, "a"),
        (None, "a", None),
        (("a", "c"), "b", ("a", "c")),
        (("a", "c"), "b", "c"),
        ("b", ("c", "a"), None),
        (P("a", "c"), "b", "a"),
        (P(None, ("c", "b")), None, None),
    ],
    kind=KINDS,
)
def test_axes(axes, kind):
    """No, one or several axes; rows [B, T]; the metrics, and the sharding of the results."""
    batch, classes, fsdp = axes
    mesh = make_mesh(2, 2, 2, names=("a", "b", "c"), kind=kind)
    p = head_problem("class_weights", "weights", "bias", shape=(4, 4, D, K))
    static = {"return_metrics": True, "chunk_size": 1, "label_smoothing": 0.2}

    def scalar(q):
        return sxe.over_mesh(HEAD, mesh, batch=batch, classes=classes, fsdp=fsdp)(**q, **static)

    def run(f):
        return quick_jit(lambda q: jax.value_and_grad(lambda r: f(q | r), has_aux=True)(floats(q)))(
            p
        )

    (value, metrics), gradients = run(scalar)
    (right, right_metrics), right_gradients = run(lambda q: HEAD(**q, **static))
    assert_close(value, right)
    for found, expected in zip(metrics, right_metrics, strict=True):
        assert_close(found, expected, dtype="float32")
    assert_alike((value, gradients), (right, right_gradients))

    rows = batch if isinstance(batch, P) else P(batch)
    expected = {"hidden": rows, "weights": rows, "bias": P(classes), "class_weights": P(classes)}
    expected["kernel"] = P(fsdp, classes)
    for name, spec in expected.items():
        assert gradients[name].sharding.is_equivalent_to(
            NamedSharding(mesh, spec), gradients[name].ndim
        ), name
    for name in ("lse", "predictions", "max_probability", "label_rank", "entropy"):
        assert getattr(metrics, name).sharding.is_equivalent_to(NamedSharding(mesh, rows), 2)
    assert value.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("shape", "axis", "batch"),
    [((8, 8, 3), 1, "data"), ((8, 4, 2), 0, P(None, "data")), ((2, 4, 8), (2, 1), "data")],
)
def test_class_axes_of_logits(shape, axis, batch):
    """Also the loss with its gradient in one pass, and masks of classes."""
    mesh = make_mesh(2, 4)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=shape).astype(np.float32)
    axes = axis if isinstance(axis, tuple) else (axis,)
    rows = [n for i, n in enumerate(shape) if i not in axes]
    labels = rng.integers(shape[axes[0]], size=rows)
    weights = rng.uniform(0.5, 2, size=np.prod([shape[a] for a in axes])).astype(np.float32)
    both = sxe.over_mesh(
        sxe.softmax_cross_entropy_with_gradient, mesh, batch=batch, classes="model"
    )
    options = {"axis": axis, "z_loss": 0.1, "class_weights": weights}
    value, gradient = both(logits, labels, **options)
    assert_close(value, oracle.loss(logits, labels, **options))
    assert_close(gradient, oracle.gradient(logits, labels, **options))
    mask = rng.random(shape) < 0.7
    targets = np.where(mask, rng.random(shape), 0).astype(np.float32)
    options["where"] = mask
    (value, metrics), gradient = both(logits, targets, **options, return_metrics=True)
    assert_close(value, oracle.loss(logits, targets, **options))
    assert_close(gradient, oracle.gradient(logits, targets, **options))
    assert metrics.predictions.shape == tuple(rows)


@pytest.mark.parametrize("loss", [HEAD, LOGITS], ids=["head", "logits"])
def test_shards_of_nothing(loss):
    """Most shards of the classes have no label; most shards of the rows have no row that counts.

    One shard has only logits of -inf.
    """
    p = problem(HEAD, "bias")
    p["labels"][:] = [0, 1, 2, 3] * 2
    p["bias"][8:12] = -np.inf
    p["where"] = np.arange(N) == 2
    p["hidden"][5] = np.nan
    truth = oracle.head_loss
    if loss is LOGITS:
        x = p.pop("hidden") @ p.pop("kernel") + p.pop("bias")
        p["logits"], truth = x.astype(np.float32), oracle.loss
    over = sxe.over_mesh(loss, make_mesh(4, 2), batch="data", classes="model")
    g = np.float32(0.7)
    for static in ({"reduction": "mean"}, {"reduction": "sum", "rule": "jvp"}):
        result = quick_jit(called(over, static))(p, g)
        assert_close(result[0], truth(**p, reduction=static["reduction"]))
        assert_alike(result, quick_jit(called(loss, static))(p, g))
    p["where"][:] = False
    value, gradients = quick_jit(called(over, {}))(p, g)
    assert value == 0
    for name, d in gradients.items():
        assert not np.any(np.asarray(d)), name


def test_eager_calls_compile_once(caplog):
    loss = sxe.over_mesh(LOGITS, make_mesh(2, 4), batch="data", classes="model")
    logits, labels = np.ones((N, K), np.float32), np.zeros(N, np.int32)
    with jax.log_compiles():
        loss(logits, labels, label_smoothing=0.1)
        assert "Compiling" in caplog.text
        caplog.clear()
        loss(logits + 1, labels, label_smoothing=0.2)
        assert "Compiling" not in caplog.text


@pytest.mark.parametrize("loss", [HEAD, LOGITS], ids=["head", "logits"])
def test_transformations(loss):
    """Hessian-vector products, vmap, checkpoint and scan of a sharded loss."""
    p = problem(loss, "z_loss", "softcap" if loss is HEAD else "weights")
    name = "kernel" if loss is HEAD else "logits"
    v = np.random.default_rng(5).normal(size=p[name].shape).astype(np.float32)

    def everything(f):
        def of(x):
            return f(**(p | {name: x}), label_smoothing=0.2)

        def total(x):
            return jax.lax.scan(lambda c, _: (c + jax.checkpoint(of)(x), None), 0.0, None, 2)[0]

        def product(x):
            return jax.grad(lambda x: jnp.vdot(jax.grad(of)(x), v))(x)

        def forward(x):
            return jax.jvp(lambda x: f(**(p | {name: x}), rule="jvp"), (x,), (v,))

        def each(x):
            return jax.vmap(jax.value_and_grad(of))(jnp.stack([x, x + v]))

        return [quick_jit(g)(p[name]) for g in (jax.grad(total), product, forward, each)]

    found = everything(sxe.over_mesh(loss, make_mesh(2, 4), batch="data", classes="model"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(everything(loss)), strict=True):
        assert_close(a, b)


# As a function


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("abstract", [False, True], ids=["devices", "abstract"])
def test_over_mesh_is_a_value(loss, abstract):
    """It is compared, copied and pickled by its loss, layout and devices in their order."""
    devices = make_mesh(2, 4).devices[::-1]
    mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AUTO, EXPLICIT))
    mesh = mesh.abstract_mesh if abstract else mesh
    over = sxe.over_mesh(loss, mesh, batch="data", classes="model")
    for same in (
        sxe.over_mesh(loss, mesh, batch=P("data"), classes=("model",)),
        copy.copy(over),
        copy.deepcopy(over),
        pickle.loads(pickle.dumps(over)),
    ):
        assert same == over
        assert hash(same) == hash(over)
        assert repr(same) == repr(over)
    for other in (sxe.over_mesh(loss, mesh, batch="data"), loss, None):
        assert over != other


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_over_mesh_looks_like_its_loss(loss):
    over = sxe.over_mesh(loss, make_mesh(2, 4), batch="data", classes="model")
    assert over.__name__ == loss.__name__
    assert over.__doc__ == loss.__doc__
    assert inspect.signature(over) == inspect.signature(loss)
    mesh = r"Mesh\(axis_sizes=\(2, 4\), .*\)"
    axes = r"batch=P.*\('data',\), classes=\('model',\), fsdp=None"
    assert re.fullmatch(rf"sxe.over_mesh\(sxe.{loss.__name__}, {mesh}, {axes}\)", repr(over))


def test_a_pickled_loss_is_the_loss():
    p = problem(HEAD)
    over = sxe.over_mesh(HEAD, make_mesh(2, 4), batch="data", classes="model", fsdp="data")
    assert_close(jax.jit(pickle.loads(pickle.dumps(over)))(**p), oracle.head_loss(**p))


def test_a_pickled_loss_where_its_devices_are_not():
    """A pickle holds ids of devices; here, one that no device of this process has."""
    over = sxe.over_mesh(HEAD, make_mesh(2, 4), batch="data")
    load, (*arguments, ids) = over.__reduce__()
    assert load(*arguments, ids) == over
    message = r"mesh: expected \w+ devices with the ids .*, got none with \[99\]; .* AbstractMesh"
    with pytest.raises(ValueError, match=message):
        load(*arguments, (*ids[:-1], 99))


# The plain call on an explicit mesh


@pytest.mark.parametrize("kernel", [P("data", "model"), P(("data", "other"), "model")], ids=str)
def test_explicit_kernel_split_by_rows(kernel):
    """Over mesh axes of the rows, or also over others."""
    mesh = make_mesh(2, 2, 2, names=("data", "model", "other"), kind=EXPLICIT)
    p = problem(HEAD, dtype="bfloat16")
    layout = {"hidden": P("data"), "kernel": kernel, "labels": P("data")}
    q = {name: jax.device_put(p[name], NamedSharding(mesh, layout[name])) for name in p}
    f = called(HEAD, {"chunk_size": 1, "reduction": "mean"})
    with jax.set_mesh(mesh):
        program = quick_jit(f).lower(q, np.float32(0.7)).compile()
        result = program(q, np.float32(0.7))
    found = collectives(program.as_text())
    assert [c.in_loop for c in found if c.opcode == "all-gather"] == [False]
    assert all(c.size <= N for c in found if c.in_loop)
    assert_alike(result, quick_jit(f)(p, np.float32(0.7)))
    gradient = result[1]["kernel"]
    assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, kernel), 2)


@pytest.mark.parametrize("auto", ["data", "model"])
def test_meshes_of_both_kinds(auto):
    """over_mesh handles both axes. The plain call leaves the Auto axis to the compiler."""
    kinds = tuple(AUTO if name == auto else EXPLICIT for name in ("data", "model"))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)
    p = problem(HEAD, "label_smoothing", "bias")
    layout = {"hidden": P("data"), "kernel": P(None, "model"), "bias": P("model")}
    q = {n: jax.device_put(a, NamedSharding(mesh, layout.get(n, P()))) for n, a in p.items()}
    g = np.float32(0.7)
    right = quick_jit(called(HEAD, {}))(p, g)
    over = sxe.over_mesh(HEAD, mesh, batch="data", classes="model")
    assert_alike(quick_jit(called(over, {}))(q, g), right)
    with jax.set_mesh(mesh):
        assert_alike(quick_jit(called(HEAD, {"chunk_size": 2}))(q, g), right)


def test_abstract_mesh():
    """The mesh of the context, as in a model that does not know its devices."""
    p = problem(HEAD)

    def loss(p):
        mesh = jax.sharding.get_abstract_mesh()
        return sxe.over_mesh(HEAD, mesh, batch="data", classes="model")(**p)

    with jax.set_mesh(make_mesh(2, 4)):
        assert_close(jax.jit(loss)(p), oracle.head_loss(**p))


def test_labels_are_checked():
    p = problem(HEAD)
    p["labels"][5] = K
    over = sxe.over_mesh(HEAD, make_mesh(2, 4), batch="data", classes="model")
    error, value = checkify.checkify(jax.jit(over))(p["hidden"], p["kernel"], p["labels"])
    # The position is counted in the rows of the device.
    with pytest.raises(checkify.JaxRuntimeError, match=rf"labels: .*\[0, {K}\), got {K} at"):
        error.throw()
    assert np.isnan(value)


# Communication in the compiled program

ALL_METRICS = sxe.Metrics._fields
WITHOUT_RANKS = tuple(name for name in ALL_METRICS if name != "label_rank")
ROWS, WIDTH, CLASSES = 64, 24, 512  # global; no two products of parts of them are equal


def moved(mesh, static, options=(), differentiate=("hidden", "kernel"), dense=False, **layout):
    """The collectives of value and gradients, as (opcode, elements, whether in a loop).

    ``return_metrics`` among the static options is a tuple of the metrics to return.
    """
    static = dict(static)
    wanted = static.pop("return_metrics", ())
    p = head_problem(*options, dense=dense, shape=(ROWS, WIDTH, CLASSES))
    over = sxe.over_mesh(HEAD, mesh, **layout)
    g = np.ones(ROWS if static.get("reduction") == "none" else (), np.float32)

    def f(p, g):
        def loss(q):
            value = over(**(p | q), **static, return_metrics=bool(wanted))
            value, metrics = value if wanted else (value, None)
            return value, [getattr(metrics, name) for name in wanted]

        q = {name: p[name] for name in differentiate}
        value, pull, metrics = jax.vjp(loss, q, has_aux=True)
        return value, metrics, pull(g)

    # Place the arrays as in training, so that nothing has to be moved at first.
    batch, classes = layout.get("batch"), layout.get("classes")
    at = dict.fromkeys(("hidden", "labels", "weights", "where"), P(batch))
    at |= {"kernel": P(layout.get("fsdp"), classes)}
    at |= dict.fromkeys(("bias", "class_weights"), P(classes))
    at |= {"labels": P(batch, classes)} if dense else {}
    p = {n: jax.device_put(a, NamedSharding(mesh, at.get(n, P()))) for n, a in p.items()}
    g = jax.device_put(g, NamedSharding(mesh, P(batch) if g.ndim else P()))
    text = quick_jit(f).lower(p, g).compile().as_text()
    assert re.search("while", text)  # over chunks
    return collectives(text)


@each_value(
    shape=SHAPES,
    reduction=["mean", "none"],
    metrics={"ranks": ALL_METRICS, "sums": WITHOUT_RANKS},
)
def test_collectives(shape, metrics, reduction):
    """d hidden and d kernel are reduced once per call. The rest is one number per row or less.

    For a sum, the loop over chunks reduces statistics, because the gradients follow at once. It
    also reduces the label's logit, if the metrics count the larger logits.
    """
    data, model = shape
    rows, classes = ROWS // data, CLASSES // model
    static = {"reduction": reduction, "chunk_size": 2, "return_metrics": metrics}
    found = moved(make_mesh(*shape), static, EVERY_OF_HEAD, batch="data", classes="model")
    large = sorted((c.opcode, c.size, c.in_loop) for c in found if c.size > rows)
    d_kernel = ("all-reduce", WIDTH * classes, False)
    d_hidden = ("all-reduce", rows * WIDTH, False)
    # XLA merges neighboring reductions: these two, or either with sums of rows.
    assert large == sorted([d_kernel] * (data > 1) + [d_hidden] * (model > 1))
    assert {c.opcode for c in found} <= {"all-reduce"}
    in_loop = [c for c in found if c.in_loop]
    assert {c.size for c in in_loop} <= {2}
    # The loop over whole chunks reduces the maximum and the sums. The loop over parts of a chunk
    # also reduces the maximum for weights. XLA merges the label's logit with these.
    ranks = "label_rank" in metrics
    number = 2 + 3 if reduction == "mean" else 2 * ranks
    assert len(in_loop) == (number if model > 1 else 0)
    if model > 1 and reduction == "mean":
        # The two sums of a state, the cost of the targets, and the sum for the entropy
        assert max(c.bytes for c in in_loop) == 2 * 4 * (4 + ranks)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_collectives_of_a_kernel_split_by_rows(reduction):
    """The kernel is gathered once per call, and its gradient reduced and scattered once."""
    static = {"reduction": reduction, "chunk_size": 2}
    found = moved(make_mesh(2, 4), static, batch="data", classes="model", fsdp="data")
    kernel = WIDTH * CLASSES // 4
    large = sorted((c.opcode, c.size, c.in_loop) for c in found if c.size > ROWS // 2)
    assert large == [
        ("all-gather", kernel, False),
        ("all-reduce", ROWS // 2 * WIDTH, False),
        ("reduce-scatter", kernel, False),
    ]


@pytest.mark.parametrize("frozen", ["hidden", "kernel"])
def test_a_frozen_input_moves_nothing(frozen):
    other = {"hidden": "kernel", "kernel": "hidden"}[frozen]
    static = {"chunk_size": 2}
    found = moved(make_mesh(2, 4), static, differentiate=(other,), batch="data", classes="model")
    sizes = {"hidden": ROWS // 2 * WIDTH, "kernel": WIDTH * CLASSES // 4}
    assert [c.size for c in found if c.size > ROWS // 2] == [sizes[other]]


def test_collectives_of_a_value():
    """Statistics are reduced once per call for any number of chunks, without label_rank."""
    static = {"chunk_size": 2, "return_metrics": WITHOUT_RANKS}
    found = moved(
        make_mesh(2, 4), static, EVERY_OF_HEAD, differentiate=(), batch="data", classes="model"
    )
    assert found
    assert all(not c.in_loop and c.size <= ROWS // 2 for c in found), found


# Weights of both signs: the sum and the rows of all shards decide.


MEANS = {
    "nothing counts": ([0, 0, 0, 0], 0),
    "one shard has no row that counts": ([0, 0, 1, -3], "mean"),
    "one shard's weights sum to zero": ([1, -1, 2, 1], "mean"),
    "all weights sum to zero, no shard's do": ([1, 2, -1, -2], np.nan),
    "each shard's weights sum to zero": ([1, -1, 2, -2], np.nan),
    "those of one shard, and the other has no row that counts": ([0, 0, 2, -2], np.nan),
}


@pytest.mark.parametrize("way", ["over_mesh", slow("shard_map")])
@pytest.mark.parametrize(
    ("loss", "rule"),
    [
        *((loss, "vjp") for loss in (LOGITS, HEAD, WITH_GRADIENT)),
        *(
            pytest.param(loss, rule, marks=pytest.mark.slow)
            for loss in (LOGITS, HEAD)
            for rule in ("jvp", "autodiff")
        ),
    ],
)
def test_a_mean_of_weights_of_both_signs(loss, rule, way):
    logits = np.random.default_rng(5).standard_normal((4, 6)).astype(np.float32)
    labels = np.array([1, 0, 5, 3])
    arrays = (logits, jnp.eye(6)) if loss is HEAD else (logits,)
    mesh = make_mesh(2, 2)
    options = {} if loss is WITH_GRADIENT else {"rule": rule}
    whole = sxe.over_mesh(loss, mesh, batch="data", classes="model")
    splits = (P("data"), P(None, "model")) if loss is HEAD else (P("data", "model"),)

    def on_a_device(labels, weights, *arrays):
        names = {"axis_name": "model", "batch_axis_name": "data"}
        return loss(*arrays, labels, weights=weights, **names, **options)

    if way == "shard_map":
        results = (P(), P("data", "model")) if loss is WITH_GRADIENT else P()
        in_specs = (P("data"), P("data"), *splits)
        of_shards = jax.shard_map(on_a_device, mesh=mesh, in_specs=in_specs, out_specs=results)

    def call(weights, *arrays):
        if way == "shard_map":
            return of_shards(labels, weights, *arrays)
        return whole(*arrays, labels, weights=weights, **options)

    run = quick_jit(call if loss is WITH_GRADIENT else jax.value_and_grad(call, argnums=1))
    for weights, expected in MEANS.values():
        weights = np.array(weights, np.float32)
        value, gradient = run(weights, *arrays)
        if expected == "mean":
            assert_close(value, oracle.loss(logits, labels, weights=weights))
            assert_close(gradient, oracle.gradient(logits, labels, weights=weights))
        else:
            np.testing.assert_array_equal(value, expected)
            of_rows = np.asarray(gradient)[weights != 0]
            np.testing.assert_array_equal(of_rows, np.full_like(of_rows, expected))
