"""The examples run as a user runs them: each as a process of its own, warnings as errors."""

import math
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from example_runs import assert_figure, needs_examples_extra, run_example

pytestmark = needs_examples_extra


def run_digits(directory, *options):
    """The lines that examples/digits.py prints, and the figure that it leaves in `directory`."""
    done = run_example("digits.py", directory, *options)
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
    assert_figure(png)


@pytest.mark.slow
def test_digits_is_repeatable(default_run, tmp_path):
    defaults = "--epochs=40 --batch-size=64 --learning-rate=5e-3 --seed=0 --figure=digits.png"
    assert run_digits(tmp_path, *defaults.split()) == default_run


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    """What examples/language_model.py --smoke prints, and its figure."""
    directory = tmp_path_factory.mktemp("language_model")
    done = run_example("language_model.py", directory, "--smoke")
    assert done.returncode == 0, done.stderr
    for loss in ("optax", "sxe"):
        assert f"training with {loss}: 100%" in done.stderr  # the progress bars
    return done.stdout, (directory / "language_model.png").read_bytes()


def row(output, title):
    """The numbers of a row of the table, for optax and for sxe."""
    found = re.search(rf"^ *{title} +([\d.,]+)(?: MiB)? +([\d.,]+)(?: MiB)?$", output, re.MULTILINE)
    assert found, output
    return [float(number.replace(",", "")) for number in found.groups()]


@pytest.mark.slow
def test_language_model_learns_the_same_with_both_losses(smoke_run):
    output, _ = smoke_run
    found = re.search(r"largest difference between the loss curves: (\S+) nats", output)
    assert float(found[1]) < 1e-4
    for title in (r"train loss, last \d+ steps", "held-out loss"):
        optax_loss, sxe_loss = row(output, title)
        assert abs(optax_loss - sxe_loss) < 1e-3
        assert sxe_loss < math.log(16_384) - 0.1  # where an untrained model starts


@pytest.mark.slow
def test_language_model_measures_both_losses(smoke_run):
    output, _ = smoke_run
    assert min(row(output, "tokens per second")) > 0
    peaks, before = row(output, "peak memory of the process"), row(output, "before the first step")
    assert all(100 < b <= p < 4000 for b, p in zip(before, peaks, strict=True))
    # 8 * 128 tokens * 16,384 classes are 64 MiB of logits, and optax's gradient is as large.
    optax_mib, sxe_mib = row(output, "temporaries of a step")
    assert optax_mib > 128
    assert sxe_mib < optax_mib - 64


@pytest.mark.slow
def test_language_model_writes_code(smoke_run):
    output, _ = smoke_run
    _, sample = output.split("a sample of the model trained with sxe:\n")
    assert sample.startswith("def")
    assert len(sample) > 100


@pytest.mark.slow
def test_language_model_writes_a_figure(smoke_run):
    _, png = smoke_run
    assert_figure(png)


