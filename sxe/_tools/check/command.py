"""The command line of ``python -m sxe check``, and the report as text."""

import argparse
import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sxe._tools.arguments import PROGRAM, size
from sxe._tools.check import check
from sxe._tools.check.page import page
from sxe._tools.check.precision import CLASSES, PER_DECADE
from sxe._tools.check.problem import problem_size
from sxe._tools.check.results import (
    PRECISION,
    TOLERANCES,
    Comparison,
    MeasuredLine,
    Precision,
    Report,
    Sweep,
)
from sxe._tools.progress import progress

SUMMARY = (
    "Check the derivation and the gradient rules against autodiff, and the losses against "
    "60-digit arithmetic."
)
EXAMPLES = (
    (f"{PROGRAM} check", "Run all checks on a small random problem."),
    (
        f"{PROGRAM} check --html check.html",
        "Also write the report as a web page, with formulas and plots.",
    ),
    (
        f"{PROGRAM} check --rows 3 --classes 5 --seed 1 --dtype float32",
        "Choose the problem, and evaluate the derivation in float32.",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare each line of the derivation with autodiff and central differences, the gradient\n"
        "rules with autodiff, and the loss and the KL divergence with 60-digit arithmetic. All\n"
        "errors are printed with their limits. The exit status is 1 if any check fails.\n"
        "This takes about 20 seconds, mostly to compile."
    )
    parser.add_argument(
        "--rows", type=size, metavar="N", help="number of rows (default: 2 to 7, from the seed)"
    )
    parser.add_argument(
        "--classes",
        type=size,
        metavar="K",
        help="number of classes (default: 2 to 11, from the seed)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="INT",
        help="seed of the random problem (default: 0)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(TOLERANCES),
        default="float64",
        help="dtype in which the derivation is evaluated (default: float64)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write the report to this file, as a web page",
    )
    parser.set_defaults(run=partial(run, parser))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        N, K = problem_size(arguments.rows, arguments.classes, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    if arguments.html is not None:
        with _writing(parser, arguments.html):
            arguments.html.open("a").close()  # fail now if it cannot be written; keep its content
    report = check.check(N, K, arguments.seed, arguments.dtype, progress)
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
    """The report as ASCII text, in lines of at most 120 characters."""
    yield f"N = {report.rows} rows, K = {report.classes} classes, seed {report.seed}"
    yield "s_k(x_i) = exp(x_ik)/S with S = sum_h exp(x_ih), q_jl = s_l(x_j), [i=j] = 1 if i = j"
    yield ""
    yield from _lines("The lines", report.lines, report.dtype)
    yield from ("", "Targets whose rows do not sum to one, in float64")
    yield from map(_comparison, report.row_sums)
    yield ""
    yield f"For one row: q_k = s_k(x), p_k = s_k(z) for target logits z, beta = {report.beta},"
    yield "u_k = log q_k - log p_k, phi(u) = exp(u) - 1 - u and M = beta p + (1 - beta) q"
    yield ""
    yield from _lines("Entropy and divergences", report.row_lines, report.dtype)
    yield from (
        "",
        "The gradient rules compared with autodiff of the same functions, for random cotangents",
    )
    yield from map(_comparison, report.rules)
    yield ""
    yield from _precision(report)
    yield ""
    yield from _distances(report.distances)
    verdict = f"FAIL: {'; '.join(report.failures)}" if report.failures else "pass"
    yield from ("", f"verdict: {verdict}")


def _lines(title: str, lines: tuple[MeasuredLine, ...], dtype: str) -> Iterator[str]:
    yield f"{title} in {dtype}: largest errors against autodiff and against central differences"
    form = "{:2}  {:52}  {:16}  {:14}  {:>8}  {:>11}  {}"
    yield form.format("", "formula", "compared with", "assumption", "autodiff", "differences", "")
    for measured in lines:
        line, errors = measured.line, (measured.autodiff_error, measured.differences_error)
        yield form.format(
            *(line.name, line.formula, line.compared_with, line.assumption),
            *(f"{error:.1e}" if measured.shown else "-" for error in errors),
            _word(measured) if measured.shown else "n/a",
        )
    bounds = TOLERANCES[dtype]
    yield form.format("", "", "", "at most", *(f"{bound:.0e}" for bound in bounds[:2]), "")


def _comparison(result: Comparison) -> str:
    return f"{result.name:36} {result.error:8.1e}  {result.expected:29}  {_word(result)}"


def _precision(report: Report) -> Iterator[str]:
    yield "Rows that common formulas lose to rounding in float32. The truth has 60 digits."
    form = "{:40} {:>14} {:>14} {:>14}  {:>9}  {:>11}  {}"
    yield form.format("logits (label 0)", "truth", "sxe", "optax", "sxe error", "optax error", "")
    for row in report.precision:
        numbers = (f"{number:.7e}" for number in (row.truth, row.sxe, row.optax))
        errors = (f"{error:.1e}" for error in (row.sxe_error, row.optax_error))
        yield form.format(row.name, *numbers, *errors, _word(row))
    limits = (f"{bound:.0e} ({quantity})" for quantity, bound in PRECISION.items())
    yield f"An error of sxe passes up to {' and '.join(limits)}; optax is not judged."
    yield "Errors are relative to the loss, or to the sum of the gradient's terms,"
    yield "s (T - t) + t (1 - s)."


def _distances(sweep: Sweep) -> Iterator[str]:
    yield f"KL divergence in float32 of the logits {sweep.row}, for {CLASSES} classes:"
    yield "the largest relative error, compared with 60-digit arithmetic"
    form = "{:16}  {:>9}  {:>13}  {}"
    yield form.format("distance a", *sweep.errors, "")
    for n in range(0, len(sweep.at) - 1, PER_DECADE):
        decade = slice(n, n + PER_DECADE + 1)
        judged = zip(sweep.errors["sxe"][decade], sweep.limits[decade], strict=True)
        yield form.format(
            f"{sweep.at[n]:g} to {sweep.at[n + PER_DECADE]:g}",
            *(f"{max(errors[decade]):.1e}" for errors in sweep.errors.values()),
            "pass" if all(error <= limit for error, limit in judged) else "FAIL",
        )
    limits = f"{sweep.limits[0]:.0e}, and up to {sweep.limits[-1]:.0e} for a below 0.001"
    yield f"An error of sxe passes up to {limits}."
    yield "The textbook form, sum_k p_k (log p_k - log q_k), is not judged."


def _word(result: MeasuredLine | Comparison | Precision) -> str:
    return "pass" if result.passed else "FAIL"
