"""``sxe.over_mesh``: a loss of global arrays, sharded over a mesh, in one process or many."""

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

# Each loss, and the function that implements it, which also takes a layout.
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
    """The function that ``over_mesh`` returns. It can be compared, copied and pickled.

    Its name, docstring and signature are those of its loss.
    """

    def __init__(self, loss: Callable[..., Any], layout: Layout) -> None:
        functools.update_wrapper(self, loss)
        self._loss, self._layout = loss, layout

    def __call__(self, *args: Any, **options: Any) -> Any:
        for option in ("axis_name", "batch_axis_name"):
            if option in options:
                raise ArgumentTypeError(
                    option,
                    f"expected to be left out, because batch and classes of over_mesh name the "
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
        # The signature raises TypeError for an argument that the loss does not have.
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
        # Devices cannot be pickled, but their ids are the same in all processes of a program.
        devices = list(layout.mesh.devices.flat)
        ids = tuple(device.id for device in devices)
        layout = layout._replace(mesh=layout.mesh.abstract_mesh)
        return _over_devices, (self._loss, layout, devices[0].platform, ids)


def _over_devices(
    loss: Callable[..., Any], layout: Layout, platform: str, ids: tuple[int, ...]
) -> _OverMesh:
    """The unpickled loss, over the devices of this process that have these ids."""
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
    """The arguments that name mesh axes of the rows and classes, with these axes."""
    return ("batch", layout.batch), ("classes", layout.classes)


def over_mesh(
    loss: Callable[..., Any],
    mesh: Mesh | AbstractMesh,
    *,
    batch: AxisName | PartitionSpec = None,
    classes: AxisName = None,
    fsdp: AxisName = None,
) -> Callable[..., Any]:
    """Wrap a loss so that it takes global arrays whose rows or classes are sharded over a mesh.

    The returned function takes the arguments of ``loss``, except ``axis_name`` and
    ``batch_axis_name``. It returns what ``loss`` returns for the same arrays on one device: the
    value, the metrics and all gradients are equal up to rounding. It works under ``jit`` and
    eagerly, on meshes with Auto or Explicit axes, in one process or, after
    ``jax.distributed.initialize``, in many.

    Each device computes its own rows and classes. If the classes are sharded, devices exchange a
    few numbers per row and, once per call, the gradient of the hidden states. If the rows are
    sharded, devices exchange the gradient of the kernel once per call. Logits are never moved. A
    kernel is only moved along the mesh axes of ``fsdp``.

    Args:
      loss: ``sxe.softmax_cross_entropy``, ``sxe.softmax_cross_entropy_with_gradient``,
        ``sxe.log_prob_and_entropy``, ``sxe.kl_divergence``, or one of the functions of hidden
        states and kernels, whose names begin with ``linear_``.
      mesh: ``jax.sharding.Mesh`` or ``AbstractMesh``. All devices along a mesh axis that neither
        ``batch`` nor ``classes`` names compute the same.
      batch: the mesh axis, or tuple of mesh axes, over which the first axis of the rows is sharded.
        For rows [B, T] it may also be a ``PartitionSpec`` with an entry for each axis of the rows:
        ``P("data", "sequence")``.
      classes: the mesh axis or axes over which the classes are sharded: the (first) class axis of
        logits, dense targets and a ``where`` of classes, and the last axis of a kernel, bias, class
        weights and class mask. Arguments whose names begin with ``target_`` are sharded like the
        arguments of the model.
      fsdp: for functions that take a kernel: the mesh axes, among those of ``batch``, over which
        the first axis of each kernel [D, K] is sharded. The kernel is gathered once per call, and
        its gradient is reduced and scattered.

    The returned function can be compared, copied and pickled. If the mesh has devices, the process
    that unpickles the function must have devices with the same platform and ids. All processes of
    one program do.

    Arguments with another sharding are moved, as by ``jax.jit(..., in_shardings=...)``. Gradients
    are sharded like their arguments, as described above. The loss and the sums in the metrics are
    replicated. Results with one number per row are sharded like the rows.

    On an Explicit mesh, arguments that have this sharding already need no ``over_mesh``: the losses
    read the sharding from the types of the arguments.

    Raises:
      TypeError: if ``loss`` is none of these functions, or an argument has a wrong type.
      ValueError: if the mesh does not have a named axis, or an axis is named twice. Also if the
        number of devices along a mesh axis does not divide the size that is sharded over it. Pad
        the rows and mask them with ``where``, or pad the classes and mask them with
        ``class_mask``.

    Examples:
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
            f"expected one of {names}, got {loss!r}; pass options, and apply jax.jit, to the "
            "function that over_mesh returns",
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
