"""The sharding of a call's arrays over a mesh, and ``jax.shard_map`` around the call."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sxe._arrays import AxisName, axis_names, is_dense, sharding
from sxe._call.axes import free_axes, mapped_axes, spmd_axes, vmap_axes, whole
from sxe._errors import ArgumentValueError, unserved


class Inputs(Protocol):
    """The arguments of a call: a named tuple of arrays and the options."""

    @property
    def options(self) -> Any: ...

    def _replace(self, *, options: Any) -> Self: ...


CallInputs = TypeVar("CallInputs", bound=Inputs)


class Layout(NamedTuple):
    """The mesh axes that shard rows and classes of global arrays.

    Attributes:
      mesh: the mesh of devices.
      rows: for each axis of the rows, from the first on, the mesh axes that shard it.
      classes: the mesh axes that shard the classes.
      fsdp: the mesh axes, among those of the rows, that also shard the head's kernel [D, K] along
        D.
      kinds: the kinds of mesh axes that ``run`` makes Manual. The compiler handles other kinds.
    """

    mesh: Any
    rows: tuple[AxisName, ...]
    classes: AxisName
    fsdp: AxisName = None
    kinds: tuple[AxisType, ...] = (AxisType.Auto, AxisType.Explicit)

    @property
    def batch(self) -> AxisName:
        """The mesh axes that shard the rows, along any of their axes."""
        return tuple(name for axes in self.rows for name in axis_names(axes)) or None

    @property
    def _used(self) -> set[str]:
        """The mesh axes that shard anything."""
        return {n for axes in (self.batch, self.classes, self.fsdp) for n in axis_names(axes)}

    def of_rows(self) -> PartitionSpec:
        return PartitionSpec(*self.rows)

    def of_logits(self, ndim: int, class_axes: tuple[int, ...]) -> PartitionSpec:
        """The spec of logits with ``ndim`` axes.

        A label is a flat index over the class axes, in their given order. Shards of consecutive
        classes are therefore shards along the first class axis.
        """
        rows = iter(self.rows)
        split = {class_axes[0]: self.classes}
        return PartitionSpec(
            *(split.get(i) if i in class_axes else next(rows, None) for i in range(ndim))
        )

    def _spec(self, name: str, x: Array, ndim: int, class_axes: tuple[int, ...]) -> PartitionSpec:
        of_logits = self.of_logits(ndim, class_axes)
        by_name = {
            "logits": of_logits,
            "target_logits": of_logits,
            "hidden": self.of_rows(),
            "kernel": PartitionSpec(self.fsdp, self.classes),
            "bias": PartitionSpec(self.classes),
            "target_hidden": self.of_rows(),
            "target_kernel": PartitionSpec(self.fsdp, self.classes),
            "target_bias": PartitionSpec(self.classes),
            "class_weights": PartitionSpec(self.classes),
            "class_mask": PartitionSpec(self.classes),
            "weights": self.of_rows(),
            "label_weights": self.of_rows(),
            "logit_scale": self.of_rows() if x.ndim else PartitionSpec(),
            "target_logit_scale": self.of_rows() if x.ndim else PartitionSpec(),
            # Several labels per row have ndim axes too, but are sharded like the rows.
            "labels": of_logits if x.ndim == ndim and is_dense(x) else self.of_rows(),
            "where": of_logits if x.ndim == ndim else self.of_rows(),
        }
        return by_name.get(name, PartitionSpec())

    def _check(self, name: str, x: Array, spec: PartitionSpec) -> None:
        for axis, axes in enumerate(spec):
            devices = math.prod(self.mesh.shape[a] for a in axis_names(axes))
            if x.shape[axis] % devices:
                advice = "pad the rows, and mask them with where"
                if axis_names(axes) == axis_names(self.classes):
                    advice = "pad the classes, and mask them with class_mask"
                elif name in ("kernel", "target_kernel"):
                    advice = "shard it over other mesh axes, or over none"
                raise ArgumentValueError(
                    name,
                    f"expected a size along axis {axis} that is a multiple of {devices}, the "
                    f"number of devices along {axis_names(axes)}, got shape {x.shape}; "
                    f"{advice}",
                )

    def specs(self, inputs: Any, ndim: int, class_axes: tuple[int, ...]) -> Any:
        """The specs of the inputs of a call, by the names of their fields."""
        most = ndim - len(class_axes)
        if len(self.rows) > most:
            raise ArgumentValueError(
                "batch",
                f"expected entries for at most {most} axes, those of the rows, got "
                f"{PartitionSpec(*self.rows)}; pass the mesh axes of the classes as classes",
            )

        def spec(path: tuple[Any, ...], x: Array) -> PartitionSpec:
            name = path[-1].name
            found = self._spec(name, x, ndim, class_axes)
            self._check(name, x, found)
            return found

        return jax.tree_util.tree_map_with_path(spec, inputs)

    def run(
        self,
        result: Callable[[CallInputs], Any],
        inputs: CallInputs,
        class_axes: tuple[int, ...],
        *,
        ndim: int,
        out: Any,
    ) -> Any:
        """Call result(inputs) in ``jax.shard_map``, with the shards of global inputs per device."""
        # If the call is inside a jax.shard_map over other mesh axes, the options already name these
        # other axes. The axes of this layout then shard the per-device arrays of that shard_map.
        options = inputs.options
        batch_axis_name = axis_names(options.batch_axis_name)
        options = options.replace(
            axis_name=(*axis_names(options.axis_name), *axis_names(self.classes)) or None,
            batch_axis_name=(*batch_axis_name, *axis_names(self.batch)) or None,
        )
        inputs = inputs._replace(options=options)
        specs = self.specs(inputs, ndim, class_axes)
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        names = {name for name, kind in kinds.items() if kind in self.kinds}
        explicit = AxisType.Explicit in kinds.values()
        by_kernel = options.implementation == "mosaic_gpu"
        if explicit:
            free = free_axes(self.mesh)
            mapped = {name for name in names - free if kinds[name] == AxisType.Explicit}
            if by_kernel and mapped:
                raise unserved(
                    "an axis mapped by jax.vmap that an Explicit mesh does not shard, got one "
                    f"sharded over {sorted(mapped)} (pass it as an axis of the rows instead)"
                )
            names &= free
            if taken := self._used - names:
                raise ArgumentValueError(
                    "batch, classes",
                    f"expected mesh axes other than {sorted(taken)}, which shard the axis that an "
                    "enclosing jax.vmap maps; name other axes, or jax.reshard the mapped arrays",
                )
            # The sharding in the types of the inputs must be the one that shard_map is given.
            inputs = jax.tree.map(functools.partial(self._reshard, kinds), inputs, specs)
        # shard_map is not needed if no mesh axis is left for it, or if the types say that no input
        # is sharded. A GPU kernel needs shard_map even if no input is sharded.
        is_whole = self.kinds == (AxisType.Explicit,) and not self._used
        if not names or (is_whole and not by_kernel):
            return result(inputs)
        if of_vmap := vmap_axes(batch_axis_name):
            raise ArgumentValueError(
                "batch_axis_name",
                f"expected no axis of a jax.vmap, got {of_vmap[0]!r} with an Explicit mesh that "
                "shards other axes: JAX cannot compute lax.psum over a vmapped axis there; use "
                "return_metrics=True, and sum loss_sum and weight_sum",
            )
        spmd = spmd_axes(self.mesh) if explicit else None
        if spmd:
            raise ArgumentValueError(
                "spmd_axis_name",
                f"expected jax.vmap without spmd_axis_name, got {sorted(spmd)}, which are Explicit "
                "mesh axes that do not shard the mapped arrays; omit spmd_axis_name, or use "
                "jax.reshard to shard the mapped arrays over these axes",
            )
        return jax.shard_map(
            result, mesh=self.mesh, in_specs=(specs,), out_specs=out, axis_names=names
        )(inputs)

    def _reshard(self, kinds: dict[str, AxisType], x: Array, spec: PartitionSpec) -> Array:
        """Shard x by the spec along Explicit mesh axes. Types do not name other axes."""
        known = [
            tuple(name for name in axis_names(axes) if kinds[name] == AxisType.Explicit) or None
            for axes in spec
        ]
        return jax.reshard(x, NamedSharding(self.mesh, PartitionSpec(*known)))


def layout_of_logits(logits: Array, class_axes: tuple[int, ...]) -> Layout:
    """The layout that the type of the logits describes, on an Explicit mesh."""
    split = sharding(logits)
    rows = tuple(axes for i, axes in enumerate(split) if i not in class_axes)
    layout = Layout(
        jax.typeof(logits).sharding.mesh, rows, split[class_axes[0]], kinds=(AxisType.Explicit,)
    )
    spec = layout.of_logits(logits.ndim, class_axes)
    if split != tuple(spec):
        raise ArgumentValueError(
            "logits",
            f"expected class axes of which at most the first, {class_axes[0]}, is sharded, got "
            f"{jax.typeof(logits)}; use jax.reshard(logits, {spec})",
        )
    return layout


def layout_of(hidden: Array, kernel: Array, *, of: str = "") -> Layout:
    """The layout that the types of hidden and kernel describe, on an Explicit mesh.

    ``of`` is the prefix of the argument names.
    """
    *rows, hidden_axis = sharding(hidden)
    kernel_rows, classes = sharding(kernel)
    meshes = [jax.typeof(x).sharding.mesh for x in (hidden, kernel)]
    mesh = next((mesh for mesh in meshes if not mesh.empty), meshes[0])
    layout = Layout(mesh, tuple(rows), classes, kinds=(AxisType.Explicit,))
    if hidden_axis is not None:
        raise ArgumentValueError(
            f"{of}hidden",
            f"expected a last axis that is not sharded, got {jax.typeof(hidden)}; use jax.reshard",
        )
    both = set(axis_names(layout.batch)) & set(axis_names(classes))
    if both:
        raise ArgumentValueError(
            f"{of}kernel",
            f"expected classes that are sharded over other mesh axes than the rows, got {both} for "
            f"both ({jax.typeof(hidden)}, {jax.typeof(kernel)}); jax.reshard one of them",
        )
    if set(axis_names(kernel_rows)) <= set(axis_names(layout.batch)):
        layout = layout._replace(fsdp=kernel_rows)
    return layout


def join_shards(inputs: CallInputs, class_axes: tuple[int, ...], *, ndim: int) -> CallInputs:
    """The inputs with all classes, if each example of a ``jax.vmap`` holds a shard of them.

    In the backward pass of a ``jax.custom_vjp``, JAX no longer knows the name of a vmapped axis,
    and cotangents are shares of the sum in some calls but not in others. So no differentiation rule
    may compute a lax.psum over such an axis.
    """
    names = mapped_axes(inputs.options.axis_name)
    if not names:
        return inputs
    layout = Layout(None, (), names)

    def join(path: tuple[Any, ...], x: Array) -> Array:
        spec = layout._spec(path[-1].name, x, ndim, class_axes)
        split = [axis for axis, split_by in enumerate(spec) if axis_names(split_by) == names]
        return whole(x, names, split[0]) if split else x

    inputs = jax.tree_util.tree_map_with_path(join, inputs)
    return inputs._replace(options=inputs.options.replace(axis_name=None))
