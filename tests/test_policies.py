"""Labels out of range, rows that do not count, infinities and empty batches, in sections."""

import array
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.experimental import checkify
from option_cases import RULES, every_rule, one_in, vjp_by_default
from oracle import assert_close
from problems import floats, normal
from tolerances import CLOSENESS, GRADIENT_BAR, LOSS_BAR, SAME_FLOAT32, ZERO

import sxe

INF, NAN = np.inf, np.nan
# All rules for logits. The head shares their arithmetic: one rule is tested by default.
both_losses = pytest.mark.parametrize(
    ("head", "rule"),
    [
        *((False, rule) for rule in RULES),
        (True, "vjp"),
        *(pytest.param(True, rule, marks=pytest.mark.slow) for rule in RULES[1:]),
    ],
)


def value_and_gradient(logits, labels, **options):
    """Row losses, their gradient with a different cotangent for each row, and the cotangents."""
    logits = jnp.asarray(logits)
    f = functools.partial(sxe.softmax_cross_entropy, reduction="none", **options)
    value, pullback = jax.vjp(lambda x: f(x, labels), logits)
    g = np.random.default_rng(0).normal(size=value.shape).astype(value.dtype)
    return np.asarray(value), np.asarray(pullback(jnp.asarray(g))[0]), g


# Labels


@every_rule
@pytest.mark.parametrize("bad", [5, 6, -1, -5, -100, 2**31 - 1, -(2**31)])
def test_a_label_out_of_range_is_nan_in_its_row_only(bad, rule):
    logits, labels = normal(3, 5), np.array([0, bad, 4])
    value, gradient, g = value_and_gradient(logits, labels, rule=rule)
    assert np.isnan(value[1])
    assert np.isnan(gradient[1]).all()
    assert_close(value[[0, 2]], oracle.loss(logits[[0, 2]], [0, 4], reduction="none"))
    expected = oracle.gradient(logits[[0, 2]], [0, 4], g[[0, 2]], reduction="none")
    assert_close(gradient[[0, 2]], expected)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"class_weights": np.ones(5, "f")}])
def test_a_bad_label_is_nan_with_other_targets_too(options):
    value, gradient, _ = value_and_gradient(normal(2, 5), np.array([7, 1]), **options)
    assert np.isnan(value).tolist() == [True, False]
    assert np.isnan(gradient).all(-1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int4", "uint4"])
def test_narrow_labels_with_more_classes_than_they_hold(dtype):
    classes = 70001 if "16" in dtype else 300
    logits = normal(4, classes)
    labels = np.array([0, 1, 5, 7])
    value, gradient, g = value_and_gradient(logits, jnp.asarray(labels, dtype))
    assert_close(value, oracle.loss(logits, labels, reduction="none"))
    assert_close(gradient, oracle.gradient(logits, labels, g, reduction="none"))
    of_numpy = sxe.softmax_cross_entropy(logits, np.asarray(jnp.asarray(labels, dtype)))
    assert_close(of_numpy, oracle.loss(logits, labels))


@one_in(
    2,
    indirect=["x64"],
    dtype=["int8", "uint8", "int32", "int64", "uint32", "uint64"],
    x64=[False, True],
)
def test_every_label_dtype(dtype, x64):
    if "64" in dtype and not x64:
        pytest.skip("JAX has no 64-bit integers while x64 is off")
    logits, labels = normal(5, 7), np.array([0, 6, 3, 3, 2], dtype)
    value, gradient, g = value_and_gradient(logits, jnp.asarray(labels))
    assert value.dtype == gradient.dtype == np.float32
    assert_close(value, oracle.loss(logits, labels, reduction="none"))
    assert_close(gradient, oracle.gradient(logits, labels, g, reduction="none"))


def test_wide_labels_do_not_wrap():
    with jax.enable_x64(True):
        labels = jnp.array([2**32 + 1, 2**63, 1], "uint64")
        value, _, _ = value_and_gradient(normal(3, 5), labels)
    assert np.isnan(value).tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_numpy_labels_do_not_wrap(dtype, x64):
    labels = np.array([2**32 + 1, 2**63 - 1, 1], dtype)
    logits = jnp.asarray(normal(3, 5))
    value = sxe.softmax_cross_entropy(logits, labels, reduction="none")
    assert np.isnan(value).tolist() == [True, True, False]
    value = sxe.linear_softmax_cross_entropy(
        jnp.eye(3, dtype="float32"), logits, labels, reduction="none"
    )
    assert np.isnan(value).tolist() == [True, True, False]


class NumPyLike:
    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x


class JAXLike:
    def __init__(self, x):
        self.x = x

    def __jax_array__(self):
        return self.x


HOLDERS = {
    "list": np.ndarray.tolist,
    "tuple": lambda x: tuple(x.tolist()),
    "list of scalars": list,
    "list of arrays": lambda x: [np.asarray(a) for a in x],
    "list with a jax.Array": lambda x: [*x.tolist()[:-1], jnp.asarray(1)],
    "memoryview": memoryview,
    "array.array": lambda x: array.array("q", x),
    "__array__": NumPyLike,
    "__jax_array__": JAXLike,
    "nnx.Variable": nnx.Variable,
}


@pytest.mark.parametrize(
    "x64", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["x32", "x64"], indirect=True
)
@pytest.mark.parametrize("holder", HOLDERS)
def test_labels_of_whatever_kind_do_not_wrap(holder, x64):
    """With x64 off, JAX would wrap 2^32 + 1 to 1."""
    logits = jnp.asarray(normal(4, 5))
    labels = HOLDERS[holder](np.array([3, 2**32 + 1, -(2**32) + 1, 1]))
    each = [
        sxe.softmax_cross_entropy(logits, labels, reduction="none"),
        jax.jit(lambda x: sxe.softmax_cross_entropy(x, labels, reduction="none"))(logits),
        sxe.linear_softmax_cross_entropy(
            jnp.eye(4, dtype="float32"), logits, labels, reduction="none"
        ),
    ]
    (_, metrics), gradient = sxe.softmax_cross_entropy_with_gradient(
        logits, labels, return_metrics=True
    )
    expected = oracle.loss(logits[::3], [3, 1], reduction="none")
    for value in each:
        assert_close(value[::3], expected)
        assert np.isnan(value[1:3]).all()
    assert np.isnan(gradient).all(-1).tolist() == [False, True, True, False]
    assert np.isnan(metrics.loss_sum)


@pytest.mark.parametrize("bad", [2**31, 2**32 + 1, 2**63, 2**64 + 1, 10**30, -(10**30), -(2**63)])
def test_python_integers_of_any_size(bad, x64):
    logits = normal(2, 2, 5)
    nested = sxe.softmax_cross_entropy(logits, [[0, bad], [4, 1]], reduction="none")
    assert np.isnan(nested).tolist() == [[False, True], [False, False]]
    assert np.isnan(sxe.softmax_cross_entropy(logits[0, 0], bad))
    kernel = np.eye(5, dtype=np.float32)
    assert np.isnan(sxe.linear_softmax_cross_entropy(logits[0, 0], kernel, bad))


@pytest.mark.parametrize(("dtype", "largest"), [("int64", 2**31 - 1), ("uint64", 2**32 - 1)])
def test_a_label_beyond_32_bits_is_not_ignored_as_the_largest(dtype, largest, x64):
    labels = np.array([2**40, largest, 1], dtype)
    f = functools.partial(sxe.softmax_cross_entropy, ignore_index=largest, reduction="none")
    for each in (labels, list(labels)):
        value = f(normal(3, 5), each)
        assert np.isnan(value).tolist() == [True, False, False]
        assert value[1] == 0


@pytest.mark.parametrize("ignored", [-(2**40), 2**31])
def test_an_ignore_index_that_jax_cannot_hold(ignored, x64):
    """Wide labels are replaced with integers that JAX can hold, so it could match none of them."""
    f = functools.partial(sxe.softmax_cross_entropy, ignore_index=ignored, reduction="none")
    for labels in (np.array([0, ignored]), [0, ignored]):
        if x64:
            assert f(normal(2, 5), labels)[1] == 0
            continue
        with pytest.raises(ValueError, match=r"^ignore_index: expected an int from -2147483648 to"):
            f(normal(2, 5), labels)
    # Labels of these dtypes are never equal to it, or can be held.
    for dtype in (np.int32, np.uint64):
        assert np.isfinite(f(normal(1, 5), np.array([1], dtype))).all()


def test_an_integer_of_more_than_32_bits_among_floats_keeps_its_value():
    targets = [[2**40, 0.5, 0.0], [0.0, 0.5, -(2**40)]]
    logits = normal(2, 3)
    value = sxe.softmax_cross_entropy(logits, targets, reduction="none")
    assert_close(value, oracle.loss(logits, np.array(targets), reduction="none"))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "constants"])
