"""Tied embeddings in Equinox: one matrix is the embedding table and the kernel of the head.

The head is the final linear layer and the loss in one call. It takes hidden states and the
transpose of the embedding, and never stores the full logits [..., K]. The embedding is one leaf of
the model that is used twice. Its gradient is the sum of the gradients of both uses, so
`eqx.nn.Shared` is not needed. To run this script:

    python examples/recipes/tied_embedding_equinox.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import sxe

K, D = 512, 32  # classes, hidden size


class Model(eqx.Module):
    embedding: eqx.nn.Embedding
    layer: eqx.nn.Linear

    def __init__(self, key):
        embedding_key, layer_key = jax.random.split(key)
        self.embedding = eqx.nn.Embedding(weight=jax.random.normal(embedding_key, (K, D)) / D**0.5)
        self.layer = eqx.nn.Linear(D, D, key=layer_key)

    def hidden(self, tokens):
        """Hidden states [N, D] of tokens [N]."""
        x = jax.vmap(self.embedding)(tokens)
        return jax.vmap(self.layer)(x)

    def logits(self, tokens):
        """Logits [N, K], for sampling only."""
        return self.hidden(tokens) @ self.embedding.weight.T


def loss_fn(model, tokens, labels):
    return sxe.linear_softmax_cross_entropy(model.hidden(tokens), model.embedding.weight.T, labels)


def logits_loss_fn(model, tokens, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model.logits(tokens), labels).mean()


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def main():
    model_key, label_key = jax.random.split(jax.random.key(0))
    tokens, labels = jnp.arange(K), jax.random.permutation(label_key, K)
    model = Model(model_key)

    result = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn))(model, tokens, labels)
    expected = eqx.filter_jit(eqx.filter_value_and_grad(logits_loss_fn))(model, tokens, labels)
    error = difference(result, expected)
    print(f"loss and gradients: largest difference from logits {error:.1e}")
    print(f"loss before training: {result[0]:.2f}")

    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, opt_state):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, tokens, labels)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, loss

    for _ in range(100):
        model, opt_state, _ = step(model, opt_state)
    print(f"loss after 100 steps: {loss_fn(model, tokens, labels):.2f}")


if __name__ == "__main__":
    main()
