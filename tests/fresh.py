"""A new Python process, for tests that need another number of devices than the tests' eight."""

import os
import subprocess
import sys
from pathlib import Path

import sxe

ROOT = Path(sxe.__file__).parents[1]


def environment(**more):
    """The user's environment without settings of JAX and XLA, such as the number of devices."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.fspath(ROOT)} | more


def run_tests(*arguments, **more):
    """Run pytest in a new process, without plugins whose warnings would fail as errors.

    The only plugin is xdist, whose options are set in pyproject.toml.
    """
    more["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    plugins = ("-p", "xdist.plugin", "-p", "no:cacheprovider")
    return run("-m", "pytest", *plugins, "-n0", *arguments, **more)


def run(*arguments, timeout=300, **more):
    """The output of Python with warnings as errors, one CPU device, and this environment."""
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
