"""The row kernels for GPUs: on a GPU, or interpreted on a CPU, and lowered by JAX alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sxe
from sxe import _linear_softmax_cross_entropy, _softmax_cross_entropy
from sxe._backend import Backend, backend_of
from sxe._rows.normalizer import normalize_tile

INTERPRETS = jax.default_backend() != "gpu"
BACKEND = Backend("gpu", is_local=True, interprets_kernels=INTERPRETS)

needs_pallas = pytest.mark.skipif(
    BACKEND.needs_for_row_kernels is not None, reason="needs JAX 0.11.2"
)

kernel_loss = functools.partial(sxe.softmax_cross_entropy, implementation="mosaic_gpu")
kernel_gradient = functools.partial(
    sxe.softmax_cross_entropy_with_gradient, implementation="mosaic_gpu"
)


@pytest.fixture
def backend(monkeypatch):
    """Makes calls trace as for a GPU, so that the kernels compute the results."""
    for module in (_softmax_cross_entropy, _linear_softmax_cross_entropy):
        monkeypatch.setattr(module, "backend_of", lambda *arrays: BACKEND)
    jax.clear_caches()  # forget calls that were traced for a CPU
    yield BACKEND
    jax.clear_caches()


def problem(rows, classes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, classes)) * 3
    labels = rng.integers(0, classes, rows)
    logits[0, labels[0]] += 40  # a confident row
    return jnp.asarray(logits, dtype), jnp.asarray(labels, jnp.int32)


@pytest.mark.skipif(INTERPRETS, reason="needs a GPU, where warpgroups may meet in another order")
@pytest.mark.parametrize(("rows", "classes"), [(40, 3000), (5000, 64), (600, 131072)])
def test_two_runs_give_the_same_bits(rows, classes):
    given = problem(rows, classes, "float32")
    run = jax.jit(kernel_gradient)
    for a, b in zip(run(*given), run(*given), strict=True):
        np.testing.assert_array_equal(a, b)


def bound(dtype):
    """The relative tolerance of a gradient, and the absolute one for its subnormal numbers."""
    info = jnp.finfo(dtype)
    return {"rtol": max(2e-5, float(info.eps)), "atol": float(info.smallest_normal)}


# Short and long rows, with one or several fragments, with whole or ragged blocks, with fewer blocks
# than warpgroups, and with more blocks than the ring has slots, so that some are read twice.
SIZES = [
    (5, 8, "bfloat16"),
    (6, 1000, "bfloat16"),
    (3, 388, "float32"),
    (2, 1032, "float16"),
    (3, 3000, "float32"),
    (2, 16384, "bfloat16"),
    (2, 65544, "float32"),
]


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("rows", "classes", "dtype"), SIZES)
def test_it_agrees_with_the_oracle(rows, classes, dtype):
    logits, labels = problem(rows, classes, dtype)
    weights = np.random.default_rng(1).random(rows, np.float32) + 0.5
    given = np.asarray(logits, np.float64), np.asarray(labels)
    for z_loss in (0.0, 0.01) if classes < 2000 else (0.01,):
        options = {"weights": weights, "z_loss": z_loss}
        loss, gradient = jax.jit(kernel_gradient)(logits, labels, **options)
        np.testing.assert_allclose(loss, oracle.loss(*given, **options), rtol=1e-6)
        assert gradient.dtype == logits.dtype
        assert_gradient(gradient, oracle.gradient(*given, **options))


def targets_of(kind, labels, classes):
    """Labels or dense targets, and options for them."""
    rng, shape = np.random.default_rng(11), (len(labels), classes)
    options = {}
    if "weights" in kind:
        options["class_weights"] = np.linspace(0.5, 2, classes, dtype=np.float32)
    if "smoothing" in kind:
        options["label_smoothing"] = np.float32(0.1)
    if "dense" in kind:
        # Targets of very different sizes, with any sum, and 0 for some classes.
        labels = np.exp(rng.normal(0, 8, shape)) * (rng.random(shape) < 0.8)
        # For the smallest ones, float16 gradients would be inexact with XLA as well.
        labels = np.where(labels < 1e-3, 0, labels / labels.sum(axis=-1, keepdims=True))
        labels = jnp.asarray(labels, "bfloat16" if "bfloat16" in kind else "float32")
    return labels, options


KINDS = [
    "smoothing",
    "smoothing, class weights",
    "dense",
    "dense, bfloat16",
    "dense, bfloat16, smoothing, class weights",
]


# Rows with one or several fragments, ragged rows, and long rows that are partly read twice.
SIZES_OF_TARGETS = [
    *((5, 64, "bfloat16"), (6, 1000, "bfloat16"), (3, 392, "float32")),
    *((2, 1064, "float16"), (3, 1064, "float32"), (3, 5000, "bfloat16")),
    *((2, 50264, "bfloat16"), (2, 32768, "float32")),
]
QUICK = [
    *((5, 64, "bfloat16", kind) for kind in ("smoothing, class weights", "dense, bfloat16")),
    *((3, 1064, "float32", kind) for kind in ("smoothing", "dense")),
]


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("rows", "classes", "dtype", "kind"),
    [
        pytest.param(*size, kind, marks=() if (*size, kind) in QUICK else pytest.mark.slow)
        for size in SIZES_OF_TARGETS
        for kind in KINDS
    ],
)
def test_targets_of_classes_agree_with_the_oracle(rows, classes, dtype, kind):
    """With and without a z-loss and weights, one of which is 0."""
    logits, labels = problem(rows, classes, dtype)
    labels, options = targets_of(kind, labels, classes)
    weights = np.random.default_rng(1).random(rows, np.float32) + 0.5
    weights[1] = 0
    for more in ({}, {"weights": weights, "z_loss": 0.01}) if classes < 2000 else ({},):
        loss, gradient = jax.jit(kernel_gradient)(logits, labels, **options, **more)
        given = np.asarray(logits, np.float64), np.asarray(labels)
        np.testing.assert_allclose(loss, oracle.loss(*given, **options, **more), rtol=1e-6)
        assert gradient.dtype == logits.dtype
        expected = oracle.gradient(*given, **options, **more)
        # The float64 reference computes the difference T q - t, which cancels.
        np.testing.assert_allclose(
            np.asarray(gradient, np.float64), expected, **bound(dtype) | {"atol": 1e-7}
        )


def targets_for_digits(classes):
    """One class has nearly the whole target, all classes have equal targets, or some have none."""
    for most in (7, 8):  # the class of the largest logit, and another class
        t = np.full(classes, 1e-9)
        t[most] = 3
        yield t
    yield np.full(classes, 1 / classes)
    yield np.where(np.arange(classes) % 5 == 0, np.arange(classes) / 7, 0)
    yield np.eye(classes)[7]


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("classes", [96, pytest.param(1060, marks=pytest.mark.slow)])
def test_its_digits_with_dense_targets(classes):
    by_kernel = jax.jit(functools.partial(kernel_gradient, reduction="sum"))
    for x in np.array(list(exact_rows(classes)), np.float32):
        for t in np.array(list(targets_for_digits(classes)), np.float32):
            loss, (gradient,) = by_kernel(jnp.asarray(x)[None], jnp.asarray(t)[None])
            if np.isinf(x[t > 0]).any():  # a class with a target has probability 0
                assert loss == np.inf
                continue
            exact, _ = oracle.exact_row(x, t)
            assert oracle.relative_error(loss, exact) < 1e-6 if exact > 1e-30 else loss < 1e-29
            assert max(oracle.gradient_errors(np.asarray(gradient), x, t)) < 2e-5


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("classes", [64, pytest.param(1064, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives_by_dense_targets(classes, dtype):
    """First and second derivatives, with weights and a masked row that contains NaN."""
    rng = np.random.default_rng(12)
    x, t = rng.standard_normal((5, classes)), rng.random((5, classes))
    x[1], t[1] = np.nan, np.nan
    where, weights = np.arange(5) != 1, rng.random(5, np.float32) + 0.5
    v = jnp.asarray(rng.standard_normal((5, classes)), jnp.float32)
    given = jnp.asarray(x, jnp.float32), jnp.asarray(t, dtype), jnp.asarray(weights)

    def found(f):
        def loss(x, t, w):
            return jnp.sin(f(x, t, weights=w, where=where, z_loss=0.01))

        def curvature(x, t, w):
            d_x, d_t = jax.grad(loss, (0, 1))(x, t, w)
            return jnp.sum(jnp.where(where[:, None], v * (d_x + d_t.astype(d_x.dtype)), 0))

        by_each = (0, 1, 2)
        return loss(*given), jax.grad(loss, by_each)(*given), jax.grad(curvature, by_each)(*given)

    ours, xla = (jax.tree.leaves(found(f)) for f in (kernel_loss, sxe.softmax_cross_entropy))
    for a, b in zip(ours, xla, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(b).all()
        assert np.any(b)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("classes", [64, 1064])
def test_the_derivative_by_label_smoothing_beside_bad_labels(classes):
    """Memory that the kernel has not written has no effect on it."""
    logits, labels = problem(4, classes, "float32")
    labels = labels.at[1].set(classes).at[2].set(-1)

    def found(f):
        return jax.grad(lambda a: f(logits, labels, label_smoothing=a, reduction="sum"))(0.1)

    ours, xla = found(kernel_loss), found(sxe.softmax_cross_entropy)
    assert np.isfinite(xla)
    np.testing.assert_allclose(ours, xla, rtol=1e-5)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("classes", [64, pytest.param(1064, marks=pytest.mark.slow)])
def test_dense_targets_that_are_not_finite(classes, bad):
    """Only their row is NaN. The same is true if the sum of targets overflows."""
    logits, labels = problem(3, classes, "float32")
    targets = jax.nn.one_hot(labels, classes).at[1, 4:6].set(bad)
    loss, gradient = kernel_gradient(logits, targets)
    assert jnp.isnan(loss)
    assert jnp.isnan(kernel_loss(logits, targets))
    assert jnp.isnan(gradient[1]).all()
    others = jnp.array([0, 2])
    expected = kernel_gradient(logits, labels)[1][others]
    np.testing.assert_allclose(gradient[others], expected, rtol=2e-5, atol=1e-30)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("mask", ["where", "weights"])
def test_derivatives_by_options_beside_targets_that_do_not_count(mask):
    rng = np.random.default_rng(15)
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32).at[1].set(jnp.nan)
    t = jnp.asarray(rng.random((5, 64)), jnp.float32).at[1].set(jnp.nan)
    counts = {mask: jnp.asarray(np.arange(5) != 1, bool if mask == "where" else "float32")}

    def loss(f, a, c):
        return f(x, t, label_smoothing=a, class_weights=c, **counts)

    by_smoothing_and_weights = jax.grad(loss, (1, 2))
    given = 0.1, jnp.linspace(0.5, 2, 64)
    ours, xla = (
        by_smoothing_and_weights(f, *given) for f in (kernel_loss, sxe.softmax_cross_entropy)
    )
    for a, b in zip(ours, xla, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_for_narrow_targets_are_rounded_once(dtype):
    """They are rounded after a loss scale, which keeps values below the range of float16."""
    x, t = jnp.zeros((4, 64)).at[1, 0].set(3), jnp.full((4, 64), 1 / 64, dtype)
    weights = jnp.full(4, 1e-9)

    def gradient(f):
        scaled = lambda t: 2.0**15 * f(x, t, weights=weights, reduction="sum")  # noqa: E731
        return jax.grad(scaled)(t)

    ours, xla = gradient(kernel_loss), gradient(sxe.softmax_cross_entropy)
    assert ours.dtype == dtype
    assert np.all(np.asarray(ours, np.float64) > 0)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(*(np.asarray(a, np.float64) for a in (ours, xla)), rtol=eps)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("classes", [64, 1064])
def test_the_lse_of_a_row_of_minus_infinity(classes):
    logits, labels = problem(3, classes, "float32")
    logits = logits.at[1].set(-jnp.inf)
    (loss, metrics), gradient = kernel_gradient(logits, labels, return_metrics=True)
    assert jnp.isnan(loss)
    assert jnp.isnan(gradient[1]).all()
    assert metrics.lse[1] == -jnp.inf


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("mapped", ["logits", "targets", "both", "class weights"])
def test_examples_with_targets_of_classes(mapped):
    """With vmap, a single kernel computes the rows of all examples."""
    rng = np.random.default_rng(13)
    x = jnp.asarray(rng.standard_normal((2, 3, 64)), jnp.float32)
    t = jnp.asarray(rng.random((2, 3, 64)), jnp.float32)
    c, y = jnp.asarray(rng.random((2, 64)), jnp.float32), jnp.array([3, 60, 7])
    axes = {"logits": (0, None), "targets": (None, 0), "both": (0, 0), "class weights": (None, 0)}

    def gradient(f, x, second):
        if mapped == "class weights":
            return jax.grad(lambda x: f(x, y, class_weights=second, label_smoothing=0.2))(x)
        return jax.grad(f)(x, second)

    given = (
        x if mapped in ("logits", "both") else x[0],
        c if mapped == "class weights" else t if mapped != "logits" else t[0],
    )
    ours, xla = (
        jax.vmap(functools.partial(gradient, f), axes[mapped])(*given)
        for f in (kernel_loss, sxe.softmax_cross_entropy)
    )
    np.testing.assert_allclose(ours, xla, rtol=2e-5, atol=1e-7)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("rows", "classes", "dtype"), [(5, 67, "float32"), (7, 1001, "bfloat16")])
def test_single_rows_agree_with_the_oracle(rows, classes, dtype):
    """With sizes that no vector divides, and a cotangent for each row."""
    logits, labels = problem(rows, classes, dtype)
    g = np.random.default_rng(9).standard_normal(rows).astype(np.float32)
    options = {"reduction": "none", "z_loss": 0.01}
    losses, pull = jax.vjp(lambda x: kernel_loss(x, labels, **options), logits)
    (gradient,) = pull(jnp.asarray(g))
    given = np.asarray(logits, np.float64), np.asarray(labels)
    np.testing.assert_allclose(losses, oracle.loss(*given, **options), rtol=1e-6)
    assert_gradient(gradient, oracle.gradient(*given, g, **options))


@needs_pallas
@pytest.mark.parametrize("classes", [1032, 3000, pytest.param(16384, marks=pytest.mark.slow)])
def test_a_gradient_that_is_narrower_than_the_logits(classes):
    """As a head in bfloat16 needs it."""
    from sxe._rows import gpu_gradient

    logits, labels = problem(3, classes, "float32")
    ones = jnp.ones(3)
    terms = gpu_gradient.RowTerms(labels, ones > 0, ones, 0 * ones)
    run = functools.partial(
        gpu_gradient.state_and_gradient, d_dtype="bfloat16", cores=1, interpret=INTERPRETS
    )
    gradient = jax.jit(run)(logits, None, terms).d
    assert gradient.dtype == jnp.bfloat16
    given = np.asarray(logits, np.float64), np.asarray(labels)
    assert_gradient(gradient, oracle.gradient(*given, reduction="sum"))


TARGETS = ["label", "uniform", "dense", "shared"]


def run_alone(rows, classes, dtypes, targets):
    """Runs the gradient kernel on one multiprocessor, where a program has many rows.

    Returns the gradient and the row losses, and the same from the float64 reference. One row in
    the middle has no gradient.
    """
    from sxe._rows import gpu_gradient

    dtype, d_dtype, dense_dtype = dtypes
    logits, labels = problem(rows, classes, dtype)
    rng = np.random.default_rng(14)
    label_target, uniform = rng.random((2, rows), np.float32) + 0.5
    dense = rng.random((1 if targets == "shared" else rows, classes), np.float32)
    dense = np.asarray(jnp.asarray(dense, dense_dtype), np.float64)
    has_gradient, weight = np.arange(rows) != rows // 2, rng.random(rows, np.float32) + 0.5
    t = np.eye(classes)[np.asarray(labels)]
    terms = {"label": labels, "has_gradient": has_gradient, "weight": weight}
    if targets != "label":
        t = t * label_target[:, None] + (uniform[:, None] if targets == "uniform" else dense)
        terms["label_target"] = label_target
    if targets == "uniform":
        terms["uniform"] = uniform
    terms = gpu_gradient.RowTerms(lse_weight=0 * weight, **jax.tree.map(jnp.asarray, terms))
    dense = jnp.asarray(dense, dense_dtype) if targets in ("dense", "shared") else None
    run = functools.partial(
        gpu_gradient.state_and_gradient, d_dtype=d_dtype, cores=1, interpret=INTERPRETS
    )
    found = jax.jit(run)(logits, dense, terms)
    x = np.asarray(logits, np.float64)
    m, log1p_r, x_label = found.state.m, np.log1p(found.state.r), found.x_label
    losses = m - x_label + log1p_r
    if targets != "label":
        total = classes * uniform if targets == "uniform" else found.total
        losses = label_target * (m - x_label) + found.gap + (label_target + total) * log1p_r
    expected = oracle.gradient(x, t, weight * has_gradient, reduction="sum")
    return (found.d, losses), (expected, oracle.loss(x, t, reduction="none"))


def assert_alone(found, expected, targets):
    """Checks each entry of the gradient, and each loss."""
    (d, losses), (gradient, expected_losses) = found, expected
    limits = bound(d.dtype)
    # The reference's difference T q - t cancels, and so does the difference in the kernel, where T
    # is about 1000 or 20,000. With only a label there is just the label's own difference.
    limits["atol"] = max(1e-14, limits["atol"]) if targets == "label" else 1e-5
    np.testing.assert_allclose(np.asarray(d, np.float64), gradient, **limits)
    assert not np.any(np.asarray(d[len(d) // 2], np.float64))
    # For a confident row, float64 is not more precise than this.
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6, atol=1e-14)


@needs_pallas
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(
    ("rows", "classes", "dtypes"),
    [
        (41, 64, ("float32", "float32", "bfloat16")),
        pytest.param(61, 1000, ("bfloat16", "bfloat16", "float32"), marks=pytest.mark.slow),
        pytest.param(40, 904, ("float32", "float32", "float32"), marks=pytest.mark.slow),
        (5, 1064, ("float32", "float32", "float32")),
        pytest.param(5, 9000, ("float32", "float32", "bfloat16"), marks=pytest.mark.slow),
        pytest.param(6, 4104, ("bfloat16", "bfloat16", "float32"), marks=pytest.mark.slow),
    ],
)
def test_rows_that_follow_each_other_through_the_ring(rows, classes, dtypes, targets):
    assert_alone(*run_alone(rows, classes, dtypes, targets), targets)


@needs_pallas
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(
    "dtypes",
    [
        ("float32", "bfloat16", "float32"),
        pytest.param(("bfloat16", "bfloat16", "float32"), marks=pytest.mark.slow),
        pytest.param(("float32", "float32", "bfloat16"), marks=pytest.mark.slow),
    ],
)
def test_blocks_that_are_read_again(dtypes, targets, monkeypatch):
    """As with 131,072 classes, but here with two slots per warpgroup and several rows."""
    from sxe._rows import gpu_long_rows

    monkeypatch.setattr(gpu_long_rows, "MOST_SLOTS", 2)
    assert_alone(*run_alone(3, 21000, dtypes, targets), targets)


@pytest.mark.parametrize("dense", [0, 2, 4])
@pytest.mark.parametrize(("x", "d"), [(2, 2), (4, 4), (4, 2)])
def test_what_a_multiprocessor_holds(x, d, dense):
    """A program may use 32 barriers and 227 KiB. Programs share 228 KiB, each with 1 KiB lost."""
    from sxe._rows import gpu_long_rows, gpu_short_rows
    from sxe._rows.gpu_terms import ItemSizes

    sizes = ItemSizes(x, d, dense)
    launches = [
        *(
            gpu_short_rows.short_launch(4096, k, 16 // x, cores=132, itemsizes=sizes)
            for k in range(8, 1025, 8)
            if x == d
        ),
        *(
            gpu_long_rows.long_launch(
                4096, k, 16 // x, cores=132, itemsizes=sizes, is_label_alone=is_label_alone
            )
            for k in (*range(1032, 9000, 8), *range(9000, 300_000, 776))
            for is_label_alone in (not dense, False)
        ),
    ]
    for launch in launches:
        slots = launch.groups * launch.slots
        assert 2 <= launch.slots
        assert slots <= 32
        assert launch.slot[-1] % launch.vector == 0
        bytes_ = math.prod(launch.slot) * slots * (x + dense)
        bytes_ += 2 * launch.groups * launch.slot[0] * d if launch.narrows else 0
        bytes_ += 2 * 4 * 4 * launch.groups * 4 + 8 * (slots + 1)
        programs = -(-launch.programs // 132)
        assert bytes_ <= 227 * 1024
        assert programs * (bytes_ + 1024) <= 228 * 1024


def assert_gradient(actual, expected):
    """Compares gradients as far as float64 is precise. Other tests cover confident labels."""
    actual, limits = np.asarray(actual, np.float64), bound(actual.dtype)
    np.testing.assert_allclose(
        actual, expected, rtol=limits["rtol"], atol=max(1e-14, limits["atol"])
    )


def exact_rows(classes):
    """Rows with leads of 5 to 80, offsets, ties, and classes with probability 0."""
    rng = np.random.default_rng(2)
    for lead, offset in [(0, 0), (5, 1e4), (20, 0), (40, 0), (80, 0), (11, 1e8)]:
        row = rng.standard_normal(classes)
        row[7] = row.max() + lead
        yield row + offset
    yield np.full(classes, 1e30)
    yield np.where(np.arange(classes) % 3 == 0, -np.inf, 2.0)
    yield np.full(classes, float(np.finfo(np.float32).min))
    yield np.where(np.arange(classes) == 7, 60, 1.8e-6)  # differences that float32 rounds


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("classes", "kinds"),
    [(96, slice(None)), pytest.param(1060, slice(1, 10, 4), marks=pytest.mark.slow)],
)
def test_its_digits_are_those_of_60(classes, kinds):
    by_kernel = jax.jit(functools.partial(kernel_gradient, reduction="sum"))
    for x in np.array(list(exact_rows(classes)), np.float32)[kinds]:
        for label in (7, 8):
            given = jnp.asarray(x)[None], jnp.array([label])
            loss, (gradient,) = by_kernel(*given)
            targets = np.arange(classes) == label
            exact, _ = oracle.exact_row(x, targets)
            # With a lead of 80, exponentials are near the smallest float32 numbers.
            assert oracle.relative_error(loss, exact) < 1e-6 if exact > 1e-30 else loss < 1e-29
            assert max(oracle.gradient_errors(np.asarray(gradient), x, targets)) < 2e-5


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("smoothing", [1e-8, pytest.param(0.5, marks=pytest.mark.slow)])
def test_its_digits_with_label_smoothing(smoothing):
    by_kernel = functools.partial(kernel_gradient, reduction="sum", label_smoothing=smoothing)
    for x in np.array(list(exact_rows(96)), np.float32):
        for label in (7, 8):
            loss, (gradient,) = jax.jit(by_kernel)(jnp.asarray(x)[None], jnp.array([label]))
            targets = oracle.exact_targets(label, 96, np.float32(smoothing))
            if np.isinf(x).any():  # a class with a target has probability 0
                assert loss == np.inf
                continue
            exact, _ = oracle.exact_row(x, targets)
            assert oracle.relative_error(loss, exact) < 1e-6
            assert max(oracle.gradient_errors(np.asarray(gradient), x, targets)) < 2e-5


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [64, 67])
def test_examples_that_share_their_logits(classes, reduction):
    """A vmap over only the weights, inside of a derivative."""
    logits, labels = problem(4, classes, "float32")
    weights = jnp.asarray(np.random.default_rng(8).random((2, 4)), jnp.float32).at[0, 1].set(0)

    def gradient(f):
        def loss(x):
            of_example = lambda w: f(x, labels, weights=w, reduction=reduction)  # noqa: E731
            return jnp.sum(jnp.sin(jax.vmap(of_example)(weights)))

        return jax.jit(jax.grad(loss))(logits)

    ours, xla = gradient(kernel_loss), gradient(sxe.softmax_cross_entropy)
    np.testing.assert_allclose(ours, xla, rtol=2e-5, atol=1e-9)


@needs_pallas
@pytest.mark.usefixtures("backend", "double")
def test_vmap_where_x64_is_on():
    logits, labels = problem(6, 64, "float32")
    logits, labels = logits.reshape(2, 3, 64), labels.reshape(2, 3)
    ours = jax.vmap(jax.grad(kernel_loss))(logits, labels)
    assert ours.dtype == jnp.float32
    expected = jax.vmap(jax.grad(sxe.softmax_cross_entropy))(logits, labels)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-9)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_row_without_a_loss_whose_label_weighs_nothing(bad):
    """The row's weight is not 0, only its class weight, so loss and gradient are NaN."""
    logits, labels = problem(3, 64, "float32")
    logits, labels = logits.at[1, 4].set(bad), labels.at[1].set(2)
    class_weights = jnp.ones(64).at[2].set(0)
    loss, gradient = jax.value_and_grad(kernel_loss)(logits, labels, class_weights=class_weights)
    assert jnp.isnan(loss)
    assert jnp.isnan(gradient[1]).all()


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("smoothing", [1e-8, 0.1])
def test_label_smoothing_over_the_smallest_logits(smoothing):
    """The sum of the gaps would overflow, but the sum of the costs does not."""
    logits = jnp.zeros((3, 64)).at[:, ::3].set(jnp.finfo(jnp.float32).min)
    labels, options = jnp.array([1, 2, 4]), {"label_smoothing": smoothing, "reduction": "sum"}
    loss, gradient = jax.value_and_grad(kernel_loss)(logits, labels, **options)
    targets = [oracle.exact_targets(label, 64, np.float32(smoothing)) for label in (1, 2, 4)]
    exact = sum(oracle.exact_row(x, t)[0] for x, t in zip(np.asarray(logits), targets, strict=True))
    assert oracle.relative_error(loss, exact) < 1e-6
    for d, x, t in zip(gradient, logits, targets, strict=True):
        assert max(oracle.gradient_errors(np.asarray(d), np.asarray(x), t)) < 2e-5


