"""Training by tests/processes.py on a mesh of several processes, one of which may be killed."""

import contextlib
import functools
import importlib.util
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import fresh
import numpy as np
import pytest
from tolerances import SAME_FLOAT32, ZERO

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("orbax") is None,
    reason="checkpoints need `pip install orbax-checkpoint`",
)

STEPS, SAVED, LOST = 6, 3, 5

# Seconds. A run takes about ten. If a process is lost, the others end within five.
RUN, END = 300, 60

# Other shardings of rows and classes add float32 numbers in another order. Results differ by a few
# units in the last place, of losses near 3 and of parameters near 1.
ROUNDING = {"rtol": SAME_FLOAT32, "atol": ZERO}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(directory, processes, *options, last=()):
    """Exit statuses, None for a process that had to be killed, and the ends of their stderr.

    ``last`` has further options for the last process.
    """
    command = [sys.executable, "-W", "error", Path(__file__).with_name("processes.py"), *options]
    command += ["--steps", STEPS, "--processes", processes, "--port", free_port(), "--process-id"]
    logs = [directory / f"{i}.log" for i in range(processes)]
    # JAX warns of proxies, which could be between the processes.
    env = {k: v for k, v in fresh.environment().items() if "proxy" not in k.lower()}
    started = []
    try:
        for i, log in enumerate(logs):
            arguments = [*command, i, *(last if i == processes - 1 else ())]
            with log.open("w") as stderr:
                process = subprocess.Popen(
                    [str(a) for a in arguments],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                )
            started.append(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started[-1].wait(RUN)
            for process in started:
                process.wait(END)
        statuses = [process.poll() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return statuses, [log.read_text(errors="replace")[-5000:] for log in logs]


def train(directory, processes, *options):
    """The arrays, by name, that process 0 of a run writes at its end."""
    out = directory / "run.npz"
    statuses, logs = launch(directory, processes, "--out", out, *options)
    assert statuses == [0] * processes, "\n".join(map(str, [statuses, *logs]))
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """A run without sxe.over_mesh."""
    return train(tmp_path_factory.mktemp("one_device"), 1, "--plain")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Undisturbed runs, by their number of processes."""

    @functools.cache
    def run(processes):
        return train(tmp_path_factory.mktemp("unbroken"), processes)

    return run


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Checkpoints, statuses and logs of a run of two processes, of which the second is killed."""
    directory = tmp_path_factory.mktemp("broken")
    checkpoints = directory / "checkpoints"
    options = "--checkpoint-dir", checkpoints, "--save-at", SAVED
    return checkpoints, *launch(directory, 2, *options, last=("--die-at", LOST))


def assert_same(run, right, **tolerance):
    """Compare the steps of the run and its final parameters."""
    assert run.keys() == right.keys()
    for name, a in run.items():
        np.testing.assert_allclose(a, right[name][-len(a) :], **tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_train_as_one_device(one_device, unbroken, processes):
    run = unbroken(processes)
    assert run["losses"].shape == (STEPS,)
    assert_same(run, one_device, **ROUNDING)
    np.testing.assert_array_equal(run["weight_sums"], one_device["weight_sums"])


@pytest.mark.slow
def test_a_lost_process_ends_the_others(broken):
    _, statuses, logs = broken
    assert statuses[1] == -signal.SIGKILL, logs[1]
    assert statuses[0] not in (0, None), logs[0]
    assert re.search(r"another task died|[Cc]onnection (reset|closed) by peer", logs[0]), logs[0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_a_checkpoint_goes_on(one_device, unbroken, broken, processes, tmp_path):
    """Resume from the last checkpoint before the kill.

    With the same number of processes, the results have the same bits.
    """
    checkpoints, _, _ = broken
    run = train(tmp_path, processes, "--checkpoint-dir", checkpoints, "--restore")
    assert run["losses"].shape == (STEPS - SAVED,)
    assert_same(run, one_device, **ROUNDING)
    if processes == 2:
        assert_same(run, unbroken(2), rtol=0, atol=0)
