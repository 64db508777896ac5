"""Gradient accumulation over micro-batches with different numbers of tokens.

A mean of the micro-batches' means gives the tokens of a small micro-batch more weight than other
tokens. The gradient of the big batch is the sum over all tokens, divided by the number of tokens.
So compute the "sum" of each micro-batch, add the results, and divide once at the end. With
`optax.MultiSteps`, count the tokens of all micro-batches first, and divide the gradient of each
micro-batch by this number. To run this script:

    python examples/recipes/gradient_accumulation.py
"""

import functools

import jax
import jax.numpy as jnp
import optax

import sxe

M, B, T, D, K = 4, 8, 16, 32, 300  # micro-batches, sequences, tokens, hidden size, classes
PAD = -100


@functools.partial(jax.jit, static_argnames="reduction")
@functools.partial(jax.value_and_grad, has_aux=True)
def grad_fn(params, x, labels, reduction):
    hidden = jnp.tanh(x @ params["layer"])
    options = {"ignore_index": PAD, "reduction": reduction, "return_metrics": True}
    return sxe.linear_softmax_cross_entropy(hidden, params["kernel"], labels, **options)


@jax.jit
def accumulate(params, xs, labels):
    """The mean loss and its gradient over all micro-batches, from sums and one division."""

    def add(sums, micro_batch):
        (_, metrics), grads = grad_fn(params, *micro_batch, reduction="sum")
        return jax.tree.map(jnp.add, sums, (metrics.loss_sum, metrics.weight_sum, grads)), None

    zeros = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    (loss_sum, weight_sum, grads), _ = jax.lax.scan(add, zeros, (xs, labels))
    return jax.tree.map(lambda total: total / weight_sum, (loss_sum, grads))


def multi_steps(optimizer, params, xs, labels):
    """The same loss, and the optimizer's update. `use_grad_mean=False` adds the gradients."""
    optimizer = optax.MultiSteps(optimizer, every_k_schedule=M, use_grad_mean=False)
    opt_state = optimizer.init(params)
    tokens, loss_sum = jnp.sum(labels != PAD), 0.0
    for micro_batch in zip(xs, labels, strict=True):
        (_, metrics), grads = grad_fn(params, *micro_batch, reduction="sum")
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)  # 0 until the last
        loss_sum += metrics.loss_sum
    return loss_sum / tokens, updates


def mean_of_means(params, xs, labels):
    """The wrong mean: all micro-batches have the same weight, however few tokens they have."""
    results = [grad_fn(params, *pair, reduction="mean") for pair in zip(xs, labels, strict=True)]
    results = [(loss, grads) for (loss, _), grads in results]
    return jax.tree.map(lambda *leaves: sum(leaves) / M, *results)


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    layer, kernel = jax.random.normal(keys[0], (D, D)), jax.random.normal(keys[1], (D, K)) / 2
    params = {"layer": layer, "kernel": kernel}
    xs = jax.random.normal(keys[2], (M, B, T, D))
    labels = jax.random.randint(keys[3], (M, B, T), 0, K)
    lengths = jnp.array([16, 8, 4, 1])[:, None, None]  # of the sequences, by micro-batch
    labels = jnp.where(jnp.arange(T) < lengths, labels, PAD)
    print(f"tokens per micro-batch: {jnp.sum(labels != PAD, axis=(1, 2)).tolist()}")

    big_batch = xs.reshape(M * B, T, D), labels.reshape(M * B, T)
    (loss, _), grads = grad_fn(params, *big_batch, reduction="mean")
    optimizer = optax.sgd(0.1, momentum=0.9)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)

    from_big_batch = "largest difference from the big batch's"
    error = difference(accumulate(params, xs, labels), (loss, grads))
    print(f"sums: loss and gradient, {from_big_batch} {error:.1e}")
    error = difference(multi_steps(optimizer, params, xs, labels), (loss, updates))
    print(f"MultiSteps: loss and update, {from_big_batch} {error:.1e}")
    wrong = mean_of_means(params, xs, labels)
    errors = difference(wrong[0], loss), difference(wrong[1], grads)
    print("mean of means: loss off by {:.1%}, gradient by {:.1%}".format(*errors))


if __name__ == "__main__":
    main()