def test_language_model_says_how_much_text_it_needs(tmp_path):
    done = run_example("language_model.py", tmp_path, "--text-bytes=500000")
    assert done.returncode == 1
    assert re.search(r"give a vocabulary of [\d,]+ byte pairs, expected 16,384: raise", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_language_model_in_bfloat16_with_more_classes_than_the_vocabulary(tmp_path):
    done = run_example(
        "language_model.py", tmp_path, "--smoke", "--dtype=bfloat16", "--classes=20000"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    optax_loss, sxe_loss = row(done.stdout, "held-out loss")
    assert abs(optax_loss - sxe_loss) < 0.01
    assert sxe_loss < math.log(20_000) - 0.1
    optax_mib, sxe_mib = row(done.stdout, "temporaries of a step")
    assert sxe_mib < optax_mib - 78  # 8 * 128 tokens * 20,000 classes in float32
    too_few = run_example("language_model.py", tmp_path, "--smoke", "--classes=9")
    assert too_few.returncode == 2
    assert "--classes: expected at least 16384 classes, got 9" in too_few.stderr


@pytest.mark.slow
def test_language_model_measures_the_speed_of_both_losses(tmp_path):
    done = run_example("language_model.py", tmp_path, "--smoke", "--measure=speed")
    assert done.returncode == 0, done.stdout + done.stderr
    speeds = re.findall(r"^(\w+): ([\d,]+) tokens per second, ", done.stdout, re.MULTILINE)
    assert [name for name, _ in speeds] == ["optax", "sxe"]
    assert all(int(speed.replace(",", "")) > 0 for _, speed in speeds)
    # The parameters are the same in the first step, and both losses learn the batch.
    losses = re.findall(r": loss ([\d.]+) at first, ([\d.]+) after 10 steps$", done.stdout, re.M)
    (optax_first, optax_last), (sxe_first, sxe_last) = ((float(a), float(b)) for a, b in losses)
    assert abs(optax_first - sxe_first) < 2e-3
    assert abs(optax_last - sxe_last) < 0.01
    assert sxe_last < sxe_first - 0.1
    needed = re.findall(r"the step as compiled needs ([\d,]+) MiB", done.stdout)
    optax_mib, sxe_mib = (int(mib.replace(",", "")) for mib in needed)
    assert sxe_mib < optax_mib - 64  # 8 * 128 tokens * 16,384 classes in float32
    assert list(tmp_path.iterdir()) == []  # no figure


@pytest.mark.slow
def test_language_model_finds_the_largest_batch(tmp_path):
    options = ("--smoke", "--vocabulary=4096", "--measure=largest-batch")
    done = run_example("language_model.py", tmp_path, *options, "--batch-size=32", "--memory=0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(
        r"^(\w+): largest batch ([\d,]+), ([\d,]+) tokens: needs ([\d,]+) MiB of 512 MiB$",
        done.stdout,
        re.MULTILINE,
    )
    largest = {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in found}
    assert list(largest) == ["optax", "sxe"]
    for name, (batch, tokens, mib) in largest.items():
        assert batch % 8 == 0
        assert tokens == 128 * batch
        assert 0.9 * 512 < mib <= 512, name  # eight more of optax's would take 7 % more
    assert largest["sxe"][0] > 4 * largest["optax"][0]
    too_little = run_example("language_model.py", tmp_path, *options, "--memory=0.001")
    assert too_little.returncode == 1
    assert "optax: batch 8 does not fit: lower --batch-size" in too_little.stderr


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator has a limit")
def test_language_model_asks_for_a_limit_of_memory_where_the_device_has_none(tmp_path):
    done = run_example("language_model.py", tmp_path, "--smoke", "--measure=largest-batch")
    assert done.returncode == 1
    assert "this device reports no memory limit: pass --memory, in GiB" in done.stderr


def sharded_report(done):
    """What examples/sharded_training.py --smoke prints, once it is known to match one device."""
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout
    assert "devices: 8 (cpu), mesh: 2 data x 4 model\n" in output
    # 2048 classes over four devices, 32 features over two, of four bytes.
    assert "kernel: [32, 2048], 262,144 bytes\n" in output
    assert "on each device: [16, 512], 32,768 bytes\n" in output
    assert float(re.search(r"tokens per second: ([\d,]+)", output)[1].replace(",", "")) > 0
    assert float(re.search(r"between the loss curves: (\S+) nats", output)[1]) < 1e-5
    assert output.endswith("matches one device\n")
    return output


def losses(output):
    """The steps that a run began and ended with, and their losses."""
    found = re.search(r"loss of step (\d+): ([\d.]+), of step (\d+): ([\d.]+)", output)
    return [float(number) for number in found.groups()]


@pytest.mark.slow
def test_sharded_training_resumes_and_matches_one_device(tmp_path):
    options = "--smoke", "--checkpoint-dir=checkpoints"
    whole = run_example("sharded_training.py", tmp_path, *options, "--no-compare")
    assert whole.returncode == 0, whole.stderr
    assert "one device" not in whole.stdout
    assert (tmp_path / "checkpoints" / "4").is_dir()
    first, first_loss, last, last_loss = losses(whole.stdout)
    assert (first, last) == (1, 6)
    assert abs(first_loss - math.log(2048)) < 0.1  # untrained
    assert last_loss < first_loss - 0.05

    # The other run took the steps 5 and 6, too.
    resumed = sharded_report(run_example("sharded_training.py", tmp_path, *options))
    assert "resumed from the checkpoint of step 4\n" in resumed
    assert losses(resumed)[::2] == [5, 6]
    assert losses(resumed)[3] == last_loss


@pytest.mark.slow
def test_sharded_training_matches_one_device_with_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--smoke --coordinator=127.0.0.1:{port} --processes=2 --checkpoint-dir=checkpoints"
    with ThreadPoolExecutor() as pool:
        done, other = pool.map(
            lambda i: run_example(
                "sharded_training.py", tmp_path, *options.split(), f"--process-id={i}", timeout=300
            ),
            range(2),
        )
    assert "processes: 2, " in sharded_report(done)
    assert (tmp_path / "checkpoints" / "4").is_dir()
    assert other.returncode == 0, other.stderr
    assert "loss" not in other.stdout  # only process 0 reports
    assert "training" not in other.stderr
