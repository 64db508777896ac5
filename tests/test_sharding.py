"""The loss on a mesh: in shard_map, and under jit on Auto and on Explicit meshes."""

import contextlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import sxe

RULES = ("vjp", "jvp", "autodiff")
N, K = 8, 24  # what 1, 2, 4 and 8 devices divide; a shard holds 3, 6, 12 or 24 classes


def make_mesh(*shape, names=("data", "model"), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


# A case is a call of the loss. Its numbers are part of the program, its arrays are not.


class Case(NamedTuple):
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


# "where_class" is where with the shape of the logits.
ALL_DENSE = ["where", "weights", "class_weights", "label_smoothing", "z_loss"]
ALL_INTEGER = [*ALL_DENSE, "ignore_index"]
# Smoothing gives a class that is masked out a target, which costs infinity.
ALL_MASKED = ["where_class", "weights", "class_weights", "z_loss"]


def case(*names, dense=False, reduction="mean", rule="vjp", dtype="float32", seed=0, shape=(N, K)):
    """Random logits and labels, with random values for the options named."""
    rows, classes = shape
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    wide = np.dtype("float64") if dtype == "float64" else np.dtype("float32")
    labels = rng.integers(classes, size=rows).astype(np.int32)
    mask = rng.random(shape) < 0.7
    mask[range(rows), labels] = True
    values = {
        "where": rng.random(rows) < 0.8,
        "where_class": mask,
        "weights": (rng.random(rows) + 0.1).astype(wide),
        "class_weights": (rng.random(classes) + 0.1).astype(wide),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "ignore_index": int(labels[1]),
    }
    values["weights"][3] = 0
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    if dense:
        labels = rng.random(shape).astype(dtype)
        if "where_class" in names:
            labels = np.where(mask, labels, 0)
    options = {name.removesuffix("_class"): values[name] for name in names}
    g = rng.standard_normal((rows,) if reduction == "none" else ()).astype(wide)
    return Case(logits, labels, options, reduction, rule, g)


def spec(value, rows, classes, option=None):
    """How an array of a case lies on a mesh that splits rows and classes along these axes."""
    axes = {0: (), 1: (classes if option == "class_weights" else rows,), 2: (rows, classes)}
    return P(*axes[np.ndim(value)])


def specs(case, rows, classes):
    _, labels, given, g = case.arrays
    given = {k: spec(v, rows, classes, k) for k, v in given.items()}
    return P(rows, classes), spec(labels, rows, classes), given, spec(g, rows, classes)


def value_and_gradient(loss, logits, labels, given, g):
    def scalar(logits):
        value = loss(logits, labels, given)
        return jnp.sum(g * value), value

    (_, value), gradient = jax.value_and_grad(scalar, has_aux=True)(logits)
    return value, gradient


def globally(case):
    """Value and gradient of the loss on global arrays."""
    return lambda *arrays: value_and_gradient(case.loss(), *arrays)


def over_shards(case, mesh, rows, classes, *, function=None, out=None, **options):
    """A function of logits, labels and the other arrays, in shard_map; the loss, if none given."""
    function = function or case.loss(axis_name=classes, batch_axis_name=rows)
    if out is None:
        out = P(rows) if case.reduction == "none" else P()
    inputs = specs(case, rows, classes)[:-1]
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=out, **options)


def outside(case, mesh, rows, classes, **options):
    """Value and gradient of the loss in shard_map."""
    loss = over_shards(case, mesh, rows, classes, **options)
    return lambda *arrays: value_and_gradient(loss, *arrays)


def inside(case, mesh, rows, classes):
    """Value and gradient, in shard_map."""
    loss = case.loss(axis_name=classes, batch_axis_name=rows)
    return jax.shard_map(
        lambda *arrays: value_and_gradient(loss, *arrays),
        mesh=mesh,
        in_specs=specs(case, rows, classes),
        out_specs=(P(rows) if case.reduction == "none" else P(), P(rows, classes)),
    )


