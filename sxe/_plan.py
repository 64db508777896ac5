"""What a call of the head would do, from its sizes alone: path, chunks, FLOPs, memory, and what it
moves between the devices of a mesh."""

from __future__ import annotations  # so that help() names types shortly

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from sxe._arrays import AxisName, axis_names
from sxe._backend import PLATFORMS, Backend, backend_of
from sxe._call import arguments
from sxe._call.options import REDUCTIONS
from sxe._call.options import chunk_size as parse_chunk_size
from sxe._errors import ArgumentTypeError, ArgumentValueError
from sxe._head.loops import classes_per_block, tiling
from sxe._rows.cpu import rows_per_block
from sxe._rows.rules import RULES

MIB = 2**20
VALUE = "value alone"
FORWARD = "gradients in the forward pass"
RECOMPUTE = "logits again in the backward pass"
INPUTS = ("hidden", "kernel")
HIDDEN_GRADIENT, KERNEL_GRADIENT = "gradient of hidden", "gradient of kernel"
TILE_OPTIONS = ("where", "bias", "logit_scale", "softcap", "label_smoothing")


class Collective(NamedTuple):
    """What devices exchange, in a call and its gradient.

    Attributes:
      kind: "all-reduce", "all-gather" or "reduce-scatter".
      of: what.
      devices: how many take part with each other.
      bytes: of the whole array on each device, before it is scattered or when it is gathered.
    """

    kind: str
    of: str
    devices: int
    bytes: int

    @property
    def link_bytes(self) -> float:
        """What each device has to send, at least: twice for a reduction whose result all have."""
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.bytes * (self.devices - 1) / self.devices


class Floor(NamedTuple):
    """Seconds that a call and its gradient take at least, on each device: the largest of these.

    Attributes:
      matmul: for the matrix products.
      memory: for reading and writing what does not stay in a cache.
      links: for what it exchanges with other devices.
    """

    matmul: float
    memory: float
    links: float


