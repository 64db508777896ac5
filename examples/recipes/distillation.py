"""Knowledge distillation from a teacher's probabilities at a temperature, and from hard labels.

    loss = a T^2 CE(softmax(teacher / T), student / T) + (1 - a) CE(labels, student)

CE(targets, logits) is the cross-entropy, T the temperature, and a the weight of the teacher's term.
The gradient of the first term falls as 1 / T^2, and the factor T^2 compensates for that (arXiv
1503.02531). The head is the final linear layer and the loss in one call. `logit_scale` divides the
student's logits by T. The teacher's probabilities are passed as labels of a float dtype. They are
constant, so this cross-entropy has the gradient of the Kullback-Leibler divergence. Its value is
larger by the teacher's entropy. If the teacher runs in the same program, its probabilities are not
needed: see distillation_without_logits.py. To run this script:

    python examples/recipes/distillation.py
"""

import jax
import jax.numpy as jnp
import optax

import sxe

N, D, K = 512, 32, 100  # rows, hidden size, classes
ALPHA = 0.7  # a, the weight of the teacher's term


def hidden_fn(params, x):
    return jnp.tanh(x @ params["layer"])


def loss_fn(params, x, labels, teacher_logits, temperature):
    hidden, kernel = hidden_fn(params, x), params["kernel"]
    targets = jax.nn.softmax(teacher_logits / temperature)
    soft = sxe.linear_softmax_cross_entropy(hidden, kernel, targets, logit_scale=1 / temperature)
    hard = sxe.linear_softmax_cross_entropy(hidden, kernel, labels)
    return ALPHA * temperature**2 * soft + (1 - ALPHA) * hard


def divergence_loss_fn(params, x, labels, teacher_logits, temperature):
    """The same loss from log-probabilities, without the teacher's entropy."""
    logits = hidden_fn(params, x) @ params["kernel"]
    log_targets, log_q = (jax.nn.log_softmax(z / temperature) for z in (teacher_logits, logits))
    soft = jnp.mean(jnp.sum(jnp.exp(log_targets) * (log_targets - log_q), axis=-1))
    hard = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1))
    return ALPHA * temperature**2 * soft + (1 - ALPHA) * hard


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (N, D))
    teacher_logits = 3 * x @ jax.random.normal(keys[1], (D, K)) / D**0.5
    labels = jax.random.categorical(keys[2], teacher_logits)
    layer, kernel = jax.random.normal(keys[3], (2, D, max(D, K))) / D**0.5
    params = {"layer": layer[:, :D], "kernel": kernel[:, :K]}
    batch = x, labels, teacher_logits

    temperature = 2.0
    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params, *batch, temperature)
    divergence, expected = jax.jit(jax.value_and_grad(divergence_loss_fn))(
        params, *batch, temperature
    )
    q = jax.nn.softmax(teacher_logits / temperature)
    entropy = -jnp.mean(jnp.sum(q * jnp.log(q), axis=-1))
    error = difference((loss, grads), (divergence + ALPHA * temperature**2 * entropy, expected))
    print(f"loss and gradients: largest difference from log_softmax {error:.1e}")

    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(loss_fn)(params, *batch, temperature)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def report(when):
        logits = hidden_fn(params, x) @ params["kernel"]
        agree = jnp.mean(jnp.argmax(logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1))
        print(f"student and teacher agree on {agree:.0%} of the rows {when}")

    report("before training")
    for _ in range(200):
        params, opt_state = step(params, opt_state)
    report("after 200 steps")


if __name__ == "__main__":
    main()
