"""From hidden states to logits and back: each function alone, compared with lines H0 to H7."""

import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle import assert_close

from sxe._backend import Backend
from sxe._head.loops import classes_per_block
from sxe._head.projection import (
    Products,
    Transform,
    capped,
    gather_rows,
    product_precision,
    transform,
    transform_bwd,
)

INF, NAN = np.inf, np.nan


# H1 to H5


C, K = 7, 5
CAPS = (1e-3, 0.3, 1.0, 30.0, 1e4, 1e10, 1e20, 1e30, INF)
PARTS = list(itertools.product((False, True), repeat=3))


PARAMETERS = Transform._fields[:3]  # the parameters that have a gradient


def name_of(parts):
    names = [name for name, on in zip(PARAMETERS, parts, strict=True) if on]
    return " ".join(names) or "nothing"


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def some_u(dtype):
    """[C, K], with rows of size 1e-4 to 100 and a row of zeros."""
    sizes = np.array([1e-4, 1e-2, 1, 1, 10, 100, 0])
    return jnp.asarray(sizes[:, None] * normal(C, K), dtype)


def some_transform(parts, dtype, softcap=3.0):
    full = Transform(normal(K, seed=1), 0.7, softcap)
    return Transform(
        *(jnp.asarray(a, dtype) if on else None for a, on in zip(full[:3], parts, strict=True))
    )


def in_digits(x):
    return np.vectorize(lambda a: mpmath.mpf(float(a)), otypes=[object])(np.asarray(x, np.float64))


def exact(u, by, d_x):
    """Logits, d u and parameter gradients by H1 to H5, in 60-digit arithmetic, as float64."""
    tanh, sech = (np.vectorize(f, otypes=[object]) for f in (mpmath.tanh, mpmath.sech))
    with mpmath.workdps(oracle.DIGITS):
        u, d_x = in_digits(u), in_digits(d_x)
        scale = 1 if by.logit_scale is None else in_digits(by.logit_scale)[()]
        x = z = scale * u + (0 if by.bias is None else in_digits(by.bias))
        slope, d_cap = 1, 0
        if by.softcap is not None and np.isfinite(by.softcap):
            c = in_digits(by.softcap)[()]
            y = z / c
            x, slope = c * tanh(y), sech(y) ** 2
            d_cap = np.sum((tanh(y) - y * slope) * d_x)
        d_z = slope * d_x
        full = Transform(d_z.sum(axis=0), np.sum(u * d_z), d_cap)
        found = (
            None if of is None else np.asarray(d).astype(np.float64)
            for of, d in zip(by, full, strict=True)
        )
        return x.astype(np.float64), (scale * d_z).astype(np.float64), Transform(*found)


@jax.jit
def forward_and_back(u, by, d_x):
    """The logits and gradients of the functions under test, and gradients by JAX's derivative."""
    x, pullback = jax.vjp(transform, u, by)
    return (transform(u, by), *transform_bwd(d_x, u, by)), (x, *pullback(d_x))


@pytest.mark.parametrize("parts", PARTS, ids=name_of)
def test_the_transform_and_its_gradients(parts, x64):
    dtype = jnp.dtype("float64" if x64 else "float32")
    u, d_x = some_u(dtype), jnp.asarray(normal(C, K, seed=2), dtype)
    for softcap in CAPS if parts[-1] else (None,):
        by = some_transform(parts, dtype, softcap)
        expected = exact(u, by, d_x)
        for found in forward_and_back(u, by, d_x):
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            for a, right in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
                assert a.dtype == dtype
                assert_close(a, right)


@pytest.mark.parametrize("parts", PARTS, ids=name_of)
def test_nothing_is_nan_at_zero(parts):
    """Where z is 0, the logits and the gradient of the cap are 0, and the slope is 1."""
    zeros, ones = jnp.zeros((C, K)), jnp.ones((C, K))
    by = some_transform(parts, "float32")
    by = by._replace(bias=None if by.bias is None else jnp.zeros(K))
    for softcap, scale in itertools.product(CAPS, (0.0, 0.7)):
        by = by._replace(
            logit_scale=None if by.logit_scale is None else jnp.float32(scale),
            softcap=None if by.softcap is None else jnp.float32(softcap),
        )
        slope = np.float32(1 if by.logit_scale is None else scale)
        full = Transform(np.full(K, C), 0, 0)
        expected = Transform(*(None if a is None else b for a, b in zip(by, full, strict=True)))
        for found in forward_and_back(zeros, by, ones):
            assert jax.tree.structure(found[2]) == jax.tree.structure(expected)
            np.testing.assert_array_equal(found[0], zeros)
            np.testing.assert_array_equal(found[1], slope * ones)
            jax.tree.map(np.testing.assert_array_equal, found[2], expected)


