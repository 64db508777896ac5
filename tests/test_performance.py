"""What must not be lost: no temporary of the logits' size, and a time near optax's.

As a script, `python tests/test_performance.py`, it prints times as multiples of optax's, and with
the argument `head` those of the loss without logits, and its temporaries.
"""

import sys
import time

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sxe

N, K = 1024, 32768
SHAPES = [
    (N, K, "float32"),
    (N, K, "bfloat16"),
    (N, 50257, "float32"),
    (N, 50257, "bfloat16"),
    (32768, 1000, "float32"),
    (32768, 1000, "bfloat16"),
]
HEADS = [  # N, D, K
    (2048, 512, 32768, "float32"),
    (2048, 512, 32768, "bfloat16"),
    (1024, 1024, 50257, "float32"),
    (1024, 1024, 50257, "bfloat16"),
    (8192, 256, 1000, "float32"),
    (8192, 256, 1000, "bfloat16"),
]


def sxe_loss(logits, labels):
    return sxe.softmax_cross_entropy(logits, labels)


def optax_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def compiled(f, rows, classes, dtype):
    logits = jax.ShapeDtypeStruct((rows, classes), dtype)
    return jax.jit(f).lower(logits, jax.ShapeDtypeStruct((rows,), jnp.int32)).compile()


@pytest.mark.parametrize("rule", ["vjp", "jvp"])
def test_no_temporary_of_the_size_of_the_logits(rule):
    def loss(logits, labels):
        return sxe.softmax_cross_entropy(logits, labels, rule=rule)

    for f in (loss, jax.value_and_grad(loss)):
        program = compiled(f, N, K, jnp.float32)
        assert program.memory_analysis().temp_size_in_bytes < 2**20 < N * K * 4


def seconds(programs, arguments, rounds):
    """The times of all rounds but the first, interleaved: [rounds - 1] for each program."""
    taken = [[] for _ in programs]
    for _ in range(rounds):
        for program, times in zip(programs, taken, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times.append(time.perf_counter() - start)
    return [np.array(times[1:]) for times in taken]


def ratios(rows, classes, dtype, rounds=11):
    """sxe's median time over optax's, interleaved, for the value and for value and gradient."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(rows, classes)), dtype)
    labels = jnp.asarray(rng.integers(0, classes, size=rows), jnp.int32)
    programs = [
        compiled(transform(f), rows, classes, dtype)
        for transform in (lambda f: f, jax.value_and_grad)
        for f in (sxe_loss, optax_loss)
    ]
    medians = [np.median(times) for times in seconds(programs, (logits, labels), rounds)]
    return medians[0] / medians[1], medians[2] / medians[3]


@pytest.mark.slow
def test_value_and_gradient_at_most_twice_the_time_of_optax():
    """On one device, in a process of its own; the margin is wide because machines are shared."""
    output = fresh.run(__file__, 1, timeout=600)
    print(output)
    assert float(output.split()[-1]) < 2


def head_programs(rows, hidden, classes, dtype):
    """Value and gradient for hidden states and kernel: sxe, optax with logits; and one matmul."""

    def optax_head(hidden, kernel, labels):
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def matmul(hidden, kernel, labels):
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    shapes = [((rows, hidden), dtype), ((hidden, classes), dtype), ((rows,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    heads = (sxe.linear_softmax_cross_entropy, optax_head)
    functions = (*(jax.value_and_grad(f, (0, 1)) for f in heads), matmul)
    return [jax.jit(f).lower(*arguments).compile() for f in functions]


def head(rounds=9):
    """Time as a multiple of optax's and of three matmuls, with quartiles, and temporaries."""
    print(f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()} device")
    print("   N x D x K             dtype     sxe / optax          / 3 matmuls  MiB: sxe   optax")
    for rows, hidden, classes, dtype in HEADS:
        programs = head_programs(rows, hidden, classes, jnp.dtype(dtype))
        rng = np.random.default_rng(0)
        arguments = (
            jnp.asarray(rng.normal(size=(rows, hidden)), dtype),
            jnp.asarray(rng.normal(size=(hidden, classes)) / hidden**0.5, dtype),
            jnp.asarray(rng.integers(0, classes, size=rows), jnp.int32),
        )
        ours, theirs, matmul = seconds(programs, arguments, rounds)
        low, middle, high = np.percentile(ours / theirs, [25, 50, 75])
        floor = np.median(ours) / (3 * np.median(matmul))
        mib = [program.memory_analysis().temp_size_in_bytes / 2**20 for program in programs]
        print(
            f"{rows:5} x {hidden:4} x {classes:<8} {dtype:9} "
            f"{middle:4.2f} ({low:.2f}..{high:.2f}) {floor:13.2f} {mib[0]:13.0f} {mib[1]:7.0f}"
        )


def main():
    """All shapes, or as many of the first as an argument says; or the head."""
    if sys.argv[1:] == ["head"]:
        head()
        return
    print(
        f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()} device, sxe / optax"
    )
    print("    N x K          dtype     value  value and gradient")
    for rows, classes, dtype in SHAPES[: int((sys.argv[1:] or [len(SHAPES)])[0])]:
        value, both = ratios(rows, classes, jnp.dtype(dtype))
        print(f"{rows:6} x {classes:<8} {dtype:9} {value:6.2f} {both:13.2f}")


if __name__ == "__main__":
    main()
