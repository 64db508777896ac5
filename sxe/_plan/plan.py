"""``sxe.plan``: the path of a call, its chunks, FLOPs, memory, and communication over a mesh."""

from __future__ import annotations  # so that help() names types shortly

import dataclasses
import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

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
from sxe._plan.memory import temporaries
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
from sxe._rows.gpu_choice import has_state_kernel
from sxe._rows.rules import RULES

VALUE = "value alone"


class Collective(NamedTuple):
    """A collective operation in a call and its gradient.

    Attributes:
      kind: "all-reduce", "all-gather" or "reduce-scatter".
      of: the array or arrays that the devices exchange.
      devices: the number of devices in each group.
      bytes: the size of the whole array on each device: before a scatter, or after a gather.
    """

    kind: str
    of: str
    devices: int
    bytes: int

    @property
    def link_bytes(self) -> float:
        """A lower bound on the bytes that each device sends. An all-reduce sends them twice."""
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.bytes * (self.devices - 1) / self.devices


class Floor(NamedTuple):
    """Lower bounds on the seconds that a call and its gradient take on each device.

    The largest of the three is the lower bound on the time.

    Attributes:
      matmul: for the matrix products.
      memory: for reading and writing the data that does not stay in a cache.
      links: for sending data to other devices.
    """

    matmul: float
    memory: float
    links: float


class Plan(NamedTuple):
    """The work of a call of the head, and of its gradient, on each device.

    The head is the fused final linear layer and loss. For a divergence, the numbers for hidden,
    kernel and logits include both sides.

    Attributes:
      implementation: "xla" or "mosaic_gpu": what computes results and gradients from the logits.
      reason: why this implementation is used, and how often it reads the logits of a chunk.
      path: "value alone"; "gradients in the forward pass", where nothing is computed twice; or
        "logits again in the backward pass".
      chunk_size: the number of rows in a chunk.
      chunks: the number of chunks.
      padding: the number of rows that are added so that all chunks have the same size.
      rows_run: the number of rows in the chunks, and parts of chunks, that are run. Fewer are run
        if some rows do not count because they are masked out, ignored, or of weight 0.
      gradient_dtype: the dtype in which the gradient of the logits is multiplied with hidden and
        kernel.
      flops: the floating-point operations of the matrix products, for all rows that are run.
      terms: an estimate of the memory that XLA allocates in addition to arguments and results, at
        the moment of peak memory: the bytes of each array, by name. An array that uses the memory
        of a result not yet computed is left out.
      temporary_bytes: the sum of the terms.
      peak_bytes: an estimate of the peak memory, including arguments and results.
      kept_bytes: the size of the residuals: the arrays that the forward pass keeps for the backward
        pass, in addition to hidden and kernel. If the gradient of a ``lax.scan`` or ``lax.map`` is
        taken outside of it, these arrays are kept for each step.
      logits_bytes: the size of the [N, K] logits in the dtype in which they are computed.
      logits_peak_bytes: a lower bound on the peak memory of a program that stores these logits:
        arguments, results and logits.
      traffic_bytes: a lower bound on the bytes that the matrix products, and the steps between
        them, read from memory and write to it.
      mesh: the number of devices along each mesh axis.
      collectives: the collective operations between devices.
    """

    implementation: str
    reason: str
    path: str
    chunk_size: int
    chunks: int
    padding: int
    rows_run: int
    gradient_dtype: str
    flops: int
    terms: Mapping[str, int]
    temporary_bytes: int
    peak_bytes: int
    kept_bytes: int
    logits_bytes: int
    logits_peak_bytes: int
    traffic_bytes: int
    mesh: Mapping[str, int]
    collectives: tuple[Collective, ...]

    def __hash__(self) -> int:
        return hash(tuple(frozenset(a.items()) if isinstance(a, Mapping) else a for a in self))

    def floor(
        self, flops_per_second: float, bytes_per_second: float, link_bytes_per_second: float
    ) -> Floor:
        """Lower bounds on the time, from the matmul rate, memory and link bandwidth of a device."""
        for name, rate in (
            ("flops_per_second", flops_per_second),
            ("bytes_per_second", bytes_per_second),
            ("link_bytes_per_second", link_bytes_per_second),
        ):
            if not rate > 0:
                raise ArgumentValueError(name, f"expected a number above 0, got {rate!r}")
        return Floor(
            self.flops / flops_per_second,
            self.traffic_bytes / bytes_per_second,
            sum(c.link_bytes for c in self.collectives) / link_bytes_per_second,
        )


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
    about 15 % of ``compiled.memory_analysis()``. The same holds for a TPU, from libtpu 0.0.51 on,
    unless an array fits into a core's vector memory, which is not counted. Elsewhere the estimates
    are the sizes of the parts into which the work is divided, and XLA may need more. On a CPU, two
    things are left out: JAX 0.10 writes out the dense targets [C, K] of a chunk; and if both
    kernels of a divergence have the same shape and all four inputs have gradients, the gradient of
    one kernel may be stored twice.

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
        return _plan(call, sizes, **axes)
    return _smallest_class_split(call, sizes, memory_bytes, **axes)


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