@needs_pallas
@pytest.mark.usefixtures("backend")
def test_derivatives_where_nothing_is_spread():
    """With smoothing 0, 0 log 0 is 0 for a class with probability 0, also in derivatives."""
    logits, labels = problem(4, 64, "float32")
    logits = logits.at[1, 5].set(-jnp.inf)

    def by_smoothing(f, x):
        return jax.grad(lambda a: f(x, labels, label_smoothing=a))(0.0)

    for derivative in (by_smoothing, lambda f, x: jax.grad(functools.partial(by_smoothing, f))(x)):
        ours, xla = (derivative(f, logits) for f in (kernel_loss, sxe.softmax_cross_entropy))
        assert np.isfinite(xla).all()
        np.testing.assert_allclose(ours, xla, rtol=2e-5, atol=1e-7)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("classes", [96, pytest.param(1060, marks=pytest.mark.slow)])
def test_rows_of_infinities_and_bad_labels(classes):
    """Exactly the rows that are NaN without the kernel are NaN with it."""
    logits, _ = problem(8, classes, "float32")
    logits = logits.at[1, 3].set(jnp.nan).at[2, 5].set(jnp.inf).at[3].set(-jnp.inf)
    logits = logits.at[4, 9].set(-jnp.inf)
    labels = jnp.array([1, 1, 1, 1, 9, classes, -1, 2])
    where = jnp.array([True, False, False, False, True, False, False, True])
    by_kernel, by_xla = jax.jit(kernel_gradient), jax.jit(sxe.softmax_cross_entropy_with_gradient)
    for i in range(8):
        given = logits[i : i + 1], labels[i : i + 1]
        ours, xla = by_kernel(*given), by_xla(*given)
        for a, b in zip(ours, xla, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-37)
        assert bool(jnp.isnan(ours[0])) == (i in (1, 2, 3, 5, 6))
    ours = kernel_gradient(logits, labels, where=where)
    xla = sxe.softmax_cross_entropy_with_gradient(logits, labels, where=where)
    assert float(ours[0]) == float(xla[0]) == np.inf  # the logit of the fourth label is -inf
    np.testing.assert_allclose(ours[1], xla[1], rtol=2e-5, atol=1e-37)
    assert not np.any(np.asarray(ours[1])[~np.asarray(where)])


