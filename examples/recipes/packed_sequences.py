"""Documents of different lengths, packed into sequences of equal length.

Attention stays within a document, and positions start again at each document. The label of a
position is the next token of the same document. The last token of a document has no next token, so
its label is -100, and so is the label of padding. Value and gradient are then the same as for
separate documents.
To run this script:

    python examples/recipes/packed_sequences.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import sxe

D, K = 32, 300  # hidden size, classes
LENGTHS = (30, 23, 17, 9, 2, 1)  # of the documents; a document of one token has no label
ROW = 42  # tokens per packed sequence
IGNORE = -100


def pack(documents):
    """Tokens, document numbers (0 for padding) and positions, [rows, ROW], packed by first fit."""
    packed = np.zeros((3, len(documents), ROW), int)  # at most one row per document
    used = np.zeros(len(documents), int)
    for number, document in enumerate(documents, start=1):
        n = len(document)
        row = np.argmax(used + n <= ROW)
        packed[:, row, used[row] : used[row] + n] = document, np.full(n, number), np.arange(n)
        used[row] += n
    return packed[:, used > 0]


def next_token_labels(tokens, numbers):
    same = (numbers[:, :-1] == numbers[:, 1:]) & (numbers[:, 1:] > 0)
    labels = jnp.where(same, tokens[:, 1:], IGNORE)
    return jnp.pad(labels, ((0, 0), (0, 1)), constant_values=IGNORE)


def hidden_fn(params, tokens, numbers, positions):
    """One layer of attention: [B, T] to [B, T, D]."""
    x = params["embedding"][tokens] + params["position"][positions]
    query, key, value = (x[:, :, None] @ w for w in params["attention"])  # [B, T, 1 head, D]
    same = numbers[:, None, :, None] == numbers[:, None, None, :]
    y = jax.nn.dot_product_attention(query, key, value, mask=same, is_causal=True)
    return x + y[:, :, 0]


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def grad_fn(params, tokens, numbers, positions, labels):
    """The sum of the losses, the number of labels, and the gradient of the sum."""
    hidden, kernel = hidden_fn(params, tokens, numbers, positions), params["embedding"].T
    options = {"ignore_index": IGNORE, "reduction": "sum", "return_metrics": True}
    loss, metrics = sxe.linear_softmax_cross_entropy(hidden, kernel, labels, **options)
    return loss, metrics.weight_sum


def mean(*results):
    """The mean loss and its gradient over all results of grad_fn."""
    (loss, count), grads = jax.tree.map(lambda *leaves: sum(leaves), *results)
    return jax.tree.map(lambda total: total / count, (loss, grads))


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def main():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (K, D), "position": (ROW, D), "attention": (3, D, D)}
    params = {name: rng.normal(size=s).astype(np.float32) / 4 for name, s in shapes.items()}
    documents = [rng.integers(K, size=length) for length in LENGTHS]

    one_by_one = []
    for document in documents:
        tokens, ones = document[None], np.ones((1, len(document)), int)
        positions, labels = np.arange(len(document))[None], next_token_labels(tokens, ones)
        one_by_one.append(grad_fn(params, tokens, ones, positions, labels))
    expected = mean(*one_by_one)

    tokens, numbers, positions = pack(documents)
    labels = next_token_labels(tokens, numbers)
    packed = mean(grad_fn(params, tokens, numbers, positions, labels))
    print(f"{len(documents)} documents, {sum(LENGTHS)} tokens, in {len(tokens)} sequences of {ROW}")
    error = difference(packed, expected)
    print(f"loss and gradients: largest difference from documents one by one {error:.1e}")

    ones = np.ones_like(numbers)
    wrong = mean(grad_fn(params, tokens, numbers, positions, next_token_labels(tokens, ones)))
    print(f"labels across borders: gradients off by {difference(wrong[1], expected[1]):.1%}")
    wrong = mean(grad_fn(params, tokens, ones, positions, labels))
    print(f"attention across borders: gradients off by {difference(wrong[1], expected[1]):.1%}")


if __name__ == "__main__":
    main()
