"""Log-probability, entropy and divergences compared with 60-digit arithmetic.

The textbook formulas lose all digits for confident rows, and for two distributions that are close.
"""

import functools

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from distributions import MODES
from hypothesis import given, settings
from hypothesis import strategies as st
from option_cases import RULES, each_value, every_rule, vjp_by_default
from oracle import naming
from tolerances import (
    CLOSE_LOGITS,
    DIVERGENCE_BAR,
    DIVERGENCE_GRADIENT_BAR,
    ENTROPY_BAR,
    ENTROPY_GRADIENT_BAR,
    FLOAT64_BAR,
    GRADIENT_BAR,
    LOG_PROB_BAR,
    SMALLEST,
)

import sxe

BETAS = (0.5, 0.1, 0.9, 1e-4, 0.9999)
slow = pytest.mark.slow
every_way = pytest.mark.parametrize(
    "way", ["jitted", *(pytest.param(way, marks=slow) for way in ("eager", "disable_jit"))]
)
every_mode = pytest.mark.parametrize("mode", MODES)


def run(way, f, *arguments):
    if way == "jitted":
        return jax.jit(f)(*arguments)
    if way == "eager":
        return f(*arguments)
    with jax.disable_jit():
        return f(*arguments)


def some_rows(classes, dtype="float32", seed=0):
    """Uniform and random rows of several scales, with leads of 5 to 80, ties, and offsets."""
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=classes) * size for size in (0, 1e-3, 0.1, 1, 3, 10, 20)]
    for lead in (5, 10, 15, 20, 30, 50, 80):
        row = rng.normal(size=classes)
        row[rng.integers(classes)] = row.max() + lead
        tied = row.copy()
        tied[rng.integers(classes)] = row.max()
        rows += [row, tied, np.where(row == row.max(), lead, 0)]
    rows += [np.arange(classes) % 2 * 50.0, np.arange(classes) * -0.5]
    rows = np.stack(rows)
    return np.concatenate([rows, rows + 1e4, rows - 1e4]).astype(dtype)


# Log-probability and entropy


def with_gradients(rule, labels):
    """A function of logits [N, K] to log_prob, entropy, and the gradients of both for each row."""

    def call(x):
        f = functools.partial(sxe.log_prob_and_entropy, labels=labels, rule=rule)
        value, pull = jax.vjp(f, x)
        zero, one = jnp.zeros_like(value.entropy), jnp.ones_like(value.entropy)
        return *value, *pull(sxe.LogProbAndEntropy(one, zero)), *pull(type(value)(zero, one))

    return call


def check_entropies(found, x, labels, rule="vjp", unit=1.0):
    """Checks each result against the bars of float32, times ``unit``.

    With rule "autodiff", the gradient of the entropy is only accurate relative to terms of size 1.
    """
    for i, (row, label) in enumerate(zip(x, labels, strict=True)):
        log_prob, entropy, d_log_prob, d_entropy = (np.asarray(a)[i] for a in found)
        exact_log_prob, exact_entropy, exact = oracle.exact_log_prob_and_entropy(row, label)
        with naming("row", i, row):
            if abs(exact_log_prob) > SMALLEST:
                error = oracle.relative_error(log_prob, exact_log_prob)
                assert error < LOG_PROB_BAR * unit
            if exact_entropy > SMALLEST:
                assert oracle.relative_error(entropy, exact_entropy) < ENTROPY_BAR * unit
            # For equal logits, the gradient is 0 except for rounding errors.
            if rule == "autodiff" or max(map(abs, exact)) < 1e-12:
                np.testing.assert_allclose(d_entropy, np.array(exact, float), atol=1e-5 * unit)
            else:
                error = oracle.error_of_row(d_entropy, exact)
                assert error < ENTROPY_GRADIENT_BAR * unit
            _, minus = oracle.exact_row(row, np.eye(len(row))[label])
            for actual, d in zip(d_log_prob, minus, strict=True):
                if abs(d) > 1e-31:
                    assert oracle.relative_error(-actual, d) < GRADIENT_BAR * unit