OPTIONS = [
    {},
    {"reduction": "sum"},
    {"where": np.array([[True, False], [True, True], [False, True]])},
    {"weights": np.array([[1.5, 0.0], [0.25, 1.0], [2.0, 3.0]], np.float32)},
    {"class_weights": "classes"},
    {"ignore_index": 3},
    {"axis": 0},
    {"z_loss": np.float32(0.01)},
    {"z_loss": np.float32(0.01), "ignore_index": 3, "class_weights": "classes"},
    {"label_smoothing": np.float32(0.1)},
    {"label_smoothing": np.float32(0.1), "ignore_index": 3, "class_weights": "classes"},
    {"where": "classes"},
    {"class_mask": "classes", "label_smoothing": np.float32(0.1)},
    {"label_smoothing": np.float32(0.1), "class_weights": "classes", "axis": 0},
    {"labels": "dense"},
    {"labels": "dense", "where": np.array([[True, False], [True, True], [False, True]])},
    {"labels": "dense", "label_smoothing": np.float32(0.1), "class_weights": "classes"},
    {"rule": "jvp", "ignore_index": 3},
    {"rule": "autodiff", "ignore_index": 3},
]
FLOATS = ("weights", "class_weights", "z_loss", "label_smoothing")


@needs_pallas
@pytest.mark.usefixtures("backend")
# 64 and 1064 use the gradient kernel, and 67 the state kernel, which some options always use.
@pytest.mark.parametrize(
    "classes", [64, *(pytest.param(k, marks=pytest.mark.slow) for k in (67, 1064))]
)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "none")
def test_options_as_without_it(options, classes):
    """Values, metrics, and the gradients for all differentiable arguments, with a cotangent."""
    rng = np.random.default_rng(3)
    logits, labels = rng.standard_normal((3, 2, classes)), rng.integers(0, classes, (3, 2))
    labels[1, 1] = 3
    # A row that does not count may contain NaN.
    logits[1, 1] = np.nan if options.get("ignore_index") else logits[1, 1]
    options = dict(options)
    if options.pop("labels", None):
        labels = rng.random((3, 2, classes)).astype(np.float32)
    if isinstance(options.get("where"), str):
        options["where"] = rng.random((3, 2, classes)) < 0.8
        np.put_along_axis(options["where"], labels[..., None], values=True, axis=-1)
    if "class_weights" in options:
        options["class_weights"] = np.linspace(0.5, 2.0, classes, dtype=np.float32)
    if "class_mask" in options:
        options["class_mask"] = ~np.isin(range(classes), labels + 1) | np.isin(
            range(classes), labels
        )
    logits = jnp.asarray(np.moveaxis(logits, -1, options.get("axis", -1)), jnp.float32)
    floats = {k: jnp.asarray(v) for k, v in options.items() if k in FLOATS}
    others = {k: v for k, v in options.items() if k not in floats}

    def loss(f, logits, floats):
        value, metrics = f(logits, jnp.asarray(labels), return_metrics=True, **floats, **others)
        return 0.7 * value, metrics

    results = []
    for f in (kernel_loss, sxe.softmax_cross_entropy):
        run = jax.value_and_grad(functools.partial(loss, f), argnums=(0, 1), has_aux=True)
        results.append(jax.tree.leaves(jax.jit(run)(logits, floats)))
    if "rule" not in options:
        for f in (kernel_gradient, sxe.softmax_cross_entropy_with_gradient):
            found = f(logits, jnp.asarray(labels), return_metrics=True, **floats, **others)
            results.append(jax.tree.leaves(found))
    for i in range(0, len(results), 2):
        for a, b in zip(results[i], results[i + 1], strict=True):
            assert np.isfinite(b).all()
            # The derivative for a class weight is a difference of losses of about log K.
            atol = 1e-7 if classes < 1000 else 5e-7
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=atol)


