"""The command line of ``python -m sxe plan``, and the plan as text."""

import argparse
import math
from collections.abc import Iterator
from functools import partial

import jax

import sxe
from sxe._backend import PLATFORMS
from sxe._call.options import IMPLEMENTATIONS, REDUCTIONS
from sxe._errors import ArgumentError
from sxe._plan.plan import Plan
from sxe._plan.work import INPUTS, TARGET_INPUTS, TILE_OPTIONS
from sxe._rows.rules import RULES
from sxe._tools.arguments import positive, size

RATES = ("flops_per_second", "bytes_per_second", "link_bytes_per_second")
DEFAULT_AXES = {"batch_axis_name": "data", "axis_name": "model"}  # where the mesh has them
OPTIONS = {"memory_bytes": "memory"}  # those that are not named as the argument of sxe.plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What sxe.linear_softmax_cross_entropy does for hidden states [rows, hidden] and a kernel "
        "[hidden, classes], or sxe.linear_kl_divergence with --target-hidden: how it gets the "
        "gradients, in how many chunks, with how many FLOPs and how much memory; and on a mesh "
        "what its devices exchange. Nothing is run."
    )
    parser.add_argument("--rows", type=size, required=True, help="N, of all devices")
    parser.add_argument("--hidden", type=size, required=True, help="D")
    parser.add_argument("--classes", type=size, required=True, help="K, of all devices")
    parser.add_argument(
        "--target-hidden", type=size, help="D' of a target, for a divergence (default: labels)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "float64"),
        default="float32",
        help="default: float32",
    )
    parser.add_argument(
        "--differentiate",
        nargs="*",
        choices=INPUTS + TARGET_INPUTS,
        default=INPUTS,
        help="what gets a gradient (default: hidden and kernel; none of them: the value alone)",
    )
    parser.add_argument("--reduction", choices=REDUCTIONS, default="mean")
    parser.add_argument("--rule", choices=tuple(RULES), default="vjp")
    parser.add_argument("--chunk-size", type=size, help="rows in a chunk, at most")
    parser.add_argument(
        "--options", nargs="*", choices=TILE_OPTIONS, default=(), help="options in use"
    )
    parser.add_argument(
        "--counting",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the rows, that count: the head runs no chunk without them (default: 1)",
    )
    parser.add_argument("--backend", choices=PLATFORMS, help="where it will run (default: as here)")
    parser.add_argument(
        "--implementation", choices=IMPLEMENTATIONS, help="of the functions of rows (default: xla)"
    )
    mesh = parser.add_argument_group("mesh")
    mesh.add_argument("--mesh", type=_mesh, help="devices along each axis, as data=64,model=8")
    mesh.add_argument(
        "--batch-axis-name", type=_names, help="axes that split the rows (default: data)"
    )
    mesh.add_argument("--axis-name", type=_names, help="and the classes (default: model)")
    mesh.add_argument("--fsdp", type=_names, help="and the rows of the kernel (default: none)")
    mesh.add_argument(
        "--memory",
        type=positive,
        metavar="BYTES",
        help="of a device: as few devices for the classes as the head needs to fit",
    )
    floor = parser.add_argument_group("time floor, for a device with all of")
    floor.add_argument("--flops-per-second", type=positive, help="of its matrix products")
    floor.add_argument("--bytes-per-second", type=positive, help="of its memory")
    floor.add_argument("--link-bytes-per-second", type=positive, help="that it can send to others")
    parser.set_defaults(run=partial(run, parser))


def _mesh(text: str) -> dict[str, int]:
    parts = [part.partition("=") for part in text.split(",")]
    sizes = {name: int(devices) for name, _, devices in parts if name and devices.isdecimal()}
    if len(sizes) != len(parts):
        raise argparse.ArgumentTypeError(f"expected data=64,model=8 or the like, got {text!r}")
    return sizes


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    rates = {name: given[name] for name in RATES if given[name] is not None}
    if rates and len(rates) < len(RATES):
        missing = next(name for name in RATES if name not in rates)
        parser.error(f"{_option(missing)}: expected as well; a time floor needs all three rates")
    axes = {name: given[name] for name in DEFAULT_AXES}
    for name, default in DEFAULT_AXES.items():
        if axes[name] is None and default in (arguments.mesh or {}):
            axes[name] = default
    try:
        plan = sxe.plan(
            arguments.rows,
            arguments.hidden,
            arguments.classes,
            arguments.dtype,
            differentiate=arguments.differentiate,
            reduction=arguments.reduction,
            rule=arguments.rule,
            chunk_size=arguments.chunk_size,
            target_hidden=arguments.target_hidden,
            options=arguments.options,
            counting=arguments.counting,
            backend=arguments.backend,
            implementation=arguments.implementation,
            mesh=arguments.mesh,
            fsdp=arguments.fsdp,
            memory_bytes=arguments.memory,
            **axes,
        )
    except ArgumentError as error:
        parser.error(f"{_option(error.argument)}: {error.message}")
    lines = list(_lines(plan, arguments.backend, rates))
    width = max(30, *(len(name) + 1 for name, _ in lines))
    for name, text in lines:
        print(f"{name:{width}}{text}")
    return 0


def _option(argument: str) -> str:
    """The option that gives this argument of sxe.plan, or of the plan's floor."""
    return "--" + OPTIONS.get(argument, argument).replace("_", "-")


def _lines(plan: Plan, backend: str | None, rates: dict[str, float]) -> Iterator[tuple[str, str]]:
    """What is printed: a name and a text in each line."""
    yield "backend", backend or f"{jax.default_backend()}, JAX {jax.__version__}"
    if plan.mesh:
        mesh = ", ".join(f"{name}={devices}" for name, devices in plan.mesh.items())
        yield "mesh", f"{mesh}: {math.prod(plan.mesh.values()):,} devices, for each of them:"
    padding = f", {plan.padding} of them padding in the last" if plan.padding else ""
    yield "functions of rows", f"by {plan.implementation}: {plan.reason}"
    yield "path", plan.path
    yield "chunks", f"{plan.chunks:,} of {plan.chunk_size:,} rows{padding}"
    if plan.rows_run < plan.chunks * plan.chunk_size:
        yield "rows that are run", f"{plan.rows_run:,}"
    yield "gradient of the logits", f"multiplied in {plan.gradient_dtype}"
    yield "matrix products", f"{plan.flops / 1e9:,.1f} GFLOP"
    yield "memory traffic, at least", _bytes(plan.traffic_bytes)
    yield "temporaries, about", _bytes(plan.temporary_bytes)
    for name, n in plan.terms.items():
        yield f"  {name}", _bytes(n)
    yield "peak, about", f"{_bytes(plan.peak_bytes)}, with arguments and results"
    if plan.kept_bytes:
        yield "kept for the backward pass", _bytes(plan.kept_bytes)
    yield "logits, if they existed", _bytes(plan.logits_bytes)
    yield "peak with logits, at least", _bytes(plan.logits_peak_bytes)
    for kind in dict.fromkeys(c.kind for c in plan.collectives):
        of_kind = [c for c in plan.collectives if c.kind == kind]
        yield kind, _bytes(sum(c.bytes for c in of_kind))
        for c in of_kind:
            yield f"  {c.of}", f"{_bytes(c.bytes)} among {c.devices}"
    if rates:
        floor = plan.floor(**rates)
        yield "time, at least", f"{1e3 * max(floor):,.2f} ms, the largest of these:"
        for name, seconds in floor._asdict().items():
            yield f"  {name}", f"{1e3 * seconds:,.2f} ms"


def _bytes(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB" if n >= 2**17 else f"{n:,} bytes"
