"""The loss on a mesh: in shard_map, and under jit on Auto and on Explicit meshes."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hlo import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import KINDS, make_mesh, use_mesh
from option_cases import (
    EVERY_OF_LOGITS,
    RULES,
    each_value,
    every_rule,
    of_logits,
    slow,
    vjp_by_default,
)
from oracle import assert_close, naming
from problems import apart, cotangent, logits_problem
from programs import all_of, quick_jit
from tolerances import CENTRAL_DIFFERENCES, GRADIENT_BAR, LOSS_BAR, SMALLEST, ZERO

import sxe

N, K = 8, 24  # 1, 2, 4 and 8 devices divide both; a shard has 3, 6, 12 or 24 classes


class Call(NamedTuple):
    """A call of the loss. Its numbers are part of the program, its arrays are arguments."""

    logits: np.ndarray
    labels: np.ndarray
    options: dict[str, Any]
    reduction: str = "mean"
    rule: str = "vjp"
    g: Any = np.float32(0.7)

    @property
    def arrays(self):
        given = {k: v for k, v in self.options.items() if isinstance(v, np.ndarray)}
        return self.logits, self.labels, given, self.g

    def loss(self, **mesh_axes):
        """The loss as a function of the arrays."""
        options = {"reduction": self.reduction, "rule": self.rule} | self.options | mesh_axes
        return lambda logits, labels, given: sxe.softmax_cross_entropy(
            logits, labels, **(options | given)
        )

    def expected(self):
        options = {k: v for k, v in self.options.items() if k != "return_metrics"}
        options["reduction"] = self.reduction
        return (
            oracle.loss(self.logits, self.labels, **options),
            oracle.gradient(self.logits, self.labels, self.g, **options),
        )


EVERY = (*EVERY_OF_LOGITS, "ignore_index")  # with integer labels
EVERY_MASKED = ("where_class", "weights", "class_weights", "z_loss")


def a_call(
    *options, dense=False, reduction="mean", rule="vjp", dtype="float32", seed=0, shape=(N, K)
):
    """A call with random arguments. Numbers among its options are Python numbers."""
    p = logits_problem(*options, dense=dense, dtype=dtype, shape=shape, seed=seed)
    g = cotangent(p, reduction, seed=seed)
    logits, labels = p.pop("logits"), p.pop("labels")
    given = {name: x if np.ndim(x) else x.item() for name, x in apart(p)[0].items()}
    return Call(logits, labels, given | apart(p)[1], reduction, rule, g)


def spec(value, rows, classes, option=None):
    """The sharding of an array of a call on a mesh with these axes for rows and classes."""
    of_classes = option in ("class_weights", "class_mask")
    axes = {0: (), 1: (classes if of_classes else rows,), 2: (rows, classes)}
    return P(*axes[np.ndim(value)])


def specs(call, rows, classes):
    _, labels, given, g = call.arrays
    given = {k: spec(v, rows, classes, k) for k, v in given.items()}
    return P(rows, classes), spec(labels, rows, classes), given, spec(g, rows, classes)


def value_and_gradient(loss, logits, labels, given, g):
    def scalar(logits):
        value = loss(logits, labels, given)
        return jnp.sum(g * value), value

    (_, value), gradient = jax.value_and_grad(scalar, has_aux=True)(logits)
    return value, gradient


def globally(call):
    """Value and gradient of the loss on global arrays."""
    return lambda *arrays: value_and_gradient(call.loss(), *arrays)


def over_shards(call, mesh, rows, classes, *, function=None, out=None, **options):
    """A function of logits, labels and other arrays, in shard_map. By default, the loss."""
    function = function or call.loss(axis_name=classes, batch_axis_name=rows)
    if out is None:
        out = P(rows) if call.reduction == "none" else P()
    inputs = specs(call, rows, classes)[:-1]
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=out, **options)


def outside(call, mesh, rows, classes, **options):
    """Value and gradient, taken outside shard_map, of the loss in shard_map."""
    loss = over_shards(call, mesh, rows, classes, **options)
    return lambda *arrays: value_and_gradient(loss, *arrays)


def inside(call, mesh, rows, classes):
    """Value and gradient, taken inside shard_map."""
    loss = call.loss(axis_name=classes, batch_axis_name=rows)
    return jax.shard_map(
        lambda *arrays: value_and_gradient(loss, *arrays),
        mesh=mesh,
        in_specs=specs(call, rows, classes),
        out_specs=(P(rows) if call.reduction == "none" else P(), P(rows, classes)),
    )


def with_gradient(call, mesh, rows, classes):
    """Value and gradient in one pass, in shard_map. The call's cotangent scales the gradient."""
    options = {"reduction": call.reduction, "axis_name": classes, "batch_axis_name": rows}

    def both(logits, labels, given, g):
        value, gradient = sxe.softmax_cross_entropy_with_gradient(
            logits, labels, **(options | call.options | given)
        )
        return value, gradient * g.astype(gradient.dtype)

    return jax.shard_map(
        both,
        mesh=mesh,
        in_specs=specs(call, rows, classes),
        out_specs=(P(), P(rows, classes)),
    )


