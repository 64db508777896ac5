"""Supervised fine-tuning on prompts and answers, where only the tokens of the answers count.

The model learns the answer and its end, not the prompt. A position counts if the next token belongs
to the answer: the last token of the prompt counts, and the end of the answer does not. `where` is
the mask of the positions that count. The head (the final linear layer and the loss in one call)
sorts these positions to the front, and skips the chunks of rows after them. So a step takes less
time if fewer positions count. To run this script:

    python examples/recipes/supervised_fine_tuning.py
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sxe

B, T, D, K = 16, 128, 64, 4096  # sequences, tokens, hidden size, classes
# Rows per chunk. With so few classes, the default is one chunk of all rows, which always runs.
CHUNK = 64
PAD, END = 0, 1


def make_batch(pairs):
    """Tokens, labels, and a mask of the labels that are in the answer; all [B, T]."""
    tokens = np.full((len(pairs), T + 1), PAD)
    of_answer = np.zeros(tokens.shape, bool)
    for i, (prompt, answer) in enumerate(pairs):
        first, end = len(prompt), len(prompt) + len(answer) + 1
        tokens[i, :end] = *prompt, *answer, END
        of_answer[i, first:end] = True
    return tokens[:, :-1], tokens[:, 1:], of_answer[:, 1:]  # the mask is shifted like the labels


def hidden_fn(params, tokens):
    """A stand-in for a language model: [B, T] to [B, T, D], from the mean of the tokens so far."""
    count = jnp.arange(1, 1 + tokens.shape[1])[:, None]
    x = jnp.cumsum(params["embedding"][tokens], axis=1) / count
    return jnp.tanh(x @ params["layer"])


def loss_fn(params, tokens, labels, where):
    hidden, kernel = hidden_fn(params, tokens), params["embedding"].T
    return sxe.linear_softmax_cross_entropy(hidden, kernel, labels, where=where, chunk_size=CHUNK)


def logits_loss_fn(params, tokens, labels, where):
    logits = hidden_fn(params, tokens) @ params["embedding"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses * where) / jnp.sum(where)


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def median_seconds(f, *calls, rounds=9):
    """The median time of f for each call. Calls take turns, so other processes slow all equally."""
    seconds = np.zeros((rounds, len(calls)))
    for of_round in seconds:
        for i, arguments in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(f(*arguments))
            of_round[i] = time.perf_counter() - start
    return np.median(seconds, axis=0)


def main():
    rng = np.random.default_rng(0)
    params = {
        "embedding": jnp.asarray(rng.normal(size=(K, D)), jnp.float32) / D**0.5,
        "layer": jnp.asarray(rng.normal(size=(D, D)), jnp.float32),
    }
    lengths = zip(rng.integers(20, 80, size=B), rng.integers(14, 48, size=B), strict=True)
    pairs = [[rng.integers(2, K, size=n) for n in pair] for pair in lengths]
    tokens, labels, where = make_batch(pairs)
    print(f"{B} prompts and answers: {np.mean(where):.0%} of {B * T} positions count")
    answers = np.concatenate([[*answer, END] for _, answer in pairs])
    print(f"their labels are the answers with END: {np.array_equal(labels[where], answers)}")

    grad_fn = jax.jit(jax.value_and_grad(loss_fn))
    expected = jax.jit(jax.value_and_grad(logits_loss_fn))(params, tokens, labels, where)
    error = difference(grad_fn(params, tokens, labels, where), expected)
    print(f"loss and gradients: largest difference from optax on all logits {error:.1e}")

    unshifted = np.pad(where, ((0, 0), (1, 0)))[:, :-1]
    _, wrong = grad_fn(params, tokens, labels, unshifted)
    print(f"mask not shifted: gradients off by {difference(wrong, expected[1]):.1%}")

    calls = [(params, tokens, labels, mask) for mask in (where, np.ones_like(where))]
    some, every = median_seconds(grad_fn, *calls)
    times = f"{1e3 * some:.1f} ms, {1e3 * every:.1f} ms if all positions count"
    print(f"loss and gradients: {times}, ratio {some / every:.2f}")


if __name__ == "__main__":
    main()
