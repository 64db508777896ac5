"""The state (m, r): blocks of rows, shards and derivatives give what one tile gives."""

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sxe import _normalizer as nz


def some_logits():
    x = np.random.default_rng(0).normal(size=(11, 3, 5)).astype(np.float32) * 20
    x[0] = 1e8
    x[1, 0] = [0, 40, 0, -np.inf, 0]
    x[2, 1] = -np.inf
    x[3, 2, 1] = np.nan
    x[4, 0, 1] = np.inf
    return x


@pytest.mark.parametrize("rows", [1, 2, 7, 11, 33])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_of_rows_are_one_tile(monkeypatch, rows, dtype):
    monkeypatch.setattr(nz, "rows_per_block", lambda x: rows)
    x = jnp.asarray(some_logits(), dtype)
    blocks, tile = nz.normalize(x), nz.normalize_tile(x)
    for a, b in zip(blocks, tile, strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_classes_are_one_tile(dtype):
    x = jnp.asarray(some_logits(), dtype)
    for classes in (2, 5):
        part = x[..., :classes]
        few, tile = nz._normalize_few(part), nz.normalize_tile(part)
        for a, b in zip(few, tile, strict=True):
            assert a.dtype == b.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_parts_divide_where_they_can():
    assert [nz.part_of(n, 8) for n in (1, 7, 8, 12, 13, 14, 40)] == [1, 7, 8, 6, 8, 7, 8]


def test_derivatives_of_blocks_are_those_of_a_tile(monkeypatch):
    monkeypatch.setattr(nz, "rows_per_block", lambda x: 2)
    x = jnp.asarray(some_logits()[5:] / 20)
    x = x.at[0, 0, 1].set(x[0, 0, 0]).at[1, 1, 2].set(-jnp.inf)
    rng = np.random.default_rng(1)
    x_dot = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    g = jnp.asarray(rng.normal(size=x.shape[:-1]), jnp.float32)

    def f(normalize, x):
        return jnp.sum(g * normalize(x).log1p_r)

    def both(transform):
        return [transform(lambda x, n=n: f(n, x)) for n in (nz.normalize, nz.normalize_tile)]

    pairs = [
        both(lambda f: jax.jvp(f, (x,), (x_dot,))[1]),
        both(lambda f: jax.grad(f)(x)),
        both(lambda f: jax.jvp(jax.grad(f), (x,), (x_dot,))[1]),
        both(lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) * x_dot))(x)),
    ]
    for blocks, tile in pairs:
        np.testing.assert_allclose(blocks, tile, rtol=1e-5, atol=1e-6)


ONE_DEVICE = """
import jax, jax.numpy as jnp, numpy as np, sxe
from sxe import _normalizer as nz
assert jax.device_count() == 1
n, k = 257, 50257
shape = jax.ShapeDtypeStruct((n, k), jnp.float32)
for dtype in (jnp.float32, jnp.bfloat16):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(n, k)), dtype)
    assert 1 < nz.rows_per_block(x) < n
    labels = jnp.arange(n)
    f = lambda x: sxe.softmax_cross_entropy(x, labels)
    compiled = jax.jit(jax.value_and_grad(f)).lower(x).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 16 * 2**20 < n * k * 4, (dtype, temporaries)
    value, gradient = jax.value_and_grad(f)(x)
    x = np.asarray(x, np.float64)
    q = np.exp(x - x.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    np.testing.assert_allclose(value, -np.log(q[np.arange(n), labels]).mean(), rtol=1e-6)
    q[np.arange(n), labels] -= 1
    rtol = 2e-5 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(gradient, np.float64), q / n, rtol=rtol)
"""


def test_one_cpu_device_takes_blocks_of_rows():
    """In a process of its own: here the tests see several devices, and blocks are ruled out."""
    fresh.run("-c", ONE_DEVICE)