def test_arrays_in_the_other_byte_order(jit):
    """Files in IDX, FITS or HDF5 have such arrays."""
    rng = np.random.default_rng(2)
    hidden, kernel, logits = normal(6, 3), normal(3, 5), normal(6, 5)
    labels, targets = rng.integers(5, size=6), rng.uniform(size=(6, 5)).astype(np.float32)
    weights, class_weights, bias = (rng.uniform(size=n).astype(np.float32) for n in (6, 5, 5))
    options = {"weights": weights, "class_weights": class_weights}
    options |= {"label_smoothing": np.float64(0.1), "z_loss": np.array(0.01, np.float32)}

    def swapped(x, dtype=None):
        x = np.asarray(x, dtype)
        return x.astype(x.dtype.newbyteorder())

    def run(f):
        return jax.jit(f)() if jit else f()

    other = {name: swapped(x) for name, x in options.items()}
    for dtype in ("int16", "uint32", "int64", "uint64"):
        y = swapped(labels, dtype)
        value = run(lambda y=y: sxe.softmax_cross_entropy(swapped(logits), y, **other))
        assert_close(value, oracle.loss(logits, labels, **options), dtype="float32")
    right = oracle.loss(logits, targets, **options)
    right_gradient = oracle.gradient(logits, targets, **options)
    value, gradient = run(
        lambda: sxe.softmax_cross_entropy_with_gradient(swapped(logits), swapped(targets), **other)
    )
    assert_close(value, right, dtype="float32")
    assert_close(gradient, right_gradient, dtype="float32")
    other |= {"bias": swapped(bias), "softcap": swapped(20.0, np.float32)}
    y = [swapped(label, "int32") for label in labels]
    value = run(
        lambda: sxe.linear_softmax_cross_entropy(swapped(hidden), swapped(kernel), y, **other)
    )
    options |= {"bias": bias, "softcap": 20.0}
    assert_close(value, oracle.head_loss(hidden, kernel, labels, **options), dtype="float32")


def test_labels_in_the_other_byte_order_do_not_wrap(x64):
    labels = np.array([2**32 + 1, 1], ">i8")
    value = sxe.softmax_cross_entropy(normal(2, 5), labels, reduction="none")
    assert np.isnan(value).tolist() == [True, False]


def test_parameters_of_nnx():
    """They are accepted wherever an array or a number is, because they convert themselves."""
    hidden, kernel, labels = normal(4, 3), normal(3, 5), np.array([0, 4, 2, 2])
    options = {"bias": normal(5), "softcap": np.float32(3), "logit_scale": np.float32(2)}
    options |= {"weights": np.float32([1, 2, 3, 4]), "label_smoothing": np.float32(0.1)}
    options |= {"class_weights": np.float32([1, 2, 3, 4, 5]), "z_loss": np.float32(0.1)}
    options |= {"where": np.array([True, True, False, True])}

    def loss(hidden, kernel, options):
        labels_ = nnx.Variable(jnp.asarray(labels))
        return sxe.linear_softmax_cross_entropy(hidden, kernel, labels_, **options)

    params = jax.tree.map(lambda x: nnx.Param(jnp.asarray(x)), (hidden, kernel, options))
    value = loss(*params)
    assert_close(value, oracle.head_loss(hidden, kernel, labels, **options))
    floats = {name: x for name, x in params[2].items() if name != "where"}
    gradients = jax.jit(jax.grad(lambda k, o: loss(params[0], k, params[2] | o), argnums=(0, 1)))(
        params[1], floats
    )
    floats = {name: jnp.asarray(options[name]) for name in floats}
    right = jax.grad(lambda k, o: loss(hidden, k, options | o), argnums=(0, 1))(kernel, floats)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=CLOSENESS["float32"], atol=ZERO),
        jax.tree.leaves(gradients),
        jax.tree.leaves(right),
    )


