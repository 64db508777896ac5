"""Compile the loss of a language model for a TPU pod, without a TPU, and print the memory it needs.

    pip install libtpu tabulate
    python examples/compile_for_tpu.py --topology v5e:4x4 --mesh data=4,model=4

JAX compiles for any topology that its TPU compiler knows, such as v4:2x2x4, v5e:8x16, v5p:2x2x2 or
v6e:4x4. The script compiles the value and gradients of one loss twice. One program uses sxe's head,
which takes hidden states and the kernel of the last layer. The other computes the logits and uses
optax's loss. The table shows the memory that the compiled programs allocate, in MiB per device, and
the memory that `sxe.plan` predicts. No program is run, so the script takes seconds. If a program
needs more memory than a device has, the compiler raises an error. XLA does not count arrays in a
TPU's vector memory as temporaries, so for small arrays the plan predicts more than is allocated.
"""

import argparse
import math
import os
from importlib.metadata import version
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tabulate import tabulate

import sxe


def devices_of(topology):
    if find_spec("libtpu") is None:
        raise SystemExit("libtpu is not installed: pip install libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not query whether this host has TPUs
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # this process uses no TPU
    return np.array(topologies.get_topology_desc(topology, "tpu").devices)


def make_mesh(devices, axes):
    """A mesh of all devices, from axes such as "data=4,model=4"."""
    sizes = {name: int(size) for name, _, size in (each.partition("=") for each in axes.split(","))}
    if sizes.keys() != {"data", "model"} or math.prod(sizes.values()) != devices.size:
        raise SystemExit(
            f"--mesh: expected axes data and model over {devices.size} devices, got {axes}"
        )
    kinds = (AxisType.Auto,) * 2
    return Mesh(devices.reshape(list(sizes.values())), tuple(sizes), axis_types=kinds)


def optax_loss(hidden, kernel, labels):
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)  # as in sxe's head
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def compile_loss(loss, mesh, args):
    """Compile value and gradients, with the shardings that the arrays of a training step have."""
    fsdp = "data" if args.fsdp else None
    shapes = [
        ((args.rows, args.hidden), args.dtype, P("data")),
        ((args.hidden, args.classes), args.dtype, P(fsdp, "model")),
        ((args.rows,), "int32", P("data")),
    ]
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in shapes
    ]
    # Gradients have the shardings of their parameters.
    outputs = (NamedSharding(mesh, P()), tuple(x.sharding for x in inputs[:2]))
    f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=outputs)
    return f.lower(*inputs).compile()


def memory(program):
    """The bytes of arguments, results and temporaries, and their sum."""
    m = program.memory_analysis()
    parts = [m.argument_size_in_bytes, m.output_size_in_bytes, m.temp_size_in_bytes]
    return [*parts, sum(parts)]


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:4x4", help="default: %(default)s")
    parser.add_argument("--mesh", default="data=4,model=4", help="default: %(default)s")
    parser.add_argument("--fsdp", action="store_true", help="shard the hidden axis over data")
    parser.add_argument("--rows", type=int, default=65536, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--classes", type=int, default=128256, help="default: %(default)s")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    jax.config.update("jax_platforms", "cpu")  # this process runs on the CPU
    mesh = make_mesh(devices_of(args.topology), args.mesh)
    fsdp = "data" if args.fsdp else None
    head = sxe.over_mesh(
        sxe.linear_softmax_cross_entropy, mesh, batch="data", classes="model", fsdp=fsdp
    )
    plan = sxe.plan(
        *(args.rows, args.hidden, args.classes, args.dtype),
        mesh=dict(mesh.shape),
        batch_axis_name="data",
        axis_name="model",
        fsdp=fsdp,
        backend="tpu",
    )
    rows = [
        ["sxe", *memory(compile_loss(head, mesh, args))],
        ["  as planned", None, None, plan.temporary_bytes, plan.peak_bytes],
        ["optax, on logits", *memory(compile_loss(optax_loss, mesh, args))],
    ]
    versions = f"JAX {jax.__version__}, libtpu {version('libtpu')}"
    print(f"{args.topology}, {args.mesh}, {args.dtype}, {versions}; MiB on each device")
    table = [[name, *(n and n / 2**20 for n in numbers)] for name, *numbers in rows]
    headers = ["", "arguments", "results", "temporaries", "peak"]
    print(tabulate(table, headers, floatfmt=",.0f"))


if __name__ == "__main__":
    main()
