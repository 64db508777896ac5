"""Tied embeddings in Flax NNX: one matrix is the embedding table and the kernel of the head.

The head is the final linear layer and the loss in one call. It takes hidden states and the
transpose of the embedding, and never stores the full logits [..., K]. To run this script:

    python examples/recipes/tied_embedding_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sxe

K, D = 512, 32  # classes, hidden size


class Model(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(K, D, rngs=rngs)
        self.layer = nnx.Linear(D, D, rngs=rngs)

    def hidden(self, tokens):
        """Hidden states [..., D] of tokens [...]."""
        return self.layer(self.embed(tokens))

    def __call__(self, tokens):
        """Logits [..., K], for sampling only."""
        return self.embed.attend(self.hidden(tokens))


def loss_fn(model, tokens, labels):
    kernel = model.embed.embedding[...].T
    return sxe.linear_softmax_cross_entropy(model.hidden(tokens), kernel, labels)


def logits_loss_fn(model, tokens, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens), labels).mean()


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def main():
    tokens, labels = jnp.arange(K), jax.random.permutation(jax.random.key(0), K)
    model = Model(rngs=nnx.Rngs(0))

    result = nnx.jit(nnx.value_and_grad(loss_fn))(model, tokens, labels)
    expected = nnx.jit(nnx.value_and_grad(logits_loss_fn))(model, tokens, labels)
    error = difference(result, expected)
    print(f"loss and gradients: largest difference from logits {error:.1e}")
    print(f"loss before training: {result[0]:.2f}")

    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model, tokens, labels)
        optimizer.update(model, grads)
        return loss

    for _ in range(100):
        step(model, optimizer)
    print(f"loss after 100 steps: {loss_fn(model, tokens, labels):.2f}")


if __name__ == "__main__":
    main()