@pytest.mark.parametrize(("dtype", "label"), [("uint8", 156), ("int8", -100), ("int4", -4)])
def test_ignore_index_is_a_number_not_a_bit_pattern(dtype, label):
    """-100 wraps to 156 in uint8 and to -4 in int4. Neither label is ignored."""
    logits, labels = normal(2, 200), jnp.array([label, 1], dtype)
    value, _, _ = value_and_gradient(logits, labels, ignore_index=-100)
    assert value[1] > 0
    if label == -100:
        assert value[0] == 0
    elif label > 0:
        assert_close(value, oracle.loss(logits, [label, 1], reduction="none"))
    else:
        assert np.isnan(value[0])


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
def test_checkify_names_position_label_and_classes(jit):
    labels = np.array([[0, 1, 2], [3, 9, -7]])
    f = checkify.checkify(sxe.softmax_cross_entropy)
    f = jax.jit(f) if jit else f
    error, _ = f(normal(2, 3, 5), labels)
    message = error.get()
    assert "[0, 5)" in message
    assert "got 9" in message
    assert "[1 1]" in message
    error, _ = f(normal(2, 3, 5), np.minimum(np.maximum(labels, 0), 4))
    assert error.get() is None


@pytest.mark.parametrize("ignore_index", [None, -100, 3])
def test_checkify_names_ignore_index_where_it_is_off(ignore_index):
    f = functools.partial(sxe.softmax_cross_entropy, ignore_index=ignore_index)
    f = jax.jit(checkify.checkify(f))
    label = -100 if ignore_index is None else -1
    message = f(normal(2, 5), np.array([1, label]))[0].get()
    assert f"got {label} at position [1]" in message
    advice = "; if this label marks rows that do not count, pass it as ignore_index"
    assert (advice in message) == (ignore_index is None)


def test_checkify_in_gradients_and_for_one_row():
    f = jax.jit(checkify.checkify(jax.grad(sxe.softmax_cross_entropy)))
    assert "got 5" in f(normal(5), np.array(5))[0].get()
    error, _ = f(normal(2, 5), np.array([1, 8]))
    assert "got 8" in error.get()
    assert "[1]" in error.get()


def twice(loss):
    """The loss again, in a loop, so that checkify has to look into a loop."""

    def scanned(logits, labels):
        def step(carry, xs):
            return carry + loss(*xs), None

        xs = jax.tree.map(lambda x: jnp.stack([x, x]), (logits, labels))
        return jax.lax.scan(step, jnp.zeros(()), xs)[0]

    return scanned


def in_vmap(f):
    def g(logits, labels):
        return jax.vmap(f)(logits[:, None], labels[:, None])

    return g


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: jax.jit(jax.grad(f)),
        in_vmap,
        lambda f: jax.vmap(f, in_axes=(0, None)),
        lambda f: jax.vmap(f, in_axes=(None, 0)),
        twice,
        lambda f: lambda x, y: jax.lax.cond(x[0, 0] < 9, f, lambda x, y: x[0, 0], x, y),
        lambda f: lambda x, y: jax.jvp(functools.partial(f, rule="jvp"), (x, y), (x, zero(y)))[1],
        lambda f: lambda x, y: jax.hessian(f)(x, y),
    ],
    ids=["jit", "checkpoint", "grad", "vmap", "vmap-x", "vmap-y", "scan", "cond", "jvp", "hessian"],
)
def test_checkify_looks_into(wrap):
    def loss(x, y, **options):
        x, y = jnp.broadcast_to(x, (2, 5)), jnp.broadcast_to(y, (2,))
        return sxe.softmax_cross_entropy(x, y, **options)

    f = jax.jit(checkify.checkify(wrap(loss)))
    logits = normal(2, 5)
    assert "got 8" in f(logits, np.array([1, 8]))[0].get()
    assert f(logits, np.array([1, 4]))[0].get() is None


def zero(labels):
    return np.zeros(labels.shape, jax.dtypes.float0)


def test_without_checkify_the_check_leaves_no_effect():
    """An effect would slow down the dispatch of a jitted call, and cannot be serialized."""
    assert not jax.make_jaxpr(sxe.softmax_cross_entropy)(normal(2, 5), np.zeros(2, int)).effects


def test_checkify_passes_labels_that_do_not_count():
    f = checkify.checkify(functools.partial(sxe.softmax_cross_entropy, ignore_index=-100))
    assert f(normal(2, 5), np.array([1, -100]))[0].get() is None
    f = checkify.checkify(sxe.softmax_cross_entropy)
    where = np.array([True, False])
    assert f(normal(2, 5), np.array([1, 77]), where=where)[0].get() is None


def test_checkify_finds_no_other_error():
    """sxe itself causes no division by zero, no index out of range and no NaN."""
    f = jax.value_and_grad(sxe.softmax_cross_entropy)
    f = jax.jit(checkify.checkify(f, errors=checkify.all_checks))
    logits = normal(3, 5)
    logits[1, 2] = -INF
    options = {"class_weights": np.ones(5, "f"), "where": np.array([True, True, False])}
    assert f(logits, np.array([4, 0, 2]), **options)[0].get() is None
    options["where"] = np.zeros(3, bool)
    assert f(logits, np.array([4, 0, 2]), **options)[0].get() is None


# Rows that do not count


