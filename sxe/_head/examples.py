"""The rule of ``jax.vmap`` for the head: the rows of all examples become rows of one call.

JAX's own rule would hold the logits of a chunk of every example at the same time. It would also
compute a gradient of the kernel for each example, [B, D, K], and then add them up. One call has the
logits of one chunk and one gradient of the kernel, however many examples there are.

This applies to the gradient of a vmap, where the map comes before the differentiation. In a vmap of
a gradient, JAX differentiates first, and each example has its own gradient.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import batching

from sxe._arrays import sharding
from sxe._head.chunk import Head, Shared
from sxe._head.chunked import HiddenRows, Outcome, outcome_of
from sxe._head.path import AGAIN
from sxe._primitives import TransparentCall
from sxe._rows.targets import Rows


def outcome_of_examples(head: Head, shared: Shared, hidden: HiddenRows, rows: Rows) -> Outcome:
    """``outcome_of`` as a primitive, for which ``jax.vmap`` makes one call with more rows."""
    if head.rule == "autodiff":  # for jax.experimental.jet, which supports only JAX's primitives
        return outcome_of(head, shared, hidden, rows)
    inputs = shared, hidden, rows
    of_head = functools.partial(outcome_of, head)
    return _head_p.of(of_head, *inputs, head=head, tree=jax.tree.structure(inputs))


def _batch(inputs: Any, axes: Any, *, head: Head, tree: Any, **params: Any) -> tuple[Any, Any]:
    if not _are_rows_of_one_call(inputs, axes, tree):
        return _head_p.batch(inputs, axes, **params)
    size = next(x.shape[axis] for x, axis in zip(inputs, axes, strict=True) if axis is not None)

    def first(x: Array, axis: int | None) -> Array:
        """x with the mapped axis first: [B, N, ...]."""
        if axis is None:
            return jnp.broadcast_to(x, (size, *x.shape))
        return jnp.moveaxis(x, axis, 0)

    shared, *_ = jax.tree.unflatten(tree, inputs)
    _, *of_rows = jax.tree.unflatten(tree, map(first, inputs, axes))
    length = of_rows[1].weight.shape[1]
    hidden, rows = jax.tree.map(lambda x: x.reshape(size * length, *x.shape[2:]), of_rows)
    # The weight of each example is unknown in the forward pass, so it can't compute the gradients.
    outcome = outcome_of_examples(dataclasses.replace(head, path=AGAIN), shared, hidden, rows)
    value = None
    if head.path != AGAIN:
        value = head.f.weigh(outcome.results, rows.weight, shared.z_loss).value
        value = jnp.sum(value.reshape(size, length), axis=1)
    results, ranking = jax.tree.map(
        lambda x: x.reshape(size, length, *x.shape[1:]), (outcome.results, outcome.ranking)
    )
    outputs = jax.tree.leaves(Outcome(value, results, ranking))
    return outputs, [0] * len(outputs)


def _are_rows_of_one_call(inputs: Any, axes: Any, tree: Any) -> bool:
    """Whether a vmap along these axes can become one call. An axis of None is not mapped.

    The examples must share the kernel and its options. Shared hidden states are better multiplied
    once, and shared dense targets would be repeated.
    """
    shared, hidden, rows = jax.tree.unflatten(tree, [axis is not None for axis in axes])
    dense = None if rows.targets is None else rows.targets.dense
    is_split = any(
        axis is not None and sharding(x)[axis] is not None
        for x, axis in zip(inputs, axes, strict=True)
    )
    return (
        all(of_rows.states for of_rows in hidden)
        and not any(jax.tree.leaves(shared))
        and (dense is None or dense.t)
        and not is_split  # chunks of rows can't be taken along axes of an Explicit mesh
    )


_head_p = TransparentCall("head")
batching.primitive_batchers[_head_p] = _batch
