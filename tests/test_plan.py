"""Predictions of sxe.plan, compared with the compiler's analysis of the program, and as text.

As a script, it prints predictions of memory for the shapes below, on one device.
"""

import collections
import copy
import math
import pickle
import re
import sys

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from option_cases import each_value, slow

import sxe
from sxe.__main__ import main
from sxe._backend import Backend

TOLERANCE = 0.15
RATES = {"flops": 8e14, "bytes": 3e12, "link-bytes": 4e11}
BOTH = ("hidden", "kernel")
ALL = (*BOTH, "target_hidden", "target_kernel")
# The tests' XLA flags disable a fusion. Other programs have it, and an array that it adds.
AS_ELSEWHERE = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}

# N, D, K, dtype, inputs with a gradient, options: equal and unequal chunks, one and many.
CALLS = [
    (2048, 512, 32768, "float32", BOTH, {}),
    (2048, 512, 32768, "bfloat16", BOTH, {}),
    (2048, 512, 32768, "float32", ("hidden",), {}),
    (8192, 512, 32768, "float32", (), {}),
    (1021, 509, 50257, "float32", BOTH, {"softcap": 30.0}),
    (1021, 509, 50257, "bfloat16", BOTH, {}),
    (1021, 509, 50257, "float32", ("kernel",), {}),
    (1024, 64, 50257, "float32", BOTH, {"label_smoothing": 0.1}),
    (512, 64, 256000, "float32", BOTH, {"reduction": "none"}),
    (2000, 1024, 8192, "bfloat16", ("kernel",), {}),
    (2048, 512, 32768, "float32", BOTH, {"label_smoothing": 0.1, "softcap": 30.0}),
    (2048, 512, 32768, "float32", BOTH, {"logit_scale": 2.0}),
    (2048, 512, 32768, "float32", BOTH, {"class_mask": np.arange(32768) < 32000}),
    (2048, 512, 32768, "float32", BOTH, {"class_mask": np.arange(32768) < 32000, "softcap": 30.0}),
    (2048, 512, 32768, "float32", ("hidden",), {"class_mask": np.arange(32768) < 32000}),
    (2048, 512, 32768, "bfloat16", BOTH, {"class_mask": np.arange(32768) < 32000}),
    (2048, 256, 16384, "float32", BOTH, {"chunk_size": 64}),
    (16384, 4096, 32768, "bfloat16", BOTH, {}),
    (512, 4096, 8192, "float32", BOTH, {}),
    (512, 4096, 8192, "bfloat16", ("hidden",), {}),
    (2048, 256, 32768, "float32", (), {"label_smoothing": 0.1, "softcap": 30.0}),
]

# The same for a divergence, with D' of the target.
DIVERGENCES = [
    (2048, 512, 32768, 512, "float32", BOTH, {}),
    (2048, 512, 32768, 512, "bfloat16", BOTH, {"reduction": "none"}),
    (2048, 256, 32768, 1024, "float32", ALL, {}),
    (2048, 256, 32768, 1024, "bfloat16", ALL, {}),
    (2048, 512, 32768, 256, "float32", ALL, {"reduction": "none"}),
    (2048, 512, 32768, 256, "float32", (), {}),
    (1021, 509, 50257, 64, "float32", BOTH, {}),
    (1021, 509, 50257, 64, "bfloat16", ALL, {"reduction": "none"}),
    (512, 1024, 8192, 2048, "bfloat16", ALL, {}),
    (4096, 256, 16384, 512, "float32", ALL, {"chunk_size": 64}),
    (4096, 1024, 16384, 512, "float32", ("target_hidden",), {}),
    (2048, 512, 32768, 256, "float32", BOTH, {"mode": "reverse"}),
    (2048, 512, 32768, 256, "float32", ALL, {"mode": "jensen_shannon"}),
    (2048, 512, 32768, 256, "float32", BOTH, {"softcap": 30.0, "target_softcap": 30.0}),
    (2048, 512, 32768, 256, "float32", ALL, {"class_mask": np.arange(32768) < 32000}),
]


# Mesh, options of the mesh, and a call: rows and classes are sharded over one or several mesh axes.
MESHES = [
    ({"data": 2, "model": 4}, {}, (4096, 512, 32768, "float32", BOTH, {})),
    ({"data": 8}, {"fsdp": "data"}, (4096, 512, 16384, "float32", BOTH, {})),
    ({"data": 4, "model": 2}, {"fsdp": "data"}, (4096, 512, 16384, "bfloat16", BOTH, {})),
    ({"model": 8}, {}, (4096, 256, 65536, "bfloat16", BOTH, {"reduction": "none"})),
    (
        {"data": 2, "other": 2, "model": 2},
        {"fsdp": "other", "batch_axis_name": ("data", "other")},
        (4096, 512, 32768, "float32", BOTH, {"reduction": "sum"}),
    ),
    ({"data": 2, "model": 4}, {}, (4096, 512, 32768, "float32", ("hidden",), {})),
    ({"data": 2, "model": 4}, {}, (4096, 512, 32768, "float32", (), {})),
    ({"data": 8}, {"fsdp": "data"}, (4096, 512, 16384, "float32", ("hidden",), {})),
    ({"data": 2, "model": 4}, {"fsdp": "data"}, (32768, 1024, 4096, "bfloat16", BOTH, {})),
    ({"data": 8}, {}, (8192, 512, 16384, "float32", BOTH, {"reduction": "none"})),
]


