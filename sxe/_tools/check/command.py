"""The command line of ``python -m sxe check``, and its report as text."""

import argparse
import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sxe._tools.arguments import size
from sxe._tools.check import check
from sxe._tools.check.page import page
from sxe._tools.check.problem import problem_size
from sxe._tools.check.results import (
    PRECISION,
    TOLERANCES,
    Comparison,
    MeasuredLine,
    Precision,
    Report,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Hold each line of the derivation against autodiff and central differences, the attached "
        "rules against autodiff of the loss, and the loss against 60-digit arithmetic. Exits with "
        "status 1 if any of it fails."
    )
    parser.add_argument("--rows", type=size, help="N (default: 2 to 7, from the seed)")
    parser.add_argument("--classes", type=size, help="K (default: 2 to 11, from the seed)")
    parser.add_argument("--seed", type=int, default=0, help="of the random problem (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=tuple(TOLERANCES),
        default="float64",
        help="in which the lines are evaluated (default: float64)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it there as a page too")
    parser.set_defaults(run=partial(run, parser))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        N, K = problem_size(arguments.rows, arguments.classes, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    if arguments.html is not None:
        with _writing(parser, arguments.html):
            arguments.html.open("a").close()  # before the measuring, and what is there stays
    report = check.check(N, K, arguments.seed, arguments.dtype)
    print("\n".join(line.rstrip() for line in _text(report)))
    if arguments.html is not None:
        text = page(report)
        with _writing(parser, arguments.html):
            arguments.html.write_text(text, encoding="utf-8")
        print(f"page: {arguments.html.absolute().as_uri()}")
    return 1 if report.failures else 0


@contextlib.contextmanager
def _writing(parser: argparse.ArgumentParser, file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        parser.error(f"--html: expected a file that can be written, got {file}: {error.strerror}")


def _text(report: Report) -> Iterator[str]:
    """The report, in lines of at most 120 characters, ASCII only."""
    yield f"N = {report.rows} rows, K = {report.classes} classes, seed {report.seed}"
    yield "s_k(x_i) = exp(x_ik)/S with S = sum_h exp(x_ih), q_jl = s_l(x_j), [i=j] = 1 if i = j"
    yield ""
    yield from _derivation(report)
    yield from ("", "Targets whose rows do not sum to one, in float64")
    yield from map(_comparison, report.row_sums)
    yield from ("", "The attached rules against autodiff of the loss, for random cotangents")
    yield from map(_comparison, report.rules)
    yield ""
    yield from _precision(report)
    verdict = f"FAIL: {'; '.join(report.failures)}" if report.failures else "pass"
    yield from ("", f"verdict: {verdict}")


def _derivation(report: Report) -> Iterator[str]:
    yield f"The lines in {report.dtype}: largest errors against autodiff and central differences"
    form = "{:2}  {:52}  {:15}  {:14}  {:>8}  {:>11}  {}"
    yield form.format("", "formula", "compared with", "assumption", "autodiff", "differences", "")
    for measured in report.lines:
        line, errors = measured.line, (measured.autodiff_error, measured.differences_error)
        yield form.format(
            *(line.name, line.formula, line.compared_with, line.assumption),
            *(f"{error:.1e}" if measured.shown else "-" for error in errors),
            _word(measured) if measured.shown else "n/a",
        )
    bounds = TOLERANCES[report.dtype]
    yield form.format("", "", "", "at most", *(f"{bound:.0e}" for bound in bounds[:2]), "")


def _comparison(result: Comparison) -> str:
    return f"{result.name:30} {result.error:8.1e}  {result.expected:29}  {_word(result)}"


def _precision(report: Report) -> Iterator[str]:
    yield "Rows that float32 rounds away, and their truth from 60 digits"
    form = "{:40} {:>14} {:>14} {:>14}  {:>9}  {:>11}  {}"
    yield form.format("label 0 of", "truth", "sxe", "optax", "sxe error", "optax error", "")
    for row in report.precision:
        numbers = (f"{number:.7e}" for number in (row.truth, row.sxe, row.optax))
        errors = (f"{error:.1e}" for error in (row.sxe_error, row.optax_error))
        yield form.format(row.name, *numbers, *errors, _word(row))
    limits = (f"{bound:.0e} ({quantity})" for quantity, bound in PRECISION.items())
    yield f"sxe error: at most {' and '.join(limits)}; optax is not judged"
    yield "An error is relative to the loss, or to the sum of the gradient's terms:"
    yield "s (T - t) + t (1 - s)"


def _word(result: MeasuredLine | Comparison | Precision) -> str:
    return "pass" if result.passed else "FAIL"
