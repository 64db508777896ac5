"""The axes that a caller names: class axes of logits, mesh axes, and axes of ``jax.vmap``."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from sxe._arrays import AxisName, axis_names, is_dense, is_tracked, psum, sharding, varying
from sxe._errors import ArgumentValueError


def class_axes(axis: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The class axes as non-negative ints, in the given order."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ArgumentValueError(
                "axis",
                f"expected axes in [{-ndim}, {ndim}) for logits with {ndim} dimensions, "
                f"got {axis!r}",
            )
    normalized = tuple(a % ndim for a in axes)
    if not axes or len(set(normalized)) != len(axes):
        raise ArgumentValueError(
            "axis",
            f"expected one axis or several different ones, got {axis!r} for logits with "
            f"{ndim} dimensions",
        )
    return normalized


def classes_last(x: Array, axes: tuple[int, ...]) -> Array:
    """x with its class axes moved to the end and flattened into one, [..., K]."""
    if axes != (x.ndim - 1,):
        x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    if len(axes) > 1:
        n = x.ndim - len(axes)
        x = x.reshape(*x.shape[:n], math.prod(x.shape[n:]))
    return x


def classes_back(x: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The inverse of ``classes_last``, for an x that had that shape."""
    x = x.reshape(*x.shape[:-1], *(shape[a] for a in axes))
    return jnp.moveaxis(x, range(-len(axes), 0), axes)


def vmap_axes(axis_name: AxisName) -> tuple[str, ...]:
    """The names in ``axis_name`` that belong to a ``jax.vmap``, not to a mesh."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in axis_names(axis_name) if name not in manual)


def sum_over(x: Array, axis_name: AxisName) -> Array:
    """The sum of x over the devices of mesh axes, or over the examples of a ``jax.vmap``."""
    mapped = vmap_axes(axis_name)
    for name in mapped:  # on an Explicit mesh, JAX can't lower lax.psum over an axis of a vmap
        x = jnp.sum(lax.all_gather(x, name))
    return psum(x, tuple(name for name in axis_names(axis_name) if name not in mapped) or None)


def is_explicit(*arrays: Array | None) -> bool:
    """Whether any of these arrays is on an Explicit mesh, where types describe the sharding."""
    meshes = [jax.typeof(a).sharding.mesh for a in arrays if a is not None]
    return any(mesh.explicit_axes for mesh in meshes)


def _in_shard_map(mesh: Any, look: Callable[[], Iterable[str]]) -> frozenset[str]:
    """The result of look() in a ``jax.shard_map`` over all mesh axes that can be manual here."""
    found: list[str] = []

    def traced() -> tuple[()]:
        found.extend(look())
        return ()

    jax.eval_shape(jax.shard_map(traced, mesh=mesh, in_specs=(), out_specs=()))
    return frozenset(found)


def free_axes(mesh: Any) -> frozenset[str]:
    """The mesh axes that do not shard an axis that an enclosing ``jax.vmap`` maps.

    Inside of the vmap, types do not name the other axes, and ``jax.shard_map`` cannot use them.
    """
    return _in_shard_map(mesh, lambda: jax.sharding.get_abstract_mesh().manual_axes)


def spmd_axes(mesh: Any) -> frozenset[str]:
    """The mesh axes that an enclosing ``jax.vmap`` names in spmd_axis_name.

    An array that does not depend on the mapped arguments has to be repeated by vmap. The repeated
    array varies over the axes that any enclosing vmap names. So make such an array here.
    """
    return _in_shard_map(mesh, lambda: varying(jax.vmap(lambda: jnp.zeros(()), axis_size=1)()))


def is_mapped_split(x: Array) -> bool:
    """Whether an enclosing ``jax.vmap`` maps an axis that is sharded over x's Explicit mesh."""
    mesh = jax.typeof(x).sharding.mesh
    return bool(mesh.explicit_axes) and not free_axes(mesh).issuperset(mesh.explicit_axes)


def mapped_as(x: Array, label: Array | None) -> Array:
    """x [..., F], mapped by each ``jax.vmap`` that maps a sharded axis of the labels [..., M].

    JAX has no rule to gather from an x that is not mapped, with labels that are mapped.
    """
    if label is None or not is_mapped_split(label):
        return x
    return x + jnp.sum(0 * label, axis=-1, keepdims=True).astype(x.dtype)


