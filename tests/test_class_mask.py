"""A call with a class mask has the result of a call without the masked classes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from option_cases import RULES, every_rule, one_in, vjp_by_default
from oracle import assert_close, naming
from problems import floats, head_problem, logits_problem, normal, with_gradients
from programs import all_of, quick_jit

import sxe

N, D, K = 8, 3, 16
INF, NAN = np.inf, np.nan
HEAD, LOGITS = sxe.linear_softmax_cross_entropy, sxe.softmax_cross_entropy
LOSSES = {"head": HEAD, "logits": LOGITS}
BOTH = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
rules_in_turn = one_in(2, loss=LOSSES, rule=RULES)

# On the second of four devices along "model", all classes are masked.
MASK = np.ones(K, bool)
MASK[[1, 4, 5, 6, 7, 14, 15]] = False
EVERY = ("weights", "class_weights", "label_smoothing", "z_loss")
OF_CLASSES = ("logits", "kernel", "bias", "class_weights")


def problem(loss, *options, dense=False, dtype="float32", seed=0):
    """The arguments of a call without a mask. Its targets are classes that can occur."""
    make, shape = (head_problem, (N, D, K)) if loss is HEAD else (logits_problem, (N, K))
    p = make(*options, dense=dense, dtype=dtype, shape=shape, seed=seed)
    labels = p["labels"]
    p["labels"] = np.where(MASK, labels, 0) if dense else np.flatnonzero(MASK)[labels % MASK.sum()]
    return p


def without(p):
    """The call without the masked classes."""
    q = {n: a[..., MASK] if n in OF_CLASSES else a for n, a in p.items()}
    dense = p["labels"].ndim == 2
    q["labels"] = p["labels"][:, MASK] if dense else (np.cumsum(MASK) - 1)[p["labels"]]
    return q


def filled(p, *bad):
    """The call with the mask. The entries of masked classes take the values ``bad`` in turn."""
    p = p | {n: p[n].copy() for n in OF_CLASSES if n in p}
    for name in OF_CLASSES:
        if name in p:
            fill = itertools.islice(itertools.cycle(bad), (~MASK).sum())
            p[name][..., ~MASK] = np.array(list(fill), p[name].dtype)
    return p | {"class_mask": MASK}


def check(found, p, right):
    """Compare value and gradients with those of a call without the masked classes."""
    (value, gradients), (right_value, right_gradients) = found, right
    assert_close(value, np.asarray(right_value, np.float64))
    for name, d in gradients.items():
        with naming(name):
            assert d.dtype == p[name].dtype
            d, expected = np.asarray(d), np.asarray(right_gradients[name]).astype(np.float64)
            if name in OF_CLASSES or (name == "labels" and d.ndim == 2):
                assert not d[..., ~MASK].any()
                d = d[..., MASK]
            assert_close(d, expected, scale=max(1, np.abs(expected).max(initial=0)))


def cotangent(static, dtype="float32"):
    return normal(*((N,) if static["reduction"] == "none" else ()), dtype=dtype, seed=5)


CALLS = [
    {"reduction": "mean"},
    {"reduction": "none"},
    {"reduction": "mean", "dense": True},
    {"reduction": "none", "softcap": True},
    {"reduction": "sum", "softcap": True, "dense": True},
]


@one_in(3, static=CALLS, loss=LOSSES, rule=RULES)
def test_as_without_the_masked_classes(loss, rule, static):
    """For all differentiable arguments, with NaN and infinities at masked classes."""
    static = dict(static)
    dense, softcap = static.pop("dense", False), static.pop("softcap", False)
    options = EVERY
    if loss is HEAD:
        static |= {"chunk_size": 3}
        options += ("bias", "row_scale" if dense else "logit_scale", *["softcap"] * softcap)
    static |= {"rule": rule}
    p, g = problem(loss, *options, dense=dense), cotangent(static)
    call = quick_jit(with_gradients(lambda p: loss(**p, **static)))
    right = call(without(p), g)
    for bad in ([NAN, INF, -INF], [3e38, -3e38]):
        check(call(filled(p, *bad), g), p, right)


@one_in(2, loss=LOSSES, dtype=["bfloat16", "float16", "float64"])
def test_dtypes(loss, dtype):
    with jax.enable_x64(dtype == "float64"):
        p = problem(loss, "label_smoothing", "class_weights", dtype=dtype)
        static = {"reduction": "mean"} | ({"chunk_size": 3} if loss is HEAD else {})
        call = quick_jit(with_gradients(lambda p: loss(**p, **static)))
        g = cotangent(static, "float64" if dtype == "float64" else "float32")
        check(call(filled(p, NAN), g), p, call(without(p), g))


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
def test_value_with_gradient(dense):
    p = problem(LOGITS, *EVERY, dense=dense)
    both = functools.partial(sxe.softmax_cross_entropy_with_gradient, return_metrics=True)
    (value, metrics), gradient = quick_jit(lambda p: both(**p))(filled(p, NAN, INF))
    assert_close(value, oracle.loss(**p, class_mask=MASK))
    assert_close(gradient, oracle.gradient(**p, class_mask=MASK))
    assert not np.asarray(gradient)[:, ~MASK].any()
    x = np.where(MASK, p["logits"], -INF)
    *_, counts, _, _ = oracle.rows(
        **{name: v for name, v in p.items() if name != "z_loss"}, class_mask=MASK
    )
    oracle.check_rows_metrics(metrics, x, counts, None if dense else p["labels"])


def test_smoothing_over_the_classes_that_can_occur():
    """t_k = (1 - a) [k = y] + a / K', where K' classes can occur. With K' = 1 the loss is 0."""
    x = np.float32([[1, 2, 3, 4]])
    one = np.array([False, True, False, False])
    two = np.array([False, True, False, True])
    expected = np.log1p(np.exp(-2)) + 2 * (0.7 + 0.3 / 2)
    assert_close(LOGITS(x, [1], class_mask=two, label_smoothing=0.3), expected)
    assert LOGITS(x, [1], class_mask=one, label_smoothing=0.3) == 0


