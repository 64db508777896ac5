"""The mean over sequences of each one's mean over tokens, in one call of the head.

Each sequence then weighs the same, however many tokens it has; EasyLM trains this way. A token's
weight is 1 / n in a sequence of n tokens that count. The weights of a sequence sum to 1, and those
of all to the number of sequences, by which reduction="mean" divides:

    loss = sum_b (1 / n_b) sum_t loss_bt / B

To run it:

    python examples/recipes/mean_over_sequences.py
"""

import jax
import jax.numpy as jnp
import optax

import sxe

B, T, D, K = 6, 24, 32, 300  # sequences, tokens, features, classes
LENGTHS = (24, 20, 9, 3, 1, 0)  # of the sequences: how many tokens count


def sequence_weights(where):
    """1 / n at the n tokens of a sequence that count, [B, T]."""
    return where / jnp.maximum(jnp.sum(where, axis=-1, keepdims=True), 1)


def hidden_fn(params, x):
    return jnp.tanh(x @ params["layer"])


def loss_fn(params, x, labels, where):
    """A sequence without tokens that count has no weight, so that it is not in the mean."""
    hidden, options = hidden_fn(params, x), {"where": where, "weights": sequence_weights(where)}
    return sxe.linear_softmax_cross_entropy(hidden, params["kernel"], labels, **options)


def loss_over_all_fn(params, x, labels, where):
    """Such a sequence is in the mean, with a loss of 0: the sum, divided by all sequences."""
    hidden, options = hidden_fn(params, x), {"where": where, "weights": sequence_weights(where)}
    options["reduction"] = "sum"
    loss = sxe.linear_softmax_cross_entropy(hidden, params["kernel"], labels, **options)
    return loss / len(labels)


def token_mean_fn(params, x, labels, where):
    hidden = hidden_fn(params, x)
    return sxe.linear_softmax_cross_entropy(hidden, params["kernel"], labels, where=where)


def logits_losses(params, x, labels, where):
    """The plain way, [B]: the loss of one sequence under jax.vmap, and 0 if none of it counts."""

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
    """The largest difference, each relative to the largest magnitude of its array."""
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
    print(f"tokens of the sequences: {LENGTHS}")

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
