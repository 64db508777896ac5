"""Labels out of range as an error under ``checkify``, at no cost where nobody asks for it.

``checkify.debug_check`` by itself leaves an effect in every program that holds it, and a jitted
program with an effect is dispatched slowly and can't be serialised. So the check is the inner
program, ``call_jaxpr``, of a primitive that is the identity on the labels and has no effect. Of a
primitive that it does not know, checkify rewrites the inner program and binds it in its place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import checkify
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir


def checked(labels: Array, bad: Array, classes: int, ignore_index: int | None) -> Array:
    """The labels, where under ``checkify`` the first bad one raises an error."""
    check = functools.partial(_check, classes=classes, ignore_index=ignore_index)
    (labels,) = _checked_p.bind(labels, bad, call_jaxpr=jax.make_jaxpr(check)(labels, bad))
    return labels


def _check(labels: Array, bad: Array, classes: int, ignore_index: int | None) -> list[Array]:
    # Indices are reduced, not flattened: an array sharded along a later axis cannot be.
    row = jnp.zeros(bad.shape, jnp.int32)
    for axis in range(bad.ndim):
        row = row * bad.shape[axis] + lax.broadcasted_iota(jnp.int32, bad.shape, axis)
    last = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(bad, row, last), initial=last)
    position = jnp.unravel_index(first, bad.shape) if bad.size and bad.ndim else ()
    advice = "; pass ignore_index=-100 (or what marks such rows) to leave them out"
    checkify.debug_check(
        ~jnp.any(bad),
        "labels: expected class indices in [0, {classes}), got {label} at position {position}"
        + (advice if ignore_index is None else ""),
        classes=jnp.asarray(classes),
        label=jnp.sum(jnp.where(bad & (row == first), labels, 0), dtype=labels.dtype),
        position=jnp.stack(position) if position else jnp.zeros((0,), jnp.int32),
    )
    return [labels]


class _Checked(Primitive):
    multiple_results = True

    def bind(self, *args: Any, subfuns: tuple[Any, ...] = (), **params: Any) -> Any:
        if subfuns:  # from checkify: the rewritten inner program, with the error as an argument
            return subfuns[0].call_wrapped(*args)
        return super().bind(*args, **params)


_checked_p = _Checked("checked_labels")


def _identity(labels: Any, bad: Any, *, call_jaxpr: Any) -> list[Any]:
    return [labels]


def _lowering(ctx: Any, labels: Any, bad: Any, *, call_jaxpr: Any) -> list[Any]:
    return [labels]


def _batch(args: Any, axes: Any, *, call_jaxpr: Any) -> Any:
    size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
    args = [batching.bdim_at_front(x, a, size) for x, a in zip(args, axes, strict=True)]
    jaxpr = jax.make_jaxpr(jax.vmap(jaxpr_as_fun(call_jaxpr)))(*args)
    return _checked_p.bind(*args, call_jaxpr=jaxpr), [0]


_checked_p.def_impl(_identity)
_checked_p.def_abstract_eval(_identity)
mlir.register_lowering(_checked_p, _lowering)
batching.primitive_batchers[_checked_p] = _batch