@rules_in_turn
def test_a_target_that_cannot_occur(loss, rule):
    """The loss is +inf, as with a logit of -inf, and other rows do not change."""
    p, static = problem(loss), {"rule": rule, "reduction": "none"}
    p["labels"][2] = 5
    dense = np.eye(K, dtype=np.float32)[p["labels"]]
    dense[2, 5] = 0.25
    for labels in (p["labels"], dense):
        q = filled(p | {"labels": labels}, NAN)
        value, gradients = quick_jit(with_gradients(lambda q: loss(**q, **static)))(
            q, np.ones(N, np.float32)
        )
        x = p["logits"] if loss is LOGITS else oracle.head(p["hidden"], p["kernel"])[0]
        assert_close(value, oracle.loss(x, labels, class_mask=MASK, reduction="none"))
        assert np.isinf(value[2])
        assert np.isfinite(np.delete(value, 2)).all()
        if loss is LOGITS:
            right = oracle.gradient(x, labels, class_mask=MASK, reduction="none")
            assert_close(gradients["logits"], right)


@rules_in_turn
def test_no_class_that_can_occur(loss, rule):
    """Then no row counts, whatever it contains."""
    p = {
        n: np.full_like(a, NAN) if n in ("logits", "kernel") else a
        for n, a in problem(loss).items()
    }
    calls, arguments = [], []
    for options in ({}, {"label_smoothing": np.float32(0.1)}, {"weights": np.ones(N, np.float32)}):
        q = p | options | {"class_mask": np.zeros(K, bool)}
        for reduction in ("mean", "none"):
            static = {"rule": rule, "reduction": reduction}
            calls.append(with_gradients(lambda q, static=static: loss(**q, **static)))
            arguments.append((q, cotangent(static)))
    for a in jax.tree.leaves(quick_jit(all_of(calls))(arguments)):
        assert not np.asarray(a).any()