@every_way
@every_rule
def test_entropies_in_float32(rule, way):
    """The label is the class of the largest logit in every other row."""
    for classes in (2, 7):
        x = some_rows(classes)
        labels = (x.argmax(-1) + np.arange(len(x)) % 2) % classes
        check_entropies(run(way, with_gradients(rule, labels), jnp.asarray(x)), x, labels, rule)


@every_rule
def test_entropies_in_float64(rule):
    with jax.enable_x64(True):
        x = some_rows(7, "float64")
        labels = (x.argmax(-1) + np.arange(len(x)) % 2) % 7
        found = run("jitted", with_gradients(rule, labels), jnp.asarray(x))
        check_entropies(found, x, labels, rule, unit=FLOAT64_BAR / LOG_PROB_BAR)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_entropies_of_16_bits(dtype):
    """The logits are cast exactly, so the results are as accurate as with float32 logits."""
    rng = np.random.default_rng(1)
    x = np.asarray(jnp.asarray(rng.normal(size=(6, 33)) * 10, dtype))
    log_prob, entropy = jax.jit(sxe.log_prob_and_entropy)(x, np.arange(6))
    for i, row in enumerate(x):
        exact_log_prob, exact_entropy, _ = oracle.exact_log_prob_and_entropy(row, i)
        assert oracle.relative_error(log_prob[i], exact_log_prob) < LOG_PROB_BAR
        assert oracle.relative_error(entropy[i], exact_entropy) < ENTROPY_BAR


@vjp_by_default
@pytest.mark.parametrize("classes", [1009, 32768])
def test_entropies_of_many_classes(classes, rule):
    x = np.concatenate([some_rows(classes)[i : i + 7] for i in (0, 23, 30)])
    labels = np.arange(len(x)) * 31 % classes
    log_prob, entropy, _, d_entropy = jax.jit(with_gradients(rule, labels))(x)
    for i, row in enumerate(x):
        # Sum without the largest logit: even in float64 the textbook formula fails for some rows.
        gap = row.max() - row.astype(np.float64)
        rest = np.where(np.arange(classes) == row.argmax(), 0, np.exp(-gap))
        log1p_r, mean_gap = np.log1p(rest.sum()), (rest * gap).sum() / (1 + rest.sum())
        assert -log_prob[i] == pytest.approx(gap[labels[i]] + log1p_r, rel=LOG_PROB_BAR)
        assert entropy[i] == pytest.approx(log1p_r + mean_gap, rel=ENTROPY_BAR)
        q = np.exp(-gap) / (1 + rest.sum())
        d = q * (gap - mean_gap)
        # With rule "autodiff", the gradient is accurate only relative to terms of the size of q.
        terms = q if rule == "autodiff" else d
        atol = max(ENTROPY_GRADIENT_BAR * np.abs(terms).max(), 1e-12)
        np.testing.assert_allclose(d_entropy[i], d, rtol=0, atol=atol)


@functools.cache
def program_of_entropies(rule):
    return jax.jit(lambda x, labels: with_gradients(rule, labels)(x))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([1, 2, 64]),
    scale=st.floats(0.0, 40.0),
    offset=st.sampled_from([0.0, 1.0, -1e4]),
    lead=st.floats(0.0, 80.0),
    ties=st.integers(1, 3),
    rule=st.sampled_from(RULES),
)
def test_entropies_of_any_row(seed, classes, scale, offset, lead, ties, rule):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1, classes)) * scale
    x[0, rng.permutation(classes)[:ties]] = x.max() + lead
    x = (x + offset).astype(np.float32)
    labels = rng.integers(classes, size=1)
    found = program_of_entropies(rule)(x, labels)
    assert found[0] <= 0
    assert found[1] >= 0
    check_entropies(found, x, labels, rule)


# Divergences


