"""``sxe.plan``: the path of a call, its chunks, FLOPs, memory, and communication over a mesh."""

from __future__ import annotations  # so that help() names types shortly

import dataclasses
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from sxe._arrays import AxisName, axis_names
from sxe._backend import PLATFORMS, backend_of
from sxe._call import arguments
from sxe._call.implementation import check_rule, choose
from sxe._call.options import REDUCTIONS, Implementation
from sxe._call.options import chunk_size as parse_chunk_size
from sxe._call.options import implementation as parse_implementation
from sxe._errors import ArgumentTypeError, ArgumentValueError
from sxe._plan.per_device import plan_of, smallest_class_split
from sxe._plan.result import Plan
from sxe._plan.work import (
    INPUTS,
    MODEL,
    OF_DIVERGENCE,
    OF_LOSS,
    TARGET,
    TARGET_INPUTS,
    TILE_OPTIONS,
    Side,
    Work,
)
from sxe._rows.rules import RULES


def plan(
    rows: int,
    hidden: int,
    classes: int,
    dtype: DTypeLike = "float32",
    *,
    differentiate: Sequence[str] = INPUTS,
    reduction: Literal["mean", "sum", "none"] = "mean",
    rule: Literal["vjp", "jvp", "autodiff"] = "vjp",
    chunk_size: int | None = None,
    target_hidden: int | None = None,
    options: Sequence[str] = (),
    counting: float = 1.0,
    mesh: Mapping[str, int] | None = None,
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    fsdp: AxisName = None,
    memory_bytes: float | None = None,
    backend: Literal["cpu", "gpu", "tpu"] | None = None,
    implementation: Implementation = None,
) -> Plan:
    """Compute from sizes alone what a call of ``linear_softmax_cross_entropy`` would do.

    With ``target_hidden``, the plan is for ``linear_kl_divergence``. For
    ``linear_log_prob_and_entropy``, use ``reduction="none"``. Its entropy needs no extra read of
    the logits from memory: a CPU has them in a cache, and on a GPU XLA computes the entropy's sum
    in the same read as the other sums. If the entropy is used, two of its costs are not included:
    one more read of the logits after a GPU kernel, and one more number per row that is summed over
    the devices that share the classes.

    Nothing is compiled. On one CPU device and with rule "vjp", the estimates of memory are within
    about 15 % of ``compiled.memory_analysis()``, for a call without metrics that differentiates
    only hidden states and kernels. Metrics, and gradients for other arguments, may add up to four
    arrays of the size of a chunk's logits. The same holds for a TPU, from libtpu 0.0.51 on, unless
    an array fits into a core's vector memory, which is not counted. Elsewhere the estimates are the
    sizes of the parts into which the work is divided, and XLA may need more. On a CPU, two things
    are left out: JAX 0.10 writes out the dense targets [C, K] of a chunk; and if both kernels of a
    divergence have the same shape and all four inputs have gradients, the gradient of one kernel
    may be stored twice.

    Args:
      rows, hidden, classes: N, D and K, over all devices.
      dtype: the dtype of hidden and kernel.
      differentiate: the inputs that have a gradient: "hidden", "kernel" or both; for a divergence
        also "target_hidden" and "target_kernel".
      reduction, rule, chunk_size: as for the call.
      target_hidden: D', for a divergence from a target with hidden states [N, D'] and a kernel
        [D', K]. None for a loss with labels.
      options: the names of the options in use that make XLA write out more arrays, or that a GPU
        kernel does not support: "where" (also for weights or ignore_index), "bias", "logit_scale",
        "softcap", "class_mask"; for a loss also "label_smoothing" (also for dense targets) and
        "label_weights" (up to 16 per row); for a divergence also "jensen_shannon", if it is the
        mode. All other options of a divergence are assumed to be in use on both sides.
      counting: the share of the rows that count on each device. ``where``, ``ignore_index`` and
        ``weights`` exclude the other rows. Rule "vjp" runs only rows that count, in whole chunks
        and parts of a chunk.
      mesh: the number of devices along each mesh axis, as ``{"data": 64, "model": 8}``. None for
        one device.
      axis_name, batch_axis_name, fsdp: the mesh axes over which the classes, the rows, and the
        first axis of each kernel are sharded: ``classes``, ``batch`` and ``fsdp`` of
        ``sxe.over_mesh``.
      memory_bytes: the memory of one device. If given, ``axis_name`` and ``batch_axis_name`` have
        to be one mesh axis each. ``plan`` then chooses the sizes of these two axes, and keeps their
        product: it shards the classes over the fewest devices for which ``peak_bytes`` is at most
        ``memory_bytes``. Only the head is counted; the rest of the model needs memory, too.
      backend: the platform of the call. By default, the platform of this process.
      implementation: as for the call.

    Raises:
      TypeError, ValueError: if a size is below 1 (for rows, below 0), if a name is not listed
        above, if the mesh does not divide the sizes, or if no choice of mesh sizes fits into
        ``memory_bytes``.

    Examples:
      >>> import sxe
      >>> p = sxe.plan(rows=8192, hidden=4096, classes=128256, dtype="bfloat16")
      >>> p.path
      'gradients in the forward pass'
      >>> p.flops == 6 * 8192 * 4096 * 128256
      True
      >>> p.temporary_bytes < p.logits_bytes
      True

      A student with half the hidden size of its teacher. The teacher has no gradient:

      >>> p = sxe.plan(rows=8192, hidden=2048, classes=128256, target_hidden=4096)
      >>> p.flops == (6 * 2048 + 2 * 4096) * 8192 * 128256
      True
    """
    rows = arguments.integer("rows", rows)
    hidden = arguments.integer("hidden", hidden)
    classes = arguments.integer("classes", classes)
    sides = [Side(hidden, *MODEL)]
    if target_hidden is not None:
        sides.append(Side(arguments.integer("target_hidden", target_hidden), *TARGET))
    of_sides = [(side.hidden, side.size, 1) for side in sides]
    for name, size, least in (("rows", rows, 0), ("classes", classes, 1), *of_sides):
        if size < least:
            raise ArgumentValueError(name, f"expected at least {least}, got {size}")
    arguments.one_of("reduction", reduction, REDUCTIONS)
    arguments.one_of("rule", rule, tuple(RULES))
    for argument, names, known in (
        ("differentiate", differentiate, INPUTS + TARGET_INPUTS),
        ("options", options, TILE_OPTIONS),
    ):
        if isinstance(names, str) or not isinstance(names, Collection):
            raise ArgumentTypeError(
                argument, f"expected a sequence of names among {known}, got {names!r}"
            )
        for name in names:
            arguments.one_of(argument, name, known)
    _check_names(tuple(differentiate), tuple(options), has_targets=target_hidden is not None)
    dtype = _dtype(dtype)
    given = parse_chunk_size("chunk_size", chunk_size)
    if backend is not None:
        arguments.one_of("backend", backend, PLATFORMS)
    if isinstance(counting, bool) or not isinstance(counting, numbers.Real):
        raise ArgumentTypeError("counting", f"expected a number in [0, 1], got {counting!r}")
    if not 0 <= counting <= 1:
        raise ArgumentValueError(
            "counting", f"expected a number in [0, 1], a share of the rows, got {counting!r}"
        )

    if mesh is not None and not isinstance(mesh, Mapping):
        raise ArgumentTypeError(
            "mesh",
            "expected the devices along each mesh axis, as {'data': 64, 'model': 8}, got "
            f"{mesh!r}; for a jax.sharding.Mesh pass mesh.shape",
        )
    sizes = {
        name: arguments.integer("mesh", devices, f"an int of at least 1 for {name!r}")
        for name, devices in (mesh or {}).items()
    }
    axes = {
        "axis_name": arguments.mesh_axes("axis_name", axis_name),
        "batch_axis_name": arguments.mesh_axes("batch_axis_name", batch_axis_name),
        "fsdp": arguments.mesh_axes("fsdp", fsdp),
    }
    _check_mesh(sizes, axes, rule)
    runs_on = backend_of()
    if backend is not None:
        runs_on = dataclasses.replace(runs_on, platform=backend)
    if sizes:  # Inside shard_map a device is local, whatever the number of devices here.
        runs_on = dataclasses.replace(runs_on, is_local=True)
    parse_implementation("implementation", implementation)
    runs_on = choose(implementation, runs_on, dtype=dtype, shape=(rows, classes))
    check_rule(rule, runs_on)
    call = Work(
        rows,
        classes,
        tuple(sides),
        dtype,
        differentiate=frozenset(differentiate),
        reduction=reduction,
        rule=rule,
        chunk_size=given,
        options=frozenset(options) | ({"where"} if counting < 1 else set()),
        counting=float(counting),
        backend=runs_on,
    )
    if memory_bytes is not None and not isinstance(memory_bytes, numbers.Real):
        raise ArgumentTypeError("memory_bytes", f"expected a number or None, got {memory_bytes!r}")
    if memory_bytes is None:
        return plan_of(call, sizes, **axes)
    return smallest_class_split(call, sizes, memory_bytes, **axes)