@one_in(
    3,
    reason=["where", "weights", "ignore_index", "classes"],
    reduction=["mean", "sum", "none"],
    rule=RULES,
)
@pytest.mark.parametrize("content", [NAN, INF, -INF])
def test_a_row_that_does_not_count_contributes_nothing(reason, content, reduction, rule):
    logits = normal(4, 5)
    logits[2] = content
    labels = np.array([1, 0, 99, 3])
    options = {
        "where": {"where": np.array([True, True, False, True])},
        "weights": {"weights": np.array([1.5, 1, 0, 2], np.float32)},
        "ignore_index": {"ignore_index": 99},
        "classes": {"where": np.arange(4)[:, None].repeat(5, 1) != 2},
    }[reason]

    def f(x):
        value = sxe.softmax_cross_entropy(x, labels, reduction=reduction, rule=rule, **options)
        return (value * jnp.arange(1.0, 1 + value.size).reshape(value.shape)).sum(), value

    (_, value), gradient = jax.value_and_grad(f, has_aux=True)(jnp.asarray(logits))
    labels[2] = 0
    logits[2] = 0
    options = {"where": np.array([True, True, False, True])} | {
        k: v for k, v in options.items() if k == "weights"
    }
    g = np.arange(1.0, 5) if reduction == "none" else 1.0
    assert_close(value, oracle.loss(logits, labels, reduction=reduction, **options))
    assert_close(gradient, oracle.gradient(logits, labels, g, reduction=reduction, **options))
    assert (np.asarray(gradient[2]) == 0).all()


def _rows_of_which_one_is_infinite(head, targets):
    """Arguments of a call with three rows, and the names of those with an entry for each row.

    The loss of row 1 is infinite, because its label cannot occur.
    """
    labels = np.array([0, 3, 1])
    if head:
        p = {
            "hidden": normal(3, 2),
            "kernel": normal(2, 4),
            "bias": np.array([0.5, 0, 1, -INF], "f"),
        }
    else:
        p = {"logits": normal(3, 4)}
        p["logits"][1, 3] = -INF
    p |= {
        "class weights": {"labels": labels, "class_weights": np.array([1.5, 0.5, 1, 2], "f")},
        "label weights": {
            "labels": labels[:, None],
            "label_weights": np.array([[1.5], [2], [1]], "f"),
        },
        "dense": {"labels": np.eye(4, dtype="f")[labels]},
        "smoothing": {"labels": labels, "label_smoothing": np.float32(0.1)},
    }[targets]
    names = ("hidden", "logits", "labels", "label_weights", "weights", "where")
    return p, [name for name in names if name in p]


@one_in(
    4,
    head=[False, True],
    targets=["class weights", "label weights", "dense", "smoothing"],
    reason=["where", "weights"],
    reduction=["sum", "none"],
    rule=RULES,
)
def test_a_row_of_infinite_loss_that_does_not_count(head, targets, reason, reduction, rule):
    """Every gradient is that of a call without this row, and 0 in this row."""
    if head and targets == "smoothing":
        pytest.skip("with a bias of -inf, smoothing makes every row infinite")
    loss = sxe.linear_softmax_cross_entropy if head else sxe.softmax_cross_entropy
    p, of_rows = _rows_of_which_one_is_infinite(head, targets)
    p[reason] = np.array([1, 0, 2], "f") if reason == "weights" else np.array([True, False, True])
    of_rows.append(reason)
    some = p | {name: p[name][[0, 2]] for name in of_rows}
    options = {"chunk_size": 1} if head else {}

    def value_and_gradients(p):
        f = lambda q: jnp.sum(loss(**(p | q), reduction=reduction, rule=rule, **options))  # noqa: E731
        return jax.jit(jax.value_and_grad(f))(floats(p))

    (value, d), (expected, d_some) = value_and_gradients(p), value_and_gradients(some)
    assert_close(value, expected)
    for name, gradient in d.items():
        if name in of_rows:
            assert (np.asarray(gradient[1]) == 0).all(), name
            gradient = gradient[np.array([0, 2])]
        assert np.isfinite(d_some[name]).all(), name
        assert_close(gradient, d_some[name])


@every_rule
def test_weights_whose_sum_is_too_large_for_a_float(rule):
    f = functools.partial(sxe.softmax_cross_entropy, rule=rule, weights=np.full(3, 2e38, "f"))
    value, gradient = jax.value_and_grad(f)(normal(3, 5), np.array([0, 1, 2]))
    assert np.isnan(value)
    assert np.isnan(gradient).all()


@every_rule
def test_a_bad_label_with_a_single_class(rule):
    f = functools.partial(sxe.softmax_cross_entropy, reduction="none", rule=rule)
    value, pull = jax.vjp(lambda x: f(x, np.array([0, -1, 1])), jnp.ones((3, 1)))
    for found in (value, pull(jnp.ones(3))[0][:, 0]):
        assert np.isnan(found).tolist() == [False, True, True]


@every_rule
def test_a_dense_row_that_does_not_count(rule):
    logits, targets = normal(3, 4), np.abs(normal(3, 4))
    targets[1] = NAN
    for options in (
        {"where": np.array([True, False, True])},
        {"weights": np.array([1, 0, 1], np.float32)},
    ):
        f = functools.partial(sxe.softmax_cross_entropy, rule=rule, **options)
        value, gradients = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(logits, targets)
        assert_close(value, oracle.loss(logits[[0, 2]], targets[[0, 2]]))
        for gradient in gradients:
            assert (np.asarray(gradient[1]) == 0).all()
            assert np.isfinite(gradient).all()


@every_rule
def test_a_weight_of_zero_has_its_row_loss_as_derivative(rule):
    """Learned weights may start at 0. For a row without a finite loss, the derivative is 0."""
    logits = normal(4, 5)
    logits[1] = NAN
    logits[2, 0] = -INF
    labels = np.array([1, 1, 0, 77])

    def f(weights, logits):
        return sxe.softmax_cross_entropy(
            logits, labels, weights=weights, reduction="sum", rule=rule
        )

    @jax.jit
    def run(*arrays):
        # The second is what a meta-gradient differentiates: the logits' gradient at weight 0
        # depends on the weight.
        return (
            jax.value_and_grad(f, argnums=(0, 1))(*arrays),
            jax.jacobian(jax.grad(f, argnums=1))(*arrays),
        )

    (value, (d_weights, d_logits)), mixed = run(np.zeros(4, np.float32), logits)
    assert value == 0
    assert (np.asarray(d_logits) == 0).all()
    assert_close(d_weights[0], oracle.loss(logits[0], labels[0]))
    assert (np.asarray(d_weights[1:]) == 0).all()
    assert_close(mixed[0, :, 0], oracle.gradient(logits[0], labels[0]))


