"""The class of each row's largest logit, and the number of logits larger than the label's."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from sxe._arrays import AxisName, pmax, psum
from sxe._rows.targets import is_label, take_labels


class Ranking(NamedTuple):
    """The order of the logits of one tile of classes in each row, [...]. It has no gradient.

    Attributes:
      best: the class of the largest logit, int32, counted from the first class of the tile. Of
        equal logits, it is the first one.
      largest: the value of this logit.
      larger: the number of logits larger than the label's, int32, or None if not requested.
    """

    best: Array
    largest: Array
    larger: Array | None


def rank(x: Array, label: Array | None, axis_name: AxisName) -> Ranking:
    """The ranking of logits [..., K]. Labels [...] are counted from the tile's first class."""
    x = lax.stop_gradient(x)
    best = jnp.argmax(x, axis=-1).astype(jnp.int32)
    larger = None
    if label is not None:
        found, inside = (a[..., 0] for a in take_labels(x, label[..., None]))
        x_label = psum(jnp.where(inside, found, 0), axis_name)  # only one shard has the class
        # Exclude the label's own class, which might compare as larger than itself: XLA may
        # recompute the logits for the comparison and round them differently.
        is_larger = (x > x_label[..., None]) & ~is_label(label, x.shape[-1])
        larger = jnp.sum(is_larger, axis=-1, dtype=jnp.int32)
    return Ranking(best, jnp.max(x, axis=-1), larger)


def best_of_shards(
    ranking: Ranking, classes: int, axis_name: AxisName, class_mask: Array | None
) -> Array:
    """The class of each row's largest logit over all shards. Of equal logits, it is the first one.

    Each shard has ``classes`` classes. With a class mask [K], the result is a class that the mask
    allows, even if all logits are -inf.
    """
    # ``largest`` may be the result of a custom rule, so it needs stop_gradient.
    k, x = ranking.best, lax.stop_gradient(ranking.largest)
    if class_mask is not None:
        # ``lowest`` is finite if the mask allows a class of this shard, and -inf otherwise.
        first = jnp.argmax(class_mask).astype(k.dtype)
        is_one = jnp.max(class_mask.astype(jnp.int32)) > 0
        lowest = jnp.where(is_one, jnp.finfo(x.dtype).min, -jnp.inf)
        k, x = jnp.where(x == -jnp.inf, first, k), jnp.maximum(x, lowest)
    if axis_name is None:
        return k
    k = k + lax.axis_index(axis_name) * classes
    behind = x < pmax(x, axis_name)
    return lax.pmin(jnp.where(behind, jnp.iinfo(jnp.int32).max, k), axis_name)