def with_gradient(case, mesh, rows, classes):
    """Value and gradient in one pass, in shard_map; the gradient scaled by the case's cotangent."""
    options = {"reduction": case.reduction, "axis_name": classes, "batch_axis_name": rows}

    def both(logits, labels, given, g):
        value, gradient = sxe.softmax_cross_entropy_with_gradient(
            logits, labels, **(options | case.options | given)
        )
        return value, gradient * g.astype(gradient.dtype)

    return jax.shard_map(
        both,
        mesh=mesh,
        in_specs=specs(case, rows, classes),
        out_specs=(P(), P(rows, classes)),
    )


@contextlib.contextmanager
def naming(*what):
    """Says in an error's notes what it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(" ".join(map(str, what)))
        raise


# A third of these tests' time would go to what LLVM does after XLA has split the program.
QUICK = {"compiler_options": {"xla_backend_optimization_level": 0}}


def one_program(functions, **options):
    def program(arrays):
        return [f(*a) for f, a in zip(functions, arrays, strict=True)]

    return jax.jit(program, **options)


def run(functions, cases, place=lambda case: case.arrays):
    """The results of one program that holds all of these functions."""
    return one_program(functions, **QUICK)([place(case) for case in cases])


def check(cases, results):
    for case, (value, gradient) in zip(cases, results, strict=True):
        expected_value, expected_gradient = case.expected()
        with naming(case.rule, case.reduction, case.labels.dtype, *case.options):
            assert value.dtype == np.result_type(case.logits.dtype, np.float32)
            assert gradient.dtype == case.logits.dtype
            assert_close(value, expected_value)
            assert_close(gradient, expected_gradient)


def run_and_check(transform, cases, *layout, **options):
    check(cases, run([transform(case, *layout, **options) for case in cases], cases))


def numerical_gradient(f, x, step=1e-3):
    """Central differences of a scalar function that is all but linear in x."""
    x = np.asarray(x, np.float64)
    out = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        there, back = x.copy(), x.copy()
        there[i] += step
        back[i] -= step
        out[i] = (f(there) - f(back)) / (2 * step)
    return out


# 1. shard_map


@pytest.mark.parametrize("shape", [(1, 8), (4, 2), (8, 1)], ids=str)
def test_every_mesh(shape):
    """But for 2 x 4, which serves all other tests."""
    cases = [
        case(*ALL_INTEGER, rule="vjp", reduction="mean"),
        case(*ALL_DENSE, dense=True, rule="vjp", reduction="none"),
        case(*ALL_INTEGER, rule="jvp", reduction="none"),
        case(*ALL_DENSE, dense=True, rule="autodiff", reduction="sum"),
    ]
    run_and_check(outside, cases, make_mesh(*shape), "data", "model")


def option_sets(dense):
    every = ALL_DENSE if dense else ALL_INTEGER
    return [(), *((name,) for name in [*every, "where_class"]), every, ALL_MASKED]


@pytest.mark.parametrize(("rule", "dense"), [("vjp", False), ("vjp", True), ("jvp", False)])
def test_every_option(rule, dense):
    """Each alone, and all that go together: that is every pair of them."""
    reductions = ["mean", "sum", "none"] * 4
    cases = [
        case(*names, dense=dense, rule=rule, reduction=reduction, seed=1)
        for names, reduction in zip(option_sets(dense), reductions, strict=False)
    ]
    run_and_check(outside, cases, make_mesh(2, 4), "data", "model")


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
def test_loss_with_gradient(dense):
    reductions = ["mean", "sum"] * 5
    cases = [
        case(*names, dense=dense, reduction=reduction, seed=2)
        for names, reduction in zip(option_sets(dense), reductions, strict=False)
    ]
    run_and_check(with_gradient, cases, make_mesh(2, 4), "data", "model")


def mixed(rule="vjp", **options):
    """Every option but ignore_index with dense targets, every reduction, in three cases."""
    return [
        case(*ALL_INTEGER, rule=rule, reduction="mean", **options),
        case(*ALL_DENSE, dense=True, rule=rule, reduction="none", **options),
        case(*ALL_MASKED, rule=rule, reduction="sum", **options),
    ]


@pytest.mark.parametrize("rule", RULES)
def test_gradient_inside(rule):
    run_and_check(inside, mixed(rule, seed=3), make_mesh(2, 4), "data", "model")


@pytest.mark.parametrize(
    ("rows", "classes"),
    [
        ("a", None),
        (None, "a"),
        (("a", "c"), None),
        (None, ("b", "a")),
        ("b", ("c", "a")),
        (("c", "b"), "a"),
    ],
)
def test_one_axis_or_several(rows, classes):
    """Either argument alone and both, a tuple in the order of the array's specification."""
    mesh = make_mesh(2, 2, 2, names=("a", "b", "c"))
    cases = mixed()
    functions = [
        transform(case, mesh, rows, classes)
        for transform, case in zip([with_gradient, inside, outside], cases, strict=True)
    ]
    check(cases, run(functions, cases))


