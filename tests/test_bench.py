"""python -m sxe bench: it judges results correctly, and reports everything that fails."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sxe
from sxe.__main__ import main
from sxe._tools.bench import command, contestants, report
from sxe._tools.bench import measure as measuring
from sxe._tools.bench.measure import Measurement, Timing, measure
from sxe._tools.bench.problem import Problem, errors, standard_problems, truth

PROBLEMS = [
    Problem(7, 11),
    Problem(70, 13, dense=True, confident=0.5),
    Problem(67, 19, hidden=5),
    Problem(66, 19, hidden=5, counting=0.25),
    Problem(9, 11, hidden=5, dtype="bfloat16", confident=0.3),
]


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    """Measuring the machine in full size takes most of the time of a small problem."""
    for name in ("CPU_SIZES", "ACCELERATOR_SIZES"):
        monkeypatch.setattr(measuring, name, (2**10, 16))


def test_the_machine():
    found = measuring.machine()
    assert found.device.startswith(jax.devices()[0].platform)
    assert found.versions["jax"] == jax.__version__
    assert found.copy > 0
    assert found.matmul.keys() == {"float32", "bfloat16"}
    assert min(found.matmul.values()) > 0
    assert f"copy {found.copy / 1e9:,.1f} GB/s; matmul float32 " in report.heading(found)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_truth_equals_the_oracle(problem):
    *inputs, labels = problem.data()
    assert problem.counting == 1 or (labels >= 0).sum() == problem.rows_that_count == 16
    inputs = [np.asarray(jnp.asarray(x, problem.dtype)) for x in inputs]
    true = truth(problem, *inputs, labels)
    rows, classes = problem.samples(labels)
    if problem.hidden is None:
        value, gradients = oracle.loss(*inputs, labels), [oracle.gradient(*inputs, labels)]
    else:
        counts = {"where": labels >= 0}
        labels = np.maximum(labels, 0)
        value = oracle.head_loss(*inputs, labels, **counts)
        found = oracle.head_gradients(*inputs, labels, **counts)
        gradients = [found["hidden"], found["kernel"]]
    assert true.loss == pytest.approx(float(value), rel=1e-12)
    at = (rows, (slice(None), classes))
    for actual, expected, i in zip(true.gradients, gradients, at, strict=False):
        np.testing.assert_allclose(actual, expected[i], rtol=1e-9, atol=1e-12)
    assert len(true.gradients) == len(gradients)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_truth_is_the_same_on_an_accelerator(problem, monkeypatch):
    """On an accelerator JAX computes the truth, with float64 matrix products."""
    arguments = [
        jnp.asarray(x, x.dtype if x.dtype == np.int32 else problem.dtype) for x in problem.data()
    ]
    expected = truth(problem, *(np.asarray(x) for x in arguments))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(measuring, "truth", lambda *a, **k: seen.update(k) or truth(*a, **k))
    seen = {}
    actual = measuring._truth(problem, *arguments)
    assert seen["namespace"] is jnp
    assert actual.loss == pytest.approx(expected.loss, rel=1e-13)
    for a, b in zip(actual.gradients, expected.gradients, strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_data_depend_on_the_problem_alone(threads, monkeypatch):
    problem = Problem(5, 2**21, hidden=2)  # several slices of the kernel and of the logits
    expected = problem.data(), problem._replace(hidden=None).data()
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    found = problem.data(), problem._replace(hidden=None).data()
    for a, b in zip(sum(found, ()), sum(expected, ()), strict=True):
        np.testing.assert_array_equal(a, b)
    logits = expected[1][0]
    assert abs(logits.mean()) < 1e-2
    assert logits.std() == pytest.approx(1, rel=1e-2)
    assert len({row.tobytes() for row in logits}) == 5


def test_the_arrays_on_the_device_have_the_dtype_of_the_problem(monkeypatch):
    """The dtype does not depend on the number of slices that are converted."""
    x = np.random.default_rng(0).standard_normal((7, 5), np.float32)
    whole = measuring._on_device(x, "bfloat16")
    monkeypatch.setattr(measuring, "SLICE", 10)
    sliced = measuring._on_device(x, "bfloat16")
    assert whole.dtype == sliced.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(sliced))
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(jnp.asarray(x, "bfloat16")))


@pytest.mark.parametrize(
    "problem",
    [Problem(8, 11, confident=0.5), Problem(8, 11, hidden=64, confident=0.5)],
    ids=lambda p: p.name,
)
def test_confident_rows_are_confident(problem):
    loss = sxe.softmax_cross_entropy if problem.hidden is None else sxe.linear_softmax_cross_entropy
    losses = np.asarray(loss(*problem.data(), reduction="none"))
    assert sum(losses < 1e-5) == sum(losses < 1e-3) == 4
    assert not np.all(losses[:4] < 1e-5)


def test_logits_and_targets_of_confident_dense_rows_agree():
    logits, targets = Problem(8, 11, dense=True, confident=0.5).data()
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    at_lead = targets[np.arange(8), logits.argmax(axis=1)]
    assert sum(at_lead >= 0.9) == sum(at_lead >= 0.5) == 4


@pytest.mark.parametrize("quick", [False, True])
def test_a_share_of_the_rows_of_all_standard_problems_is_confident(quick):
    problems = standard_problems(quick, confident=0.25)
    assert {p.confident for p in problems} == {0.25}
    assert len(set(problems)) == len(problems) > 5


def test_rows_that_do_not_count_are_measured_beside_all_rows(capsys, tmp_path):
    """Only the rows that count are compared with float64 and with optax."""
    sizes = ("--rows", "512", "--hidden", "8", "--classes", "300", "--counting", "0.25")
    file = tmp_path / "found.json"
    main(["bench", *sizes, "--peers", "optax", "--rounds", "3", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "25% counting" in printed
    assert "/ sxe, all rows" in printed
    for found in json.loads(file.read_text())["measurements"]:
        by_name = {t["name"]: t for t in found["timings"]}
        assert by_name.keys() == {"sxe", "sxe, all rows", "optax", "floor"}
        assert by_name["sxe, all rows"]["loss_error"] is None
        for name in ("sxe", "optax"):
            assert by_name[name]["loss_error"] < 1e-5
            assert not by_name[name]["wrong"]
    for wrong, message in ((("--counting", "0"), "(0, 1]"), (sizes[:2] + sizes[4:], "--hidden")):
        with pytest.raises(SystemExit):
            main(["bench", *wrong])
        assert message in capsys.readouterr().err


def test_errors_are_relative():
    true = truth(PROBLEMS[0], *PROBLEMS[0].data())
    worse = true._replace(loss=true.loss * 1.01, gradients=(true.gradients[0] * 1.02,))
    assert errors(worse, true) == pytest.approx((0.01, 0.02))
    assert errors(true, true) == (0, 0)


@pytest.fixture
def peers(monkeypatch):
    """In place of tokamax: a loss that is wrong by 0.1 %, and two that fail."""
    losses = contestants.losses

    def with_others(problem):
        def wrong(*arguments):
            return sxe.softmax_cross_entropy(*arguments) * 1.001

        def fails(*arguments):
            raise NotImplementedError("not here")

        def fails_late(*arguments):
            def callback(x):
                raise ValueError("not now")

            loss = sxe.softmax_cross_entropy(*arguments)
            return loss * jax.pure_callback(callback, jax.ShapeDtypeStruct((), loss.dtype), 1.0)

        others = {"wrong": wrong, "fails": fails, "fails late": fails_late}
        return {**losses(problem), "tokamax": others}

    monkeypatch.setattr(contestants, "losses", with_others)
    monkeypatch.setattr(contestants, "PEERS", ("optax", "numpy"))
    return ("optax", "tokamax")


def test_a_wrong_peer_and_one_that_fails_are_named(peers):
    found = measure(Problem(8, 11), peers, gradient=True, rounds=2, seconds=60.0)
    assert found.path == "all rows at once"
    timings = {t.name: t for t in found.timings}
    assert list(timings) == ["sxe", "optax", "wrong", "floor", "fails", "fails late"]
    assert timings["wrong"].wrong
    assert timings["wrong"].loss_error == pytest.approx(1e-3, rel=0.1)
    assert not timings["sxe"].wrong
    assert not timings["optax"].wrong
    assert timings["fails"].failed == "NotImplementedError: not here"
    assert timings["fails late"].failed
    assert len(timings["sxe"].seconds) == 2
    assert timings["sxe"].temporary_bytes is not None


def test_a_wrong_peer_is_marked_in_the_table(peers, monkeypatch, capsys):
    monkeypatch.setattr(contestants, "installed", lambda: dict.fromkeys(peers, "1.0"))
    assert (
        main(["bench", "--rows", "8", "--classes", "11", "--rounds", "2", "--only", "value"]) == 0
    )
    text = capsys.readouterr().out
    assert ") !" in text
    name = "8 x 11, float32, 50% confident, value"
    assert f"! wrong is wrong at {name}: error of loss 1.0e-03" in text
    assert f"fails failed at {name}: NotImplementedError: not here" in text


@pytest.mark.parametrize(
    ("problem", "gradient", "rate"),
    [
        (Problem(1000, 2000), False, "8.0 GB/s"),
        (Problem(1000, 2000), True, "16.0 GB/s"),
        (Problem(1000, 2000, dtype="bfloat16"), True, "8.0 GB/s"),
        (Problem(1000, 2000, dense=True), True, "24.0 GB/s"),
        (Problem(1000, 2000, hidden=500), False, "2 TFLOP/s"),
        (Problem(1000, 2000, hidden=50, dtype="bfloat16"), True, "600 GFLOP/s"),
    ],
    ids=str,
)
def test_the_rate_is_that_of_what_has_to_be_done(problem, gradient, rate):
    """A call takes 1 ms, and its floor 0.75 ms."""
    timings = tuple(
        Timing(name, (seconds,), temporary_bytes=mib * 2**20)
        for name, seconds, mib in [("sxe", 1e-3, 3), ("peer", 2e-3, 5), ("floor", 0.75e-3, 0)]
    )
    titles, _, row = report.table([Measurement(problem, gradient, "", timings)]).splitlines()
    cells = re.split(r"\s{2,}", row.strip())
    assert cells[2:] == ["1", rate, "1.33", "0.50 (0.50..0.50)", "3/5"]
    assert "MiB: sxe/peer" in titles


@pytest.mark.parametrize(
    ("dtype", "chosen", "expected"),
    [
        ("float32", None, "highest"),
        ("float32", "tensorfloat32", "tensorfloat32"),
        ("bfloat16", None, None),
    ],
)
def test_all_multiply_float32_alike(dtype, chosen, expected, monkeypatch):
    """On a GPU too, where the default of JAX is TF32, unlike that of sxe."""
    seen = []
    losses = contestants.losses

    def watched(problem):
        def loss(*arguments):
            seen.append(jax.config.jax_default_matmul_precision)
            return losses(problem)["optax"]["optax"](*arguments)

        return {**losses(problem), "optax": {"optax": loss}}

    monkeypatch.setattr(contestants, "losses", watched)
    with jax.default_matmul_precision(chosen):
        measure(
            Problem(8, 11, hidden=5, dtype=dtype),
            ("optax",),
            gradient=True,
            rounds=1,
            seconds=60.0,
        )
    assert seen
    assert set(seen) == {expected}


@pytest.mark.parametrize(("backend", "waits"), [("cpu", 4), ("gpu", 1)])
def test_an_accelerator_is_kept_busy(backend, waits, monkeypatch):
    waited = []

    class Result:
        def block_until_ready(self):
            waited.append(self)

    contestant = contestants.Contestant("", lambda x: x + 1, jnp.ones(3))
    monkeypatch.setattr(contestant, "_program", lambda x: Result())
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert contestant.seconds(3) > 0
    assert len(waited) == waits
    assert len(set(waited)) == min(waits, 3)


@pytest.mark.parametrize(("gradient", "flops"), [(False, 2), (True, 6)])
def test_the_floor_of_a_head_on_an_accelerator_is_one_product_at_a_time(
    gradient, flops, monkeypatch
):
    """Each product has its own program, which overwrites the previous result."""
    problem = Problem(2048, 24, hidden=5)
    hidden, kernel, labels = (jnp.asarray(x) for x in problem.data())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    bound, times = contestants.floor(problem, gradient, hidden, kernel, labels)
    rows = 2048 // times
    assert rows == contestants.head_plan(problem, gradient).chunk_size
    programs = bound._programs
    assert len(programs) == flops // 2
    for program in programs:
        assert "input_output_alias={ {}: (0, {}, may-alias) }" in program.as_text()
    assert sum(p.cost_analysis()["flops"] for p in programs) == flops * rows * 5 * 24
    assert bound.seconds(3) > 0
    assert bound.temporary_bytes >= 0
    monkeypatch.undo()
    in_one, _ = contestants.floor(problem, gradient, hidden, kernel, labels)
    assert type(in_one) is contestants.Contestant


def test_what_the_floor_times(monkeypatch):
    """The floor is the sum of the mean times of the products."""
    clock = iter([0.0, 6.0, 10.0, 13.0])
    product = (jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 4)))
    floor = contestants.Products("floor", product, product)
    monkeypatch.setattr(contestants.time, "perf_counter", lambda: next(clock))
    assert floor.seconds(3) == 3.0


def test_on_an_accelerator_optax_has_logits_in_bfloat16_too(monkeypatch):
    problem = Problem(9, 11, hidden=5, dtype="bfloat16")
    assert list(contestants.losses(problem)["optax"]) == ["optax"]
    hidden, kernel, labels = problem.data()
    arrays = (jnp.asarray(hidden, "bfloat16"), jnp.asarray(kernel, "bfloat16"), labels)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = contestants.losses(problem)["optax"]
    assert list(found) == ["optax", "optax, narrow logits"]
    assert list(contestants.losses(problem._replace(dtype="float32"))["optax"]) == ["optax"]
    wide, narrow = (f(*arrays) for f in found.values())
    assert narrow.dtype == "float32"
    assert narrow == pytest.approx(float(wide), rel=1e-2)
    gradients = (oracle.head_gradients(*arrays)[n] for n in ("hidden", "kernel"))
    for actual, right in zip(
        jax.grad(found["optax, narrow logits"], (0, 1))(*arrays), gradients, strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(actual, np.float64), right, atol=3e-2 * np.abs(right).max()
        )


def test_a_sweep_as_table_json_and_plot(tmp_path, capsys):
    files = [tmp_path / "report.json", tmp_path / "sweep.png"]
    command = ["bench", "--rows", "8", "16", "--hidden", "3", "--classes", "11", "--rounds", "2"]
    command += ["--dtype", "float32", "bfloat16", "--peers", "optax"]
    assert main([*command, "--json", str(files[0]), "--plot", str(files[1])]) == 0
    text = capsys.readouterr().out
    assert "jax " in text
    assert text.count("16 x 3 x 11, bfloat16") == 2
    assert "sxe, gradients in the forward pass, 1 chunk of 16 rows: 16 x 3 x 11" in text
    report = json.loads(files[0].read_text())
    assert report["machine"]["copy"] > 0
    assert len(report["measurements"]) == 2 * 2 * 2
    for m in report["measurements"]:
        assert m["problem"]["confident"] == 0.5
        assert [t["name"] for t in m["timings"]] == ["sxe", "optax", "floor"]
        assert all(len(t["seconds"]) == 2 for t in m["timings"])
        assert not any(t["wrong"] for t in m["timings"])
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_the_phases_are_shown_on_a_terminal(capsys, monkeypatch):
    command = ["bench", "--rows", "8", "--classes", "11", "--rounds", "1", "--peers"]
    assert main(command) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(command) == 0
    shown = capsys.readouterr().err
    for phase in ("truth computed", "sxe compiled", "results compared"):
        assert phase in shown


SUITE = [Problem(8, 11), Problem(16, 13, hidden=5), Problem(9, 7)]


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.setattr(command, "standard_problems", lambda quick, confident: SUITE)
    return ["bench", "--suite", "--rounds", "2", "--peers", "optax"]


def test_a_suite_is_a_table_for_each_problem(suite, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert main([*suite, "--chunk-size", "4", "16", "--json", str(file), "--budget", "600"]) == 0
    text = capsys.readouterr()
    for problem in SUITE:
        assert re.search(rf"^{problem.name}, value and gradient +ms", text.out, re.M)
    assert re.search(r"^sxe, chunk 4 .* GFLOP/s", text.out, re.M)
    assert re.search(r"^\[ +\d+\.\d s\] sxe, chunk 16 compiled$", text.err, re.M)
    for phase in ("data drawn", "truth computed", "floor compiled", "rounds measured"):
        assert text.err.count(phase) == len(SUITE)
    measured = json.loads(file.read_text())["measurements"]
    assert [m["problem"]["rows"] for m in measured] == [8, 16, 9]
    names = ["sxe", "sxe, chunk 4", "sxe, chunk 16", "optax", "floor"]
    assert [t["name"] for t in measured[1]["timings"]] == names
    assert all(t["temporary_bytes"] is not None for t in measured[1]["timings"])
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_suite_ends_before_its_budget_and_never_without_a_problem(suite, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert main([*suite, "--json", str(file), "--budget", "1e-3"]) == 0
    assert len(json.loads(file.read_text())["measurements"]) == 1
    assert f"no time left for {SUITE[1].name}" in capsys.readouterr().err


def test_a_problem_that_fails_takes_nothing_from_the_others(suite, tmp_path, monkeypatch, capsys):
    file = tmp_path / "report.json"

    def fails_once(problem, *arguments, **options):
        if problem == SUITE[0]:
            raise MemoryError("too large")
        return measure(problem, *arguments, **options)

    monkeypatch.setattr(measuring, "measure", fails_once)
    assert main([*suite, "--json", str(file)]) == 1
    assert f"failed at {SUITE[0].name}: MemoryError: too large" in capsys.readouterr().err
    measured = json.loads(file.read_text())["measurements"]
    assert [m["problem"]["rows"] for m in measured] == [16, 9]


def test_a_suite_without_a_head(suite, monkeypatch, capsys):
    monkeypatch.setattr(command, "standard_problems", lambda quick, confident: SUITE[:1])
    assert main([*suite, "--chunk-size", "4"]) == 0
    assert "chunk" not in capsys.readouterr().out


def test_the_suite_of_a_gpu_begins_with_the_head(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    arguments = argparse.Namespace(quick=False, confident=0.25, chunk_size=None)
    problems, chunk_sizes = command._suite(arguments)
    assert problems[0] == Problem(16384, 131072, 4096, "bfloat16", confident=0.25)
    assert len(set(problems)) == len(problems) == 11
    assert chunk_sizes == {problems[0]: (1024, 2048, 4096, 8192)}


def test_a_peer_that_fails_in_the_rounds_is_named(monkeypatch):
    seconds = contestants.Contestant.seconds
    calls = []

    def fails_late(self, repeats=1):
        if self.name == "optax":
            calls.append(repeats)
            if len(calls) > 2:  # after finding the number of repeats, and one round
                raise RuntimeError("out of memory")
        return seconds(self, repeats)

    monkeypatch.setattr(contestants.Contestant, "seconds", fails_late)
    found = measure(Problem(8, 11), ("optax",), gradient=True, rounds=3, seconds=60.0)
    timings = {t.name: t for t in found.timings}
    assert timings["optax"].failed == "RuntimeError: out of memory"
    assert len(timings["sxe"].seconds) == len(timings["floor"].seconds) == 3
    assert len(calls) == 3
    assert "RuntimeError: out of memory" in report.problem_table(found)


WORKER = """
import json, sys
assert json.loads(sys.stdin.readline())["peers"] == ["torch"]
print(json.dumps({"contestants": ["torch", "Liger", "CCE"]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("prepare") == "Liger":
        print(json.dumps({"error": "OutOfMemoryError: too large"}), flush=True)
    elif request.get("prepare") == "CCE":
        break
    else:
        print(json.dumps({"compile_seconds": 1.5, "temporary_bytes": 2**20}), flush=True)
"""


def test_a_process_that_ends_is_named_and_stops_nothing(monkeypatch):
    popen = subprocess.Popen

    def other(command, **options):
        return popen([command[0], "-c", WORKER], **options)

    monkeypatch.setattr(contestants.subprocess, "Popen", other)
    found = measure(Problem(8, 11), ("torch",), gradient=True, rounds=2, seconds=60.0)
    failed = {t.name: t.failed for t in found.timings}
    assert failed["sxe"] is failed["floor"] is None
    assert failed["Liger"] == "RuntimeError: OutOfMemoryError: too large"
    for name in ("torch", "CCE"):
        assert "its process ended" in failed[name]


def test_a_process_that_does_not_answer_is_ended(monkeypatch):
    popen = subprocess.Popen

    def other(command, **options):
        return popen([command[0], "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr(contestants.subprocess, "Popen", other)
    monkeypatch.setattr(contestants.TorchProcess, "answer_within", 0.2)
    found = measure(Problem(8, 11), ("torch",), gradient=True, rounds=2, seconds=60.0)
    timings = {t.name: t for t in found.timings}
    assert "did not answer" in timings["torch"].failed
    assert len(timings["sxe"].seconds) == 2


def test_calls(capsys, monkeypatch):
    monkeypatch.setattr(measuring, "CALLS", 2)
    assert main(["bench", "--calls", "--rounds", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert [row.split()[:2] for row in rows] == [
        [how, what] for how in ("eager", "jitted") for what in ("value", "both")
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not a dependency of the tests"
)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_torch_in_its_own_process(problem):
    measured = measure(problem, ("torch",), gradient=True, rounds=2, seconds=60.0)
    found = {t.name: t for t in measured.timings}
    import torch.nn.functional

    names = ["torch"]
    if problem.hidden is not None and hasattr(torch.nn.functional, "linear_cross_entropy"):
        names.append("torch chunked")
    assert set(found) == {"sxe", *names, "floor"}
    for name in names:
        assert found[name].failed is None
        assert found[name].gradient_error is not None
        assert not found[name].wrong


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not a dependency of the tests"
)
def test_what_writes_over_its_logits_is_judged_on_fresh_ones(tmp_path):
    import torch

    from sxe._tools.bench.torch_worker import Contestants

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, labels):
            log_softmax = torch.log_softmax(logits.detach(), 1)
            d = log_softmax.exp() - torch.nn.functional.one_hot(labels, logits.shape[1])
            logits.data.copy_(d / len(labels))
            ctx.save_for_backward(logits.detach())
            return torch.nn.functional.nll_loss(log_softmax, labels)

        @staticmethod
        def backward(ctx, _):
            return ctx.saved_tensors[0], None

    found = Contestants(Problem(7, 11), gradient=True, peers=["torch"])
    found.losses["Liger"] = InPlace.apply
    files = {name: tmp_path / f"{name}.npz" for name in ("torch", "Liger")}
    losses = {}
    for name, file in files.items():
        found.prepare(name)
        assert found.seconds(name, 3) > 0
        losses[name] = found.outcome(name, str(file))
    assert losses["Liger"] == pytest.approx(losses["torch"], rel=1e-6)
    assert losses["torch"] == found.outcome("torch", str(tmp_path / "again.npz"))
    gradients = [np.load(file)["arr_0"] for file in files.values()]
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-6)
