"""A loss over the global arrays on a mesh, of one process or of many."""

from __future__ import annotations  # so that help() names types shortly

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sxe import _kl_divergence as kl
from sxe import _linear_kl_divergence as linear_kl
from sxe import _linear_softmax_cross_entropy as of_hidden
from sxe import _log_prob_and_entropy as log_prob
from sxe import _softmax_cross_entropy as of_logits
from sxe._arrays import AxisName, axis_names
from sxe._call.arguments import mesh_axes
from sxe._call.layout import Layout
from sxe._errors import ArgumentTypeError, ArgumentValueError

# Each loss, and the function behind it, which takes a layout too.
LOSSES: dict[Callable[..., Any], Callable[..., Any]] = {
    of_logits.softmax_cross_entropy: of_logits.loss_of_logits,
    of_logits.softmax_cross_entropy_with_gradient: of_logits.loss_and_gradient,
    of_hidden.linear_softmax_cross_entropy: of_hidden.loss_of_hidden,
    log_prob.log_prob_and_entropy: of_logits.log_prob_of_logits,
    log_prob.linear_log_prob_and_entropy: of_hidden.log_prob_of_hidden,
    kl.kl_divergence: kl.divergence_of_logits,
    linear_kl.linear_kl_divergence: linear_kl.divergence_of_hidden,
}


class _OverMesh:
    """What ``over_mesh`` returns: a function that can be compared, copied and pickled.

    Name, docstring and signature are those of its loss.
    """

    def __init__(self, loss: Callable[..., Any], layout: Layout) -> None:
        functools.update_wrapper(self, loss)
        self._loss, self._layout = loss, layout

    def __call__(self, *args: Any, **options: Any) -> Any:
        for option in ("axis_name", "batch_axis_name"):
            if option in options:
                raise ArgumentTypeError(
                    option,
                    f"expected none with over_mesh, where batch and classes name the "
                    f"mesh axes, got {options[option]!r}",
                )
        around = jax.sharding.get_abstract_mesh()
        manual = {*self._layout.mesh.manual_axes, *around.manual_axes}
        for argument, axes in _named(self._layout):
            if taken := manual & set(axis_names(axes)):
                raise ArgumentValueError(
                    argument,
                    f"expected Auto or Explicit mesh axes, got {sorted(taken)}, which "
                    "are Manual; inside jax.shard_map call the loss itself, with axis_name and "
                    "batch_axis_name",
                )
        # The signature raises for an argument that the loss has not.
        given = inspect.signature(self._loss).bind(*args, **options)
        given.apply_defaults()
        return LOSSES[self._loss](layout=self._layout, **given.arguments)

    def __repr__(self) -> str:
        layout = self._layout
        axes = f"batch={PartitionSpec(*layout.rows)}, classes={layout.classes}, fsdp={layout.fsdp}"
        return f"sxe.over_mesh(sxe.{self._loss.__name__}, {layout.mesh!r}, {axes})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _OverMesh):
            return NotImplemented
        return (self._loss, self._layout) == (other._loss, other._layout)

    def __hash__(self) -> int:
        return hash((self._loss, self._layout))

    def __reduce__(self) -> tuple[Callable[..., _OverMesh], tuple[Any, ...]]:
        layout = self._layout
        if not isinstance(layout.mesh, Mesh):
            return _OverMesh, (self._loss, layout)
        # Devices cannot be pickled. Their ids are the same in all processes of a program.
        devices = list(layout.mesh.devices.flat)
        ids = tuple(device.id for device in devices)
        layout = layout._replace(mesh=layout.mesh.abstract_mesh)
        return _over_devices, (self._loss, layout, devices[0].platform, ids)


def _over_devices(
    loss: Callable[..., Any], layout: Layout, platform: str, ids: tuple[int, ...]
) -> _OverMesh:
    """What was pickled, over this process's devices with these ids."""
    found = {device.id: device for device in jax.devices(platform)}
    if missing := sorted(set(ids) - set(found)):
        raise ArgumentValueError(
            "mesh",
            f"expected {platform} devices with the ids that were pickled, got none with "
            f"{missing}; pickle a loss over an AbstractMesh, which has no devices",
        )
    mesh = layout.mesh
    devices = np.array([found[i] for i in ids], dtype=object).reshape(mesh.axis_sizes)
    mesh = Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
    return _OverMesh(loss, layout._replace(mesh=mesh))


def _named(layout: Layout) -> tuple[tuple[str, AxisName], ...]:
    """The mesh axes of a layout, by the arguments that name them."""
    return ("batch", layout.batch), ("classes", layout.classes)


