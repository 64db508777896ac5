"""The cases contain all combinations of options that option_cases.py promises."""

import itertools

import option_cases
import pytest
from option_cases import (
    HEAD,
    LOGITS,
    compatible,
    each_value,
    in_fours,
    in_pairs,
    of_logits,
    one_in,
)

ELEVEN = tuple("abcdefghijk")


def missing(cases, factors, together):
    """The possible combinations of ``together`` factors that no case has."""
    found = []
    for few in itertools.combinations(factors, together):
        met = {tuple(name in case for name in few) for case in cases}
        for way in itertools.product((False, True), repeat=together):
            on = tuple(itertools.compress(few, way))
            if compatible(on) == on and way not in met:
                found.append((few, way))
    return found


def test_missing_finds_what_no_case_has():
    cases = [(), ("a",), ("a", "b")]
    assert missing(cases, "ab", 2) == [(("a", "b"), (False, True))]
    assert missing([*cases, ("b",)], "ab", 2) == []
    assert missing([], ("dense", "ignore_index"), 2)[-1][1] == (True, False)


def test_any_four_factors_meet_and_any_three_in_half_of_the_cases():
    cases = in_fours(*ELEVEN)
    assert len(cases) == 24
    assert not missing(cases, ELEVEN, 4)
    assert not missing(cases[:12], ELEVEN, 3)
    assert not missing(cases[12:], ELEVEN, 3)


@pytest.mark.parametrize(
    ("factors", "cases"),
    [
        (LOGITS, in_fours(*LOGITS)),
        *(((*LOGITS, other), of_logits(other)) for other in ("axis", "none")),
        (HEAD, in_fours(*HEAD)),
    ],
    ids=str,
)
def test_any_three_factors_of_a_loss_meet_although_some_exclude_others(factors, cases):
    assert not missing(cases, factors, 3)
    assert not missing(cases[:12], factors, 2)
    assert not missing(cases[12:], factors, 2)


def test_any_two_factors_meet_in_pairs():
    factors = (*ELEVEN, *"lmno")
    cases = in_pairs(*factors)
    assert len(cases) == 7
    assert not missing(cases, factors, 2)


def test_every_option_goes_with_every_other():
    for every in (option_cases.EVERY_OF_LOGITS, option_cases.EVERY_OF_HEAD):
        assert compatible((*every, "dense")) == (*every, "dense")
        assert compatible((*every, "ignore_index")) == (*every, "ignore_index")


FACTORS = {"a": [1, 2, 3, 4, 5], "b": {"x": 10, "y": 20}, "c": ["u", "v", "w"]}


def by_default(mark):
    """The cases of a parametrized test that are not slow, and the number of all cases."""
    names, cases = mark.args
    assert names == tuple(FACTORS)
    return [case.values for case in cases if not case.marks], len(cases)


@pytest.mark.parametrize("cases", [each_value(**FACTORS), one_in(2, **FACTORS)])
def test_each_value_occurs_by_default(cases):
    some, number = by_default(cases)
    assert number == 5 * 2 * 3
    for i, values in enumerate(FACTORS.values()):
        values = values.values() if isinstance(values, dict) else values
        assert {case[i] for case in some} == set(values)


def test_one_case_in_n_runs_by_default():
    """Every combination of values that leaves out a factor of n values or more occurs."""
    some, number = by_default(one_in(2, **FACTORS))
    assert len(some) == number / 2
    assert len({(a, c) for a, _, c in some}) == 5 * 3
    assert len(by_default(each_value(**FACTORS))[0]) == 5
