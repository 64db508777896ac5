"""Programs for accelerators that are not present: how they are traced, and how XLA compiles them.

The compiler for TPUs needs no TPU, only `pip install libtpu`. Compiled programs do not run here.
"""

import functools
import os
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from jax import export
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sxe

MIB = 2**20
N, D, K = 65536, 4096, 128256

LOSSES = (sxe.softmax_cross_entropy, sxe.linear_softmax_cross_entropy)


def abstract_mesh(platform, *sizes):
    device = AbstractDevice(device_kind="some", num_cores=None, platform=platform)
    names = ("data", "model")[: len(sizes)]
    kinds = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(sizes, names, axis_types=kinds, abstract_device=device)


@pytest.fixture
def host_of_one(monkeypatch):
    """A process with one device. Its programs loop over blocks of rows."""
    monkeypatch.setattr("sxe._backend.device_count", lambda: 1)
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_a_program_for_an_accelerator_has_nothing_that_serves_a_cpu():
    """There is no barrier between passes, and products for gradients are in bfloat16, too."""
    shapes = [((64, 5000), "float32"), ((64, 16), "bfloat16"), ((16, 5000), "bfloat16")]
    logits, hidden, kernel = (jax.ShapeDtypeStruct(*each) for each in shapes)
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)

    def text():
        of_logits = jax.jit(jax.value_and_grad(LOSSES[0])).trace(logits, labels)
        of_head = jax.jit(jax.value_and_grad(LOSSES[1], (0, 1))).trace(hidden, kernel, labels)
        programs = (each.lower(lowering_platforms=("tpu",)) for each in (of_logits, of_head))
        return "".join(each.as_text() for each in programs)

    def serves_a_cpu(text):
        products = re.findall(r"stablehlo.dot_general.*: \((.*)\) ->", text)
        assert len(products) == 3
        wide = [each for each in products if "xf32>" in each]
        return "optimization_barrier" in text, bool(wide)

    assert serves_a_cpu(text()) == (True, True)
    with jax.sharding.use_abstract_mesh(abstract_mesh("tpu", 1)):
        assert serves_a_cpu(text()) == (False, False)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_export_for_the_devices_of_an_abstract_mesh(host_of_one, platform):
    shapes = [((4096, 50257), jnp.bfloat16), ((4096,), jnp.int32)]
    shapes = [jax.ShapeDtypeStruct(*each) for each in shapes]
    f = jax.jit(jax.value_and_grad(sxe.softmax_cross_entropy))
    with jax.sharding.use_abstract_mesh(abstract_mesh(platform, 1)):
        exported = export.export(f, platforms=[platform])(*shapes)
    again = export.deserialize(exported.serialize())
    assert (again.platforms, again.nr_devices) == ((platform,), 1)
    loops = [op for op in ("while", "case", "barrier") if op in exported.mlir_module()]
    assert loops == []


# What XLA compiles for a TPU


@pytest.fixture(scope="module")
def devices():
    """16 virtual TPU v5e. Without libtpu, skip, or fail if SXE_TPU says that it is required."""
    if find_spec("libtpu") is None:
        reason = "libtpu is not installed: pip install libtpu"
        if os.environ.get("SXE_TPU") == "required":
            pytest.fail(f"SXE_TPU=required, but {reason}")
        pytest.skip(reason)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask whether this is a TPU's host
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no process uses a TPU
    return np.array(topologies.get_topology_desc("v5e:4x4", "tpu").devices)


def compiled(f, mesh, *arguments):
    """Compile f for these shapes, dtypes and partition specs."""
    structs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
        for shape, dtype, spec in arguments
    ]
    return jax.jit(f).lower(*structs).compile()


def one_device(devices):
    return Mesh(devices[:1], ("data",), axis_types=(AxisType.Auto,))


def of_logits(rows, classes, dtype, batch=None, model=None):
    return ((rows, classes), dtype, (batch, model)), ((rows,), "int32", (batch,))


def of_head(rows, hidden, classes, dtype, batch=None, model=None, fsdp=None):
    return (
        ((rows, hidden), dtype, (batch,)),
        ((hidden, classes), dtype, (fsdp, model)),
        ((rows,), "int32", (batch,)),
    )


def temporaries(program):
    """Older libtpu allocates a chunk's logits twice, or the kernel's gradient in its result."""
    libtpu = version("libtpu")
    if tuple(int(n) for n in libtpu.split(".")[:3]) < (0, 0, 51):
        pytest.skip(f"libtpu {libtpu} allocates otherwise than 0.0.51 and newer ones")
    return program.memory_analysis().temp_size_in_bytes


OPTIONS = {
    "where": np.arange(24) % 3 > 0,
    "weights": np.linspace(0, 2, 24, dtype=np.float32),
    "class_weights": np.linspace(0.5, 2, 40, dtype=np.float32),
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "ignore_index": 3,
    "return_metrics": True,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", ["vjp", "jvp", "autodiff"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_every_option_compiles(devices, loss, rule, dtype):
    shapes = of_logits(24, 40, dtype) if loss is LOSSES[0] else of_head(24, 8, 40, dtype)
    f = functools.partial(loss, rule=rule, **OPTIONS)
    compiled(jax.value_and_grad(f, has_aux=True), one_device(devices), *shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "classes"), [(8192, 32000), (65536, 1000)])
def test_logits_are_read_and_their_gradient_is_written(devices, rows, classes, dtype):
    """There is no array of their size in between."""
    f = jax.value_and_grad(sxe.softmax_cross_entropy)
    program = compiled(f, one_device(devices), *of_logits(rows, classes, dtype))
    assert program.memory_analysis().temp_size_in_bytes < MIB