@one_in(2, rule=RULES, reduction=["mean", "sum"])
def test_nothing_counts(reduction, rule):
    each = (
        {"where": np.zeros(3, bool)},
        {"weights": np.zeros(3, np.float32)},
        {"ignore_index": 2},
        {"class_weights": np.array([1, 1, 0, 1], np.float32)},
    )
    f = functools.partial(sxe.softmax_cross_entropy, reduction=reduction, rule=rule)
    labels = np.full(3, 2)

    @jax.jit
    def run(logits):
        return [
            (
                jax.value_and_grad(f)(logits, labels, **options),
                f(logits, labels, return_metrics=True, **options)[1],
            )
            for options in each
        ]

    for (value, gradient), metrics in run(normal(3, 4)):
        assert value == 0
        assert (np.asarray(gradient) == 0).all()
        assert metrics.loss_sum == metrics.weight_sum == 0


# Weights of both signs


def mean_of(head, labels, **options):
    """The mean over rows as a function of logits. For the head, the kernel is the identity."""
    if not head:
        return functools.partial(sxe.softmax_cross_entropy, labels=labels, **options)
    return lambda hidden, **more: sxe.linear_softmax_cross_entropy(
        hidden, jnp.eye(5), labels, chunk_size=3, **options, **more
    )


@both_losses
def test_negative_weights(head, rule):
    logits, labels = normal(4, 5), np.array([1, 0, 4, 3])
    weights, g = np.array([1, -2, 0.5, -1], np.float32), normal(4)
    cotangents = {"mean": g[0], "sum": g[0], "none": g}

    @jax.jit
    def run(x, cotangents):
        found = {}
        for reduction, cotangent in cotangents.items():
            f = mean_of(head, labels, rule=rule, weights=weights, reduction=reduction)
            value, pullback = jax.vjp(f, x)
            found[reduction] = value, *pullback(cotangent)
        return found

    for reduction, (value, gradient) in run(logits, cotangents).items():
        options = {"weights": weights, "reduction": reduction}
        assert_close(value, oracle.loss(logits, labels, **options))
        expected = oracle.gradient(logits, labels, cotangents[reduction], **options)
        assert_close(gradient, expected)


@both_losses
def test_a_mean_over_rows_whose_weights_sum_to_zero_is_nan(head, rule):
    """A result of 0, as for a mean over no rows, would silently train nothing."""
    logits, labels = jnp.asarray(normal(4, 5)), np.array([1, 0, 4, 3])
    where = np.array([True, True, True, False])
    f = mean_of(head, labels, rule=rule, where=where)
    weights = np.array([1, -3, 2, 5], np.float32)

    @jax.jit
    def run(x, w):
        return (
            jax.value_and_grad(lambda x, w: f(x, weights=w), (0, 1))(x, w),
            jax.jacobian(jax.grad(lambda x: f(x, weights=w)))(x),
            f(x, weights=w, reduction="sum"),
            f(x, weights=w, return_metrics=True)[1],
        )

    (value, gradients), hessian, total, metrics = run(logits, weights)
    assert np.isnan(value)
    assert np.isnan(gradients[0][:3]).all()
    assert np.isnan(gradients[1][:3]).all()
    assert np.isnan(hessian[0, :, 0]).all()
    expected = oracle.loss(logits, labels, weights=weights, where=where, reduction="sum")
    assert_close(total, expected)
    assert metrics.weight_sum == 0
    assert_close(metrics.loss_sum, expected)


def test_the_gradient_in_one_pass_of_weights_that_sum_to_zero_is_nan():
    logits, labels = normal(3, 5), np.array([1, 0, 4])
    f = functools.partial(sxe.softmax_cross_entropy_with_gradient, logits, labels)
    value, gradient = f(weights=jnp.array([1, -3, 2.0]))
    assert np.isnan(value)
    assert np.isnan(gradient).all()
    weights = np.array([1, -3, 1], np.float32)
    value, gradient = f(weights=weights)
    assert_close(value, oracle.loss(logits, labels, weights=weights))
    assert_close(gradient, oracle.gradient(logits, labels, weights=weights))


@both_losses
def test_a_mean_over_labels_of_class_weight_zero(head, rule):
    """It is 0, as over no rows. It is NaN if smoothing or z-loss gives these rows a loss."""
    logits, labels = jnp.asarray(normal(3, 5)), np.array([1, 1, 1])
    class_weights = jnp.array([1, 0, 1, 1, 1.0])
    f = mean_of(head, labels, rule=rule, class_weights=class_weights)
    off = {"label_smoothing": jnp.float32(0), "z_loss": jnp.float32(0)}
    each = ({}, off, {"label_smoothing": 0.1}, {"z_loss": 0.1})
    grad = jax.value_and_grad(lambda x, options: f(x, **options))
    found = jax.jit(lambda x, each: [grad(x, options) for options in each])(logits, each)
    for value, gradient in found[:2]:
        assert value == 0
        assert (np.asarray(gradient) == 0).all()
    for value, gradient in found[2:]:
        assert np.isnan(value)
        assert np.isnan(gradient).all()