# The same for a divergence.
MESHES_OF_DIVERGENCES = [
    ({"data": 2, "model": 4}, {}, (4096, 512, 16384, 256, "float32", BOTH, {})),
    ({"data": 2, "model": 4}, {}, (4096, 512, 16384, 256, "float32", (), {})),
    ({"data": 4, "model": 2}, {"fsdp": "data"}, (4096, 512, 16384, 256, "bfloat16", ALL, {})),
    ({"model": 8}, {}, (4096, 512, 16384, 256, "float32", ALL, {"reduction": "none"})),
    ({"data": 8}, {"fsdp": "data"}, (4096, 512, 16384, 256, "bfloat16", BOTH, {})),
    (
        {"data": 2, "model": 4},
        {},
        (4096, 512, 16384, 256, "float32", BOTH, {"mode": "jensen_shannon"}),
    ),
]


def test_a_plan_is_a_value():
    sizes = {"rows": 8, "hidden": 4, "classes": 16}
    axes = {"axis_name": "model", "batch_axis_name": "data"}
    plan = sxe.plan(**sizes, **axes, mesh={"data": 2, "model": 4})
    for same in (
        sxe.plan(**sizes, **axes, mesh={"model": 4, "data": 2}),
        copy.deepcopy(plan),
        pickle.loads(pickle.dumps(plan)),
    ):
        assert same == plan
        assert hash(same) == hash(plan)
    others = {sxe.plan(**sizes), sxe.plan(**sizes, **axes, mesh={"data": 4, "model": 2}), plan}
    assert len(others) == 3


def test_a_dtype_in_the_other_byte_order():
    """Arrays from files may have this dtype, which the head accepts."""
    for dtype in ("float16", "float32", "float64"):
        other = np.dtype(dtype).newbyteorder()
        assert sxe.plan(8, 4, 16, other) == sxe.plan(8, 4, 16, dtype)


INTEGERS = [np.int64, np.uint8, np.asarray, jnp.asarray]


@pytest.mark.parametrize("integer", INTEGERS, ids=lambda f: f.__name__)
def test_sizes_of_any_integer_type(integer):
    options = {"batch_axis_name": "data", "reduction": "none"}
    sizes = {"rows": 64, "hidden": 16, "classes": 240, "chunk_size": 8}
    expected = sxe.plan(**sizes, mesh={"data": 2}, **options)
    sizes = {name: integer(n) for name, n in sizes.items()}
    plan = sxe.plan(**sizes, mesh={"data": integer(2)}, **options)
    assert plan == expected
    assert type(plan.flops) is type(plan.chunk_size) is int


def call(rows, hidden, classes, *target, sizes=None, **axes):
    """The compiled call and its plan. For a divergence, D' stands in front of the dtype."""
    *target, dtype, differentiate, options = target
    head, layouts = sxe.linear_softmax_cross_entropy, (None,) * 4
    if target:
        head = sxe.linear_kl_divergence
    if sizes is not None:
        names = ("batch_axis_name", "data"), ("axis_name", "model")
        axes |= {a: name for a, name in names if name in sizes and a not in axes}
        batch, model, fsdp = (axes.get(a) for a in ("batch_axis_name", "axis_name", "fsdp"))
        mesh = make_mesh(*sizes.values(), names=tuple(sizes))
        head = sxe.over_mesh(head, mesh, batch=batch, classes=model, fsdp=fsdp)
        layouts = [NamedSharding(mesh, spec) for spec in (P(batch), P(fsdp, model)) * 2]

    def loss(*inputs):
        return jnp.sum(jnp.sin(head(*inputs, **options)))

    arguments = tuple(ALL.index(name) for name in differentiate)
    f = jax.value_and_grad(loss, arguments) if arguments else loss
    shapes = [((rows, hidden), dtype), ((hidden, classes), dtype), ((rows,), "int32")]
    for size in target:
        shapes[2:] = [((rows, size), dtype), ((size, classes), dtype)]
    inputs = [
        jax.ShapeDtypeStruct(*s, sharding=layout)
        for s, layout in zip(shapes, layouts[: len(shapes)], strict=True)
    ]
    program = jax.jit(f).lower(*inputs).compile(AS_ELSEWHERE)
    names = {"reduction", "chunk_size", "rule"}
    ignores = {"where"} if "ignore_index" in options else set()
    mode = {options["mode"]} & {"jensen_shannon"} if "mode" in options else set()
    used = {name.removeprefix("target_") for name in options} - names - {"ignore_index", "mode"}
    plan = sxe.plan(
        rows,
        hidden,
        classes,
        dtype,
        differentiate=differentiate,
        target_hidden=target[0] if target else None,
        options=tuple(used | ignores | mode),
        **{name: options[name] for name in options.keys() & names},
        mesh=sizes,
        **axes,
    )
    return program, plan