HEAD_OPTIONS = [
    {},
    {"where": np.arange(5) % 2 == 0},
    {"weights": np.array([1.5, 0, 0.25, 2, 3], np.float32)},
    {"weights": np.array([1.5, 0, 0.25, 2, 3], np.float32), "ignore_index": 3},
    {"z_loss": np.float32(0.01), "ignore_index": 3, "class_weights": "classes"},
    {"label_smoothing": np.float32(0.1), "ignore_index": 3},
    {"label_smoothing": np.float32(0.1), "ignore_index": 3, "class_weights": "classes"},
    {"bias": "classes", "logit_scale": np.float32(0.7), "softcap": np.float32(5)},
    {"reduction": "none", "ignore_index": 3, "class_weights": "classes"},
    {"reduction": "none", "bias": "classes", "where": np.arange(5) % 2 == 0},
    {"reduction": "none", "label_smoothing": np.float32(0.1), "ignore_index": 3},
    {"bias": "classes", "label_smoothing": np.float32(0.1), "ignore_index": 3},
    {"labels": "dense", "where": np.arange(5) % 2 == 0},
    {"logit_scale": np.array([1.5, 0, -0.25, 2, 3], np.float32), "where": np.arange(5) % 2 == 0},
    {"class_mask": "classes", "label_smoothing": np.float32(0.1), "ignore_index": 3},
    {"reduction": "none", "class_mask": "classes", "where": np.arange(5) % 2 == 0},
]


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(64, "float32"), pytest.param(1032, "bfloat16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=lambda options: " ".join(options) or "none")
def test_the_head_as_without_it(options, classes, dtype):
    """In two chunks, with a row that does not count and contains NaN."""
    rng = np.random.default_rng(7)
    hidden, kernel = rng.standard_normal((5, 4)), rng.standard_normal((4, classes)) / 2
    labels = np.array([1, 3, 0, 60, 7])
    options = dict(options)
    masked = any(name in options for name in ("where", "ignore_index", "weights"))
    hidden[1] = np.nan if masked else hidden[1]
    if options.pop("labels", None):
        labels = rng.random((5, classes)).astype(np.float32)
    for name in ("class_weights", "bias"):
        if name in options:
            options[name] = np.linspace(0.5, 2.0, classes, dtype=np.float32)
    if "class_mask" in options:
        options["class_mask"] = np.arange(classes) % 7 != 5
    names = (*FLOATS, "bias", "logit_scale", "softcap")
    floats = {k: jnp.asarray(v) for k, v in options.items() if k in names}
    others = {k: v for k, v in options.items() if k not in floats}
    g = jnp.asarray(rng.standard_normal(5), jnp.float32)

    def loss(f, hidden, kernel, floats):
        given = hidden, kernel, jnp.asarray(labels)
        value, metrics = f(*given, chunk_size=3, return_metrics=True, **floats, **others)
        return jnp.sum((g if value.ndim else g[0]) * value), metrics

    by_kernel = functools.partial(sxe.linear_softmax_cross_entropy, implementation="mosaic_gpu")
    given = jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), floats
    ours, xla = (
        jax.tree.leaves(
            jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1, 2), has_aux=True))(*given)
        )
        for f in (by_kernel, sxe.linear_softmax_cross_entropy)
    )
    for a, b in zip(ours, xla, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(b).all()
        # In bfloat16, gradients are sums of terms that were rounded to bfloat16.
        tolerance = 2e-5 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max() + 1e-7)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("classes", [64, 67])