def test_class_axis_that_is_not_the_last():
    """Logits [B, K, H], sharded in B and K."""
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
        cases = [
            case(*ALL_DENSE, dense=dense, rule=rule, dtype=dtype)
            for rule, dense in [("vjp", False), ("vjp", True), ("jvp", True), ("autodiff", False)]
        ]
        run_and_check(outside, cases, make_mesh(2, 4), "data", "model")


@pytest.mark.parametrize("rule", RULES)
def test_without_varying_types(rule):
    """check_vma=False, differentiated outside."""
    run_and_check(outside, mixed(rule, seed=5), make_mesh(2, 4), "data", "model", check_vma=False)


def test_value_with_gradient_without_varying_types():
    """The closed form needs no autodiff, and so no types."""
    c = case(*ALL_INTEGER)
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
    """The gradients with respect to dense targets and all options that are arrays."""

    def of(logits, labels, given, g):
        def scalar(differentiable):
            labels_, given = differentiable
            return jnp.sum(g * loss(logits, labels if labels_ is None else labels_, given))

        dense = labels if labels.ndim == 2 else None
        return jax.grad(scalar)((dense, given))

    return of


def expected_gradients_of_the_rest(case):
    def of_option(name):
        def scalar(value):
            options = case.options | {name: value}
            loss = oracle.loss(case.logits, case.labels, reduction=case.reduction, **options)
            return np.sum(case.g * loss)

        return numerical_gradient(scalar, case.options[name])

    def of_targets(targets):
        loss = oracle.loss(case.logits, targets, reduction=case.reduction, **case.options)
        return np.sum(case.g * loss)

    dense = numerical_gradient(of_targets, case.labels) if case.labels.ndim == 2 else None
    return dense, {name: of_option(name) for name in case.options}


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_the_rest(rule):
    """With respect to dense targets, weights, class weights, the smoothing and the z-loss."""
    mesh = make_mesh(2, 4)
    functions, cases = [], []
    for dense, reduction, way in [
        (False, "mean", "inside"),
        (True, "none", "inside"),
        (True, "mean", "outside"),
        (False, "none", "outside, no varying types"),
        (True, "none", "outside, no varying types"),
    ]:
        c = case("weights", "class_weights", dense=dense, rule=rule, reduction=reduction, seed=6)
        # A central difference must not cross 0, where a row starts to count.
        c.options["weights"] += np.float32(1)
        c.options["label_smoothing"] = np.array(0.1, np.float32)
        c.options["z_loss"] = np.array(0.2, np.float32)
        cases.append(c)
        if way == "inside":
            function = gradients_of_the_rest(c.loss(axis_name="model", batch_axis_name="data"))
            layout = specs(c, "data", "model")
            out = layout[1] if dense else None, layout[2]
            functions.append(jax.shard_map(function, mesh=mesh, in_specs=layout, out_specs=out))
        else:
            loss = over_shards(c, mesh, "data", "model", check_vma=way == "outside")
            functions.append(gradients_of_the_rest(loss))
    for c, actual in zip(cases, run(functions, cases), strict=True):
        expected = expected_gradients_of_the_rest(c)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for (path, a), e in zip(
            jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
        ):
            with naming(c.reduction, jax.tree_util.keystr(path)):
                assert_close(a, e)


