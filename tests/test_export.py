"""jax.export: one program for all platforms, serialized to bytes, with symbolic sizes."""

import functools

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from option_cases import RULES
from oracle import assert_close
from tolerances import SAME_FLOAT32

import sxe

PLATFORMS = ["cpu", "cuda", "tpu"]
N, K = 5, 7

INTEGER = {
    "where": np.array([True, True, False, True, True]),
    "weights": np.array([1, 0.5, 2, 3, 0.1], np.float32),
    "class_weights": np.linspace(0.5, 2, K, dtype=np.float32),
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "ignore_index": 4,
}
DENSE = {name: INTEGER[name] for name in INTEGER if name != "ignore_index"}
MASKED = {"where": np.arange(N * K).reshape(N, K) % 5 > 0, "z_loss": 0.01}

CASES = {
    "integer": (False, {}),
    "dense": (True, {}),
    "integer, options": (False, INTEGER),
    "dense, options": (True, DENSE),
    "integer, masked classes": (False, MASKED),
}
each_case = pytest.mark.parametrize(("dense", "options"), CASES.values(), ids=CASES)

each_rule = pytest.mark.parametrize(
    ("rule", "dense"),
    [("vjp", False), ("vjp", True), ("jvp", False), ("jvp", True), ("autodiff", False)],
)


def data(dense, rows=N, dtype=np.float32, classes=K):
    rng = np.random.default_rng(rows)
    logits = (3 * rng.standard_normal((rows, classes))).astype(dtype)
    if dense:
        return logits, rng.random((rows, classes)).astype(dtype)
    return logits, np.arange(1, rows + 1, dtype=np.int32) % classes


def value_and_gradient(**options):
    """A function of the logits. Options that are arrays are constants of the program."""
    return jax.value_and_grad(lambda x, y: sxe.softmax_cross_entropy(x, y, **options))


def export_everywhere(f, *args):
    exported = export.export(jax.jit(f), platforms=PLATFORMS)(*args)
    assert list(exported.platforms) == PLATFORMS
    return exported


def through_bytes(exported, vjp_order=0):
    return export.deserialize(exported.serialize(vjp_order=vjp_order))


def check(actual, logits, labels, **options):
    value, gradient = actual
    assert gradient.dtype == logits.dtype
    assert_close(value, oracle.loss(logits, labels, **options))
    assert_close(gradient, oracle.gradient(logits, labels, **options))


@each_case
@pytest.mark.parametrize("rule", RULES)
def test_every_platform(rule, dense, options):
    logits, labels = data(dense)
    exported = export_everywhere(value_and_gradient(rule=rule, **options), logits, labels)
    check(exported.call(logits, labels), logits, labels, **options)


@each_rule
def test_round_trip(rule, dense):
    """A deserialized program gives the same numbers as a direct call."""
    options = DENSE if dense else INTEGER
    f = value_and_gradient(rule=rule, **options)
    logits, labels = data(dense)
    again = through_bytes(export_everywhere(f, logits, labels))
    for actual, expected in zip(
        again.call(logits, labels), jax.jit(f)(logits, labels), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=SAME_FLOAT32, atol=1e-7)


@each_rule
def test_gradient_of_the_exported_loss(rule, dense):
    """With vjp_order=1, the gradient is exported together with the loss."""
    logits, labels = data(dense)
    loss = export_everywhere(
        lambda x, y: sxe.softmax_cross_entropy(x, y, rule=rule), logits, labels
    )
    again = through_bytes(loss, vjp_order=1)
    check(jax.value_and_grad(again.call)(logits, labels), logits, labels)


@each_case
def test_loss_with_gradient(dense, options):
    logits, labels = data(dense)

    def both(logits, labels):
        return sxe.softmax_cross_entropy_with_gradient(
            logits, labels, reduction="sum", return_metrics=True, **options
        )

    exported = export_everywhere(both, logits, labels)
    (value, metrics), gradient = exported.call(logits, labels)
    check((value, gradient), logits, labels, reduction="sum", **options)
    assert_close(metrics.loss_sum, oracle.loss(logits, labels, reduction="sum", **options))
    others = {name: value for name, value in options.items() if name != "z_loss"}
    x, _, counts, *_ = oracle.rows(logits, labels, **others)
    oracle.check_rows_metrics(metrics, x, counts, None if dense else labels)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype):
    logits, labels = data(False, dtype=jnp.dtype(dtype))
    exported = export_everywhere(value_and_gradient(), logits, labels)
    check(exported.call(logits, labels), logits, labels)