def test_single_rows_times_cotangents(classes):
    logits, labels = problem(7, classes, "float32")
    logits, labels = logits.at[2].set(jnp.inf), labels.at[2].set(-100)
    weights = jnp.linspace(0.5, 2, 7)
    g = jnp.asarray(np.random.default_rng(4).standard_normal(7), jnp.float32)

    def pulled_back(f):
        def loss(logits, weights):
            options = {"ignore_index": -100, "weights": weights, "reduction": "none"}
            return f(logits, labels, z_loss=0.01, **options)

        losses, pull = jax.vjp(jax.jit(loss), logits, weights)
        return losses, *pull(g)

    ours, xla = pulled_back(kernel_loss), pulled_back(sxe.softmax_cross_entropy)
    for a, b in zip(ours, xla, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-9)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("classes", [64, pytest.param(67, marks=pytest.mark.slow)])
def test_rows_of_weight_0(classes):
    """One row has a loss, which is its weight's gradient. Others have none, or an invalid label."""
    logits, labels = problem(6, classes, "float32")
    logits = logits.at[1].set(jnp.nan).at[2, 3].set(jnp.inf).at[3].set(-jnp.inf)
    labels = labels.at[4].set(classes)
    weights = jnp.array([1.0, 0, 0, 0, 0, 0])
    options = {"z_loss": 0.01, "return_metrics": True}

    def found(f):
        def loss(logits, weights):
            return f(logits, labels, weights=weights, **options)

        def curvature(logits, weights):
            return jnp.sum(jax.grad(lambda *a: loss(*a)[0])(logits, weights) ** 2)

        run = jax.value_and_grad(loss, (0, 1), has_aux=True)
        value = loss(logits, weights)
        return value, jax.jit(run)(logits, weights), jax.grad(curvature, (0, 1))(logits, weights)

    ours, xla = (jax.tree.leaves(found(f)) for f in (kernel_loss, sxe.softmax_cross_entropy))
    for a, b in zip(ours, xla, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-9)
    weights_gradient = ours[-3]
    assert np.isfinite(weights_gradient).all()


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("targets", ["class weights", "smoothing", "dense"])
def test_a_row_of_weight_0_with_an_infinite_loss(targets):
    """It adds nothing to the gradients of what all rows share, or of the other rows."""
    logits, labels = problem(3, 64, "float32")
    logits = logits.at[1, labels[1]].set(-jnp.inf)
    weights, smoothing = jnp.array([1.0, 0, 2]), jnp.float32(0.1)
    given = {
        "class weights": (labels, {"class_weights": jnp.linspace(0.5, 2, 64)}),
        "smoothing": (labels, {"label_smoothing": smoothing}),
        "dense": (jax.nn.one_hot(labels, 64), {}),
    }[targets]

    def gradients(f):
        def loss(logits, targets, weights, options):
            return f(logits, targets, weights=weights, **options)

        which = (0, 2, 3) if targets != "dense" else (0, 1, 2)
        return jax.jit(jax.value_and_grad(loss, which))(logits, given[0], weights, given[1])

    ours, xla = (jax.tree.leaves(gradients(f)) for f in (kernel_loss, sxe.softmax_cross_entropy))
    for a, b in zip(ours, xla, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-9)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_under_a_loss_scale(reduction):
    """The gradient is rounded after the scale, which keeps values below the range of float16."""
    logits, labels = problem(3, 64, "float16")
    logits = (0.1 * logits).at[0, labels[0]].set(16)  # the other probabilities are about 1e-7

    def scaled(f):
        return jax.grad(lambda x: jnp.sum(2.0**15 * f(x, labels, reduction=reduction)))(logits)

    ours, xla = scaled(kernel_loss), scaled(sxe.softmax_cross_entropy)
    assert np.count_nonzero(ours[0]) == 64
    np.testing.assert_allclose(ours, xla, rtol=2e-3)