# Rows at the edges. Each is a row of its own, so that a leak into another shows.


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
@pytest.mark.parametrize("rule", RULES)
def test_infinities_and_bad_labels(rule, dense):
    c = case(reduction="none", rule=rule, seed=7)
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


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_do_not_count(rule):
    """Whatever stands in them, and when none is left, on one device or on all."""
    logits, labels, _, _, _, g = c = case(reduction="none", rule=rule, seed=8)
    logits[1] = np.nan
    logits[2, 3] = np.inf
    logits[5] = -np.inf
    labels[6] = K + 3
    rows = ~np.isin(range(N), [1, 2, 5, 6])
    half = rows & (np.arange(N) < 4)
    classes = np.broadcast_to(rows[:, None], (N, K))
    cases = [
        c._replace(
            options={"where": mask}, reduction=reduction, g=g if reduction == "none" else 1.0
        )
        for mask, reduction in zip(
            [rows, half, rows & False, classes, classes & False],
            ["none", "mean", "mean", "sum", "mean"],
            strict=True,
        )
    ]
    functions = [outside(case, make_mesh(2, 4), "data", "model") for case in cases]
    for case_, (value, gradient) in zip(cases, run(functions, cases), strict=True):
        mask = case_.options["where"]
        counts = mask if mask.ndim == 1 else mask.any(-1)
        clean = case_._replace(
            logits=np.where(counts[:, None], logits, 0), labels=np.where(counts, labels, 0)
        )
        expected_value, expected_gradient = clean.expected()
        with naming(case_.reduction, mask):
            assert_close(value, expected_value)
            assert_close(gradient, expected_gradient)
            assert not np.asarray(gradient)[~counts].any()


def test_label_that_is_masked_out():
    """A shard that holds the label's class but may not use it: the row costs infinity."""
    c = case("where_class", reduction="none", seed=9)
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


