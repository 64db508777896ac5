"""Direct preference optimization (DPO, arXiv 2305.18290) from each token's loss, without logits.

Each pair has a preferred answer y and another answer z. log p(y) is the sum of the
log-probabilities of the tokens of y under the policy, and log p_ref(y) the sum under a frozen
reference. beta is a constant. The loss is

    loss = -log sigmoid(beta ((log p(y) - log p_ref(y)) - (log p(z) - log p_ref(z))))

log p is minus the sum of the losses of `linear_softmax_cross_entropy` with `reduction="none"`. The
gradient gives each token its own weight. The backward pass computes the logits again, one chunk at
a time, but not those of the reference model, because the reference model is not differentiated. To
run this script:

    python examples/recipes/preference.py
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax

import sxe

B, T, D, K = 16, 24, 32, 300  # pairs, tokens, hidden size, classes
BETA = 0.1
IGNORE = -100  # the label if the next token belongs to the prompt


def hidden_fn(params, tokens):
    """A stand-in for a language model: [B, T] to [B, T, D], from the mean of the tokens so far."""
    count = jnp.arange(1, 1 + tokens.shape[1])[:, None]
    x = jnp.cumsum(params["embedding"][tokens], axis=1) / count
    return jnp.tanh(x @ params["layer"])


def log_prob(params, tokens, labels):
    """log p of the answer in each sequence, [B]."""
    hidden, kernel = hidden_fn(params, tokens), params["embedding"].T
    options = {"ignore_index": IGNORE, "reduction": "none"}
    return -jnp.sum(sxe.linear_softmax_cross_entropy(hidden, kernel, labels, **options), axis=-1)


def log_prob_from_logits(params, tokens, labels):
    log_q = jax.nn.log_softmax(hidden_fn(params, tokens) @ params["embedding"].T)
    log_q = jnp.take_along_axis(log_q, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(labels == IGNORE, 0, log_q), axis=-1)


def loss_fn(params, reference, chosen, rejected, log_prob=log_prob):
    """The mean loss, and the share of pairs with a positive margin of the chosen answer."""
    margin = log_prob(params, *chosen) - log_prob(params, *rejected)
    margin -= log_prob(reference, *chosen) - log_prob(reference, *rejected)
    return -jnp.mean(jax.nn.log_sigmoid(BETA * margin)), jnp.mean(margin > 0)


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def make_answer(key, prompts):
    """Prompts with random answers as tokens, and the next tokens as labels (IGNORE in prompts)."""
    tokens = jax.random.randint(key, (B, T + 1), 0, K)
    answers = jnp.arange(T + 1) > jnp.arange(B)[:, None] % 8 + 2  # after prompts of 3 to 10 tokens
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
    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))  # gradient for params only
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
    print(f"loss after 20 steps: {loss:.4f}, chosen answer preferred in {preferred:.0%} of pairs")

    from_logits = functools.partial(loss_fn, log_prob=log_prob_from_logits)
    expected = jax.jit(jax.value_and_grad(from_logits, has_aux=True))(params, reference, *pairs)
    error = difference(grad_fn(params, reference, *pairs), expected)
    print(f"loss and gradients: largest difference from log_softmax {error:.1e}")


if __name__ == "__main__":
    main()