# N, D, K, dtype, inputs with a gradient, options of the call.
LEFT_OUT = [
    (2048, 512, 32768, "float32", BOTH, {}),
    (2048, 512, 32768, "bfloat16", BOTH, {"reduction": "none"}),
    (4096, 2048, 16384, "float32", ("hidden",), {}),
    (1021, 509, 50257, "bfloat16", ("kernel",), {}),
    (8192, 512, 32768, "float32", (), {}),
]


@pytest.mark.parametrize("each", LEFT_OUT, ids=str)
def test_memory_where_rows_are_left_out(each, monkeypatch):
    """One device moves the rows that count to the front. Their share does not change the memory."""
    monkeypatch.setattr("sxe._backend.device_count", lambda: 1)
    *sizes, dtype, differentiate, options = each
    program, plan = call(*sizes, dtype, differentiate, options | {"ignore_index": -1})
    assert plan == sxe.plan(
        *sizes, dtype, differentiate=differentiate, options=("where",), **options
    )
    fewer = sxe.plan(*sizes, dtype, differentiate=differentiate, counting=0.25, **options)
    for ratio in memory_ratio(program, fewer):
        assert abs(ratio - 1) < TOLERANCE, memory_ratio(program, fewer)


def test_only_chunks_with_rows_that_count_are_in_the_plan(monkeypatch):
    monkeypatch.setattr("sxe._backend.device_count", lambda: 1)
    sizes = {"rows": 2048, "hidden": 512, "classes": 32768, "chunk_size": 256}
    every = sxe.plan(**sizes)
    assert (every.chunks, every.rows_run) == (8, 2048)
    for counting, rows in ((1, 2048), (0.25, 512), (0.26, 576), (0.34, 704), (0.5, 1024), (0, 0)):
        plan = sxe.plan(**sizes, counting=counting)
        assert plan.rows_run == rows
        assert plan.flops == every.flops * rows // 2048
        assert plan.traffic_bytes <= every.traffic_bytes
    # Each part of a chunk reads the kernel, and reads and writes its gradient, as a chunk does.
    parts, chunk = (sxe.plan(**sizes, counting=rows / 2048) for rows in (192, 256))
    assert parts.rows_run == 192
    assert parts.traffic_bytes > 2 * chunk.traffic_bytes
    assert sxe.plan(**sizes, counting=0.25, rule="autodiff").rows_run == 2048
    assert sxe.plan(**(sizes | {"chunk_size": 2048}), counting=0.25).rows_run == 2048
    split = sxe.plan(**sizes, counting=0.25, mesh={"data": 2}, batch_axis_name="data")
    assert (split.chunks, split.rows_run) == (4, 256)
    monkeypatch.setattr("sxe._backend.device_count", lambda: 8)  # no mesh: rows may be sharded
    assert sxe.plan(**sizes, counting=0.25).rows_run == 2048


@pytest.mark.parametrize("by", [BOTH, ("hidden",), ("kernel",)], ids="-".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_the_forward_pass_keeps(reduction, by):
    """The residuals of ``jax.vjp``, except the operands of products, which a loop does not copy."""
    hidden, kernel = jnp.ones((640, 32), jnp.bfloat16), jnp.ones((32, 300), jnp.bfloat16)
    labels, given = jnp.zeros(640, jnp.int32), {"hidden": hidden, "kernel": kernel}

    def loss(differentiated):
        head = sxe.linear_softmax_cross_entropy
        return head(**given | differentiated, labels=labels, reduction=reduction, chunk_size=64)

    _, pullback = jax.vjp(loss, {name: given[name] for name in by})
    kept = [a for a in jax.tree.leaves(pullback) if a.dtype != jnp.bfloat16]
    plan = sxe.plan(640, 32, 300, "bfloat16", differentiate=by, reduction=reduction)
    assert abs(sum(a.nbytes for a in kept) / plan.kept_bytes - 1) < 0.05
    assert sxe.plan(640, 32, 300, "bfloat16", differentiate=()).kept_bytes == 0


@each_value(
    by=[BOTH, ALL, ("target_hidden",)],
    mode=["forward", "reverse", "jensen_shannon"],
    reduction=["mean", "none"],
)
def test_what_the_forward_pass_of_a_divergence_keeps(reduction, mode, by):
    shapes = (640, 32), (32, 300), (640, 16), (16, 300)
    given = {n: jnp.ones(s, jnp.bfloat16) for n, s in zip(ALL, shapes, strict=True)}

    def loss(differentiated):
        options = {"reduction": reduction, "mode": mode, "chunk_size": 64}
        return sxe.linear_kl_divergence(**given | differentiated, **options)

    _, pullback = jax.vjp(loss, {name: given[name] for name in by})
    kept = [a for a in jax.tree.leaves(pullback) if a.dtype != jnp.bfloat16]
    options = {mode} & {"jensen_shannon"}
    plan = sxe.plan(
        *(640, 32, 300, "bfloat16"),
        target_hidden=16,
        differentiate=by,
        reduction=reduction,
        options=tuple(options),
    )
    assert abs(sum(a.nbytes for a in kept) / plan.kept_bytes - 1) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_of_log_probabilities_and_entropies(dtype, monkeypatch):
    """Its memory and its residuals are those of the losses of single rows."""
    monkeypatch.setattr("sxe._backend.device_count", lambda: 1)
    plan = sxe.plan(2048, 512, 32768, dtype, reduction="none")

    def loss(hidden, kernel, labels):
        found = sxe.linear_log_prob_and_entropy(hidden, kernel, labels)
        return jnp.sum(jnp.sin(found.log_prob)) + jnp.sum(jnp.cos(found.entropy))

    shapes = ((2048, 512), dtype), ((512, 32768), dtype), ((2048,), "int32")
    inputs = [jax.ShapeDtypeStruct(*s) for s in shapes]
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*inputs).compile(AS_ELSEWHERE)
    for ratio in memory_ratio(program, plan):
        assert abs(ratio - 1) < TOLERANCE, memory_ratio(program, plan)

    def forward(hidden, kernel, labels):
        return jax.vjp(lambda *a: sxe.linear_log_prob_and_entropy(*a, labels), hidden, kernel)[1]

    kept = [a for a in jax.tree.leaves(jax.eval_shape(forward, *inputs)) if a.ndim < 2]
    assert abs(sum(4 * a.size for a in kept) / plan.kept_bytes - 1) < 0.05


