"""Tied embeddings in Flax Linen: one matrix is the embedding table and the kernel of the head.

The head is the final linear layer and the loss in one call. It takes hidden states and the
transpose of the embedding, and never stores the full logits [..., K]. The loss is a method of the
module; `__call__` returns logits for sampling. To run this script:

    python examples/recipes/tied_embedding_linen.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import sxe

K, D = 512, 32  # classes, hidden size


class Model(nn.Module):
    def setup(self):
        self.embed = nn.Embed(K, D)
        self.layer = nn.Dense(D)

    def hidden(self, tokens):
        """Hidden states [..., D] of tokens [...]."""
        return self.layer(self.embed(tokens))

    def __call__(self, tokens):
        """Logits [..., K], for sampling only."""
        return self.embed.attend(self.hidden(tokens))

    def loss(self, tokens, labels):
        hidden = self.hidden(tokens)
        return sxe.linear_softmax_cross_entropy(hidden, self.embed.embedding.T, labels)


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def main():
    model_key, label_key = jax.random.split(jax.random.key(0))
    tokens, labels = jnp.arange(K), jax.random.permutation(label_key, K)
    model = Model()
    variables = model.init(model_key, tokens)

    def loss_fn(variables):
        return model.apply(variables, tokens, labels, method="loss")

    def logits_loss_fn(variables):
        logits = model.apply(variables, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    result = jax.jit(jax.value_and_grad(loss_fn))(variables)
    expected = jax.jit(jax.value_and_grad(logits_loss_fn))(variables)
    error = difference(result, expected)
    print(f"loss and gradients: largest difference from logits {error:.1e}")
    print(f"loss before training: {result[0]:.2f}")

    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(variables)

    @jax.jit
    def step(variables, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(variables)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(variables, updates), opt_state, loss

    for _ in range(100):
        variables, opt_state, _ = step(variables, opt_state)
    print(f"loss after 100 steps: {loss_fn(variables):.2f}")


if __name__ == "__main__":
    main()
