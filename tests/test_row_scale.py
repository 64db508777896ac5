"""A logit_scale per row: policies, precision and transformations.

The tests of the head cover option cases, meshes and transformations of calls with all options.
"""

import os

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from option_cases import every_rule
from oracle import assert_close, naming
from problems import head_problem, normal, with_gradients
from programs import quick_jit

import sxe

N, D, K = 8, 3, 16
INF, NAN = np.inf, np.nan
REDUCTIONS = ("mean", "none")


def head(**static):
    return lambda p: sxe.linear_softmax_cross_entropy(**p, chunk_size=3, **static)


def cotangent(reduction):
    return normal(*((N,) if reduction == "none" else ()))


def check(found, p, g, reduction):
    value, gradients = found
    assert_close(value, oracle.head_loss(**p, reduction=reduction))
    right = oracle.head_gradients(**p, g=np.asarray(g, np.float64), reduction=reduction)
    names = right.keys() & gradients.keys()
    assert names >= {"hidden", "kernel", "logit_scale"}
    for name in names:
        with naming(name):
            assert gradients[name].dtype == p[name].dtype
            dtype = gradients[name].dtype
            assert_close(
                gradients[name], right[name], dtype, scale=max(1, np.abs(right[name]).max())
            )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_multiplies_the_product_in_float32(dtype, reduction):
    """Scaling the hidden states instead would round them again. The gradient is rounded once."""
    p = head_problem("row_scale", "softcap", dtype=dtype, shape=(N, D, K))
    p["logit_scale"] = (1 / p["logit_scale"]).astype(jnp.dtype(dtype))
    g = cotangent(reduction)
    check(quick_jit(with_gradients(head(reduction=reduction)))(p, g), p, g, reduction)


@every_rule
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_number(rule, reduction):
    """With 0 all classes are equally likely, up to the bias. A negative scale negates logits."""
    p = head_problem("row_scale", "bias", "z_loss", shape=(N, D, K))
    p["logit_scale"][:4] = 0, -1, -0.3, 1e-20
    g = cotangent(reduction)
    call = quick_jit(with_gradients(head(reduction=reduction, rule=rule)))
    check(call(p, g), p, g, reduction)


@every_rule
@pytest.mark.parametrize("options", [("where",), ("weights", "where"), ("ignore_index",)], ids=str)
def test_rows_that_do_not_count(rule, options):
    """These rows may have any scale, and its gradient is 0."""
    p = head_problem("row_scale", "bias", "softcap", *options, shape=(N, D, K))
    static = {"reduction": "none", "rule": rule}
    if "ignore_index" in options:
        static["ignore_index"] = p.pop("ignore_index")
        counts = p["labels"] != static["ignore_index"]
    else:
        counts = p["where"] & (p.get("weights", 1) != 0)
    assert 0 < counts.sum() < N
    bad = p | {"logit_scale": p["logit_scale"].copy()}
    bad["logit_scale"][~counts] = np.resize([NAN, INF, -INF], (~counts).sum())
    g = cotangent("none")
    call = quick_jit(with_gradients(head(**static)))
    value, gradients = call(bad, g)
    right_value, right = call(p, g)
    assert_close(value, np.float64(right_value))
    assert not np.asarray(gradients["logit_scale"])[~counts].any()
    for name in right.keys() - {"weights"}:
        with naming(name):
            assert_close(gradients[name], np.float64(right[name]), scale=1)


@every_rule
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_row_that_counts_without_a_finite_scale(rule, bad):
    """This row and the gradients of its own arrays are NaN. Other rows are not."""
    p = head_problem("row_scale", shape=(N, D, K))
    p["logit_scale"][3] = bad
    static = {"reduction": "none", "rule": rule}
    value, gradients = quick_jit(with_gradients(head(**static)))(p, np.ones(N, np.float32))
    for a in (value, gradients["logit_scale"], gradients["hidden"]):
        nan = np.isnan(a).reshape(N, -1)
        np.testing.assert_array_equal(nan.all(axis=1), np.arange(N) == 3)
        np.testing.assert_array_equal(nan.any(axis=1), np.arange(N) == 3)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_beside_a_row_of_weight_0_without_a_finite_scale(bad, reduction):
    """In reverse over reverse mode, 0 times a NaN of that row must not enter d kernel."""
    p = head_problem("logit_scale", shape=(N, D, K), seed=2)
    p["weights"] = np.where(np.arange(N) == 3, 0, 1.5).astype(np.float32)
    scales = np.resize(p["logit_scale"], N).astype(np.float32)
    g, v = cotangent(reduction), normal(D, K)

    @jax.jit
    def second(scales):
        def gradient(kernel):
            def loss(kernel):
                given = p | {"kernel": kernel, "logit_scale": scales}
                return jnp.sum(g * head(reduction=reduction)(given))

            return jax.grad(loss)(kernel)

        return jax.grad(lambda kernel: jnp.sum(v * gradient(kernel)))(p["kernel"])

    assert_close(second(np.where(np.arange(N) == 3, bad, scales)), second(scales))