def _smallest_class_split(
    call: Work, sizes: dict[str, int], memory_bytes: float, **axes: AxisName
) -> Plan:
    for argument in ("axis_name", "batch_axis_name"):
        if len(axis_names(axes[argument])) != 1:
            raise ArgumentValueError(
                argument,
                "expected one axis of mesh, because memory_bytes divides the devices of the mesh "
                f"between rows and classes, got {axes[argument]!r}",
            )
    (model,), (data,) = axis_names(axes["axis_name"]), axis_names(axes["batch_axis_name"])
    devices = sizes[model] * sizes[data]
    least = math.inf
    for split in range(1, devices + 1):
        if devices % split:
            continue
        try:
            found = _plan(call, sizes | {model: split, data: devices // split}, **axes)
        except ValueError:  # this mesh does not divide the sizes
            continue
        if found.peak_bytes <= memory_bytes:
            return found
        least = min(least, found.peak_bytes)
    if least == math.inf:
        raise ArgumentValueError(
            "mesh",
            f"expected {devices} devices that can divide {call.rows} rows and {call.classes} "
            f"classes, got {sizes}; pad rows or classes",
        )
    raise ArgumentValueError(
        "memory_bytes",
        f"expected at least {least:.3g} for the head on {devices} devices, got {memory_bytes:.3g}",
    )


def _plan(
    call: Work,
    sizes: dict[str, int],
    *,
    axis_name: AxisName,
    batch_axis_name: AxisName,
    fsdp: AxisName,
) -> Plan:
    def devices_along(axes: AxisName) -> int:
        return math.prod(sizes[name] for name in axis_names(axes))

    shards, groups = devices_along(axis_name), devices_along(batch_axis_name)
    gathered = devices_along(fsdp)
    for argument, size, parts, axes in (
        ("rows", call.rows, groups, batch_axis_name),
        ("classes", call.classes, shards, axis_name),
        *((side.hidden, side.size, gathered, fsdp) for side in call.sides),
    ):
        if size % parts:
            raise ArgumentValueError(
                argument, f"expected a multiple of {parts}, the devices along {axes}, got {size}"
            )
    work = dataclasses.replace(
        call,
        rows=call.rows // groups,
        classes=call.classes // shards,
        row_groups=groups,
        class_shards=shards,
        kernel_parts=gathered,
    )
    chunks, size, padding = work.tiling
    terms = temporaries(work)
    temporary, others = sum(terms.values()), work.argument_bytes + work.result_bytes
    return Plan(
        implementation=work.implementation,
        reason=_reason(work),
        path=work.path or VALUE,
        chunk_size=size,
        chunks=chunks,
        padding=padding,
        rows_run=work.steps.rows,
        gradient_dtype=str(work.gradient_dtype),
        flops=work.flops,
        terms=terms,
        temporary_bytes=temporary,
        peak_bytes=others + temporary,
        kept_bytes=work.kept_bytes,
        logits_bytes=work.logits_bytes,
        logits_peak_bytes=others + work.logits_bytes,
        traffic_bytes=work.traffic_bytes,
        mesh=sizes,
        collectives=_collectives(work),
    )


def _reason(work: Work) -> str:
    """Why this implementation is used, and how often it reads the logits of a chunk."""
    reads = ("once", "twice", "three times", "four times")[work.reads_of_logits - 1]
    if not work.backend.uses_row_kernels:
        return f"XLA, unless the kernels are requested; a chunk's logits are read {reads}"
    if work.makes_gradient_with_state:
        return f"requested; one kernel reads a chunk's logits {reads} and writes their gradient"
    if not has_state_kernel(work.classes):
        return f"requested, but run by XLA for so few classes; a chunk's logits are read {reads}"
    return f"requested; with a kernel for the state of rows, a chunk's logits are read {reads}"


def _collectives(work: Work) -> tuple[Collective, ...]:
    groups, shards, parts = work.row_groups, work.class_shards, work.kernel_parts
    wide = work.wide_itemsize
    sums = {"mean": 2, "sum": 1, "none": 0}[work.reduction]
    statistics = wide * work.rows * work.statistics
    exchanged = [
        Collective("all-reduce", "sums of losses and weights", groups, wide * sums),
        Collective("all-reduce", "statistics of rows", shards, statistics),
    ]
    itemsize = wide if work.backend.widens_what_it_exchanges else work.dtype.itemsize
    for side in work.sides:
        of_hidden, of_kernel = f"gradient of {side.hidden}", f"gradient of {side.kernel}"
        d_hidden, d_kernel = (
            wide * work.elements[name] * (name in work.differentiate) for name in side.inputs
        )
        gathered = itemsize * work.elements[side.kernel]
        exchanged += [
            Collective("all-reduce", of_hidden, shards, d_hidden),
            Collective("all-gather", side.kernel, parts, gathered),
            Collective("reduce-scatter", of_kernel, parts, d_kernel),
            Collective("all-reduce", of_kernel, groups // parts, d_kernel // parts),
        ]
    return tuple(c for c in exchanged if c.devices > 1 and c.bytes)