def check_mapped(**arrays: Array | None) -> None:
    """Raises if a mesh axis shards both an array here and an axis that an enclosing vmap maps."""
    for name, a in arrays.items():
        if a is None or not any(sharding(a)):
            continue
        free = free_axes(jax.typeof(a).sharding.mesh)
        taken = {n for axes in sharding(a) for n in axis_names(axes) if n not in free}
        if taken:
            left = (tuple(n for n in axis_names(axes) if n in free) for axes in sharding(a))
            spec = PartitionSpec(*(axes or None for axes in left))
            raise ArgumentValueError(
                name,
                f"expected to be sharded over other mesh axes than {sorted(taken)}, which shard "
                f"the axis that an enclosing jax.vmap maps, got {jax.typeof(a)}; use "
                f"jax.reshard({name}, {spec}), or map {name} as well",
            )


def check_splits(
    name_of_x: str, split: Sequence[Any], class_axes: Sequence[int], **arrays: Array | None
) -> None:
    """Raises if an Explicit mesh shards these arrays differently from x, or from one another.

    ``split`` is the sharding of the axes of the logits. Class weights and a class mask are sharded
    like the first class axis. An array with as many axes as the logits is sharded like the logits,
    and any other array like the rows. Several labels per row and their weights have one more axis,
    which must not be sharded.
    """
    every = range(len(split))
    rows = [i for i in every if i not in class_axes]
    found = [(axes, name_of_x) for axes in split]
    for name, a in arrays.items():
        if a is None:
            continue
        is_index = name == "label_weights" or (name == "labels" and not is_dense(a))
        own = class_axes[:1] if name in ("class_weights", "class_mask") else rows
        if a.ndim == len(split) and not is_index:
            own = every
        if any(sharding(a)[len(own) :]):
            spec = PartitionSpec(*sharding(a)[: len(own)])
            raise ArgumentValueError(
                name,
                "expected the axis of several labels per row not to be sharded, got "
                f"{jax.typeof(a)}; use jax.reshard({name}, {spec})",
            )
        for i, axes in zip(own, sharding(a)[: len(own)], strict=True):
            expected, source = found[i]
            others = {n for k in every if k != i for n in axis_names(found[k][0])}
            if axes in (None, expected):
                continue
            if expected is None and not others & set(axis_names(axes)):
                found[i] = axes, name
                continue
            spec = PartitionSpec(*(found[k][0] for k in own))
            raise ArgumentValueError(
                name,
                f"expected to be sharded as {source}, {spec}, or unsharded, got "
                f"{PartitionSpec(*sharding(a))} ({jax.typeof(a)}); use jax.reshard({name}, {spec})",
            )


def mapped_axes(axis_name: AxisName) -> tuple[str, ...]:
    """The axes in ``axis_name`` if all belong to a ``jax.vmap``; () if all belong to a mesh."""
    mapped = vmap_axes(axis_name)
    if mapped and mapped != axis_names(axis_name):
        raise ArgumentValueError(
            "axis_name",
            "expected axes of jax.shard_map only, or of jax.vmap only, got "
            f"{axis_name!r}, of which jax.vmap has {mapped}; shard the classes over one kind",
        )
    return mapped


def whole(x: Array, names: tuple[str, ...], axis: int) -> Array:
    """x with its shards along these axes of a ``jax.vmap`` concatenated along ``axis``."""
    for name in reversed(names):
        x = lax.all_gather(x, name, axis=axis, tiled=True)
    return x


def shard_of(x: Array, axis_name: AxisName, axis: int) -> Array:
    """This example's shard of x, which ``whole`` has concatenated along ``axis``."""
    shards = math.prod(lax.axis_size(name) for name in axis_names(axis_name))
    x = x.reshape(*x.shape[:axis], shards, -1, *x.shape[axis + 1 :])
    # Compare instead of slicing: a slice has no rule for an index that an Explicit mesh shards.
    shard = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.sum(jnp.where(shard == lax.axis_index(axis_names(axis_name)), x, 0), axis=axis)


def check_axis_name(argument: str, axis_name: AxisName, name_of_x: str, x: Array) -> None:
    """Raises unless each axis is a mesh axis that shards x, or belongs to an enclosing vmap."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for name in axis_names(axis_name):
        try:
            lax.axis_size(name)
        except NameError:
            raise ArgumentValueError(
                argument,
                f"expected a mesh axis of an enclosing jax.shard_map, got {name!r}; "
                "for global arrays use sxe.over_mesh",
            ) from None
        if vmap_axes(name) and any(map(is_tracked, manual)):
            raise ArgumentValueError(
                argument,
                f"expected a mesh axis of the enclosing jax.shard_map, got {name!r} of "
                "a jax.vmap: JAX cannot compute lax.psum over it inside of jax.shard_map with "
                "check_vma=True; pass check_vma=False to jax.shard_map",
            )
        if is_tracked(name) and name not in varying(x):
            raise ArgumentValueError(
                argument,
                f"expected a mesh axis that shards {name_of_x}, got {name!r}, over which this "
                f"array is replicated ({jax.typeof(x)}); shard it in in_specs, or omit the axis",
            )