def run(functions, calls, place=lambda call: call.arrays):
    """The results of one program that contains all of these functions."""
    return quick_jit(all_of(functions))([place(call) for call in calls])


def check(calls, results):
    for call, (value, gradient) in zip(calls, results, strict=True):
        expected_value, expected_gradient = call.expected()
        with naming(call.rule, call.reduction, call.labels.dtype, *call.options):
            assert value.dtype == np.result_type(call.logits.dtype, np.float32)
            assert gradient.dtype == call.logits.dtype
            assert_close(value, expected_value)
            assert_close(gradient, expected_gradient)


def run_and_check(transform, calls, *layout, **options):
    check(calls, run([transform(call, *layout, **options) for call in calls], calls))


def numerical_gradient(f, x, step=1e-3):
    """Central differences of a scalar function that is nearly linear in x."""
    x = np.asarray(x, np.float64)
    out = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        there, back = x.copy(), x.copy()
        there[i] += step
        back[i] -= step
        out[i] = (f(there) - f(back)) / (2 * step)
    return out


# 1. shard_map


@pytest.mark.parametrize("shape", [slow((1, 8)), (4, 2), slow((8, 1))], ids=str)
def test_every_mesh(shape):
    """All shapes except 2 x 4, which the other tests use."""
    calls = [
        a_call(*EVERY, rule="vjp", reduction="mean"),
        a_call(*EVERY_OF_LOGITS, dense=True, rule="vjp", reduction="none"),
        a_call(*EVERY, rule="jvp", reduction="none"),
        a_call(*EVERY_OF_LOGITS, dense=True, rule="autodiff", reduction="sum"),
    ]
    run_and_check(outside, calls, make_mesh(*shape), "data", "model")


CASES = of_logits("none")


def calls_of(cases, **more):
    """One call per case. Reductions of the rows alternate between mean and sum."""
    sums = itertools.cycle(["mean", "sum"])
    return [
        a_call(
            *case,
            dense="dense" in case,
            reduction=next(sums) if "none" not in case else "none",
            seed=1,
            **more,
        )
        for case in cases
    ]


@pytest.mark.parametrize(
    ("cases", "rule"),
    [(CASES[:12], "vjp"), slow(CASES[12:], "vjp"), slow(CASES[:12], "jvp")],
    ids=["vjp-first half", "vjp-second half", "jvp-first half"],
)
def test_option_cases(cases, rule):
    run_and_check(outside, calls_of(cases, rule=rule), make_mesh(2, 4), "data", "model")


def test_loss_with_gradient():
    cases = [tuple(name for name in case if name != "none") for case in CASES[12:]]
    run_and_check(with_gradient, calls_of(cases), make_mesh(2, 4), "data", "model")


def mixed(rule="vjp", **options):
    """Three calls: every option (for dense targets, all but ignore_index) and every reduction."""
    return [
        a_call(*EVERY, rule=rule, reduction="mean", **options),
        a_call(*EVERY_OF_LOGITS, dense=True, rule=rule, reduction="none", **options),
        a_call(*EVERY_MASKED, rule=rule, reduction="sum", **options),
    ]


@vjp_by_default
def test_gradient_inside(rule):
    run_and_check(inside, mixed(rule, seed=3), make_mesh(2, 4), "data", "model")


