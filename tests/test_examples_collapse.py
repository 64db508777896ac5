"""examples/collapse.py, as a user runs it: what it prints of both losses, step by step."""

import math
import re

import pytest
from example_runs import assert_figure, needs_examples_extra, run_example

pytestmark = needs_examples_extra

COLUMNS = "computed", "exact", "no_loss", "no_gradient", "row_sum", "train", "test", "logit"


def run_collapse(directory, *options):
    """What is printed of each loss, a dict for each step in the table."""
    done = run_example("collapse.py", directory, *options)
    assert done.returncode == 0, done.stderr
    assert "training: 100%" in done.stderr  # the progress bar
    assert done.stdout.endswith("curves: collapse.png\n")
    assert_figure((directory / "collapse.png").read_bytes())
    rows = re.findall(r"^ *([\d,]+) (optax|sxe) +(.+)$", done.stdout, re.MULTILINE)
    table = {"optax": {}, "sxe": {}}
    for step, name, numbers in rows:
        values = [float(n.replace(",", "").rstrip("%")) for n in numbers.split()]
        table[name][int(step.replace(",", ""))] = dict(zip(COLUMNS, values, strict=True))
    assert table["optax"].keys() == table["sxe"].keys()
    assert len(table["sxe"]) == 11
    return table["optax"], table["sxe"]


def assert_collapse(optax_rows, sxe_rows):
    """In float32 optax's loss becomes 0 in every row, and sxe's keeps its digits in all of them."""
    assert optax_rows[0] == pytest.approx(sxe_rows[0], rel=1e-2, abs=1e-7)  # the same network
    collapsed = [values for values in optax_rows.values() if values["no_loss"] == 100]
    assert collapsed
    for values in collapsed:
        assert values["computed"] == 0 < values["exact"]
        assert values["row_sum"] > 0.1
    for values in sxe_rows.values():
        assert values["no_loss"] == values["no_gradient"] == 0
        assert values["computed"] == pytest.approx(values["exact"], rel=6e-3)  # of three digits
        assert values["row_sum"] < 1e-6
    *_, last = sxe_rows.values()
    assert 0 < last["computed"] < 2**-24  # less than float32 can add to 1
    assert math.isfinite(last["logit"])
    assert max(values["logit"] for values in optax_rows.values()) > 2 * last["logit"]


def test_collapse_of_optax_and_not_of_sxe(tmp_path):
    assert_collapse(*run_collapse(tmp_path, "--smoke"))


@pytest.mark.slow
def test_collapse_of_a_larger_network(tmp_path):
    options = "--modulus=47", "--steps=3000", "--seed=1"
    optax_rows, sxe_rows = run_collapse(tmp_path, *options)
    assert_collapse(optax_rows, sxe_rows)
    assert max(values["no_gradient"] for values in optax_rows.values()) > 25
    assert all(sxe_rows[step]["train"] == 100 for step in sxe_rows if step >= 600)


@pytest.mark.slow
def test_collapse_comes_later_in_float64(tmp_path):
    for rows in run_collapse(tmp_path, "--smoke", "--dtype=float64"):
        for values in rows.values():
            assert values["no_loss"] == values["no_gradient"] == 0
            assert values["computed"] == pytest.approx(values["exact"], rel=6e-3)


def test_collapse_says_what_a_share_is(tmp_path):
    done = run_example("collapse.py", tmp_path, "--train-share=1")
    assert done.returncode == 2
    assert "--train-share: expected a number between 0 and 1, got 1.0" in done.stderr
