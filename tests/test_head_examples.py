"""The head with rows that do not count, and under ``jax.vmap``, where examples become its rows."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from option_cases import each_value
from oracle import assert_close
from problems import head_problem, normal

import sxe
from sxe._head import projection

N, D, K, SIZE = 61, 5, 11, 8  # the last of 8 chunks has 3 rows of padding
PADDED = 64


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """With several devices, JAX does not know before compiling whether one device has all rows."""
    monkeypatch.setattr("sxe._backend.device_count", lambda: 1)


@pytest.fixture
def rows_multiplied(monkeypatch):
    """The number of rows that a program multiplies with the kernel to get logits."""
    found = []
    u = projection.Products.u

    def counting(self, hidden, kernel, class_mask=None):
        def note(_):
            found.append(len(hidden))
            return np.float32(0)

        nothing = jax.pure_callback(
            note,
            jax.ShapeDtypeStruct((), jnp.float32),
            jax.lax.stop_gradient(hidden[0, 0]),
            vmap_method="sequential",
        )
        return u(self, hidden, kernel, class_mask) + jax.lax.stop_gradient(nothing)

    monkeypatch.setattr(projection.Products, "u", counting)

    def run(program, *arguments):
        found.clear()
        result = jax.block_until_ready(program(*arguments))
        return result, sum(found)

    return run


def masks(number):
    """Masks with this number of rows that count: scattered, and in one piece."""
    scattered = np.isin(np.arange(N), np.random.default_rng(number).permutation(N)[:number])
    return scattered, np.arange(N) >= N - number


def ways(p, mask):
    """The ways to exclude rows, as arguments of a call."""
    weights = np.where(mask, np.linspace(0.5, 2, N), 0).astype(np.float32)
    return {
        "where": {"where": mask},
        "ignore_index": {"labels": np.where(mask, p["labels"], -7), "ignore_index": -7},
        "weights": {"weights": weights},
    }


def head(p, **static):
    return sxe.linear_softmax_cross_entropy(**p, chunk_size=SIZE, **static)


@each_value(way=["where", "ignore_index", "weights"], reduction=["mean", "sum", "none"])
def test_chunks_without_a_row_that_counts_are_not_run(way, reduction, rows_multiplied):
    """Neither for the value nor for gradients, which are the same as when all chunks are run."""
    p = head_problem("bias", shape=(N, D, K), seed=3)
    g = normal(N) if reduction == "none" else np.float32(1.3)
    static = {"ignore_index": -7 if way == "ignore_index" else None, "reduction": reduction}

    @jax.jit
    def loss(p):
        return head(p, **static)

    @jax.jit
    def value_and_gradients(p):
        by = {name: p[name] for name in ("hidden", "kernel", "bias")}
        value, pullback = jax.vjp(lambda by: head(p | by, **static), by)
        return value, pullback(jnp.asarray(g))[0]

    for number in (0, 1, 8, 9, 17, 61):
        for mask in masks(number):
            given = p | ways(p, mask)[way]
            given.pop("ignore_index", None)
            rows = -(-number // SIZE) * SIZE
            value, count = rows_multiplied(loss, given)
            assert count == rows
            (same, gradients), count = rows_multiplied(value_and_gradients, given)
            assert count == (2 if reduction == "none" else 1) * rows
            right = given | {"labels": p["labels"], "where": mask}
            for found in (value, same):
                assert_close(found, oracle.head_loss(**right, reduction=reduction))
            expected = oracle.head_gradients(**right, g=np.float64(g), reduction=reduction)
            for name, gradient in gradients.items():
                assert_close(gradient, expected[name], scale=max(1, np.abs(expected[name]).max()))
            assert not np.asarray(gradients["hidden"])[~mask].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_are_left_are_run_in_quarters_of_a_chunk(reduction, rows_multiplied):
    """3 chunks of 128 rows. The loss and gradients are the same as with all rows in chunks."""
    n, size = 384, 128
    p = head_problem("bias", shape=(n, D, K), seed=3)
    g = normal(n) if reduction == "none" else np.float32(1.3)

    @jax.jit
    def value_and_gradients(p):
        def loss(by):
            static = {"reduction": reduction, "chunk_size": size}
            return sxe.linear_softmax_cross_entropy(**(p | by), **static)

        value, pullback = jax.vjp(loss, {name: p[name] for name in ("hidden", "kernel", "bias")})
        return value, pullback(jnp.asarray(g))[0]

    for number, rows in (
        (0, 0),
        (33, 64),
        (128, 128),
        (140, 160),
        (192, 192),
        (193, 224),
        (383, 384),
    ):
        mask = np.isin(np.arange(n), np.random.default_rng(number).permutation(n)[:number])
        (value, gradients), count = rows_multiplied(value_and_gradients, p | {"where": mask})
        assert count == (2 if reduction == "none" else 1) * rows
        assert_close(value, oracle.head_loss(**p, where=mask, reduction=reduction))
        right = oracle.head_gradients(**p, where=mask, g=np.float64(g), reduction=reduction)
        for name, gradient in gradients.items():
            assert_close(gradient, right[name], scale=max(1, np.abs(right[name]).max()))
        assert not np.asarray(gradients["hidden"])[~mask].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("way", ["where", "ignore_index", "weights"])
def test_chunks_whose_rows_all_count_are_not_masked(way, reduction):
    """XLA's CPU backend would write masked logits out. The number of selects is as without mask."""
    n, size = 384, 128
    p = head_problem(shape=(n, D, K), seed=3)
    given = {"where": np.ones(n, bool), "ignore_index": None, "weights": np.ones(n, np.float32)}

    def selects(p, **static):
        def loss(by):
            static_of_all = {"reduction": reduction, "chunk_size": size}
            losses = sxe.linear_softmax_cross_entropy(**(p | by), **static_of_all, **static)
            return jnp.sum(losses)

        by = {name: p[name] for name in ("hidden", "kernel")}
        text = jax.jit(lambda p: jax.value_and_grad(loss)(by)).lower(p).as_text()
        assert f"tensor<{size}x{K}xf32>" in text
        of_chunks = f"stablehlo.select .*tensor<{size}x{K}xf32>"
        of_parts = f"stablehlo.select .*tensor<{size // 4}x{K}xf32>"
        return len(re.findall(of_chunks, text)), len(re.findall(of_parts, text))

    without, _ = selects(p)
    if way == "ignore_index":
        found, of_parts = selects(p, ignore_index=-7)
    else:
        found, of_parts = selects(p | {way: given[way]})
    assert found == without < of_parts