@needs_pallas
@pytest.mark.usefixtures("backend", "double")
def test_it_stays_in_32_bits_where_x64_is_on():
    """For long rows the interpreter fails with x64. A test below compiles long rows instead."""
    logits, labels = problem(5, 64, "float32")
    loss, gradient = kernel_gradient(logits, labels.astype(jnp.int64))
    assert loss.dtype == gradient.dtype == jnp.float32
    expected = sxe.softmax_cross_entropy_with_gradient(logits, labels)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, expected[1], rtol=2e-5, atol=1e-30)


def same_state(ours, plain):
    """Checks the state against the plain implementation. For a NaN row, only r has to be NaN."""
    np.testing.assert_array_equal(*(jnp.where(jnp.isnan(a.r), 0, a.m) for a in (ours, plain)))
    np.testing.assert_allclose(ours.r, plain.r, rtol=1e-6, atol=1e-37)


# All widths of a vector, rows for one warp, rows for less than a warpgroup, and parts to merge.
@needs_pallas
@pytest.mark.parametrize(
    ("rows", "classes", "dtype", "cores"),
    [
        (5, 1000, "bfloat16", 1),
        (1, 32, "float16", 1),
        (6, 50, "float32", 2),
        (9, 33, "float32", 1),
        (3, 4999, "bfloat16", 132),
        (2, 4098, "float16", 132),
        (2, 5000, "float32", 132),
        (0, 40, "float32", 1),
        (3, 31, "float32", 1),
        (4, 1, "bfloat16", 1),
    ],
)
def test_the_state_is_the_plain_twins(rows, classes, dtype, cores, monkeypatch):
    from sxe._rows import gpu_state

    monkeypatch.setattr(Backend, "cores", cores)
    x = np.random.default_rng(5).standard_normal((rows, classes)) * 3
    x = jnp.asarray(x, dtype).at[:1, classes // 2].add(40)
    same_state(gpu_state.normalize_tile(x, BACKEND), normalize_tile(x, BACKEND))


@needs_pallas
@pytest.mark.parametrize("cores", [1, 132])
@pytest.mark.parametrize("classes", [97, 3001])
def test_the_state_of_extreme_rows(classes, cores, monkeypatch):
    from sxe._rows import gpu_state

    monkeypatch.setattr(Backend, "cores", cores)
    x = np.array(list(exact_rows(classes)), np.float32)
    same_state(*(f(jnp.asarray(x), BACKEND) for f in (gpu_state.normalize_tile, normalize_tile)))
    x[0, 5], x[1, 7], x[2], x[3, : classes // 2] = np.inf, np.nan, -np.inf, -np.inf
    x[4, -1], x[5, 0] = np.inf, np.nan
    same_state(*(f(jnp.asarray(x), BACKEND) for f in (gpu_state.normalize_tile, normalize_tile)))


@needs_pallas
def test_examples_of_vmap_share_one_state_kernel():
    """A kernel for each example would leave three of four warps without a row."""
    from sxe._rows import gpu_state

    x = jnp.asarray(np.random.default_rng(6).standard_normal((2, 3, 40)), jnp.float32)

    def of_row(x):
        return gpu_state.normalize_tile(x, BACKEND)

    mapped = jax.vmap(jax.vmap(of_row))
    same_state(mapped(x), normalize_tile(x, BACKEND))
    calls = str(jax.make_jaxpr(mapped)(x))
    assert "grid=(1, 2)" in calls  # six rows in two warpgroups


@needs_pallas
@pytest.mark.usefixtures("backend")
def test_shards_of_the_classes():
    mesh = jax.make_mesh((2,), ("c",), axis_types=(AxisType.Auto,))
    logits, labels = problem(5, 80, "float32")
    loss = functools.partial(kernel_loss, axis_name="c")
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(P(None, "c"), P()), out_specs=P())
    ours = jax.jit(jax.value_and_grad(sharded))(logits, labels)
    xla = jax.value_and_grad(sxe.softmax_cross_entropy)(logits, labels)
    for a, b in zip(ours, xla, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-9)


@needs_pallas
@pytest.mark.usefixtures("backend")
def test_value_without_gradient():
    logits, labels = problem(5, 64, "float32")
    value = kernel_loss(logits, labels)
    np.testing.assert_allclose(value, sxe.softmax_cross_entropy(logits, labels), rtol=1e-6)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("classes", [64, pytest.param(1056, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transformations(classes, reduction):
    logits, labels = problem(6, classes, "float32")
    logits, labels = logits.reshape(2, 3, classes), labels.reshape(2, 3)

    def gradient(f):
        return jax.grad(lambda x, y: jnp.sum(jnp.sin(f(x, y, reduction=reduction))))

    expected = jax.vmap(gradient(sxe.softmax_cross_entropy))(logits, labels)
    mapped = jax.jit(jax.vmap(gradient(kernel_loss)))(logits, labels)
    scanned = jax.lax.map(lambda given: gradient(kernel_loss)(*given), (logits, labels))
    for found in (mapped, scanned):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-9)


@needs_pallas
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_second_derivatives(dtype):
    """Derivatives of the gradient, from jax.grad and from with_gradient. XLA computes both."""
    logits, labels = problem(4, 64, dtype)
    rng = np.random.default_rng(4)
    v = jnp.asarray(rng.standard_normal((4, 64)), dtype)
    weights = jnp.asarray(rng.random(4) + 0.5, jnp.float32)

    def curvature(f, logits, weights):
        _, d = f(logits, weights)
        return jnp.sum((d * v).astype(jnp.float32))

    def of_loss(loss):
        return jax.value_and_grad(lambda x, w: loss(x, labels, weights=w))

    def of_gradient(loss_and_gradient):
        return lambda x, w: loss_and_gradient(x, labels, weights=w)

    pairs = [
        (of_loss(kernel_loss), of_loss(sxe.softmax_cross_entropy)),
        (of_gradient(kernel_gradient), of_gradient(sxe.softmax_cross_entropy_with_gradient)),
    ]
    for pair in pairs:
        ours, xla = (
            jax.jit(jax.grad(functools.partial(curvature, f), (0, 1)))(logits, weights)
            for f in pair
        )
        for a, b in zip(ours, xla, strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert np.any(b)
            tolerance = 1e-5 if dtype == "float32" else 2e-2
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@needs_pallas
@pytest.mark.usefixtures("backend")
def test_what_the_kernels_do_not_serve_is_an_error():
    logits, labels = problem(4, 64, "float32")
    by_kernel = functools.partial(sxe.linear_softmax_cross_entropy, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"'mosaic_gpu' needs rule 'vjp' .* head, got 'jvp'; use"):
        by_kernel(jnp.eye(4), logits, labels, rule="jvp")
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match="float32, got float64; use 'xla'"),
    ):
        kernel_loss(logits.astype("float64"), labels)
    (n,) = jax.export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n, 64), "float32"), jax.ShapeDtypeStruct((n,), "int32")
    with pytest.raises(ValueError, match="'mosaic_gpu' needs sizes that are known"):
        jax.export.export(jax.jit(kernel_loss), platforms=["cuda"])(*shapes)


