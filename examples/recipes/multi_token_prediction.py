"""Multi-token prediction: the next n tokens at each position, in one call.

The model has n hidden states per position, [n, B, T, D], and one kernel for all of them (arXiv
2404.19737; DeepSeek-V3, arXiv 2412.19437). The label at depth d is the d-th token ahead:

    loss = sum_d c_d mean_bt loss_dbt           c_1 = 1, and a smaller c for tokens further ahead

Each mean is over the positions that have a d-th token ahead. With the weights c_d / (number of
these positions), the loss is one sum over all rows. One call holds the logits of one chunk of rows
at a time and accumulates one gradient of the kernel. With one call per depth, there is one gradient
of the kernel per depth. To run this script:

    python examples/recipes/multi_token_prediction.py
"""

import functools

import jax
import jax.numpy as jnp
import optax

import sxe

B, T, D, K = 8, 32, 64, 500  # sequences, tokens, hidden size, classes
LENGTHS = (32, 32, 30, 25, 17, 9, 3, 1)  # of the sequences; the rest is padding
C = (1.0, 0.3, 0.3, 0.3)  # c_1 to c_n
IGNORE = -100


def labels_ahead(tokens, lengths):
    """The tokens 1 to n ahead, [n, B, T]; IGNORE if the sequence ends before the token."""
    labels = []
    for ahead in range(1, len(C) + 1):
        is_there = jnp.arange(tokens.shape[1]) + ahead < lengths[:, None]
        labels.append(jnp.where(is_there, jnp.roll(tokens, -ahead, axis=1), IGNORE))
    return jnp.stack(labels)


def hidden_fn(params, tokens):
    """A stand-in for a language model with one layer per depth: [B, T] to [n, B, T, D]."""
    count = jnp.arange(1, 1 + tokens.shape[1])[:, None]
    x = jnp.cumsum(params["embedding"][tokens], axis=1) / count
    return jnp.tanh(jnp.einsum("btd,nde->nbte", x, params["layers"]))


def loss_fn(hidden, kernel, tokens, lengths):
    labels = labels_ahead(tokens, lengths)
    counts = jnp.sum(labels != IGNORE, axis=(1, 2), keepdims=True)
    weights = jnp.array(C)[:, None, None] / jnp.maximum(counts, 1)  # [n, 1, 1]
    options = {
        "weights": jnp.broadcast_to(weights, labels.shape),
        "ignore_index": IGNORE,
        "reduction": "sum",
    }
    return sxe.linear_softmax_cross_entropy(hidden, kernel, labels, **options)


def loss_by_depth_fn(hidden, kernel, tokens, lengths):
    """The same loss with one call per depth."""
    head = functools.partial(sxe.linear_softmax_cross_entropy, ignore_index=IGNORE)
    depths = zip(C, hidden, labels_ahead(tokens, lengths), strict=True)
    return sum(c * head(hidden_d, kernel, labels_d) for c, hidden_d, labels_d in depths)


def logits_loss_fn(hidden, kernel, tokens, lengths):
    """The plain implementation: for each depth d, the logits of all positions but the last d."""
    loss = 0.0
    for ahead, (c, hidden_d) in enumerate(zip(C, hidden, strict=True), start=1):
        logits, labels = hidden_d[:, :-ahead] @ kernel, tokens[:, ahead:]
        where = jnp.arange(ahead, tokens.shape[1]) < lengths[:, None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        loss += c * jnp.sum(losses * where) / jnp.sum(where)
    return loss


def difference(tree, expected):
    """The largest difference over all arrays, relative to the largest magnitude in each array."""
    ratio = jax.tree.map(lambda x, y: jnp.max(abs(x - y)) / jnp.max(abs(y)), tree, expected)
    return max(jax.tree.leaves(ratio))


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embedding": jax.random.normal(keys[0], (K, D)) / D**0.5,
        "layers": jax.random.normal(keys[1], (len(C), D, D)),
    }
    tokens = jax.random.randint(keys[2], (B, T), 0, K)
    lengths = jnp.array(LENGTHS)
    inputs = hidden_fn(params, tokens), params["embedding"].T, tokens, lengths
    labels = labels_ahead(tokens, lengths)
    print(f"labels per depth: {jnp.sum(labels != IGNORE, axis=(1, 2)).tolist()}")

    def grad_fn(loss_fn):
        return jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1)))

    expected = grad_fn(logits_loss_fn)(*inputs)
    for name, f in (("one call", loss_fn), ("one call per depth", loss_by_depth_fn)):
        error = difference(grad_fn(f)(*inputs), expected)
        print(f"{name}: loss and gradients, largest difference from logits {error:.1e}")

    # Compile, but do not run, the last layer of a small language model.
    hidden = jax.ShapeDtypeStruct((len(C), 4, 256, 512), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((512, 32_000), jnp.bfloat16)
    tokens, lengths = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((4, 256), (4,)))
    temporaries = [
        grad_fn(f)
        .lower(hidden, kernel, tokens, lengths)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for f in (loss_fn, loss_by_depth_fn, logits_loss_fn)
    ]
    one, each, logits = (f"{size / 2**20:,.0f} MiB" for size in temporaries)
    print(f"temporaries: {one} with one call, {each} with one call per depth, {logits} with logits")


if __name__ == "__main__":
    main()