@pytest.mark.parametrize(
    ("rows", "classes"),
    [
        slow("a", None),
        (None, "a"),
        (("a", "c"), None),
        slow(None, ("b", "a")),
        ("b", ("c", "a")),
        slow(("c", "b"), "a"),
    ],
)
def test_one_axis_or_several(rows, classes):
    """Rows, classes or both are sharded. A tuple has the order of the array's specification."""
    mesh = make_mesh(2, 2, 2, names=("a", "b", "c"))
    calls = mixed()
    functions = [
        transform(call, mesh, rows, classes)
        for transform, call in zip([with_gradient, inside, outside], calls, strict=True)
    ]
    check(calls, run(functions, calls))


def test_class_axis_that_is_not_the_last():
    """Logits [B, K, H], sharded over B and K."""
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((4, 8, 3)).astype(np.float32)
    labels = rng.integers(8, size=(4, 3))
    mesh, options = make_mesh(2, 4), {"axis": 1, "z_loss": 0.1}

    def both(logits, labels):
        return sxe.softmax_cross_entropy_with_gradient(
            logits, labels, axis_name="model", batch_axis_name="data", **options
        )

    x = P("data", "model")
    split = jax.shard_map(both, mesh=mesh, in_specs=(x, P("data")), out_specs=(P(), x))
    value, gradient = jax.jit(split)(logits, labels)
    assert_close(value, oracle.loss(logits, labels, **options))
    assert_close(gradient, oracle.gradient(logits, labels, **options))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        calls = [
            a_call(*EVERY_OF_LOGITS, dense=dense, rule=rule, dtype=dtype)
            for rule, dense in [("vjp", False), ("vjp", True), ("jvp", True), ("autodiff", False)]
        ]
        run_and_check(outside, calls, make_mesh(2, 4), "data", "model")


@vjp_by_default
def test_without_varying_types(rule):
    """check_vma=False, with the gradient outside."""
    run_and_check(outside, mixed(rule, seed=5), make_mesh(2, 4), "data", "model", check_vma=False)


def test_value_with_gradient_without_varying_types():
    """The closed form needs no autodiff, and so no varying types."""
    c = a_call(*EVERY)
    loss = over_shards(
        c,
        make_mesh(2, 4),
        "data",
        "model",
        function=lambda logits, labels, given: sxe.softmax_cross_entropy_with_gradient(
            logits, labels, axis_name="model", batch_axis_name="data", **(c.options | given)
        ),
        out=(P(), P("data", "model")),
        check_vma=False,
    )
    check([c._replace(g=1.0)], [jax.jit(loss)(*c.arrays[:-1])])


def gradients_of_the_rest(loss):
    """The gradients for dense targets and for all options that are arrays."""

    def of(logits, labels, given, g):
        def scalar(differentiable):
            labels_, given = differentiable
            return jnp.sum(g * loss(logits, labels if labels_ is None else labels_, given))

        dense = labels if labels.ndim == 2 else None
        return jax.grad(scalar)((dense, given))

    return of


def expected_gradients_of_the_rest(call):
    def of_option(name):
        def scalar(value):
            options = call.options | {name: value}
            loss = oracle.loss(call.logits, call.labels, reduction=call.reduction, **options)
            return np.sum(call.g * loss)

        return numerical_gradient(scalar, call.options[name])

    def of_targets(targets):
        loss = oracle.loss(call.logits, targets, reduction=call.reduction, **call.options)
        return np.sum(call.g * loss)

    dense = numerical_gradient(of_targets, call.labels) if call.labels.ndim == 2 else None
    return dense, {name: of_option(name) for name in call.options}


@vjp_by_default
def test_gradients_of_the_rest(rule):
    """For dense targets, weights, class weights, label smoothing and z-loss."""
    mesh = make_mesh(2, 4)
    functions, calls = [], []
    for dense, reduction, way in [
        (False, "mean", "inside"),
        (True, "none", "inside"),
        (True, "mean", "outside"),
        (False, "none", "outside, no varying types"),
        (True, "none", "outside, no varying types"),
    ]:
        c = a_call("weights", "class_weights", dense=dense, rule=rule, reduction=reduction, seed=6)
        # A central difference must not cross a weight of 0, where a row starts to count.
        c.options["weights"] += np.float32(1)
        c.options["label_smoothing"] = np.array(0.1, np.float32)
        c.options["z_loss"] = np.array(0.2, np.float32)
        calls.append(c)
        if way == "inside":
            function = gradients_of_the_rest(c.loss(axis_name="model", batch_axis_name="data"))
            layout = specs(c, "data", "model")
            out = layout[1] if dense else None, layout[2]
            functions.append(jax.shard_map(function, mesh=mesh, in_specs=layout, out_specs=out))
        else:
            loss = over_shards(c, mesh, "data", "model", check_vma=way == "outside")
            functions.append(gradients_of_the_rest(loss))
    for c, actual in zip(calls, run(functions, calls), strict=True):
        expected = expected_gradients_of_the_rest(c)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for (path, a), e in zip(
            jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
        ):
            with naming(c.reduction, jax.tree_util.keystr(path)):
                assert_close(a, e)