@one_in(3, rule=RULES, reduction=["mean", "none"], classes=[64, 1024])
def test_a_nan_in_a_row_of_weight_0(classes, reduction, rule):
    """XLA's CPU backend may lose a NaN in a maximum over many classes."""
    options = {"reduction": reduction, "rule": rule}
    labels, weights = jnp.arange(4), jnp.array([1.0, 2.0, 0.0, 0.5])
    # In the third row inf - inf, and in others a class that cannot occur.
    hidden, kernel = normal(4, 2), np.full((2, classes), 1e-3, np.float32)
    bias = np.zeros(classes, np.float32)
    hidden[2], kernel[:, 50], bias[50] = 3e38, 3, -INF
    with np.errstate(over="ignore", invalid="ignore"):
        logits = hidden @ kernel + bias
    assert np.isnan(logits[2, 50])

    def of_head(hidden):
        loss = sxe.linear_softmax_cross_entropy
        return jnp.sum(loss(hidden, kernel, labels, bias=bias, weights=weights, **options))

    def of_logits(logits):
        return jnp.sum(sxe.softmax_cross_entropy(logits, labels, weights=weights, **options))

    for loss, given in ((of_logits, logits), (of_head, hidden)):
        run, finite = jax.jit(jax.value_and_grad(loss)), given.copy()
        finite[2] = 0
        found, expected = run(given), run(finite)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("head", [False, True], ids=["logits", "head"])
def test_debug_nans_passes_a_weighted_mean_over_nothing(head):
    logits, labels = jnp.asarray(normal(3, 5)), np.array([1, 0, 4])
    f = mean_of(head, labels, class_weights=jnp.ones(5))
    grad = jax.value_and_grad(lambda x, w: f(x, weights=w), (0, 1))
    with jax.debug_nans(True):
        for weights in (jnp.zeros(3), jnp.array([1, -2, 3.0])):
            jax.jit(grad)(logits, weights)
        with jax.disable_jit():
            grad(logits, jnp.zeros(3))


@one_in(
    2,
    shape=[(0, 5), (0, 3, 5), (2, 0, 5)],
    dense={"integer": False, "dense": True},
    rule=RULES,
)
def test_empty_batch(shape, dense, rule):
    logits = np.zeros(shape, np.float32)
    labels = logits if dense else np.zeros(shape[:-1], int)
    f = sxe.softmax_cross_entropy

    @jax.jit
    def run(*arrays):
        gradients = [
            jax.value_and_grad(functools.partial(f, reduction=reduction, rule=rule))(*arrays)
            for reduction in ("mean", "sum")
        ]
        return gradients, f(*arrays, reduction="none"), f(*arrays, return_metrics=True)

    gradients, rows, (value, metrics) = run(logits, labels)
    for total, gradient in gradients:
        assert total == 0
        assert gradient.shape == shape
    assert rows.shape == shape[:-1]
    assert value == metrics.weight_sum == 0
    assert metrics.lse.shape == metrics.predictions.shape == shape[:-1]


# Infinities


@every_rule
@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
def test_a_logit_of_minus_infinity_cannot_occur(dense, rule):
    logits, labels = normal(3, 5), np.array([1, 2, 4])
    logits[:, 0] = logits[1, 3] = -INF
    targets = np.eye(5, dtype=np.float32)[labels] if dense else labels
    value, gradient, g = value_and_gradient(logits, targets, rule=rule)
    assert_close(value, oracle.loss(logits, labels, reduction="none"))
    assert_close(gradient, oracle.gradient(logits, labels, g, reduction="none"))
    assert (gradient[:, 0] == 0).all()


@every_rule
def test_a_softcap_bounds_a_bias_of_minus_infinity(rule):
    hidden, kernel, labels = normal(3, 2), normal(2, 5), np.array([1, 2, 0])
    bias = np.array([-INF, 0, 1, 0, 0], np.float32)
    f = functools.partial(sxe.linear_softmax_cross_entropy, softcap=3.0, rule=rule)
    value, gradients = jax.value_and_grad(
        lambda h, k, b: f(h, k, labels, bias=b), argnums=(0, 1, 2)
    )(hidden, kernel, bias)
    logits = 3 * np.tanh((hidden.astype(np.float64) @ kernel + bias) / 3)
    assert (logits[:, 0] == -3).all()
    assert_close(value, oracle.loss(logits, labels), dtype="float32")
    d_z = oracle.gradient(logits, labels) * (1 - (logits / 3) ** 2)
    for d, right in zip(gradients, (d_z @ kernel.T, hidden.T @ d_z, d_z.sum(0)), strict=True):
        assert_close(d, right)


@every_rule
@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
def test_the_labels_logit_of_minus_infinity(dense, rule):
    logits, labels = normal(3, 5), np.array([1, 2, 4])
    logits[1, 2] = -INF
    targets = np.eye(5, dtype=np.float32)[labels] if dense else labels
    value, gradient, g = value_and_gradient(logits, targets, rule=rule)
    assert value[1] == INF
    assert np.isfinite(value[[0, 2]]).all()
    assert gradient[1, 2] == pytest.approx(-g[1], rel=LOSS_BAR)
    assert_close(gradient, oracle.gradient(logits, labels, g, reduction="none"))


@every_rule
@pytest.mark.parametrize("fill", [[-INF] * 5, [0, INF, 0, 0, 0], [0, 0, NAN, 0, 0], [INF] * 5])
def test_a_row_without_a_distribution_is_nan_alone(fill, rule):
    logits, labels = normal(3, 5), np.array([1, 2, 4])
    logits[1] = fill
    value, gradient, g = value_and_gradient(logits, labels, rule=rule)
    assert np.isnan(value).tolist() == [False, True, False]
    assert np.isnan(gradient[1]).all()
    rest = [0, 2]
    assert_close(value[rest], oracle.loss(logits[rest], labels[rest], reduction="none"))
    expected = oracle.gradient(logits[rest], labels[rest], g[rest], reduction="none")
    assert_close(gradient[rest], expected)


