"""Direct preference optimization (DPO, arXiv 2305.18290) from each token's loss, without logits.

With log p(y) the sum over an answer's tokens, y the preferred answer of a pair and z the other,

    loss = -log sigmoid(beta ((log p(y) - log p_ref(y)) - (log p(z) - log p_ref(z))))

log p is minus the sum of the head's losses with reduction="none". Its gradient gives each token a
weight of its own; logits are made again in the backward pass, a chunk at a time, and none for the
reference model, as nothing of it is differentiated. To run it:

    python examples/recipes/preference.py
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax

import sxe

B, T, D, K = 16, 24, 32, 300  # pairs, tokens, features, classes
BETA = 0.1
IGNORE = -100  # the label where the next token is the prompt's


def hidden_fn(params, tokens):
    """Stands for a language model: [B, T] to [B, T, D], from the mean of the tokens so far."""
    count = jnp.arange(1, 1 + tokens.shape[1])[:, None]
    x = jnp.cumsum(params["embedding"][tokens], axis=1) / count
    return jnp.tanh(x @ params["layer"])


def log_prob(params, tokens, labels):
    """log p of each sequence's answer, [B]."""
    hidden, kernel = hidden_fn(params, tokens), params["embedding"].T
    options = {"ignore_index": IGNORE, "reduction": "none"}
    return -jnp.sum(sxe.linear_softmax_cross_entropy(hidden, kernel, labels, **options), axis=-1)


def log_prob_from_logits(params, tokens, labels):
    log_q = jax.nn.log_softmax(hidden_fn(params, tokens) @ params["embedding"].T)
    log_q = jnp.take_along_axis(log_q, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(labels == IGNORE, 0, log_q), axis=-1)


def loss_fn(params, reference, chosen, rejected, log_prob=log_prob):
    """The mean loss, and the share of pairs whose chosen answer the policy has come to prefer."""
    margin = log_prob(params, *chosen) - log_prob(params, *rejected)
    margin -= log_prob(reference, *chosen) - log_prob(reference, *rejected)
    return -jnp.mean(jax.nn.log_sigmoid(BETA * margin)), jnp.mean(margin > 0)


def difference(tree, expected):
    """The largest difference, each relative to the largest magnitude of its array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def make_answer(key, prompts):
    """Random tokens behind the prompts, and as labels of the answer's positions the next token."""
    tokens = jax.random.randint(key, (B, T + 1), 0, K)
    answers = jnp.arange(T + 1) > jnp.arange(B)[:, None] % 8 + 2  # behind prompts of 3 to 10 tokens
    tokens = jnp.where(answers, tokens, prompts)
    return tokens[:, :-1], jnp.where(answers, tokens, IGNORE)[:, 1:]


def main():
    keys = jax.random.split(jax.random.key(0), 5)
    reference = {
        "embedding": jax.random.normal(keys[0], (K, D)),
        "layer": jax.random.normal(keys[1], (D, D)),
    }
    prompts = jax.random.randint(keys[2], (B, T + 1), 0, K)
    pairs = [make_answer(key, prompts) for key in keys[3:]]
    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))  # of the policy alone
    params, optimizer = reference, optax.adam(1e-3)
    opt_state = optimizer.init(params)

    (loss, _), _ = grad_fn(params, reference, *pairs)
    print(
        f"loss of the reference model: largest difference from log 2 {abs(loss - math.log(2)):.1e}"
    )
    for _ in range(20):
        (loss, preferred), grads = grad_fn(params, reference, *pairs)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
    print(f"loss after 20 steps: {loss:.4f}, chosen preferred in {preferred:.0%} of the pairs")

    from_logits = functools.partial(loss_fn, log_prob=log_prob_from_logits)
    expected = jax.jit(jax.value_and_grad(from_logits, has_aux=True))(params, reference, *pairs)
    error = difference(grad_fn(params, reference, *pairs), expected)
    print(f"loss and gradients: largest difference from log_softmax {error:.1e}")


if __name__ == "__main__":
    main()
