"""Which options the tests pass together, and why these cases are enough.

A *factor* is anything that a call may have or not have: an option, dense targets instead of integer
labels, the reduction "none" instead of a sum. A *case* is a tuple of the factors that one call has.
Eleven factors make 2048 cases, which are too many to run. But a mistake usually depends on only a
few factors, whatever the others are. So it is enough that every few factors meet in every way, each
of them on or off. One case serves many such meetings at once:

- ``in_fours`` gives 24 cases of up to 11 factors, in which any four factors meet in all 16 ways. In
  each half, 12 cases, any three meet in all 8 ways. It is used on one device and on one mesh.
- ``in_pairs`` gives 7 cases of up to 15 factors, in which any two factors meet in all 4 ways. It is
  used for tests that compile every case again for each shape of mesh.

Some factors exclude each other. A case then drops one of them, see ``compatible``. Even so, any
three factors of LOGITS or HEAD meet in 24 cases in every possible way, and any two in each half of
them. With one more factor, LOGITS needs one more case, see ``of_logits``. ``test_option_cases.py``
counts these meetings.

Choices with more than two values, such as the differentiation rule, the chunk size, or "mean" and
"sum", rotate from case to case.

Tests of transformations, layouts and policies ask another question: whether options survive them,
not how options work together. They pass all of ``EVERY_OF_LOGITS`` or ``EVERY_OF_HEAD`` at once, or
no option, or the options of a policy.
"""

import itertools

import pytest

# The factors, named like the argument if they are an option. "where_class" is a mask of the logits'
# shape, passed as where. "dense" stands for dense targets. In this order, no meeting of three
# factors of LOGITS is lost to factors that exclude each other.
LOGITS = ("label_smoothing", "class_weights", "where_class", "z_loss")
LOGITS += ("where", "ignore_index", "weights", "dense", "class_mask")
HEAD = ("where", "weights", "class_weights", "label_smoothing", "z_loss", "ignore_index", "dense")
HEAD += ("bias", "logit_scale", "softcap", "class_mask")

# The factors that go together with integer labels, and with dense targets
EVERY_OF_LOGITS = ("where", "weights", "class_weights", "class_mask", "label_smoothing", "z_loss")
EVERY_OF_HEAD = (*EVERY_OF_LOGITS, "bias", "logit_scale", "softcap")

# The first of each pair excludes the second: there is one where, and dense targets have no index.
EXCLUDED = {"where_class": "where", "dense": "ignore_index"}

RULES = ("vjp", "jvp", "autodiff")
FORWARD_RULES = ("jvp", "autodiff")  # the rules that support forward mode
every_rule = pytest.mark.parametrize("rule", RULES)
# For programs that compile slowly, and tests that do not depend on the arithmetic of the rule
vjp_by_default = pytest.mark.parametrize(
    "rule", ["vjp", *(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES[1:])]
)


def one_in(n, indirect=(), **factors):
    """Parametrize a test over the product of these values, one case in n of them by default.

    By default a case runs if the places of its values in their lists add up to a multiple of n. So
    every value occurs, and so does every combination of values that leaves out a factor of n values
    or more. The other cases are slow. The values of a factor may be a dict by name.
    """
    params = []
    for case in itertools.product(*(enumerate(values) for values in factors.values())):
        chosen = [
            (name, values[name] if isinstance(values, dict) else name)
            for (_, name), values in zip(case, factors.values(), strict=True)
        ]
        names, values = zip(*chosen, strict=True)
        by_default = sum(place for place, _ in case) % n == 0
        marks = () if by_default else pytest.mark.slow
        params.append(pytest.param(*values, id="-".join(map(str, names)), marks=marks))
    return pytest.mark.parametrize(tuple(factors), params, indirect=indirect)


def each_value(**values):
    """Parametrize a test over the product of these values, with each value once by default.

    It runs fewer cases than ``one_in``: all lists are read in step, and a shorter list starts again
    at its end. The other cases are slow. The values of a factor may be a dict by name.
    """
    named = [
        v if isinstance(v, dict) else dict(zip(map(str, v), v, strict=True))
        for v in values.values()
    ]
    longest = max(map(len, named))
    default = {tuple(list(v)[i % len(v)] for v in named) for i in range(longest)}
    cases = [
        pytest.param(
            *(v[id_] for v, id_ in zip(named, ids, strict=True)),
            id="-".join(ids),
            marks=() if ids in default else pytest.mark.slow,
        )
        for ids in itertools.product(*named)
    ]
    return pytest.mark.parametrize(tuple(values), cases)


def slow(*values):
    """A parameter of the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


def with_row_scale(case):
    """The case with one logit_scale per row, if it has a logit_scale."""
    return tuple("row_scale" if name == "logit_scale" else name for name in case)


def compatible(case):
    """The case without factors that other factors of it exclude."""
    case = tuple(case)
    return tuple(name for name in case if name not in {EXCLUDED.get(other) for other in case})


def in_fours(*factors):
    """24 cases in which any four factors meet in every way, and any three in either half.

    The first half are the rows of a Hadamard matrix of order 12, made from the squares modulo 11.
    The second half has on what the first half has off.
    """
    assert len(factors) <= 11, factors
    squares = {i * i % 11 for i in range(11)}
    half = [[(row - column) % 11 in squares for column in range(11)] for row in range(11)]
    half.append([False] * 11)
    rows = half + [[not on for on in row] for row in half]
    return [compatible(itertools.compress(factors, row)) for row in rows]


def of_logits(other):
    """25 cases of LOGITS and another factor, in which any three factors meet.

    In the first 24 cases, "where" and "ignore_index" never meet without the other factor.
    """
    return [*in_fours(*LOGITS, other), ("where", "ignore_index")]


def in_pairs(*factors):
    """7 cases in which any two factors meet in every way.

    All factors are off in the first case. Each factor is on in four of the other six cases, and no
    two factors are on in the same four. So some case has both of two factors, some case has one
    without the other, and the first case has neither.
    """
    fours = list(itertools.combinations(range(1, 7), 4))
    assert len(factors) <= len(fours), factors
    on = dict(zip(factors, fours, strict=False))
    return [compatible(name for name in factors if row in on[name]) for row in range(7)]
