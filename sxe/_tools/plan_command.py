"""The command line of ``python -m sxe plan``, and the plan as text."""

import argparse
import math
from collections.abc import Iterator
from functools import partial

import jax

import sxe
from sxe._arrays import axis_names
from sxe._backend import PLATFORMS
from sxe._call.options import IMPLEMENTATIONS, REDUCTIONS
from sxe._errors import ArgumentError
from sxe._plan.result import Plan
from sxe._plan.work import INPUTS, TARGET_INPUTS, TILE_OPTIONS
from sxe._rows.rules import RULES
from sxe._tools.arguments import PROGRAM, positive, size

RATES = ("flops_per_second", "bytes_per_second", "link_bytes_per_second")
DEFAULT_AXES = {"batch_axis_name": "data", "axis_name": "model"}  # used if the mesh has them
OPTIONS = {"memory_bytes": "memory"}  # options whose name differs from the argument of sxe.plan
SUMMARY = (
    "Show how the head (the fused final linear layer and loss) runs for given sizes: its chunks, "
    "FLOPs and memory."
)
EXAMPLES = (
    (
        f"{PROGRAM} plan --rows 8192 --hidden 4096 --classes 128256 --dtype bfloat16",
        "Loss and gradients on one device.",
    ),
    (
        f"{PROGRAM} plan --rows 8192 --hidden 4096 --classes 128256 --target-hidden 8192",
        "The KL divergence from a teacher with a hidden size of 8192.",
    ),
    (
        f"{PROGRAM} plan --rows 1048576 --hidden 8192 --classes 262144 --dtype bfloat16 "
        "--backend gpu --mesh data=64,model=8 --fsdp data",
        "Loss and gradients for each of 512 GPUs, with the data that they exchange.",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show what sxe.linear_softmax_cross_entropy does for hidden states [rows, hidden] and a\n"
        "kernel [hidden, classes], or what sxe.linear_kl_divergence does if --target-hidden is\n"
        "given: how the gradients are computed, the number of chunks of rows, FLOPs and memory,\n"
        "and on a mesh the data that devices exchange. Nothing is run."
    )
    parser.add_argument(
        "--rows", type=size, required=True, metavar="N", help="number of rows, over all devices"
    )
    parser.add_argument(
        "--hidden", type=size, required=True, metavar="D", help="size of the hidden states"
    )
    parser.add_argument(
        "--classes",
        type=size,
        required=True,
        metavar="K",
        help="number of classes, over all devices",
    )
    parser.add_argument(
        "--target-hidden",
        type=size,
        metavar="D",
        help="size of the target's hidden states, for a KL divergence (default: a loss of labels)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "float64"),
        default="float32",
        help="dtype of hidden states and kernel (default: float32)",
    )
    parser.add_argument(
        "--differentiate",
        nargs="*",
        choices=INPUTS + TARGET_INPUTS,
        default=INPUTS,
        help="inputs that get a gradient (default: hidden kernel; no names: only the value)",
    )
    parser.add_argument(
        "--reduction",
        choices=REDUCTIONS,
        default="mean",
        help="reduction over the rows (default: mean)",
    )
    parser.add_argument(
        "--rule",
        choices=tuple(RULES),
        default="vjp",
        help="differentiation rule of the loss (default: vjp)",
    )
    parser.add_argument(
        "--chunk-size",
        type=size,
        metavar="ROWS",
        help="largest number of rows in a chunk (default: chosen for the sizes and the backend)",
    )
    parser.add_argument(
        "--options",
        nargs="*",
        choices=TILE_OPTIONS,
        default=(),
        help="options of the loss that are used (default: none)",
    )
    parser.add_argument(
        "--counting",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the rows that count: not masked out, not ignored, weight not 0; "
        "chunks without such rows are skipped (default: 1)",
    )
    parser.add_argument(
        "--backend", choices=PLATFORMS, help="platform to plan for (default: the one found here)"
    )
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        help="implementation of the row functions (default: xla)",
    )
    mesh = parser.add_argument_group("mesh")
    mesh.add_argument(
        "--mesh",
        type=_mesh,
        metavar="AXES",
        help="number of devices along each axis, such as data=64,model=8 (default: one device)",
    )
    mesh.add_argument(
        "--batch-axis-name",
        type=_names,
        metavar="NAMES",
        help="axes over which the rows are sharded (default: data, if the mesh has it)",
    )
    mesh.add_argument(
        "--axis-name",
        type=_names,
        metavar="NAMES",
        help="axes over which the classes are sharded (default: model, if the mesh has it)",
    )
    mesh.add_argument(
        "--fsdp",
        type=_names,
        metavar="NAMES",
        help="axes over which the first dimension of the kernel is sharded (default: none)",
    )
    mesh.add_argument(
        "--memory",
        type=positive,
        metavar="BYTES",
        help="memory of a device: shard the classes over as few devices as fit into it "
        "(default: keep the mesh as given)",
    )
    rates = parser.add_argument_group(
        "lower bound of the time", "For a device with these rates. All three are required."
    )
    for option, help_ in (
        ("--flops-per-second", "FLOPs per second of matrix products"),
        ("--bytes-per-second", "bytes per second that its memory reads and writes"),
        ("--link-bytes-per-second", "bytes per second that it sends to other devices"),
    ):
        rates.add_argument(option, type=positive, metavar="RATE", help=help_)
    parser.set_defaults(run=partial(run, parser))


