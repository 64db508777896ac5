"""Programs compiled for an H100 by the compilers of XLA and Pallas, without a GPU.

The tests need JAX's CUDA plugin: see contributing.md. They do not run what they compile.
"""

import functools
import os
import re
from importlib.util import find_spec
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Pass, passes
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sxe
from sxe._rows import gpu_gradient, gpu_state


def missing():
    """What the tests need and this environment lacks, or None."""
    if not any(map(find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        return "JAX's CUDA plugin is not installed: pip install 'jax[cuda13]'"
    if jax.__version_info__ < (0, 11, 2):
        return f"JAX is older than 0.11.2: {jax.__version__}"
    return None


if reason := missing():
    if os.environ.get("SXE_CUDA") == "required":
        raise RuntimeError(f"SXE_CUDA=required, but {reason}")
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.cuda

N = 1024
KERNEL = "mosaic_gpu_v2"  # the target of the custom call of a row kernel

# The description of the GPU for the compiler.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  device_memory_size: 84929347584
  memory_bandwidth: 3352320000000
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Autotuning needs a GPU. The other options undo what conftest.py sets for a CPU.
COMPILER_OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}

kernel_loss = functools.partial(sxe.softmax_cross_entropy, implementation="mosaic_gpu")
kernel_gradient = functools.partial(
    sxe.softmax_cross_entropy_with_gradient, implementation="mosaic_gpu"
)


@pytest.fixture(scope="module")
def sharding():
    """The sharding of arrays on one H100."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="H100", topology="1x1x1", target_config=H100
    )
    mesh = Mesh(np.array(topology.devices), ("data",), axis_types=(AxisType.Auto,))
    with pytest.MonkeyPatch.context() as patch:
        # As in a process with a single GPU, which holds all arrays whole.
        patch.setattr("sxe._backend.device_count", lambda: 1)
        jax.clear_caches()
        yield NamedSharding(mesh, P())


@pytest.fixture
def compiled(sharding):
    """A function that compiles a program for arguments of the given shapes and dtypes."""

    def compile_(f, *arguments):
        structs = [jax.ShapeDtypeStruct(*each, sharding=sharding) for each in arguments]
        return jax.jit(f).lower(*structs).compile(compiler_options=COMPILER_OPTIONS)

    return compile_


def of_logits(classes, dtype):
    return ((N, classes), dtype), ((N,), "int32")


class Assembled(NamedTuple):
    """The report of ptxas, the last compiler, on one kernel."""

    architecture: str
    stack_bytes: int
    store_bytes: int
    load_bytes: int
    registers: int


def assembled(report):
    """The ``Assembled`` of each Pallas kernel that ptxas has compiled."""
    pattern = (
        r"Compiling entry function '\w+' for '(\w+)'\n(?s:.*?)"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers"
    )
    return [Assembled(name, *map(int, rest)) for name, *rest in re.findall(pattern, report)]


def row_terms(labels, **targets):
    ones = jnp.ones(len(labels))
    return gpu_gradient.RowTerms(labels, ones > 0, ones, ones, **targets)


def by_kernel(logits, dense, terms, d_dtype=None):
    return gpu_gradient.state_and_gradient(
        logits, dense, terms, d_dtype=d_dtype or logits.dtype, cores=132
    )


def kernel_alone(logits, labels):
    return by_kernel(logits, None, row_terms(labels))


def narrowing(logits, labels):
    return by_kernel(logits, None, row_terms(labels), "bfloat16")


def smoothed(logits, labels, d_dtype=None):
    terms = row_terms(labels, label_target=jnp.full(N, 0.9), uniform=jnp.full(N, 1e-4))
    return by_kernel(logits, None, terms, d_dtype)


def with_targets(dtype, rows=N, d_dtype=None):
    """The kernel with an array of dense targets of this dtype and this number of rows."""

    def f(logits, labels):
        dense = jnp.ones((rows, logits.shape[1]), dtype)
        return by_kernel(logits, dense, row_terms(labels, label_target=jnp.ones(N)), d_dtype)

    return f


def state_alone(logits, labels):
    return gpu_state.state(logits, cores=132)


FUNCTIONS = {
    "the kernel": kernel_alone,
    "value_and_grad": jax.value_and_grad(kernel_loss),
    "with_gradient": kernel_gradient,
}
DTYPES = ("bfloat16", "float16", "float32")
SERVED = [(f, t) for f in FUNCTIONS for t in DTYPES if (f, t) != ("value_and_grad", "float16")]
LONG = (1032, 32000, 131072)
KERNELS = [
    *((FUNCTIONS[f], t, k) for f, t in SERVED for k in (8, 1000, 1024, *LONG)),
    *((narrowing, "float32", k) for k in LONG),
    *((smoothed, t, k) for t in DTYPES for k in (8, 1000, 1024, *LONG)),
    *((functools.partial(smoothed, d_dtype="bfloat16"), "float32", k) for k in LONG),
    *(
        (with_targets(of), t, k)
        for of in ("float32", "bfloat16")
        for t in DTYPES
        for k in (8, 1000, 1024, 1032, 50264, 131072)
    ),
    *((with_targets("float32", 1), "bfloat16", k) for k in (1000, 32000)),
    *((with_targets("float32", 1, "bfloat16"), "float32", k) for k in LONG),
    *((state_alone, t, k) for t in DTYPES for k in (1000, 50257, 131072)),
]


@pytest.mark.parametrize(("function", "dtype", "classes"), KERNELS)
def test_kernels_stay_in_registers(compiled, capfd, monkeypatch, function, dtype, classes):
    """A multiprocessor has 65,536 registers, for the 384 or 512 threads of a program.

    Values that do not fit into a thread's registers would be written to memory and read again.
    """
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    launches = []
    for module in (gpu_gradient, gpu_state):

        def run(*args, groups=1, run=module.run, **options):
            launches.append((groups, *options["grid"].values()))
            return run(*args, groups=groups, **options)

        monkeypatch.setattr(module, "run", run)
    jax.clear_caches()
    compiled(function, *of_logits(classes, dtype))
    report = capfd.readouterr().out
    found = assembled(report)
    assert len(found) == 1, f"expected the report of one kernel, got {report!r}"
    assert found[0][:4] == ("sm_90a", 0, 0, 0)
    # For a differentiated loss, JAX first traces the value alone. The last launch is compiled.
    groups, *grid = launches[-1]
    programs = 1 if len(grid) > 1 else -(-grid[0] // 132)  # per core, for the gradient kernel
    assert 0 < programs * groups * 128 * found[0].registers <= 65536
    if function is kernel_alone and classes in (1032, 32000):
        # The number of programs that share a multiprocessor, and of their warpgroups.
        assert (programs, groups) == ((2, 3) if classes == 1032 or dtype != "float32" else (1, 4))


# The number of reads and writes of arrays with as many elements as the logits

IN_XLA = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def logits_passes(program, classes):
    return passes(program.as_text(), N * classes)


@pytest.mark.parametrize("classes", [1000, 32000])
@pytest.mark.parametrize(("function", "dtype"), SERVED)
def test_the_row_kernel_alone_touches_logits(compiled, function, dtype, classes):
    """It reads the logits once, and writes the gradient once, in their dtype."""
    program = compiled(FUNCTIONS[function], *of_logits(classes, dtype))
    once = (IN_XLA[dtype],)
    assert logits_passes(program, classes) == [Pass(KERNEL, once, once)]


OPTIONS = {
    "where": np.arange(N) % 3 > 0,
    "class_weights": np.linspace(0.5, 2, 1000, dtype=np.float32),
    "ignore_index": 3,
    "reduction": "sum",
    "z_loss": 1e-4,
    "label_smoothing": 0.1,
    "weights": np.arange(N, dtype=np.float32),
}


@pytest.mark.parametrize("option", [*OPTIONS, "label_smoothing class_weights"])
def test_the_row_kernel_alone_touches_logits_with_an_option(compiled, option):
    options = {name: OPTIONS[name] for name in option.split()}
    f = jax.value_and_grad(functools.partial(kernel_loss, **options))
    program = compiled(f, *of_logits(1000, "bfloat16"))
    assert logits_passes(program, 1000) == [Pass(KERNEL, ("bf16",), ("bf16",))]


@pytest.mark.parametrize("option", ["", "label_smoothing"])
@pytest.mark.parametrize("classes", [1032, 32000])
def test_long_rows_with_targets_of_classes(compiled, classes, option):
    options = {name: OPTIONS[name] for name in option.split()}
    class_weights = np.linspace(0.5, 2, classes, dtype=np.float32)
    f = jax.value_and_grad(functools.partial(kernel_loss, class_weights=class_weights, **options))
    program = compiled(f, *of_logits(classes, "bfloat16"))
    assert logits_passes(program, classes) == [Pass(KERNEL, ("bf16",), ("bf16",))]


@pytest.mark.parametrize("option", ["", "where", "z_loss"])
@pytest.mark.parametrize(("dtype", "in_xla"), [("float32", "f32"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("classes", [1000, 32000])
def test_dense_targets_are_read_once(compiled, classes, dtype, in_xla, option):
    """They are read in their own dtype, without a widened or masked copy."""
    options = {name: OPTIONS[name] for name in option.split()}
    f = jax.value_and_grad(functools.partial(kernel_loss, **options))
    program = compiled(f, ((N, classes), "bfloat16"), ((N, classes), dtype))
    assert logits_passes(program, classes) == [Pass(KERNEL, ("bf16", in_xla), ("bf16",))]


def single_rows(f):
    def loss(logits, labels):
        return jnp.sum(f(logits, labels, reduction="none") ** 2)

    return jax.grad(loss)


STATE_FIRST = [
    (single_rows(kernel_loss), 1000, "bfloat16"),
    (jax.value_and_grad(kernel_loss), 1001, "bfloat16"),
    (jax.value_and_grad(kernel_loss), 1000, "float16"),
]


@pytest.mark.parametrize(("f", "classes", "dtype"), STATE_FIRST)
def test_what_the_state_kernel_leaves_to_xla(compiled, f, classes, dtype):
    """The state kernel reads the logits once. XLA computes the gradient in one more pass."""
    once = (IN_XLA[dtype],)
    program = compiled(f, *of_logits(classes, dtype))
    assert logits_passes(program, classes) == [
        Pass(KERNEL, once, ()),
        Pass("fusion", once, once),
    ]


def scaled(logits, labels):
    return jax.value_and_grad(lambda x: 0.7 * kernel_loss(x, labels))(logits)


def scaled_by(logits, labels, scale):
    return jax.value_and_grad(lambda x: scale * kernel_loss(x, labels))(logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("f", "more"), [(scaled, []), (scaled_by, [((), "float32")])])
def test_another_cotangent_takes_one_more_pass(compiled, f, more, dtype):
    """The kernel writes the gradient for a cotangent of 1, which is then scaled."""
    program = compiled(f, *of_logits(1000, dtype), *more)
    once = (IN_XLA[dtype],)
    expected = [Pass(KERNEL, once, once), Pass("fusion", once, once)]
    assert logits_passes(program, 1000) == expected


BY_XLA = {
    "value_and_grad": jax.value_and_grad(sxe.softmax_cross_entropy),
    "implementation xla": jax.value_and_grad(
        functools.partial(sxe.softmax_cross_entropy, implementation="xla")
    ),
    "with_gradient": sxe.softmax_cross_entropy_with_gradient,
}


@pytest.mark.parametrize("classes", [1000, 32000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", BY_XLA)
def test_xla_reads_logits_three_times(compiled, function, dtype, classes):
    """For the maximum, for both sums of exponentials, and for the gradient."""
    program = compiled(BY_XLA[function], *of_logits(classes, dtype))
    once = (IN_XLA[dtype],)
    reading = Pass("fusion", once, ())
    assert logits_passes(program, classes) == [reading, reading, Pass("fusion", once, once)]


def of_head(rows, hidden, classes, dtype):
    return ((rows, hidden), dtype), ((hidden, classes), dtype), ((rows,), "int32")


@pytest.mark.parametrize(("dtype", "gradient"), [("bfloat16", "bf16"), ("float32", "f32")])
@pytest.mark.parametrize("option", [{}, {"label_smoothing": 0.1}], ids=["label", "smoothing"])
def test_how_often_the_head_reads_the_logits_of_a_chunk(compiled, dtype, gradient, option):
    """For the maximum, for the sums, for the cost of the targets, and for the gradient.

    Two matrix products read the gradient.
    """
    sizes = (4096, 384, 32768)
    plan = sxe.plan(*sizes, dtype, backend="gpu", options=tuple(option))
    assert plan.chunks > 1
    loss = functools.partial(sxe.linear_softmax_cross_entropy, **option)
    program = compiled(jax.value_and_grad(loss, (0, 1)), *of_head(*sizes, dtype))
    reading, multiplied = Pass("fusion", ("f32",), ()), Pass("fusion", (gradient,), ())
    assert passes(program.as_text(), plan.chunk_size * sizes[2]) == [
        Pass("fusion", (), ("f32",)),
        *(2 + len(option)) * [reading],
        Pass("fusion", ("f32",), (gradient,)),
        *(multiplied, multiplied),
    ]
    assert ("four times" if option else "three times") in plan.reason


@pytest.mark.parametrize(("dtype", "gradient"), [("bfloat16", "bf16"), ("float32", "f32")])
@pytest.mark.parametrize(
    "option",
    [
        {},
        {"ignore_index": 3, "z_loss": 1e-4},
        {"weights": np.arange(4096, dtype=np.float32)},
        {"label_smoothing": 0.1, "ignore_index": 3},
        {"label_smoothing": 0.1, "class_weights": np.linspace(0.5, 2, 32768, dtype=np.float32)},
    ],
    ids=" ".join,
)
def test_the_kernel_reads_the_logits_of_a_chunk_once(compiled, dtype, gradient, option):
    """It writes the gradient of the logits in the dtype of the matrix products."""
    sizes = (4096, 384, 32768)
    chunk_size = sxe.plan(*sizes, dtype, backend="gpu").chunk_size
    loss = functools.partial(
        sxe.linear_softmax_cross_entropy, implementation="mosaic_gpu", **option
    )
    program = compiled(jax.value_and_grad(loss, (0, 1)), *of_head(*sizes, dtype))
    multiplied = Pass("fusion", (gradient,), ())
    assert passes(program.as_text(), chunk_size * sizes[2]) == [
        Pass("fusion", (), ("f32",)),
        Pass(KERNEL, ("f32",), (gradient,)),
        *(multiplied, multiplied),
    ]


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize(
    ("sizes", "dtype", "options"),
    [
        ((4096, 384, 32768), "bfloat16", {}),
        ((4096, 384, 32768), "bfloat16", {"label_smoothing": 0.1}),
        ((4096, 384, 32768), "bfloat16", {"reduction": "none"}),
        ((4096, 384, 32768), "bfloat16", {"softcap": 30.0}),
        ((4096, 1024, 32768), "float32", {}),
        ((8192, 1024, 50264), "bfloat16", {}),
    ],
)
def test_temporaries_of_the_head_are_those_of_its_plan(
    compiled, sizes, dtype, options, implementation
):
    chosen = {"implementation": implementation}

    def loss(*arguments):
        return jnp.sum(sxe.linear_softmax_cross_entropy(*arguments, **options, **chosen))

    program = compiled(jax.value_and_grad(loss, (0, 1)), *of_head(*sizes, dtype))
    shared = {"reduction": options.get("reduction", "mean"), "backend": "gpu"} | chosen
    plan = sxe.plan(*sizes, dtype, options=tuple(options.keys() - {"reduction"}), **shared)
    found = program.memory_analysis().temp_size_in_bytes
    assert found == pytest.approx(plan.temporary_bytes, rel=0.05)


# Derivatives of the kernel's results


def tangent_of_gradient(logits, labels, v):
    """The gradient by the kernel, and its tangent along v by XLA and the state kernel."""
    return jax.jvp(lambda x: jax.grad(kernel_loss)(x, labels), (logits,), (v,))


def tangent_of_loss_and_gradient(logits, labels, v):
    return jax.jvp(lambda x: kernel_gradient(x, labels), (logits,), (v,))


def gradient_of_gradient(logits, labels, v):
    def along_v(x):
        return jnp.vdot(jax.grad(kernel_loss)(x, labels), v)

    return jax.value_and_grad(along_v)(logits)


@pytest.mark.parametrize("classes", [1000, 32000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "f", [tangent_of_gradient, tangent_of_loss_and_gradient, gradient_of_gradient]
)
def test_second_derivatives_compile(compiled, f, dtype, classes):
    logits, labels = of_logits(classes, dtype)
    program = compiled(f, logits, labels, logits)
    assert [each.kind for each in logits_passes(program, classes)].count(KERNEL) == 2


def test_a_hessian_compiles(compiled):
    compiled(jax.hessian(kernel_loss), ((4, 8), "float32"), ((4,), "int32"))