@every_rule
def test_a_masked_class_is_a_logit_of_minus_infinity(rule):
    logits, labels = normal(4, 5), np.array([1, 2, 4, 0])
    mask = np.ones((4, 5), bool)
    mask[:, 3] = mask[0, 0] = mask[1, 2] = False  # row 1's label is masked
    mask[3] = False  # row 3 has no class
    value, gradient, g = value_and_gradient(logits, labels, where=mask, rule=rule)
    minus = np.where(mask, logits, -INF)[:3]
    assert value[1] == INF
    assert value[3] == 0
    assert_close(value[:3], oracle.loss(minus, labels[:3], reduction="none"))
    expected = np.where(mask, 0, 0.0)
    expected[:3] = oracle.gradient(minus, labels[:3], g[:3], reduction="none")
    assert_close(gradient, np.where(mask, expected, 0))
    _, direct = sxe.softmax_cross_entropy_with_gradient(logits, labels, where=mask, reduction="sum")
    assert_close(
        direct,
        jax.grad(sxe.softmax_cross_entropy)(logits, labels, where=mask, reduction="sum", rule=rule),
    )


@every_rule
def test_zero_log_zero_in_value_and_every_derivative(rule):
    """A target of 0 for a class that cannot occur adds 0 to all derivatives, for all arguments."""
    logits = np.array([1.0, -INF, 0.5, -1.0], np.float32)
    targets = np.array([0.25, 0.0, 0.75, 0.0], np.float32)
    f = functools.partial(sxe.softmax_cross_entropy, rule=rule)
    labels = jnp.array(2)

    @jax.jit
    def run(logits, targets, class_weights):
        return (
            jax.value_and_grad(f, argnums=(0, 1))(logits, targets),
            jax.hessian(f)(logits, targets),
            jax.grad(lambda c: f(logits, labels, class_weights=c, reduction="sum"))(class_weights),
        )

    (value, (d_logits, d_targets)), hessian, d_class_weights = run(logits, targets, jnp.ones(4))
    keep = np.array([0, 2, 3])
    assert_close(value, oracle.loss(logits[keep], targets[keep]))
    assert_close(d_logits[keep], oracle.gradient(logits[keep], targets[keep]))
    q = np.exp(np.asarray(logits, np.float64)[keep])
    assert_close(d_targets[keep], -np.log(q / q.sum()))
    assert d_logits[1] == d_targets[1] == 0
    assert np.isfinite(hessian).all()
    assert (np.asarray(hessian[1]) == 0).all()
    assert np.isfinite(d_class_weights).all()


@one_in(3, rule=RULES, reduction=["none", "mean", "sum"])
def test_zero_log_zero_is_exact_when_compiled(rule, reduction):
    """If XLA fuses a product into the sum that cancels it, a rounding error must not remain."""
    rng = np.random.default_rng(4)
    logits, hidden, kernel = normal(64, 7), normal(64, 5), normal(5, 7)
    bias = np.where(np.arange(7) == 3, -INF, 0).astype(np.float32)
    targets = rng.uniform(size=logits.shape).astype(np.float32)
    targets[:, 3] = 0
    labels, class_weights = rng.integers(3, size=64), np.ones(7, np.float32)
    class_weights[3] = 0
    logits += bias
    g = jnp.asarray(normal(64))

    def losses(targets, class_weights):
        options = {"reduction": reduction, "rule": rule}
        scale = g if reduction == "none" else g[0]
        for loss, args in (
            (sxe.softmax_cross_entropy, (logits,)),
            (functools.partial(sxe.linear_softmax_cross_entropy, bias=bias), (hidden, kernel)),
        ):
            yield (scale * loss(*args, targets, **options)).sum()
            smoothed = options | {"class_weights": class_weights, "label_smoothing": 0.1}
            yield (scale * loss(*args, labels, **smoothed)).sum()

    run = jax.jit(jax.jacobian(lambda *args: jnp.stack(list(losses(*args))), argnums=(0, 1)))
    d_targets, d_class_weights = run(targets, class_weights)
    assert (np.asarray(d_targets[..., 3]) == 0).all()
    assert (np.asarray(d_class_weights[..., 3]) == 0).all()
    rest = np.delete(logits, 3, axis=1).astype(np.float64)
    nll = -rest + np.log(np.exp(rest).sum(-1, keepdims=True))
    share = {"none": np.asarray(g)[:, None], "mean": np.float64(g[0]) / 64, "sum": np.float64(g[0])}
    assert_close(np.delete(d_targets[0], 3, axis=-1), share[reduction] * nll)


@one_in(2, smoothing=[0.0, 0.1], head=[False, True], rule=RULES)
def test_the_derivative_by_class_weights_is_what_they_weigh(head, smoothing, rule):
    """The derivative of sum_i g_i loss_i by c_k is sum_i g_i ((1 - a) [k = y_i] + a / K) nll_ik."""
    N, D, K = 13, 5, 7
    hidden, kernel, g = normal(N, D), normal(D, K), normal(N)
    rng = np.random.default_rng(6)
    labels, class_weights = rng.integers(K, size=N), rng.uniform(size=K).astype(np.float32)
    logits = hidden.astype(np.float64) @ kernel
    loss, inputs = sxe.softmax_cross_entropy, (logits.astype(np.float32),)
    if head:
        loss, inputs = sxe.linear_softmax_cross_entropy, (hidden, kernel)

    def weighted(class_weights):
        options = {"label_smoothing": smoothing, "reduction": "none", "rule": rule}
        return loss(*inputs, labels, class_weights=class_weights, **options)

    pulled_back = jax.jit(lambda c, g: jax.vjp(weighted, c)[1](g)[0])
    nll = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
    shares = (1 - smoothing) * np.eye(K)[labels] + smoothing / K
    expected = (g[:, None] * shares * nll).sum(0)
    assert_close(pulled_back(class_weights, g), expected)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("rule", ["vjp", "jvp"])
def test_what_a_dense_target_costs_at_the_ends_of_float32(rule, jit):
    f = functools.partial(sxe.softmax_cross_entropy, reduction="none", rule=rule)
    f = jax.jit(f) if jit else f
    logits = np.array([[0, -INF], [3e38, -3e38], [3e38, -INF], [-3e38, 0]], np.float32)
    targets = np.array([[1, 1e-30], [0.875, 0.125], [1, 0], [0, 1]], np.float32)
    np.testing.assert_allclose(f(logits, targets), [INF, 7.5e37, 0, 0], rtol=LOSS_BAR)