LOWEST = np.finfo(np.float32).min


@BOTH
def test_predictions_name_no_masked_class(loss):
    """Not even if all other logits are the lowest numbers. -2**31 if a row does not count."""
    p = problem(loss)
    mask = np.arange(K) >= 10
    if loss is LOGITS:
        p["logits"][0] = LOWEST
        p["logits"][0, :10] = 0
    else:
        p["hidden"][0], p["kernel"] = 0, np.abs(p["kernel"])
        p["hidden"][1:] = np.abs(p["hidden"][1:])
        p["bias"] = np.full(K, LOWEST)
        p["bias"][:10] = 0
    p |= {"class_mask": mask, "labels": np.full(N, 12), "where": np.arange(N) != 3}
    _, metrics = quick_jit(lambda p: loss(**p, return_metrics=True))(p)
    assert metrics.predictions[0] == 10
    assert metrics.predictions[3] == -(2**31)
    assert (np.delete(metrics.predictions, 3) >= 10).all()
    mesh = make_mesh(2, 4)
    over = sxe.over_mesh(loss, mesh, batch="data", classes="model")
    _, again = quick_jit(lambda p: over(**p, return_metrics=True))(p)
    np.testing.assert_array_equal(again.predictions, metrics.predictions)


@every_rule
def test_beside_a_mask_for_each_row(rule):
    """Both masks apply. A row does not count if together they mask all of its classes."""
    p = problem(LOGITS)
    where = np.random.default_rng(3).random((N, K)) < 0.7
    where[np.arange(N), p["labels"]] = True
    where[3] = ~MASK
    call = with_gradients(lambda q: LOGITS(**q, reduction="none", rule=rule))
    q = filled(p, NAN) | {"where": where}
    value, gradients = quick_jit(call)(q, np.ones(N, np.float32))
    right = {"reduction": "none", "class_mask": MASK, "where": where}
    assert_close(value, oracle.loss(**p, **right))
    assert value[3] == 0
    assert_close(gradients["logits"], oracle.gradient(**p, **right))


