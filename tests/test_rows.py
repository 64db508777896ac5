"""Tests of the functions of rows: states, merge, D0 and D7, and the implementations of each."""

import functools
import itertools

import fresh
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from option_cases import one_in
from tolerances import SMALLEST

from sxe._backend import Backend
from sxe._rows import blocks, cpu, normalizer, targets, twins
from sxe._rows.cross_entropy import CrossEntropy, Results
from sxe._rows.normalizer import Normalizer, merge
from sxe._rows.rules import RULES, results_and_state
from sxe._rows.targets import Sparse, Targets

LOCAL_CPU = Backend("cpu", is_local=True)
BACKENDS = {
    "one CPU": LOCAL_CPU,
    "CPUs": Backend("cpu", is_local=False),
    "accelerator": Backend("gpu", is_local=True),
}
IDENTITY = Normalizer(np.float32(-np.inf), np.float32(-1))
DTYPES = ("float32", "float64")


@pytest.fixture
def x64(dtype):
    with jax.enable_x64(dtype == "float64"):
        yield


def some_logits():
    x = np.random.default_rng(0).normal(size=(11, 3, 5)).astype(np.float32) * 20
    x[0] = 1e8
    x[1, 0] = [0, 40, 0, -np.inf, 0]
    x[2, 1] = -np.inf
    x[3, 2, 1] = np.nan
    x[4, 0, 1] = np.inf
    return x


def true_state(x):
    """(m, r) of a row in float64."""
    x = np.sort(np.asarray(x, np.float64))[::-1]
    m = x[0]
    return m, -1.0 if m == -np.inf else np.sum(np.exp(x[1:] - m))


def log_softmax(x):
    """log softmax(x) in float64, which is precise enough if no row is too confident."""
    return np.stack(
        [(row - m) - np.log1p(r) for row in x.astype(float) for m, r in [true_state(row)]]
    )


# The normalizer state


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("lead", [0, 1, 17, 80, 88])
def test_the_state_of_a_row_is_exact(backend, lead):
    rng = np.random.default_rng(lead)
    rows = np.float32(rng.normal(size=(7, 300)))
    rows[:, 11] = rows.max(1) + lead
    rows[1, 12] = rows[1, 11]
    for x in (rows, np.float32(1e4) + rows, rows - rows.max(1, keepdims=True)):
        m, r = twins.normalize(jnp.asarray(x), backend)
        expected = [true_state(row) for row in x]
        np.testing.assert_array_equal(m, [m for m, _ in expected])
        np.testing.assert_allclose(r, [r for _, r in expected], rtol=5e-7)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("classes", [3, 40])