# Edge cases. Each has its own row, so that a leak into another row is seen.


@each_value(rule=RULES, dense={"integer": False, "dense": True})
def test_infinities_and_bad_labels(rule, dense):
    c = a_call(reduction="none", rule=rule, seed=7)
    logits, labels = c.logits, c.labels
    logits[0, 6:12] = -np.inf  # one shard has nothing
    labels[0] = 2
    logits[1, :18] = -np.inf  # one shard has everything
    labels[1] = 20
    logits[2, 5] = -np.inf  # the label cannot occur
    labels[2] = 5
    logits[3] = -np.inf
    logits[4, 7] = np.inf
    logits[5, 23] = np.nan
    bad = [3, 4, 5]
    if dense:
        c = c._replace(labels=np.eye(K, dtype=np.float32)[labels])
    else:
        bad += [6, 7]
        labels[6:] = -1, K
    with np.errstate(invalid="ignore"):
        good = c._replace(labels=np.where(np.isin(range(N), bad), 0, labels))
        value, gradient = good.expected()
    assert value[2] == np.inf
    assert gradient[2, 5] == -c.g[2]
    value[bad] = gradient[bad] = np.nan

    for transform in inside, outside:
        (actual,) = run([transform(c, make_mesh(2, 4), "data", "model")], [c])
        with naming(transform.__name__):
            assert_close(actual[0], value)
            assert_close(actual[1], gradient)


@vjp_by_default
def test_rows_that_do_not_count(rule):
    """Their contents have no influence, even if one device, or all, has no rows that count."""
    logits, labels, _, _, _, g = c = a_call(reduction="none", rule=rule, seed=8)
    logits[1] = np.nan
    logits[2, 3] = np.inf
    logits[5] = -np.inf
    labels[6] = K + 3
    rows = ~np.isin(range(N), [1, 2, 5, 6])
    half = rows & (np.arange(N) < 4)
    classes = np.broadcast_to(rows[:, None], (N, K))
    calls = [
        c._replace(
            options={"where": mask}, reduction=reduction, g=g if reduction == "none" else 1.0
        )
        for mask, reduction in zip(
            [rows, half, rows & False, classes, classes & False],
            ["none", "mean", "mean", "sum", "mean"],
            strict=True,
        )
    ]
    functions = [outside(call, make_mesh(2, 4), "data", "model") for call in calls]
    for call_, (value, gradient) in zip(calls, run(functions, calls), strict=True):
        mask = call_.options["where"]
        counts = mask if mask.ndim == 1 else mask.any(-1)
        clean = call_._replace(
            logits=np.where(counts[:, None], logits, 0), labels=np.where(counts, labels, 0)
        )
        expected_value, expected_gradient = clean.expected()
        with naming(call_.reduction, mask):
            assert_close(value, expected_value)
            assert_close(gradient, expected_gradient)
            assert not np.asarray(gradient)[~counts].any()


def test_label_that_is_masked_out():
    """A shard has the label's class but masks it: the loss of the row is infinite."""
    c = a_call("where_class", reduction="none", seed=9)
    c.options["where"][4, c.labels[4]] = False
    value, gradient = c.expected()
    assert value[4] == np.inf
    ((actual_value, actual_gradient),) = run([outside(c, make_mesh(1, 8), "data", "model")], [c])
    assert_close(actual_value, value)
    assert_close(actual_gradient, gradient)


EXACT = {
    "offset 1e8": lambda x: np.round(x) * 8 + 1e8,
    "lead of 40": lambda x: np.where(np.arange(64) == 33, x.max() + 40, x),
    "lead of 80 in a tie": lambda x: np.where(np.isin(range(64), [8, 33]), x.max() + 80, x),
    "scale 80": lambda x: 25 * x,
}


