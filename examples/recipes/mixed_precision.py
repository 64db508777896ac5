"""Mixed precision in float16, with dynamic loss scaling.

The optimizer's weights are float32, and the model computes with float16 copies of them. float16
rounds small gradients to 0. So the loss is multiplied by a scale, and the gradients are divided by
the scale once they are float32. `flax.training.dynamic_scale` does both. If the gradients of a step
are not finite, it halves the scale. Such a step must not change the weights or the optimizer state.
After a number of finite steps, `dynamic_scale` doubles the scale. sxe's loss is float32 for float16
inputs, so the loss times the scale does not overflow. To run this script:

    python examples/recipes/mixed_precision.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale

import sxe

N, D, K = 2048, 64, 500  # rows, hidden size, classes
optimizer = optax.adam(3e-3)


def loss_fn(params, x, labels, dtype=jnp.float16):
    params = jax.tree.map(lambda w: w.astype(dtype), params)  # the gradients become float32 again
    hidden = jax.nn.gelu(x.astype(dtype) @ params["layer"])
    return sxe.linear_softmax_cross_entropy(hidden, params["kernel"], labels)


@jax.jit
def step(params, opt_state, scale, x, labels):
    scale, finite, loss, grads = scale.value_and_grad(loss_fn)(params, x, labels)
    updates, new_opt_state = optimizer.update(grads, opt_state, params)
    new = optax.apply_updates(params, updates), new_opt_state
    keep_finite = functools.partial(jnp.where, finite)
    params, opt_state = jax.tree.map(keep_finite, new, (params, opt_state))
    return params, opt_state, scale, loss, finite


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (N, D))
    labels = jnp.argmax(x @ jax.random.normal(keys[1], (D, K)), axis=-1)
    layer, kernel = jax.random.normal(keys[2], (D, D)), jax.random.normal(keys[3], (D, K))
    params = {"layer": layer / D**0.5, "kernel": kernel / D**0.5}
    opt_state = optimizer.init(params)

    # Start with a scale that is too large, and a short interval, so that the scale falls and rises.
    scale = DynamicScale(scale=2.0**32, growth_interval=50)
    before, skipped = (params, opt_state), 0
    exact = loss_fn(params, x, labels, jnp.float32)
    *after, _, loss, finite = step(*before, scale, x, labels)
    change = np.max(np.abs(flat(after) - flat(before)))
    print(f"step 1: loss {loss:.4f}, {exact:.4f} in float32")
    print(f"step 1: gradients finite: {finite}")
    print(f"step 1: weights and optimizer, largest difference from before {change:.1e}")
    for _ in range(300):
        params, opt_state, scale, loss, finite = step(params, opt_state, scale, x, labels)
        skipped += not finite
    print(f"steps skipped: {skipped} of 300, final scale: 2^{np.log2(scale.scale):.0f}")
    print(f"loss of step 300: {loss:.4f}")

    exact = flat(jax.grad(loss_fn)(params, x, labels, jnp.float32))
    plain = flat(jax.grad(loss_fn)(params, x, labels))
    scaled = flat(DynamicScale().value_and_grad(loss_fn)(params, x, labels).grad)
    for name, grads in (("without scale", plain), ("with scale 2^16", scaled)):
        error = np.linalg.norm(grads - exact) / np.linalg.norm(exact)
        print(f"gradient {name}: {np.mean(grads == 0):.1%} zeros, relative error {error:.1e}")


if __name__ == "__main__":
    main()
