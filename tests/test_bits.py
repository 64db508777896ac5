"""In one program, the bits of a row's results depend on that row only, not on its position.

A program has fixed sizes. For another number of rows, XLA compiles another program, which may add
in another order. Run as a script, this file prints how much results change then, on one device.
"""

import os

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from option_cases import slow

import sxe


def confident(x, rng):
    """The logits or hidden states x, with a first feature that leads in every third row."""
    x[::3, 0] += rng.choice([8, 20, 60], size=len(x[::3]))
    return x


def of_logits(classes, rows, dtype):
    """A function from rows to their losses and gradients, and the rows."""
    rng = np.random.default_rng([rows, classes])
    x = confident(3 * rng.normal(size=(rows, classes)), rng)
    labels = rng.integers(classes, size=rows) * (np.arange(rows) % 3 > 0)

    def f(x, labels):
        def loss(x):
            each = sxe.softmax_cross_entropy(x, labels, ignore_index=-1, reduction="none")
            return jnp.sum(each), each

        (_, each), gradient = jax.value_and_grad(loss, has_aux=True)(x)
        return each, gradient

    return jax.jit(f), (np.asarray(jnp.asarray(x, dtype)), labels)


def of_head(width, classes, rows, dtype, reduction="none", chunk_size=None):
    """The same for the head, with gradients of hidden states. A sum returns lse as losses."""
    static = {"reduction": reduction, "chunk_size": chunk_size}
    rng = np.random.default_rng([rows, width, classes])
    hidden = confident(rng.normal(size=(rows, width)), rng)
    kernel = jnp.asarray(rng.normal(size=(width, classes)) / width**0.5, dtype)
    labels = rng.integers(classes, size=rows)

    def f(hidden, labels):
        def loss(hidden):
            value, metrics = sxe.linear_softmax_cross_entropy(
                hidden, kernel, labels, ignore_index=-1, return_metrics=True, **static
            )
            return jnp.sum(value), value if value.ndim else metrics.lse

        (_, each), gradient = jax.value_and_grad(loss, has_aux=True)(hidden)
        return each, gradient

    return jax.jit(f), (np.asarray(jnp.asarray(hidden, dtype)), labels)


def differ(a, b):
    """For each row, whether its loss or any entry of its gradient differs."""
    return (a[0] != b[0]) | (a[1] != b[1]).any(-1)


def check(f, rows):
    """Check for equal bits in another order, with other rows, and with rows that do not count."""

    def run(*rows):
        return [np.asarray(a).astype(np.float32) for a in f(*rows)]

    (x, labels), n = rows, len(rows[0])
    right = run(x, labels)
    order = np.random.default_rng(1).permutation(n)
    assert not differ(run(x[order], labels[order]), [a[order] for a in right]).any()
    kept = np.arange(n) % 2 == 0
    others = np.where(kept[:, None], x, x[::-1] / 2).astype(x.dtype)
    assert not differ(run(others, labels), right)[kept].any()
    assert not differ(run(x, np.where(kept, labels, -1)), right)[kept].any()


def check_all(dtype):
    for classes, rows in [(5, 43), (17, 43), (37, 300), (1000, 131), (20000, 131)]:
        check(*of_logits(classes, rows, dtype))
    for sizes in [(7, 37, 43), (64, 1000, 131), (16, 20000, 67)]:
        for reduction, chunk_size in [("none", None), ("none", 32), ("sum", 32)]:
            check(*of_head(*sizes, dtype, reduction, chunk_size))


@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_a_row_has_the_same_bits_wherever_it_stands(dtype):
    check_all(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_one_device(dtype):
    """On one device, rows are computed in blocks. This runs in a separate process."""
    path = f"{fresh.ROOT}{os.pathsep}{fresh.ROOT / 'tests'}"
    fresh.run("-c", f"import test_bits; test_bits.check_all('{dtype}')", PYTHONPATH=path)


def alone(f, rows, n):
    """How the losses of the first n rows change if these rows are passed alone.

    Returns the largest change, in units in the last place, and the share of rows that change.
    """
    right, found = np.asarray(f(*rows)[0])[:n], np.asarray(f(*(a[:n] for a in rows))[0])
    return np.max(np.abs(found - right) / np.spacing(right)), np.mean(found != right)


if __name__ == "__main__":
    print("Of 512 rows the first n alone: units in the last place, and rows that differ")
    problems = {
        "logits, K = 37": (of_logits, 37),
        "logits, K = 1000": (of_logits, 1000),
        "head, D = 256, K = 1000": (of_head, 256, 1000),
        "head, D = 768, K = 8192": (of_head, 768, 8192),
    }
    for dtype in ("float32", "bfloat16"):
        for name, (make, *sizes) in problems.items():
            f, rows = make(*sizes, 512, dtype)
            found = {n: alone(f, rows, n) for n in (1, 2, 16, 64, 256)}
            each = [f"{n}: {units:.0f}, {share:.0%}" for n, (units, share) in found.items()]
            print(f"{dtype:9}{name:24}", "   ".join(each), flush=True)