@every_rule
def test_digits_of_extreme_rows(rule):
    """The precision is that of unsharded logits, compared with 60-digit arithmetic."""
    x = np.random.default_rng(10).standard_normal(64)
    logits = np.stack([row(x) for row in EXACT.values()]).repeat(2, 0).astype(np.float32)
    labels = np.array([33, 3] * len(EXACT))
    targets = np.eye(64, dtype=np.float32)[labels]
    exact = list(map(oracle.exact_row, logits, targets))
    calls = [Call(logits, y, {}, "none", rule, np.ones(8, np.float32)) for y in (labels, targets)]
    mesh = make_mesh(1, 8)
    program = jax.jit(all_of([outside(call, mesh, None, "model") for call in calls]))
    results = program([call.arrays for call in calls])
    for kind, (value, gradient) in zip(["integer", "dense"], results, strict=True):
        for i, (loss, d) in enumerate(exact):
            with naming(kind, list(EXACT)[i // 2], i % 2):
                if loss > SMALLEST:
                    assert oracle.relative_error(value[i], loss) < LOSS_BAR
                for actual, d_l in zip(np.asarray(gradient[i]), d, strict=True):
                    if abs(d_l) > SMALLEST:
                        assert oracle.relative_error(actual, d_l) < GRADIENT_BAR


def test_equal_logits():
    """2048 equal logits over all shards."""
    logits = np.repeat(np.array([[1e7], [1e30]], np.float32), 2048, axis=1)
    labels = np.array([0, 1500])
    calls = [Call(logits, labels, {}, "none", rule, np.ones(2, np.float32)) for rule in RULES]
    functions = [outside(c, make_mesh(1, 8), None, "model") for c in calls]
    expected = 1 / 2048 - np.eye(2048)[labels]
    for value, gradient in run(functions, calls):
        np.testing.assert_allclose(value, math.log(2048), rtol=LOSS_BAR)
        # The quotient of exact numbers, as precise as a loss
        np.testing.assert_allclose(gradient, expected, rtol=LOSS_BAR)
        np.testing.assert_allclose(np.sum(gradient, axis=-1), 0, atol=ZERO)


METRICS = sxe.Metrics(P(), P(), *[P("data")] * 5)


def check_metrics(call, loss, metrics):
    logits, labels, options, *_ = call
    x, _, counts, _, norm = oracle.rows(logits, labels, **options)
    assert_close(loss, oracle.loss(logits, labels, **options))
    assert_close(metrics.loss_sum, oracle.loss(logits, labels, reduction="sum", **options))
    assert_close(metrics.weight_sum, (norm * counts).sum())
    oracle.check_rows_metrics(metrics, x, counts, labels)


@every_rule
def test_metrics(rule):
    """The first of the largest logits is the prediction, whichever shard has it."""
    c = a_call(*EVERY, rule=rule, seed=11)
    top = np.float32(20)
    c.logits[0, [5, 6, 23]] = top
    c.logits[1, [12, 18]] = top
    c.logits[2] = top
    c.logits[3, [7, 8]] = top
    c.logits[4, [0, 23]] = top
    c.options["weights"][1] = 1
    mesh = make_mesh(2, 4)

    def metrics(logits, labels, given):
        options = c.options | given | {"axis_name": "model", "batch_axis_name": "data"}
        loss, first = sxe.softmax_cross_entropy(
            logits, labels, return_metrics=True, rule=rule, **options
        )
        (again, second), _ = sxe.softmax_cross_entropy_with_gradient(
            logits, labels, return_metrics=True, **options
        )
        return (loss, first), (again, second)

    out = ((P(), METRICS),) * 2
    split = over_shards(c, mesh, "data", "model", function=metrics, out=out)
    for loss, found in jax.jit(split)(*c.arrays[:-1]):
        check_metrics(c, loss, found)


def test_sums_make_the_mean_over_shards():
    """Without batch_axis_name, metrics are for the rows of this device. The caller adds them."""
    c = a_call("weights", "where")

    def mean(logits, labels, given):
        _, metrics = sxe.softmax_cross_entropy(
            logits, labels, axis_name="model", return_metrics=True, **given
        )
        loss, weight = jax.lax.psum((metrics.loss_sum, metrics.weight_sum), "data")
        return loss / weight

    split = over_shards(c, make_mesh(2, 4), "data", "model", function=mean, out=P())
    assert_close(jax.jit(split)(*c.arrays[:-1]), c.expected()[0])


# Forward mode and second derivatives


@pytest.mark.parametrize("rule", ["jvp", "autodiff"])
def test_forward_mode(rule):
    """jvp and linearize, inside and outside shard_map."""
    c = a_call(*EVERY_OF_LOGITS, dense=True, rule=rule)._replace(g=np.float32(1))
    mesh = make_mesh(2, 4)
    loss = c.loss(axis_name="model", batch_axis_name="data")
    tangent = np.random.default_rng(12).standard_normal((N, K)).astype(np.float32)

    def jvp(loss):
        def of(logits, labels, given, tangent):
            pair = jax.jvp(lambda x: loss(x, labels, given), (logits,), (tangent,))
            value, linear = jax.linearize(lambda x: loss(x, labels, given), logits)
            return *pair, value, linear(tangent)

        return of

    layout = (*specs(c, "data", "model")[:-1], P("data", "model"))
    within = jax.shard_map(jvp(loss), mesh=mesh, in_specs=layout, out_specs=(P(),) * 4)
    around = jvp(over_shards(c, mesh, "data", "model"))
    value, gradient = c.expected()
    for result in run([within, around], [c, c], lambda c: (*c.arrays[:-1], tangent)):
        for actual, slope in [result[:2], result[2:]]:
            assert_close(actual, value)
            assert_close(slope, np.vdot(gradient, tangent), scale=np.abs(gradient * tangent).sum())


@every_rule
def test_hessian(rule):
    """The Hessian outside. Inside, its product with a vector that is sharded like the logits."""
    with jax.enable_x64(True):
        c = a_call(*EVERY_OF_LOGITS, rule=rule, dtype="float64", seed=13)
        c = c._replace(logits=c.logits[:, :4], labels=c.labels % 4, g=np.float64(1))
        for name in ("class_weights", "class_mask"):
            c.options[name] = c.options[name][:4]
        c = c._replace(labels=np.where(c.options["class_mask"][c.labels], c.labels, 0))
        mesh = make_mesh(2, 4)
        vector = np.random.default_rng(14).standard_normal((N, 4))

        def product(logits, labels, given, vector):
            loss = c.loss(axis_name="model", batch_axis_name="data")
            gradient = jax.grad(lambda x: loss(x, labels, given))
            return jax.jvp(gradient, (logits,), (vector,))[1]

        x = P("data", "model")
        layout = (*specs(c, "data", "model")[:-1], x)
        within = jax.shard_map(product, mesh=mesh, in_specs=layout, out_specs=x)
        around = over_shards(c, mesh, "data", "model")
        hv, h = run(
            [within, lambda logits, labels, given, _: jax.hessian(around)(logits, labels, given)],
            [c, c],
            lambda c: (*c.arrays[:-1], vector),
        )

        def gradient(logits):
            return c._replace(logits=logits).expected()[1]

        step = 1e-4 * np.eye(N * 4).reshape(N, 4, N, 4)
        expected = np.zeros((N, 4, N, 4))
        for i in np.ndindex(N, 4):
            expected[i] = (gradient(c.logits + step[i]) - gradient(c.logits - step[i])) / 2e-4
        np.testing.assert_allclose(h, expected, atol=CENTRAL_DIFFERENCES)
        np.testing.assert_allclose(hv, np.tensordot(expected, vector, 2), atol=CENTRAL_DIFFERENCES)


@pytest.mark.parametrize(
    "function", [sxe.softmax_cross_entropy, sxe.softmax_cross_entropy_with_gradient]
)
class TestWrongUse:
    c = a_call()

    def call(self, function, match, layout, **options):
        logits, labels = self.c.logits, self.c.labels
        loss = jax.shard_map(
            lambda x, y: function(x, y, **options),
            mesh=make_mesh(2, 4),
            in_specs=(layout, P(layout[0])),
            out_specs=P(),
        )
        with pytest.raises(ValueError, match=match):
            jax.jit(loss)(logits, labels)

    def test_no_shard_map(self, function):
        for name in "axis_name", "batch_axis_name":
            with pytest.raises(ValueError, match=rf"^{name}: .*shard_map.*'model'"):
                function(self.c.logits, self.c.labels, **{name: "model"})

    def test_no_such_axis(self, function):
        x = P("data", "model")
        self.call(function, "^axis_name: .*shard_map.*'other'", x, axis_name="other")
        self.call(function, "^axis_name: .*'other'", x, axis_name=("model", "other"))

    def test_replicated_logits(self, function):
        x = P("data", None)
        self.call(function, "^axis_name: .*shards.*'model'.*replicated", x, axis_name="model")
        x = P(None, "model")
        self.call(function, "^batch_axis_name: .*'data'.*replicated", x, batch_axis_name="data")
        self.call(function, "^axis_name: .*'data'.*replicated", x, axis_name=("model", "data"))

    def test_one_axis_for_both(self, function):
        x = P("data", "model")
        options = {"axis_name": "model", "batch_axis_name": ("data", "model")}
        self.call(function, "^batch_axis_name: .*axis_name.*'model'", x, **options)


# 2. jit on global arrays, which JAX shards

LAYOUTS = {
    "rows": ("data", None),
    "classes": (None, "model"),
    "both": ("data", "model"),
    "neither": (None, None),
    "classes over two": (None, ("data", "model")),
}


def at_once(call):
    def both(logits, labels, given, g):
        value, gradient = sxe.softmax_cross_entropy_with_gradient(
            logits, labels, reduction=call.reduction, **(call.options | given)
        )
        return value, gradient * g.astype(gradient.dtype)

    return both


def placed(mesh, rows, classes, replicated=()):
    """Place the arrays of a call on the mesh."""

    def place(call):
        logits, labels, given, g = specs(call, rows, classes)
        given = {name: P() if name in replicated else spec for name, spec in given.items()}
        layout = logits, P() if "labels" in replicated else labels, given, g
        return jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), call.arrays, layout
        )

    return place