class Plan(NamedTuple):
    """What a call of ``sxe.linear_softmax_cross_entropy`` does, and its gradient, on each device.

    Attributes:
      path: "value alone"; "gradients in the forward pass", nothing computed twice; or "logits again
        in the backward pass".
      chunk_size: the rows of a chunk.
      chunks: how many there are.
      padding: the rows that are added to make them of one size.
      gradient_dtype: in which the gradient of the logits is multiplied with hidden and kernel.
      flops: of the matrix products, of all chunks.
      temporary_bytes: estimated, what XLA allocates beside arguments and results.
      peak_bytes: estimated, with arguments and results.
      logits_bytes: what the [N, K] logits would take in the dtype in which they are computed.
      logits_peak_bytes: what a program that makes them needs at least: arguments, results, logits.
      traffic_bytes: what the matrix products and the row rule read and write, at least.
      mesh: the devices along each mesh axis.
      collectives: what the devices exchange.
    """

    path: str
    chunk_size: int
    chunks: int
    padding: int
    gradient_dtype: str
    flops: int
    temporary_bytes: int
    peak_bytes: int
    logits_bytes: int
    logits_peak_bytes: int
    traffic_bytes: int
    mesh: Mapping[str, int]
    collectives: tuple[Collective, ...]

    def __hash__(self) -> int:
        *others, mesh, collectives = self
        return hash((*others, frozenset(mesh.items()), collectives))

    def floor(
        self, flops_per_second: float, bytes_per_second: float, link_bytes_per_second: float
    ) -> Floor:
        """For a device with that matmul rate, memory bandwidth, and bandwidth to send to others."""
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
    options: Sequence[str] = (),
    mesh: Mapping[str, int] | None = None,
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    fsdp: AxisName = None,
    memory_bytes: float | None = None,
    backend: Literal["cpu", "gpu", "tpu"] | None = None,
) -> Plan:
    """What ``linear_softmax_cross_entropy`` would do for inputs of that size.

    Nothing is compiled. On a CPU device, and for rule "vjp", the estimates of memory are within
    about 15 % of ``compiled.memory_analysis()``; so they are for a TPU, from libtpu 0.0.51 on, if
    no array fits into a core's vector memory, which is not counted. Elsewhere they are what the
    parts take that the work is divided into, and XLA may need more.

    Args:
      rows, hidden, classes: N, D and K, of all devices.
      dtype: of hidden and kernel.
      differentiate: those of "hidden" and "kernel" for which there is a gradient.
      reduction, rule, chunk_size: as for the call.
      options: the names of those options in use that make XLA write out more: "where" (or weights,
        or ignore_index), "bias", "logit_scale", "softcap", "label_smoothing" (or dense targets).
      mesh: the devices along each mesh axis, as ``{"data": 64, "model": 8}``. None: one device.
      axis_name, batch_axis_name, fsdp: the mesh axes that split the classes, the rows, and the rows
        of the kernel: ``classes``, ``batch`` and ``fsdp`` of ``sxe.over_mesh``.
      memory_bytes: of a device. The devices of ``axis_name`` and ``batch_axis_name``, one axis
        each, are then divided anew: as few as possible for the classes, so that ``peak_bytes`` is
        at most that. The head alone is counted: the rest of the model needs memory, too.
      backend: where it will run, by default where this runs.

    Raises:
      TypeError, ValueError: for a size below 1 (rows: 0), names that are none of the above, a mesh
        that does not divide the sizes, and a memory that no division of the devices fits.

    Example:
      >>> import sxe
      >>> p = sxe.plan(rows=8192, hidden=4096, classes=128256, dtype="bfloat16")
      >>> p.path
      'gradients in the forward pass'
      >>> p.flops == 6 * 8192 * 4096 * 128256
      True
      >>> p.temporary_bytes < p.logits_bytes
      True
    """
    rows = arguments.integer("rows", rows)
    hidden = arguments.integer("hidden", hidden)
    classes = arguments.integer("classes", classes)
    for name, size, least in (("rows", rows, 0), ("hidden", hidden, 1), ("classes", classes, 1)):
        if size < least:
            raise ArgumentValueError(name, f"expected at least {least}, got {size}")
    arguments.one_of("reduction", reduction, REDUCTIONS)
    arguments.one_of("rule", rule, tuple(RULES))
    for argument, names, known in (
        ("differentiate", differentiate, INPUTS),
        ("options", options, TILE_OPTIONS),
    ):
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ArgumentTypeError(
                argument, f"expected a sequence of names among {known}, got {names!r}"
            )
        for name in names:
            arguments.one_of(argument, name, known)
    dtype = _dtype(dtype)
    given = parse_chunk_size("chunk_size", chunk_size)
    if backend is not None:
        arguments.one_of("backend", backend, PLATFORMS)

    if mesh is not None and not isinstance(mesh, Mapping):
        raise ArgumentTypeError(
            "mesh",
            "expected the devices along each mesh axis, as {'data': 64, 'model': 8}, got "
            f"{mesh!r}; of a jax.sharding.Mesh pass mesh.shape",
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
    here = backend_of()
    call = _Call(
        rows,
        hidden,
        classes,
        dtype,
        differentiate=tuple(differentiate),
        reduction=reduction,
        rule=rule,
        chunk_size=given,
        options=tuple(options),
        # Inside of shard_map a device is alone, whatever the number of devices here.
        backend=Backend(backend or here.platform, here.is_local or bool(sizes)),
    )
    if memory_bytes is not None and not isinstance(memory_bytes, numbers.Real):
        raise ArgumentTypeError("memory_bytes", f"expected a number or None, got {memory_bytes!r}")
    if memory_bytes is None:
        return _plan(call, sizes, **axes)
    return _smallest_class_split(call, sizes, memory_bytes, **axes)


def _dtype(dtype: DTypeLike) -> jnp.dtype:
    try:
        # NumPy takes None for float64.
        known = None if dtype is None else jnp.dtype(dtype).newbyteorder("=")
    except TypeError:
        known = None
    return arguments.check_dtype("dtype", dtype if known is None else known)


class _Call(NamedTuple):
    rows: int
    hidden: int
    classes: int
    dtype: jnp.dtype
    differentiate: tuple[str, ...]
    reduction: str
    rule: str
    chunk_size: int | None
    options: tuple[str, ...]
    backend: Backend


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
    call: _Call, sizes: dict[str, int], memory_bytes: float, **axes: AxisName
) -> Plan:
    for argument in ("axis_name", "batch_axis_name"):
        if len(axis_names(axes[argument])) != 1:
            raise ArgumentValueError(
                argument,
                f"expected one axis of mesh, whose size memory_bytes decides, got "
                f"{axes[argument]!r}",
            )
    (model,), (data,) = axis_names(axes["axis_name"]), axis_names(axes["batch_axis_name"])
    devices = sizes[model] * sizes[data]
    least = math.inf
    for split in range(1, devices + 1):
        if devices % split:
            continue
        try:
            found = _plan(call, sizes | {model: split, data: devices // split}, **axes)
        except ValueError:  # the sizes do not divide
            continue
        if found.peak_bytes <= memory_bytes:
            return found
        least = min(least, found.peak_bytes)
    if least == math.inf:
        raise ArgumentValueError(
            "mesh",
            f"expected {devices} devices that divide {call.rows} rows and {call.classes} "
            f"classes in some way, got {sizes}; pad rows or classes",
        )
    raise ArgumentValueError(
        "memory_bytes",
        f"expected at least {least:.3g} for the head on {devices} devices, got {memory_bytes:.3g}",
    )


def _plan(
    call: _Call,
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
        ("hidden", call.hidden, gathered, fsdp),
    ):
        if size % parts:
            raise ArgumentValueError(
                argument, f"expected a multiple of {parts}, the devices along {axes}, got {size}"
            )
    rows, hidden, classes = call.rows // groups, call.hidden, call.classes // shards
    if not sizes:
        return _on_a_device(call, sizes, ())

    wide = 8 if call.dtype == jnp.float64 else 4
    gathered_itemsize = (
        wide if call.backend.platform == "cpu" else call.dtype.itemsize
    )  # XLA widens it
    kernel, all_hidden = hidden * classes, rows * hidden
    want_hidden, want_kernel = (name in call.differentiate for name in INPUTS)
    sums = {"mean": 2, "sum": 1, "none": 0}[call.reduction]
    exchanged = [
        ("all-reduce", "sums of losses and weights", groups, wide * sums),
        # The maximum; the sum, the number of maxima, and the label's part of the loss.
        ("all-reduce", "statistics of rows", shards, 4 * wide * rows),
        ("all-reduce", HIDDEN_GRADIENT, shards, wide * all_hidden * want_hidden),
        ("all-gather", "kernel", gathered, gathered_itemsize * kernel),
        ("reduce-scatter", KERNEL_GRADIENT, gathered, wide * kernel * want_kernel),
        (
            "all-reduce",
            KERNEL_GRADIENT,
            groups // gathered,
            wide * kernel // gathered * want_kernel,
        ),
    ]
    collectives = tuple(Collective(*c) for c in exchanged if c[2] > 1 and c[3])
    return _on_a_device(call._replace(rows=rows, classes=classes), sizes, collectives)


def _on_a_device(call: _Call, sizes: dict[str, int], collectives: tuple[Collective, ...]) -> Plan:
    rows, hidden, classes, dtype = call.rows, call.hidden, call.classes, call.dtype
    chunks, size, padding = tiling(
        rows, classes, chunk_size=call.chunk_size, dtype=dtype, backend=call.backend
    )
    wanted = [name in call.differentiate for name in INPUTS]
    if not any(wanted):
        path = VALUE
    else:
        path = FORWARD if call.rule == "vjp" and call.reduction != "none" else RECOMPUTE
    # Of a single chunk XLA sees that both passes compute the same logits, and keeps them.
    again = path == RECOMPUTE and chunks > 1
    products = 1 + sum(wanted) + again

    itemsize, wide = dtype.itemsize, 8 if dtype == jnp.float64 else 4
    narrow_gradient = call.backend.gradient_dtype(dtype).itemsize
    logits = rows * classes * wide
    scattered = math.prod(c.devices for c in collectives if c.kind == "all-gather")
    kernel = hidden * classes // scattered
    arguments = (rows * hidden + kernel) * itemsize + rows * 4
    results = itemsize * (wanted[0] * rows * hidden + wanted[1] * kernel) + wide
    if call.reduction == "none":
        results += rows * wide
    temporary = _temporary_bytes(call, size, chunks, path, wanted[0], wanted[1], collectives)
    # The kernel is read for each product with it, and its gradient read and written, in each chunk.
    # Logits are written, and read by both passes of the row rule; their gradient is written, and
    # read for each product with it.
    traffic = (
        chunks * hidden * classes * ((1 + wanted[0] + again) * itemsize + wanted[1] * 2 * wide)
    )
    traffic += rows * hidden * itemsize * (1 + again + sum(wanted))
    traffic += logits * (2 + any(wanted) + 2 * again)
    traffic += rows * classes * narrow_gradient * (any(wanted) + sum(wanted))
    return Plan(
        path=path,
        chunk_size=size,
        chunks=chunks,
        padding=padding,
        gradient_dtype=str(call.backend.gradient_dtype(dtype)),
        flops=2 * products * size * chunks * hidden * classes,
        temporary_bytes=temporary,
        peak_bytes=arguments + results + temporary,
        logits_bytes=logits,
        logits_peak_bytes=arguments + results + logits,
        traffic_bytes=traffic,
        mesh=sizes,
        collectives=collectives,
    )


def _temporary_bytes(
    call: _Call,
    size: int,
    chunks: int,
    path: str,
    want_hidden: bool,
    want_kernel: bool,
    collectives: tuple[Collective, ...],
) -> int:
    """What XLA allocates at the time when it needs most, as far as that follows from the sizes."""
    rows, hidden, classes, dtype = call[:4]
    platform = call.backend.platform
    options = call.options
    wide = 8 if dtype == jnp.float64 else 4
    narrow = dtype.itemsize < wide
    old = platform == "cpu" and call.backend.jax_version < (0, 11)
    tile = size * classes * wide
    all_hidden = rows * hidden * wide
    chunk_hidden = size * hidden * wide
    padded = size * chunks != rows
    kernel = hidden * classes * wide
    gathered = math.prod(c.devices for c in collectives if c.kind == "all-gather")
    reduced = any(c.of == KERNEL_GRADIENT for c in collectives)
    reduced_hidden = any(c.of == HIDDEN_GRADIENT for c in collectives)
    if platform == "tpu":
        # There XLA fuses the row rule with the products, except a tanh, and writes no result over
        # what it is made of.
        tiles = 1 + ("softcap" in options and path != VALUE)
        scaled = path == FORWARD  # by the backward pass, into other arrays
        kernels = kernel * (want_kernel and (narrow or reduced or scaled))
        kernels += hidden * classes * dtype.itemsize * (gathered > 1)
        copies = padded + (want_hidden and (narrow or reduced_hidden or scaled))
        looping = tile * tiles + kernels + all_hidden * (copies if chunks > 1 else 0)
        # After the loop, gradients are scaled, and reduced from other arrays than they were in.
        twice = reduced_hidden and gathered == 1
        after = kernel * want_kernel * (1 + reduced) + all_hidden * want_hidden * (1 + twice)
        return max(looping, after) if scaled and (reduced or reduced_hidden) else looping

    # The row rule's temporaries are as large as the rows it takes at a time, or the classes.
    row_block = rows_per_block((size, classes), call.backend) * classes * wide
    block = classes_per_block(hidden, classes, call.backend)
    writes = len({*options, *(("where",) if padded else ())})
    if "softcap" in options and "label_smoothing" not in options:
        writes -= 1  # XLA does not write the capped logits: it computes them where it needs them
    # The sum of a confident row is over a copy of its block without the maxima.
    work = row_block * (2 + writes)
    blocks = want_kernel or call.backend.gradient_dtype(dtype) != dtype
    if path != VALUE and block < classes and blocks:
        work = max(work, (size + hidden) * block * wide)
    if platform == "gpu":
        # There XLA fuses the row rule, options and all, but not with the products.
        work = size * classes * call.backend.gradient_dtype(dtype).itemsize if path != VALUE else 0
    work += chunk_hidden if chunks > 1 else 0
    # The gradients of chunks, before they are in the rows' order.
    stacked = want_hidden and (narrow or (want_kernel and platform == "cpu"))
    if old and not padded:
        # There they may be where they are returned; but narrow hidden states are widened.
        stacked = narrow or (want_hidden and want_kernel and all_hidden < tile)
    copies = all_hidden * (padded + stacked)
    copies = copies if chunks > 1 else 0

    buffers = [tile]
    if old and path == FORWARD and not writes:
        rows_at_once = rows_per_block((size, classes), call.backend)
        if rows_at_once == 1 < size:
            buffers.append(tile)  # its rows are not replaced in place
    if old and narrow and want_hidden:
        buffers.append(kernel // 2)  # as integers
    if platform == "gpu" and narrow and classes % 8:
        # cuBLAS wants whole blocks of 16 bytes, so that XLA pads what it multiplies.
        buffers.append(kernel // 2)
        work += work
    if narrow and reduced_hidden:
        buffers.append(all_hidden)  # what it was reduced to, before it is rounded

    # A gradient that is rounded or reduced comes from another one when all is done: until then its
    # own memory is free for something else.
    if not want_kernel or not (narrow or reduced):
        return sum(buffers) + work + copies
    result = kernel // gathered // (2 if narrow else 1)
    if not reduced:
        fits = [b for b in buffers if b <= result]
        if fits:
            buffers.remove(max(fits))
        return sum(buffers) + kernel + work + copies
    rest = sorted((*buffers, work, copies), reverse=True)
    if narrow:
        whole = kernel // 2 if gathered > 1 else 0
        return kernel + whole + max(kernel, sum(rest))
    for part in rest[:]:
        if part <= result:
            result -= part
            rest.remove(part)
    return kernel * (2 if gathered > 1 else 1) + sum(rest)