@pytest.mark.parametrize("axis", [0, 1, (0, 2), (2, 0)], ids=str)
def test_class_axes(axis):
    """The mask applies to the flat index over the class axes, in their order."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, 5, 4)).astype(np.float32)
    axes = (axis,) if isinstance(axis, int) else axis
    rows = [n for i, n in enumerate(logits.shape) if i not in axes]
    classes = int(np.prod([logits.shape[a] for a in axes]))
    mask = np.arange(classes) % 3 != 1
    labels = rng.choice(np.flatnonzero(mask), size=rows)
    options = {"axis": axis, "class_mask": mask, "label_smoothing": 0.1}
    both = functools.partial(sxe.softmax_cross_entropy_with_gradient, labels=labels, **options)
    grad = jax.grad(functools.partial(LOGITS, labels=labels, **options))
    (value, gradient), of_autodiff = quick_jit(lambda x: (both(x), grad(x)))(logits)
    assert_close(value, oracle.loss(logits, labels, **options))
    assert_close(gradient, oracle.gradient(logits, labels, **options))
    assert_close(of_autodiff, np.float64(gradient))


@vjp_by_default
@BOTH
def test_second_derivatives(loss, rule):
    """The derivative of the gradient by all arguments, with NaN at masked classes."""
    static = {"rule": rule} | ({"chunk_size": 3} if loss is HEAD else {})
    p = problem(loss, "label_smoothing", *(("bias", "softcap") if loss is HEAD else ()))

    def products(p, v):
        """The derivative of <gradient, v>, by name."""
        given = {n: a for n, a in floats(p).items() if n != "label_smoothing"}

        def along(q):
            d = jax.grad(lambda q: loss(**(p | q), **static))(q)
            return sum(jnp.vdot(v[n], d[n]) for n in given)

        return jax.grad(along)(given)

    v = {n: normal(*a.shape, seed=9) for n, a in floats(p).items()}
    found = quick_jit(products)(filled(p, NAN), v)
    v = {n: a[..., MASK] if n in OF_CLASSES else a for n, a in v.items()}
    expected = quick_jit(products)(without(p), v)
    check((np.float32(0), found), p, (0, expected))


@BOTH
def test_debug_nans(loss):
    p = problem(loss, *EVERY) | {"class_mask": MASK}
    with jax.debug_nans(True):
        value, gradients = jax.value_and_grad(lambda q: loss(**(p | q)))(floats(p))
        with jax.disable_jit():
            again = loss(**p)
    assert_close(again, np.float64(value))
    assert all(np.isfinite(d).all() for d in gradients.values())


@BOTH
def test_vmap_over_masks(loss):
    masks = np.stack([MASK, np.ones(K, bool), np.arange(K) < 12])
    p = problem(loss, "label_smoothing")
    p["labels"] %= 4
    p["labels"] -= p["labels"] == 1
    call = with_gradients(lambda p: loss(**p, reduction="none"))
    g = normal(N)
    found = quick_jit(jax.vmap(lambda m: call(p | {"class_mask": m}, g)))(masks)
    for i, mask in enumerate(masks):
        value, gradients = quick_jit(call)(p | {"class_mask": mask}, g)
        assert_close(found[0][i], np.float64(value))
        for name, d in gradients.items():
            assert_close(found[1][name][i], np.float64(d))


@functools.cache
def program_of_one_device(loss, **static):
    return quick_jit(with_gradients(lambda p: loss(**p, **static)))


MESHES = [("over_mesh", AxisType.Auto), ("over_mesh", AxisType.Explicit), ("types", None)]
MESHES += [("shard_map", True), ("shard_map", False)]


@one_in(2, of_mesh=MESHES, loss=LOSSES, reduction=["mean", "none"])
def test_on_a_mesh(loss, of_mesh, reduction):
    """On one shard all classes are masked, and masked classes contain NaN."""
    way, kind = of_mesh
    options = (*EVERY, "bias", "row_scale") if loss is HEAD else EVERY
    p, static = problem(loss, *options), {"reduction": reduction}
    static |= {"chunk_size": 3} if loss is HEAD else {}
    g = cotangent(static)
    right = program_of_one_device(loss, **static)(without(p), g)
    q = filled(p, NAN, INF)
    specs = {
        **{
            n: P(None, "model") if n == "kernel" else P("model")
            for n in (*OF_CLASSES, "class_mask")
        },
        **dict.fromkeys(("hidden", "weights", "logit_scale", "labels"), P("data")),
        "logits": P("data", "model"),
    }
    specs = {name: specs.get(name, P()) for name in q}
    if way == "shard_map":
        mesh = make_mesh(2, 4)
        names = {"axis_name": "model", "batch_axis_name": "data"}
        call = jax.shard_map(
            lambda p: loss(**p, **names, **static),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=P("data") if reduction == "none" else P(),
            check_vma=kind,
        )
        check(quick_jit(with_gradients(call))(q, g), p, right)
        return
    if way == "over_mesh":
        over = sxe.over_mesh(loss, make_mesh(2, 4, kind=kind), batch="data", classes="model")
        check(quick_jit(with_gradients(lambda p: over(**p, **static)))(q, g), p, right)
        return
    mesh = make_mesh(2, 4, kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        for replicated in ((), ("class_mask", "weights", "logit_scale")):
            placed = {
                n: jax.device_put(a, NamedSharding(mesh, P() if n in replicated else specs[n]))
                for n, a in q.items()
            }
            placed_g = jax.device_put(g, NamedSharding(mesh, P("data") if g.ndim else P()))
            call = quick_jit(with_gradients(lambda p: loss(**p, **static)))
            check(call(placed, placed_g), p, right)