@pytest.mark.parametrize("counting", [-0.1, 1.1, np.nan, "all", True, None])
def test_a_share_that_is_none(counting):
    with pytest.raises((ValueError, TypeError), match="counting: expected a number in"):
        sxe.plan(8, 4, 16, counting=counting)


def test_the_command_prints_rows_in_chunks_that_are_run(monkeypatch, capsys):
    monkeypatch.setattr("sxe._backend.device_count", lambda: 1)
    command = ["plan", "--rows=2048", "--hidden=512", "--classes=32768", "--chunk-size=256"]
    main(command)
    assert "rows computed" not in capsys.readouterr().out
    main([*command, "--counting", "0.25"])
    assert re.search(r"rows computed +512\n", capsys.readouterr().out)


def bytes_by_kind(collectives):
    found = collections.Counter()
    for kind, size in collectives:
        found[kind] += size
    return dict(found)


def memory_ratio(program, plan):
    """The predicted bytes divided by the actual ones: of temporaries, and at the peak."""
    memory = program.memory_analysis()
    temporary = memory.temp_size_in_bytes
    peak = temporary + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return plan.temporary_bytes / temporary, plan.peak_bytes / peak


def memory_ratios(step):
    """Of every call, or of every second, third and so on."""
    for each in (CALLS + DIVERGENCES)[::step]:
        yield each, *memory_ratio(*call(*each))


# By default every layout of each function once.
@pytest.mark.parametrize(
    ("sizes", "axes", "each"),
    [
        *(*MESHES[:5], *MESHES_OF_DIVERGENCES[:4]),
        *(slow(*mesh) for mesh in (*MESHES[5:], *MESHES_OF_DIVERGENCES[4:])),
    ],
    ids=str,
)
def test_mesh(sizes, axes, each):
    """The bytes of collectives are those of the compiled program; memory is within 15 percent."""
    program, plan = call(*each, sizes=sizes, **axes)
    found = [(c.opcode, c.bytes * (c.times or 1)) for c in collectives(program.as_text())]
    if each[-1].get("reduction") == "none":
        found.append(("all-reduce", -4 * (sizes.get("data", 1) > 1)))  # the sum in ``call``
    expected = [(c.kind, c.bytes) for c in plan.collectives]
    assert bytes_by_kind(found) == bytes_by_kind(expected)
    assert sum(plan.terms.values()) == plan.temporary_bytes
    for ratio in memory_ratio(program, plan):
        assert abs(ratio - 1) < TOLERANCE, memory_ratio(program, plan)
    chunk, count = plan.chunk_size, plan.chunks
    assert chunk * count == each[0] // sizes.get("data", 1) // sizes.get("other", 1)
    rows, hidden, classes, *target, _, by, options = each
    again, products = count > 1 and options == {"reduction": "none"}, 0
    for size, names in zip((hidden, *target), (ALL[:2], ALL[2:]), strict=False):
        products += (1 + again + len(set(names) & set(by))) * size
    assert plan.flops == 2 * products * rows * classes // 8