@each_rule
def test_open_sizes(rule, dense):
    """One program for all numbers of rows and classes."""
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    options |= {} if dense else {"ignore_index": 2}
    n, k = export.symbolic_shape("n, k")
    x = jax.ShapeDtypeStruct((n, k), np.float32)
    y = x if dense else jax.ShapeDtypeStruct((n,), np.int32)
    w, c = jax.ShapeDtypeStruct((n,), np.float32), jax.ShapeDtypeStruct((k,), np.float32)

    def f(logits, labels, weights, class_weights):
        given = {"weights": weights, "class_weights": class_weights}
        return value_and_gradient(rule=rule, **options, **given)(logits, labels)

    exported = export_everywhere(f, x, y, w, c)
    for rows, classes in [(1, 2), (12, 3)]:
        logits, labels = data(dense, rows, classes=classes)
        weights = np.linspace(1, 2, rows, dtype=np.float32)
        class_weights = np.linspace(0.5, 1, classes, dtype=np.float32)
        given = {"weights": weights, "class_weights": class_weights}
        actual = exported.call(logits, labels, weights, class_weights)
        check(actual, logits, labels, **options, **given)


def test_open_sizes_round_trip():
    """Rows on two axes, with the class axis between them."""
    b, k, h = export.symbolic_shape("b, k, h")
    x, y = jax.ShapeDtypeStruct((b, k, h), np.float32), jax.ShapeDtypeStruct((b, h), np.int32)
    again = through_bytes(export_everywhere(value_and_gradient(axis=1), x, y))
    rng = np.random.default_rng(0)
    for rows, classes, columns in [(2, 5, 3), (4, 3, 1)]:
        logits = rng.standard_normal((rows, classes, columns)).astype(np.float32)
        labels = rng.integers(classes, size=(rows, columns)).astype(np.int32)
        check(again.call(logits, labels), logits, labels, axis=1)


@pytest.mark.parametrize("rule", RULES)
def test_shards(rule):
    """A program for eight devices."""
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    logits, labels = data(False, rows=4, classes=8)
    split = jax.shard_map(
        lambda x, y: sxe.softmax_cross_entropy(
            x, y, axis_name="model", batch_axis_name="data", rule=rule
        ),
        mesh=mesh,
        in_specs=(P("data", "model"), P("data")),
        out_specs=P(),
    )
    arrays = (
        jax.device_put(logits, NamedSharding(mesh, P("data", "model"))),
        jax.device_put(labels, NamedSharding(mesh, P("data"))),
    )
    exported = export_everywhere(jax.value_and_grad(split), *arrays)
    assert exported.nr_devices == 8
    check(jax.jit(exported.call)(*arrays), logits, labels)


ONE_DEVICE = """
import jax, jax.numpy as jnp, numpy as np, sxe
from jax import export
n, k = export.symbolic_shape("n, k")
shapes = jax.ShapeDtypeStruct((n, k), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)
exported = export.export(jax.jit(jax.grad(sxe.softmax_cross_entropy)))(*shapes)
logits, labels = jnp.eye(3, 5), jnp.array([0, 4, 2])
expected = jax.grad(sxe.softmax_cross_entropy)(logits, labels)
np.testing.assert_allclose(exported.call(logits, labels), expected, rtol=1e-6)
"""


def test_open_sizes_on_one_device():
    """In a separate process, where the number of classes may decide how they are summed."""
    fresh.run("-c", ONE_DEVICE)


# The head


D = 6

MASKS = {"where": np.bool_, "weights": np.float32}
OF_HEAD = {
    "bias": np.linspace(-1, 1, K, dtype=np.float32),
    "logit_scale": 0.7,
    "softcap": 5.0,
    "class_weights": INTEGER["class_weights"],
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "ignore_index": 4,
}

HEADS = {
    "chunks by default": ("b", {}, ()),
    "chunks of 5": ("b", {"chunk_size": 5}, ()),
    "rows in two axes, options": ("b, t", {"chunk_size": 5, **OF_HEAD}, ("where", "weights")),
    "16 times b": ("b, 16", {"chunk_size": 9, "z_loss": 0.01}, ("weights",)),
}
REDUCTIONS = ("mean", "sum", "none")


def head(options, hidden, kernel, labels, g, masks):
    """For each reduction, the value and the gradients for hidden states and kernel."""

    def loss(hidden, kernel, reduction):
        value = sxe.linear_softmax_cross_entropy(
            hidden, kernel, labels, reduction=reduction, **options, **masks
        )
        return (value * g if reduction == "none" else value).sum(), value

    f = jax.grad(loss, argnums=(0, 1), has_aux=True)
    return {reduction: f(hidden, kernel, reduction) for reduction in REDUCTIONS}


def of_head(rows, masks=(), hidden_size=D, classes=K):
    """Random arguments of ``head``, except for its options."""
    rng = np.random.default_rng(7)
    arrays = {
        "where": rng.uniform(size=rows) < 0.7,
        "weights": rng.uniform(size=rows).astype(np.float32),
    }
    return (
        rng.standard_normal((*rows, hidden_size)).astype(np.float32),
        rng.standard_normal((hidden_size, classes)).astype(np.float32),
        rng.integers(classes, size=rows).astype(np.int32),
        rng.standard_normal(rows).astype(np.float32),
        {name: arrays[name] for name in masks},
    )