def test_derivatives_of_weights_of_0_beside_a_row_without_loss():
    """Whole chunks then include rows of weight 0. A row whose logits overflow causes no NaN."""
    n, size = 24, 8
    p = head_problem(shape=(n, D, K), seed=3)
    p["weights"] = np.where(np.arange(n) % 3 == 0, 0, 1.5).astype(np.float32)
    p["hidden"] = np.where(np.arange(n)[:, None] == 6, np.float32(3e38), p["hidden"])

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(by, chunk_size):
        def loss(by):
            static = {"reduction": "sum", "chunk_size": chunk_size}
            return sxe.linear_softmax_cross_entropy(**(p | by), **static)

        return jax.grad(loss)(by)

    by = {name: jnp.asarray(p[name]) for name in ("hidden", "kernel", "weights")}
    found, right = gradients(by, size), gradients(by, n)
    for name, gradient in found.items():
        assert_close(gradient, right[name])
    losses = oracle.head_loss(**(p | {"weights": None}), where=np.arange(n) != 6, reduction="none")
    assert_close(found["weights"], losses)


@pytest.mark.parametrize("case", ["no mask", "derivative of weights", "jvp", "autodiff"])
def test_when_all_chunks_are_run(case, rows_multiplied):
    p = head_problem(shape=(N, D, K), seed=3)
    (mask, _) = masks(9)
    by = ("hidden", "kernel")
    if case == "derivative of weights":
        p, by = p | ways(p, mask)["weights"], ("weights",)
    elif case != "no mask":
        p["where"] = mask
    rule = case if case in ("jvp", "autodiff") else "vjp"
    given = {name: p[name] for name in by}

    def loss(given):
        return head(p | given, rule=rule)

    gradients, count = rows_multiplied(jax.jit(jax.grad(loss)), given)
    assert count % PADDED == 0
    assert count >= PADDED
    if case == "derivative of weights":  # (loss - mean) / sum of weights, for a row of weight 0
        losses = oracle.head_loss(p["hidden"], p["kernel"], p["labels"], reduction="none")
        mean = oracle.head_loss(**p)
        assert_close(gradients["weights"], (losses - mean) / p["weights"].sum(dtype=np.float64))