def _dtype(dtype: DTypeLike) -> jnp.dtype:
    try:
        # None is refused here, because NumPy takes it for float64.
        known = None if dtype is None else jnp.dtype(dtype).newbyteorder("=")
    except TypeError:
        known = None
    return arguments.check_dtype("dtype", dtype if known is None else known)


def _check_names(
    differentiate: tuple[str, ...], options: tuple[str, ...], *, has_targets: bool
) -> None:
    """Raise for a name that only a divergence has, or only a loss, in a plan for the other."""
    given = [("differentiate", name) for name in differentiate]
    given += [("options", name) for name in options]
    for argument, name in given:
        if name in TARGET_INPUTS + OF_DIVERGENCE and not has_targets:
            raise ArgumentValueError(
                argument,
                f"expected {name!r} only for a divergence; pass target_hidden, the target's hidden "
                "size, as well",
            )
        if name in OF_LOSS and has_targets:
            raise ArgumentValueError(
                argument, f"expected no {name!r} with target_hidden: a divergence has no labels"
            )


def _check_mesh(sizes: dict[str, int], axes: dict[str, AxisName], rule: str) -> None:
    for name, devices in sizes.items():
        if devices < 1:
            raise ArgumentValueError(
                "mesh", f"expected an int of at least 1 for {name!r}, got {devices!r}"
            )
    seen: set[str] = set()
    for argument, names in axes.items():
        for name in axis_names(names):
            if name not in sizes:
                raise ArgumentValueError(
                    argument,
                    f"expected axes of mesh, {tuple(sizes)}, got {name!r}"
                    + ("" if sizes else "; pass mesh={" + f"{name!r}: ..." + "}"),
                )
            if argument == "fsdp" and name not in axis_names(axes["batch_axis_name"]):
                raise ArgumentValueError("fsdp", f"expected axes of batch_axis_name, got {name!r}")
            if argument != "fsdp" and name in seen:
                raise ArgumentValueError(argument, f"expected axes named once, got {name!r} again")
            seen.add(name)
    if sizes and rule != "vjp":
        raise ArgumentValueError("rule", f"expected 'vjp' with a mesh, got {rule!r}")
