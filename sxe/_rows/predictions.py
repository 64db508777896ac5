"""The class of each row's largest logit, and how many logits are larger than the label's."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from sxe._arrays import AxisName, pmax, psum
from sxe._rows.targets import is_label, take_labels


class Ranking(NamedTuple):
    """How the logits of one tile of classes are ordered in each row, [...]. It has no gradient.

    Attributes:
      best: the class of the first of the largest logits, int32, counted from the tile's first.
      largest: their value.
      larger: how many logits are larger than the label's, int32, or None where nobody asks.
    """

    best: Array
    largest: Array
    larger: Array | None


def rank(x: Array, label: Array | None, axis_name: AxisName) -> Ranking:
    """The ranking of logits [..., K]. Labels [...] are counted from the first of these classes."""
    x = lax.stop_gradient(x)
    best = jnp.argmax(x, axis=-1).astype(jnp.int32)
    larger = None
    if label is not None:
        found, inside = (a[..., 0] for a in take_labels(x, label[..., None]))
        x_label = psum(jnp.where(inside, found, 0), axis_name)  # only one shard has the class
        # The label's own class is left out, because XLA may compute the logits again for the
        # comparison, from what the caller made them of, and round them in another way.
        is_larger = (x > x_label[..., None]) & ~is_label(label, x.shape[-1])
        larger = jnp.sum(is_larger, axis=-1, dtype=jnp.int32)
    return Ranking(best, jnp.max(x, axis=-1), larger)


def best_of_shards(
    ranking: Ranking, classes: int, axis_name: AxisName, class_mask: Array | None
) -> Array:
    """The class of the first of all shards' largest logits, where a shard has so many classes.

    The largest is one of the classes that can occur, by their mask [K], even if all are -inf.
    """
    k, x = ranking.best, lax.stop_gradient(ranking.largest)  # a custom rule's result
    if class_mask is not None:
        # Finite where a class of this shard can occur, and -inf where none can.
        first = jnp.argmax(class_mask).astype(k.dtype)
        is_one = jnp.max(class_mask.astype(jnp.int32)) > 0
        lowest = jnp.where(is_one, jnp.finfo(x.dtype).min, -jnp.inf)
        k, x = jnp.where(x == -jnp.inf, first, k), jnp.maximum(x, lowest)
    if axis_name is None:
        return k
    k = k + lax.axis_index(axis_name) * classes
    behind = x < pmax(x, axis_name)
    return lax.pmin(jnp.where(behind, jnp.iinfo(jnp.int32).max, k), axis_name)