def over_mesh(
    loss: Callable[..., Any],
    mesh: Mesh | AbstractMesh,
    *,
    batch: AxisName | PartitionSpec = None,
    classes: AxisName = None,
    fsdp: AxisName = None,
) -> Callable[..., Any]:
    """A function of this package, over global arrays whose rows or classes a mesh splits.

    The function that comes back takes the arguments of ``loss``, but for ``axis_name`` and
    ``batch_axis_name``, and gives what ``loss`` gives for them on one device: value, metrics and
    all gradients, to rounding. It is for global arrays, under ``jit`` or eager, on meshes of Auto
    or Explicit axes, of one process or, after ``jax.distributed.initialize``, of many.

    Each device takes its rows and its classes. For split classes it exchanges statistics of a
    number a row and, once a call, the gradient of the hidden states; for split rows, once a call,
    the gradient of the kernel. Neither logits nor a kernel split by classes are ever moved.

    Args:
      loss: ``sxe.softmax_cross_entropy``, ``sxe.softmax_cross_entropy_with_gradient``,
        ``sxe.log_prob_and_entropy``, ``sxe.kl_divergence``, or one of the functions of hidden
        states and kernels, whose names begin with ``linear_``.
      mesh: ``jax.sharding.Mesh`` or ``AbstractMesh``. Along an axis that is not named below all
        devices do the same.
      batch: the mesh axis, or tuple of axes, that splits the first axis of the rows. Or, for rows
        [B, T], a ``PartitionSpec`` with an entry for each: ``P("data", "sequence")``.
      classes: the mesh axis or axes that split the classes: the (first) class axis of logits, dense
        targets and a ``where`` of classes, the last of a kernel, bias, class weights and mask. What
        is named target is split as the model's is.
      fsdp: for a head, the mesh axes, among those of ``batch``, that split the first axis of each
        kernel [D, K] besides. It is gathered once a call, and its gradient reduced and scattered.

    The function that it returns can be compared, copied and pickled. If the mesh has devices, the
    process that loads it must have devices of the same platform and ids, as all processes of one
    program do.

    Arguments that are split in another way are moved, as by ``jax.jit(..., in_shardings=...)``.
    Gradients are split as described. Loss and sums are on every device, results of a number a row
    are split as the rows are.

    An Explicit mesh needs no ``over_mesh`` for arguments that are split so already: the losses find
    it in their types.

    Raises:
      TypeError: for a function that is none of these, or arguments of a wrong type.
      ValueError: for a mesh axis that the mesh has not, or that is named twice, and for a size that
        the devices along its axis do not divide, which has to be padded: rows with a ``where`` of
        False, classes with a ``class_mask`` of False.

    Example:
      >>> import jax, jax.numpy as jnp, sxe
      >>> auto = (jax.sharding.AxisType.Auto,) * 2
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=auto)
      >>> loss = sxe.over_mesh(
      ...     sxe.linear_softmax_cross_entropy, mesh, batch="data", classes="model")
      >>> hidden, kernel, labels = jnp.ones((4, 8)), jnp.ones((8, 50)), jnp.array([3, 1, 4, 1])
      >>> jax.jit(loss)(hidden, kernel, labels, label_smoothing=0.1)
      Array(3.91202, dtype=float32)
    """
    if loss not in LOSSES:
        names = ", ".join(f"sxe.{f.__name__}" for f in LOSSES)
        raise ArgumentTypeError(
            "loss",
            f"expected one of {names}, got {loss!r}; options and jax.jit go with what "
            "over_mesh returns",
        )
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ArgumentTypeError(
            "mesh", f"expected a jax.sharding.Mesh or AbstractMesh, got {mesh!r}"
        )
    rows = tuple(batch) if isinstance(batch, PartitionSpec) else (batch,)
    rows = tuple(mesh_axes("batch", axes) for axes in rows)
    while rows and rows[-1] is None:
        rows = rows[:-1]
    layout = Layout(mesh, rows, mesh_axes("classes", classes), mesh_axes("fsdp", fsdp))

    known = mesh.axis_names
    seen: set[str] = set()
    for argument, axes in _named(layout):
        for name in axis_names(axes):
            if name not in known:
                raise ArgumentValueError(
                    argument, f"expected axes of the mesh, {known}, got {name!r}"
                )
            if name in seen:
                raise ArgumentValueError(
                    argument, f"expected mesh axes named once, got {name!r} again"
                )
            seen.add(name)
    if fsdp is not None and "kernel" not in inspect.signature(loss).parameters:
        raise ArgumentValueError(
            "fsdp", f"expected None for {loss.__name__}, which has no kernel, got {fsdp!r}"
        )
    for name in axis_names(layout.fsdp):
        if name not in axis_names(layout.batch):
            raise ArgumentValueError(
                "fsdp", f"expected axes of batch, {axis_names(layout.batch)}, got {name!r}"
            )

    return _OverMesh(loss, layout)
