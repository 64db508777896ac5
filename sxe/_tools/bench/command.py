"""The command line of ``python -m sxe bench``. The extra ``sxe[bench]`` is needed to run it."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from sxe._tools.arguments import PROGRAM, output_file, positive, size
from sxe._tools.bench import contestants, measure
from sxe._tools.bench.problem import CONFIDENT, Problem, gpu_problems, standard_problems

SUITE_ROUNDS = 5
SUITE_CHUNKS = (1024, 2048, 4096, 8192)  # chunk sizes for the first head of a GPU's suite
SUMMARY = "Measure speed and memory, compared with optax and other libraries."
EXAMPLES = (
    (f"{PROGRAM} bench --quick", "Small problems and few rounds."),
    (
        f"{PROGRAM} bench --rows 1024 --classes 32768 --dtype float32 bfloat16",
        "The loss of given logits, in two dtypes.",
    ),
    (
        f"{PROGRAM} bench --rows 2048 --hidden 512 --classes 8192 16384 32768 --only both "
        "--plot classes.png",
        "Value and gradient of the head, for three numbers of classes, as a plot.",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time sxe, optax and other installed libraries in interleaved rounds, and compare every\n"
        "result with float64. The other libraries are tokamax, jax-cce and PyTorch, and on CUDA\n"
        "liger-kernel and cut-cross-entropy. The floor is a lower bound of the time. For logits\n"
        "it writes x + 1, or reads x if only the value is measured. For the head it is the matrix\n"
        "products alone. A ratio is that of the medians, followed by the quartiles of the ratios\n"
        "of the rounds. ! marks a library whose result is wrong. Several sizes make a sweep.\n"
        "Without sizes, the standard problems are measured. Needs: pip install 'sxe[bench]'"
    )
    parser.add_argument(
        "--rows",
        type=size,
        nargs="+",
        metavar="N",
        help="numbers of rows (default: the standard problems)",
    )
    parser.add_argument(
        "--classes", type=size, nargs="+", metavar="K", help="numbers of classes; needs --rows"
    )
    parser.add_argument(
        "--hidden",
        type=size,
        nargs="+",
        metavar="D",
        help="sizes of the hidden states: measure the head (default: a loss of given logits)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        nargs="+",
        help="dtypes of the inputs (default: float32)",
    )
    parser.add_argument(
        "--dense", action="store_true", help="use dense targets [N, K] (default: labels [N])"
    )
    parser.add_argument(
        "--confident",
        type=float,
        default=CONFIDENT,
        metavar="SHARE",
        help="share of confident rows, whose label leads by 20, as in a trained model "
        f"(default: {CONFIDENT})",
    )
    parser.add_argument(
        "--counting",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the rows that count, at random positions; the head, which skips the others, "
        "is also measured with all rows (default: 1)",
    )
    parser.add_argument(
        "--only",
        choices=("value", "both"),
        help="measure only the value, or only value and gradient together (default: each)",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="NAME",
        help="libraries to compare with (default: all that are installed)",
    )
    parser.add_argument(
        "--chunk-size",
        type=size,
        nargs="+",
        metavar="ROWS",
        help="rows in a chunk of the head: also measure sxe with each of these chunk sizes",
    )
    parser.add_argument(
        "--suite",
        action="store_true",
        help="measure value and gradient of this device's standard problems, the most important "
        "first; print a table and write --json after each problem",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        metavar="SECONDS",
        help="with --suite: skip the remaining problems when the next one would probably end after "
        "this time (default: no limit)",
    )
    parser.add_argument(
        "--calls", action="store_true", help="measure the overhead of a call, on 8 x 10 logits"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small standard problems, at most 5 rounds"
    )
    parser.add_argument(
        "--rounds",
        type=size,
        default=15,
        metavar="N",
        help="largest number of rounds (default: 15)",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="time after which no further round of a problem starts; three always run "
        "(default: 60)",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write all results to this file"
    )
    parser.add_argument(
        "--plot",
        type=output_file,
        metavar="FILE",
        help="plot a sweep over one of the sizes to this file",
    )
    parser.set_defaults(run=partial(run, parser))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        from tqdm import tqdm

        from sxe._tools.bench import report

        if arguments.plot:
            from matplotlib.figure import Figure
    except ImportError as error:
        parser.error(f"needs {error.name}: pip install 'sxe[bench]'")
    _check_problem(parser, arguments)
    # PyTorch runs in its own process, which needs memory of the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    peers = _peers(parser, arguments)
    if arguments.suite:
        return _run_suite(arguments, peers)
    problems = _problems(arguments)
    if arguments.plot:
        several = report.varied(problems)
        if len(several) != 1:
            parser.error(
                "--plot: expected one of --rows, --hidden and --classes with several sizes, the "
                f"others with one, got several for {' and '.join(several) or 'none'}"
            )
        if arguments.plot.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
            parser.error(
                f"--plot: expected a file name in .png, .pdf or .svg, got {arguments.plot}"
            )
    kinds = {"value": (False,), "both": (True,), None: (False, True)}[arguments.only]
    rounds = min(5, arguments.rounds) if arguments.quick else arguments.rounds

    machine = measure.machine()
    print(report.heading(machine), flush=True)
    calls = list(measure.calls(rounds, arguments.confident)) if arguments.calls else []
    measurements: list[measure.Measurement] = []
    # disable=None: show no bar where standard error is not a terminal.
    with tqdm(total=len(problems) * len(kinds) * rounds, disable=None, leave=False) as bar:
        for problem in problems:
            bar.set_description(problem.name)
            for gradient in kinds:
                measurements.append(
                    measure.measure(
                        problem,
                        peers,
                        gradient=gradient,
                        rounds=rounds,
                        seconds=arguments.seconds,
                        chunk_sizes=arguments.chunk_size or (),
                        on_round=bar.update,
                        on_phase=bar.set_postfix_str,
                    )
                )
                bar.update(len(measurements) * rounds - bar.n)
    if measurements:
        print(report.table(measurements), *report.remarks(measurements), sep="\n")
    if calls:
        print(report.calls_table(calls))
    if arguments.json:
        arguments.json.write_text(report.to_json(machine, measurements, calls))
    if arguments.plot:
        report.plot(measurements, str(arguments.plot))
    return _exit_code(measurements)


def _exit_code(measurements: Sequence[measure.Measurement]) -> int:
    return 1 if any(t.wrong and t.name == "sxe" for m in measurements for t in m.timings) else 0


def _run_suite(arguments: argparse.Namespace, peers: Sequence[str]) -> int:
    """Measure one problem after the other. The results so far remain if one fails or time ends."""
    from sxe._tools.bench import report

    start = time.perf_counter()

    def phase(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    machine = measure.machine()
    print(report.heading(machine), flush=True)
    phase("machine measured")
    problems, chunk_sizes = _suite(arguments)
    measurements: list[measure.Measurement] = []
    failed = False
    expected = 0.0  # estimated seconds for the next problem
    for problem in problems:
        begun = time.perf_counter()
        if arguments.budget and expected and begun - start + expected > arguments.budget:
            phase(f"no time left for {problem.name}")
            break
        phase(problem.name)
        try:
            measurements.append(
                measure.measure(
                    problem,
                    peers,
                    gradient=True,
                    rounds=min(SUITE_ROUNDS, arguments.rounds),
                    seconds=arguments.seconds,
                    chunk_sizes=chunk_sizes.get(problem, ()),
                    on_phase=phase,
                )
            )
        except Exception as error:
            failed = True
            phase(f"failed at {problem.name}: {type(error).__name__}: {error}")
        else:
            print(f"\n{report.problem_table(measurements[-1])}", flush=True)
            if arguments.json:
                _replace(arguments.json, report.to_json(machine, measurements, []))
        expected = time.perf_counter() - begun
        if chunk_sizes.get(problem) and measurements:
            # Most of the time is compiling, and the next problem compiles fewer programs.
            count = len(measurements[-1].timings)
            expected *= 1 - len(chunk_sizes[problem]) / count
    if measurements:
        print("", report.table(measurements), *report.remarks(measurements), sep="\n")
    return 1 if failed else _exit_code(measurements)


def _suite(arguments: argparse.Namespace) -> tuple[list[Problem], dict[Problem, Sequence[int]]]:
    """The standard problems of this device, and the chunk sizes to measure the first head with."""
    on_cpu = jax.default_backend() == "cpu"
    problems = (
        standard_problems(arguments.quick, arguments.confident)
        if on_cpu
        else gpu_problems(arguments.confident)
    )
    heads = [p for p in problems if p.hidden is not None]
    sizes = arguments.chunk_size or (() if on_cpu else SUITE_CHUNKS)
    return problems, dict.fromkeys(heads[:1], sizes)


def _replace(file: Path, text: str) -> None:
    """Replace a file. If the process ends early, the old content remains."""
    unfinished = file.with_name(f"{file.name}.part")
    unfinished.write_text(text)
    unfinished.replace(file)


def _check_problem(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    sizes = (arguments.rows, arguments.classes, arguments.hidden)
    if any(sizes) and not arguments.rows:
        parser.error("--rows: expected with --classes or --hidden")
    if any(sizes) and not arguments.classes:
        parser.error("--classes: expected with --rows or --hidden")
    for option in ("dtype", "dense"):
        if getattr(arguments, option) and not any(sizes):
            parser.error(f"--{option}: expected with --rows and --classes")
    if arguments.dense and arguments.hidden:
        parser.error("--dense: expected logits, without --hidden")
    if not 0 < arguments.counting <= 1:
        parser.error(f"--counting: expected a share in (0, 1], got {arguments.counting}")
    if arguments.counting < 1 and not arguments.hidden:
        parser.error("--counting: expected with --hidden")
    if arguments.suite:
        for option in ("rows", "classes", "hidden", "dtype", "dense", "only", "calls", "plot"):
            if getattr(arguments, option):
                parser.error(f"--{option}: expected without --suite, which has its own problems")
    elif arguments.budget:
        parser.error("--budget: expected with --suite")
    if arguments.chunk_size and not (arguments.hidden or arguments.suite):
        parser.error("--chunk-size: expected with --hidden or --suite")
    if not 0 <= arguments.confident <= 1:
        parser.error(f"--confident: expected a share in [0, 1], got {arguments.confident}")


def _peers(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[str, ...]:
    found = contestants.installed()
    peers = tuple(found if arguments.peers is None else arguments.peers)
    if missing := [name for name in peers if name not in found]:
        parser.error(
            f"--peers: expected names among {', '.join(found)}, which are installed; "
            f"got {', '.join(missing)}"
        )
    return peers


def _problems(arguments: argparse.Namespace) -> list[Problem]:
    """Problems of the given sizes, or else the standard problems, or none with --calls."""
    if arguments.rows:
        return [
            Problem(
                rows,
                classes,
                hidden,
                dtype,
                dense=arguments.dense,
                confident=arguments.confident,
                counting=arguments.counting,
            )
            for hidden in arguments.hidden or (None,)
            for classes in arguments.classes
            for rows in arguments.rows
            for dtype in arguments.dtype or ("float32",)
        ]
    return [] if arguments.calls else standard_problems(arguments.quick, arguments.confident)