@needs_pallas
@pytest.mark.usefixtures("backend")
def test_no_rows():
    logits, labels = problem(4, 64, "float32")
    loss, gradient = kernel_gradient(logits[:0], labels[:0])
    assert loss == 0
    assert gradient.shape == (0, 64)


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        (Backend("cpu", is_local=True), "a program for a GPU, got one for a cpu"),
        (Backend("gpu", is_local=False, jax_version=(0, 12)), "rows on one device"),
        (Backend("gpu", is_local=True, jax_version=(0, 11, 1)), "JAX 0.11.2 or newer, got 0.11.1"),
    ],
    ids=["cpu", "several devices", "older JAX"],
)
def test_where_it_does_not_run_is_an_error(backend, why, monkeypatch):
    monkeypatch.setattr(_softmax_cross_entropy, "backend_of", lambda *arrays: backend)
    jax.clear_caches()
    logits, labels = problem(4, 64, "float32")
    with pytest.raises(ValueError, match=f"'mosaic_gpu' needs {why}"):
        kernel_loss(logits, labels)


def test_an_unknown_implementation_is_an_error():
    logits, labels = problem(4, 64, "float32")
    with pytest.raises(ValueError, match="implementation"):
        sxe.softmax_cross_entropy(logits, labels, implementation="triton")


