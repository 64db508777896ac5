"""The examples run as a user runs them: each as a process of its own, warnings as errors."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

for _module in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(_module, reason="the examples need `pip install -e '.[examples]'`")

ROOT = Path(__file__).parents[1]


def run_digits(directory, *options):
    """The lines that examples/digits.py prints, and the figure that it leaves in `directory`."""
    # What conftest.py sets for this process, its virtual devices for one, is not the user's.
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "digits.py", *options],
        cwd=directory,
        env=env | {"PYTHONPATH": os.fspath(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "training: 100%" in done.stderr  # the progress bar
    return done.stdout.splitlines(), (directory / "digits.png").read_bytes()


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    return run_digits(tmp_path_factory.mktemp("digits"))


def test_digits_reaches_97_percent_on_held_out_digits(default_run):
    lines, _ = default_run
    found = [
        re.match(r"(train|held-out) +accuracy ([\d.]+)% of \d+ digits", line) for line in lines
    ]
    accuracy = {m[1]: float(m[2]) for m in found if m}
    assert accuracy["train"] > 99.5
    assert accuracy["held-out"] > 97


def test_digits_holds_the_closed_form_gradient_against_autodiff_and_float64(default_run):
    lines, _ = default_run
    found = [re.match(r"  against (.+?) +(\S+) absolute, (\S+) relative", line) for line in lines]
    errors = {m[1]: (float(m[2]), float(m[3])) for m in found if m}
    assert errors.keys() == {"autodiff", "float64 NumPy"}
    for absolute, relative in errors.values():
        assert absolute < 1e-9
        assert relative < 2e-5


def test_digits_writes_a_figure(default_run):
    _, png = default_run
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])  # the header chunk comes first
    assert width >= 1000
    assert height >= 500
    assert len(png) > 20_000


def test_digits_is_repeatable(default_run, tmp_path):
    defaults = "--epochs=40 --batch-size=64 --learning-rate=5e-3 --seed=0 --figure=digits.png"
    assert run_digits(tmp_path, *defaults.split()) == default_run