@pytest.mark.parametrize("rule", RULES)
def test_digits_of_extreme_rows(rule):
    """As many as unsharded, where 60-digit arithmetic is the judge as well."""
    x = np.random.default_rng(10).standard_normal(64)
    logits = np.stack([row(x) for row in EXACT.values()]).repeat(2, 0).astype(np.float32)
    labels = np.array([33, 3] * len(EXACT))
    targets = np.eye(64, dtype=np.float32)[labels]
    exact = list(map(oracle.exact_row, logits, targets))
    cases = [Case(logits, y, {}, "none", rule, np.ones(8, np.float32)) for y in (labels, targets)]
    mesh = make_mesh(1, 8)
    program = one_program([outside(case, mesh, None, "model") for case in cases])
    results = program([case.arrays for case in cases])
    for kind, (value, gradient) in zip(["integer", "dense"], results, strict=True):
        for i, (loss, d) in enumerate(exact):
            with naming(kind, list(EXACT)[i // 2], i % 2):
                if loss > 1e-37:
                    assert oracle.relative_error(value[i], loss) < 1e-6
                for actual, d_l in zip(np.asarray(gradient[i]), d, strict=True):
                    if abs(d_l) > 1e-37:
                        assert oracle.relative_error(actual, d_l) < 2e-5


def test_equal_logits():
    """2048 of them, over all shards."""
    logits = np.repeat(np.array([[1e7], [1e30]], np.float32), 2048, axis=1)
    labels = np.array([0, 1500])
    cases = [Case(logits, labels, {}, "none", rule, np.ones(2, np.float32)) for rule in RULES]
    functions = [outside(c, make_mesh(1, 8), None, "model") for c in cases]
    expected = 1 / 2048 - np.eye(2048)[labels]
    for value, gradient in run(functions, cases):
        np.testing.assert_allclose(value, math.log(2048), rtol=1e-6)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)
        np.testing.assert_allclose(np.sum(gradient, axis=-1), 0, atol=1e-6)


METRICS = sxe.Metrics(P(), P(), P("data"), P("data"))


def check_metrics(case, loss, metrics):
    logits, labels, options, *_ = case
    *_, counts, _, norm = oracle.rows(logits, labels, **options)
    assert_close(loss, oracle.loss(logits, labels, **options))
    assert_close(metrics.loss_sum, oracle.loss(logits, labels, reduction="sum", **options))
    assert_close(metrics.weight_sum, (norm * counts).sum())
    lse = np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
    assert_close(metrics.lse, np.where(counts, lse, 0))
    np.testing.assert_array_equal(metrics.predictions, np.argmax(logits, axis=-1))
    assert metrics.predictions.dtype == np.int32


@pytest.mark.parametrize("rule", RULES)
def test_metrics(rule):
    """The first of the largest logits wins, in whichever shard it lies."""
    c = case(*ALL_INTEGER, rule=rule, seed=11)
    top = np.float32(20)
    c.logits[0, [5, 6, 23]] = top
    c.logits[1, [12, 18]] = top
    c.logits[2] = top
    c.logits[3, [7, 8]] = top
    c.logits[4, [0, 23]] = top
    c.options["weights"][3] = 1
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
    """Without batch_axis_name the metrics are of this device's rows, for the caller to add."""
    c = case("weights", "where")

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
    """jvp and linearize, inside and outside."""
    c = case(*ALL_DENSE, dense=True, rule=rule)._replace(g=np.float32(1))
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


@pytest.mark.parametrize("rule", RULES)
def test_hessian(rule):
    """The Hessian outside; inside, its product with a vector that is split as the logits are."""
    with jax.enable_x64(True):
        c = case(*ALL_DENSE, rule=rule, dtype="float64", seed=13)
        c = c._replace(logits=c.logits[:, :4], labels=c.labels % 4, g=np.float64(1))
        c.options["class_weights"] = c.options["class_weights"][:4]
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
        np.testing.assert_allclose(h, expected, atol=1e-8)
        np.testing.assert_allclose(hv, np.tensordot(expected, vector, 2), atol=1e-8)


@pytest.mark.parametrize(
    "function", [sxe.softmax_cross_entropy, sxe.softmax_cross_entropy_with_gradient]
)
class TestWrongUse:
    c = case()

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
        self.call(function, "^axis_name: .*splits.*'model'.*same", x, axis_name="model")
        x = P(None, "model")
        self.call(function, "^batch_axis_name: .*'data'.*same", x, batch_axis_name="data")
        self.call(function, "^axis_name: .*'data'.*same", x, axis_name=("model", "data"))

    def test_one_axis_for_both(self, function):
        x = P("data", "model")
        options = {"axis_name": "model", "batch_axis_name": ("data", "model")}
        self.call(function, "^batch_axis_name: .*axis_name.*'model'", x, **options)


# 2. jit on global arrays, which JAX splits

LAYOUTS = {
    "rows": ("data", None),
    "classes": (None, "model"),
    "both": ("data", "model"),
    "neither": (None, None),
    "classes over two": (None, ("data", "model")),
}


def at_once(case):
    def both(logits, labels, given, g):
        value, gradient = sxe.softmax_cross_entropy_with_gradient(
            logits, labels, reduction=case.reduction, **(case.options | given)
        )
        return value, gradient * g.astype(gradient.dtype)

    return both


def placed(mesh, rows, classes, replicated=()):
    """Puts the arrays of a case on the mesh."""

    def place(case):
        logits, labels, given, g = specs(case, rows, classes)
        given = {name: P() if name in replicated else spec for name, spec in given.items()}
        layout = logits, P() if "labels" in replicated else labels, given, g
        return jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), case.arrays, layout
        )

    return place


