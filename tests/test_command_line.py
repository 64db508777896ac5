"""python -m sxe: its output and exit status."""

import importlib.metadata
import inspect
import os
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sxe
from sxe import derivation
from sxe.__main__ import COMMANDS, main
from sxe._tools.bench import command as bench_command
from sxe._tools.check import against_autodiff, check, precision
from sxe._tools.check.results import TOLERANCES

CHECK = ["check", "--rows", "4", "--classes", "4"]
STEPS = len(derivation.LINES) + len(derivation.ROW_LINES) + 6 * len(TOLERANCES) + 4


@pytest.fixture(autouse=True)
def _rules_are_not_compiled(monkeypatch):
    """Compiling them is most of a check's time, and test_derivation measures them."""
    monkeypatch.setattr(against_autodiff, "_rule_errors", lambda *args, **kwargs: (1e-16, 0.0))


def status_of_exit(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return exit_.value.code


def test_without_arguments_there_is_an_overview(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith("sxe")
    assert "sxe/docs" in text
    assert max(map(len, text.splitlines())) <= 90
    for name, command in COMMANDS.items():
        assert f"\n\n{name:7}{command.SUMMARY}\n       $ {command.EXAMPLES[0][0]}\n" in re.sub(
            r"\n {7}(?!\$)", " ", text
        )


def test_version(capsys, monkeypatch):
    versions = {"sxe": "1.2.3"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert status_of_exit(["--version"]) == 0
    assert capsys.readouterr().out == "sxe 1.2.3\n"
    versions.clear()
    assert status_of_exit(["--version"]) == 0
    assert capsys.readouterr().out == "sxe, run from its source\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_the_command_and_every_option(capsys, name):
    assert status_of_exit([name, "--help"]) == 0
    text = capsys.readouterr().out
    description, options = text.split("\n\n", 1)[1].split("\n\noptions:\n")
    assert description.endswith((".", "'sxe[bench]'"))
    options, _ = options.split("\n\nexamples:\n")
    described = [len(part.split("  ", 1)) == 2 for part in re.split(r"\n  (?=-)", options)]
    assert len(described) > 5
    assert all(described)
    assert all(word in text for word in {"check": ["--seed", "--dtype", "--html"]}.get(name, []))


def examples(name, capsys):
    """The arguments of the examples that a command's help shows."""
    status_of_exit([name, "--help"])
    lines = re.findall(r"^  \$ python -m sxe (.*)$", capsys.readouterr().out, re.M)
    assert len(lines) >= 2
    return [shlex.split(line) for line in lines]


def test_the_examples_of_plan_run(capsys):
    for arguments in examples("plan", capsys):
        assert main(arguments) == 0
        assert "matrix products" in capsys.readouterr().out


def test_the_examples_of_check_run(capsys, monkeypatch, tmp_path):
    report, asked = check.check(4, 4), []
    monkeypatch.setattr(check, "check", lambda *args: asked.append(args[:4]) or report)
    monkeypatch.chdir(tmp_path)
    for arguments in examples("check", capsys):
        assert main(arguments) == 0
    assert asked == [(5, 8, 0, "float64"), (5, 8, 0, "float64"), (3, 5, 1, "float32")]
    assert [file.name for file in tmp_path.iterdir()] == ["check.html"]


def test_the_examples_of_bench_are_valid(capsys, monkeypatch, tmp_path):
    """They take minutes; the measuring is left out."""
    problems = []

    def run(parser, arguments):
        bench_command._check_problem(parser, arguments)
        problems.extend(bench_command._problems(arguments))
        return 0

    monkeypatch.setattr(bench_command, "run", run)
    monkeypatch.chdir(tmp_path)
    for arguments in examples("bench", capsys):
        assert main(arguments) == 0
    assert {problem.sizes for problem in problems} >= {"1024 x 32768", "2048 x 512 x 16384"}


def test_check_prints_every_line_and_passes(capsys):
    assert main([*CHECK, "--seed", "2"]) == 0
    text, progress = capsys.readouterr()
    assert progress == ""  # standard error is not a terminal
    assert text.startswith("N = 4 rows, K = 4 classes, seed 2\n")
    assert text.endswith("verdict: pass\n")
    for line in (*derivation.LINES, *derivation.ROW_LINES):
        (row,) = (row for row in text.splitlines() if row.startswith(f"{line.name}  "))
        for part in (line.formula, line.compared_with, line.assumption, "pass"):
            assert part in row
        assert len(re.findall(r"\b\d\.\de[-+]\d\d\b", row)) == 2
    assert "D8 where sum_k y_jk != 1" in text
    assert "vjp, dense targets, bfloat16" in text
    assert "jvp, Jensen-Shannon, float64" in text
    assert "2048 times 1e7: loss" in text
    assert len(re.findall(r"^[\d.]+ to [\d.]+ .* pass$", text, re.MULTILINE)) == 5
    assert "FAIL" not in text
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120
    assert not any(row.endswith(" ") for row in text.splitlines())


def test_check_shows_its_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(CHECK) == 0
    text, progress = capsys.readouterr()
    assert "Measuring" not in text
    for step in ("D4", "K5", "the rules for Jensen-Shannon in bfloat16"):
        assert f"Measuring {step} " in progress
    assert f" {STEPS - 1}/{STEPS}" in progress  # the last step has started
    assert progress.endswith("\r")


def test_check_shows_its_progress_without_tqdm(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(CHECK) == 0
    _, *steps, cleared, end = capsys.readouterr().err.split("\r")
    assert [step.split()[0] for step in steps] == [f"[{n}/{STEPS}]" for n in range(1, STEPS + 1)]
    assert steps[4].rstrip() == f"[5/{STEPS}] Measuring D4 ..."
    assert {len(step) for step in (*steps, cleared)} == {78}
    assert cleared.strip() == end == ""


def test_check_says_where_there_is_nothing_to_compare(capsys, monkeypatch):
    report = check.check(4, 4)
    lines = tuple(line._replace(shown=line.name not in ("D1", "D3")) for line in report.lines)
    monkeypatch.setattr(check, "check", lambda *args: report._replace(lines=lines))
    assert main(["check", "--rows", "1", "--classes", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row[:2] for row in rows if row.endswith("n/a")] == ["D1", "D3"]


def test_check_is_repeatable(capsys):
    texts = []
    for seed in ("5", "5", "6"):
        main([*CHECK, "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_check_in_a_dtype(capsys, dtype):
    assert main([*CHECK, "--dtype", dtype]) == 0
    text = capsys.readouterr().out
    assert f"The lines in {dtype}:" in text
    bounds = [f"{bound:.0e}" for bound in TOLERANCES[dtype][:2]]
    assert ["at", "most", *bounds] in [row.split() for row in text.splitlines()]


def test_check_exits_with_1_when_a_line_is_broken(capsys, monkeypatch):
    broken = derivation.LINES[6]._replace(closed_form=lambda x, y: -derivation.d6(x, y))
    lines = (*derivation.LINES[:6], broken, *derivation.LINES[7:])
    monkeypatch.setattr(derivation, "LINES", lines)
    assert main(CHECK) == 1
    rows = capsys.readouterr().out.splitlines()
    assert [row[:2] for row in rows if row.endswith("FAIL")] == ["D6"]
    assert rows[-1] == "verdict: FAIL: D6"


def test_check_exits_with_1_when_a_divergence_rounds_away(capsys, monkeypatch):
    def textbook(logits, target_logits, **options):
        return precision._textbook_kl(logits, target_logits)

    monkeypatch.setattr(precision, "kl_divergence", textbook)
    assert main(CHECK) == 1
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[0] for row in rows if row.endswith("FAIL")] == [
        "1 to 0.1",
        "0.1 to 0.01",
        "0.01 to 0.001",
        "0.001 to 0.0001",
    ]
    assert rows[-1] == "verdict: FAIL: distance 10 to 0.0001: KL divergence"


def test_check_writes_a_page_and_says_where(capsys, tmp_path):
    assert main(CHECK) == 0
    text = capsys.readouterr().out
    file = tmp_path / "a page.html"
    assert main([*CHECK, "--html", str(file)]) == 0
    assert capsys.readouterr().out == f"{text}page: {file.as_uri()}\n"
    assert file.read_text("utf-8").startswith("<!doctype html>")
    assert main([*CHECK, "--seed", "3", "--html", str(file)]) == 0
    assert "drawn from seed 3" in file.read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/page.html", "No such file or directory"),
        ("", "Is a directory"),
        ("file/page.html", "Not a directory"),
    ],
)
def test_a_page_that_cannot_be_written_is_an_error(capsys, monkeypatch, tmp_path, name, reason):
    (tmp_path / "file").touch()
    monkeypatch.delattr(check, "check")  # nothing is measured
    file = tmp_path / name
    with pytest.raises(SystemExit) as exit_:
        main([*CHECK, "--html", str(file)])
    assert exit_.value.code == 2
    message = f"--html: expected a file that can be written, got {file}: {reason}"
    assert message in capsys.readouterr().err


def test_a_page_that_can_no_longer_be_written_is_an_error(capsys, monkeypatch, tmp_path):
    file, right = tmp_path / "page.html", check.check

    def check_and_take_the_file_away(*arguments):
        file.unlink()
        file.mkdir()
        return right(*arguments)

    monkeypatch.setattr(check, "check", check_and_take_the_file_away)
    with pytest.raises(SystemExit) as exit_:
        main([*CHECK, "--html", str(file)])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out.endswith("verdict: pass\n")
    assert f"got {file}: Is a directory" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["check", "--rows", "0"], "--rows: expected an integer of at least 1, got '0'"),
        (["check", "--classes", "-3"], "--classes: expected an integer of at least 1, got '-3'"),
        (["check", "--rows", "two"], "--rows: expected an integer of at least 1, got 'two'"),
        (["check", "--rows", "99", "--classes", "99"], "at most 2048, got 99 * 99 = 9801"),
        (["check", "--seed", "x"], "--seed: invalid int value: 'x'"),
        (["check", "--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
    ],
)
def test_arguments_that_do_not_fit(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def from_the_shell(*arguments):
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sxe", *arguments],
        cwd=Path(sxe.__file__).parents[1],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.stderr == ""
    return process.returncode, process.stdout


def test_plan_from_the_shell():
    status, text = from_the_shell("plan", "--rows", "8", "--hidden", "4", "--classes", "16")
    assert status == 0
    assert text.startswith("backend ")


@pytest.mark.slow  # compiles everything with XLA's optimizations
def test_check_from_the_shell():
    status, text = from_the_shell("check", "--rows", "2", "--classes", "3")
    assert status == 0
    assert text.startswith("N = 2 rows, K = 3 classes, seed 0\n")
    assert text.endswith("verdict: pass\n")


def test_pydoc_is_a_reference_of_all_that_is_public():
    text = pydoc.plain(pydoc.render_doc(sxe))
    for name in sxe.__all__:
        value = getattr(sxe, name)
        if callable(value):
            assert f"{name}(" in text
            assert inspect.getdoc(value).splitlines()[-1].strip() in text
    assert "derivation" in text
