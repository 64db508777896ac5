"""examples/second_order.py as a user runs it, and the figures that it prints."""

import re

import pytest
from example_runs import assert_figure, needs_examples_extra, run_example

pytestmark = needs_examples_extra

ROW = re.compile(
    r"^(Newton-CG|L-BFGS|Adam), .*? +(\d+|-) +(\d+|-) +(\S+) +([\d.]+)% +([\d.]+) +([\d.]+)$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    """What examples/second_order.py --smoke prints, and its figure."""
    directory = tmp_path_factory.mktemp("second_order")
    done = run_example("second_order.py", directory, "--smoke")
    assert done.returncode == 0, done.stderr
    assert "training: 100%" in done.stderr  # the progress bar
    return done.stdout, (directory / "second_order.png").read_bytes()


def table(output):
    """By method: the passes to 1e-3 and to 1e-6, if it came there, the last gap, the accuracy."""
    return {
        name: (*(None if n == "-" else int(n) for n in (coarse, fine)), float(gap), float(accuracy))
        for name, coarse, fine, gap, accuracy, *_ in ROW.findall(output)
    }


@pytest.mark.slow
def test_newton_gets_far_closer_to_the_smallest_loss_than_adam(smoke_run):
    output, _ = smoke_run
    rows = table(output)
    assert rows.keys() == {"Newton-CG", "L-BFGS", "Adam"}
    for name in ("Newton-CG", "L-BFGS"):
        coarse, fine, gap, _ = rows[name]
        assert coarse < fine < 200
        assert 0 < gap < 1e-9  # and nothing is below the smallest loss
    _, fine, gap, _ = rows["Adam"]
    assert fine is None
    assert 1e-6 < gap < 1e-3
    # They all train the same model.
    assert all(95 < accuracy < 99 for *_, accuracy in rows.values())


@pytest.mark.slow
def test_the_hessian_is_that_of_the_derivation(smoke_run):
    output, _ = smoke_run
    found = re.findall(r"^  (.+?) +(\S+) of the largest entry$", output, re.MULTILINE)
    errors = {re.sub(r" \d+$", "", name): float(error) for name, error in found}
    assert errors.keys() == {"of the logits of row", "of all parameters", "times a vector"}
    assert max(errors.values()) < 5e-6
    low, high = re.search(r"650 x 650, eigenvalues (\S+) to ([^:]+):", output).groups()
    # The same number added to every class changes nothing but the L2 term.
    assert float(low) == 1e-4
    assert float(high) > 100 * float(low)


@pytest.mark.slow
def test_few_digits_hold_half_of_the_gradient(smoke_run):
    output, _ = smoke_run
    digits = re.search(r"^half of the sum .* comes from (\d+) digits$", output, re.MULTILINE)
    assert 0 < int(digits[1]) < 1347 / 5


@pytest.mark.slow
def test_second_order_writes_a_figure(smoke_run):
    _, png = smoke_run
    assert_figure(png)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--l2=0", "--l2: expected a positive number, got 0.0"),
        pytest.param(
            "--passes=3",
            "--passes: expected enough for a step of Newton-CG, got 3",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["l2", "passes"],
)
def test_options_that_cannot_be_are_named(option, message, tmp_path):
    done = run_example("second_order.py", tmp_path, "--smoke", option)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
