"""The plan of one device: a call divided over a mesh."""

import dataclasses
import math

from sxe._arrays import AxisName, axis_names
from sxe._errors import ArgumentValueError
from sxe._plan.memory import temporaries
from sxe._plan.result import Collective, Plan
from sxe._plan.work import Work
from sxe._rows.gpu_choice import has_state_kernel

VALUE = "value alone"


def smallest_class_split(
    call: Work, sizes: dict[str, int], memory_bytes: float, **axes: AxisName
) -> Plan:
    """The plan that shards the classes over the fewest devices for which the memory is enough."""
    for argument in ("axis_name", "batch_axis_name"):
        if len(axis_names(axes[argument])) != 1:
            raise ArgumentValueError(
                argument,
                "expected one axis of mesh, because memory_bytes divides the devices of the mesh "
                f"between rows and classes, got {axes[argument]!r}",
            )
    (model,), (data,) = axis_names(axes["axis_name"]), axis_names(axes["batch_axis_name"])
    devices = sizes[model] * sizes[data]
    least, indivisible = math.inf, None
    for split in range(1, devices + 1):
        if devices % split:
            continue
        try:
            found = plan_of(call, sizes | {model: split, data: devices // split}, **axes)
        except ArgumentValueError as error:  # this mesh does not divide the sizes
            indivisible = error
            continue
        if found.peak_bytes <= memory_bytes:
            return found
        least = min(least, found.peak_bytes)
    if least == math.inf:
        raise ArgumentValueError(
            "mesh",
            f"expected {devices} devices that can divide {call.rows} rows and {call.classes} "
            f"classes, got {sizes}; for the last division tried: {indivisible}",
        ) from indivisible
    raise ArgumentValueError(
        "memory_bytes",
        f"expected at least {least:.3g} for the head on {devices} devices, got {memory_bytes:.3g}",
    )


def plan_of(
    call: Work,
    sizes: dict[str, int],
    *,
    axis_name: AxisName,
    batch_axis_name: AxisName,
    fsdp: AxisName,
) -> Plan:
    """The plan of each device of a mesh with these sizes, by the name of the axis."""

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
