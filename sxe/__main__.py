"""The command line.

python -m sxe check    the derivation, line by line, and the precision of the loss
python -m sxe plan     what the head would do for inputs of some size
python -m sxe bench    speed and memory, beside the peers that are installed
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax

from sxe import _check, _page, _plan
from sxe._backend import PLATFORMS
from sxe._call.options import REDUCTIONS
from sxe._errors import ArgumentError
from sxe._rows.rules import RULES

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
    _add_bench(commands.add_parser("bench", help="measure speed and memory beside others"))
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
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it there as a page too")
    parser.set_defaults(run=partial(_run_check, parser))


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What sxe.linear_softmax_cross_entropy does for hidden states [rows, hidden] and a kernel "
        "[hidden, classes]: how it gets the gradients, in how many chunks, with how many FLOPs and "
        "how much memory; and on a mesh what its devices exchange. Nothing is run."
    )
    parser.add_argument("--rows", type=_size, required=True, help="N, of all devices")
    parser.add_argument("--hidden", type=_size, required=True, help="D")
    parser.add_argument("--classes", type=_size, required=True, help="K, of all devices")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument(
        "--differentiate",
        nargs="*",
        choices=_plan.INPUTS,
        default=_plan.INPUTS,
        help="what gets a gradient (default: both; none of them: the value alone)",
    )
    parser.add_argument("--reduction", choices=REDUCTIONS, default="mean")
    parser.add_argument("--rule", choices=tuple(RULES), default="vjp")
    parser.add_argument("--chunk-size", type=_size, help="rows in a chunk, at most")
    parser.add_argument(
        "--options", nargs="*", choices=_plan.TILE_OPTIONS, default=(), help="options in use"
    )
    parser.add_argument("--backend", choices=PLATFORMS, help="where it will run (default: as here)")
    mesh = parser.add_argument_group("mesh")
    mesh.add_argument("--mesh", type=_mesh, help="devices along each axis, as data=64,model=8")
    mesh.add_argument(
        "--batch-axis-name", type=_names, help="axes that split the rows (default: data)"
    )
    mesh.add_argument("--axis-name", type=_names, help="and the classes (default: model)")
    mesh.add_argument("--fsdp", type=_names, help="and the rows of the kernel (default: none)")
    mesh.add_argument(
        "--memory",
        type=_positive,
        metavar="BYTES",
        help="of a device: as few devices for the classes as the head needs to fit",
    )
    floor = parser.add_argument_group("time floor, for a device with all of")
    floor.add_argument("--flops-per-second", type=_positive, help="of its matrix products")
    floor.add_argument("--bytes-per-second", type=_positive, help="of its memory")
    floor.add_argument("--link-bytes-per-second", type=_positive, help="that it can send to others")
    parser.set_defaults(run=partial(_run_plan, parser))


def _run_plan(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    names = "rows hidden classes dtype differentiate reduction rule chunk_size options backend mesh"
    call = {name: getattr(arguments, name) for name in (*names.split(), "fsdp")}
    for name, default in (("batch_axis_name", "data"), ("axis_name", "model")):
        given = getattr(arguments, name)
        call[name] = default if given is None and default in (arguments.mesh or {}) else given
    kinds_of_rates = ("flops", "bytes", "link_bytes")
    rates = tuple(getattr(arguments, f"{kind}_per_second") for kind in kinds_of_rates)
    if any(rates) and not all(rates):
        missing = kinds_of_rates[rates.index(None)].replace("_", "-")
        parser.error(
            f"--{missing}-per-second: expected as well; a time floor needs all three rates"
        )
    try:
        p = _plan.plan(**call, memory_bytes=arguments.memory)
    except ArgumentError as error:
        option = {"memory_bytes": "memory"}.get(error.argument, error.argument)
        parser.error(f"--{option.replace('_', '-')}: {error.message}")

    def size(n: float) -> str:
        return f"{n / 2**20:,.1f} MiB" if n >= 2**17 else f"{n:,} bytes"

    padding = f", {p.padding} of them padding in the last" if p.padding else ""
    backend = arguments.backend or f"{jax.default_backend()}, JAX {jax.__version__}"
    lines = [("backend", backend)]
    if p.mesh:
        mesh = ", ".join(f"{name}={n}" for name, n in p.mesh.items())
        lines.append(("mesh", f"{mesh}: {math.prod(p.mesh.values()):,} devices, for each of them:"))
    lines += [
        ("path", p.path),
        ("chunks", f"{p.chunks:,} of {p.chunk_size:,} rows{padding}"),
        ("gradient of the logits", f"multiplied in {p.gradient_dtype}"),
        ("matrix products", f"{p.flops / 1e9:,.1f} GFLOP"),
        ("temporaries, about", size(p.temporary_bytes)),
        ("peak, about", f"{size(p.peak_bytes)}, with arguments and results"),
        ("logits, if they existed", size(p.logits_bytes)),
        ("peak with logits, at least", size(p.logits_peak_bytes)),
    ]
    kinds = {c.kind: sum(o.bytes for o in p.collectives if o.kind == c.kind) for c in p.collectives}
    for kind, total in kinds.items():
        lines.append((kind, size(total)))
        lines += [
            (f"  {c.of}", f"{size(c.bytes)} among {c.devices}")
            for c in p.collectives
            if c.kind == kind
        ]
    if all(rates):
        floor = p.floor(*rates)
        lines.append(("time, at least", f"{1e3 * max(floor):,.2f} ms, the largest of these:"))
        lines += [(f"  {name}", f"{1e3 * t:,.2f} ms") for name, t in floor._asdict().items()]
    for name, text in lines:
        print(f"{name:30}{text}")
    return 0


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time sxe, optax, what else is installed of tokamax, jax-cce and PyTorch, and the floor "
        "(for logits, to write x + 1, or for the value to read x; for the head, its matmuls), in "
        "interleaved rounds, and hold every result against float64. A ratio is that of the "
        "medians, with the quartiles of the rounds' own; ! marks a peer whose result is wrong. "
        "Several sizes are a sweep. Needs the extra sxe[bench]."
    )
    parser.add_argument("--rows", type=_size, nargs="+", help="N (default: the standard problems)")
    parser.add_argument("--classes", type=_size, nargs="+", help="K")
    parser.add_argument("--hidden", type=_size, nargs="+", help="D: the head; without it, logits")
    parser.add_argument("--dtype", choices=DTYPES[:3], nargs="+", help="default: float32")
    parser.add_argument("--dense", action="store_true", help="targets [N, K] instead of labels")
    parser.add_argument(
        "--confident",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the rows, in which the label leads by 20, as in a trained model (default: 0)",
    )
    parser.add_argument("--only", choices=("value", "both"), help="the value, or with the gradient")
    parser.add_argument("--peers", nargs="*", help="among those installed (default: all of them)")
    parser.add_argument("--calls", action="store_true", help="what a call costs, on 8 x 10 logits")
    parser.add_argument("--quick", action="store_true", help="small problems and few rounds")
    parser.add_argument("--rounds", type=_size, default=15, help="at most (default: 15)")
    parser.add_argument(
        "--seconds", type=_positive, default=60, help="for one problem, roughly (default: 60)"
    )
    parser.add_argument(
        "--json", type=_file, metavar="FILE", help="write all that was measured there"
    )
    parser.add_argument(
        "--plot", type=_file, metavar="FILE", help="draw a sweep over one of the sizes there"
    )
    parser.set_defaults(run=partial(_run_bench, parser))


def _run_bench(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        if arguments.plot:
            from matplotlib.figure import Figure
        from tqdm import tqdm

        from sxe._bench import contestants, measure, report
        from sxe._bench.problem import Problem, standard_problems
    except ImportError as error:
        parser.error(f"needs {error.name}: pip install 'sxe[bench]'")
    sizes = (arguments.rows, arguments.classes, arguments.hidden)
    if any(sizes) and not arguments.rows:
        parser.error("--rows: expected with --classes or --hidden")
    if any(sizes) and not arguments.classes:
        parser.error("--classes: expected with --rows or --hidden")
    for option in ("dtype", "dense", "confident"):
        if getattr(arguments, option) and not any(sizes):
            parser.error(f"--{option}: expected with --rows and --classes")
    if arguments.dense and arguments.hidden:
        parser.error("--dense: expected logits, without --hidden")
    if not 0 <= arguments.confident <= 1:
        parser.error(f"--confident: expected a share in [0, 1], got {arguments.confident}")
    found = contestants.installed()
    peers = tuple(found if arguments.peers is None else arguments.peers)
    if missing := [name for name in peers if name not in found]:
        parser.error(f"--peers: not installed: {', '.join(missing)}; found {', '.join(found)}")
    problems = [] if arguments.calls else standard_problems(arguments.quick)
    if any(sizes):
        problems = [
            Problem(n, k, d, dtype, arguments.dense, arguments.confident)
            for d in arguments.hidden or (None,)
            for k in arguments.classes
            for n in arguments.rows
            for dtype in arguments.dtype or ("float32",)
        ]
    if arguments.plot:
        try:
            report.varied(problems)
        except ValueError as error:
            parser.error(str(error))
        formats = Figure().canvas.get_supported_filetypes()
        if arguments.plot.suffix[1:].lower() not in formats:
            parser.error(
                f"--plot: expected a file name in .png, .pdf or .svg, got {arguments.plot}"
            )
    kinds = {"value": (False,), "both": (True,), None: (False, True)}[arguments.only]
    rounds = min(5, arguments.rounds) if arguments.quick else arguments.rounds

    machine = measure.machine()
    print(report.heading(machine), flush=True)
    calls = list(measure.calls(rounds)) if arguments.calls else []
    measurements = []
    # No bar where standard error is no terminal.
    with tqdm(total=len(problems) * len(kinds) * rounds, disable=None, leave=False) as bar:
        for problem in problems:
            bar.set_description(problem.name)
            for gradient in kinds:
                call = (problem, gradient, peers, rounds, arguments.seconds, bar.update)
                measurements.append(measure.measure(*call))
                bar.update(len(measurements) * rounds - bar.n)
    if measurements:
        print(report.table(measurements), *report.remarks(measurements), sep="\n")
    if calls:
        print(report.calls_table(calls))
    if arguments.json:
        arguments.json.write_text(report.to_json(machine, measurements, calls))
    if arguments.plot:
        report.plot(measurements, str(arguments.plot))
    return 1 if any(t.wrong and t.name == "sxe" for m in measurements for t in m.timings) else 0


def _mesh(text: str) -> dict[str, int]:
    parts = [part.partition("=") for part in text.split(",")]
    sizes = {name: int(size) for name, _, size in parts if name and size.isdecimal()}
    if len(sizes) != len(parts):
        raise argparse.ArgumentTypeError(f"expected data=64,model=8 or the like, got {text!r}")
    return sizes


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def _file(text: str) -> Path:
    """A file that is written when all is measured: here is time to say that it cannot be."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"expected a file in a directory that exists, got {text!r}"
        )
    return Path(text)


