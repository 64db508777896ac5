"""The metrics of each row: the largest probability, the prediction, the label's rank."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from option_cases import RULES, one_in, vjp_by_default
from problems import normal
from programs import quick_jit
from tolerances import FLOAT64_BAR, LOSS_BAR

import sxe

INF, NAN = np.inf, np.nan
N, D, K = 24, 5, 37
# The head computes rows in one of two ways with rule "vjp", and in a third with other rules.
HEADS = [("vjp", "mean"), ("vjp", "none"), ("jvp", "mean"), ("autodiff", "none")]


def metrics_of_logits(logits, labels, **options):
    return sxe.softmax_cross_entropy(logits, labels, return_metrics=True, **options)[1]


def metrics_of_head(logits, labels, *, differentiate=False, **options):
    """The metrics of a head with these logits [N, K] as its kernel, and I as its hidden states.

    With ``differentiate``, they come from the pass that also computes the gradients.
    """
    options = {"chunk_size": 2, "return_metrics": True} | options

    def loss(hidden, kernel):
        value, metrics = sxe.linear_softmax_cross_entropy(hidden, kernel, labels, **options)
        return jnp.sum(value), metrics

    given = jnp.eye(len(logits), dtype=logits.dtype), logits
    if differentiate:
        (_, metrics), _ = jax.value_and_grad(loss, has_aux=True)(*given)
        return metrics
    return loss(*given)[1]


def ways(logits, labels, *, head=True, **options):
    """The metrics of each path of both losses, or only of the loss of logits, with its name."""
    paths = {rule: functools.partial(metrics_of_logits, rule=rule, **options) for rule in RULES}
    both = functools.partial(
        sxe.softmax_cross_entropy_with_gradient, return_metrics=True, **options
    )
    paths["with gradient"] = lambda *given: both(*given)[0][1]
    if head:
        for (rule, reduction), differentiate in itertools.product(HEADS, (False, True)):
            static = {"rule": rule, "reduction": reduction, "differentiate": differentiate}
            paths[str(static)] = functools.partial(metrics_of_head, **static, **options)
    # One program of all paths is compiled faster than one program for each.
    run = quick_jit(lambda *given: {name: path(*given) for name, path in paths.items()})
    return run(logits, labels).items()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_max_probability_against_60_digits(dtype):
    """If the logits have an offset of 1e8, exp(m - lse) has no correct digit."""
    leads = [0, 0.5, 5, 20, 80, 100]
    rows = np.array([[lead, *normal(11, seed=i)] for i, lead in enumerate(leads)])
    rows = np.concatenate([3 * normal(5, 12), rows, np.zeros((1, 12))])
    logits = np.concatenate([rows + offset for offset in (0, 1e4, -3e6, 1e8)]).astype(dtype)
    labels = np.arange(len(logits)) % 12
    with mpmath.workdps(oracle.DIGITS), jax.enable_x64(dtype == "float64"):
        sums = [mpmath.fsum(mpmath.exp(mpmath.mpf(float(v - max(x)))) for v in x) for x in logits]
        for way, found in ways(logits, labels):
            assert found.max_probability.dtype == dtype
            for p, s in zip(found.max_probability, sums, strict=True):
                bar = LOSS_BAR if dtype == "float32" else FLOAT64_BAR
                assert oracle.relative_error(p, 1 / s) < bar, way


def test_rank_of_ties():
    """Equal logits are not larger. All of the largest have rank 0; the first is predicted."""
    logits = np.zeros((6, 4), np.float32)
    logits[1] = [3, 5, 5, 1]
    logits[2] = [3, 5, 5, 1]
    logits[3] = [3, 5, 5, 1]
    logits[4] = [-2, -1, -2, -1]
    logits[5] = [1, 1e-30, 1e-30, 1.0000001]
    labels = np.array([3, 2, 0, 3, 2, 2])
    for way, found in ways(logits, labels):
        assert list(found.label_rank) == [0, 0, 2, 3, 2, 2], way
        assert list(found.predictions) == [0, 1, 1, 1, 1, 3], way


def test_top_k_accuracy():
    """The rank is below k if the label is among the k largest logits."""
    logits, labels = normal(N, K), np.arange(N) % K
    for _, found in ways(logits, labels):
        for k in (1, 3, 10):
            largest = np.argsort(-logits, axis=-1)[:, :k]
            right = (largest == labels[:, None]).any(-1)
            np.testing.assert_array_equal(found.label_rank < k, right)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ranks_of_16_bits(dtype):
    """In 16 bits, many logits are equal."""
    logits = normal(N, 1000, dtype=dtype)
    labels = np.arange(N) % 1000
    found = quick_jit(metrics_of_logits)(logits, labels)
    oracle.check_rows_metrics(found, logits, np.ones(N, bool), labels)
    x = np.asarray(logits, np.float32)
    assert ((x == x[np.arange(N), labels][:, None]).sum(-1) > 1).any()


@pytest.mark.parametrize("labels_dtype", ["uint8", "int32"])
def test_rows_that_are_not_right(labels_dtype):
    """Rows left out by a mask, a weight or ignore_index, or with a label outside of [0, K)."""
    logits = normal(7, 5)
    logits[:, 0] = 9
    labels = np.array([0, 0, 0, 4, 5, 117, 2], labels_dtype)
    options = {"where": np.arange(7) != 1, "weights": np.array([1, 1, 0, 1, 1, 1, 1], np.float32)}
    options["ignore_index"] = 4
    rank = (logits[6] > logits[6, 2]).sum()
    for way, found in ways(logits, labels, **options):
        assert list(found.label_rank) == [0, 5, 5, 5, 5, 5, rank], way
        none = -(2**31)
        assert list(found.predictions) == [0, none, none, none, 0, 0, 0], way
        counts = np.array([1, 0, 0, 0, 1, 1, 1], bool)
        np.testing.assert_array_equal(found.max_probability == 0, ~counts, way)
        np.testing.assert_array_equal(found.lse == 0, ~counts, way)


def test_rows_without_a_distribution():
    """Rows with NaN or +inf, or all -inf. A single -inf is a class that cannot occur."""
    logits = normal(6, 5)
    logits[0, 3], logits[1, 2], logits[2] = NAN, INF, -INF
    logits[3, [1, 4]] = -INF
    logits[4] = [7, -INF, -INF, -INF, -INF]
    labels = np.array([0, 2, 1, 4, 0, 3])
    rank = (logits[5] > logits[5, 3]).sum()
    for way, found in ways(logits, labels, head=False):  # the head cannot have these logits here
        assert list(found.label_rank) == [5, 5, 5, 3, 0, rank], way
        assert list(np.asarray(found.predictions) < 0) == [True] * 3 + [False] * 3, way
        p = np.asarray(found.max_probability)
        assert list(np.isnan(p)) == [True] * 3 + [False] * 3, way
        assert p[4] == 1, way
        found = found._replace(**{name: getattr(found, name)[3:] for name in found._fields[2:]})
        oracle.check_rows_metrics(found, logits[3:], np.ones(3, bool), labels[3:])


@one_in(2, head=HEADS, chunk_size=[2, 7])
def test_hidden_states_without_a_distribution(head, chunk_size):
    """In rows that count, and in one that does not."""
    rule, reduction = head
    hidden, kernel, labels = normal(7, D), normal(D, K), np.arange(7)
    hidden[1], hidden[4], hidden[5, 2] = NAN, NAN, INF
    weights = np.where(np.arange(7) == 4, 0, 1).astype(np.float32)
    static = {"rule": rule, "reduction": reduction, "chunk_size": chunk_size}
    run = functools.partial(
        sxe.linear_softmax_cross_entropy, weights=weights, return_metrics=True, **static
    )
    _, found = quick_jit(run)(hidden, kernel, labels)
    assert list(np.flatnonzero(np.isnan(found.max_probability))) == [1, 5]
    assert list(np.flatnonzero(np.asarray(found.label_rank) == K)) == [1, 4, 5]
    assert list(np.flatnonzero(np.asarray(found.predictions) < 0)) == [1, 4, 5]
    some = np.array([0, 2, 3, 6])
    x = hidden.astype(np.float64)[some] @ kernel
    found = found._replace(**{name: getattr(found, name)[some] for name in found._fields[2:]})
    oracle.check_rows_metrics(found, x, np.ones(4, bool), labels[some])


def test_masked_classes():
    """A masked class does not count as larger. K is the number of all classes."""
    logits = normal(4, 5)
    logits[:, 1] = 9
    where = np.ones((4, 5), bool)
    where[:, 1], where[2] = False, False
    labels = np.array([0, 2, 3, 4])
    counts = np.arange(4) != 2
    for _, found in ways(logits, labels, head=False, where=where):
        oracle.check_rows_metrics(found, np.where(where, logits, -1e9), counts, labels)
        assert found.label_rank[2] == 5


def test_vmap():
    """Over all arrays, over labels only, and over logits only."""
    logits, labels = normal(3, 6, 5), np.arange(18).reshape(3, 6) % 5
    for of in (metrics_of_logits, metrics_of_head):
        for axes in [(0, 0), (None, 0), (0, None)]:
            x = logits if axes[0] == 0 else logits[0]
            y = labels if axes[1] == 0 else labels[0]
            found = quick_jit(jax.vmap(of, axes))(x, y)
            x, y = np.broadcast_to(x, logits.shape), np.broadcast_to(y, labels.shape)
            oracle.check_rows_metrics(found, x, np.ones((3, 6), bool), y)


@pytest.mark.parametrize("kind", ["shard_map", "over_mesh"])
@pytest.mark.parametrize("loss", ["logits", "head"])
def test_no_rank_of_dense_targets_on_a_mesh(loss, kind):
    mesh = make_mesh(2, 4)
    logits, kernel, targets = normal(N, 8), normal(8, 8), np.abs(normal(N, 8, seed=1))
    given = (logits, targets) if loss == "logits" else (logits, kernel, targets)
    f = sxe.softmax_cross_entropy if loss == "logits" else sxe.linear_softmax_cross_entropy
    f = functools.partial(f, return_metrics=True)
    if kind == "shard_map":
        rows = P("data")
        out = P(), sxe.Metrics(P(), P(), rows, rows, rows, None, rows)
        split = P("data", "model")
        specs = (split, split) if loss == "logits" else (rows, P(None, "model"), split)
        f = functools.partial(f, axis_name="model", batch_axis_name="data")
        f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out)
    else:
        options = f.keywords
        f = functools.partial(sxe.over_mesh(f.func, mesh, batch="data", classes="model"), **options)
    _, found = quick_jit(f)(*given)
    x = logits if loss == "logits" else logits.astype(np.float64) @ kernel
    oracle.check_rows_metrics(found, x, np.ones(N, bool))


def test_a_label_in_no_shard():
    """Its rank is the number of classes of all shards."""
    mesh = make_mesh(2, 4)
    logits, labels = normal(N, 8), np.arange(N) % 10
    labels[-1] = -100
    loss = sxe.over_mesh(sxe.softmax_cross_entropy, mesh, batch="data", classes="model")
    _, found = quick_jit(functools.partial(loss, return_metrics=True))(logits, labels)
    good = (labels >= 0) & (labels < 8)
    assert list(np.asarray(found.label_rank)[~good]) == [8] * (~good).sum()
    rank = (logits > logits[np.arange(N), np.where(good, labels, 0)][:, None]).sum(-1)
    np.testing.assert_array_equal(np.asarray(found.label_rank)[good], rank[good])


# Unused metrics are not computed


def instructions(loss, reduction, rule, wanted):
    """Opcodes and result types of the compiled value and gradient with some of the metrics.

    ``wanted`` has the names of these metrics, or is None for a call without ``return_metrics``.
    """
    static = {"reduction": reduction, "rule": rule, "return_metrics": wanted is not None}

    def value(x, *others):
        found = (
            sxe.softmax_cross_entropy(x, *others, **static)
            if loss == "logits"
            else sxe.linear_softmax_cross_entropy(x, *others, chunk_size=5, **static)
        )
        found, metrics = (found, None) if wanted is None else found
        return jnp.sum(found), [getattr(metrics, name) for name in wanted or ()]

    shapes = [(N, K)] if loss == "logits" else [(N, D), (D, K)]
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    arrays.append(jax.ShapeDtypeStruct((N,), "int32"))
    text = jax.jit(jax.value_and_grad(value, has_aux=True)).lower(*arrays).compile().as_text()
    return collections.Counter(
        (match[2], re.sub(r"\{.*?\}", "", match[1]))
        for match in re.finditer(r" = (.*?) ([\w-]+)\(", text)
    )


def reductions_to_integers(found):
    """Whether the program has an argmax, and whether it has a count, with a result per row."""
    kinds = {of_type for opcode, of_type in found if opcode == "reduce"}
    argmax = any(re.fullmatch(r"\(f32\[[\d,]+\], s32\[[\d,]+\]\)", kind) for kind in kinds)
    # A count per row, [C] or [N], not the number of rows.
    return argmax, any(re.fullmatch(r"s32\[\d+\]", kind) for kind in kinds)


@vjp_by_default
@one_in(2, loss=["logits", "head"], reduction=["mean", "none"])
def test_a_metric_that_is_not_used_costs_nothing(loss, reduction, rule):
    """XLA drops the metric, and the program is the one without metrics."""
    run = functools.partial(instructions, loss, reduction, rule)
    without = run(None)
    assert run(()) == without
    for name in ("lse", "max_probability"):
        found = run((name,))
        assert found != without
        assert reductions_to_integers(found) == reductions_to_integers(without)
    argmax, count = reductions_to_integers(without)
    assert not argmax
    assert reductions_to_integers(run(("predictions",))) == (True, count)
    assert reductions_to_integers(run(("label_rank",))) == (False, True)


@pytest.mark.parametrize("padding", [-1, -100])
def test_padding_is_never_a_correct_prediction(padding):
    """Whatever its label is. The rows that count are those with a prediction."""
    logits = jnp.eye(4)
    labels = jnp.array([0, 1, padding, padding])
    _, metrics = sxe.softmax_cross_entropy(
        logits, labels, ignore_index=padding, return_metrics=True
    )
    assert jnp.sum(metrics.predictions == labels) == 2
    assert jnp.sum(metrics.predictions >= 0) == 2
