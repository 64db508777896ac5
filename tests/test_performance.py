"""What must not be lost: no temporary of the logits' size, and a time near optax's."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sxe

N, K = 1024, 32768


def sxe_loss(logits, labels):
    return sxe.softmax_cross_entropy(logits, labels)


def optax_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def compiled(loss):
    shapes = [jax.ShapeDtypeStruct((N, K), jnp.float32), jax.ShapeDtypeStruct((N,), jnp.int32)]
    return jax.jit(loss).lower(*shapes).compile()


@pytest.mark.parametrize("rule", ["vjp", "jvp"])
def test_no_temporary_of_the_size_of_the_logits(rule):
    def loss(logits, labels):
        return sxe.softmax_cross_entropy(logits, labels, rule=rule)

    for f in (loss, jax.value_and_grad(loss)):
        assert compiled(f).memory_analysis().temp_size_in_bytes < 2**20 < N * K * 4


@pytest.mark.slow
def test_value_and_gradient_at_most_twice_the_time_of_optax():
    """Medians of interleaved rounds; the margin is wide because machines are shared."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, K, size=N), jnp.int32)
    functions = {f.__name__: compiled(jax.value_and_grad(f)) for f in (sxe_loss, optax_loss)}
    seconds = {name: [] for name in functions}
    for _ in range(15):
        for name, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f(logits, labels))
            seconds[name].append(time.perf_counter() - start)
    ratio = np.median(seconds["sxe_loss"]) / np.median(seconds["optax_loss"])
    print(f"sxe / optax, {N} x {K} float32, value and gradient: {ratio:.2f}")
    assert ratio < 2