def shapes_of_head(rows, masks=(), hidden_size=D, classes=K):
    shape = jax.ShapeDtypeStruct
    return (
        shape((*rows, hidden_size), np.float32),
        shape((hidden_size, classes), np.float32),
        shape(rows, np.int32),
        shape(rows, np.float32),
        {name: shape(rows, MASKS[name]) for name in masks},
    )


def check_head(actual, options, hidden, kernel, labels, g, masks):
    given = {n: v for n, v in options.items() if n not in ("rule", "chunk_size")} | masks
    for reduction, (gradients, value) in actual.items():
        expected = oracle.head_gradients(
            *(hidden, kernel, labels, g if reduction == "none" else 1.0),
            reduction=reduction,
            **given,
        )
        assert_close(value, oracle.head_loss(hidden, kernel, labels, reduction=reduction, **given))
        assert_close(gradients[0], expected["hidden"])
        assert_close(gradients[1], expected["kernel"])


slow = pytest.mark.slow
EVERY_HEAD = [(rule, case) for rule in RULES for case in HEADS]
QUICK = [
    ("vjp", "chunks by default"),
    ("vjp", "rows in two axes, options"),
    ("jvp", "chunks of 5"),
    ("autodiff", "chunks of 5"),
]


@pytest.mark.parametrize(
    ("rule", "case"),
    [pytest.param(*each, marks=() if each in QUICK else slow) for each in EVERY_HEAD],
)
def test_a_head_of_any_number_of_rows(rule, case):
    """One program for fewer rows than a chunk, for more, and for chunks that are not full."""
    spec, options, masks = HEADS[case]
    options = {"rule": rule, **options}
    rows = export.symbolic_shape(spec)
    f = functools.partial(head, options)
    again = through_bytes(export_everywhere(f, *shapes_of_head(rows, masks)))
    for size in [(1,), (13,)] if len(rows) == 1 else [(1, rows[1]), (3, rows[1])]:
        given = of_head(tuple(n if isinstance(n, int) else 7 for n in size), masks)
        check_head(again.call(*given), options, *given)


@pytest.mark.parametrize(
    "sizes",
    ["b, d, k", *(pytest.param(some, marks=slow) for some in ("b, d, 7", "b, 6, k", "13, d, k"))],
)
def test_a_head_of_any_size(sizes):
    options = {"chunk_size": 5} if sizes != "b, d, k" else {}
    rows, *others = export.symbolic_shape(sizes)
    f = functools.partial(head, options)
    exported = export_everywhere(f, *shapes_of_head((rows,), (), *others))
    given = of_head((13,))
    check_head(exported.call(*given), options, *given)


def test_the_metrics_of_a_head_of_any_number_of_rows():
    (b,) = export.symbolic_shape("b")

    def metrics(hidden, kernel, labels, g, masks):
        return sxe.linear_softmax_cross_entropy(
            hidden, kernel, labels, return_metrics=True, chunk_size=5, **masks
        )

    given = of_head((13,), ("weights",))
    hidden, kernel, labels, _, masks = given
    shapes = shapes_of_head((b,), ("weights",))
    value, found = through_bytes(export_everywhere(metrics, *shapes)).call(*given)
    assert isinstance(found, sxe.Metrics)
    logits = hidden.astype(np.float64) @ kernel
    assert_close(value, oracle.loss(logits, labels, **masks))
    assert_close(found.loss_sum, oracle.loss(logits, labels, reduction="sum", **masks))
    assert_close(found.weight_sum, masks["weights"].astype(np.float64).sum())
    oracle.check_rows_metrics(found, logits, np.ones(13, bool), labels)


@pytest.mark.parametrize(
    ("rule", "reduction"),
    [("vjp", "mean"), *(pytest.param(r, "none", marks=slow) for r in RULES)],
)
def test_a_head_of_any_number_of_rows_makes_no_logits_of_all(rule, reduction):
    (b,) = export.symbolic_shape("b")
    options = {"reduction": reduction, "rule": rule, "chunk_size": 64}

    def f(hidden, kernel, labels, g, masks):
        def loss(hidden, kernel):
            return sxe.linear_softmax_cross_entropy(hidden, kernel, labels, **options).sum()

        return jax.grad(loss, argnums=(0, 1))(hidden, kernel)

    exported = export.export(jax.jit(f))(*shapes_of_head((b,), (), 8, 512))
    program = jax.jit(exported.call).lower(*shapes_of_head((2048,), (), 8, 512)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2048 * 512 * 4 / 4