def test_the_smallest_number_is_not_minus_infinity(backend, classes):
    """Users mask classes with the lowest number or with -inf. A row may have only these two."""
    x = np.full((4, classes), -np.inf, np.float32)
    x[0, 1:] = x[1] = x[2, 1] = x[3, 2] = np.finfo(np.float32).min
    x[2, 2] = 0
    m, r = twins.normalize(jnp.asarray(x), backend)
    np.testing.assert_array_equal(m, x.max(axis=1))
    np.testing.assert_array_equal(r, [classes - 2, classes - 1, 0, 0])


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_the_state_of_logits_that_are_computed_twice(backend):
    """XLA may recompute 1.3 u + b for the sum, and round it differently than for the maximum."""
    rng = np.random.default_rng(0)
    u, b = np.float32(rng.normal(size=(500, 40)) * 20), np.float32(rng.normal(size=40))
    state = jax.jit(lambda u: twins.normalize(np.float32(1.3) * u + b[None, :], backend))(u)
    expected = [true_state(np.float64(np.float32(1.3)) * row + b) for row in u]
    log1p_r = np.log1p([r for _, r in expected])
    np.testing.assert_allclose(state.log1p_r, log1p_r, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_twins_of_the_normalizer_are_equal(backend, dtype, classes):
    x = jnp.asarray(some_logits(), dtype)[..., :classes]
    plain = normalizer.normalize_tile(x, backend)
    for a, b in zip(twins.normalize(x, backend), plain, strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-6)


@one_in(2, rows=[1, 2, 7, 11, 33], dtype=["float32", "bfloat16"])
def test_blocks_of_rows_are_one_tile(monkeypatch, rows, dtype):
    monkeypatch.setattr(cpu, "rows_per_block", lambda shape, backend: rows)
    monkeypatch.setattr(cpu, "FEW_CLASSES", 0)
    x = jnp.asarray(some_logits(), dtype)
    in_blocks = cpu.normalize_tile(x, LOCAL_CPU)
    for a, b in zip(in_blocks, normalizer.normalize_tile(x, LOCAL_CPU), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("share", [0.05, 0.5, 1])
def test_confident_rows_anywhere_among_blocks(monkeypatch, share, dtype):
    """Few confident rows of a block are gathered in groups of 3. Many use the whole block."""
    monkeypatch.setattr(cpu, "rows_per_block", lambda shape, backend: 8)
    monkeypatch.setattr(Backend, "row_group_bytes", 3 * 4 * 50)
    rng = np.random.default_rng(int(10 * share))
    x = np.float32(rng.normal(size=(83, 50)))
    x[:, 7] += np.where(rng.random(83) < share, rng.uniform(10, 80, size=83), 0)
    x = jnp.asarray(x, dtype)
    m, r = cpu.normalize_tile(x, LOCAL_CPU)
    expected = [true_state(row) for row in x]
    np.testing.assert_array_equal(m, [m for m, _ in expected])
    np.testing.assert_allclose(r, [r for _, r in expected], rtol=1e-6)


def test_parts_divide_where_they_can():
    assert [blocks.part_of(n, 8) for n in (1, 7, 8, 12, 13, 14, 40)] == [1, 7, 8, 6, 8, 7, 8]


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_derivatives_of_the_state_are_those_of_the_plain_twin(monkeypatch, backend):
    monkeypatch.setattr(cpu, "rows_per_block", lambda shape, backend: 2)
    x = jnp.asarray(some_logits()[5:] / 20)
    x = x.at[0, 0, 1].set(x[0, 0, 0]).at[1, 1, 2].set(-jnp.inf)
    rng = np.random.default_rng(1)
    x_dot = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    g = jnp.asarray(rng.normal(size=x.shape[:-1]), jnp.float32)

    def f(x):
        return jnp.sum(g * twins.normalize(x, backend).log1p_r)

    def plain(x):
        return jnp.sum(g * normalizer.normalize_tile(x, backend, scale=1).log1p_r)

    def derivatives(f, x):
        return (
            jax.jvp(f, (x,), (x_dot,))[1],
            jax.grad(f)(x),
            jax.jvp(jax.grad(f), (x,), (x_dot,))[1],
            jax.grad(lambda x: jnp.sum(jax.grad(f)(x) * x_dot))(x),
        )

    found, expected = (jax.jit(functools.partial(derivatives, each))(x) for each in (f, plain))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Merging states


def states(dtype):
    """A strategy for states, including equal maxima, no finite logit, and leads of any size."""
    width = np.dtype(dtype).itemsize * 8
    m = st.floats(-1e4, 1e4, width=width) | st.sampled_from([0.0, 1.0, -np.inf])
    r = st.floats(0, 1e6, width=width) | st.sampled_from([0.0, 1.0, 1e-20])

    def state(m, r):
        return Normalizer(np.dtype(dtype).type(m), np.dtype(dtype).type(-1 if m == -np.inf else r))

    return st.builds(state, m, r)


def assert_same_state(a, b, dtype):
    # A term is exp(m2 - m1) (1 + r). Each of up to two merges rounds it twice.
    rtol = 16 * np.finfo(dtype).eps
    assert a.m == b.m
    np.testing.assert_allclose(a.r, b.r, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(data=st.data())
def test_states_are_a_commutative_monoid(dtype, data):
    with jax.enable_x64(dtype == "float64"):
        a, b, c = (data.draw(states(dtype)) for _ in range(3))
        identity = Normalizer(*(np.asarray(x, dtype) for x in IDENTITY))
        assert merge(a, identity) == merge(identity, a) == a
        ab = merge(a, b)
        assert ab.r.dtype == dtype
        assert ab == merge(b, a)
        assert_same_state(merge(ab, c), merge(a, merge(b, c)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_is_the_state_of_all_classes(dtype, x64):
    x = np.random.default_rng(0).normal(size=(6, 40)).astype(dtype) * 30
    x[0, :20], x[1], x[2, 5], x[2, 30] = -np.inf, -np.inf, 200, 200
    splits = (1, 17, 39)

    @jax.jit
    def merged(x):
        parts = [(x[:, :split], x[:, split:]) for split in splits]
        return [merge(*(normalizer.normalize_tile(x, LOCAL_CPU) for x in pair)) for pair in parts]

    for state in merged(x):
        expected = [true_state(row) for row in x]
        np.testing.assert_array_equal(state.m, [m for m, _ in expected])
        rtol = 1e-6 if dtype == "float32" else 1e-14
        np.testing.assert_allclose(state.r, [r for _, r in expected], rtol=rtol)


# Cross-entropy


def some_targets(kind, rng, rows, classes, backend=LOCAL_CPU):
    """Targets, and the same targets as a dense array in float64."""
    label = rng.integers(0, classes, rows)
    one_hot = np.eye(classes)[label]
    if kind == "labels":
        t = np.float32(rng.uniform(0.5, 2, rows))
        return Targets(jnp.asarray(label), jnp.asarray(t), None, jnp.asarray(t)), t[
            :, None
        ] * one_hot
    if "sparse" in kind:
        label = np.concatenate([label[:, None], rng.integers(-3, classes + 3, (rows, 6))], axis=1)
        label[:, 1] = label[:, 0]
        t = np.float32(rng.exponential(size=label.shape))
        t[0], t[1, 2:] = 0, 1e-9
        t = np.where((label >= 0) & (label < classes), t, 0)
        spread = np.sum(
            t[..., None].astype(np.float64) * (label[..., None] == np.arange(classes)), 1
        )
        sparse, total = Sparse(jnp.asarray(label), jnp.asarray(t)), jnp.sum(t, axis=-1)
        if kind == "sparse":
            return Targets(None, None, None, total, sparse), spread
        c = np.float32(0.01 * rng.exponential(size=classes))
        dense = twins.dense_targets(jnp.asarray(c)[None], None, backend)
        total = total + dense.largest + dense.rest
        return Targets(None, None, dense, total, sparse), spread + c
    p = np.float32(rng.exponential(size=(rows, classes)))
    p[0, 1:], p[1] = 0, 0
    if kind == "dense":
        dense = twins.dense_targets(jnp.asarray(p), None, backend)
        return Targets(None, None, dense, dense.largest + dense.rest), p.astype(np.float64)
    dense = twins.dense_targets(jnp.full((1, 1), np.float32(0.01)), None, backend)
    dense = dense._replace(rest=dense.largest * (classes - 1))
    t = np.full(rows, np.float32(0.9))
    total = jnp.asarray(t) + dense.largest + dense.rest
    both = t[:, None].astype(np.float64) * one_hot + np.float32(0.01)
    return Targets(jnp.asarray(label), jnp.asarray(t), dense, total), both


KINDS = ("labels", "dense", "smoothed", "sparse", "smoothed, sparse")


@one_in(2, backend=BACKENDS, kind=KINDS)
def test_d0_and_d7_of_a_row(backend, kind):
    rng = np.random.default_rng(3)
    x = np.float32(rng.normal(size=(13, 37)) * rng.choice([1, 30], size=(13, 1)))
    t, dense = some_targets(kind, rng, *x.shape, backend)
    g = Results(*(jnp.asarray(rng.normal(size=13), jnp.float32) for _ in range(2)))
    f = CrossEntropy(None, backend)

    @jax.jit
    def run(x, t, g):
        results, state = results_and_state(f, x, t)
        gradients = [
            f.gradient(x, t, state, g._replace(lse=lse)) for lse in (g.lse, None, 0 * g.lse)
        ]
        return results, gradients

    results, (gradient, without_lse, zero) = run(x, t, g)
    log_q = log_softmax(x)
    np.testing.assert_allclose(results.loss, -np.sum(dense * log_q, -1), rtol=2e-6)
    q, total = np.exp(log_q), dense.sum(-1, keepdims=True)
    g_loss, g_lse = (np.asarray(a, np.float64)[:, None] for a in g[:2])
    expected = g_loss * (total * q - dense) + g_lse * q
    unit = np.abs(g_loss) * (q * (total - dense) + dense * (1 - q)) + np.abs(g_lse) * q
    errors = np.abs(gradient - expected) / unit
    if "sparse" in kind:  # the targets' sum exceeds 1, so compare only entries of some size
        errors = errors[unit > SMALLEST]
    assert np.max(errors) < 2e-5
    np.testing.assert_allclose(without_lse, zero, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_row_is_its_transposed_tangent(kind):
    """All rules give the same gradients for logits and targets."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)
    t, _ = some_targets(kind, rng, *x.shape)
    f = CrossEntropy(None, LOCAL_CPU)
    # The cotangent of the largest probability has no effect, because it has no derivative.
    g = Results(*(jnp.asarray(rng.normal(size=5), jnp.float32) for _ in range(3)))

    def gradient(rule, x, t, g):
        def of_floats(x, label_target, dense, sparse):
            d = None if dense is None else t.dense._replace(t=dense)
            s = t.sparse
            if s is not None:  # padding has no derivative, because ``make_rows`` removes it
                is_class = (s.label >= 0) & (s.label < x.shape[-1])
                s = s._replace(target=jnp.where(is_class, sparse, 0))
            return RULES[rule](f, x, t._replace(label_target=label_target, dense=d, sparse=s))

        dense = None if t.dense is None else t.dense.t
        sparse = None if t.sparse is None else t.sparse.target
        results, vjp = jax.vjp(of_floats, x, t.label_target, dense, sparse)
        return jax.tree.leaves((results, vjp(type(results)(*g))))

    by_rule = jax.jit(lambda *arrays: {rule: gradient(rule, *arrays) for rule in RULES})(x, t, g)
    for rule in ("jvp", "autodiff"):
        for a, b in zip(by_rule["vjp"], by_rule[rule], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_twins_of_the_cost_are_equal():
    rng = np.random.default_rng(5)
    x = np.float32(rng.normal(size=(9, 11)))
    t = np.float32(rng.exponential(size=(9, 11)))
    x[0, 3], t[0, 3] = -np.inf, 0  # 0 log 0
    x[1, 3] = -np.inf  # a class with probability 0 and a target
    m, log1p_r = x.max(-1), np.float32(rng.exponential(size=9))
    arrays = [jnp.asarray(a) for a in (t, x, m, log1p_r)]
    plain, fast = targets.dense_cost(*arrays), cpu.dense_cost(*arrays)
    assert np.isinf(plain[1])
    # The plain implementation multiplies -log1p(r) with the target 0 for 0 log 0.
    np.testing.assert_allclose(fast, plain, rtol=1e-6)


def test_twins_of_the_sum_without_the_largest_are_equal():
    rng = np.random.default_rng(6)
    t = np.float32(rng.exponential(size=(9, 11)))
    t[0, 4], t[1, 2], t[2], t[3, :2] = 1e4, 1e9, 0, 1e5
    largest, total = t.max(-1), t.sum(-1)
    expected = np.sort(t.astype(np.float64), -1)[:, :-1].sum(-1)
    for twin, rows in itertools.product((cpu, targets), (slice(None), slice(4, None))):
        arrays = (jnp.asarray(a) for a in (t[rows], largest[rows], total[rows]))
        rest = twin.sum_without_largest(*arrays, LOCAL_CPU)
        np.testing.assert_allclose(rest, expected[rows], rtol=1e-6)


ONE_DEVICE = """
import jax, jax.numpy as jnp, numpy as np, sxe
from sxe._backend import backend_of
from sxe._rows.blocks import rows_per_block
assert jax.device_count() == 1
n, k = 257, 50257
for dtype in (jnp.float32, jnp.bfloat16):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(n, k)), dtype)
    assert 1 < rows_per_block(x.shape, backend_of(x)) < n
    labels = jnp.arange(n)
    f = lambda x: sxe.softmax_cross_entropy(x, labels)
    compiled = jax.jit(jax.value_and_grad(f)).lower(x).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 16 * 2**20 < n * k * 4, (dtype, temporaries)
    value, gradient = compiled(x)
    x = np.asarray(x, np.float64)
    q = np.exp(x - x.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    np.testing.assert_allclose(value, -np.log(q[np.arange(n), labels]).mean(), rtol=1e-6)
    q[np.arange(n), labels] -= 1
    rtol = 2e-5 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(gradient, np.float64), q / n, rtol=rtol)
"""


def test_one_cpu_device_takes_blocks_of_rows():
    """Runs in its own process. Here the tests have several devices, which rule out blocks."""
    fresh.run("-c", ONE_DEVICE)
