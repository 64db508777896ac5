"""How the head divides its work, and the loops over parts, which give what a single part gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import export, lax

from sxe._backend import MIB, Backend
from sxe._head.loops import (
    Columns,
    Tiling,
    classes_per_block,
    over_chunks,
    over_class_blocks,
    steps_of,
    tiling,
)
from sxe._rows.blocks import in_row_blocks

LOCAL_CPU = Backend("cpu", is_local=True)
CPUS = Backend("cpu", is_local=False)
BACKENDS = [
    LOCAL_CPU,
    Backend("cpu", True, (0, 10)),
    CPUS,
    Backend("gpu", is_local=True),
    Backend("tpu", is_local=False),
]
VERSIONS = pytest.mark.parametrize("version", [(0, 10), (0, 12)], ids=str)


# Chunks: number and size


@pytest.mark.parametrize(
    ("rows", "chunk_size", "local", "elsewhere"),
    [
        (0, 4, Tiling(1, 1, 1), Tiling(1, 1, 1)),
        (1, 4, Tiling(1, 1, 0), Tiling(1, 1, 0)),
        (1, 1, Tiling(1, 1, 0), Tiling(1, 1, 0)),
        (12, 5, Tiling(3, 4, 0), Tiling(3, 4, 0)),
        (9, 5, Tiling(3, 3, 0), Tiling(3, 3, 0)),  # 1.5 times the fewest
        (10, 4, Tiling(3, 4, 2), Tiling(5, 2, 0)),  # nearly twice the fewest
        (25, 9, Tiling(3, 9, 2), Tiling(5, 5, 0)),
        (13, 4, Tiling(4, 4, 3), Tiling(4, 4, 3)),  # a prime
        (13, 13, Tiling(1, 13, 0), Tiling(1, 13, 0)),
        (13, 99, Tiling(1, 13, 0), Tiling(1, 13, 0)),
    ],
)
def test_chunks_by_hand(rows, chunk_size, local, elsewhere):
    for backend, expected in ((LOCAL_CPU, local), (CPUS, elsewhere)):
        found = tiling(rows, 7, chunk_size=chunk_size, dtype=jnp.float32, backend=backend)
        assert found == expected


@pytest.mark.parametrize(
    ("rows", "classes", "backend", "dtype", "expected"),
    [
        # 24 or 48 MiB of logits on a CPU, 32 MiB elsewhere
        (2**16, 1024, Backend("cpu", True, (0, 10)), "float32", Tiling(16, 4096, 0)),
        (2**16, 1024, Backend("cpu", True, (0, 12)), "float32", Tiling(8, 8192, 0)),
        (2**16, 1024, Backend("cpu", True, (0, 12)), "float64", Tiling(16, 4096, 0)),
        (2**16, 1024, Backend("cpu", True, (0, 12)), "bfloat16", Tiling(8, 8192, 0)),
        (2**16, 1024, Backend("gpu", True), "bfloat16", Tiling(8, 8192, 0)),
        # as many rows as a matmul needs
        (2**16, 2**17, Backend("cpu", True), "float32", Tiling(512, 128, 0)),
        (2**16, 2**17, Backend("gpu", True), "bfloat16", Tiling(32, 2048, 0)),
        (2**16, 2**17, Backend("gpu", True), "float16", Tiling(32, 2048, 0)),
        (2**16, 2**17, Backend("gpu", True), "float32", Tiling(128, 512, 0)),
        # at least this number of chunks
        (1031, 2**17, Backend("cpu", True, (0, 12)), "float32", Tiling(11, 94, 3)),
        (1024, 2**19, Backend("cpu", True, (0, 12)), "float32", Tiling(16, 64, 0)),
        (1024, 2**19, Backend("gpu", True), "bfloat16", Tiling(8, 128, 0)),
        # at least one row
        (9, 2**26, Backend("cpu", True), "float32", Tiling(9, 1, 0)),
    ],
)
def test_default_chunks_by_hand(rows, classes, backend, dtype, expected):
    dtype = jnp.dtype(dtype)
    assert tiling(rows, classes, chunk_size=None, dtype=dtype, backend=backend) == expected


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(0, 2**17),
    classes=st.integers(1, 2**18),
    chunk_size=st.none() | st.integers(1, 2**17),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    backend=st.sampled_from(BACKENDS),
)
@example(rows=0, classes=1, chunk_size=None, dtype="float32", backend=LOCAL_CPU)
@example(rows=1, classes=1, chunk_size=None, dtype="float32", backend=CPUS)
@example(rows=2**17 - 1, classes=2**18, chunk_size=None, dtype="float64", backend=BACKENDS[-1])
def test_any_chunks(rows, classes, chunk_size, dtype, backend):
    dtype = jnp.dtype(dtype)
    chunks, size, padding = tiling(
        rows, classes, chunk_size=chunk_size, dtype=dtype, backend=backend
    )
    assert chunks * size - padding == rows
    assert 0 <= padding < max(chunks, 2)
    assert chunks >= 1
    if chunk_size is None:
        limits = backend.chunk_limits(dtype)
        of_a_row = classes * (8 if dtype == np.float64 else 4)
        # The logits are small enough; or a matmul needs these rows and there are enough chunks.
        few = size * of_a_row <= limits.logits_bytes
        wanted = size <= limits.wanted_rows and chunks >= limits.fewest_chunks
        assert few or wanted or size == 1
        if rows * of_a_row <= limits.logits_bytes:
            assert chunks == 1
    else:
        assert size <= chunk_size
        fewest = max(1, -(-rows // chunk_size))
        most = fewest * 3 // 2 if backend.is_local else fewest * 2
        assert fewest <= chunks <= most
        # No smaller number avoids padding. With padding, the number is the smallest.
        assert not any(rows % n == 0 for n in range(fewest, chunks) if rows)
        assert padding == 0 or chunks == fewest


def test_chunks_of_any_number_of_rows():
    (rows,) = export.symbolic_shape("n")
    for chunk_size in (4, None):
        chunks, size, padding = tiling(
            rows, 7, chunk_size=chunk_size, dtype=jnp.float32, backend=LOCAL_CPU
        )
        assert chunks * size - padding == rows


# Loops over chunks


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 12])
def test_chunks_give_what_all_rows_give(chunks):
    """Rows keep their order. Each chunk has every n-th row, and chunks run in order."""
    rows = {"x": jnp.arange(12.0), "y": jnp.arange(24).reshape(12, 2), "none": None}
    seen = []

    def body(factor, carry, rows, all_run):
        assert not all_run
        total, first = carry
        assert rows["none"] is None
        seen.append(rows["x"].shape)
        outputs = {
            "x": factor * rows["x"],
            "y": rows["y"][:, ::-1],
            "first": jnp.full(rows["x"].shape, rows["x"][0]),
            "none": None,
        }
        return (total + jnp.sum(rows["x"]), 3 * first + rows["x"][0]), outputs

    arrays = jnp.float32(2), (jnp.float32(1), jnp.float32(0)), rows
    carry, outputs = over_chunks(body, arrays, chunks)
    assert set(seen) == {(12 // chunks,)}
    assert carry[0] == 1 + 66
    assert carry[1] == functools.reduce(lambda number, i: 3.0 * number + i, range(chunks), 0.0)
    assert outputs["none"] is None
    np.testing.assert_array_equal(outputs["x"], 2 * np.arange(12))
    np.testing.assert_array_equal(outputs["y"], np.arange(24).reshape(12, 2)[:, ::-1])
    np.testing.assert_array_equal(outputs["first"], np.arange(12) % chunks)


def wide_rows(weight, x, chunks):
    """A loss whose backward pass needs arrays [C, 500] of each chunk."""

    def body(weight, total, x, all_run):
        wide = jnp.sin(x[:, None] * weight[None])
        return total + jnp.sum(wide), jnp.sum(wide**2, axis=1)

    total, rows = over_chunks(body, (weight, jnp.float32(0), x), chunks)
    return total + jnp.sum(rows * jnp.arange(1.0, 13))


@pytest.mark.parametrize("chunks", [2, 4])
def test_gradients_through_chunks(chunks):
    weight, x = jnp.linspace(0, 1, 500), jnp.linspace(-2, 3, 12)
    gradients = [
        jax.jit(jax.grad(wide_rows, (0, 1)), static_argnums=2)(weight, x, n) for n in (1, chunks)
    ]
    for whole, found in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)


def test_nothing_of_a_chunks_size_is_kept_for_the_backward_pass():
    weight, x = jnp.linspace(0, 1, 500), jnp.linspace(-2, 3, 12)

    def largest(chunks):
        _, pullback = jax.vjp(functools.partial(wide_rows, chunks=chunks), weight, x)
        return max(a.size for a in jax.tree.leaves(pullback))

    assert largest(1) == 12 * 500
    assert largest(4) == 500


# Loops over chunks of the rows to run


def runs_of(rows, chunks, runs):
    """The sum and outputs of rows by ``over_chunks``, and which rows were in a chunk."""

    def body(factor, carry, rows, all_run):
        total, chunk = carry
        ran, known = jnp.ones_like(rows["x"]), jnp.full_like(rows["x"], all_run)
        outputs = {"x": factor * rows["x"], "none": None, "ran": ran, "known": known}
        return (total + jnp.sum(rows["x"]), chunk + len(rows["x"])), outputs

    arrays = jnp.float32(2), (jnp.float32(1), jnp.int32(0)), rows
    return over_chunks(body, arrays, chunks, runs=runs)


PARTS = {3: 3, 127: 127, 128: 32, 130: 26, 129: 43, 134: 67, 131: 131}  # chunk size: part size
SIZES = (3, 128)  # only whole chunks, and quarters of a chunk at the end


@pytest.mark.parametrize("number", [0, 1, 2, 3, 32, 33, 64, 65, 127, 128, 129, 192, 193, 511, 512])
@pytest.mark.parametrize("size", PARTS)
def test_as_many_chunks_run_as_hold_rows_that_run(number, size):
    count = 4 * size
    number = min(number, count)
    rng = np.random.default_rng(number)
    runs = np.isin(np.arange(count), rng.permutation(count)[:number])
    x = np.arange(1.0, count + 1, dtype=np.float32)
    (total, rows_run), outputs = jax.jit(runs_of, static_argnums=1)({"x": x}, 4, runs)
    ran = np.asarray(outputs["ran"]) == 1
    np.testing.assert_array_equal(ran[runs], True)
    np.testing.assert_array_equal(outputs["x"], np.where(ran, 2 * x, 0))
    assert total == 1 + x[ran].sum()
    whole, left = divmod(number, size)
    expected = whole * size + -(-left // PARTS[size]) * PARTS[size]
    assert rows_run == ran.sum() == expected == steps_of(number, size).rows
    # All rows of whole chunks are known to be rows to run.
    known = np.asarray(outputs["known"]) == 1
    assert known.sum() == whole * size
    np.testing.assert_array_equal(runs[known], True)
    if number == expected:
        np.testing.assert_array_equal(ran, runs)


@pytest.mark.parametrize("size", SIZES)
def test_examples_of_a_vmap_run_as_many_chunks_as_one_of_them_needs(size):
    """Without a select between the old and the new carry, which would copy it."""
    runs = np.arange(4 * size) < np.array([[size], [2 * size + 1], [size + 2]])
    x = np.random.default_rng(0).normal(size=runs.shape).astype(np.float32)
    several = jax.vmap(lambda x, runs: runs_of({"x": x}, 4, runs))
    (totals, rows_run), outputs = jax.jit(several)(x, runs)
    ran = np.asarray(outputs["ran"]) == 1
    assert set(rows_run.tolist()) == {3 * size if size < 128 else 2 * size + size // 4}
    assert ran.sum(axis=1).tolist() == rows_run.tolist()
    # A chunk is known to have only rows to run if this holds in every example.
    known = np.asarray(outputs["known"]) == 1
    assert known.sum(axis=1).tolist() == [size] * 3
    assert runs[known].all()
    np.testing.assert_allclose(totals, 1 + np.where(ran, x, 0).sum(axis=1), rtol=1e-5, atol=1e-5)
    # If the numbers of steps differed, JAX would ask in each step whether any example goes on.
    text = jax.jit(several).lower(x, runs).as_text()
    assert text.count("stablehlo.while") == 2
    assert "stablehlo.or" not in text


@pytest.mark.parametrize("size", SIZES)
def test_derivatives_of_a_loop_over_rows_that_run(size):
    """Also in reverse mode, where all chunks run, and for only some of the arguments."""
    x = jnp.linspace(-2, 3, 4 * size)
    runs = np.arange(4 * size) % 3 == 0

    def loss(weight, x, runs):
        def body(weight, total, x, all_run):
            return total + jnp.sum(weight * x["x"] * x["runs"]), jnp.sin(weight * x["x"])

        rows = {"x": x, "runs": jnp.asarray(runs_of_rows, x.dtype)}
        total, outputs = over_chunks(body, (weight, jnp.float32(0), rows), 4, runs=runs)
        return total + jnp.sum(jnp.where(runs_of_rows, outputs, 0) * jnp.arange(1.0, 4 * size + 1))

    runs_of_rows = runs
    for argnums in (0, 1, (0, 1)):
        for transformed in (jax.grad, jax.jacfwd):
            found = transformed(lambda w, x: loss(w, x, jnp.asarray(runs)), argnums)(0.7, x)
            expected = transformed(lambda w, x: loss(w, x, None), argnums)(0.7, x)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), found, expected)


# Loops over blocks of rows


ROWS = {12: 4, 13: 4, 3: 3}  # for blocks of 4 rows: three blocks, a remainder of 1, one block


def in_blocks(rows, *, backend, replaces, traced=True):
    """The results of the loop for this number of rows of 3 classes, and the shapes of its parts."""
    seen = []
    tile = jnp.arange(3.0 * rows).reshape(rows, 3)
    of_rows = {"i": jnp.arange(rows), "none": None}

    def body(sums, parts, of_rows):
        (part,) = parts
        seen.append(part.shape)
        sums = {"total": sums["total"] + jnp.sum(part), "order": 3 * sums["order"] + part[0, 0]}
        outputs = {"i": 5 * of_rows["i"], "sum": jnp.sum(part, axis=1), "none": of_rows["none"]}
        return sums, (2 * part + 1 if replaces else None,), outputs

    def run(tile, of_rows):
        sums = {"total": jnp.float32(7), "order": jnp.float32(0)}
        sums, (new,), outputs = in_row_blocks(body, sums, (tile,), of_rows, backend=backend)
        return sums, new, outputs

    sums, new, outputs = (jax.jit(run) if traced else run)(tile, of_rows)
    return np.asarray(tile), sums, new, outputs, seen


@pytest.mark.parametrize("replaces", [True, False], ids=["replaced", "left"])
@pytest.mark.parametrize("traced", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("rows", ROWS)
def test_blocks_of_rows_give_what_all_rows_give(monkeypatch, rows, replaces, traced):
    monkeypatch.setattr(Backend, "row_block_bytes", 4 * 3 * 4 + 11)
    tile, sums, new, outputs, seen = in_blocks(
        rows, backend=LOCAL_CPU, replaces=replaces, traced=traced
    )
    size = ROWS[rows]
    assert set(seen) == {(size, 3)} | ({(rows % size, 3)} if rows % size else set())
    assert sums["total"] == 7 + tile.sum()
    firsts = tile[::size, 0]
    assert sums["order"] == functools.reduce(lambda number, x: 3 * number + x, firsts, 0)
    np.testing.assert_array_equal(new, 2 * tile + 1 if replaces else tile)
    np.testing.assert_array_equal(outputs["i"], 5 * np.arange(rows))
    np.testing.assert_array_equal(outputs["sum"], tile.sum(axis=1))
    assert outputs["none"] is None


def has_loop(backend, rows):
    """Whether a program has a loop over blocks of this number of rows."""
    tile = jnp.zeros((rows, 3))
    jaxpr = jax.make_jaxpr(
        lambda tile: in_row_blocks(
            lambda sums, parts, of_rows: (sums, parts, of_rows), (), (tile,), None, backend=backend
        )
    )(tile)
    return "scan" in str(jaxpr)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if not b.loops_over_rows], ids=str)
def test_elsewhere_there_is_one_block(monkeypatch, backend):
    monkeypatch.setattr(Backend, "row_block_bytes", 1)
    tile, sums, new, outputs, seen = in_blocks(13, backend=backend, replaces=True)
    assert seen == [(13, 3)]
    assert sums["total"] == 7 + tile.sum()
    np.testing.assert_array_equal(new, 2 * tile + 1)
    np.testing.assert_array_equal(outputs["sum"], tile.sum(axis=1))
    assert has_loop(LOCAL_CPU, 13)
    assert not has_loop(backend, 13)


def test_a_small_tile_is_one_block():
    *_, seen = in_blocks(13, backend=LOCAL_CPU, replaces=True)
    assert seen == [(13, 3)]
    assert not has_loop(LOCAL_CPU, 13)


# Loops over blocks of classes


@pytest.mark.parametrize(
    ("hidden_size", "classes", "block_bytes", "expected"),
    [
        (4096, 8192, 8 * MIB, 512),
        (4096, 8191, 8 * MIB, 512),  # a prime
        (4096, 128256, 8 * MIB, 501),  # the largest divisor, if it is more than half
        (1024, 8192, 8 * MIB, 2048),
        (1, 8192, 8 * MIB, 2048),  # at most
        (0, 8192, 8 * MIB, 2048),
        (2**20, 8192, 8 * MIB, 256),  # at least
        (1000, 8191, 2 * MIB, 512),  # at most 524, and a multiple of 64
        (4096, 100, 8 * MIB, 100),
    ],
)
def test_classes_per_block(monkeypatch, hidden_size, classes, block_bytes, expected):
    monkeypatch.setattr(Backend, "class_block_bytes", block_bytes)
    assert classes_per_block(hidden_size, classes, LOCAL_CPU) == expected
    for backend in BACKENDS:
        if not backend.loops_over_rows:
            assert classes_per_block(hidden_size, classes, backend) == classes


def test_classes_per_block_of_any_number_of_classes():
    (classes,) = export.symbolic_shape("k")
    assert classes_per_block(4096, classes, LOCAL_CPU) is classes
    assert classes_per_block(classes, 8192, LOCAL_CPU) == 8192


@VERSIONS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("classes", "sizes"), [(100, [None]), (512, [256]), (521, [256, 9])])
def test_blocks_of_classes_are_each_column_once(monkeypatch, classes, sizes, dtype, version):
    monkeypatch.setattr(Backend, "class_block_bytes", 1)
    backend = Backend("cpu", True, version)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, classes)), dtype)
    seen = []

    def body(carry, at):
        total, copy = carry
        seen.append(at.size)
        part = at.take(kernel)
        return total + jnp.sum(part.astype(np.float32)), at.put(copy, at.take(copy) - part)

    @jax.jit
    def run(kernel):
        return over_class_blocks(body, (jnp.float32(0), 3 * kernel), kernel, backend)

    total, copy = run(kernel)
    assert seen == sizes
    exact = np.asarray(kernel, np.float64)
    np.testing.assert_allclose(total, exact.sum(), rtol=1e-5)
    # XLA may round 3 x - x once or twice.
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    actual, expected = (np.asarray(a, np.float64) for a in (copy, 3 * kernel - kernel))
    np.testing.assert_allclose(actual, expected, rtol=tolerance)


def test_classes_are_one_block_elsewhere(monkeypatch):
    monkeypatch.setattr(Backend, "class_block_bytes", 1)
    for backend in BACKENDS:
        if not backend.loops_over_rows:
            found = over_class_blocks(
                lambda carry, at: [*carry, at], [], jnp.zeros((3, 521)), backend
            )
            assert found == [Columns(0, None, backend)]


# Columns


@VERSIONS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int16"])
def test_columns_are_taken_and_replaced_bit_by_bit(dtype, version):
    """Also NaN, -0 and subnormal numbers."""
    numbers = np.random.default_rng(0).integers(0, 2**16, size=(3, 11)).astype(np.uint16)
    x = lax.bitcast_convert_type(jnp.asarray(numbers), jnp.float16).astype("float32")
    if dtype != "float32":
        x = lax.bitcast_convert_type(jnp.asarray(numbers), dtype)

    def bits(x):
        return np.asarray(x).view(np.uint32 if dtype == "float32" else np.uint16)

    @jax.jit
    def take(x, first):
        return Columns(first, 4, Backend("cpu", True, version)).take(x)

    @jax.jit
    def put(x, part, first):
        return Columns(first, 4, Backend("cpu", True, version)).put(x, part)

    for first in (0, 3, 7):
        part = take(x, first)
        assert part.dtype == x.dtype
        np.testing.assert_array_equal(bits(part), bits(x)[:, first : first + 4])
        expected = bits(x).copy()
        expected[:, first : first + 4] = expected[:, :4]
        np.testing.assert_array_equal(bits(put(x, x[:, :4], first)), expected)


@VERSIONS
def test_all_columns_are_the_array_itself(version):
    at = Columns(0, None, Backend("cpu", True, version))
    x, y = jnp.ones((3, 5)), jnp.zeros((3, 5))
    assert at.take(x) is x
    assert at.put(x, y) is y


@VERSIONS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_columns_are_linear(dtype, version):
    """Columns have a derivative although they are taken as bits, which have none."""
    at = Columns(jnp.int32(3), 4, Backend("cpu", True, version))
    x, g = jnp.arange(22, dtype=dtype).reshape(2, 11), jnp.arange(1, 9, dtype=dtype).reshape(2, 4)

    @jax.jit
    def derivatives(x, g):
        (by_take,) = jax.vjp(at.take, x)[1](g)
        (by_put,) = jax.vjp(lambda x: at.put(x, g), x)[1](x)
        return jax.jvp(at.take, (x,), (2 * x,)), by_take, by_put

    (value, tangent), by_take, by_put = derivatives(x, g)
    np.testing.assert_array_equal(value, x[:, 3:7])
    np.testing.assert_array_equal(tangent, 2 * x[:, 3:7])
    np.testing.assert_array_equal(by_take, jnp.zeros_like(x).at[:, 3:7].set(g))
    np.testing.assert_array_equal(by_put, x.at[:, 3:7].set(0))


@VERSIONS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_loop_slices_integers_where_it_would_convert_all_of_the_array(dtype, version):
    at = Columns(3, 4, Backend("cpu", True, version))
    jaxpr = jax.make_jaxpr(at.take)(jnp.zeros((2, 11), dtype))
    assert ("u16[2,4]" in str(jaxpr)) == (version == (0, 10) and dtype != "float32")