def _run_check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        N, K = _check.problem_size(arguments.rows, arguments.classes, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    if arguments.html is not None:
        with _writing(parser, arguments.html):
            arguments.html.open("a").close()  # before the measuring, and what is there stays
    report = _check.check(N, K, arguments.seed, arguments.dtype)
    print("\n".join(line.rstrip() for line in _text(report)))
    if arguments.html is not None:
        page = _page.page(report)
        with _writing(parser, arguments.html):
            arguments.html.write_text(page, encoding="utf-8")
        print(f"page: {arguments.html.absolute().as_uri()}")
    return 1 if report.failures else 0


@contextlib.contextmanager
def _writing(parser: argparse.ArgumentParser, file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        parser.error(f"--html: expected a file that can be written, got {file}: {error.strerror}")


def _text(report: _check.Report) -> Iterator[str]:
    """The report, in lines of at most 120 characters, ASCII only."""
    yield f"N = {report.rows} rows, K = {report.classes} classes, seed {report.seed}"
    yield "s_k(x_i) = exp(x_ik)/S with S = sum_h exp(x_ih), q_jl = s_l(x_j), [i=j] = 1 if i = j"

    yield ""
    yield f"The lines in {report.dtype}: largest errors against autodiff and central differences"
    form = "{:2}  {:52}  {:15}  {:14}  {:>8}  {:>11}  {}"
    yield form.format("", "formula", "compared with", "assumption", "autodiff", "differences", "")
    for measured in report.lines:
        line, errors = measured.line, (measured.autodiff_error, measured.differences_error)
        yield form.format(
            *(line.name, line.formula, line.compared_with, line.assumption),
            *(f"{error:.1e}" if measured.shown else "-" for error in errors),
            _result(measured) if measured.shown else "n/a",
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
    form = "{:40} {:>14} {:>14} {:>14}  {:>9}  {:>11}  {}"
    yield form.format("label 0 of", "truth", "sxe", "optax", "sxe error", "optax error", "")
    for row in report.precision:
        numbers = (f"{number:.7e}" for number in (row.truth, row.sxe, row.optax))
        relative = (f"{error:.1e}" for error in (row.sxe_error, row.optax_error))
        yield form.format(row.name, *numbers, *relative, _result(row))
    limits = (f"{bound:.0e} ({quantity})" for quantity, bound in _check.PRECISION.items())
    yield f"sxe error: at most {' and '.join(limits)}; optax is not judged"
    yield "An error is relative to the loss, or to the sum of the gradient's terms:"
    yield "s (T - t) + t (1 - s)"

    verdict = f"FAIL: {'; '.join(report.failures)}" if report.failures else "pass"
    yield from ("", f"verdict: {verdict}")


def _result(measured: _check.MeasuredLine | _check.Comparison | _check.Precision) -> str:
    return "pass" if measured.passed else "FAIL"


if __name__ == "__main__":
    sys.exit(main())
