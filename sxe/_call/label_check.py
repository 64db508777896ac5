"""Check the range of labels under ``checkify``, with no computation in other programs.

``checkify.debug_check`` itself leaves an effect in every program that contains it. A jitted
program with an effect is dispatched slowly and cannot be serialized. Therefore the check is the
inner program, ``call_jaxpr``, of a primitive that is the identity on the labels and has no
effect. checkify rewrites the inner program of a primitive that it does not know, and binds it in
place of the primitive.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import checkify, jet
from jax.interpreters import batching

from sxe._primitives import CallPrimitive


def checked(labels: Array, bad: Array, classes: int, advice: str) -> Array:
    """The labels. Under ``checkify``, the first bad one raises an error with this advice."""
    (labels,) = _bind(labels, bad, classes=classes, advice=advice, mapped=())
    return labels


def _bind(
    labels: Array,
    bad: Array,
    *,
    classes: int,
    advice: str,
    mapped: tuple[tuple[int | None, int | None], ...],
) -> Any:
    """Bind the primitive.

    ``mapped`` has the axes of labels and bad that each ``jax.vmap`` maps, the innermost vmap first.
    The inner program moves these axes to the front, so that the outer program neither moves nor
    repeats labels.
    """

    def check(labels: Array, bad: Array) -> list[Array]:
        _check(
            _mapped_first(labels, [of_labels for of_labels, _ in mapped]),
            _mapped_first(bad, [of_bad for _, of_bad in mapped]),
            classes,
            advice,
            vmaps=len(mapped),
        )
        return [labels]

    return _checked_p.bind(
        labels,
        bad,
        call_jaxpr=jax.make_jaxpr(check)(labels, bad),
        classes=classes,
        advice=advice,
        mapped=mapped,
    )


def _mapped_first(x: Array, mapped: Sequence[int | None]) -> Array:
    """x with its mapped axes in front, the outermost vmap's first; size 1 for None."""
    for to, axis in enumerate(reversed(mapped)):
        x = jnp.expand_dims(x, to) if axis is None else jnp.moveaxis(x, to + axis, to)
    return x


def _check(labels: Array, bad: Array, classes: int, advice: str, *, vmaps: int) -> None:
    """labels and bad are [..., N]. The leading axes belong to vmaps, and may have size 1."""
    shape = jnp.broadcast_shapes(labels.shape, bad.shape)
    # Reduce over indices: an array that is sharded along a later axis cannot be flattened.
    row = jnp.zeros(shape, jnp.int32)
    for axis in range(len(shape)):
        row = row * shape[axis] + lax.broadcasted_iota(jnp.int32, shape, axis)
    last = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(bad, row, last), initial=last)
    found = jnp.unravel_index(first, shape) if math.prod(shape) and shape else ()
    index = jnp.stack(found) if found else jnp.zeros((len(shape),), jnp.int32)
    message = "labels: expected class indices in [0, {classes}), got {label} at position {position}"
    if vmaps:
        message += ", index {example} of jax.vmap"
    checkify.debug_check(
        ~jnp.any(bad),
        message + advice,
        classes=jnp.asarray(classes),
        label=jnp.sum(jnp.where(bad & (row == first), labels, 0), dtype=labels.dtype),
        position=index[vmaps:],
        example=index[:vmaps],
    )


class _Checked(CallPrimitive):
    def run(self, *inputs: Any, **params: Any) -> list[Any]:
        labels, _ = inputs
        return [labels]


_checked_p = _Checked("checked_labels")


def _batch(args: Any, axes: Any, *, call_jaxpr: Any, mapped: Any, **params: Any) -> Any:
    return _bind(*args, mapped=(*mapped, tuple(axes)), **params), [axes[0]]


def _jet(primals_in: Any, series_in: Any, **params: Any) -> Any:
    return _checked_p.bind(*primals_in, **params), [series_in[0]]


batching.primitive_batchers[_checked_p] = _batch
jet.jet_rules[_checked_p] = _jet
