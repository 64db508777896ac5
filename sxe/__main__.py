"""The command line: `python -m sxe check` measures the derivation and the loss, and `python -m sxe
plan` says what the head would do for inputs of some size."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax

from sxe import _check, _options, _plan
from sxe._softmax_cross_entropy import RULES
from sxe.derivation import Line

DTYPES = ("bfloat16", "float16", "float32", "float64")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; argv defaults to the process's arguments.

    Returns:
      The exit status: 0 when everything passed, 1 when something did not.

    Raises:
      SystemExit: with status 2 for arguments that do not fit, with status 0 for --help.
    """
    parser = argparse.ArgumentParser(prog="python -m sxe", description="Softmax cross-entropy.")
    commands = parser.add_subparsers(metavar="command", required=True)
    _add_check(commands.add_parser("check", help="measure the derivation, line by line"))
    _add_plan(commands.add_parser("plan", help="what the head does for inputs of some size"))
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Hold each line of the derivation against autodiff and central differences, the attached "
        "rules against autodiff of the loss, and the loss against 60-digit arithmetic. Exits with "
        "status 1 if any of it fails."
    )
    parser.add_argument("--rows", type=_size, help="N (default: 2 to 7, from the seed)")
    parser.add_argument("--classes", type=_size, help="K (default: 2 to 11, from the seed)")
    parser.add_argument("--seed", type=int, default=0, help="of the random problem (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=tuple(_check.TOLERANCES),
        default="float64",
        help="in which the lines are evaluated (default: float64)",
    )
    parser.set_defaults(run=partial(_run_check, parser))


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What sxe.linear_softmax_cross_entropy does for hidden states [rows, hidden] and a kernel "
        "[hidden, classes] on this machine's default backend: how it gets the gradients, in how "
        "many chunks, with how many FLOPs and how much memory. Nothing is run."
    )
    parser.add_argument("--rows", type=_size, required=True, help="N, on one device")
    parser.add_argument("--hidden", type=_size, required=True, help="D")
    parser.add_argument("--classes", type=_size, required=True, help="K, on one device")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument(
        "--differentiate",
        nargs="*",
        choices=_plan.INPUTS,
        default=_plan.INPUTS,
        help="what gets a gradient (default: both; none of them: the value alone)",
    )
    parser.add_argument("--reduction", choices=_options.REDUCTIONS, default="mean")
    parser.add_argument("--rule", choices=tuple(RULES), default="vjp")
    parser.add_argument("--chunk-size", type=_size, help="rows in a chunk, at most")
    parser.add_argument(
        "--options", nargs="*", choices=_plan.TILE_OPTIONS, default=(), help="options in use"
    )
    parser.set_defaults(run=_run_plan)


def _run_plan(arguments: argparse.Namespace) -> int:
    names = ("rows", "hidden", "classes", "dtype", "differentiate", "reduction", "rule")
    call = {name: getattr(arguments, name) for name in (*names, "chunk_size", "options")}
    p = _plan.plan(**call)

    def size(n: int) -> str:
        return f"{n / 2**20:,.1f} MiB"

    padding = f", {p.padding} of them padding in the last" if p.padding else ""
    for name, text in (
        ("backend", f"{jax.default_backend()}, JAX {jax.__version__}"),
        ("path", p.path),
        ("chunks", f"{p.chunks:,} of {p.chunk_size:,} rows{padding}"),
        ("gradient of the logits", f"multiplied in {p.gradient_dtype}"),
        ("matrix products", f"{p.flops / 1e9:,.1f} GFLOP"),
        ("temporaries, about", size(p.temporary_bytes)),
        ("peak, about", f"{size(p.peak_bytes)}, with arguments and results"),
        ("logits, if they existed", size(p.logits_bytes)),
        ("peak with logits, at least", size(p.logits_peak_bytes)),
    ):
        print(f"{name:28}{text}")
    return 0


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _run_check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        N, K = _check.problem_size(arguments.rows, arguments.classes, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    report = _check.check(N, K, arguments.seed, arguments.dtype)
    print("\n".join(line.rstrip() for line in _text(report)))
    return 1 if report.failures else 0


def _text(report: _check.Report) -> Iterator[str]:
    """The report, in lines of at most 120 characters, ASCII only."""
    yield f"N = {report.rows} rows, K = {report.classes} classes, seed {report.seed}"
    yield "s_k(x_i) = exp(x_ik)/S with S = sum_h exp(x_ih), q_jl = s_l(x_j), [i=j] = 1 if i = j"

    yield ""
    yield f"The lines in {report.dtype}: largest errors against autodiff and central differences"
    form = "{:2}  {:52}  {:15}  {:14}  {:>8}  {:>11}  {}"
    yield form.format("", "formula", "compared with", "assumption", "autodiff", "differences", "")
    for line in report.lines:
        errors = (line.autodiff_error, line.differences_error)
        yield form.format(
            *(line.name, line.formula, line.compared_with, line.assumption),
            *(f"{error:.1e}" if line.shown else "-" for error in errors),
            _result(line) if line.shown else "n/a",  # one row or one class: no such entries
        )
    bounds = _check.TOLERANCES[report.dtype]
    yield form.format("", "", "", "at most", *(f"{bound:.0e}" for bound in bounds[:2]), "")

    for title, comparisons in (
        ("Targets whose rows do not sum to one, in float64", report.row_sums),
        ("The attached rules against autodiff of the loss, for random cotangents", report.rules),
    ):
        yield from ("", title)
        for result in comparisons:
            yield f"{result.name:30} {result.error:8.1e}  {result.expected:29}  {_result(result)}"

    yield from ("", "Rows that float32 rounds away, and their truth from 60 digits")
    form = "{:30} {:>14} {:>14} {:>14}  {:>9}  {:>11}  {}"
    yield form.format("label 0 of", "truth", "sxe", "optax", "sxe error", "optax error", "")
    for row in report.precision:
        numbers = (f"{number:.7e}" for number in (row.truth, row.sxe, row.optax))
        relative = (f"{error:.1e}" for error in (row.sxe_error, row.optax_error))
        yield form.format(row.name, *numbers, *relative, _result(row))
    limits = (f"{bound:.0e} ({quantity})" for quantity, bound in _check.PRECISION.items())
    yield f"sxe error: at most {' and '.join(limits)}; optax is not judged"

    verdict = f"FAIL: {'; '.join(report.failures)}" if report.failures else "pass"
    yield from ("", f"verdict: {verdict}")


def _result(measured: Line | _check.Comparison | _check.Precision) -> str:
    return "pass" if measured.passed else "FAIL"


if __name__ == "__main__":
    sys.exit(main())