@each_value(layout=list(LAYOUTS), kind=["auto", "explicit"])
def test_global_arrays(kind, layout):
    mesh, context = use_mesh(kind)
    rows, classes = LAYOUTS[layout]
    # Across the layouts, every rule is used with every kind of targets.
    i = list(LAYOUTS).index(layout)
    rules = RULES[i % 3 :] + RULES[: i % 3]
    calls = [mixed(rule, seed=15)[j] for j, rule in enumerate(rules)]
    functions = [globally(call) for call in calls] + [at_once(calls[0])]
    calls += calls[:1]
    with context:
        results = run(functions, calls, placed(mesh, rows, classes))
    check(calls, results)
    if kind == "explicit":
        for call_, (value, gradient) in zip(calls, results, strict=True):
            assert jax.typeof(gradient).sharding.spec == P(rows, classes)
            if call_.reduction == "none":
                assert jax.typeof(value).sharding.spec == P(rows)


@each_value(kind=KINDS, replicated=[["class_weights"], ["labels", "where", "weights"]])
def test_replicated_arrays(kind, replicated):
    """Logits are sharded, and some of the other arrays are replicated."""
    mesh, context = use_mesh(kind)
    calls = [*mixed(seed=16), a_call(), a_call(dense=True)]
    with context:
        results = run(map(globally, calls), calls, placed(mesh, "data", "model", replicated))
    check(calls, results)


