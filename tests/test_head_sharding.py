"""The head on a mesh: in shard_map, and under jit on Auto and on Explicit meshes."""

import functools

import jax
import numpy as np
import oracle
import pytest
from hlo import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, use_mesh
from option_cases import EVERY_OF_HEAD, RULES, each_value, slow, vjp_by_default, with_row_scale
from oracle import assert_close, naming
from problems import apart, cotangent, floats, head_problem, with_gradients
from programs import all_of, quick_jit

import sxe
from sxe._backend import Backend

N, D, K = 8, 3, 16


def cases(rule="vjp"):
    """p and the static options of some calls: every option, both kinds of labels, each reduction.

    The last call has no options and bfloat16 operands.
    """
    static = {"rule": rule, "chunk_size": 3}
    p, ignored = apart(head_problem(*EVERY_OF_HEAD, "ignore_index"))
    return [
        (p, static | {"reduction": "mean"} | ignored),
        (head_problem(*with_row_scale(EVERY_OF_HEAD), dense=True), static | {"reduction": "none"}),
        (head_problem(dtype="bfloat16", seed=1), static | {"reduction": "sum"}),
    ]


def spec(p, rows, classes):
    """The sharding of the arguments on a mesh with these axes for rows and classes."""
    layouts = {
        "hidden": P(rows, None),
        "kernel": P(None, classes),
        "labels": P(rows, classes) if p["labels"].ndim == 2 else P(rows),
        **dict.fromkeys(("bias", "class_weights", "class_mask"), P(classes)),
        **dict.fromkeys(("where", "weights"), P(rows)),
        "logit_scale": P(rows) if np.ndim(p.get("logit_scale")) else P(),
    }
    return {name: layouts.get(name, P()) for name in p}


def out_spec(static, rows):
    return P(rows) if static["reduction"] == "none" else P()


def head(static):
    return lambda p: sxe.linear_softmax_cross_entropy(**p, **static)


def outside(p, static, mesh, rows, classes, **options):
    """The gradient, taken outside shard_map, of the loss in shard_map."""
    loss = head(static | {"axis_name": classes, "batch_axis_name": rows})
    options |= {"in_specs": (spec(p, rows, classes),), "out_specs": out_spec(static, rows)}
    return with_gradients(jax.shard_map(loss, mesh=mesh, **options))


def inside(p, static, mesh, rows, classes):
    """The gradient, taken inside shard_map."""
    layout, g = spec(p, rows, classes), out_spec(static, rows)
    return jax.shard_map(
        with_gradients(head(static | {"axis_name": classes, "batch_axis_name": rows})),
        mesh=mesh,
        in_specs=(layout, g),
        out_specs=(g, {name: layout[name] for name in floats(p)}),
    )


_ONE_DEVICE = {}


def on_one_device(p, static):
    """The gradients of the same call by rule "vjp" in one chunk. Many tests share them."""
    key = p["kernel"].dtype, p["kernel"].shape, p["labels"].ndim, static["reduction"], tuple(p)
    if key not in _ONE_DEVICE:
        static = {k: v for k, v in static.items() if k not in ("rule", "chunk_size")}
        _, gradients = quick_jit(with_gradients(head(static)))(p, cotangent(p, static["reduction"]))
        _ONE_DEVICE[key] = {n: np.asarray(a).astype(np.float64) for n, a in gradients.items()}
    return _ONE_DEVICE[key]


def compare(functions, calls, place=lambda p, static: (p, cotangent(p, static["reduction"]))):
    """Run these functions in one program, and compare with the oracle and with one device."""
    results = quick_jit(all_of(functions))([place(*call) for call in calls])
    for (p, static), (value, gradients) in zip(calls, results, strict=True):
        with naming(*static.values(), *p):
            numbers = {k: v for k, v in static.items() if k in ("reduction", "ignore_index")}
            assert_close(value, oracle.head_loss(**p, **numbers))
            for name, right in on_one_device(p, static).items():
                with naming(name):
                    assert gradients[name].dtype == p[name].dtype
                    assert_close(gradients[name], right, scale=max(1, np.abs(right).max()))
    return results