@pytest.mark.parametrize(
    ("sizes", "dtype", "options"),
    [
        ((8192, 4096, 128256), "bfloat16", {}),
        ((8192, 4096, 128256), "bfloat16", {"softcap": 30.0}),
        ((8192, 4096, 128256), "float32", {}),
        ((8192, 4096, 128256), "bfloat16", {"reduction": "none"}),
        ((32768, 2560, 128256), "bfloat16", {"label_smoothing": 0.1}),
    ],
)
def test_temporaries_of_the_head_are_those_of_its_plan(devices, sizes, dtype, options):
    def loss(*arguments):
        return jnp.sum(sxe.linear_softmax_cross_entropy(*arguments, **options))

    f = jax.value_and_grad(loss, (0, 1))
    program = compiled(f, one_device(devices), *of_head(*sizes, dtype))
    reduction = options.get("reduction", "mean")
    names = tuple(options.keys() - {"reduction"})
    plan = sxe.plan(*sizes, dtype, reduction=reduction, options=names, backend="tpu")
    assert temporaries(program) == pytest.approx(plan.temporary_bytes, rel=0.1)


MESHES = {
    "rows and classes": ((4, 4), None, "bfloat16"),
    "rows": ((16, 1), None, "float32"),
    "rows, and the kernel's too": ((16, 1), "data", "bfloat16"),
    "classes": ((1, 16), None, "bfloat16"),
    "rows and classes, and the kernel's rows": ((4, 4), "data", "bfloat16"),
}


@pytest.mark.parametrize(("split", "fsdp", "dtype"), MESHES.values(), ids=MESHES)
def test_a_mesh_moves_what_the_plan_says(devices, split, fsdp, dtype):
    mesh = Mesh(devices.reshape(split), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    axes = {"batch": "data", "classes": "model", "fsdp": fsdp}
    loss = sxe.over_mesh(sxe.linear_softmax_cross_entropy, mesh, **axes)
    shapes = of_head(N, D, K, dtype, "data", "model", fsdp)
    program = compiled(jax.value_and_grad(loss, (0, 1)), mesh, *shapes)
    plan = sxe.plan(
        *(N, D, K, dtype),
        mesh=dict(zip(("data", "model"), split, strict=True)),
        batch_axis_name="data",
        axis_name="model",
        fsdp=fsdp,
        backend="tpu",
    )
    found = collectives(program.as_text())
    assert sum(c.bytes for c in found) <= sum(c.bytes for c in plan.collectives) * 1.01
    kinds = {c.opcode for c in found if c.size > N}
    assert kinds <= {c.kind for c in plan.collectives}
    assert temporaries(program) == pytest.approx(plan.temporary_bytes, rel=0.1)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("around", [True, False], ids=["set_mesh", "by its arguments"])
def test_jit_on_a_mesh_moves_neither_logits_nor_kernel(devices, host_of_one, kind, around):
    """A program for the devices of this host would gather the kernel in every chunk."""
    mesh = Mesh(devices.reshape(4, 4), ("data", "model"), axis_types=(kind,) * 2)
    logits = of_logits(16384, K, "bfloat16", "data", "model")
    head = of_head(N, D, K, "bfloat16", "data", "model")

    def moved(loss, shapes, gradients):
        f = jax.value_and_grad(loss, gradients)
        if not around:
            return collectives(compiled(f, mesh, *shapes).as_text())
        with jax.set_mesh(mesh):
            return collectives(compiled(f, mesh, *shapes).as_text())

    of_a_head = moved(sxe.linear_softmax_cross_entropy, head, (0, 1))
    assert {c.opcode for c in of_a_head} == {"all-reduce"}
    most = max(N // 4 * D, D * K // 4)  # the gradients of hidden and kernel, once
    assert max(c.size for c in of_a_head) <= most
    if around or kind == AxisType.Auto:  # on an Explicit mesh, the loss requires set_mesh
        of_logits_ = moved(sxe.softmax_cross_entropy, logits, 0)
        assert max(c.size for c in of_logits_) <= 16384 // 4


@pytest.mark.parametrize(
    ("dtype", "precision", "operands"),
    [
        ("float32", None, "highest"),
        ("float32", "bfloat16", None),
        ("bfloat16", None, None),
    ],
)
def test_float32_is_multiplied_as_float32(devices, dtype, precision, operands):
    f = jax.value_and_grad(sxe.linear_softmax_cross_entropy, (0, 1))
    with jax.default_matmul_precision(precision):
        program = compiled(f, one_device(devices), *of_head(512, 256, 4096, dtype))
    products = [line for line in program.as_text().splitlines() if " convolution(" in line]
    assert len(products) >= 3
    asked = f"operand_precision={{{operands},{operands}}}"
    assert all((asked in line) == (operands is not None) for line in products)


def test_the_example(devices):
    path = fresh.ROOT / "examples" / "compile_for_tpu.py"
    paths = (fresh.ROOT, Path(find_spec("libtpu").origin).parents[1])
    found = {"PYTHONPATH": os.pathsep.join(map(os.fspath, paths))}
    output = fresh.run(path, **found)
    rows = re.findall(r"^(sxe|as planned|optax).*? ([\d,]+) +([\d,]+)$", output, re.MULTILINE)
    sizes = {name: [int(n.replace(",", "")) for n in pair] for name, *pair in rows}
    assert sizes.keys() == {"sxe", "as planned", "optax"}
    assert all(a < b for a, b in zip(sizes["sxe"], sizes["optax"], strict=True))