@pytest.mark.parametrize("layout", ["classes", "both"])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_global_metrics(kind, layout):
    mesh, context = use_mesh(kind)
    c = a_call("where", "weights", "ignore_index", seed=17)
    c.logits[0, [5, 6, 23]] = c.logits[1, [12, 18]] = 20
    c.options["weights"][1] = 1
    c.options["return_metrics"] = True
    with context:
        logits, labels, given, _ = placed(mesh, *LAYOUTS[layout])(c)
        loss, metrics = jax.jit(c.loss())(logits, labels, given)
    del c.options["return_metrics"]
    check_metrics(c, loss, metrics)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    ("shape", "axis", "layout"),
    [
        ((4, 8, 3), 1, P("data", "model", None)),
        ((4, 8, 3), 1, P(None, "data", None)),
        ((8, 3, 4), 0, P("model", None, "data")),
        ((4, 3, 8), (2, 1), P("data", None, None)),
    ],
)
def test_global_class_axis(kind, shape, axis, layout):
    mesh, context = use_mesh(kind)
    rng = np.random.default_rng(18)
    logits = rng.standard_normal(shape).astype(np.float32)
    axes = axis if isinstance(axis, tuple) else (axis,)
    rows = [i for i in range(3) if i not in axes]
    labels = rng.integers(shape[axes[0]], size=[shape[i] for i in rows])
    sparse = Call(logits, labels, {"axis": axis, "z_loss": 0.1}, g=np.float32(1))
    dense = sparse._replace(labels=rng.random(shape).astype(np.float32))

    def place(call):
        rows_only = P(*(layout[i] for i in rows))
        labels = jax.device_put(
            call.labels, NamedSharding(mesh, layout if call is dense else rows_only)
        )
        return jax.device_put(call.logits, NamedSharding(mesh, layout)), labels, {}, call.g

    calls = [sparse, dense]
    with context:
        results = run(map(globally, calls), calls, place)
    check(calls, results)