def pairs(classes, distance, seed=0, dtype="float32"):
    """Pairs of rows of logits that differ by this distance. Some rows are confident."""
    rng = np.random.default_rng(seed)
    z = np.stack([rng.normal(size=classes) * size for size in (0, 1, 1, 4)])
    for lead in (5, 20, 50):
        row = rng.normal(size=(1, classes))
        row[0, rng.integers(classes)] = row.max() + lead
        z = np.concatenate([z, row])
    z = np.concatenate([z, z[:5] + 1e4]).astype(dtype)
    return (z + distance * rng.normal(size=z.shape)).astype(dtype), z


def static_of(mode, beta):
    """Only a Jensen-Shannon divergence has a beta."""
    beta = {"beta": beta} if mode == "jensen_shannon" else {}
    return {"mode": mode, "reduction": "none"} | beta


def divergence(rule, mode, beta=0.5):
    """A function of logits and target logits to the divergence of each row and both gradients."""

    def call(x, z):
        static = static_of(mode, beta) | {"rule": rule}
        value, pull = jax.vjp(functools.partial(sxe.kl_divergence, **static), x, z)
        return value, *pull(jnp.ones_like(value))

    return call


@functools.cache
def program_of_divergence(rule, mode, beta=0.5):
    return jax.jit(divergence(rule, mode, beta))


def check_divergences(found, x, z, mode, beta=0.5, *, distance=1.0, rule="vjp", unit=1.0):
    """The same check as ``check_entropies``, for logits that differ by about this distance."""
    for i, (x_i, z_i) in enumerate(zip(x, z, strict=True)):
        value, *gradients = (np.asarray(a)[i] for a in found)
        exact, *exact_gradients = oracle.exact_divergence(x_i, z_i, mode, beta)
        spread = np.ptp(x_i.astype(np.float64) - z_i)
        closeness = max(1, CLOSE_LOGITS / max(min(distance, spread), 1e-30))
        with naming("row", i, x_i, z_i, beta):
            assert value >= 0
            if exact > SMALLEST:
                error = oracle.relative_error(value, exact)
                assert error < DIVERGENCE_BAR * closeness * unit
            for name, d, right in zip("xz", gradients, exact_gradients, strict=True):
                with naming(name):
                    if rule == "autodiff":
                        atol = 1e-5 * max(1, float(exact)) * unit
                        np.testing.assert_allclose(d, np.array(right, float), atol=atol)
                    elif max(map(abs, right)) > SMALLEST:
                        error = oracle.error_of_row(d, right)
                        assert error < DIVERGENCE_GRADIENT_BAR * closeness * unit


DISTANCES = (10, 3, 1, 0.3, 0.1, 1e-2, 1e-3, 1e-4)


@every_mode
def test_divergences_by_distance(mode):
    """All distances in one test, because each beta compiles a program of its own."""
    for classes in (2, 13):
        for beta in BETAS if mode == "jensen_shannon" else BETAS[:1]:
            run = program_of_divergence("vjp", mode, beta)
            for distance in DISTANCES:
                x, z = pairs(classes, distance)
                check_divergences(run(x, z), x, z, mode, beta, distance=distance)


@every_way
@each_value(mode=MODES, rule=RULES)
def test_divergences_by_every_rule(mode, rule, way):
    """One call covers all distances."""
    each = [pairs(7, distance, seed=i) for i, distance in enumerate(DISTANCES)]
    x, z = (np.concatenate(a) for a in zip(*each, strict=True))
    found = run(way, divergence(rule, mode, 0.3), jnp.asarray(x), jnp.asarray(z))
    rows = len(each[0][0])
    for i, (distance, (x, z)) in enumerate(zip(DISTANCES, each, strict=True)):
        of_pair = [np.asarray(a)[i * rows : (i + 1) * rows] for a in found]
        check_divergences(of_pair, x, z, mode, 0.3, distance=distance, rule=rule)