@pytest.mark.parametrize("parts", PARTS, ids=name_of)
def test_a_scale_for_each_row(parts):
    """A scale of one row has the effect in that row that a common scale has in all rows."""
    u, d_x = some_u("float32"), jnp.asarray(normal(C, K, seed=2), "float32")
    by = some_transform((parts[0], True, parts[2]), "float32")
    scales = jnp.asarray([0.7, -2, 0, 1, 3, 0.1, 5], "float32")
    for found in forward_and_back(u, by._replace(logit_scale=scales), d_x):
        total = jax.tree.map(jnp.zeros_like, by)
        for i, scale in enumerate(scales):
            row = slice(i, i + 1)
            x, d_u, d_by = forward_and_back(u[row], by._replace(logit_scale=scale), d_x[row])[0]
            assert_close(found[0][row], np.float64(x))
            assert_close(found[1][row], np.float64(d_u))
            assert_close(found[2].logit_scale[i], np.float64(d_by.logit_scale))
            total = jax.tree.map(jnp.add, total, d_by)
        assert_close(found[1][2], np.zeros(K))
        for name in ("bias", "softcap"):
            if getattr(by, name) is not None:
                assert_close(getattr(found[2], name), np.float64(getattr(total, name)))


@pytest.mark.parametrize("scaled", ["rows", "all"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("parts", PARTS, ids=name_of)
def test_masked_classes(parts, bad, scaled):
    """Logits are -inf and gradients 0, whatever u and bias are. Other classes do not change."""
    mask = np.arange(K) % 3 != 1
    u, d_x = some_u("float32"), jnp.asarray(normal(C, K, seed=2), "float32")
    by = some_transform(parts, "float32")
    if by.logit_scale is not None and scaled == "rows":
        by = by._replace(logit_scale=jnp.linspace(-1, 2, C))
    masked = by._replace(class_mask=jnp.asarray(mask))
    if by.bias is not None:
        masked = masked._replace(bias=by.bias.at[~mask].set(bad))
        by = by._replace(bias=by.bias[mask])
    expected = forward_and_back(u[:, mask], by, d_x[:, mask])[0]
    for x, d_u, d_by in forward_and_back(u.at[:, ~mask].set(bad), masked, d_x):
        assert (np.asarray(x)[:, ~mask] == -INF).all()
        assert not np.asarray(d_u)[:, ~mask].any()
        if by.bias is not None:
            assert not np.asarray(d_by.bias)[~mask].any()
            d_by = d_by._replace(bias=d_by.bias[mask])
        found = x[:, mask], d_u[:, mask], d_by._replace(class_mask=None)
        for a, right in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert_close(a, np.float64(right))


@pytest.mark.parametrize("softcap", [None, 30.0, INF])
def test_a_bias_of_minus_infinity(softcap):
    """Without a softcap the class cannot occur. A finite softcap bounds it and has a gradient."""
    by = some_transform((True, True, softcap is not None), "float32", softcap)
    by = by._replace(bias=by.bias.at[2].set(-INF))
    d_x = np.zeros((C, K), np.float32)
    d_x[:, 2] = 1
    is_bounded = softcap == 30
    for x, d_u, d_by in forward_and_back(some_u("float32"), by, d_x):
        assert (np.asarray(x[:, 2]) == (-30 if is_bounded else -INF)).all()
        assert np.isfinite(np.delete(x, 2, axis=1)).all()
        slope = 0 if is_bounded else 1
        np.testing.assert_array_equal(d_u, slope * by.logit_scale * d_x)
        np.testing.assert_array_equal(d_by.bias, slope * d_x.sum(axis=0))
        assert np.isfinite(d_by.logit_scale)
        if softcap is not None:
            assert d_by.softcap == (-C if is_bounded else 0)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("cap", [1e-3, 1, 30, 1e4, 1e20, 1e30, 3e38])
def test_the_softcap_and_its_derivatives_in_60_digits(cap, traced):
    """Up to a cap where z / cap underflows, and down to a slope that 1 - tanh^2 rounds to 0."""
    z = np.array([1e-30, 1e-9, 1e-4, 0.1, 0.4, 0.6, 5, 10, 40, 1e4, 1e10, 1e30, 3e38], np.float32)
    cap = np.float32(cap)
    f = jax.vmap(jax.value_and_grad(capped, (0, 1)), (0, None))
    run = jax.jit(f) if traced else jax.jit(lambda z, _: f(z, cap))
    value, (by_z, by_cap) = jax.tree.map(np.asarray, run(z, cap))
    with mpmath.workdps(oracle.DIGITS):
        c = mpmath.mpf(float(cap))
        for i, one in enumerate(z):
            y = mpmath.mpf(float(one)) / c
            slope = mpmath.sech(y) ** 2
            for actual, exact in (
                (value[i], c * mpmath.tanh(y)),
                (by_z[i], slope),
                (by_cap[i], mpmath.tanh(y) - y * slope),
            ):
                if exact > 1e-37:
                    assert oracle.relative_error(actual, exact) < 2e-5, (one, cap)
                assert np.isfinite(actual)


def test_the_derivative_by_the_cap_is_precise_where_its_formulas_meet():
    """The series serves ratios below 1/2. The difference serves the others; it cancels below."""
    y = np.geomspace(1e-3, 8, 200).astype(np.float32)
    found = jax.jit(jax.vmap(jax.grad(capped, 1), (0, None)))(y, jnp.float32(1))
    with mpmath.workdps(oracle.DIGITS):
        for a, one in zip(np.asarray(found), map(mpmath.mpf, map(float, y)), strict=True):
            right = mpmath.tanh(one) - one * mpmath.sech(one) ** 2
            assert oracle.relative_error(a, right) < 2e-6, one


def test_an_infinite_softcap_is_none():
    z = jnp.array([-INF, -3e38, 0, 1e-30, 3e38, INF])
    x, by_z = jax.jit(jax.vmap(jax.value_and_grad(capped), (0, None)))(z, jnp.float32(INF))
    np.testing.assert_array_equal(x, z)
    assert (np.asarray(by_z) == 1).all()
    by_cap = jax.jit(jax.vmap(jax.grad(capped, 1), (0, None)))(z, jnp.float32(INF))
    assert (np.asarray(by_cap) == 0).all()
    assert capped(jnp.float32(-INF), jnp.float32(30)) == -30
    assert jax.grad(capped, 1)(jnp.float32(-INF), jnp.float32(30)) == -1


def test_the_softcap_in_float64():
    """The reference has 1000 digits, so that y - y slope is exact for the smallest ratio y."""
    z = np.array([-1e200, -1e4, -3, -1e-9, 0, 0.3, 20, 1e100, 1e300])
    run = jax.jit(jax.vmap(jax.value_and_grad(capped, (0, 1)), (0, None)))
    with jax.enable_x64(True), mpmath.workdps(1000):
        for cap in (0.5, 30.0, 1e4, 1e20, 1e300):
            value, (by_z, by_cap) = jax.tree.map(np.asarray, run(z, cap))
            assert value.dtype == by_z.dtype == by_cap.dtype == np.float64
            c = mpmath.mpf(cap)
            for i, y in enumerate(mpmath.mpf(one) / c for one in z):
                slope = mpmath.sech(y) ** 2
                right = c * mpmath.tanh(y), slope, mpmath.tanh(y) - y * slope
                for a, exact_a in zip((value[i], by_z[i], by_cap[i]), right, strict=True):
                    if abs(exact_a) < 1e-300:
                        assert abs(a) <= 1e-300, (z[i], cap)
                    else:
                        assert abs(mpmath.mpf(float(a)) / exact_a - 1) < 1e-13, (z[i], cap)


# H0, H6 and H7


D = 6
LOCAL_CPU = Backend("cpu", is_local=True)
BACKENDS = {
    "local cpu": LOCAL_CPU,
    "local cpu, JAX 0.10": Backend("cpu", True, (0, 10)),
    "cpus": Backend("cpu", is_local=False),
    "gpu": Backend("gpu", is_local=True),
    "tpus": Backend("tpu", is_local=False),
}
CLASSES = {100: 100, 512: 256, 521: 256}  # in one block, in two, in two and a remainder


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(Backend, "class_block_bytes", 1)


def operands(classes, dtype):
    """Hidden states, kernel, d u, and the gradient of the kernel so far."""
    hidden, kernel = (jnp.asarray(a, dtype) for a in (normal(C, D), normal(D, classes)))
    wide = "float64" if dtype == "float64" else "float32"
    return (
        hidden,
        kernel,
        jnp.asarray(normal(C, classes), wide),
        jnp.asarray(3 * normal(D, classes, seed=1), wide),
    )


def all_products(products):
    return jax.jit(
        lambda hidden, kernel, d_u, d_kernel: (
            products.u(hidden, kernel),
            *products.backward(d_u, hidden, kernel, d_kernel=d_kernel, want_hidden=True),
        )
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_products_of_matrices(small_blocks, backend, dtype):
    products = Products(jnp.dtype(dtype), lax.Precision.HIGHEST, backend)
    for classes, block in CLASSES.items() if backend.is_local else [(521, 521)]:
        if backend.platform == "cpu":
            assert classes_per_block(D, classes, backend) == block
        arrays = operands(classes, dtype)
        hidden, kernel, d_u, d_kernel = (np.asarray(a, np.float64) for a in arrays)
        if dtype == "bfloat16" and backend.platform != "cpu":
            d_u = np.asarray(arrays[2].astype(dtype), np.float64)
        expected = hidden @ kernel, d_u @ kernel.T, d_kernel + hidden.T @ d_u
        for found, right in zip(all_products(products)(*arrays), expected, strict=True):
            assert found.dtype == np.float32
            assert_close(found, right)


def test_products_of_float64(small_blocks):
    with jax.enable_x64(True):
        hidden, kernel, d_u, d_kernel = arrays = operands(521, "float64")
        products = Products(jnp.dtype("float64"), lax.Precision.HIGHEST, LOCAL_CPU)
        found = all_products(products)(*arrays)
        expected = hidden @ kernel, d_u @ kernel.T, d_kernel + hidden.T @ d_u
        for a, right in zip(found, expected, strict=True):
            assert a.dtype == np.float64
            assert_close(a, right)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_gradients_too_small_for_float16_reach_its_products(platform):
    """d u is 1e-9, which float16 rounds to 0."""
    hidden, kernel, d_u, _ = operands(100, "float16")
    d_u = 1e-9 * d_u
    backend = Backend(platform, is_local=True)
    products = Products(jnp.dtype("float16"), lax.Precision.HIGHEST, backend)
    _, d_hidden, d_kernel = all_products(products)(hidden, kernel, d_u, jnp.zeros((D, 100)))
    h, w, d = (np.asarray(a, np.float64) for a in (hidden, kernel, d_u))
    assert_close(d_hidden, d @ w.T)
    assert_close(d_kernel, h.T @ d)


def equations(jaxpr, primitives):
    """The equations of these primitives, also in inner programs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in primitives:
            yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner, primitives)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_all_products_have_the_precision_and_accumulate_in_float32(small_blocks, backend, dtype):
    products = Products(jnp.dtype(dtype), lax.Precision.HIGH, backend)
    jaxpr = jax.make_jaxpr(all_products(products))(*operands(512, dtype))
    found = list(equations(jaxpr.jaxpr, {"dot_general"}))
    assert len(found) == 3
    for eqn in found:
        assert eqn.params["precision"] == (lax.Precision.HIGH,) * 2
        assert eqn.params["preferred_element_type"] == np.float32
    # Blocks are multiplied one at a time if operands are widened or a product is accumulated.
    in_blocks = (
        backend.product_dtype(jnp.dtype(dtype)) != dtype,
        backend.gradient_dtype(jnp.dtype(dtype)) != dtype,
        True,
    )
    for eqn, splits in zip(found, in_blocks, strict=True):
        longest = max(n for x in eqn.invars for n in x.aval.shape)
        assert longest == (256 if splits and backend.loops_over_rows else 512)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float64", lax.Precision.DEFAULT),
        ("float32", lax.Precision.HIGHEST),
        ("float16", lax.Precision.HIGH),
        ("bfloat16", lax.Precision.DEFAULT),
    ],
)
def test_the_precision_keeps_the_dtype_unless_the_caller_chose_another(dtype, expected):
    with jax.default_matmul_precision(None):
        assert product_precision(dtype) == product_precision(jnp.dtype(dtype)) == expected
    for chosen in ("tensorfloat32", "float32", "bfloat16", "highest"):
        with jax.default_matmul_precision(chosen):
            assert product_precision(dtype) == chosen


# Gathering the rows of the kernel


SUMS = {"psum", "psum_invariant", "reduce_scatter"}


@pytest.mark.parametrize("names", [("data",), ("data", "model")], ids=str)
def test_rows_are_gathered_and_their_gradient_is_rounded_once(names):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    kernel = jnp.asarray(normal(8, 3), jnp.bfloat16)
    g = jnp.asarray(normal(4, 8, 3), jnp.float32)

    def gathered(kernel, g):
        def total(kernel):
            rows = gather_rows(kernel, "data", frozenset(names), jnp.float32)
            return jnp.sum(rows * g[0]), rows

        d_kernel, rows = jax.grad(total, has_aux=True)(kernel)
        return d_kernel, rows[None]

    run = jax.shard_map(
        gathered, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=(P("data"), P(names))
    )
    d_kernel, rows = jax.jit(run)(kernel, g)
    assert d_kernel.dtype == jnp.bfloat16
    assert rows.dtype == np.float32
    devices = 4 * (2 if "model" in names else 1)
    np.testing.assert_array_equal(rows, np.stack(devices * [kernel.astype(jnp.float32)]))
    assert_close(d_kernel, np.sum(g, axis=0) * (devices / 4))
    # XLA may compute in float32 a sum that was traced in bfloat16. So check the traced program.
    sums = list(equations(jax.make_jaxpr(run)(kernel, g).jaxpr, SUMS))
    assert len(sums) == len(names)
    assert all(x.aval.dtype == np.float32 for eqn in sums for x in eqn.invars)
    assert sums[0].primitive.name == "reduce_scatter"  # it leaves fewer numbers for the other sum
