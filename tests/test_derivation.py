"""Lines D0 ... K5 of the derivation are right, and a mistake in one line is found in that line."""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sxe
from sxe import derivation
from sxe._tools.check import against_autodiff, precision
from sxe._tools.check import check as check_module
from sxe._tools.check.check import check

NAMES = [f"D{n}" for n in range(10)]
ROW_NAMES = ["E0", "E1", *(f"K{n}" for n in range(6))]


@pytest.fixture
def problem():
    """Logits, and targets that sum to 1, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        y = rng.dirichlet(np.ones(5), size=3)
        yield jnp.asarray(rng.normal(size=(3, 5), scale=3)), jnp.asarray(y)


@pytest.fixture
def logits(problem):
    """Logits x, and target logits z, in float64."""
    x, _ = problem
    return x, jnp.asarray(np.random.default_rng(4).normal(size=(3, 5), scale=2))


def failed(report):
    return [line.name for line in (*report.lines, *report.row_lines) if not line.passed]


@pytest.fixture(autouse=True, scope="module")
def _sixty_digits_once():
    """Every check evaluates the same rows with 60 digits, which is most of a repeated check."""
    of_tuples = functools.cache(precision.sixty_digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            precision, "sixty_digits", lambda row: of_tuples(row._replace(logits=tuple(row.logits)))
        )
        yield


@pytest.fixture
def rules_in_float64(monkeypatch):
    """The check compares the attached rules with autodiff in float64 only.

    Their 12 programs in other dtypes are most of what a new size compiles, and they do not depend
    on the lines. ``test_every_line_holds_for_random_sizes`` runs them.
    """
    right = check_module.check_rules

    def check_rules(problem, show):
        with pytest.MonkeyPatch.context() as patch:
            tolerances = {"float64": against_autodiff.TOLERANCES["float64"]}
            patch.setattr(against_autodiff, "TOLERANCES", tolerances)
            return right(problem, show)

    monkeypatch.setattr(check_module, "check_rules", check_rules)


slow = pytest.mark.slow  # a new size compiles anew


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=slow) for seed in (-8, 2**70))])
def test_every_line_holds_for_random_sizes(seed):
    report = check(seed=seed)
    assert report.failures == ()
    assert 2 <= report.rows <= 7
    assert 2 <= report.classes <= 11
    assert [line.name for line in report.lines] == NAMES
    assert [line.name for line in report.row_lines] == ROW_NAMES
    assert all(line.shown for line in (*report.lines, *report.row_lines))
    assert 0 < report.beta < 1
    assert report.beta != 0.5
    assert len(report.rules) == 36
    assert len(report.precision) == 12


@pytest.mark.parametrize("dtype", ["float64", jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures("rules_in_float64")
def test_every_line_holds_in_every_dtype(dtype):
    report = check(rows=4, classes=4, seed=11, dtype=dtype)
    assert report.failures == ()
    assert report.dtype == jnp.dtype(dtype).name


SMALLEST = [(1, 1, ["D1", "D3"]), (1, 4, ["D1"]), (3, 1, ["D3"])]


@pytest.mark.usefixtures("rules_in_float64")
def test_one_row_of_one_class():
    assert_checks_of_the_smallest(*SMALLEST[0])


@slow
@pytest.mark.parametrize(("rows", "classes", "empty"), SMALLEST)
def test_one_row_and_one_class(rows, classes, empty):
    assert_checks_of_the_smallest(rows, classes, empty)


def assert_checks_of_the_smallest(rows, classes, empty):
    report = check(rows, classes)
    assert report.failures == ()
    assert [line.name for line in report.lines if not line.shown] == empty


@pytest.mark.usefixtures("rules_in_float64")
def test_a_seed_repeats_and_the_configuration_stays(x64):
    first = check(4, 4, seed=5)
    assert jax.config.jax_enable_x64 == x64
    with jax.enable_x64(not x64):
        assert check(4, 4, seed=5) == first
    assert check(4, 4, seed=6) != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows: expected at least 1, got 0"),
        ({"classes": -2}, "classes: expected at least 1, got -2"),
        ({"rows": 50, "classes": 50}, r"expected at most 2048, got 50 \* 50 = 2500"),
        ({"dtype": "float16"}, "expected one of float64, float32, bfloat16, got float16"),
        ({"dtype": "f99"}, "dtype: expected one of float64, float32, bfloat16, got f99"),
        ({"dtype": None}, "dtype: expected one of float64, float32, bfloat16, got None"),
    ],
)
def test_what_cannot_be_checked_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        check(**arguments)


def test_lines_take_lists():
    lists = {"x": [[1.0, 2.0, 0.5]], "y": [[0.0, 1.0, 0.0]], "z": [[0.0, 1.0, 3.0]], "beta": 0.25}
    arrays = {name: jnp.array(values) for name, values in lists.items()}
    for line in (*derivation.LINES, *derivation.ROW_LINES):
        np.testing.assert_array_equal(
            line.closed_form(**{name: lists[name] for name in line.takes}),
            line.closed_form(**{name: arrays[name] for name in line.takes}),
        )


def test_d0_is_the_loss_as_written(problem):
    x, y = (np.asarray(a) for a in problem)
    rows, classes = x.shape
    loss = 0.0
    for i in range(rows):
        for k in range(classes):
            s = math.exp(x[i, k]) / sum(math.exp(x[i, h]) for h in range(classes))
            loss -= y[i, k] * math.log(s) / rows
    np.testing.assert_allclose(derivation.d0(*problem), loss, rtol=1e-14)
    np.testing.assert_allclose(sxe.softmax_cross_entropy(*problem), loss, rtol=1e-14)


def test_entropy_and_divergences_are_those_of_textbooks(logits):
    x, z = logits
    q, p = (np.exp(a) / np.exp(a).sum(1, keepdims=True) for a in map(np.asarray, logits))
    M = 0.3 * p + 0.7 * q
    divergence = partial(sxe.kl_divergence, x, z, reduction="none")

    def kl(p, q):
        pairs = (zip(*rows, strict=True) for rows in zip(p, q, strict=True))
        return np.array([sum(a * math.log(a / b) for a, b in row) for row in pairs])

    for line, ours, expected in (
        (
            derivation.e0(x),
            sxe.log_prob_and_entropy(x, jnp.zeros(3, int)).entropy,
            [-sum(a * math.log(a) for a in row) for row in q],
        ),
        (derivation.k0(x, z), divergence(), kl(p, q)),
        (derivation.k2(x, z), divergence(mode="reverse"), kl(q, p)),
        (
            derivation.k4(x, z, beta=0.3),
            divergence(mode="jensen_shannon", beta=0.3),
            0.3 * kl(p, M) + 0.7 * kl(q, M),
        ),
    ):
        assert line.shape == (3,)
        np.testing.assert_allclose(line, expected, rtol=1e-13)
        np.testing.assert_allclose(ours, expected, rtol=1e-13)


def test_both_forms_of_a_line_are_equal(logits):
    x, z = logits
    q, p = derivation.softmax(x), derivation.softmax(z)
    mean = jnp.sum(q * x, axis=1)
    u = jnp.log(q) - jnp.log(p)
    other_forms = {
        "E0": jnp.log(jnp.sum(jnp.exp(x), axis=1)) - mean,
        "E1": q * (mean[:, None] - x),
        "K0": jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=1),
        "K1": p * (jnp.exp(u) - 1),
        "K2": jnp.sum(q * (jnp.log(q) - jnp.log(p)), axis=1),
    }
    for line in derivation.ROW_LINES:
        if line.name in other_forms:
            assert line.formula.count(" = ") == (2 if line.name == "E0" else 1)
            value = line.closed_form(*(x, z)[: len(line.takes)])
            np.testing.assert_allclose(value, other_forms[line.name], rtol=1e-12, atol=1e-16)


def test_beta_is_one_half_unless_it_is_given(logits):
    for line in (derivation.k4, derivation.k5):
        half = line(*logits)
        np.testing.assert_array_equal(half, line(*logits, beta=0.5))
        assert jnp.max(jnp.abs(line(*logits, beta=0.25) - half)) > 1e-3
    np.testing.assert_allclose(derivation.k4(*logits), derivation.k4(*logits[::-1]), rtol=1e-13)


def test_the_cases_make_up_the_jacobian(problem):
    jacobian, d2, d3, d4 = (np.array(line.closed_form(*problem)) for line in derivation.LINES[1:5])
    rows, classes = problem[0].shape
    for i in range(rows):
        jacobian[i, :, i, :] = d3[i]
        for k in range(classes):
            jacobian[i, k, i, k] = d2[i, k]
    np.testing.assert_allclose(jacobian, d4, rtol=1e-14)
    np.testing.assert_allclose(
        jacobian, jax.jacrev(derivation.softmax)(problem[0]), rtol=1e-13, atol=1e-16
    )


def test_d9_is_the_gradient_transposed(problem):
    d9 = derivation.d9(*problem)
    assert d9.shape == (5, 3)
    np.testing.assert_allclose(d9, jax.grad(derivation.d0)(*problem).T, rtol=1e-12)
    np.testing.assert_allclose(d9, jax.grad(sxe.softmax_cross_entropy)(*problem).T, rtol=1e-12)


def test_the_gradient_needs_neither_moderate_logits_nor_targets_that_sum_to_one(problem):
    x, y = problem
    scale = jnp.array([[0.5], [2.0], [3.0]])
    gradient = jax.grad(sxe.softmax_cross_entropy)
    dL_dx = gradient(x + 1e4, scale * y)
    np.testing.assert_allclose(dL_dx, derivation.d7(x, scale * y), rtol=1e-9)
    labels = jnp.array([0, 4, 2])
    one_hot = jax.nn.one_hot(labels, 5)
    np.testing.assert_allclose(gradient(x, labels), gradient(x, one_hot), rtol=1e-14)
    assert gradient(x.astype(jnp.float32), labels).dtype == jnp.float32


def test_central_differences(problem):
    x, _ = problem
    expected = np.einsum("ik,ij,kl->ikjl", 3 * np.asarray(x) ** 2, np.eye(3), np.eye(5))
    slopes = against_autodiff.central_differences(lambda x: x**3, x)
    np.testing.assert_allclose(slopes, expected, atol=1e-8)


@pytest.mark.usefixtures("rules_in_float64")
def test_d8_fails_where_targets_do_not_sum_to_one_and_d7_holds(problem):
    x, y = problem
    t = jnp.array([[0.5], [2.0], [3.0]]) * y
    gradient = jax.grad(derivation.d0)(x, t)
    np.testing.assert_allclose(derivation.d7(x, t), gradient, rtol=1e-12)
    assert jnp.max(jnp.abs(derivation.d8(x, t) - gradient)) > 0.1
    d7, d8 = check(4, 4).row_sums
    assert (d7.name, d7.passed) == ("D7 where sum_k y_jk != 1", True)
    assert (d8.name, d8.passed) == ("D8 where sum_k y_jk != 1", True)
    assert d7.error < 1e-13 < 0.1 < d8.error


# Mistakes, with as many rows as classes, so that a transpose differs only in its values.


LINES = {line.name: line for line in (*derivation.LINES, *derivation.ROW_LINES)}


def replaced(monkeypatch, name, closed_form):
    for lines in ("LINES", "ROW_LINES"):
        changed = (
            line._replace(closed_form=closed_form) if line.name == name else line
            for line in getattr(derivation, lines)
        )
        monkeypatch.setattr(derivation, lines, tuple(changed))
    return check(4, 4, seed=7)


MISTAKES = {
    "sign": lambda f: lambda **a: -f(**a),
    "factor": lambda f: lambda **a: 1.01 * f(**a),
    "rows for classes": lambda f: lambda x, **a: f(x.T, **a),
    "class index dropped": lambda f: lambda x, **a: f(jnp.broadcast_to(x[:, :1], x.shape), **a),
}
MISTAKES_ALSO_IN_ZERO = {
    "constant": lambda f: lambda **a: f(**a) + 0.01,
    "NaN": lambda f: lambda **a: f(**a) * jnp.nan,
    "shape": lambda f: lambda **a: f(**a)[..., None],
}


@pytest.mark.usefixtures("rules_in_float64")
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", [name for name in LINES if name != "D1"])
def test_a_mistake_is_found_in_its_line(monkeypatch, name, mistake):
    line = LINES[name]
    report = replaced(monkeypatch, name, MISTAKES[mistake](line.closed_form))
    assert failed(report) == [name]
    assert name in report.failures


@pytest.mark.usefixtures("rules_in_float64")
@pytest.mark.parametrize("mistake", MISTAKES_ALSO_IN_ZERO)
@pytest.mark.parametrize("name", ["D0", "D1", "D9", "E0", "K5"])
def test_a_mistake_that_zero_shows_too_is_found(monkeypatch, name, mistake):
    line = LINES[name]
    report = replaced(monkeypatch, name, MISTAKES_ALSO_IN_ZERO[mistake](line.closed_form))
    assert failed(report) == [name]


def s(x):
    return derivation.softmax(x)


def rows_meet(x, y):
    """D4 without the factor [i=j]."""
    k_is_l = jnp.eye(4)[None, :, None, :]
    ds_dx = s(x)[:, :, None, None] * (k_is_l - s(x)[:, None, None, :])
    return jnp.broadcast_to(ds_dx, (4, 4, 4, 4))


WRONG = {
    ("D0", "1/N"): lambda x, y: -jnp.sum(y * jnp.log(s(x))),
    ("D0", "log"): lambda x, y: -jnp.mean(jnp.sum(y * s(x), axis=1)),
    ("D1", "j != i"): rows_meet,
    ("D2", "square"): lambda x, y: s(x),
    ("D3", "l for k"): lambda x, y: jnp.repeat(-(s(x) ** 2)[:, :, None], 4, axis=2),
    ("D4", "[i=j]"): rows_meet,
    ("D4", "[k=l]"): lambda x, y: derivation.d4(x, y) * jnp.eye(4)[None, :, None, :],
    ("D5", "1/s"): lambda x, y: derivation.d5(x, y * s(x)),
    ("D6", "[k=l]"): lambda x, y: jnp.sum(y[:, :, None] * s(x)[:, None, :], axis=1) / 4,
    ("D7", "k for l"): lambda x, y: (jnp.sum(y * s(x), axis=1, keepdims=True) - y) / 4,
    ("D8", "1/N"): lambda x, y: s(x) - y,
    ("D8", "another row's y"): lambda x, y: (s(x) - y[::-1]) / 4,
    ("D9", "transpose"): lambda x, y: (s(x) - y) / 4,
    ("E0", "the largest"): lambda x: -jnp.log(jnp.max(s(x), axis=1)),
    ("E1", "H"): lambda x: -s(x) * jnp.log(s(x)),
    ("E1", "the sum of all"): lambda x: -s(x) * (jnp.log(s(x)) + jnp.sum(derivation.e0(x))),
    ("K0", "- u"): lambda x, z: jnp.sum(s(z) * (s(x) / s(z) - 1), axis=1),
    ("K0", "p and q"): lambda x, z: derivation.k2(x, z),
    ("K1", "p and q"): lambda x, z: s(z) - s(x),
    ("K1", "another row's p"): lambda x, z: s(x) - s(z[::-1]),
    ("K2", "p and q"): lambda x, z: derivation.k0(x, z),
    ("K3", "KL"): lambda x, z: s(x) * jnp.log(s(x) / s(z)),
    ("K3", "KL(p || q)"): lambda x, z: s(x) * (jnp.log(s(x) / s(z)) - derivation.k0(x, z)[:, None]),
    ("K4", "beta"): lambda x, z, beta: derivation.k4(x, z),
    ("K4", "1 - beta"): lambda x, z, beta: derivation.k4(x, z, beta=1 - beta),
    ("K5", "beta"): lambda x, z, beta: derivation.k5(x, z),
    ("K5", "factor"): lambda x, z, beta: derivation.k5(x, z, beta=beta) * beta / (1 - beta),
    ("K5", "M moves"): lambda x, z, beta: derivation.k5(x, z, beta=beta) - beta * s(x),
}


@pytest.mark.usefixtures("rules_in_float64")
@pytest.mark.parametrize(("name", "mistake"), WRONG)
def test_a_wrong_formula_is_found_in_its_line(monkeypatch, name, mistake):
    assert failed(replaced(monkeypatch, name, WRONG[name, mistake])) == [name]


@pytest.mark.parametrize(
    ("mode", "name"), [("forward", "K0"), ("reverse", "K2"), ("jensen_shannon", "K4")]
)
def test_a_wrong_divergence_is_found(monkeypatch, logits, mode, name):
    right = sxe.kl_divergence

    def wrong(*args, **options):
        return right(*args, **options) * (1.01 if options["mode"] == mode else 1)

    monkeypatch.setattr(against_autodiff, "kl_divergence", wrong)
    lines = against_autodiff.check_row_lines(derivation.ROW_LINES, *logits, 0.25)
    assert [line.name for line in lines if not line.passed] == [name]


@pytest.mark.usefixtures("rules_in_float64")
def test_a_d8_that_needs_no_assumption_is_found(monkeypatch):
    report = replaced(monkeypatch, "D8", derivation.d7)
    assert report.failures == ("D8 where sum_k y_jk != 1",)


@pytest.mark.usefixtures("rules_in_float64")
def test_a_d7_that_needs_the_assumption_is_found(monkeypatch):
    report = replaced(monkeypatch, "D7", derivation.d8)
    assert report.failures == ("D7 where sum_k y_jk != 1",)


@pytest.mark.usefixtures("rules_in_float64")
def test_a_wrong_rule_is_found(monkeypatch):
    right = sxe.softmax_cross_entropy

    def one_cotangent_for_all_rows(logits, labels, *, rule="vjp", **options):
        if rule != "jvp":
            return right(logits, labels, rule=rule, **options)
        loss, vjp = jax.vjp(lambda x: right(x, labels, **options), jax.lax.stop_gradient(logits))
        slope = vjp(jnp.ones_like(loss))[0].astype(loss.dtype)
        moved = jnp.sum(slope * (logits - jax.lax.stop_gradient(logits)).astype(loss.dtype))
        return loss + moved / loss.size

    monkeypatch.setattr(against_autodiff, "softmax_cross_entropy", one_cotangent_for_all_rows)
    assert check(4, 4).failures == (
        "jvp, integer labels, float64",
        "jvp, dense targets, float64",
    )


@pytest.mark.usefixtures("rules_in_float64")
def test_a_wrong_rule_of_rows_is_found(monkeypatch):
    """The wrong rule swaps the cotangents of log-probability and entropy."""
    right = sxe.log_prob_and_entropy

    def exchanged(logits, labels, *, rule="vjp"):
        results = right(logits, labels, rule=rule)
        if rule != "jvp":
            return results
        held = jax.lax.stop_gradient(results)
        moved = [result - at for result, at in zip(results, held, strict=True)]
        return sxe.LogProbAndEntropy(held.log_prob + moved[1], held.entropy + moved[0])

    monkeypatch.setattr(against_autodiff, "log_prob_and_entropy", exchanged)
    assert check(4, 4).failures == ("jvp, log prob and entropy, float64",)


def test_a_loss_that_rounds_away_is_found(monkeypatch):
    right = sxe.softmax_cross_entropy

    def textbook(logits, labels, **options):
        if logits.dtype != jnp.float32 or options:
            return right(logits, labels, **options)
        lse = jax.nn.logsumexp(logits, axis=1)
        if labels.ndim == 1:
            return jnp.mean(lse - logits[:, 0])
        return jnp.mean(jnp.sum(labels, axis=1) * lse - jnp.sum(labels * logits, axis=1))

    # Don't run the whole check: its other parts would only be compiled again for this loss.
    monkeypatch.setattr(precision, "softmax_cross_entropy", textbook)
    assert tuple(row.name for row in precision.check_precision() if not row.passed) == (
        "1e8, 1e8: loss",
        "20, 0: loss",
        "20, 0: label gradient",
        "40, 0, 0: loss",
        "40, 0, 0: label gradient",
        "2048 times 1e7: loss",
        "20, 0, targets 1, 1e-9: loss",
        "20, 0, targets 1, 1e-9: label gradient",
    )


def test_a_gradient_that_loses_a_small_target_is_found(monkeypatch):
    right = sxe.softmax_cross_entropy

    def difference(logits, labels, **options):
        """A loss whose gradient computes T - t as a difference."""
        if logits.dtype != jnp.float32:
            return right(logits, labels, **options)
        t = labels
        if t.ndim == 1:
            a = options.get("label_smoothing", 0)
            t = (1 - a) * jax.nn.one_hot(t, logits.shape[1]) + a / logits.shape[1]
        x = jax.lax.stop_gradient(logits)
        e = jnp.exp(x - x.max(1, keepdims=True))
        r = e[:, 1:].sum(1, keepdims=True)  # class 0 has the largest logit in every row here
        slope = (e * (t.sum(1, keepdims=True) - t) - t * ((1 - e) + r)) / (1 + r)
        return right(x, labels, **options) + jnp.sum(slope * (logits - x))

    monkeypatch.setattr(precision, "softmax_cross_entropy", difference)
    assert tuple(row.name for row in precision.check_precision() if not row.passed) == (
        "20, 0, targets 1, 1e-9: label gradient",
        "40, 0, 0, smoothing 1e-6: label gradient",
    )


def test_a_divergence_that_rounds_away_is_found(monkeypatch):
    assert precision.check_distances().passed

    def textbook(logits, target_logits, **options):
        return precision._textbook_kl(logits, target_logits)

    monkeypatch.setattr(precision, "kl_divergence", textbook)
    assert not precision.check_distances().passed


@pytest.mark.parametrize(
    ("at", "error", "passed"),
    [(1e-4, 3e-5, True), (1e-4, 2e-4, False), (1e-3, 3e-5, False), (10, 3e-5, False)],
)
def test_a_divergence_is_judged_by_the_distance(monkeypatch, at, error, passed):
    right, row = sxe.kl_divergence, np.argmin(np.abs(np.log(precision.DISTANCES) - math.log(at)))

    def wrong(*args, **options):
        return right(*args, **options).at[row].multiply(1 + error)

    monkeypatch.setattr(precision, "kl_divergence", wrong)
    assert precision.check_distances().passed == passed


def test_sixty_digits_of_a_divergence():
    """Two classes with probabilities (1/2, 1/2) and (1/4, 3/4), and a very small divergence."""
    zero, log_3 = 0.0, math.log(3)
    forward = precision.kl_in_sixty_digits((zero, log_3), (zero, zero))
    assert forward == pytest.approx(math.log(4 / 3) / 2, rel=1e-15)
    reverse = precision.kl_in_sixty_digits((zero, zero), (zero, log_3))
    assert reverse == pytest.approx(math.log(27 / 16) / 4, rel=1e-15)
    a = 2.0**-40  # the divergence is a^2 / 8, plus terms of order a^4
    assert precision.kl_in_sixty_digits((a, 0.0), (0.0, 0.0)) == pytest.approx(a**2 / 8, rel=1e-15)


def test_sixty_digits():
    equal, confident = (precision.sixty_digits(precision.Row(x)) for x in ((1e8, 1e8), (40.0, 0.0)))
    assert equal == (math.log(2), -0.5, 0.5)
    q = 1 / (1 + math.exp(40))
    np.testing.assert_allclose(confident, (math.log1p(math.exp(-40)), -q, q), rtol=1e-15)


def test_sixty_digits_of_soft_targets():
    learned = precision.sixty_digits(precision.Row((1.0, 1.0), targets=(0.5, 0.5)))
    assert learned == (math.log(2), 0, 0.5)
    smoothed = precision.sixty_digits(precision.Row((40.0, 0.0, 0.0), label_smoothing=0.25))
    np.testing.assert_allclose(smoothed, (40 / 6, 1 / 6, 1 / 6), rtol=1e-15)