def test_the_kernel_is_gathered_in_its_own_dtype():
    """In the program for XLA, its gradient is reduced in float32 and scattered first.

    XLA's CPU backend widens the kernel before it gathers it. Others don't.
    """
    mesh = make_mesh(4, 2, names=("data", "other"))
    batch = ("data", "other")
    loss = sxe.over_mesh(sxe.linear_softmax_cross_entropy, mesh, batch=batch, fsdp="data")
    shapes = (((64, 16), "bfloat16"), ((16, 32), "bfloat16"), ((64,), "int32"))
    text = jax.jit(jax.grad(loss, 1)).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).as_text()
    assert re.findall(r"all_gather.*\(tensor<(.*?)>\)", text) == ["4x32xbf16"]
    reduced = r"{}\".*?\n(?:.*\n){{2,6}}? *\}}\) : \(tensor<(.*?)>\)"
    assert re.findall(reduced.format("reduce_scatter"), text) == ["16x32xf32"]
    assert [t for t in re.findall(reduced.format("all_reduce"), text) if "x" in t] == ["4x32xf32"]
    plans = [
        sxe.plan(
            64, 16, 32, "bfloat16", mesh={"data": 8}, batch_axis_name="data", fsdp="data", backend=b
        )
        for b in ("gpu", "cpu")
    ]
    gathered = [next(c.bytes for c in p.collectives if c.kind == "all-gather") for p in plans]
    assert gathered == [16 * 32 * 2, 16 * 32 * 4]


SIZES_OF_KERNELS = [
    # Sizes, options of the plan, and how often the row functions read the logits of a chunk.
    ((4096, 384, 32768), {}, 1),
    ((4096, 384, 32768), {"options": ("where",)}, 1),
    ((4096, 384, 32768), {"options": ("label_smoothing",)}, 1),
    ((4096, 384, 32768), {"options": ("softcap",)}, 2),
    ((4096, 384, 32768), {"options": ("softcap", "label_smoothing")}, 3),
    ((4096, 384, 32768), {"reduction": "none"}, 2),
    ((4096, 384, 32768), {"differentiate": ()}, 1),
    ((4096, 384, 50257), {}, 2),
    ((4096, 384, 24), {}, 3),  # which XLA computes
    ((4096, 384, 1024), {}, 2),  # the gradient would be narrower than the logits
    ((4096, 384, 32768), {"mesh": {"model": 8}, "axis_name": "model"}, 2),
    ((4096, 384, 32768), {"options": ("label_weights",)}, 2),
]


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="needs JAX 0.11.2")
@pytest.mark.parametrize(("sizes", "options", "reads"), SIZES_OF_KERNELS)
def test_the_kernels_for_gpus(sizes, options, reads, monkeypatch):
    monkeypatch.setattr("sxe._backend.device_count", lambda: 1)
    by_xla = sxe.plan(*sizes, "bfloat16", **options, backend="gpu")
    plan = sxe.plan(*sizes, "bfloat16", **options, backend="gpu", implementation="mosaic_gpu")
    assert (by_xla.implementation, plan.implementation) == ("xla", "mosaic_gpu")
    times = ("once", "twice", "three times", "four times")
    assert times[reads - 1] in plan.reason
    assert ("run by XLA" in plan.reason) == (sizes[2] < 32)
    reads_of_xla = 2 if options.get("differentiate") == () else 3
    reads_of_xla += "label_smoothing" in options.get("options", ())
    assert times[reads_of_xla - 1] in by_xla.reason
    rows, classes = sizes[0], sizes[2] // math.prod(options.get("mesh", {}).values())
    saved = 4 * rows * classes * (reads_of_xla - reads)
    assert by_xla.traffic_bytes - plan.traffic_bytes == saved


def test_the_kernels_are_for_gpus():
    with pytest.raises(ValueError, match="implementation: 'mosaic_gpu' needs a program"):
        sxe.plan(64, 8, 32, backend="cpu", implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="implementation: expected one of"):
        sxe.plan(64, 8, 32, implementation="triton")


def test_floor():
    options = {"mesh": {"a": 4, "b": 2}, "batch_axis_name": "a", "axis_name": "b", "chunk_size": 16}
    plan = sxe.plan(64, 8, 32, "bfloat16", **options, fsdp="a", backend="gpu")
    rows, hidden, classes = 16, 8, 16
    assert plan.flops == 6 * rows * hidden * classes
    # Sums and statistics, d hidden, the kernel in bfloat16, d kernel in float32
    all_reduce = (8 * 3 / 4) + (16 * rows + 4 * rows * hidden) / 2
    sent = 2 * all_reduce + (2 + 4) * hidden * classes * 3 / 4
    # The kernel is read twice, d kernel read and written, hidden read three times. Logits are
    # written, and read for maximum, sums and gradient. Their gradient is written, and read twice.
    moved = (
        hidden * classes * (2 * 2 + 8) + rows * hidden * 2 * 3 + rows * classes * (4 * 4 + 3 * 2)
    )
    assert plan.traffic_bytes == moved
    floor = plan.floor(1e3, 1e2, 10)
    assert floor.matmul == plan.flops / 1e3
    assert floor.memory == moved / 1e2
    assert floor.links == pytest.approx(sent / 10)