def test_an_option_that_is_off_does_nothing():
    """z_loss = 0 with an infinite lse, and smoothing = 0 with a class that cannot occur."""
    logits = np.array([[3e38, 3e38, -INF]], np.float32)
    for zero in (0, 0.0, np.float32(0), np.zeros(())):
        value = sxe.softmax_cross_entropy(logits, [1], z_loss=zero, label_smoothing=zero)
        assert value == pytest.approx(np.log(2), rel=LOSS_BAR)


OFF = {
    "z_loss": jnp.float32(0),
    "label_smoothing": jnp.float32(0),
    "class_weights": jnp.ones(5),
    "weights": jnp.ones(4),
}
OFF_IN_HEAD = OFF | {"softcap": jnp.float32(INF), "logit_scale": jnp.float32(1)}


def losses_at_the_ends(head):
    """A loss of four rows, its arrays, and their logits, which include 1e20, 1e-20 and -inf."""
    logits, labels = normal(4, 5), np.array([1, 0, 4, 2])
    logits[0, 1], logits[3] = 1e20, 1e-20
    bias = np.where(np.arange(5) == 3, -INF, 0).astype(np.float32)
    if not head:
        loss = functools.partial(sxe.softmax_cross_entropy, labels=labels)
        return loss, (jnp.asarray(logits + bias),), logits + bias, labels
    loss = functools.partial(sxe.linear_softmax_cross_entropy, labels=labels, bias=bias)
    return loss, (jnp.asarray(logits), jnp.eye(5)), logits + bias, labels


@both_losses
def test_a_traced_option_that_is_off_does_nothing(head, rule):
    """The value is not known at trace time. The program must not multiply 0 by infinity."""
    loss, arrays, logits, labels = losses_at_the_ends(head)
    g = {"mean": 1.5, "sum": 1.0, "none": np.array([1, 2, 0.5, 3], np.float32)}

    @jax.jit
    def run(options, *arrays):
        def f(options, *arrays):
            value = {r: loss(*arrays, rule=rule, reduction=r, **options) for r in g}
            return sum((g[r] * value[r]).sum() for r in g), value

        by_all = tuple(range(1 + len(arrays)))
        return jax.grad(f, argnums=by_all, has_aux=True)(options, *arrays)

    (by_options, *by_arrays), value = run(OFF_IN_HEAD if head else OFF, *arrays)
    for r in g:
        expected = oracle.loss(logits, labels, reduction=r)
        np.testing.assert_allclose(value[r], expected, rtol=CLOSENESS["float32"])
    expected = sum(oracle.gradient(logits, labels, g[r], reduction=r) for r in g)
    np.testing.assert_allclose(by_arrays[0], expected, rtol=GRADIENT_BAR, atol=ZERO)
    assert by_options.pop("z_loss") == INF  # lse^2
    if head:
        assert by_options.pop("softcap") == 0
        assert_close(by_arrays[1], np.asarray(arrays[0], np.float64).T @ expected)
    for name, derivative in by_options.items():
        assert np.isfinite(derivative).all(), name


@vjp_by_default
def test_the_second_derivative_by_an_option_that_is_off(rule):
    """By logits, z-loss and softcap. For the z-loss it is 2 lse q, also at an lse of 3e19."""
    labels = jnp.array([0])

    def f(options, hidden):
        return sxe.linear_softmax_cross_entropy(hidden, jnp.eye(2), labels, rule=rule, **options)

    options = {"z_loss": jnp.float32(0), "softcap": jnp.float32(INF)}
    mixed = jax.jit(jax.jacobian(jax.grad(f, argnums=1)))(options, jnp.array([[3e19, 0.0]]))
    np.testing.assert_allclose(mixed["z_loss"], [[6e19, 0]], rtol=LOSS_BAR)
    assert (np.asarray(mixed["softcap"]) == 0).all()
    twice = jax.jit(jax.jacobian(jax.grad(f)))(options, jnp.array([[3.0, 1.0]]))
    for derivative in jax.tree.leaves(twice):
        assert derivative == 0


@both_losses
def test_a_z_loss_is_right_where_the_square_of_lse_overflows(head, rule):
    logits, labels, z = jnp.array([[3e19, 0.0]]), jnp.array([0]), jnp.float32(1e-20)
    loss, arrays = sxe.softmax_cross_entropy, (logits,)
    if head:
        loss, arrays = sxe.linear_softmax_cross_entropy, (logits, jnp.eye(2))

    def f(scale, z, *arrays):
        return scale * loss(*arrays, labels, z_loss=z, rule=rule)

    run = jax.jit(jax.value_and_grad(f, argnums=(1, 2)))
    for scale in (1.0, 0.0):  # 0 times an infinite lse^2 as well
        value, (by_z, by_logits) = run(scale, z, *arrays)
        np.testing.assert_allclose(value, scale * 9e18, rtol=LOSS_BAR)
        np.testing.assert_allclose(by_logits, [[scale * 0.6, 0]], rtol=LOSS_BAR)
        assert by_z == (INF if scale else 0)
    for scale in (1.0, 0.0):
        _, (_, by_logits) = run(scale, 0 * z, *arrays)
        assert (np.asarray(by_logits) == 0).all()
    if not head:
        value, gradient = sxe.softmax_cross_entropy_with_gradient(logits, labels, z_loss=z)
        np.testing.assert_allclose(value, 9e18, rtol=LOSS_BAR)
        np.testing.assert_allclose(gradient, [[0.6, 0]], rtol=LOSS_BAR)


def test_eager_and_jitted_agree():
    logits = normal(3, 5) * 30  # the shape of other tests without jit, which share operations
    logits[2, 1] = -INF
    labels = np.array([1, 9, 4])
    f = jax.value_and_grad(lambda x: sxe.softmax_cross_entropy(x, labels, reduction="none").sum())
    eager, jitted = f(logits), jax.jit(f)(logits)
    with jax.disable_jit():
        plain = f(logits)
    for other in (jitted, plain):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=SAME_FLOAT32), eager, other)