# shard_map


unchecked = functools.partial(outside, check_vma=False)


@pytest.mark.parametrize(
    ("transform", "rule"),
    [(f, "vjp") for f in (outside, inside, unchecked)]
    + [
        pytest.param(f, rule, marks=pytest.mark.slow)
        for f, rule in (
            (outside, "jvp"),
            (outside, "autodiff"),
            (inside, "jvp"),
            (unchecked, "jvp"),
        )
    ],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", "unchecked"),
)
def test_shard_map(transform, rule):
    """Sharded rows and classes. The gradient is outside, with and without check_vma, or inside."""
    calls = cases(rule)
    compare([transform(*call, make_mesh(2, 4), "data", "model") for call in calls], calls)


@pytest.mark.parametrize(
    ("rows", "classes"),
    [("data", None), slow(None, "model"), slow(("data", "model"), None), (None, ("model", "data"))],
)
def test_one_axis_or_several(rows, classes):
    calls = cases()
    transforms = (inside, outside, unchecked)
    mesh = make_mesh(2, 4)
    functions = [f(*call, mesh, rows, classes) for f, call in zip(transforms, calls, strict=True)]
    compare(functions, calls)


def test_blocks_in_shard_map(monkeypatch):
    """Blocks of one row, and of 256 of a shard's 300 classes."""
    monkeypatch.setattr(Backend, "row_block_bytes", 1)
    monkeypatch.setattr(Backend, "class_block_bytes", 2)
    shape, static = (N, 2, 1200), {"chunk_size": 3}
    calls = [
        (head_problem(*EVERY_OF_HEAD, shape=shape), static | {"reduction": "mean"}),
        (
            head_problem("bias", "softcap", dtype="bfloat16", shape=shape),
            static | {"reduction": "none"},
        ),
    ]
    transforms = (inside, outside)
    mesh = make_mesh(2, 4)
    compare([f(*c, mesh, "data", "model") for f, c in zip(transforms, calls, strict=True)], calls)


@vjp_by_default
def test_rows_that_do_not_count(rule):
    """Rows with NaN, labels out of range, and logits that overflow on one device.

    If these rows count, they alone are NaN, on every device.
    """
    p, static = head_problem("bias", "weights"), {"rule": rule, "reduction": "none"}
    p["kernel"][0], p["kernel"][0, 13], p["weights"][[3, 7]] = 0.5, 2, 0
    good = p | {"where": ~np.isin(range(N), [0, 4, 6])}
    bad = good | {"hidden": p["hidden"].copy(), "labels": p["labels"].copy()}
    bad["hidden"][[0, 3, 4]], bad["hidden"][7], bad["labels"][6] = np.nan, [3e38, 0, 0], K
    worse = {name: a for name, a in bad.items() if name not in ("where", "weights")}
    functions = [outside(q, static, make_mesh(2, 4), "data", "model") for q in (bad, worse)]
    g = cotangent(p, static["reduction"])
    run = quick_jit(lambda *qs: [f(q, g) for f, q in zip(functions, qs, strict=True)])
    (value, gradients), (worse_value, worse_gradients) = run(bad, worse)
    right = oracle.head_gradients(**good, g=g, reduction="none")
    assert_close(value, oracle.head_loss(**good, reduction="none"))
    for name in ("hidden", "kernel", "bias"):
        assert_close(gradients[name], right[name])
    del good["where"], good["weights"]
    nan = np.isin(range(N), [0, 3, 4, 6, 7])
    right = oracle.head_gradients(**good, g=g, reduction="none")["hidden"]
    assert_close(worse_value, np.where(nan, np.nan, oracle.head_loss(**good, reduction="none")))
    assert_close(worse_gradients["hidden"], np.where(nan[:, None], np.nan, right))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_name": "other"}, "^axis_name: .*shard_map.*'other'"),
        ({"axis_name": "data"}, "^axis_name: .*shards the kernel.*'data'.*replicated"),
        ({"batch_axis_name": "model"}, "^batch_axis_name: .* the hidden.*'model'.*replicated"),
        ({"axis_name": "model", "batch_axis_name": "model"}, "^batch_axis_name: .*'model'"),
    ],
)
def test_wrong_use(options, message):
    p = head_problem()
    layout = spec(p, "data", "model")
    loss = jax.shard_map(head(options), mesh=make_mesh(2, 4), in_specs=(layout,), out_specs=P())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(loss, p)


