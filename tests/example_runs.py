"""Runs of the programs in examples/, each as a user starts it: a process, warnings as errors."""

import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MODULES = ("flax", "matplotlib", "orbax", "sklearn", "tokenizers", "tqdm")
# Not importorskip: importing them takes longer than most tests.
needs_examples_extra = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, MODULES)),
    reason="the examples need `pip install -e '.[examples]'`",
)


def run_example(name, directory, *options, timeout=None):
    """The finished process of examples/`name`, run in `directory`."""
    # What conftest.py sets for this process, its virtual devices for one, is not the user's.
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / name, *options],
        cwd=directory,
        env=env | {"PYTHONPATH": os.fspath(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )


def assert_figure(png):
    """That these bytes are a PNG file of a figure with something in it."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])  # the header chunk comes first
    assert width >= 1000
    assert height >= 500
    assert len(png) > 20_000
