"""A Python of its own, for what depends on how many devices JAX sees: the tests' sees eight."""

import os
import subprocess
import sys
from pathlib import Path

import sxe

ROOT = Path(sxe.__file__).parents[1]


def environment(**more):
    """The user's, without what says how many devices there are."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.fspath(ROOT)} | more


def run_tests(*arguments, **more):
    """pytest in such a Python, where a warning of a plugin that happens to be installed would fail.

    Of all plugins it has xdist, whose options pyproject.toml sets.
    """
    more["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    plugins = ("-p", "xdist.plugin", "-p", "no:cacheprovider")
    return run("-m", "pytest", *plugins, "-n0", *arguments, **more)


def run(*arguments, timeout=300, **more):
    """What Python prints, with warnings as errors, one CPU device, and more in its environment."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