def check_confident_rows():
    """Their losses are far below the rounding errors of logits, which XLA may round in two ways."""
    n, k = 242, 40
    rng = np.random.default_rng(0)
    first = np.arange(k) == 0
    counts = rng.random(n) < 0.5
    plain = {"hidden": rng.normal(size=(n, 6)), "kernel": rng.normal(size=(6, k))}
    led = {name: a.copy() for name, a in plain.items()}
    led["hidden"][:, 0], led["kernel"][0] = 10, np.where(first, 2, -2)
    biased = plain | {"bias": np.where(first, 1, -60)}
    for p in (led, biased):
        for scale in (np.float32(1.3), rng.uniform(1, 1.5, n)):
            q = {name: np.float32(a) for name, a in (p | {"logit_scale": scale}).items()}
            z = q["hidden"].astype(float) @ q["kernel"] * np.resize(q["logit_scale"], n)[:, None]
            z = z + q.get("bias", 0)
            losses = np.log1p(np.exp(z[:, 1:] - z[:, :1]).sum(axis=1))
            for where in (None, counts):
                for reduction in ("sum", "none"):

                    def loss(hidden, q=q, where=where, reduction=reduction):
                        given = q | {"hidden": hidden, "labels": np.zeros(n, int), "where": where}
                        static = {"reduction": reduction, "chunk_size": 121}
                        return jnp.sum(sxe.linear_softmax_cross_entropy(**given, **static))

                    value, gradient = jax.jit(jax.value_and_grad(loss))(q["hidden"])
                    right = np.where(True if where is None else where, losses, 0).sum()
                    np.testing.assert_allclose(value, right, rtol=1e-4)
                    assert 0 < np.abs(gradient).max() < 1000 * losses.max()


@pytest.mark.slow
def test_confident_rows_on_one_device():
    """With XLA's optimizations, in a separate process."""
    path = f"{fresh.ROOT}{os.pathsep}{fresh.ROOT / 'tests'}"
    fresh.run("-c", "import test_row_scale; test_row_scale.check_confident_rows()", PYTHONPATH=path)


def test_a_scalar_is_that_of_all_rows():
    p = head_problem("logit_scale", shape=(2, 4, D, K))
    q = p | {"logit_scale": np.full((2, 4), p["logit_scale"])}
    for reduction in REDUCTIONS:
        call = quick_jit(with_gradients(head(reduction=reduction)))
        g = normal(*((2, 4) if reduction == "none" else ()))
        (value, gradients), (right, expected) = call(q, g), call(p, g)
        assert_close(value, np.float64(right))
        assert_close(gradients["logit_scale"].sum(), np.float64(expected["logit_scale"]), scale=10)
        assert_close(gradients["hidden"], np.float64(expected["hidden"]))


def test_one_row():
    """For a single row, both kinds of scale are scalars."""
    p = head_problem("logit_scale", shape=(1, D, K))
    p |= {name: p[name][0] for name in ("hidden", "labels")}
    check(with_gradients(head())(p, np.float32(1)), p, 1, "mean")


@pytest.mark.parametrize("scales", ["scalars", "rows"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vmap_over_scales_alone(scales, reduction):
    p = head_problem("bias", shape=(N, D, K))
    batch = 0.5 + np.abs(normal(3, *((N,) if scales == "rows" else ())))
    g = cotangent(reduction)
    call = with_gradients(head(reduction=reduction))
    found = quick_jit(jax.vmap(lambda s: call(p | {"logit_scale": s}, g)))(batch)
    for i, scale in enumerate(batch):
        each = jax.tree.map(lambda a, i=i: a[i], found)
        q = p | {"logit_scale": scale}
        value, gradients = each
        assert_close(value, oracle.head_loss(**q, reduction=reduction))
        right = oracle.head_gradients(**q, g=np.float64(g), reduction=reduction)
        for name in ("hidden", "kernel", "bias", "logit_scale"):
            assert_close(gradients[name], right[name], scale=max(10, np.abs(right[name]).max()))


def test_rows_of_two_axes_on_a_mesh():
    """Each axis of the rows is sharded, and so is that axis of the scale."""
    p = head_problem("row_scale", "where", shape=(2, 4, D, K))
    mesh = make_mesh(2, 2, 2, names=("a", "b", "model"))
    over = sxe.over_mesh(sxe.linear_softmax_cross_entropy, mesh, batch=P("a", "b"), classes="model")
    g = normal(2, 4)
    found = quick_jit(with_gradients(lambda p: over(**p, reduction="none")))(p, g)
    check(found, p, g, "none")