def _mesh(text: str) -> dict[str, int]:
    parts = [part.partition("=") for part in text.split(",")]
    sizes = {name: int(devices) for name, _, devices in parts if name and devices.isdecimal()}
    if len(sizes) != len(parts):
        raise argparse.ArgumentTypeError(f"expected axes such as data=64,model=8, got {text!r}")
    return sizes


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    rates = {name: given[name] for name in RATES if given[name] is not None}
    if rates and len(rates) < len(RATES):
        missing = next(name for name in RATES if name not in rates)
        parser.error(
            f"{_option(missing)}: expected too: the bound of the time needs all three rates"
        )
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
    named = [*axis_names(axes["batch_axis_name"]), *axis_names(axes["axis_name"])]
    if unnamed := sorted(set(arguments.mesh or {}) - set(named)):
        parser.error(
            f"--mesh: expected axes that shard rows or classes, got {unnamed[0]!r}; name it with "
            "--batch-axis-name or --axis-name"
        )
    lines = list(_lines(plan, arguments.backend, rates))
    width = max(30, *(len(name) + 1 for name, _ in lines))
    for name, text in lines:
        print(f"{name:{width}}{text}")
    return 0


def _option(argument: str) -> str:
    """The option that sets this argument of `sxe.plan` or `sxe.Plan.floor`."""
    return "--" + OPTIONS.get(argument, argument).replace("_", "-")


def _lines(plan: Plan, backend: str | None, rates: dict[str, float]) -> Iterator[tuple[str, str]]:
    """The printed lines, each as a name and a text."""
    yield "backend", backend or f"{jax.default_backend()}, JAX {jax.__version__}"
    if plan.mesh:
        mesh = ", ".join(f"{name}={devices}" for name, devices in plan.mesh.items())
        yield "mesh", f"{mesh}: {math.prod(plan.mesh.values()):,} devices; per device:"
    padding = f", with {plan.padding} rows of padding in the last chunk" if plan.padding else ""
    yield "row functions", f"by {plan.implementation}: {plan.reason}"
    yield "path", plan.path
    yield "chunks", f"{plan.chunks:,} of {plan.chunk_size:,} rows{padding}"
    if plan.rows_run < plan.chunks * plan.chunk_size:
        yield "rows computed", f"{plan.rows_run:,}"
    yield "gradient of the logits", f"multiplied in {plan.gradient_dtype}"
    yield "matrix products", f"{plan.flops / 1e9:,.1f} GFLOP"
    yield "memory traffic, at least", _bytes(plan.traffic_bytes)
    yield "temporaries, about", _bytes(plan.temporary_bytes)
    for name, n in plan.terms.items():
        yield f"  {name}", _bytes(n)
    yield "peak, about", f"{_bytes(plan.peak_bytes)}, including arguments and results"
    if plan.kept_bytes:
        yield "kept for the backward pass", _bytes(plan.kept_bytes)
    yield "all logits, for comparison", _bytes(plan.logits_bytes)
    yield "peak with logits, at least", _bytes(plan.logits_peak_bytes)
    for kind in dict.fromkeys(c.kind for c in plan.collectives):
        of_kind = [c for c in plan.collectives if c.kind == kind]
        yield kind, _bytes(sum(c.bytes for c in of_kind))
        for c in of_kind:
            yield f"  {c.of}", f"{_bytes(c.bytes)} among {c.devices}"
    if rates:
        floor = plan.floor(**rates)
        yield "time, at least", f"{1e3 * max(floor):,.2f} ms, the largest of:"
        for name, seconds in floor._asdict().items():
            yield f"  {name}", f"{1e3 * seconds:,.2f} ms"


def _bytes(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB" if n >= 2**17 else f"{n:,} bytes"
