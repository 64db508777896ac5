"""Distillation from the k largest logits of a teacher, if only these are stored.

    loss = T^2 CE(p, student / T)      p = softmax(k largest logits / T), 0 for other classes

CE(targets, logits) is the cross-entropy, and T the temperature. All K logits of a teacher are too
many to store for each token of a data set. The k largest logits and their classes are two arrays
[N, k], and these classes have most of the probability. The head (the final linear layer and the
loss in one call) takes the classes as integer labels [N, k] and the probabilities as
`label_weights` [N, k]. No array [N, K] of targets or of the student's logits is created. To run
this script:

    python examples/recipes/top_k_distillation.py
"""

import jax
import jax.numpy as jnp
import optax

import sxe

N, D, K = 512, 32, 1000  # tokens, hidden size, classes
LARGEST = 8  # how many of the teacher's logits are stored
TEMPERATURE = 2.0


def hidden_fn(params, x):
    return jnp.tanh(x @ params["layer"])


def loss_fn(params, x, classes, largest, where):
    """The loss from the largest logits [N, k] and their classes; `where` is False for padding."""
    soft = sxe.linear_softmax_cross_entropy(
        hidden_fn(params, x),
        params["kernel"],
        classes,
        label_weights=jax.nn.softmax(largest / TEMPERATURE),
        logit_scale=1 / TEMPERATURE,
        where=where,
    )
    return TEMPERATURE**2 * soft


def dense_loss_fn(params, x, classes, largest, where):
    """The same loss from targets [N, K] and logits [N, K]."""
    rows = jnp.arange(N)[:, None]
    p = jnp.zeros((N, K)).at[rows, classes].set(jax.nn.softmax(largest / TEMPERATURE))
    logits = hidden_fn(params, x) @ params["kernel"]
    losses = -jnp.sum(p * jax.nn.log_softmax(logits / TEMPERATURE), axis=-1)
    return TEMPERATURE**2 * jnp.mean(losses, where=where)


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (N, D))
    teacher_logits = 4 * x @ jax.random.normal(keys[1], (D, K)) / D**0.5
    layer, kernel = jax.random.normal(keys[2], (2, D, K)) / D**0.5
    params = {"layer": layer[:, :D], "kernel": kernel}

    largest, classes = jax.lax.top_k(teacher_logits, LARGEST)  # what a data set would store
    where = jnp.arange(N) % 8 != 7  # False for padding
    batch = x, classes, largest, where
    kept = jnp.sum(jnp.exp(largest - jax.nn.logsumexp(teacher_logits, axis=-1, keepdims=True)), -1)
    print(f"stored: {LARGEST} of {K} logits, with {jnp.mean(kept):.0%} of the probability")

    found = jax.jit(jax.value_and_grad(loss_fn))(params, *batch)
    error = difference(found, jax.jit(jax.value_and_grad(dense_loss_fn))(params, *batch))
    print(f"loss and gradients: largest difference from dense targets {error:.1e}")

    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def report(when):
        logits = hidden_fn(params, x) @ params["kernel"]
        same = jnp.argmax(logits, axis=-1) == classes[:, 0]
        print(f"student and teacher agree on {jnp.mean(same, where=where):.0%} of the rows {when}")

    report("before training")
    for _ in range(200):
        params, opt_state = step(params, opt_state)
    report("after 200 steps")


if __name__ == "__main__":
    main()