def test_the_smallest_class_split_that_fits():
    options = {
        "dtype": "bfloat16",
        "batch_axis_name": "data",
        "axis_name": "model",
        "fsdp": "data",
        "backend": "gpu",
    }

    def plan(split, **more):
        mesh = {"data": 64 // split, "model": split}
        return sxe.plan(2**17, 4096, 2**17, mesh=mesh, **options, **more)

    each = [plan(split) for split in (1, 2, 4)]
    peaks = [p.peak_bytes for p in each]
    assert peaks == sorted(peaks, reverse=True)
    for p, peak in zip(each, peaks, strict=True):
        assert plan(1, memory_bytes=peak) == plan(64, memory_bytes=peak) == p
    assert plan(1, memory_bytes=peaks[1] - 1) == each[2]
    with pytest.raises(
        ValueError, match=r"^memory_bytes: expected at least .* 64 devices, got 100"
    ):
        plan(1, memory_bytes=100)


@pytest.mark.parametrize("step", [slow(1), 6])
def test_memory_within_15_percent_of_the_compiled_program(step):
    """The process has one device, because only then blocks keep the memory small."""
    output = fresh.run(__file__, str(step))
    ratios = [[float(r) for r in line.split()[:2]] for line in output.splitlines()]
    for pair, each in zip(ratios, (CALLS + DIVERGENCES)[::step], strict=True):
        for ratio in pair:
            assert abs(ratio - 1) < TOLERANCE, (each, ratios)


# MiB of temporaries for value and gradient in bfloat16, for N, D, K and a chunk size, in the
# program that JAX 0.11.2 compiled on an NVIDIA H200.
ON_A_GPU = [
    ((16384, 4096, 131072), None, 2832.2),
    ((16384, 4096, 131072), 1024, 2568.1),
    ((16384, 4096, 131072), 4096, 4384.2),
    ((16384, 4096, 131072), 8192, 8448.2),
    ((8192, 4096, 128256), None, 2390.6),
    ((8192, 4096, 128256), 2048, 2649.1),
    ((8192, 4096, 128256), 4096, 4168.1),
    ((32768, 2560, 128256), None, 2584.8),
    ((32768, 2560, 128256), 4096, 4598.8),
]


@pytest.mark.parametrize(("sizes", "chunk_size", "measured"), ON_A_GPU)
def test_memory_within_1_percent_of_a_program_on_a_gpu(sizes, chunk_size, measured):
    plan = sxe.plan(*sizes, "bfloat16", backend="gpu", chunk_size=chunk_size)
    assert plan.temporary_bytes / 2**20 == pytest.approx(measured, rel=0.01)


# N rows in chunks of C, and K classes in blocks of J
N, C, D, K, J = 4096, 1024, 512, 8192, 2048
FOUR_CHUNKS = {"rows": N, "hidden": D, "classes": K, "chunk_size": C}
ON_A_CPU = {"backend": "cpu", "mesh": {"data": 2}}  # like one device, however many there are
KERNEL_SCATTERED = {"mesh": {"data": 2}, "batch_axis_name": "data", "fsdp": "data"}
TERMS = [
    (
        ON_A_CPU | {"differentiate": ()},
        {
            "logits of a chunk": 4 * C * K,
            "row block: logits": "a block of rows",
            "row block: smaller logits": "a block of rows",
        },
    ),
    (
        # The kernel's gradient lies in the memory of its result, and a class block in hidden's.
        ON_A_CPU,
        {
            "logits of a chunk": 4 * C * K,
            "gradient of hidden, float32": 4 * N * D,
            "hidden of a chunk": 4 * C * D,
            "gradient of hidden, a chunk": 4 * C * D,
            "class block: kernel": 4 * D * J,
        },
    ),
    (
        # The hidden states of a chunk lie in the memory of the result, in bfloat16.
        {"backend": "gpu", "dtype": "bfloat16", "differentiate": ("kernel",)},
        {
            "logits of a chunk": 4 * C * K,
            "gradient of kernel, float32": 4 * D * K,
            "gradient of logits": 2 * C * K,
        },
    ),
    (
        {"backend": "gpu", "classes": K - 1, "dtype": "bfloat16", "differentiate": ("hidden",)},
        {
            "logits of a chunk": 4 * C * (K - 1),
            "gradient of hidden, float32": 4 * N * D,
            "kernel, padded": 2 * D * (K - 1),
            "gradient of logits": 2 * C * (K - 1),
            "gradient of logits, padded": 2 * C * (K - 1),
        },
    ),
    (
        {"backend": "tpu", "rows": N - 3, "options": ("softcap",), "reduction": "none"},
        {
            "logits of a chunk": 4 * C * K,
            "logits before the softcap": 4 * C * K,
            "hidden, padded": 4 * (N - 3) * D,
        },
    ),
    (
        {"backend": "tpu", "rows": 2 * N, "dtype": "bfloat16"} | KERNEL_SCATTERED,
        {
            "logits of a chunk": 4 * C * K,
            "kernel, gathered": 2 * D * K,
            "gradient of kernel, float32": 4 * D * K,
            "gradient of hidden, float32": 4 * N * D,
        },
    ),
    (
        {"backend": "tpu", "mesh": {"model": 2}, "axis_name": "model", "chunk_size": 8},
        {
            "gradient of kernel, float32": 4 * D * K // 2,
            "gradient of hidden, float32": 4 * N * D,
            "gradient of hidden, scaled": 4 * N * D,
        },
    ),
]


@pytest.mark.parametrize(("options", "expected"), TERMS, ids=str)
def test_terms(options, expected):
    plan = sxe.plan(**(FOUR_CHUNKS | options))
    rows = Backend("cpu", is_local=True).row_block_bytes // (4 * K)
    expected = {k: 4 * rows * K if v == "a block of rows" else v for k, v in expected.items()}
    assert dict(plan.terms) == expected
    assert plan.temporary_bytes == sum(expected.values())


# For a divergence, with D' = 2 D
TERMS_OF_DIVERGENCES = [
    (
        # The hidden states of a chunk lie in the memory of the results, in bfloat16.
        {"backend": "gpu", "dtype": "bfloat16"},
        {
            "target_logits of a chunk": 4 * C * K,
            "gradient of kernel, float32": 4 * D * K,
            "gradient of hidden, float32": 4 * N * D,
            "gradient of logits": 2 * C * K,
            "logits of a chunk": 4 * C * K,
        },
    ),
    (
        {"backend": "tpu", "differentiate": ("target_kernel",), "options": ("softcap",)},
        {
            "logits of a chunk": 4 * C * K,
            "target_logits of a chunk": 4 * C * K,
            "target_logits before the softcap": 4 * C * K,
            "gradient of target_kernel, float32": 4 * 2 * D * K,
        },
    ),
    (
        ON_A_CPU | {"differentiate": ()},
        {
            "logits of a chunk": 4 * C * K,
            "target_logits of a chunk": 4 * C * K,
            "row block: logits": "a block of rows",
            "row block: target_logits": "a block of rows",
            "row blocks: probabilities": "a block of rows",
        },
    ),
]


@pytest.mark.parametrize(("options", "expected"), TERMS_OF_DIVERGENCES, ids=str)
def test_terms_of_a_divergence(options, expected):
    plan = sxe.plan(**(FOUR_CHUNKS | options), target_hidden=2 * D)
    rows = Backend("cpu", is_local=True).row_block_bytes // (4 * 2 * K)
    expected = {k: 4 * rows * K if v == "a block of rows" else v for k, v in expected.items()}
    assert dict(plan.terms) == expected


@pytest.mark.parametrize("mebibytes", [1, 4])
def test_a_block_of_rows_is_as_large_as_the_backend_says(monkeypatch, mebibytes):
    monkeypatch.setattr(Backend, "row_block_bytes", mebibytes * 2**20)
    options = ON_A_CPU | {"options": ("softcap", "label_smoothing"), "reduction": "none"}
    terms = sxe.plan(**FOUR_CHUNKS, **options, differentiate=()).terms
    blocks = {size for name, size in terms.items() if name.startswith("row block")}
    assert blocks == {mebibytes * 2**20}


@pytest.mark.parametrize("chunk_size", [256, 64, 100], ids=["one chunk", "many", "padded"])
@pytest.mark.parametrize(
    ("differentiate", "options", "products"),
    [
        ((), {}, 1),
        (BOTH, {}, 3),
        (("hidden",), {}, 2),
        (("kernel",), {}, 2),
        (BOTH, {"reduction": "none"}, 4),
        (BOTH, {"rule": "jvp"}, 4),
    ],
    ids=["value", "both", "hidden", "kernel", "none", "jvp"],
)
def test_flops_within_15_percent_of_the_compiled_program(
    differentiate, options, products, chunk_size
):
    """XLA counts the body of a loop once, so its number is for one chunk."""
    if chunk_size == 256 and products == 4:
        products = 3  # XLA merges the two computations of the logits of a single chunk
    rows, hidden, classes = 256, 512, 384
    options = {**options, "chunk_size": chunk_size}
    program, plan = call(rows, hidden, classes, "float32", differentiate, options)
    flops = program.cost_analysis()["flops"]
    assert abs(plan.flops / plan.chunks / flops - 1) < TOLERANCE
    rows += plan.padding
    assert plan.flops == products * 2 * rows * hidden * classes
    assert plan.chunk_size * plan.chunks == rows


def test_a_divergence_with_and_without_a_gradient_of_its_target():
    def flops(**options):
        sizes = {"rows": 64, "hidden": 8, "classes": 100, "target_hidden": 16, "chunk_size": 8}
        return sxe.plan(**sizes, **options).flops / (2 * 64 * 100)

    assert flops(differentiate=()) == 8 + 16
    assert flops() == 3 * 8 + 16
    assert flops(differentiate=ALL) == 3 * (8 + 16)
    assert flops(reduction="none") == 4 * 8 + 2 * 16
    assert flops(differentiate=("target_hidden",)) == 8 + 2 * 16


def test_what_a_divergence_on_a_gpu_reads():
    """It reads the logits of each side once more than a loss. The target has no gradient."""
    sizes = {"rows": 64, "hidden": 8, "classes": 96, "dtype": "bfloat16", "backend": "gpu"}
    model, target = (sxe.plan(**sizes, differentiate=by) for by in (BOTH, ()))
    both = sxe.plan(**sizes, target_hidden=8)
    # The sums of the divergence read both, and the gradient reads the target's logits again.
    more = 64 * 96 * 4 * 3
    assert both.traffic_bytes == model.traffic_bytes + target.traffic_bytes + more
    assert both.logits_bytes == 2 * model.logits_bytes
    # A divergence has no labels among its arguments.
    logits = both.logits_peak_bytes - both.logits_bytes
    assert logits == 2 * (2 * (64 * 8 + 8 * 96)) + 2 * (64 * 8 + 8 * 96) + 4


def test_path():
    def path(**options):
        return sxe.plan(64, 8, 100, **options).path

    assert path() == path(reduction="sum") == "gradients in the forward pass"
    assert path(differentiate=()) == path(differentiate=(), rule="jvp") == "value alone"
    again = "logits again in the backward pass"
    assert path(reduction="none", chunk_size=8) == path(rule="jvp", chunk_size=8) == again


def test_the_default_chunk_does_not_grow_with_the_rows():
    sizes = {n: sxe.plan(n, 64, 128256).chunk_size for n in (2**12, 2**14, 2**20)}
    assert len(set(sizes.values())) == 1
    assert sxe.plan(0, 64, 128256).chunks == 1


def test_command_line(capsys):
    sizes = ["--rows", "1021", "--hidden", "512", "--classes", "50257", "--dtype", "bfloat16"]
    assert main(["plan", *sizes, "--differentiate", "hidden", "--reduction", "none"]) == 0
    text = capsys.readouterr().out
    plan = sxe.plan(1021, 512, 50257, "bfloat16", differentiate=["hidden"], reduction="none")
    for part in (
        plan.path,
        f"{plan.chunks} of {plan.chunk_size} rows",
        f"{plan.flops / 1e9:.1f} GFLOP",
        f"{plan.temporary_bytes / 2**20:.1f} MiB",
        f"{plan.logits_bytes / 2**20:.1f} MiB",
    ):
        assert part in text
    for name, size in plan.terms.items():
        amount = f"{size / 2**20:.1f} MiB" if size >= 2**17 else f"{size:,} bytes"
        assert re.search(f"^  {name} +{amount}$", text, re.M)
    assert text.isascii()


def test_command_line_of_a_divergence(capsys):
    sizes = ["--rows", "1024", "--hidden", "512", "--classes", "32768", "--target-hidden", "1024"]
    by = ["--differentiate", "hidden", "target_kernel", "--options", "jensen_shannon"]
    assert main(["plan", *sizes, *by]) == 0
    text = capsys.readouterr().out
    plan = sxe.plan(
        *(1024, 512, 32768),
        target_hidden=1024,
        differentiate=("hidden", "target_kernel"),
        options=("jensen_shannon",),
    )
    assert f"{plan.flops / 1e9:.1f} GFLOP" in text
    for name, size in plan.terms.items():
        assert re.search(f"^  {name} +{size / 2**20:.1f} MiB$", text, re.M)


def test_command_line_with_a_mesh(capsys):
    sizes = ["plan", "--rows", "4096", "--hidden", "512", "--classes", "32768", "--backend", "gpu"]
    rates = [f"--{name}-per-second={rate}" for name, rate in RATES.items()]
    assert main([*sizes, "--mesh", "data=2,model=4", "--fsdp", "data", *rates]) == 0
    text = capsys.readouterr().out
    mesh = {"mesh": {"data": 2, "model": 4}, "axis_name": "model", "batch_axis_name": "data"}
    plan = sxe.plan(4096, 512, 32768, **mesh, fsdp="data", backend="gpu")
    floor = plan.floor(*RATES.values())
    for c in plan.collectives:
        amount = f"{c.bytes / 2**20:.1f} MiB" if c.bytes > 2**17 else f"{c.bytes} bytes"
        assert re.search(f"^  {c.of} +{amount} among {c.devices}$", text.replace(",", ""), re.M)
    for title, seconds in (("time, at least", max(floor)), ("  links", floor.links)):
        assert re.search(f"^{title} +{1e3 * seconds:.2f} ms", text, re.M)
    assert "data=2, model=4: 8 devices" in text
    memory = str(plan.peak_bytes)
    assert main([*sizes, "--mesh", "data=8,model=1", "--fsdp", "data", "--memory", memory]) == 0
    assert re.search(
        "^mesh +data=(4, model=2|2, model=4|8, model=1)", capsys.readouterr().out, re.M
    )


if __name__ == "__main__":
    for each, temporary, peak in memory_ratios(int(sys.argv[1]) if sys.argv[1:] else 1):
        print(f"{temporary:.3f} {peak:.3f}", *each, flush=True)