@vjp_by_default
@every_mode
def test_divergences_of_rows_with_another_offset(mode, rule):
    """One side has an offset far above the distance, which float32 does not add exactly."""
    for distance in (1, 1e-2, 1e-3):
        x, z = pairs(13, distance)
        for offset in (1, -30, 1e4):
            x, z = x[:4], (z[:4] + np.float32(offset)).astype(np.float32)
            found = program_of_divergence(rule, mode, 0.3)(x, z)
            check_divergences(found, x, z, mode, 0.3, rule=rule)


@every_mode
def test_divergences_in_float64(mode):
    with jax.enable_x64(True):
        for distance in (10, 1, 0.5, 0.2, 0.1, 1e-3):
            x, z = pairs(7, distance, dtype="float64")
            for beta in (0.3, 1e-4) if mode == "jensen_shannon" else (0.5,):
                found = program_of_divergence("vjp", mode, beta)(x, z)
                check_divergences(found, x, z, mode, beta, distance=distance, unit=1e-7)


@every_mode
def test_divergences_of_confident_rows_that_disagree(mode):
    """A probability that float32 rounds to 0 still contributes, because its logit is finite."""
    lead = np.array([0, 5, 30, 80, 200], np.float32)
    first, second = np.eye(5, dtype=np.float32)[:2]
    rest = np.random.default_rng(0).normal(size=5).astype(np.float32)
    x = lead[:, None] * first + rest
    for z in (lead[:, None] * second + rest, lead[:, None] * 0 + rest, 2 * lead[:, None] * first):
        for a, b in ((x, z), (z, x)):
            a, b = a.astype(np.float32), b.astype(np.float32)
            check_divergences(program_of_divergence("vjp", mode, 0.3)(a, b), a, b, mode, 0.3)


@each_value(mode=MODES, classes=[1009, 32768])
def test_divergences_of_many_classes(mode, classes):
    """The float64 reference is accurate enough here, because no row is confident."""
    rng = np.random.default_rng(2)
    for distance in (3, 1e-1, 1e-3, 1e-4):
        z = np.concatenate([rng.normal(size=(2, classes)), np.zeros((1, classes))])
        x = (z + distance * rng.normal(size=z.shape)).astype(np.float32)
        p = {"logits": x, "target_logits": z.astype(np.float32)}
        static = static_of(mode, 0.3)
        value, *gradients = program_of_divergence("vjp", mode, 0.3)(*p.values())
        unit = max(1, CLOSE_LOGITS / distance)
        right = oracle.kl_divergence(**p, **static)
        np.testing.assert_allclose(value, right, rtol=DIVERGENCE_BAR * unit)
        expected = oracle.kl_divergence_gradients(**p, **static)
        for name, d in zip(p, gradients, strict=True):
            largest = np.abs(expected[name]).max(-1)
            error = np.abs(np.asarray(d, np.float64) - expected[name]).max(-1)
            assert (error < DIVERGENCE_GRADIENT_BAR * unit * largest).all(), name


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 64]),
    scale=st.floats(0.0, 10.0),
    lead=st.floats(0.0, 60.0),
    offset=st.sampled_from([0.0, 1e4]),
    distance=st.floats(-3, 1).map(lambda a: 10**a),
    mode=st.sampled_from(MODES),
    rule=st.sampled_from(RULES),
)
def test_divergences_of_any_rows(seed, classes, scale, lead, offset, distance, mode, rule):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(1, classes)) * scale
    z[0, rng.integers(classes)] += lead
    x = z + distance * rng.normal(size=z.shape)
    x, z = (x + offset).astype(np.float32), (z + offset).astype(np.float32)
    found = program_of_divergence(rule, mode, 0.3)(x, z)
    check_divergences(found, x, z, mode, 0.3, rule=rule)


