"""Log-probability and entropy of logits and of the head: effects of each argument, and errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from distributions import FUNCTIONS
from jax.experimental import checkify
from option_cases import RULES, every_rule, in_pairs, one_in, vjp_by_default
from oracle import assert_close, naming
from problems import apart, head_problem, logits_problem, normal, with_gradients
from programs import all_of, quick_jit

import sxe

N, D, K = 8, 3, 11
INF, NAN = np.inf, np.nan
LOGITS, HEAD = FUNCTIONS["logits"], FUNCTIONS["head"]
BOTH = {"logits": LOGITS, "head": HEAD}
both = pytest.mark.parametrize("f", BOTH.values(), ids=BOTH)
OF_LOGITS = ("where", "where_class", "class_mask", "ignore_index", "axis")
OF_HEAD = ("where", "class_mask", "ignore_index", "bias", "logit_scale", "softcap")


def run(f, p, g=None, **static):
    """The (value, gradients) of a jitted call, and the cotangents."""
    p, numbers = apart(p)
    g = f.cotangent(p) if g is None else g
    return program(f.is_head, **static, **numbers)(p, g), g


@functools.cache
def program(is_head, **static):
    """The jitted call, which all tests with these static arguments share."""
    return quick_jit(with_gradients((HEAD if is_head else LOGITS)(**static)))


# Options


slow = pytest.mark.slow
# By default, forward mode and autodiff serve the cases in turn.
rules_of_cases = pytest.mark.parametrize(
    "rules",
    [
        ["vjp"],
        ["jvp", "autodiff"],
        *(pytest.param([rule], marks=slow) for rule in RULES[1:]),
    ],
    ids="-".join,
)


@rules_of_cases
def test_option_cases_of_logits(rules):
    functions, arguments, calls = [], [], []
    for i, case in enumerate(in_pairs(*OF_LOGITS)):
        p, numbers = apart(logits_problem(*case, shape=(N, K), seed=i))
        if "axis" in case:
            numbers["axis"] = 0
            p["logits"] = p["logits"].T
            if "where_class" in case:
                p["where"] = p["where"].T
        g = sxe.LogProbAndEntropy(normal(N, seed=1), normal(N, seed=2))
        functions.append(with_gradients(LOGITS(rule=rules[i % len(rules)], **numbers)))
        arguments.append((p, g))
        calls.append(numbers)
    results = quick_jit(all_of(functions))(arguments)
    for (p, g), numbers, result in zip(arguments, calls, results, strict=True):
        with naming(*p, *numbers):
            LOGITS.assert_matches(result, p, g, **numbers)


@vjp_by_default
def test_option_cases_of_head(rule):
    """Chunk sizes of 1, sizes that divide N or do not, and sizes larger than N."""
    functions, arguments, calls = [], [], []
    for i, case in enumerate(in_pairs(*OF_HEAD)):
        if i % 2:
            case = ["row_scale" if name == "logit_scale" else name for name in case]
        p, numbers = apart(head_problem(*case, shape=(N, D, K), seed=i))
        g = sxe.LogProbAndEntropy(normal(N, seed=1), normal(N, seed=2))
        static = {"rule": rule, "chunk_size": (1, 3, 4, 8, 100, None, 7)[i]}
        functions.append(with_gradients(HEAD(**static, **numbers)))
        arguments.append((p, g))
        calls.append(numbers)
    results = quick_jit(all_of(functions))(arguments)
    for (p, g), numbers, result in zip(arguments, calls, results, strict=True):
        with naming(*p, *numbers):
            HEAD.assert_matches(result, p, g, **numbers)


@one_in(2, f=BOTH, shape=[(1,), (), (2, 0), (2, 3), (0,)])
def test_leading_dimensions(f, shape):
    arguments = []
    for classes in (1, 2, K):
        p = jax.tree.map(np.asarray, f.problem("none", rows=(6,), classes=classes))
        count = math.prod(shape)
        p |= {n: p[n][:count].reshape((*shape, *p[n].shape[1:])) for n in p if n != "kernel"}
        arguments.append((p, f.cotangent(p)))
    found = quick_jit(all_of([with_gradients(f())] * 3))(arguments)
    for (value, gradients), (p, g) in zip(found, arguments, strict=True):
        assert value.log_prob.shape == value.entropy.shape == shape
        f.assert_matches((value, gradients), p, g)
    of_one_class, _ = found[0]
    assert not np.any(of_one_class)


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, K, 2), 1), ((K, 3, 2), 0), ((2, 4, 3, 3), (3, 1))]
)
def test_class_axes(shape, axis):
    axes = axis if isinstance(axis, tuple) else (axis,)
    rows = [n for i, n in enumerate(shape) if i not in axes]
    classes = int(np.prod([shape[a] for a in axes]))
    p = {"logits": normal(*shape), "labels": np.random.default_rng(1).integers(classes, size=rows)}
    p["where"] = np.random.default_rng(2).random(shape) < 0.8
    p["class_mask"] = np.arange(classes) != 1
    g = sxe.LogProbAndEntropy(normal(*rows, seed=1), normal(*rows, seed=2))
    (value, gradients), _ = run(LOGITS, p, g, axis=axis)
    LOGITS.assert_matches((value, gradients), p, g, axis=axis)


@one_in(2, indirect=["x64"], dtype=["int8", "int64", "uint8", "uint64", "int16"], x64=[False, True])
def test_every_label_dtype(dtype, x64):
    if "64" in dtype and not x64:
        pytest.skip("JAX has no 64-bit integers while x64 is off")
    p = {"logits": normal(4, 300), "labels": np.array([0, 1, 100, 7], dtype)}
    (value, gradients), g = run(LOGITS, p)
    assert value.entropy.dtype == np.float32
    LOGITS.assert_matches((value, gradients), p, g)


def test_benign_rows_against_jax():
    """For logits of size 1, the textbook formulas with jax.nn are accurate enough."""
    p = LOGITS.problem("none", rows=(64,), classes=50)
    log_q = jax.nn.log_softmax(p["logits"])
    log_prob = jnp.take_along_axis(log_q, p["labels"][:, None], axis=-1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
    value = sxe.log_prob_and_entropy(**p)
    np.testing.assert_allclose(value.log_prob, log_prob, rtol=1e-5)
    np.testing.assert_allclose(value.entropy, entropy, rtol=1e-5)
    loss = sxe.softmax_cross_entropy(**p, reduction="none")
    np.testing.assert_allclose(value.log_prob, -loss, rtol=1e-6)


def test_a_pair_with_names():
    value = sxe.log_prob_and_entropy(normal(2, 3), [0, 1])
    assert isinstance(value, sxe.LogProbAndEntropy)
    assert value._fields == ("log_prob", "entropy")
    head = sxe.linear_log_prob_and_entropy(np.eye(2, dtype="f"), normal(2, 3), [0, 1])
    assert isinstance(head, sxe.LogProbAndEntropy)
    for a, b in zip(value, head, strict=True):
        assert_close(a, np.asarray(b, np.float64))


@vjp_by_default
@both
def test_the_gradient_of_one_result_alone(f, rule):
    """For example, an entropy bonus without the log-probability."""
    p = f.problem()
    g = normal(*p["labels"].shape)
    names = ("hidden", "kernel") if f is HEAD else ("logits",)

    @quick_jit
    def pulled_back(q):
        def one(q, result):
            return getattr(f(rule=rule)(p | q), result)

        results = ("log_prob", "entropy")
        return [jax.vjp(functools.partial(one, result=each), q)[1](g)[0] for each in results]

    zero = np.zeros_like(g)
    found = pulled_back({name: p[name] for name in names})
    for gradients, pair in zip(found, [(g, zero), (zero, g)], strict=True):
        right = f.truth(p, pair)[1]
        for name, d in gradients.items():
            assert_close(d, right[name])


# Rows that do not count, and labels


def filled(f, p, rows, value):
    """The arguments p with these rows of the logits or hidden states set to the value."""
    name = "hidden" if f is HEAD else "logits"
    return p | {name: p[name].at[np.array(rows)].set(value)}


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        *((LOGITS, reason) for reason in ("where", "where_class", "ignore_index")),
        *((HEAD, reason) for reason in ("where", "ignore_index")),
    ],
)
@pytest.mark.parametrize("content", [NAN, INF, -INF])
@vjp_by_default
def test_a_row_that_does_not_count_is_zero(f, rule, content, reason):
    """Its results, gradients and second derivatives are 0, whatever the row contains."""
    p, out = f.problem("none"), [1, 3]
    counts = ~np.isin(np.arange(len(p["labels"])), out)
    static, bad = {"rule": rule}, filled(f, p, out, content)
    bad["labels"] = jnp.where(counts, p["labels"], 99)
    if reason == "ignore_index":
        static["ignore_index"] = 99
    else:
        bad["where"] = counts if reason == "where" else np.stack([counts] * p["logits"].shape[1], 1)
    (value, gradients), g = run(f, bad, **static)
    f.assert_matches((value, gradients), p | {"where": counts}, g)
    name = "hidden" if f is HEAD else "logits"
    for a in (*value, gradients[name]):
        assert not np.asarray(a)[out].any()
    product = second_derivatives(f.is_head, **static)(bad, g, normal(*p[name].shape, seed=4))
    assert np.isfinite(product).all()
    assert not np.asarray(product)[out].any()


@functools.cache
def second_derivatives(is_head, **static):
    """A program for the derivative of <gradient, v> by the logits or the hidden states."""
    name = "hidden" if is_head else "logits"
    call = with_gradients((HEAD if is_head else LOGITS)(**static), (name,))
    return quick_jit(
        lambda p, g, v: jax.grad(lambda x: jnp.vdot(call(p | {name: x}, g)[1][name], v))(p[name])
    )


@both
def test_nothing_counts(f):
    p = f.problem("none")
    p["where"] = np.zeros(p["labels"].shape, bool)
    value, gradients = run(f, p)[0]
    for a in (*value, *gradients.values()):
        assert not np.asarray(a).any()
    del p["where"]
    p["class_mask"] = np.zeros(p["kernel" if f is HEAD else "logits"].shape[-1], bool)
    value, gradients = run(f, p)[0]
    for a in (*value, *gradients.values()):
        assert not np.asarray(a).any()


@both
def test_a_bad_label_makes_the_gradient_of_the_entropy_nan_by_autodiff(f):
    p = f.problem("none")
    p["labels"] = p["labels"].at[2].set(-1)
    (_, gradients), _ = run(f, p, rule="autodiff")
    gradient = gradients["hidden" if f is HEAD else "logits"]
    assert np.isnan(gradient).all(-1).tolist() == [i == 2 for i in range(len(gradient))]


@pytest.mark.parametrize("bad", [7, 8, -1, -7, -100, 2**31 - 1, -(2**31)])
@vjp_by_default
@both
def test_a_label_out_of_range_is_nan_in_its_row_only(f, rule, bad):
    p = f.problem("none")
    good = np.arange(len(p["labels"])) != 2
    q = p | {"labels": p["labels"].at[2].set(bad)}
    (value, gradients), g = run(f, q, rule=rule)
    right, right_gradients = f.truth(p, g)
    for a, b in zip(value, right, strict=True):
        assert np.isnan(a[2])
        assert_close(a[good], b[good])
    name = "hidden" if f is HEAD else "logits"
    assert np.isnan(gradients[name][2]).all()
    assert_close(gradients[name][good], right_gradients[name][good])


def test_labels_do_not_wrap(x64):
    labels = np.array([2**32 + 1, 2**63 - 1, 1], "int64")
    value = sxe.log_prob_and_entropy(normal(3, 5), labels)
    for a in value:
        assert np.isnan(a).tolist() == [True, True, False]


@both
def test_checkify_names_position_label_and_classes(f):
    p = f.problem("none")
    bad = p | {"labels": p["labels"].at[3].set(99)}
    classes = p["kernel" if f is HEAD else "logits"].shape[-1]
    check = checkify.checkify(jax.jit(f()))
    message = check(bad)[0].get()
    for part in (f"[0, {classes})", "got 99", "[3]"):
        assert part in message
    assert check(p)[0].get() is None
    assert check(bad | {"where": np.arange(len(p["labels"])) != 3})[0].get() is None


# Infinities


@every_rule
def test_a_class_that_cannot_occur(rule):
    """Its gradient is 0. If it is the label, log_prob is -inf and has the gradient 1 there."""
    p = {"logits": normal(4, 5), "labels": np.array([1, 2, 4, 0])}
    p["logits"][:, 3] = p["logits"][1, [0, 2]] = p["logits"][3, 1:] = -INF
    (value, gradients), g = run(LOGITS, p, rule=rule)
    LOGITS.assert_matches((value, gradients), p, g)
    assert value.log_prob[1] == -INF
    assert value.log_prob[3] == value.entropy[3] == 0  # only one class is left
    d = np.asarray(gradients["logits"])
    assert not d[:, 3].any()
    assert not d[3].any()
    assert d[1, 2] == pytest.approx(float(g.log_prob[1]), rel=1e-6)


@every_rule
def test_a_masked_class_is_a_logit_of_minus_infinity(rule):
    """The gradient of a masked class is 0, even if it is the label."""
    p = {"logits": normal(4, 5), "labels": np.array([1, 2, 4, 0])}
    mask = np.ones((4, 5), bool)
    mask[:, 3] = mask[0, 0] = mask[1, 2] = False  # row 1's label is masked
    mask[3] = False  # row 3 has no class left
    (value, gradients), g = run(LOGITS, p | {"where": mask}, rule=rule)
    assert value.log_prob[1] == -INF
    assert value.log_prob[3] == value.entropy[3] == 0
    LOGITS.assert_matches((value, gradients), p | {"where": mask}, g)
    for fill in (NAN, INF):
        filled = p | {"logits": np.where(mask, p["logits"], fill), "where": mask}
        again = run(LOGITS, filled, rule=rule)[0]
        LOGITS.assert_matches(again, p | {"where": mask}, g)


@pytest.mark.parametrize("fill", [[-INF] * 5, [0, INF, 0, 0, 0], [0, 0, NAN, 0, 0], [INF] * 5])
@every_rule
def test_a_row_without_a_distribution_is_nan_alone(fill, rule):
    p = {"logits": normal(3, 5), "labels": np.array([1, 2, 4])}
    p["logits"][1] = fill
    (value, gradients), g = run(LOGITS, p, rule=rule)
    with np.errstate(invalid="ignore"):
        right, right_gradients = LOGITS.truth(p, g)
    assert np.isnan([a[1] for a in right]).all()
    for a, b in zip(value, right, strict=True):
        assert_close(a, b)
    d = gradients["logits"]
    assert np.isnan(d[1]).all()
    assert_close(d[np.array([0, 2])], right_gradients["logits"][[0, 2]])


@vjp_by_default
def test_a_bad_row_of_the_head_is_nan_alone(rule):
    p = HEAD.problem("none", rows=(N,))
    bad_hidden = p["hidden"].at[2, 1].set(NAN).at[5, 0].set(INF)
    (value, gradients), g = run(HEAD, p | {"hidden": bad_hidden}, rule=rule)
    bad = np.isin(np.arange(N), [2, 5])
    right, right_gradients = HEAD.truth(p | {"where": ~bad}, g)
    for a, b in zip(value, right, strict=True):
        assert_close(a, np.where(bad, NAN, b))
    assert_close(gradients["hidden"], np.where(bad[:, None], NAN, right_gradients["hidden"]))


@vjp_by_default
def test_a_bias_of_minus_infinity_cannot_occur(rule):
    p = HEAD.problem("bias")
    p["bias"] = p["bias"].at[4].set(-INF)
    p["labels"] = jnp.where(p["labels"] == 4, 1, p["labels"])
    (value, gradients), g = run(HEAD, p, rule=rule)
    HEAD.assert_matches((value, gradients), p, g)
    assert gradients["bias"][4] == 0
    assert not np.asarray(gradients["kernel"][:, 4]).any()


@both
def test_what_stands_in_masked_classes_does_not_matter(f):
    p = f.problem("class_mask")
    mask = np.asarray(p["class_mask"])
    name = "kernel" if f is HEAD else "logits"
    for fill in (NAN, INF, -INF):
        q = p | {name: jnp.where(mask[None], p[name], fill)}
        (value, gradients), g = run(f, q)
        f.assert_matches((value, gradients), p, g)
        assert not np.asarray(gradients[name])[:, ~mask].any()


# The head's cost


@pytest.mark.parametrize("rule", ["vjp", pytest.param("jvp", marks=pytest.mark.slow)])
def test_the_head_never_makes_the_logits(rule):
    """Memory for value and gradients of 512 rows and 512 classes, in chunks of 16 rows."""
    n = 512
    p = HEAD.problem("none", rows=(n,), width=4, classes=n)
    static = {"chunk_size": 16, "rule": rule}
    call = jax.jit(with_gradients(HEAD(**static)))
    memory = call.lower(p, HEAD.cotangent(p)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * n * 4 / 4


# Errors


def of(argument, error, **given):
    return pytest.param(argument, given, error, id=f"{argument}: {given}"[:50])


SHARED = [
    of("labels", TypeError, labels=None),
    of("labels", (TypeError, ValueError), labels=np.zeros((6, 5), np.float32)),
    of("labels", (TypeError, ValueError), labels=np.zeros(6, np.float32)),
    of("labels", TypeError, labels=np.zeros(6, bool)),
    of("labels", ValueError, labels=np.zeros(4, int)),
    of("labels", ValueError, labels=1),
    of("labels", ValueError, labels=np.zeros((6, 3), int)),
    of("where", TypeError, where=np.ones(6, np.float32)),
    of("where", ValueError, where=np.ones(5, bool)),
    of("class_mask", TypeError, class_mask=np.ones(5, int)),
    of("class_mask", ValueError, class_mask=np.ones(6, bool)),
    of("ignore_index", TypeError, ignore_index="none"),
    of("ignore_index", TypeError, ignore_index=1.5),
    of("rule", ValueError, rule="reverse"),
    of("axis_name", ValueError, axis_name="model"),
    of("axis_name", TypeError, axis_name=1),
]
OF_LOGITS_ERRORS = [
    of("logits", TypeError, logits=None),
    of("logits", TypeError, logits=np.zeros((6, 5), int)),
    of("logits", ValueError, logits=np.zeros((6, 0), np.float32), labels=np.zeros(6, int)),
    of("logits", ValueError, logits=np.float32(1), labels=0),
    of("axis", ValueError, axis=2),
    of("axis", ValueError, axis=(0, 0)),
    of("axis", TypeError, axis=1.0),
]
OF_HEAD_ERRORS = [
    of("hidden", TypeError, hidden=np.zeros((6, 2), int)),
    of("kernel", ValueError, kernel=np.zeros((3, 5), np.float32)),
    of("kernel", TypeError, kernel=None),
    of("bias", ValueError, bias=np.zeros(4, np.float32)),
    of("logit_scale", ValueError, logit_scale=NAN),
    of("logit_scale", TypeError, logit_scale="1"),
    of("softcap", ValueError, softcap=0.0),
    of("chunk_size", ValueError, chunk_size=0),
    of("chunk_size", TypeError, chunk_size=1.5),
    of("where", ValueError, where=np.ones((6, 5), bool)),
]


@pytest.mark.parametrize(("argument", "given", "error"), SHARED + OF_LOGITS_ERRORS)
def test_errors_of_logits(argument, given, error):
    p = {"logits": np.zeros((6, 5), np.float32), "labels": np.zeros(6, np.int32)} | given
    with pytest.raises(error, match=rf"\A{argument}: expected "):
        sxe.log_prob_and_entropy(**p)


@pytest.mark.parametrize(("argument", "given", "error"), SHARED + OF_HEAD_ERRORS)
def test_errors_of_head(argument, given, error):
    p = {"hidden": np.zeros((6, 2), np.float32), "kernel": np.zeros((2, 5), np.float32)}
    p |= {"labels": np.zeros(6, np.int32)} | given
    with pytest.raises(error, match=rf"\A{argument}: expected "):
        sxe.linear_log_prob_and_entropy(**p)


@pytest.mark.parametrize("function", [sxe.log_prob_and_entropy, sxe.linear_log_prob_and_entropy])
def test_what_the_loss_has_is_no_argument_here(function):
    for name in ("reduction", "weights", "label_smoothing", "batch_axis_name", "implementation"):
        with pytest.raises(TypeError, match=name):
            function(**{name: None})
    with pytest.raises(TypeError, match="positional"):
        function(*range(5))


# Metrics


@one_in(2, rule=RULES, reduction=["mean", "none"], head={"logits": False, "head": True})
def test_entropy_among_the_metrics(rule, reduction, head):
    """The entropy of each row, or 0 where the row does not count. It has no gradient."""
    hidden, kernel, labels = normal(N, D), normal(D, K), np.arange(N)
    where = np.arange(N) != 3
    static = {"where": where, "return_metrics": True, "rule": rule, "reduction": reduction}

    def entropy(hidden):
        if head:
            loss = functools.partial(sxe.linear_softmax_cross_entropy, hidden, kernel)
            return loss(labels, chunk_size=3, **static)[1].entropy
        return sxe.softmax_cross_entropy(hidden @ kernel, labels, **static)[1].entropy

    found, gradient = quick_jit(lambda h: (entropy(h), jax.grad(lambda h: jnp.sum(entropy(h)))(h)))(
        hidden
    )
    right = oracle.log_prob_and_entropy(hidden.astype(np.float64) @ kernel, labels, where=where)[1]
    assert_close(found, right)
    assert found[3] == 0
    assert not np.asarray(gradient).any()
