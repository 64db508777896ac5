"""What arrays are typed as: their dtype, how a mesh splits them, and along which axes they vary."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.export import is_symbolic_dim
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from sxe._errors import ArgumentValueError

AxisName = str | tuple[str, ...] | None
SplitAxes = tuple[AxisName, ...]  # the mesh axes that split each axis of an array
T = TypeVar("T")


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that the losses compute in: float64 stays, and every other one is float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def wide(x: Array) -> Array:
    return x.astype(wide_dtype(x.dtype))


def is_dense(labels: Array) -> bool:
    """Whether these are targets for all classes, and not class indices."""
    return bool(jnp.issubdtype(labels.dtype, jnp.floating))


def are_known(*sizes: int) -> bool:
    """Whether these are numbers, and none is a symbol of a program that is exported."""
    return not any(is_symbolic_dim(size) for size in sizes)


def keep(mask: Array | None, x: Array) -> Array:
    """x [...] or [..., F], with zeros where a mask of rows [...] is False, whatever it holds."""
    if mask is None:
        return x
    return jnp.where(mask if x.ndim == mask.ndim else mask[..., None], x, 0)


@jax.custom_jvp
def keep_tangent(mask: Array, x: Array) -> Array:
    """x, with zeros in its tangents and cotangents where a mask of rows is False."""
    # Not x itself: where a vmap maps the mask alone, JAX takes the shape of the result from here,
    # and that of its tangents from below. XLA drops the select.
    return jnp.where(mask if x.ndim == mask.ndim else mask[..., None], x, x)


@keep_tangent.defjvp
def _keep_tangent_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (mask, x), (_, x_dot) = primals, tangents
    return keep_tangent(mask, x), keep(mask, x_dot)


def jvp_of_moved(
    f: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """``jax.jvp``, only by those arrays whose tangents are no symbolic zeros."""
    leaves, tree = jax.tree.flatten(primals)
    dots = jax.tree.leaves(tangents)
    moved = [i for i, dot in enumerate(dots) if not isinstance(dot, SymbolicZero)]

    def of_moved(*some: Array) -> Any:
        given = dict(enumerate(leaves)) | dict(zip(moved, some, strict=True))
        return f(*jax.tree.unflatten(tree, given.values()))

    return jax.jvp(of_moved, [leaves[i] for i in moved], [dots[i] for i in moved])


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    return () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)


def psum(x: T, axis_name: AxisName) -> T:
    return x if axis_name is None else lax.psum(x, axis_name)


def pmax(x: Array, axis_name: AxisName) -> Array:
    return x if axis_name is None else lax.pmax(x, axis_name)


def varying(x: Array) -> frozenset[str]:
    """The mesh axes along which x differs between devices, as the types in shard_map say."""
    return jax.typeof(x).manual_axis_type.varying


def vary(x: Array, names: frozenset[str]) -> Array:
    """x typed as varying along these mesh axes too, so that its cotangent may vary as well."""
    missing = tuple(sorted(names - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(arrays: T, x: Array) -> T:
    """Arrays [...] typed as varying as x [..., K] does, before they are broadcast against it.

    The transpose of that cast is a sum over devices. After the broadcast it would be a sum of
    arrays [..., K].
    """
    return jax.tree.map(lambda a: vary(a, varying(x)), arrays)


def is_tracked(axis_name: AxisName) -> bool:
    """Whether shard_map tracks what varies along these mesh axes, that is, has check_vma on."""
    return all(name in varying(lax.axis_index(name)) for name in axis_names(axis_name))


# Without that tracking, JAX gives each device a share of the cotangent of a result that all devices
# have, and adds up the cotangents that devices give for an argument that all of them have.


def sum_of_shares(g: T, axis_name: AxisName) -> T:
    """The cotangent of a result that all shards of the classes have."""
    return g if is_tracked(axis_name) else psum(g, axis_name)


def equal_shares(d: T, axis_name: AxisName) -> T:
    """What each shard gives of the cotangent of an argument that all shards have."""
    return d if is_tracked(axis_name) else jax.tree.map(lambda a: a / lax.axis_size(axis_name), d)


def sharding(x: Array) -> SplitAxes:
    """The mesh axes that split each axis of x, as the types on an Explicit mesh say."""
    return tuple(jax.typeof(x).sharding.spec)


def reshard(x: Array, spec: Sequence[AxisName]) -> Array:
    """x typed as split in that way, along its axes that are longer than 1."""
    spec = tuple(axis if axis and n > 1 else None for axis, n in zip(spec, x.shape, strict=True))
    if sharding(x) == spec:
        return x
    if jax.sharding.get_abstract_mesh().empty:
        raise ArgumentValueError(
            "logits",
            "expected a call in the context of the Explicit mesh that splits them, got no "
            "mesh; use jax.set_mesh(mesh)",
        )
    return jax.reshard(x, PartitionSpec(*spec))


def zeros_like(x: Array, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Array:
    """Zeros of that shape, typed as varying as x, to start a loop with.

    They are float32 or float64, if no dtype is given.
    """
    zeros = jnp.zeros(shape, dtype or wide_dtype(x.dtype))
    if jax.sharding.get_abstract_mesh().explicit_axes:
        # Under jit the type of new zeros has no mesh, and then jax.vmap can't carry them in a loop.
        zeros = jax.reshard(zeros, PartitionSpec(*(None for _ in shape)))
    return vary(zeros, varying(x))