@functools.cache
def program_of_value(mode, beta):
    static = static_of(mode, beta)
    return jax.jit(functools.partial(sxe.kl_divergence, **static))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 64]),
    scale=st.floats(0.0, 100.0),
    offset=st.sampled_from([0.0, 1e4, 1e8]),
    distance=st.floats(-9, 2).map(lambda a: 10**a),
    of=st.sampled_from([(mode, 0.5) for mode in MODES] + [(MODES[2], beta) for beta in BETAS]),
)
def test_no_divergence_is_negative(seed, classes, scale, offset, distance, of):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(50, classes)) * scale + offset
    x = (z + distance * rng.normal(size=z.shape)).astype(np.float32)
    value = program_of_value(*of)(x, z.astype(np.float32))
    assert (np.asarray(value) >= 0).all()
    assert np.isfinite(value).all()


@every_way
@each_value(mode=MODES, rule=RULES)
def test_equal_logits_have_no_divergence(mode, rule, way):
    """The divergence of equal logits and its gradients are exactly 0.

    The divergence is also 0 if one side is shifted by a constant and the shift is exact.
    """
    z = some_rows(7)
    z = np.concatenate([z, np.where(np.arange(7) % 3 == 0, -np.inf, z)])
    x = [z]
    # These numbers and their sums are multiples of 1/1024, so that the sums are exact.
    few = np.random.default_rng(3).integers(-4096, 4096, size=(20, 7)).astype(np.float32) / 1024
    for shift in (1.0, -64.0, 8192.0):
        moved = few + np.float32(shift)
        assert (moved.astype(np.float64) - few == shift).all()
        x, z = [*x, moved, few], np.concatenate([z, few, moved])
    x = np.concatenate(x)
    found = run(way, divergence(rule, mode, 0.3), jnp.asarray(x), jnp.asarray(z))
    assert not np.asarray(found[0]).any()
    equal = (x == z).all(-1)
    for d in found[1:]:
        assert not np.asarray(d)[equal].any()


@each_value(mode=MODES, classes=[32768, 7, 1000])
def test_a_shift_within_the_program(mode, classes):
    """XLA may recompute the sum in each loop over the classes that needs it."""
    z = np.random.default_rng(4).integers(-4096, 4096, size=(5, classes)) / 1024

    @jax.jit
    def both(z, shift):
        f = divergence("vjp", mode, 0.3)
        return f(z + shift, z)[0], f(z, z + shift)[0], f(z * 2, z + z)[0]

    for shift in (0.0, 8.0, -1000.0):
        for value in both(z.astype(np.float32), np.float32(shift)):
            assert not np.asarray(value).any()


@each_value(mode=MODES, dtype=["bfloat16", "float16"])
def test_divergences_of_16_bits(mode, dtype):
    """The value is as accurate as with float32 logits, and gradients are rounded only once."""
    x, z = (np.asarray(jnp.asarray(a[:4], dtype)) for a in pairs(33, 0.3))
    value, *gradients = program_of_divergence("vjp", mode, 0.3)(x, z)
    once = float(jnp.finfo(dtype).eps) / 2 + DIVERGENCE_GRADIENT_BAR
    for i in range(len(x)):
        exact, *right = oracle.exact_divergence(x[i], z[i], mode, 0.3)
        assert oracle.relative_error(value[i], exact) < DIVERGENCE_BAR
        for d, exact in zip(gradients, right, strict=True):
            assert d.dtype == dtype
            assert oracle.error_of_row(np.asarray(d[i], np.float64), exact) < once


@pytest.mark.slow
def test_with_all_optimizations():
    """Runs all tests above with XLA's default optimizations, as in users' programs."""
    flags = "--xla_backend_optimization_level=3 --xla_llvm_disable_expensive_passes=false"
    if jax.__version_info__ < (0, 11):  # conftest.py turns this off for these versions
        flags += " --xla_cpu_use_fusion_emitters=true"
    fresh.run_tests(__file__, XLA_FLAGS=flags)


@pytest.mark.slow
def test_on_one_device():
    """Runs all tests above with the loops over rows and classes of a single device."""
    fresh.run_tests(__file__, XLA_FLAGS="--xla_force_host_platform_device_count=1")
