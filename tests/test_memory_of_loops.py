"""The memory of loops over sequences and of ``jax.vmap``, by the way they are written.

The documentation has these numbers: python tests/test_memory_of_loops.py
"""

import functools

import fresh
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import sxe

B, T, D, K = 8, 256, 512, 32_000  # sequences, tokens, features, classes
head = sxe.linear_softmax_cross_entropy


def one_call(hidden, kernel, labels):
    return head(hidden, kernel, labels)


def loop(hidden, kernel, labels, loss_fn):
    """The mean of the losses of all sequences."""

    def add(total, sequence):
        return total + loss_fn(sequence[0], kernel, sequence[1]), None

    total, _ = lax.scan(add, jnp.zeros(()), (hidden, labels))
    return total / len(labels)


def mean_of_none(hidden, kernel, labels):
    return jnp.mean(head(hidden, kernel, labels, reduction="none"))


def gradient_inside(hidden, kernel, labels):
    """Value and gradients of `loop` with the head's mean, where each step takes the gradient."""

    def add(sums, sequence):
        loss, (d_hidden, d_kernel) = jax.value_and_grad(head, (0, 1))(
            sequence[0], kernel, sequence[1]
        )
        return (sums[0] + loss, sums[1] + d_kernel), d_hidden

    zeros = jnp.zeros(()), jnp.zeros(kernel.shape, jnp.float32)
    (loss, d_kernel), d_hidden = lax.scan(add, zeros, (hidden, labels))
    n = len(labels)
    return loss / n, (d_hidden / n, (d_kernel / n).astype(kernel.dtype))


def vmap_over_sequences(hidden, kernel, labels):
    return jnp.mean(jax.vmap(head, (0, None, 0))(hidden, kernel, labels))


def vmap_over_rows(hidden, kernel, labels):
    return vmap_over_sequences(hidden.reshape(-1, hidden.shape[-1]), kernel, labels.ravel())


def differentiated(loss_fn):
    return jax.value_and_grad(functools.partial(loop, loss_fn=loss_fn), (0, 1))


WAYS = {
    "one call": jax.value_and_grad(one_call, (0, 1)),
    "the gradient of a vmap over sequences": jax.value_and_grad(vmap_over_sequences, (0, 1)),
    "the gradient of a vmap over single rows": jax.value_and_grad(vmap_over_rows, (0, 1)),
    "a gradient in each step": gradient_inside,
    'the gradient of the loop: "none"': differentiated(mean_of_none),
    'the gradient of the loop: "mean", jax.checkpoint': differentiated(jax.checkpoint(head)),
    'the gradient of the loop: "mean"': differentiated(head),
}


def temporaries(f):
    """The temporary memory in MiB."""
    hidden = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((D, K), jnp.bfloat16)
    compiled = jax.jit(f).lower(hidden, kernel, jax.ShapeDtypeStruct((B, T), jnp.int32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def test_loops_agree():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, kernel = jax.random.normal(keys[0], (3, 5, 7)), jax.random.normal(keys[1], (7, 11))
    labels = jax.random.randint(keys[2], (3, 5), 0, 11)
    expected = WAYS["one call"](hidden, kernel, labels)
    for f in WAYS.values():
        found = jax.jit(f)(hidden, kernel, labels)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_gradient_outside_of_a_loop_keeps_one_of_the_kernel_for_each_mean():
    """On one device, in a separate process."""
    lines = fresh.run(__file__).splitlines()
    mib = dict(line.rsplit(" ", 1) for line in lines)
    assert mib.keys() == WAYS.keys()
    kernel = D * K * 4 / 2**20  # its gradient in float32
    one, sequences, rows, *lean, stored = map(float, mib.values())
    assert stored > B * kernel
    assert max(lean) < 3 * kernel
    assert max(sequences, rows) < 1.1 * one


def main():
    for name, f in WAYS.items():
        print(name, f"{temporaries(f):.0f}")


if __name__ == "__main__":
    main()