@pytest.mark.parametrize("second", ["reverse", "forward"])
def test_second_derivatives_with_rows_that_do_not_count(second):
    p = head_problem(shape=(N, D, K), seed=3)
    mask, _ = masks(17)
    kernel_dot = normal(D, K, seed=8)

    def gradient(kernel, **rows):
        call = {"labels": p["labels"], "hidden": p["hidden"]} | rows
        return jax.grad(lambda kernel: head(call | {"kernel": kernel}))(kernel)

    def product(**rows):
        f = functools.partial(gradient, **rows)
        if second == "forward":
            return jax.jvp(f, (p["kernel"],), (kernel_dot,))[1]
        return jax.grad(lambda kernel: jnp.vdot(f(kernel), kernel_dot))(p["kernel"])

    few = {"hidden": p["hidden"][mask], "labels": p["labels"][mask]}
    np.testing.assert_allclose(product(where=mask), product(**few), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_device_of_a_mesh_skips_rows_of_its_own(reduction, check_vma, monkeypatch):
    """Along "data", devices have no, one, all or some rows that count. "model" has classes."""
    monkeypatch.setattr("sxe._backend.device_count", lambda: 8)
    mesh = make_mesh(4, 2, names=("data", "model"))
    rows = 4 * N
    p = head_problem("bias", shape=(rows, D, 2 * K), seed=3)
    mask = np.concatenate([np.zeros(N), np.arange(N) == 7, np.ones(N), masks(17)[0]]) > 0
    g = normal(rows) if reduction == "none" else np.float32(1.3)
    options = {"axis_name": "model", "batch_axis_name": "data", "reduction": reduction}

    def of_devices(hidden, kernel, bias, labels, where):
        p = {"hidden": hidden, "kernel": kernel, "bias": bias, "labels": labels, "where": where}
        return head(p, **options)

    out = P("data") if reduction == "none" else P()
    split = (P("data"), P(None, "model"), P("model"), P("data"), P("data"))
    f = jax.shard_map(of_devices, mesh=mesh, in_specs=split, out_specs=out, check_vma=check_vma)
    *inputs, labels = p["hidden"], p["kernel"], p["bias"], p["labels"]
    assert "cumsum" in str(jax.make_jaxpr(f)(*inputs, labels, mask))  # rows are sorted to skip some
    value, pullback = jax.vjp(lambda *inputs: jax.jit(f)(*inputs, labels, mask), *inputs)
    gradients = pullback(jnp.asarray(g))
    assert_close(value, oracle.head_loss(**p, where=mask, reduction=reduction))
    expected = oracle.head_gradients(**p, where=mask, g=np.float64(g), reduction=reduction)
    for name, gradient in zip(("hidden", "kernel", "bias"), gradients, strict=True):
        assert_close(gradient, expected[name], scale=max(1, np.abs(expected[name]).max()))


def test_rows_are_sorted_where_one_device_has_them_and_some_may_not_count(monkeypatch):
    """In other cases nothing is sorted. Rows that several devices hold would have to be moved."""
    p = head_problem("where", shape=(N, D, K))

    def sorts(p):
        return "cumsum" in str(jax.make_jaxpr(head)(p))

    assert sorts(p)
    every = {name: p[name] for name in ("hidden", "kernel", "labels")}
    assert not sorts(every)
    assert not sorts(every | {"class_mask": np.arange(K) > 0})
    jax.clear_caches()
    monkeypatch.setattr("sxe._backend.device_count", lambda: 8)
    assert not sorts(p)


def test_a_number_of_rows_that_is_a_symbol():
    """One program serves any number of rows. It runs all chunks."""
    (n,) = export.symbolic_shape("n")

    def loss(hidden, kernel, labels, where):
        return head({"hidden": hidden, "kernel": kernel, "labels": labels, "where": where})

    shapes = [((n, D), "float32"), ((D, K), "float32"), ((n,), "int32"), ((n,), "bool")]
    inputs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    program = export.export(jax.jit(jax.value_and_grad(loss, (0, 1))))(*inputs)
    for rows in (5, 29):
        p = head_problem("where", shape=(rows, D, K), seed=3)
        value, gradients = program.call(p["hidden"], p["kernel"], p["labels"], p["where"])
        assert_close(value, oracle.head_loss(**p))
        right = oracle.head_gradients(**p)
        for name, gradient in zip(("hidden", "kernel"), gradients, strict=True):
            assert_close(gradient, right[name])


@each_value(size=[1, SIZE, N], reduction=["mean", "none"])
def test_nan_in_rows_that_do_not_count_in_reverse_over_reverse(reduction, size):
    p = head_problem(shape=(N, D, K), seed=3)
    mask, _ = masks(17)
    direction = normal(D, K, seed=8)

    def product(hidden):
        def loss(kernel):
            call = {"hidden": hidden, "kernel": kernel, "labels": p["labels"], "where": mask}
            return jnp.sum(
                sxe.linear_softmax_cross_entropy(**call, reduction=reduction, chunk_size=size)
            )

        return jax.grad(lambda kernel: jnp.vdot(jax.grad(loss)(kernel), direction))(p["kernel"])

    dirty = np.where(mask[:, None], p["hidden"], np.float32(np.nan))
    run = jax.jit(product)
    np.testing.assert_allclose(run(dirty), run(p["hidden"]), rtol=2e-5, atol=1e-6)


# Examples of a vmap

B, T = 3, 7
ARRAYS = ("hidden", "kernel", "labels", "where", "weights", "bias", "logit_scale", "z_loss")
# The mapped arguments, and whether the examples become rows of one call.
MAPPED = {
    ("hidden", "labels"): True,
    ("hidden",): True,
    ("hidden", "labels", "where"): True,
    ("hidden", "labels", "where", "weights"): True,
    ("hidden", "weights"): True,
    ("labels",): False,
    ("where",): False,
    ("hidden", "kernel", "labels"): False,
    ("kernel",): False,
    ("hidden", "labels", "bias"): False,
    ("hidden", "labels", "logit_scale"): False,
    ("hidden", "labels", "z_loss"): False,
}


def examples_problem(mapped, dense=False):
    """The arguments of a call. The mapped ones have an axis of examples first."""
    options = ("where", "weights", "bias", "logit_scale", "z_loss")
    p = head_problem(*options, dense=dense, shape=(T, D, K), lead=(B,), seed=4)
    return {name: a if name in mapped else a[0] for name, a in p.items()}


def by_example(p, mapped):
    return [{name: a[i] if name in mapped else a for name, a in p.items()} for i in range(B)]


def mapped_and_reductions():
    """Every second entry of MAPPED by default, with "mean" and "none" in turn."""
    for i, names in enumerate(MAPPED):
        for j, reduction in enumerate(("mean", "none")):
            marks = () if (i + 2 * j) % 4 == 0 else pytest.mark.slow
            yield pytest.param(names, reduction, id="-".join((*names, reduction)), marks=marks)


@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mapped", "reduction"), list(mapped_and_reductions()))
def test_vmap_over_any_arguments(mapped, reduction, dense):
    """The values, a gradient of the vmap, and a vmap of the gradient, checked per example."""
    p = examples_problem(mapped, dense)
    g = normal(B, T) if reduction == "none" else normal(B)
    axes = {name: 0 if name in mapped else None for name in p}
    by = ("hidden", "kernel", "bias", "weights")

    def loss(p):
        return sxe.linear_softmax_cross_entropy(**p, reduction=reduction, chunk_size=2)

    def of_examples(p):
        return jax.vmap(loss, (axes,))(p)

    @jax.jit
    def all_of(p, g):
        value, pullback = jax.vjp(lambda given: of_examples(p | given), {k: p[k] for k in by})

        def one(p, g):
            return jax.vjp(lambda given: loss(p | given), {k: p[k] for k in by})[1](g)[0]

        return of_examples(p), value, pullback(g)[0], jax.vmap(one, (axes, 0))(p, g)

    value, again, gradients, own = all_of(p, g)
    each = by_example(p, mapped)
    right = np.stack([oracle.head_loss(**one, reduction=reduction) for one in each])
    assert_close(value, right)
    assert_close(again, right)

    @jax.jit
    def of_one(one, g):
        return jax.vjp(lambda given: loss(one | given), {k: one[k] for k in by})[1](g)[0]

    expected = [of_one(one, g[i]) for i, one in enumerate(each)]
    for name in by:
        of_each = np.stack([e[name] for e in expected])
        scale = np.abs(of_each).max() + 1e-30
        np.testing.assert_allclose(own[name], of_each, rtol=1e-5, atol=1e-5 * scale)
        total = of_each if name in mapped else of_each.sum(axis=0)
        np.testing.assert_allclose(gradients[name], total, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("mapped", MAPPED, ids="-".join)
def test_examples_that_share_the_kernel_are_rows_of_one_call(mapped):
    """Then no product and no gradient of the kernel has an axis of examples."""
    p = examples_problem(mapped)
    axes = {name: 0 if name in mapped else None for name in p}

    def loss(hidden, kernel):
        call = p | {"hidden": hidden, "kernel": kernel}
        losses = jax.vmap(functools.partial(head, reduction="mean"), (axes,))
        return losses(call).mean()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(p["hidden"], p["kernel"]).as_text()
    assert (f"tensor<{B}x{D}x{K}xf32>" not in text) == MAPPED[mapped]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mapped", ["z_loss", "labels", "class_weights", "weights"])
def test_gradient_of_a_vmap_over_what_some_results_do_not_depend_on(mapped, reduction):
    p = head_problem("z_loss", "class_weights", "weights", shape=(5, D, K))
    several = head_problem("z_loss", "class_weights", "weights", shape=(5, D, K), lead=(2,))[mapped]

    def loss(hidden, z_loss, some):
        options = {"chunk_size": 2, "reduction": reduction, "return_metrics": True}
        given = p | {"hidden": hidden, "z_loss": z_loss, mapped: some}
        value, metrics = sxe.linear_softmax_cross_entropy(**given, **options)
        return jnp.sum(value), metrics

    def total(hidden, z_loss, several):
        values, metrics = jax.vmap(loss, (None, None, 0))(hidden, z_loss, several)
        return jnp.sum(values), metrics

    def one_by_one(hidden, z_loss, several):
        return sum(loss(hidden, z_loss, some)[0] for some in several)

    given = p["hidden"], p["z_loss"], several
    which = (0, 2) if mapped != "labels" else (0, 1)
    found, metrics = jax.grad(total, which, has_aux=True)(*given)
    for a, b in zip(found, jax.grad(one_by_one, which)(*given), strict=True):
        assert_close(a, b)
    each = [loss(*given[:2], some)[1] for some in several]
    jax.tree.map(np.testing.assert_allclose, metrics, jax.tree.map(lambda *a: jnp.stack(a), *each))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_of_a_vmap_over_the_labels_beside_metrics(reduction):
    """The metrics of logits are those of all sets of labels."""
    hidden, kernel, labels = normal(5, D), normal(D, K), np.arange(10).reshape(2, 5)

    def loss(hidden, labels):
        options = {"chunk_size": 2, "reduction": reduction, "return_metrics": True}
        value, metrics = sxe.linear_softmax_cross_entropy(hidden, kernel, labels, **options)
        return jnp.sum(value), metrics

    def total(hidden):
        values, metrics = jax.vmap(loss, (None, 0))(hidden, labels)
        return jnp.sum(values), metrics

    gradient, metrics = jax.grad(total, has_aux=True)(hidden)
    each = [jax.grad(loss, has_aux=True)(hidden, y) for y in labels]
    assert_close(gradient, each[0][0] + each[1][0])
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(m for _, m in each))
    jax.tree.map(np.testing.assert_allclose, metrics, stacked)


@pytest.mark.parametrize(("inside", "outside"), [*itertools.product((False, True), repeat=2)])
def test_nested_vmaps(inside, outside):
    """The gradient is inside, outside, or between the two vmaps, jitted or not."""
    hidden, labels = normal(2, B, T, D), np.arange(2 * B * T).reshape(2, B, T) % K
    kernel = normal(D, K)
    loss = functools.partial(sxe.linear_softmax_cross_entropy, chunk_size=2)

    def gradient(hidden, kernel, labels):
        f = jax.jit(loss) if inside else loss
        of_inner = jax.vmap(f, (0, None, 0))
        summed = jax.grad(lambda h, k, y: of_inner(h, k, y).sum(), (0, 1))
        between = jax.vmap(summed, (0, None, 0))
        of_all = jax.vmap(of_inner, (0, None, 0))
        every = jax.grad(lambda h, k, y: of_all(h, k, y).sum(), (0, 1))
        own = jax.vmap(jax.vmap(jax.grad(loss, (0, 1)), (0, None, 0)), (0, None, 0))
        return of_all(hidden, kernel, labels), *(
            f(hidden, kernel, labels) for f in (between, every, own)
        )

    gradient = jax.jit(gradient) if outside else gradient
    value, between, every, own = gradient(hidden, kernel, labels)
    for i, j in itertools.product(range(2), range(B)):
        one = hidden[i, j], kernel, labels[i, j]
        right = oracle.head_gradients(*one)
        assert_close(value[i, j], oracle.head_loss(*one))
        for found in (between[0], every[0], own[0]):
            assert_close(found[i, j], right["hidden"])
        assert_close(own[1][i, j], right["kernel"])
    np.testing.assert_allclose(between[1], own[1].sum(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(every[1], own[1].sum(axis=(0, 1)), rtol=1e-5, atol=1e-6)


def test_examples_along_any_axis_and_their_metrics():
    hidden, labels = normal(T, B, D), np.arange(B * T).reshape(B, T) % K
    kernel, where = normal(D, K), np.arange(B * T).reshape(T, B) % 3 > 0
    call = functools.partial(sxe.linear_softmax_cross_entropy, return_metrics=True, chunk_size=2)

    def loss(hidden, kernel, labels, where):
        return call(hidden, kernel, labels, where=where)

    value, metrics = jax.vmap(loss, (1, None, 0, 1))(hidden, kernel, labels, where)
    for i in range(B):
        expected, of_one = loss(hidden[:, i], kernel, labels[i], where[:, i])
        assert_close(value[i], expected)
        for name, found in metrics._asdict().items():
            np.testing.assert_allclose(found[i], getattr(of_one, name), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("rule", ["jvp", "autodiff"])
def test_vmap_by_other_rules(rule):
    hidden, labels, kernel = normal(B, T, D), np.arange(B * T).reshape(B, T) % K, normal(D, K)
    loss = functools.partial(sxe.linear_softmax_cross_entropy, chunk_size=2, rule=rule)

    def of_examples(kernel):
        return jax.vmap(loss, (0, None, 0))(hidden, kernel, labels)

    kernel_dot = normal(D, K, seed=5)
    value, dot = jax.jvp(of_examples, (kernel,), (kernel_dot,))
    each = [
        oracle.head_gradients(h, kernel, y)["kernel"] for h, y in zip(hidden, labels, strict=True)
    ]
    assert_close(
        value, [oracle.head_loss(h, kernel, y) for h, y in zip(hidden, labels, strict=True)]
    )
    assert_close(dot, [np.vdot(d, kernel_dot) for d in each])
    assert_close(jax.grad(lambda k: of_examples(k).sum())(kernel), sum(each))


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_of_examples_is_that_of_one_call(gradient):
    """8 sequences of 64 tokens, or 512 single rows. JAX's own rule needs one kernel for each."""
    shapes = [((8, 64, 128), "bfloat16"), ((128, 8192), "bfloat16"), ((8, 64), "int32")]
    inputs = [jax.ShapeDtypeStruct(*s) for s in shapes]
    rows = [
        jax.ShapeDtypeStruct((512, 128), "bfloat16"),
        inputs[1],
        jax.ShapeDtypeStruct((512,), "int32"),
    ]
    loss = functools.partial(sxe.linear_softmax_cross_entropy, chunk_size=64)

    def examples(*inputs):
        return jax.vmap(loss, (0, None, 0))(*inputs).mean()

    def temporaries(f, inputs):
        f = jax.grad(f, (0, 1)) if gradient else f
        return jax.jit(f).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    one = temporaries(loss, inputs)
    assert temporaries(examples, inputs) < 1.1 * one
    assert temporaries(examples, rows) < 1.1 * one


@pytest.mark.parametrize(("examples", "rows", "width"), [(0, 5, D), (3, 0, D), (3, 5, 0)])
def test_examples_and_axes_of_size_0(examples, rows, width):
    loss = sxe.linear_softmax_cross_entropy
    hidden, kernel = jnp.ones((examples, rows, width)), jnp.ones((width, K))
    labels = jnp.zeros((examples, rows), jnp.int32)
    value = jax.vmap(loss, (0, None, 0))(hidden, kernel, labels)
    right = np.log(K) if rows else 0
    np.testing.assert_allclose(value, np.full(examples, right), rtol=1e-6)
    gradients = jax.vmap(jax.grad(loss, (0, 1)), (0, None, 0))(hidden, kernel, labels)
    assert [d.shape for d in gradients] == [hidden.shape, (examples, width, K)]
    logits = jnp.ones((examples, rows, K))
    gradient = jax.vmap(jax.grad(sxe.softmax_cross_entropy))(logits, labels)
    assert gradient.shape == logits.shape