KINDS = ["auto", "auto, set_mesh", "explicit"]


def use_mesh(kind):
    """A mesh, and the context for the call. An Auto mesh serves without jax.set_mesh as well."""
    mesh = make_mesh(2, 4, kind=AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    return mesh, contextlib.nullcontext() if kind == "auto" else jax.set_mesh(mesh)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_global_arrays(kind, layout):
    mesh, context = use_mesh(kind)
    rows, classes = LAYOUTS[layout]
    # Over the layouts every rule meets every kind of targets.
    i = list(LAYOUTS).index(layout)
    rules = RULES[i % 3 :] + RULES[: i % 3]
    cases = [mixed(rule, seed=15)[j] for j, rule in enumerate(rules)]
    functions = [globally(case) for case in cases] + [at_once(cases[0])]
    cases += cases[:1]
    with context:
        results = run(functions, cases, placed(mesh, rows, classes))
    check(cases, results)
    if kind == "explicit":
        for case_, (value, gradient) in zip(cases, results, strict=True):
            assert jax.typeof(gradient).sharding.spec == P(rows, classes)
            if case_.reduction == "none":
                assert jax.typeof(value).sharding.spec == P(rows)


@pytest.mark.parametrize("replicated", [["class_weights"], ["labels", "where", "weights"]])
@pytest.mark.parametrize("kind", KINDS)
def test_replicated_arrays(kind, replicated):
    """Logits in parts, and some of the other arrays whole on every device."""
    mesh, context = use_mesh(kind)
    cases = [*mixed(seed=16), case(), case(dense=True)]
    with context:
        results = run(map(globally, cases), cases, placed(mesh, "data", "model", replicated))
    check(cases, results)


@pytest.mark.parametrize("layout", ["classes", "both"])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_global_metrics(kind, layout):
    mesh, context = use_mesh(kind)
    c = case("where", "weights", "ignore_index", seed=17)
    c.logits[0, [5, 6, 23]] = c.logits[1, [12, 18]] = 20
    c.options["weights"][3] = 1
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
    sparse = Case(logits, labels, {"axis": axis, "z_loss": 0.1}, g=np.float32(1))
    dense = sparse._replace(labels=rng.random(shape).astype(np.float32))

    def place(case):
        rows_only = P(*(layout[i] for i in rows))
        labels = jax.device_put(
            case.labels, NamedSharding(mesh, layout if case is dense else rows_only)
        )
        return jax.device_put(case.logits, NamedSharding(mesh, layout)), labels, {}, case.g

    cases = [sparse, dense]
    with context:
        results = run(map(globally, cases), cases, place)
    check(cases, results)


# 3. What the compiled program moves


def compiled(functions, cases, place=lambda case: case.arrays):
    program = one_program(functions).lower([place(case) for case in cases])
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


@pytest.mark.parametrize("kind", ["shard_map", "auto", "explicit"])
def test_collectives_move_statistics_of_rows(kind):
    """Nothing with both rows and classes: a number a row, and gathered class weights."""
    cases = [
        case(*names, dense=dense, rule=rule, reduction=reduction, seed=19, shape=(32, 256))
        for names, dense, reduction in [(ALL_INTEGER, False, "mean"), (ALL_DENSE, True, "none")]
        for rule in RULES
    ]
    if kind == "shard_map":
        layout = make_mesh(2, 4), "data", "model"
        functions = [outside(case, *layout) for case in cases]
        functions += [inside(cases[0], *layout), with_gradient(cases[0], *layout)]
        found = collectives(compiled(functions, [*cases, cases[0], cases[0]]))
    else:
        mesh, context = use_mesh(kind)
        functions = [globally(case) for case in cases] + [at_once(cases[0])]
        with context:
            hlo = compiled(functions, [*cases, cases[0]], placed(mesh, "data", "model"))
        found = collectives(hlo)
    assert found
    for c in found:
        assert c.size <= (256 if c.opcode == "all-gather" else 32), found
