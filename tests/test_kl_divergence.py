"""Divergences of two rows of logits: the effect of each argument, infinite logits, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from distributions import FUNCTIONS, MODES
from option_cases import RULES, each_value, in_pairs, slow, vjp_by_default
from oracle import assert_close, naming
from problems import cotangent, divergence_problem, floats, normal, with_gradients
from programs import all_of, quick_jit

import sxe

N, K = 8, 11
INF, NAN = np.inf, np.nan
OPTIONS = ("where", "where_class", "weights", "class_mask")
OPTIONS += ("logit_scale", "target_row_scale", "none", "sum", "axis")
every_mode = pytest.mark.parametrize("mode", MODES)
# For tests of what all modes share.
one_mode = pytest.mark.parametrize("mode", [*map(slow, MODES[:2]), MODES[2]])


def static_of(mode, rule="vjp", reduction="none"):
    beta = {"beta": 0.3} if mode == "jensen_shannon" else {}
    return {"mode": mode, "rule": rule, "reduction": reduction} | beta


def divergence(static):
    return lambda p: sxe.kl_divergence(**p, **static)


@functools.cache
def program(by=None, **static):
    return quick_jit(with_gradients(divergence(static), by))


def run(p, g=None, **static):
    """The (value, gradients) of a jitted call, and the cotangents."""
    g = cotangent(p, static["reduction"]) if g is None else g
    return program(**static)(p, g), g


def expected(p, g, rule=None, **static):
    return oracle.kl_divergence(**p, **static), oracle.kl_divergence_gradients(g, **p, **static)


def check(result, p, g, by=None, **static):
    """Checks the value and the gradients for ``by``, or for all floating arguments."""
    value, gradients = result
    right, right_gradients = expected(p, g, **static)
    assert_close(value, right)
    for name in floats(p) if by is None else by:
        with naming(name):
            assert gradients[name].dtype == p[name].dtype
            d = right_gradients[name]
            scale = max(10 if "scale" in name else 1, np.abs(d[np.isfinite(d)]).max(initial=0))
            assert_close(gradients[name], d, scale=scale)


# Options


@vjp_by_default
@every_mode
def test_option_cases(mode, rule):
    functions, arguments, calls = [], [], []
    for i, case in enumerate(in_pairs(*OPTIONS)):
        reduction = next((name for name in ("none", "sum") if name in case), "mean")
        options = [name for name in case if name != "sum"]
        p = divergence_problem(*options, shape=(N, K), seed=i)
        static = static_of(mode, rule, reduction)
        if "axis" in case:
            static["axis"] = 0
            p |= {name: p[name].T for name in ("logits", "target_logits")}
            if "where_class" in case:
                p["where"] = p["where"].T
        functions.append(with_gradients(divergence(static)))
        arguments.append((p, normal(*((N,) if reduction == "none" else ()), seed=3)))
        calls.append(static)
    results = quick_jit(all_of(functions))(arguments)
    for (p, g), static, result in zip(arguments, calls, results, strict=True):
        with naming(*p, static):
            check(result, p, g, **static)


@pytest.mark.parametrize("beta", [1e-4, 0.1, 0.5, 0.9, 0.9999])
def test_beta(beta):
    """beta weights the target distribution in the mixture, and its divergence in the sum."""
    p = divergence_problem("weights", shape=(N, K))
    for reduction in ("mean", "none"):
        static = static_of("jensen_shannon", reduction=reduction) | {"beta": beta}
        result, g = run(p, **static)
        check(result, p, g, **static)


def test_limits_of_the_jensen_shannon_divergence():
    """JS / beta approaches the forward divergence, and JS / (1 - beta) the reverse one."""
    x, z = normal(N, K), normal(N, K, seed=1)
    f = functools.partial(sxe.kl_divergence, x, z, reduction="none")
    near_0 = f(mode="jensen_shannon", beta=1e-6) / 1e-6
    np.testing.assert_allclose(near_0, f(mode="forward"), rtol=1e-4)
    near_1 = f(mode="jensen_shannon", beta=1 - 2**-20) * 2**20
    np.testing.assert_allclose(near_1, f(mode="reverse"), rtol=1e-4)
    one = f(mode="jensen_shannon", beta=0.3)
    other = sxe.kl_divergence(z, x, mode="jensen_shannon", beta=0.7, reduction="none")
    np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(
        f(mode="reverse"), sxe.kl_divergence(z, x, reduction="none"), rtol=1e-5
    )


@each_value(shape=[(), (1,), (2, 3), (0,), (2, 0)], mode=MODES)
def test_leading_dimensions(mode, shape):
    for classes in (1, 2, K):
        p = {
            name: normal(*shape, classes, seed=i)
            for i, name in enumerate(("logits", "target_logits"))
        }
        for reduction in ("none", "mean"):
            static = static_of(mode, reduction=reduction)
            result, g = run(p, **static)
            check(result, p, g, **static)
            if classes == 1:
                assert not np.any(result[0])


@each_value(mode=MODES, of=[((3, K, 2), 1), ((K, 3, 2), 0), ((2, 4, 3, 3), (3, 1))])
def test_class_axes(mode, of):
    shape, axis = of
    axes = axis if isinstance(axis, tuple) else (axis,)
    rows = [n for i, n in enumerate(shape) if i not in axes]
    classes = int(np.prod([shape[a] for a in axes]))
    p = {name: normal(*shape, seed=i) for i, name in enumerate(("logits", "target_logits"))}
    p |= {"where": np.random.default_rng(2).random(shape) < 0.8, "weights": np.abs(normal(*rows))}
    p |= {"class_mask": np.arange(classes) != 1, "target_logit_scale": 1 + np.abs(normal(*rows))}
    static = static_of(mode, reduction="mean") | {"axis": axis}
    result, g = run(p, np.float32(0.7), **static)
    check(result, p, g, **static)


def test_benign_rows_against_the_textbook():
    """The textbook formulas, as in optax.kl_divergence."""
    x, z = (jnp.asarray(normal(64, 50, seed=i)) for i in (0, 1))
    log_q, log_p = jax.nn.log_softmax(x), jax.nn.log_softmax(z)
    q, p = jnp.exp(log_q), jnp.exp(log_p)
    log_m = jnp.log((p + q) / 2)
    right = {
        "forward": jnp.sum(p * (log_p - log_q), axis=-1),
        "reverse": jnp.sum(q * (log_q - log_p), axis=-1),
        "jensen_shannon": jnp.sum(p * (log_p - log_m) + q * (log_q - log_m), axis=-1) / 2,
    }
    for mode, value in right.items():
        found = sxe.kl_divergence(x, z, mode=mode, reduction="none")
        np.testing.assert_allclose(found, value, rtol=1e-4)
        np.testing.assert_allclose(sxe.kl_divergence(x, z, mode=mode), value.mean(), rtol=1e-4)
    np.testing.assert_allclose(sxe.kl_divergence(x, z), right["forward"].mean(), rtol=1e-4)
    # The divergence plus the teacher's entropy is the student's cross-entropy.
    loss = sxe.softmax_cross_entropy(x, p, reduction="none")
    entropy = sxe.log_prob_and_entropy(z, jnp.zeros(64, int)).entropy
    np.testing.assert_allclose(right["forward"], loss - entropy, rtol=1e-4, atol=1e-5)


@each_value(mode=MODES, by=["logits", "target_logits"])
@vjp_by_default
def test_the_gradient_of_one_side_alone(mode, rule, by):
    """The other side is a constant, such as the logits of a teacher or a reference model."""
    p = divergence_problem("weights", shape=(N, K))
    static, g = static_of(mode, rule), cotangent(p, "none")
    check(program(by=(by,), **static)(p, g), p, g, by=(by,), **static)


# Weights and rows that do not count


COUNTS = ~np.isin(np.arange(N), [1, 4, 6])
# Options that leave three rows out. All have the same structure, so they share a program.
REASONS = {
    "where": (COUNTS, np.full(N, 1.5, np.float32)),
    "weights": (np.full(N, True), np.where(COUNTS, 1.5, 0).astype(np.float32)),
    "classes": (np.stack([COUNTS] * K, 1), np.full(N, 1.5, np.float32)),
}


def bad_rows(p, content):
    """p with bad rows that do not count: bad in the logits, in the target logits, or in both."""
    bad = {name: a.copy() for name, a in p.items()}
    bad["logits"][[1, 6]] = content
    bad["target_logits"][[4, 6]] = content
    return bad


@each_value(mode=MODES, reduction=["mean", "none"])
@vjp_by_default
def test_a_row_that_does_not_count_contributes_nothing(mode, rule, reduction):
    """Whatever it contains, on one side or on both."""
    p = divergence_problem(shape=(N, K))
    static = static_of(mode, rule, reduction)
    for where, weights in REASONS.values():
        option = {"where": where, "weights": weights}
        for content in (NAN, INF, -INF):
            result, g = run(bad_rows(p, content) | option, **static)
            check(result, p | option, g, ("logits", "target_logits"), **static)
            for d in (result[1][name] for name in p):
                assert not np.asarray(d)[~COUNTS].any()


@vjp_by_default
@one_mode
def test_second_derivatives_of_a_row_that_does_not_count(mode, rule):
    p, static = divergence_problem(shape=(N, K)), static_of(mode, rule)
    g, v = normal(N), normal(2, N, K)

    @quick_jit
    def product(sides, option):
        def along(sides):
            _, gradients = with_gradients(divergence(static), tuple(sides))(sides | option, g)
            return sum(map(jnp.vdot, gradients.values(), v))

        return jax.grad(along)(sides)

    for where, weights in REASONS.values():
        option = {"where": where, "weights": weights}
        right = product(p, option)
        for content in (NAN, -INF):
            for name, d in product(bad_rows(p, content), option).items():
                assert not np.asarray(d)[~COUNTS].any()
                assert_close(d[COUNTS], np.asarray(right[name], np.float64)[COUNTS])


@each_value(mode=MODES, rule=RULES)
def test_a_weight_of_zero_has_its_divergence_as_derivative(mode, rule):
    """Learned weights may start at 0. For a row without a divergence the derivative is then 0."""
    p = divergence_problem(shape=(N, K))
    p["logits"][1], p["target_logits"][2], p["logits"][3] = NAN, INF, -INF
    p["logits"][4, 2] = p["target_logits"][5, 3] = -INF  # the divergence may be infinite here
    p["weights"] = np.zeros(N, np.float32)
    static = static_of(mode, rule, "sum")
    (value, gradients), _ = run(p, np.float32(1), **static)
    assert value == 0
    for name in ("logits", "target_logits"):
        assert not np.asarray(gradients[name]).any()
    rest = np.array([0, 4, 5, 6, 7])
    clean = {name: p[name][rest] for name in ("logits", "target_logits")}
    right = expected(clean, 1.0, **static_of(mode))[0]
    right = np.where(np.isinf(right), 0, right)
    assert_close(np.asarray(gradients["weights"])[rest], right)
    assert not np.asarray(gradients["weights"])[1:4].any()


@vjp_by_default
@one_mode
def test_nothing_counts(mode, rule):
    p = divergence_problem(shape=(N, K))
    rows, weights, classes = np.full(N, True), np.ones(N, np.float32), np.full(K, True)
    for option in (
        (~rows, weights, classes),
        (np.zeros((N, K), bool), weights, classes),
        (rows, 0 * weights, classes),
        (rows, weights, ~classes),
    ):
        q = p | dict(zip(("where", "weights", "class_mask"), option, strict=True))
        for reduction in ("mean", "sum"):
            (value, gradients), _ = run(q, np.float32(1), **static_of(mode, rule, reduction))
            assert value == 0
            for name in p:
                assert not np.asarray(gradients[name]).any()


@one_mode
def test_weights_of_both_signs(mode):
    p = divergence_problem(shape=(4, K))
    for weights in ([1, -2, 0.5, -1], [0, 1, 1, 2]):
        p["weights"] = np.array(weights, np.float32)
        for reduction in ("mean", "sum", "none"):
            static = static_of(mode, reduction=reduction)
            result, g = run(p, **static)
            check(result, p, g, **static)
    p["weights"] = np.array([1, -3, 2, 0], np.float32)  # the sum is 0, so the mean is NaN
    (value, gradients), _ = run(p, **static_of(mode, reduction="mean"))
    assert np.isnan(value)
    assert np.isnan(gradients["logits"][:3]).all()


# Infinities


def rows_with_impossible_classes():
    """Rows with a class at -inf on neither side, in the logits, in the target logits, in both."""
    x, z = normal(4, 5), normal(4, 5, seed=1)
    x[[1, 3], 2] = z[[2, 3], 2] = -INF
    return {"logits": x, "target_logits": z}


@each_value(mode=MODES, rule=RULES)
def test_classes_that_cannot_occur(mode, rule):
    """0 log 0 is 0. KL(p || q) is infinite if a class has probability 0 in q but not in p."""
    p = rows_with_impossible_classes()
    static = static_of(mode, rule)
    ((value, gradients), g) = run(p, **static)
    right, right_gradients = expected(p, g, **static)
    infinite = {"forward": [1], "reverse": [2], "jensen_shannon": []}[mode]
    assert list(np.flatnonzero(np.isinf(right))) == infinite
    assert_close(value, right)
    finite = ~np.isin(np.arange(4), infinite)
    for name in p:
        d = np.asarray(gradients[name])
        assert_close(d[finite], right_gradients[name][finite])
        assert d[3, 2] == 0
    # For the second argument of KL, the gradient is finite even where the divergence is infinite.
    other = {"forward": "logits", "reverse": "target_logits"}.get(mode)
    if other:
        assert_close(gradients[other], right_gradients[other])


@every_mode
def test_masked_classes_are_logits_of_minus_infinity_on_both_sides(mode):
    """The gradients of masked classes are 0, whatever their logits are."""
    p = divergence_problem("class_mask", "where_class", shape=(N, K))
    static = static_of(mode)
    g = cotangent(p, "none")
    mask = p["where"] & p["class_mask"]
    for fill in (-INF, NAN, INF):
        q = p | {name: np.where(mask, p[name], fill) for name in ("logits", "target_logits")}
        result, _ = run(q, g, **static)
        check(result, p, g, **static)
        for name in ("logits", "target_logits"):
            assert not np.asarray(result[1][name])[~mask].any()


@each_value(mode=MODES, classes=[5, 1024])
@vjp_by_default
def test_a_row_without_a_distribution_is_nan_alone(mode, rule, classes):
    """Rows with only -inf, a +inf, or a NaN (which a maximum may lose), on one or both sides."""
    p = {"logits": normal(14, classes), "target_logits": normal(14, classes, seed=1)}
    right, right_gradients = expected(p, normal(14), **static_of(mode))
    for i, fill in enumerate((-INF, INF, NAN, INF)):
        some = slice(None) if i in (0, 3) else 2
        p["logits"][[3 * i, 3 * i + 2], some] = fill
        p["target_logits"][[3 * i + 1, 3 * i + 2], some] = fill
    (value, gradients), _ = run(p, normal(14), **static_of(mode, rule))
    bad = np.arange(14) < 12
    assert_close(value, np.where(bad, NAN, right))
    for name in p:
        assert_close(gradients[name], np.where(bad[:, None], NAN, right_gradients[name]))


def test_a_narrow_model_beside_a_wide_target():
    """Even where JAX does not promote dtypes: no operation takes both sides."""
    wide = normal(3, 5), normal(3, 5, seed=1)
    narrow = jnp.asarray(wide[0], jnp.bfloat16)
    expected = sxe.kl_divergence(jnp.asarray(narrow, jnp.float32), wide[1])
    with jax.numpy_dtype_promotion("strict"):
        assert_close(sxe.kl_divergence(narrow, wide[1]), expected)
        eye = jnp.eye(5, dtype=jnp.bfloat16)
        of_hidden = sxe.linear_kl_divergence(narrow, eye, wide[1], jnp.eye(5))
    assert_close(of_hidden, expected)


@every_mode
def test_disjoint_distributions(mode):
    """The Jensen-Shannon divergence is bounded. The others are not."""
    p = {"logits": np.array([[0, -INF], [0, -200]], np.float32)}
    p["target_logits"] = p["logits"][:, ::-1].copy()
    value = sxe.kl_divergence(**p, **static_of(mode))
    if mode == "jensen_shannon":
        largest = -0.3 * np.log(0.3) - 0.7 * np.log(0.7)
        np.testing.assert_allclose(value, [largest] * 2, rtol=1e-6)
    else:
        np.testing.assert_allclose(value, [INF, 200], rtol=1e-6)
        # A probability that float32 rounds to 0 does not count as 0.
        p = {"logits": p["logits"][:1], "target_logits": p["logits"][1:]}
        p = p if mode == "forward" else dict(zip(p, reversed(p.values()), strict=True))
        assert sxe.kl_divergence(**p, **static_of(mode))[0] == INF


@every_mode
def test_the_ends_of_float32(mode):
    """The divergence of equal logits is 0 at any magnitude, and no difference overflows."""
    x = np.full((6, 4), 3e38, np.float32)
    x[2:4], x[4:] = -3e38, 1e30
    x[::2, 2] = 0
    for static in (static_of(mode), static_of(mode, "jvp")):
        (found, gradients), _ = run({"logits": x, "target_logits": x.copy()}, **static)
        assert not np.asarray(found).any()
        for d in gradients.values():
            assert not np.asarray(d).any()


# Errors

X = np.zeros((6, 5), np.float32)


def of(argument, error, message="expected ", **given):
    return pytest.param(argument, given, error, message, id=f"{argument}: {given}"[:50])


ERRORS = [
    of("logits", TypeError, logits=None),
    of("logits", TypeError, logits=np.zeros((6, 5), int)),
    of("logits", ValueError, logits=np.zeros((6, 0), np.float32), target_logits=np.zeros((6, 0))),
    of("logits", ValueError, logits=np.float32(1), target_logits=np.float32(1)),
    of("target_logits", TypeError, target_logits=None),
    of("target_logits", TypeError, target_logits=np.zeros((6, 5), int)),
    of("target_logits", TypeError, target_logits=np.zeros((6, 5), bool)),
    of("target_logits", ValueError, target_logits=np.zeros((6, 4), np.float32)),
    of("target_logits", ValueError, target_logits=np.zeros((1, 5), np.float32)),
    of("target_logits", ValueError, target_logits=np.zeros(6, np.float32)),
    of(
        "mode",
        ValueError,
        "expected one of 'forward', 'reverse', 'jensen_shannon', got 'js'",
        mode="js",
    ),
    of("mode", (TypeError, ValueError), mode=None),
    of("beta", ValueError, mode="jensen_shannon", beta=0.0),
    of("beta", ValueError, mode="jensen_shannon", beta=1),
    of("beta", ValueError, mode="jensen_shannon", beta=-0.1),
    of("beta", ValueError, mode="jensen_shannon", beta=1e-21),
    of("beta", ValueError, mode="jensen_shannon", beta=1.5),
    of("beta", ValueError, mode="jensen_shannon", beta=NAN),
    of("beta", ValueError, mode="reverse", beta=0.3),
    of("beta", TypeError, mode="jensen_shannon", beta="0.5"),
    of("beta", TypeError, mode="jensen_shannon", beta=None),
    of("beta", TypeError, mode="jensen_shannon", beta=True),
    of("beta", (TypeError, ValueError), mode="jensen_shannon", beta=np.full(6, 0.5, np.float32)),
    of("logit_scale", ValueError, logit_scale=NAN),
    of("logit_scale", ValueError, logit_scale=INF),
    of("logit_scale", TypeError, logit_scale="1"),
    of("logit_scale", TypeError, logit_scale=None),
    of("logit_scale", ValueError, logit_scale=np.ones(5, np.float32)),
    of("target_logit_scale", ValueError, target_logit_scale=NAN),
    of("target_logit_scale", TypeError, target_logit_scale="1"),
    of("target_logit_scale", ValueError, target_logit_scale=np.ones(5, np.float32)),
    of("where", TypeError, where=np.ones(6, np.float32)),
    of("where", ValueError, where=np.ones(5, bool)),
    of("weights", TypeError, weights=np.ones(6, int)),
    of("weights", ValueError, weights=np.ones(5, np.float32)),
    of("class_mask", TypeError, class_mask=np.ones(5, int)),
    of("class_mask", ValueError, class_mask=np.ones(6, bool)),
    of("axis", ValueError, axis=2),
    of("axis", TypeError, axis=1.0),
    of("reduction", ValueError, reduction="average"),
    of("reduction", (TypeError, ValueError), reduction=None),
    of("axis_name", ValueError, axis_name="model"),
    of("batch_axis_name", ValueError, batch_axis_name="data"),
    of("rule", ValueError, rule="reverse"),
]


@pytest.mark.parametrize(("argument", "given", "error", "message"), ERRORS)
def test_errors(argument, given, error, message):
    with pytest.raises(error, match=rf"\A{argument}: {message}"):
        sxe.kl_divergence(**({"logits": X, "target_logits": X} | given))


def test_what_is_no_argument():
    for name in ("labels", "ignore_index", "label_smoothing", "return_metrics", "implementation"):
        with pytest.raises(TypeError, match=name):
            sxe.kl_divergence(X, X, **{name: None})
    with pytest.raises(TypeError, match="positional"):
        sxe.kl_divergence(X, X, "reverse")


@pytest.mark.parametrize("f", [f for f in FUNCTIONS.values() if f.is_divergence], ids=MODES)
def test_an_option_that_is_off_does_nothing(f):
    """The call compiles to the same program as a call without the option."""
    p = f.problem("none")
    off = {"logit_scale": 1.0, "target_logit_scale": 1, "where": None, "weights": None}

    def text(**options):
        return jax.jit(lambda p: f(**options)(p)).lower(p).as_text()

    assert text(**off, class_mask=None, axis=-1) == text()
