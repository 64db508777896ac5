"""python -m sxe bench: right about what is right, and silent about nothing."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import sxe
from sxe.__main__ import main
from sxe._tools.bench import contestants, report
from sxe._tools.bench.measure import Measurement, Timing, measure
from sxe._tools.bench.problem import Problem, errors, standard_problems, truth

PROBLEMS = [
    Problem(7, 11),
    Problem(70, 13, dense=True, confident=0.5),
    Problem(67, 19, hidden=5),
    Problem(9, 11, hidden=5, dtype="bfloat16", confident=0.3),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_truth_is_that_of_the_oracle(problem):
    *inputs, labels = problem.data()
    inputs = [np.asarray(jnp.asarray(x, problem.dtype)) for x in inputs]
    true = truth(problem, *inputs, labels)
    rows, classes = problem.samples(labels)
    if problem.hidden is None:
        value, gradients = oracle.loss(*inputs, labels), [oracle.gradient(*inputs, labels)]
    else:
        value = oracle.head_loss(*inputs, labels)
        found = oracle.head_gradients(*inputs, labels)
        gradients = [found["hidden"], found["kernel"]]
    assert true.loss == pytest.approx(float(value), rel=1e-12)
    at = (rows, (slice(None), classes))
    for actual, expected, i in zip(true.gradients, gradients, at, strict=False):
        np.testing.assert_allclose(actual, expected[i], rtol=1e-9, atol=1e-12)
    assert len(true.gradients) == len(gradients)


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


def test_errors_are_relative():
    true = truth(PROBLEMS[0], *PROBLEMS[0].data())
    worse = true._replace(loss=true.loss * 1.01, gradients=(true.gradients[0] * 1.02,))
    assert errors(worse, true) == pytest.approx((0.01, 0.02))
    assert errors(true, true) == (0, 0)


@pytest.fixture
def peers(monkeypatch):
    """One that is wrong by a thousandth, and one that fails, in the place of tokamax."""
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
    """In a call of a millisecond, of which the floor is three quarters."""
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
    """Also on a GPU, where JAX's default is TF32, and sxe's is not."""
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


def test_calls(capsys):
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
    names = ["torch"] if problem.hidden is None else ["torch", "torch chunked"]
    for name in names:
        assert found[name].failed is None
        assert found[name].gradient_error is not None
        assert not found[name].wrong