# 3. Communication in the compiled program


def compiled(functions, calls, place=lambda call: call.arrays):
    program = jax.jit(all_of(functions)).lower([place(call) for call in calls])
    return program.compile().as_text()


def test_collectives_finds_every_form():
    hlo = """
      %p = f32[4,6]{1,0} parameter(0)
      %q = (f32[2]{0}, bf16[5,7]{1,0}) fusion(%p), kind=kLoop
      %a = f32[4]{0} all-reduce(%x), to_apply=%add
      ROOT %b = (f32[3]{0:T(128)}, f32[4,5]{1,0:T(8,128)}) all-reduce-start(%x, %y), to_apply=%add
      %c = f32[2]{0} reduce-scatter(%p), dimensions={0}
      %d = (f32[3]{0}, f32[12]{0}) all-gather-start(f32[3]{0} %x), dimensions={0}
      %e = pred[] all-to-all(%q), dimensions={0}
      %f = u32[8]{0} collective-permute(%a), source_target_pairs={{0,1}}
      %g = f32[99]{0} all-reduce-done(%b)
    """
    assert [(c.opcode, c.size, c.bytes, c.in_loop) for c in collectives(hlo)] == [
        ("all-reduce", 4, 16, False),
        ("all-reduce", 20, 92, False),
        ("reduce-scatter", 24, 96, False),
        ("all-gather", 12, 60, False),
        ("all-to-all", 35, 78, False),
        ("collective-permute", 8, 32, False),
    ]


def test_collectives_finds_loops():
    mesh = make_mesh(8, names=("data",))

    def summed(x):
        def step(i, total):
            return total + jax.lax.psum(x * total, "data")

        return jax.lax.psum(jax.lax.fori_loop(0, 3, step, jnp.ones(2)), "data")

    f = jax.shard_map(summed, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    found = collectives(jax.jit(f).lower(np.ones(16, np.float32)).compile().as_text())
    assert {c.times for c in found} == {None, 3}


def test_collectives_finds_gathered_logits():
    mesh = make_mesh(2, 4)
    x = jax.device_put(np.ones((N, K), np.float32), NamedSharding(mesh, P("data", "model")))

    def gathered(x):
        return jax.lax.with_sharding_constraint(jnp.exp(x), NamedSharding(mesh, P("data")))

    program = jax.jit(gathered).lower(x).compile().as_text()
    assert [(c.opcode, c.size) for c in collectives(program)] == [("all-gather", N // 2 * K)]


@pytest.mark.parametrize("kind", ["shard_map", slow("auto"), "explicit"])
def test_collectives_move_statistics_of_rows(kind):
    """One number per row, and gathered class weights, but no array with both rows and classes."""
    calls = [
        a_call(*names, dense=dense, rule=rule, reduction=reduction, seed=19, shape=(32, 256))
        for names, dense, reduction in [(EVERY, False, "mean"), (EVERY_OF_LOGITS, True, "none")]
        for rule in RULES
    ]
    if kind == "shard_map":
        layout = make_mesh(2, 4), "data", "model"
        functions = [outside(call, *layout) for call in calls]
        functions += [inside(calls[0], *layout), with_gradient(calls[0], *layout)]
        found = collectives(compiled(functions, [*calls, calls[0], calls[0]]))
    else:
        mesh, context = use_mesh(kind)
        functions = [globally(call) for call in calls] + [at_once(calls[0])]
        with context:
            hlo = compiled(functions, [*calls, calls[0]], placed(mesh, "data", "model"))
        found = collectives(hlo)
    assert found
    for c in found:
        assert c.size <= (256 if c.opcode == "all-gather" else 32), found
