"""The class of each row's largest logit."""

import jax.numpy as jnp
from jax import Array, lax

from sxe._arrays import AxisName, pmax

Best = tuple[Array, Array]  # the first of a tile's largest logits, [...]: its class, its value


def best(x: Array) -> Best:
    """Of logits [..., K]."""
    return jnp.argmax(x, axis=-1).astype(jnp.int32), lax.stop_gradient(jnp.max(x, axis=-1))


def first_of(best: Best, classes: int, axis_name: AxisName) -> Array:
    """The class of the first of all shards' largest logits, where a shard has so many classes."""
    k, x = best
    if axis_name is None:
        return k
    k = k + lax.axis_index(axis_name) * classes
    x = lax.stop_gradient(x)  # a custom rule's result
    behind = x < pmax(x, axis_name)
    return lax.pmin(jnp.where(behind, jnp.iinfo(jnp.int32).max, k), axis_name)
