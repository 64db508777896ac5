"""python -m sxe: what it prints, and the exit status."""

import inspect
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sxe
from sxe import derivation
from sxe.__main__ import main
from sxe._tools.check import check, precision
from sxe._tools.check.results import TOLERANCES

CHECK = ["check", "--rows", "4", "--classes", "4"]


def test_check_prints_every_line_and_passes(capsys):
    assert main([*CHECK, "--seed", "2"]) == 0
    text = capsys.readouterr().out
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


def test_check_is_ascii_and_fits_the_terminal(capsys):
    main(CHECK)
    text = capsys.readouterr().out
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120
    assert not any(row.endswith(" ") for row in text.splitlines())


def test_check_says_where_there_is_nothing_to_compare(capsys):
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
        ([], "arguments are required: command"),
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


def test_help_names_the_command_and_its_options(capsys):
    for arguments, expected in (
        (["--help"], ["check"]),
        (["check", "--help"], ["--seed", "--dtype", "--html"]),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in expected)


def test_from_the_shell():
    command = [sys.executable, "-W", "error", "-m", "sxe", "check", "--rows", "2", "--classes", "3"]
    process = subprocess.run(
        command,
        cwd=Path(sxe.__file__).parents[1],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("N = 2 rows, K = 3 classes, seed 0\n")
    assert process.stdout.endswith("verdict: pass\n")


def test_pydoc_is_a_reference_of_all_that_is_public():
    text = pydoc.plain(pydoc.render_doc(sxe))
    for name in sxe.__all__:
        value = getattr(sxe, name)
        if callable(value):
            assert f"{name}(" in text
            assert inspect.getdoc(value).splitlines()[-1].strip() in text
    assert "derivation" in text
