"""The mean over sequences of each sequence's mean over tokens, in one call.

All sequences have the same weight, however many tokens they have; EasyLM trains this way. If n
tokens of a sequence count (are not masked out), each of them has the weight 1 / n. The weights of
each sequence sum to 1, so all weights sum to the number of sequences, B. `reduction="mean"` divides
by this sum:

    loss = sum_b (1 / n_b) sum_t loss_bt / B

To run this script:

    python examples/recipes/mean_over_sequences.py
"""

import jax
import jax.numpy as jnp
import optax

import sxe

B, T, D, K = 6, 24, 32, 300  # sequences, tokens, hidden size, classes
LENGTHS = (24, 20, 9, 3, 1, 0)  # the number of tokens that count in each sequence


def sequence_weights(where):
    """Weights [B, T]: 1 / n for each of the n tokens that count in a sequence, 0 for the others."""
    return where / jnp.maximum(jnp.sum(where, axis=-1, keepdims=True), 1)


def hidden_fn(params, x):
    return jnp.tanh(x @ params["layer"])


def loss_fn(params, x, labels, where):
    """The mean over the sequences in which at least one token counts. Others have no weight."""
    hidden, options = hidden_fn(params, x), {"where": where, "weights": sequence_weights(where)}
    return sxe.linear_softmax_cross_entropy(hidden, params["kernel"], labels, **options)


def loss_over_all_fn(params, x, labels, where):
    """The mean over all sequences. A sequence in which no token counts has a loss of 0."""
    hidden, options = hidden_fn(params, x), {"where": where, "weights": sequence_weights(where)}
    options["reduction"] = "sum"
    loss = sxe.linear_softmax_cross_entropy(hidden, params["kernel"], labels, **options)
    return loss / len(labels)


def token_mean_fn(params, x, labels, where):
    hidden = hidden_fn(params, x)
    return sxe.linear_softmax_cross_entropy(hidden, params["kernel"], labels, where=where)


def logits_losses(params, x, labels, where):
    """The plain implementation, [B]: the loss of each sequence, and 0 if no token of it counts."""

    def sequence_loss(x, labels, where):
        logits = hidden_fn(params, x) @ params["kernel"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses * where) / jnp.maximum(jnp.sum(where), 1)

    return jax.vmap(sequence_loss)(x, labels, where)


def logits_loss_fn(params, x, labels, where):
    is_there = jnp.any(where, axis=-1)
    return jnp.sum(logits_losses(params, x, labels, where)) / jnp.sum(is_there)


def logits_loss_over_all_fn(params, x, labels, where):
    return jnp.mean(logits_losses(params, x, labels, where))


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "layer": jax.random.normal(keys[0], (D, D)),
        "kernel": jax.random.normal(keys[1], (D, K)) / 2,
    }
    x, labels = jax.random.normal(keys[2], (B, T, D)), jax.random.randint(keys[3], (B, T), 0, K)
    batch = x, labels, jnp.arange(T) < jnp.array(LENGTHS)[:, None]
    print(f"tokens per sequence: {LENGTHS}")

    def result(f):
        return jax.jit(jax.value_and_grad(f))(params, *batch)

    loss, grads = expected = result(logits_loss_fn)
    from_vmap = "largest difference from jax.vmap on logits"
    error = difference(result(loss_fn), expected)
    print(f"sequences with tokens: loss and gradients, {from_vmap} {error:.1e}")
    error = difference(result(loss_over_all_fn), result(logits_loss_over_all_fn))
    print(f"all sequences: loss and gradients, {from_vmap} {error:.1e}")
    wrong_loss, wrong = result(token_mean_fn)
    off = f"loss off by {difference(wrong_loss, loss):.1%}, gradients by"
    print(f"mean over all tokens: {off} {difference(wrong, grads):.1%}")


if __name__ == "__main__":
    main()
