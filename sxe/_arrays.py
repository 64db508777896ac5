"""Types of arrays: their dtype, their sharding, and the mesh axes along which they vary."""

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
SplitAxes = tuple[AxisName, ...]  # for each axis of an array, the mesh axes it is sharded over
T = TypeVar("T")


def wide_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype that a loss of such arrays computes in: float64 if any is float64, else float32."""
    return jnp.dtype(jnp.float64 if any(d == jnp.float64 for d in dtypes) else jnp.float32)


def wide(x: Array) -> Array:
    return x.astype(wide_dtype(x.dtype))


def is_dense(labels: Array) -> bool:
    """Whether labels are dense targets (floating) and not class indices."""
    return bool(jnp.issubdtype(labels.dtype, jnp.floating))


def are_known(*sizes: int) -> bool:
    """Whether all sizes are numbers, not symbolic dimensions of an exported program."""
    return not any(is_symbolic_dim(size) for size in sizes)


def keep(mask: Array | None, x: Array) -> Array:
    """x [...] or [..., F], with 0 in rows where the mask [...] is False, even if x is NaN there."""
    if mask is None:
        return x
    return jnp.where(mask if x.ndim == mask.ndim else mask[..., None], x, 0)


@jax.custom_jvp
def keep_tangent(mask: Array, x: Array) -> Array:
    """x, whose tangents and cotangents are 0 in rows where the mask is False."""
    # Don't return x itself. If vmap maps only the mask, the rule below gives mapped tangents, so
    # the result must be mapped too. XLA removes the select.
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
    """``jax.jvp`` with respect to only the arrays whose tangents are not symbolic zeros."""
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


def any_class(x: Array, axis_name: AxisName) -> Array:
    """Whether x holds for any class of the row, on any shard: from [..., K] to [...]."""
    # jax.experimental.jet has no rule for jnp.any.
    return pmax(jnp.max(x.astype(jnp.int32), axis=-1), axis_name) > 0


def varying(x: Array) -> frozenset[str]:
    """The mesh axes along which x varies in shard_map, according to its type."""
    return jax.typeof(x).manual_axis_type.varying


def vary(x: Array, names: frozenset[str]) -> Array:
    """x, cast to vary also along these mesh axes, so that its cotangent may vary along them too."""
    missing = tuple(sorted(names - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(arrays: T, x: Array) -> T:
    """Arrays [...], cast to vary along the same mesh axes as x [..., K].

    Use it before the arrays are broadcast against x. The transpose of the cast is a sum over
    devices. After the broadcast, it would be a sum of arrays [..., K].
    """
    return jax.tree.map(lambda a: vary(a, varying(x)), arrays)


def is_tracked(axis_name: AxisName) -> bool:
    """Whether shard_map tracks which arrays vary along these mesh axes (check_vma=True)."""
    return all(name in varying(lax.axis_index(name)) for name in axis_names(axis_name))


# Without this tracking, JAX handles replicated arrays as follows. Each device gets only a share of
# the cotangent of a result, and the cotangents of an argument are summed over devices.


def sum_of_shares(g: T, axis_name: AxisName) -> T:
    """The full cotangent of a result that is replicated over the shards of the classes."""
    return g if is_tracked(axis_name) else psum(g, axis_name)


def equal_shares(d: T, axis_name: AxisName) -> T:
    """Each shard's share of the cotangent of an argument that is replicated over the shards."""
    return d if is_tracked(axis_name) else jax.tree.map(lambda a: a / lax.axis_size(axis_name), d)


def sharding(x: Array) -> SplitAxes:
    """The mesh axes over which each axis of x is sharded, by its type on an Explicit mesh."""
    return tuple(jax.typeof(x).sharding.spec)


def reshard(x: Array, spec: Sequence[AxisName]) -> Array:
    """x, resharded to ``spec`` along its axes that are longer than 1."""
    spec = tuple(axis if axis and n > 1 else None for axis, n in zip(spec, x.shape, strict=True))
    if sharding(x) == spec:
        return x
    if jax.sharding.get_abstract_mesh().empty:
        raise ArgumentValueError(
            "logits",
            "expected a call in the context of the Explicit mesh that they are sharded over, got "
            "no mesh; use jax.set_mesh(mesh)",
        )
    return jax.reshard(x, PartitionSpec(*spec))


def zeros_like(x: Array, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Array:
    """Zeros of this shape that vary along the same mesh axes as x, to start a loop with.

    The default dtype is float32, or float64 if x is float64.
    """
    zeros = jnp.zeros(shape, dtype or wide_dtype(x.dtype))
    if jax.sharding.get_abstract_mesh().explicit_axes:
        # Under jit the type of new zeros has no mesh, so jax.vmap can't carry them through a loop.
        zeros = jax.reshard(zeros, PartitionSpec(*(None for _ in shape)))
    return vary(zeros, varying(x))