@pytest.fixture
def gpu(monkeypatch):
    """Makes calls trace as for a GPU. They are not run."""
    monkeypatch.setattr(
        _softmax_cross_entropy, "backend_of", lambda *arrays: Backend("gpu", is_local=True)
    )
    jax.clear_caches()
    yield
    jax.clear_caches()


def lowered(f, classes, dtype="float32", rows=64):
    shapes = jax.ShapeDtypeStruct((rows, classes), dtype), jax.ShapeDtypeStruct((rows,), jnp.int32)
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@needs_pallas
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("classes", [1000, 131072])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_lowers_for_a_gpu(classes, dtype):
    """JAX alone lowers it. The program has no exponential for XLA."""
    text = lowered(jax.value_and_grad(kernel_loss), classes, dtype)
    assert text.count("@mosaic_gpu") == 1
    assert "stablehlo.exponential" not in text


@needs_pallas
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("options", [{}, {"implementation": None}, {"implementation": "xla"}])
def test_xla_is_what_is_taken_by_default(options):
    loss = functools.partial(sxe.softmax_cross_entropy, **options)
    assert "@mosaic_gpu" not in lowered(jax.value_and_grad(loss), 1000)


@needs_pallas
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=["fused", "state"])
def test_export(options):
    """Kernels are exported for a GPU. JAX supports none in programs for several platforms."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in problem(4, 64, "float32")]

    def exported(loss, *platforms):
        f = jax.jit(jax.value_and_grad(lambda x, y: jnp.sum(loss(x, y, **options))))
        return jax.export.export(f, platforms=platforms)(*shapes).mlir_module()

    assert exported(kernel_loss, "cuda").count("@mosaic_gpu") == 1
    with pytest.raises(NotImplementedError, match="multi-platform"):
        exported(kernel_loss, "cpu", "cuda")
    assert "@mosaic_gpu" not in exported(sxe.softmax_cross_entropy, "cpu", "cuda")


@needs_pallas
@pytest.mark.usefixtures("gpu", "double")
@pytest.mark.parametrize("classes", [1000, 3000])
def test_it_lowers_where_x64_is_on(classes):
    assert "@mosaic_gpu" in lowered(jax.grad(kernel_loss), classes)


@needs_pallas
@pytest.mark.usefixtures("gpu")
def test_it_lowers_under_transformations():
    def of_shard(logits, labels):
        return jax.value_and_grad(functools.partial(kernel_loss, batch_axis_name="d"))(
            logits, labels
        )

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    rows = P("d")
    sharded = jax.shard_map(of_shard, mesh=mesh, in_specs=rows, out_specs=(P(), rows))
    checkpointed = jax.grad(jax.checkpoint(kernel_loss))
    for f in (sharded, checkpointed):
        assert "@mosaic_gpu" in lowered(f, 256)


@needs_pallas
@pytest.mark.parametrize("classes", [None, "model"])
@pytest.mark.parametrize("loss", [sxe.softmax_cross_entropy, sxe.linear_softmax_cross_entropy])
def test_it_lowers_over_a_mesh_of_gpus(loss, classes):
    """Inside of over_mesh, arrays are per-device, so the test needs no patched backend."""
    device = jax.sharding.AbstractDevice(device_kind="some", num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh(
        (2, 4),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        abstract_device=device,
    )
    sharded = sxe.over_mesh(loss, mesh, batch="data", classes=classes)
    by_kernel = functools.partial(sharded, implementation="mosaic_gpu")
    sizes = [(64, 4096)] if loss is sxe.softmax_cross_entropy else [(64, 16), (16, 4096)]
    shapes = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(by_kernel)).trace(*shapes, labels)
    assert "@mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    here, needed = (
        jax.sharding.use_abstract_mesh(mesh),
        "'mosaic_gpu' needs rows on one device",
    )
    with here, pytest.raises(ValueError, match=needed):
        jax.eval_shape(functools.partial(loss, implementation="mosaic_gpu"), *shapes, labels)


@needs_pallas
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("split", [P("data"), P("data", "model"), P(None, "model"), P()])
@pytest.mark.parametrize("loss", [sxe.softmax_cross_entropy, sxe.linear_softmax_cross_entropy])
def test_it_lowers_for_gpus_of_an_explicit_mesh(loss, split, reduction):
    """The arrays' types say how they are sharded, so users need no shard_map."""
    device = jax.sharding.AbstractDevice(device_kind="some", num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh(
        (2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, abstract_device=device
    )

    def shape(size, dtype, *spec):
        sharding = jax.sharding.NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    rows, classes = (*split, None, None)[:2]
    if loss is sxe.softmax_cross_entropy:
        arrays = [shape((64, 4096), jnp.bfloat16, rows, classes)]
    else:
        arrays = [
            shape((64, 16), jnp.bfloat16, rows),
            shape((16, 4096), jnp.bfloat16, None, classes),
        ]

    def total(*given):
        return jnp.sum(loss(*given, implementation="mosaic_gpu", reduction=reduction))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(total)).trace(*arrays, shape((64,), jnp.int32, rows))
    assert "@mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert jax.typeof(traced.out_info[1]) == jax.typeof(arrays[0])


@needs_pallas
@pytest.mark.parametrize("split", [P("data", None), P("data", "model"), P(None, None)])
def test_rows_and_classes_that_an_explicit_mesh_splits(split, monkeypatch):
    """With the state kernel only: the interpreter has no barriers on several devices at once."""
    monkeypatch.setattr(
        _softmax_cross_entropy,
        "backend_of",
        lambda *given: dataclasses.replace(
            backend_of(*given), platform="gpu", interprets_kernels=INTERPRETS
        ),
    )
    logits, labels = problem(8, 64, "float32")
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        logits = jax.device_put(logits, jax.NamedSharding(mesh, split))
        labels = jax.device_put(labels, jax.NamedSharding(mesh, P(split[0])))

        def found(f):
            loss = lambda x: jnp.sum(jnp.sin(f(x, labels, reduction="none")))  # noqa: E731
            return jax.value_and_grad(loss)(logits)

        for a, b in zip(found(kernel_loss), found(sxe.softmax_cross_entropy), strict=True):
            assert jax.typeof(a) == jax.typeof(b)
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
        if split[0] is not None:
            mapped = jax.vmap(functools.partial(kernel_loss, reduction="none"))
            with pytest.raises(ValueError, match=r"needs an axis mapped by jax\.vmap that an"):
                mapped(logits[:, None], labels[:, None])
            otherwise = jax.reshard(labels, P("model"))
            with pytest.raises(ValueError, match="labels: expected to be sharded as logits"):
                kernel_loss(logits, otherwise)
        swapped = logits.reshape(8, 8, 8, out_sharding=P(split[0], None, split[1]))
        if split[1] is not None:
            with pytest.raises(ValueError, match="expected class axes of which at most the first"):
                kernel_loss(swapped, labels, axis=(1, 2))