# jit on global arrays, which JAX shards


@each_value(layout=[("data", "model"), (None, "model"), ("data", None)], kind=["explicit", "auto"])
def test_global_arrays(kind, layout):
    """Every reduction. On an explicit mesh, a gradient has the sharding of its argument."""
    mesh, context = use_mesh(kind)
    rule = RULES[[("data", None), (None, "model"), ("data", "model")].index(layout)]
    calls = cases()[:2] + cases(rule)[2:]

    def place(p, static):
        layouts = spec(p, *layout), out_spec(static, layout[0])
        return jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, s)),
            (p, cotangent(p, static["reduction"])),
            layouts,
        )

    functions = [with_gradients(head(static)) for _, static in calls]
    with context:
        results = compare(functions, calls, place)
    if kind == "explicit":
        for (p, static), (value, gradients) in zip(calls, results, strict=True):
            layouts = {name: NamedSharding(mesh, s) for name, s in spec(p, *layout).items()}
            for name, a in gradients.items():
                assert a.sharding.is_equivalent_to(layouts[name], a.ndim), name
            if static["reduction"] == "none":
                assert value.sharding.is_equivalent_to(layouts["where"], 1)


@pytest.mark.parametrize("kind", ["shard_map", "auto", "explicit"])
def test_metrics(kind):
    """The first of the largest logits is the prediction, whichever shard has it."""
    p = head_problem("weights", "where", "bias")
    p["hidden"][0], p["hidden"][1] = 0, 0
    p["bias"][[5, 13]] = 9
    static = {"chunk_size": 3, "return_metrics": True}
    layout = spec(p, "data", "model")
    mesh, context = use_mesh(kind)
    call = head(static)
    if kind == "shard_map":
        out = P(), sxe.Metrics(P(), P(), *[P("data")] * 5)
        call = head(static | {"axis_name": "model", "batch_axis_name": "data"})
        call = jax.shard_map(call, mesh=mesh, in_specs=(layout,), out_specs=out)
    with context:
        q = {name: jax.device_put(a, NamedSharding(mesh, layout[name])) for name, a in p.items()}
        value, metrics = quick_jit(call)(q)
    x, _ = oracle.head(p["hidden"], p["kernel"], bias=p["bias"])
    rest = {name: p[name] for name in ("labels", "weights", "where")}
    _, _, counts, weights, _ = oracle.rows(x, **rest)
    assert_close(value, oracle.loss(x, **rest))
    assert_close(metrics.loss_sum, oracle.loss(x, **rest, reduction="sum"))
    assert_close(metrics.weight_sum, (weights * counts).sum())
    oracle.check_rows_metrics(metrics, x, counts, p["labels"])
    assert np.asarray(metrics.predictions)[0] == 5


# Communication in the compiled program


@each_value(rule=["vjp", "jvp"], reduction=["mean", "none"])
def test_collectives(rule, reduction):
    """Statistics of rows, and once the gradient of the hidden states; neither kernel nor logits."""
    rows, width, classes = 32, 12, 512
    p = head_problem(*EVERY_OF_HEAD, shape=(rows, width, classes))
    static = {"rule": rule, "reduction": reduction, "chunk_size": 8}
    f = outside(p, static, make_mesh(1, 8), None, "model")
    program = quick_jit(f).lower(p, cotangent(p, static["reduction"])).compile()
    sizes = sorted((c.size for c in collectives(program.as_text())), reverse=True)
    assert sizes[0] == rows * width
    assert all(size <= rows for size in sizes[1:]), sizes
